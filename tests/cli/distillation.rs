//! `segattn train` with a teacher: metrics, equal bits of resumed runs and of ranks, and messages.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::training::{fail, newest, newest_folder, prepare, resume, same, succeed, train};

/// A text, and a model that was trained on it with full attention.
fn teacher(folder: &Path) -> PathBuf {
    prepare(folder);
    let mut command = train(folder, "full");
    command.args(["--training.steps", "12", "--model.segment.segment-len", "0"]);
    succeed(command);
    newest_folder(&folder.join("full"))
}

fn with(mut command: Command, arguments: &[&str]) -> Command {
    command.args(arguments);
    command
}

/// Its weights in segments, trained with a teacher.
fn student(folder: &Path, output: &str, from: &Path, teacher: &str, steps: &str) -> Command {
    let mut command = train(folder, output);
    command.arg("--model.folder").arg(from);
    command.args(["--distillation.model", teacher, "--training.steps", steps]);
    command.args(["--training.batch", "3", "--training.group", "1"]);
    // With a learning rate that does not depend on how many steps there will be.
    command.args(["--schedule.kind", "constant"]);
    command
}

fn divergences(run: &Path) -> Vec<f64> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    lines
        .filter_map(|line| line["divergence"].as_f64())
        .collect()
}

#[test]
fn a_run_with_a_teacher_has_divergences_and_the_same_bits_resumed_and_on_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let from = teacher(at);
    let name = from.to_str().unwrap();
    succeed(student(at, "one", &from, name, "9"));
    let shown = divergences(&at.join("one"));
    assert_eq!(shown.len(), 9);
    assert!(
        shown.iter().all(|d| d.is_finite() && *d >= 0.0),
        "{shown:?}"
    );
    let two = student(at, "two", &from, name, "9");
    succeed(with(two, &["--ranks", "2"]));
    same(at, "one", "two");
    assert_eq!(divergences(&at.join("two")), shown);

    succeed(student(at, "three", &from, name, "4"));
    // The teacher may have been moved.
    let moved = at.join("moved");
    std::fs::rename(&from, &moved).unwrap();
    let more = ["--training.steps", "9", "--distillation.model"];
    let more = with(resume(at, "three"), &more);
    succeed(with(more, &[moved.to_str().unwrap()]));
    // It has one validation more.
    let [one, three] = ["one", "three"].map(|run| newest(&at.join(run)));
    assert_eq!(one.progress, three.progress);
    assert!(one.tensors == three.tensors);
    assert_eq!(divergences(&at.join("three")), shown);
    assert_eq!(one.data, three.data);
    assert_eq!(one.data.teacher.map(|name| name.len()), Some(64));
}

#[test]
fn what_cannot_be_is_said_before_the_first_step() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let from = teacher(at);
    let name = from.to_str().unwrap();
    let more = |args: &[&str]| with(student(at, "run", &from, name, "2"), args);
    fail(more(&["--stages", "2"]), "not spread over stages");
    let segments = ["--distillation.execution", "segments"];
    fail(more(&segments), "no `segment` object");
    fail(
        more(&["--distillation.weight", "1.5"]),
        "a number from 0 to 1",
    );
    fail(
        more(&["--distillation.temperature", "0"]),
        "a finite number > 0",
    );
    fail(student(at, "run", &from, "nowhere", "2"), "nowhere");
    let none = student(at, "run", &from, "none", "2");
    fail(
        with(none, &["--distillation.weight", "0.5"]),
        "a model folder",
    );
    let mut new = train(at, "run");
    new.arg("--distillation.model").arg(&from);
    new.args(["--model.shape.vocab-size", "300"]);
    fail(new, "vocabulary of 300 ids");

    succeed(more(&[]));
    let full = ["--training.steps", "2", "--model.segment.segment-len", "0"];
    succeed(with(train(at, "other"), &full));
    let resumed = |folder: &str| {
        let mut command = resume(at, "run");
        command.args(["--training.steps", "3", "--distillation.model", folder]);
        command
    };
    let other = newest_folder(&at.join("other"));
    fail(resumed(&other.to_string_lossy()), "another teacher");
    fail(resumed("none"), "a teacher where the saved run has one");
}
