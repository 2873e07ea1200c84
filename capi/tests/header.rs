//! `include/segattn.h` is what cbindgen makes of the sources. `SEGATTN_WRITE_HEADER=1` writes it.

use std::path::Path;

#[test]
fn the_header_is_that_of_the_sources() {
    let crate_folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_root_or_default(crate_folder);
    let bindings = cbindgen::generate_with_config(crate_folder, config).expect("bindings");
    let mut made = Vec::new();
    bindings.write(&mut made);
    let path = crate_folder.join("include/segattn.h");
    if std::env::var_os("SEGATTN_WRITE_HEADER").is_some() {
        std::fs::write(&path, &made).expect("written");
    }
    let committed = std::fs::read(&path).expect("include/segattn.h");
    assert!(
        committed == made,
        "make it anew: SEGATTN_WRITE_HEADER=1 cargo test -p segattn-capi --test header"
    );
}
