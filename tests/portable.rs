//! `tests/portable.sh` as it is documented: cargo accepts every line of it, and the folder holds what `run.sh` runs.
#![cfg(target_os = "linux")]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// Stands for cargo. The real one reads the options and stops at a manifest that is not there; what would be built is a
/// copy of a program that every machine has.
const CARGO: &str = r#"#!/usr/bin/env bash
said=$("$REAL_CARGO" "$@" --manifest-path /nonexistent/Cargo.toml 2>&1)
case "$said" in
  *"manifest path"*"does not exist"*) ;;
  *) echo "cargo $*: $said" >&2; exit 1 ;;
esac
while [ $# -gt 0 ]; do
  case "$1" in
    --test | --bin | --example | --bench)
      echo "{\"name\":\"$2\",\"src_path\":\"\",\"executable\":\"/bin/sh\"}"
      shift
      ;;
  esac
  shift
done
"#;

fn make_folder(options: &[&str]) {
    let scratch = tempfile::tempdir().expect("a folder");
    let cargo = scratch.path().join("cargo");
    std::fs::write(&cargo, CARGO).expect("a script");
    std::fs::set_permissions(&cargo, PermissionsExt::from_mode(0o755)).expect("its mode");
    let path = std::env::var("PATH").unwrap_or_default();
    let folder = scratch.path().join("folder");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/portable.sh");
    let output = Command::new(script)
        .arg(&folder)
        .args(options)
        .env("PATH", format!("{}:{path}", scratch.path().display()))
        .env("REAL_CARGO", env!("CARGO"))
        .env("NVCC", "/nonexistent/nvcc")
        .output()
        .expect("the script runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{options:?}: {said}");
    for file in [
        "attention_cuda",
        "decode_cuda",
        "memory_cuda",
        "segattn",
        "bench_attention",
        "bench_model",
        "candle_gpu",
        "many_clients.py",
        "run.sh",
    ] {
        assert!(folder.join(file).exists(), "{options:?}: no {file}; {said}");
    }
}

#[test]
fn cargo_accepts_every_line_of_the_documented_commands() {
    make_folder(&[]);
    make_folder(&["--release"]);
    make_folder(&["-r", "--locked"]);
}
