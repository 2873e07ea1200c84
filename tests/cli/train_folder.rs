//! A run's folder: one process at a time, metrics that are not lost, names and times of every kind, signals.
use std::fs;
use std::process::Command;

use crate::training::{
    self, fail, losses, losses_len, newest, prepare, resume, succeed, train, wait_for_lines,
};

#[cfg(unix)]
#[test]
fn a_second_process_in_a_runs_folder_is_refused_with_the_first_ones_number_and_the_first_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    prepare(folder.path());
    let run = folder.path().join("run");
    let mut first = train(folder.path(), "run");
    let mut first = first.args(["--training.steps", "100000"]).spawn().unwrap();
    wait_for_lines(&run, 5);
    let holder = format!("process {}", first.id());
    fail(train(folder.path(), "run"), &holder);
    fail(resume(folder.path(), "run"), &holder);
    std::os::unix::fs::symlink(&run, folder.path().join("link")).unwrap();
    fail(train(folder.path(), "link"), &holder);
    let lines = losses_len(&run);
    wait_for_lines(&run, lines + 5);
    // The lock dies with its process.
    first.kill().unwrap();
    first.wait().unwrap();
    let steps: Vec<u64> = losses(&run).iter().map(|l| l.0).collect();
    assert!(steps.is_sorted() && steps.len() >= 10, "{steps:?}");
    let mut again = resume(folder.path(), "run");
    again.args(["--training.steps", &(steps.len() + 5).to_string()]);
    succeed(again);
}

#[test]
fn a_line_of_the_metrics_that_cannot_be_read_stays_and_is_said_even_when_quiet() {
    let folder = tempfile::tempdir().unwrap();
    prepare(folder.path());
    let mut first = train(folder.path(), "run");
    first.args(["--training.steps", "8"]);
    succeed(first);
    let path = folder.path().join("run/metrics.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    let mut lines: Vec<&str> = text.lines().collect();
    (lines[3], lines[5]) = ("garbage", "[4, 1.0]");
    let odd = r#"{"step":7,"loss":1.5,"note":"kept"}"#;
    lines.insert(7, odd);
    fs::write(&path, lines.join("\n") + "\n{\"step\": 9, \"lo").unwrap();
    let mut second = resume(folder.path(), "run");
    second.args(["-q", "--training.steps", "10"]);
    let said = String::from_utf8_lossy(&succeed(second).stderr).into_owned();
    for line in ["metrics.jsonl, line 4", "metrics.jsonl, line 6"] {
        assert!(said.contains(line), "{said}");
    }
    let after = fs::read_to_string(&path).unwrap();
    let kept: Vec<&str> = after.lines().collect();
    assert_eq!(kept[..lines.len()], lines);
    assert!(
        !after.contains("\"lo{") && kept.len() > lines.len(),
        "{after}"
    );
}

#[cfg(target_os = "linux")]
#[test]
fn a_folder_whose_name_is_not_utf_8_is_resumed_and_saved_into() {
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().unwrap();
    prepare(folder.path());
    let mut first = train(folder.path(), "run");
    first.args(["--training.steps", "4"]);
    succeed(first);
    let moved = folder.path().join(std::ffi::OsStr::from_bytes(b"r\xff"));
    fs::rename(folder.path().join("run"), &moved).unwrap();
    let mut second = training::segattn();
    second
        .arg("resume")
        .arg(&moved)
        .args(["--training.steps", "6"]);
    succeed(second);
    assert_eq!(newest(&moved).progress.step, 6);
}

#[test]
fn times_and_counts_of_any_size_are_a_run_or_a_typed_error() {
    let folder = tempfile::tempdir().unwrap();
    prepare(folder.path());
    let of = |key: &str, value: &str| {
        let mut command = train(folder.path(), &format!("{key}-{value}"));
        command
            .args(["--training.steps", "1", "--schedule.warmup-steps", "0"])
            .arg(format!("--{key}"))
            .arg(value);
        command
    };
    for minutes in ["1e38", "1e300", "1e-300"] {
        succeed(of("training.time-limit-minutes", minutes));
    }
    for key in ["training.batch", "training.accumulation"] {
        for count in ["2097152", "4294967296", "9223372036854775807"] {
            fail(of(key, count), &key.replace('-', "_"));
        }
    }
    for key in [
        "training.sequence-len",
        "training.segments-per-step",
        "training.validation-sequences",
        "checkpoint.keep",
    ] {
        succeed(of(key, "9223372036854775807"));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_signal_that_was_ignored_at_the_start_stays_ignored_and_another_ends_the_run() {
    let folder = tempfile::tempdir().unwrap();
    prepare(folder.path());
    let run = folder.path().join("run");
    let mut command = Command::new("nohup");
    let trained = train(folder.path(), "run");
    command.arg(trained.get_program()).args(trained.get_args());
    command.args(["--training.steps", "100000"]);
    let command = command
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null());
    let mut child = command.spawn().unwrap();
    wait_for_lines(&run, 5);
    training::send("-HUP", &child);
    let lines = losses_len(&run);
    wait_for_lines(&run, lines + 20);
    assert!(child.try_wait().unwrap().is_none(), "stopped at SIGHUP");
    training::send("-TERM", &child);
    assert_eq!(training::wait(&mut child).code(), Some(1));
    assert_eq!(newest(&run).progress.step, losses(&run).last().unwrap().0);
}
