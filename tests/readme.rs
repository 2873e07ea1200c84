//! The shell commands of the README's quick starts run as they are written, but for sizes. Its Rust code for the CPU is
//! a documentation test, and its code for a GPU is taken from an example.
#![cfg(feature = "cli")]

use std::path::Path;
use std::process::Command;

/// What the commands read.
const FILES: [&str; 4] = [
    "README.md",
    "configs/train.toml",
    "docs/contract.md",
    "docs/architecture.md",
];
/// What is changed in them, so that they take seconds: sizes only.
const SMALLER: [[&str; 2]; 5] = [
    [
        "segattn train",
        "segattn train --training.batch 1 --training.validate-every 0",
    ],
    ["steps 20", "steps 2"],
    ["steps 30", "steps 3"],
    ["step-0000000030", "step-0000000003"],
    ["segattn eval", "segattn eval --samples 1"],
];

/// The `sh` blocks below the headings that begin with "Quick start", without their fences.
fn quick_starts(readme: &str) -> String {
    let sections = readme
        .split("\n## ")
        .filter(|section| section.starts_with("Quick start"));
    let blocks = sections.flat_map(|section| section.split("```sh\n").skip(1));
    let text = blocks.map(|block| block.split("```").next().expect("a fence"));
    text.collect()
}

#[test]
fn quick_starts_run() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().expect("a folder");
    for file in FILES {
        let copy = folder.path().join(file);
        std::fs::create_dir_all(copy.parent().expect("a parent")).expect("a folder");
        std::fs::copy(root.join(file), copy).expect(file);
    }
    let readme = std::fs::read_to_string(root.join("README.md")).expect("README.md");
    let commands = quick_starts(&readme);
    assert!(commands.matches("segattn ").count() >= 6, "{commands}");
    let small = SMALLER.iter().fold(commands, |text, [from, to]| {
        assert!(text.contains(from), "README.md: {from}");
        text.replace(from, to)
    });
    let program = env!("CARGO_BIN_EXE_segattn");
    let output = Command::new("sh")
        .args([
            "-euc",
            &format!("segattn() {{ '{program}' -q \"$@\"; }}\n{small}"),
        ])
        .current_dir(folder.path())
        .output()
        .expect("sh");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{small}\n{errors}");
}

#[test]
fn code_for_a_gpu_is_the_examples() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |file: &str| std::fs::read_to_string(root.join(file)).expect(file);
    let (readme, example) = (read("README.md"), read("examples/attention_slices.rs"));
    let block = readme
        .split("```rust,ignore\n")
        .nth(1)
        .expect("a block for a GPU");
    let mut rest = example.lines().map(str::trim);
    let lines = block.split("```").next().expect("a fence").lines();
    for line in lines.filter(|line| !line.is_empty()) {
        assert!(
            rest.any(|other| other == line.trim()),
            "not in the example, or in another order: {line}"
        );
    }
}
