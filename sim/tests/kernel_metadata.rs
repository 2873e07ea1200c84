//! The crate's table of the kernels' constants is what the compiled kernels hold.
//!
//! Regenerate with `SEGATTN_WRITE_METADATA=1 cargo test -p segattn-sim --test kernel_metadata`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use segattn::cuda::kernels::File;
use segattn_sim::{Module, Source};

/// Names of a file's constants `<entry>_info`, without the ending.
fn entries(module: &Module) -> Vec<String> {
    let output = Command::new("nm").arg(module.path()).output().expect("nm");
    let symbols = String::from_utf8(output.stdout).expect("names");
    let names = symbols.lines().filter_map(|line| line.split(' ').nth(2));
    names
        .filter_map(|name| name.strip_suffix("_info"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_table_is_that_of_the_kernels() {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels");
    let mut infos = BTreeMap::new();
    for file in File::ALL {
        let path = kernels.join(file.stem()).with_extension("cu");
        let module = Module::compile(&Source::new(path)).expect("a module");
        for name in entries(&module) {
            let info: [i32; 7] = module.constant(&format!("{name}_info")).expect("info");
            infos.insert(name, info);
        }
    }
    let mut text = String::from(
        "//! The constant `<entry>_info` of every kernel, in `SegattnKernelInfo`'s order. Written by a test of the\n\
         //! simulated GPU, `sim/tests/kernel_metadata.rs`.\n\n\
         #[rustfmt::skip]\npub(super) const METADATA: &[(&str, [i32; 7])] = &[\n",
    );
    for (name, info) in &infos {
        writeln!(text, "    (\"{name}\", {info:?}),").expect("text");
    }
    text += "];\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../src/cuda/kernels/metadata/table.rs");
    if std::env::var_os("SEGATTN_WRITE_METADATA").is_some() {
        std::fs::write(&path, &text).expect("a file");
    }
    let committed = std::fs::read_to_string(&path).expect("a file");
    assert!(
        committed == text,
        "src/cuda/kernels/metadata/table.rs is not that of the kernels; see the head of this test"
    );
}
