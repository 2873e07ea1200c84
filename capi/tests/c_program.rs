//! `examples/attention.c`, compiled by the C compiler against the shared and the static library, and run. The program
//! compares with plain loops. With `SEGATTN_REQUIRE_GPU` and the feature `cuda` it runs on the GPU too.
#![cfg(target_os = "linux")]

use std::path::{Path, PathBuf};
use std::process::Command;

/// Where cargo put the libraries of this crate: beside the tests.
fn libraries() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    test.parent().expect("a folder").to_owned()
}

fn compile(program: &Path, link: &[&str]) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut command = Command::new(std::env::var_os("CC").unwrap_or("cc".into()));
    command
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-o"])
        .arg(program)
        .arg("-I")
        .arg(root.join("include"))
        .arg(root.join("examples/attention.c"))
        .args(link)
        .args(["-lpthread", "-ldl", "-lm"]);
    let output = command.output().expect("a C compiler");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
}

fn run(program: &Path, arguments: &[&str]) -> (bool, String) {
    let output = Command::new(program)
        .args(arguments)
        .env("LD_LIBRARY_PATH", libraries())
        .output()
        .expect("the program starts");
    let said = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

#[test]
fn a_c_program_computes_what_plain_loops_compute() {
    let folder = tempfile::tempdir().expect("a folder");
    let libraries = libraries();
    let archive = libraries.join("libsegattn_c.a");
    let search = format!("-L{}", libraries.display());
    let shared: &[&str] = &[&search, "-lsegattn_c"];
    for (name, link) in [
        ("shared", shared),
        ("static", &[archive.to_str().expect("UTF-8")]),
    ] {
        let program = folder.path().join(name);
        compile(&program, link);
        let (is_well, said) = run(&program, &[]);
        assert!(
            is_well && said.contains("CPU: largest relative error"),
            "{name}: {said}"
        );
        let (is_well, said) = run(&program, &["--cuda"]);
        if is_well || std::env::var_os("SEGATTN_REQUIRE_GPU").is_some() {
            assert!(
                is_well && said.contains("GPU: largest relative error"),
                "{name}: {said}"
            );
        } else {
            // A typed error that says what is missing.
            assert!(
                said.starts_with("opening GPU 0: status 6: "),
                "{name}: {said}"
            );
        }
    }
}

#[test]
fn the_header_is_accepted_by_a_cpp_compiler() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut command = Command::new(std::env::var_os("CXX").unwrap_or("c++".into()));
    command
        .args([
            "-std=c++17",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-fsyntax-only",
            "-x",
            "c++",
        ])
        .arg(root.join("include/segattn.h"));
    let output = command.output().expect("a C++ compiler");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
}
