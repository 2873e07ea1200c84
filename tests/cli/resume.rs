//! `segattn resume` with other keys or other data than the run had: an error, or what the documentation says; nothing
//! without a word, nothing without an end.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::training::{
    fail, losses, newest, prepare, resume, send, succeed, train, train_on, wait, wait_for_lines,
};

/// Runs `steps` steps on everything in `folder`.
fn begin(folder: &Path, steps: &str, more: &[&str]) {
    prepare(folder);
    let mut first = train(folder, "run");
    first.args(["--training.steps", steps]).args(more);
    succeed(first);
}

fn go_on(folder: &Path, steps: &str, more: &[&str]) -> Command {
    let mut command = resume(folder, "run");
    command.args(["--training.steps", steps]).args(more);
    command
}

#[test]
fn another_cut_or_order_of_the_data_is_refused_and_the_same_cut_by_another_number_is_not() {
    let folder = tempfile::tempdir().unwrap();
    begin(folder.path(), "6", &["--training.sequence-len", "32"]);
    for len in ["0", "1", "64", "100000"] {
        let other = go_on(folder.path(), "8", &["--training.sequence-len", len]);
        fail(other, "training.sequence_len");
    }
    let other = go_on(folder.path(), "8", &["--training.seed", "7"]);
    fail(other, "training.seed");
    succeed(go_on(folder.path(), "8", &["--training.batch", "1"]));

    let whole = tempfile::tempdir().unwrap();
    begin(whole.path(), "3", &["--training.sequence-len", "0"]);
    let same = ["--training.sequence-len", "100000"];
    succeed(go_on(whole.path(), "4", &same));
    assert_eq!(newest(&whole.path().join("run")).progress.step, 4);
}

#[test]
fn a_mixture_with_tasks_goes_on_exactly_and_another_mixture_is_refused() {
    let parts = |weight: &str, paths: &str| {
        let asked =
            r#"{name = "asked", tasks = {questions = 1, min_distance = 8, answer_weight = 4}}"#;
        format!("[{{name = \"plain\", weight = {weight}{paths}}}, {asked}]")
    };
    let mixture = parts("0.5", "");
    // The length of a run is part of other schedules.
    let more = [
        ["--data.mixture", &mixture],
        ["--training.sequence-len", "400"],
        ["--schedule.kind", "constant"],
    ]
    .concat();
    let [whole, cut] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    begin(whole.path(), "8", &more);
    begin(cut.path(), "5", &more);
    fail(
        go_on(cut.path(), "8", &["--data.mixture", &parts("0.25", "")]),
        "data.mixture",
    );
    let other = cut.path().join("other.txt");
    fs::write(&other, "other words ".repeat(300)).unwrap();
    let paths = format!(", paths = [{other:?}]");
    fail(
        go_on(cut.path(), "8", &["--data.mixture", &parts("0.5", &paths)]),
        "training data changed",
    );
    succeed(go_on(cut.path(), "8", &[]));
    let [whole, cut] = [&whole, &cut].map(|folder| folder.path().join("run"));
    assert!(newest(&whole).tensors == newest(&cut).tensors);
    // Validations are at the end of each run too.
    let steps =
        |run: &Path| -> Vec<_> { losses(run).into_iter().filter(|l| l.1.is_some()).collect() };
    assert_eq!(steps(&whole), steps(&cut));
}

#[test]
fn keys_that_a_run_cannot_change_are_refused_and_the_guards_are_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    begin(folder.path(), "6", &[]);
    fail(
        go_on(folder.path(), "8", &["--model.segment.past-len", "16"]),
        "model",
    );
    succeed(go_on(
        folder.path(),
        "8",
        &["--guard.z-score", "none", "--guard.window", "2"],
    ));
    let guard = newest(&folder.path().join("run")).progress.guard;
    assert_eq!((guard.config().z_score, guard.config().window), (None, 2));
}

#[test]
fn data_that_changed_are_noticed_the_boundary_of_validation_among_them() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for (sub, names) in [
        ("t", &["a", "b", "c"][..]),
        ("less", &["a", "b"]),
        ("v", &["c"]),
        ("w", &["d"]),
    ] {
        fs::create_dir(at(sub)).unwrap();
        for name in names {
            fs::write(
                at(sub).join(format!("{name}.txt")),
                format!("the words of {name} ").repeat(200),
            )
            .unwrap();
        }
    }
    let paths = ["less", "v", "w"].map(|name| at(name).display().to_string());
    let [less, v, w] = paths.each_ref().map(String::as_str);
    prepare(folder.path());
    let mut first = train_on(folder.path(), "run", &at("t"));
    first.args(["--training.steps", "6", "--data.validation", v]);
    succeed(first);
    for other in [
        &["--data.train", less][..],
        &["--data.train", less, "--data.validation", v],
        &["--data.validation", "[]"],
    ] {
        fail(go_on(folder.path(), "8", other), "data changed");
    }
    // What is only validated on changes no step.
    let output = succeed(go_on(folder.path(), "8", &["--data.validation", w]));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("validation data changed"), "{said}");
}

#[test]
fn a_run_whose_folder_lies_in_its_data_does_not_read_itself() {
    let folder = tempfile::tempdir().unwrap();
    prepare(folder.path());
    let train_in = |output: &str, steps: &str| {
        let mut command = train_on(folder.path(), output, folder.path());
        command.args(["--training.steps", steps]);
        command
    };
    succeed(train_in("run", "6"));
    succeed(go_on(folder.path(), "8", &[]));
    succeed(train_in("run2", "6"));
    // The data's folder is the run's.
    succeed(train_in("", "6"));
    let mut again = resume(folder.path(), "");
    again.args(["--training.steps", "8"]);
    succeed(again);
    let tokens = |run: &str| losses(&folder.path().join(run))[1..7].to_vec();
    assert_eq!(tokens("run"), tokens("run2"));
    assert_eq!(tokens("run"), tokens(""));
}

#[test]
fn what_the_messages_of_data_errors_name() {
    let folder = tempfile::tempdir().unwrap();
    prepare(folder.path());
    let file = |name: &str, content: &str| {
        fs::write(folder.path().join(name), content).unwrap();
        train_on(folder.path(), "run", &folder.path().join(name))
    };
    fail(file("short.txt", "ab"), "validation_share");
    fail(file("one.txt", "a"), "two tokens");
    fail(file("null.jsonl", "{\"text\": null}\n"), "null");
    fail(file("ids300.json", "[1, 2, 300]"), "ids300.json");
    fail(file("mixed.json", "[1, [2]]"), "mixed.json");
}

#[cfg(unix)]
#[test]
fn a_signal_ends_a_long_step_between_its_segments_and_the_step_was_not() {
    let folder = tempfile::tempdir().unwrap();
    prepare(folder.path());
    let mut command = train(folder.path(), "run");
    // A step of minutes, in one batch, after a validation whose line shows that signals are noted.
    command.args(["--training.sequence-len", "0", "--training.batch", "300"]);
    let mut child = command.spawn().unwrap();
    wait_for_lines(&folder.path().join("run"), 1);
    std::thread::sleep(std::time::Duration::from_millis(300));
    send("-TERM", &child);
    assert_eq!(wait(&mut child).code(), Some(1));
    assert_eq!(newest(&folder.path().join("run")).progress.step, 0);
}
