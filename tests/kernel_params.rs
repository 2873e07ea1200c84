//! The host's mirrors of `kernels/params.h` and `kernels/layer_params.h`: each is what bindgen makes of its header
//! today, and every size and offset in it is that of the compilers that build the kernels.
//!
//! Regenerate with `SEGATTN_WRITE_BINDINGS=1 cargo test --test kernel_params`. bindgen needs libclang, which it
//! looks for where `LIBCLANG_PATH` says and in the Python package (`pip install libclang`); where there is none the
//! comparison is skipped, unless `SEGATTN_REQUIRE_LIBCLANG` is set.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Headers and their mirrors.
const MIRRORS: [[&str; 2]; 2] = [
    ["params.h", "src/cuda/kernels/params.rs"],
    ["layer_params.h", "src/cuda/kernels/layer_params.rs"],
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The folder of the Python package's libclang, of any interpreter in `PATH`.
fn python_libclang() -> Option<PathBuf> {
    let script = "import clang, os; print(os.path.join(os.path.dirname(clang.__file__), 'native'))";
    let output = Command::new("python3").args(["-c", script]).output().ok()?;
    let folder = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    folder.is_dir().then_some(folder)
}

/// What bindgen makes of a header; `None` where there is no libclang.
fn generated(name: &str) -> Option<String> {
    if std::env::var_os("LIBCLANG_PATH").is_none()
        && let Some(folder) = python_libclang()
    {
        // SAFETY: this test's process reads its environment on no other thread.
        unsafe { std::env::set_var("LIBCLANG_PATH", folder) };
    }
    let header = format!(
        "\
//! The structs of `kernels/{name}`: what a kernel is launched with. Written by bindgen, see
//! `tests/kernel_params.rs`; comments and shapes are in the header.
#![allow(missing_docs)]
"
    );
    let bindings = std::panic::catch_unwind(|| {
        bindgen::Builder::default()
            .header(root().join("kernels").join(name).to_string_lossy())
            .disable_header_comment()
            .raw_line(&header)
            .use_core()
            .allowlist_type("Segattn.*")
            .layout_tests(true)
            .formatter(bindgen::Formatter::None)
            .generate()
    });
    // bindgen panics where no libclang can be loaded, and returns an error where the header is wrong.
    let text = bindings.ok()?.expect(name).to_string();
    Some(formatted(&text))
}

fn formatted(text: &str) -> String {
    let folder = tempfile::tempdir().expect("folder");
    let file = folder.path().join("bindings.rs");
    std::fs::write(&file, text).expect("write");
    let output = Command::new("rustfmt")
        .args(["--edition", "2024"])
        .arg(&file)
        .output();
    assert_success("rustfmt", &output.expect("rustfmt"));
    std::fs::read_to_string(&file).expect("read")
}

fn assert_success(what: &str, output: &Output) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{what}: {message}");
}

#[test]
fn mirrors_are_what_bindgen_makes_of_the_headers() {
    MIRRORS
        .iter()
        .for_each(|[name, mirror]| compare(name, mirror));
}

fn compare(name: &str, mirror: &str) {
    let path = root().join(mirror);
    let Some(text) = generated(name) else {
        assert!(
            std::env::var_os("SEGATTN_REQUIRE_LIBCLANG").is_none(),
            "no libclang, so the mirror of {name} is not compared: pip install libclang"
        );
        eprintln!(
            "SKIPPED: no libclang, so {mirror} is not compared with {name}: pip install libclang"
        );
        return;
    };
    if std::env::var_os("SEGATTN_WRITE_BINDINGS").is_some() {
        std::fs::write(&path, &text).expect("write");
    }
    let committed = std::fs::read_to_string(&path).expect("read");
    assert!(
        committed == text,
        "{mirror} is not that of {name}; see the head of this test"
    );
}

/// Static assertions, in C++, of every size, alignment and offset that the mirrors assert in Rust.
fn assertions() -> String {
    let mut source = String::from("#include <stddef.h>\n");
    let mut mirror = String::new();
    for [name, path] in MIRRORS {
        writeln!(source, "#include \"{name}\"").expect("string");
        mirror += &std::fs::read_to_string(root().join(path)).expect("read");
    }
    let flat = mirror.split_whitespace().collect::<Vec<_>>().join(" ");
    for entry in flat.split("[\"").skip(1) {
        let (name, rest) = entry.split_once('"').expect("quote");
        let number = rest.split_once("- ").expect("minus").1;
        let number = number.split_once("usize").expect("usize").0;
        let claim = if let Some(name) = name.strip_prefix("Size of ") {
            format!("sizeof({name})")
        } else if let Some(name) = name.strip_prefix("Alignment of ") {
            format!("alignof({name})")
        } else {
            let field = name.strip_prefix("Offset of field: ").expect("offset");
            let (name, field) = field.split_once("::").expect("::");
            format!("offsetof({name}, {field})")
        };
        writeln!(source, "static_assert({claim} == {number}, \"{claim}\");").expect("string");
    }
    source
}

#[test]
fn every_size_and_offset_is_that_of_the_compilers() {
    let source = assertions();
    assert!(
        source.matches("offsetof(SegattnProblem").count() >= 19
            && source.contains("offsetof(SegattnNormParams"),
        "{source}"
    );
    let folder = tempfile::tempdir().expect("folder");
    let file = folder.path().join("layout.cu");
    std::fs::write(&file, &source).expect("write");
    let include = format!("-I{}", root().join("kernels").display());
    let host = Command::new("g++")
        .args(["-xc++", "-std=c++17", "-fsyntax-only", &include])
        .arg(&file)
        .output();
    assert_success(
        "g++",
        &host.expect("g++, which the simulated GPU needs too"),
    );
    let Some(nvcc) = std::env::var_os("NVCC") else {
        eprintln!("SKIPPED: NVCC is not set, so the device's compiler is not asked; g++ agrees");
        return;
    };
    let device = Command::new(nvcc)
        .args(["-std=c++17", "-ptx", "-arch=compute_80", &include, "-o"])
        .arg(folder.path().join("layout.ptx"))
        .arg(&file)
        .output();
    assert_success("nvcc", &device.expect("NVCC"));
}

#[test]
fn a_wrong_offset_is_refused_by_the_compiler() {
    let source = assertions().replacen(
        "offsetof(SegattnTensor, batch_stride) == 16",
        "offsetof(SegattnTensor, batch_stride) == 8",
        1,
    );
    let folder = tempfile::tempdir().expect("folder");
    let file = folder.path().join("layout.cc");
    std::fs::write(&file, &source).expect("write");
    let include = format!("-I{}", root().join("kernels").display());
    let output = Command::new("g++")
        .args(["-std=c++17", "-fsyntax-only", &include])
        .arg(&file)
        .output();
    assert!(!output.expect("g++").status.success());
}
