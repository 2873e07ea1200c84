//! `segattn train --ranks` as processes: equal bits, one set of files, and an end when a rank is lost.
use crate::meeting;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use crate::training::{
    self, losses, newest, prepare, resume, same, send, succeed, train, wait_for_lines,
};

fn with(mut command: Command, arguments: &[&str]) -> Command {
    command.args(arguments);
    command
}

const SHORT: [&str; 6] = [
    "--training.steps",
    "8",
    "--training.batch",
    "3",
    "--training.group",
    "1",
];

#[test]
fn a_run_of_several_processes_has_the_bits_and_files_of_one_and_goes_on_with_another_number() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    prepare(at);
    succeed(with(train(at, "one"), &SHORT));
    succeed(with(
        train(at, "two"),
        &[
            &SHORT[..],
            // A limit that no clock can be set to.
            &["--ranks", "2", "--rank-timeout", "18446744073709551615"],
        ]
        .concat(),
    ));
    same(at, "one", "two");
    assert!(at.join("two/loss.svg").is_file());

    succeed(with(resume(at, "one"), &["--training.steps", "12"]));
    let more = with(
        resume(at, "two"),
        &["--training.steps", "12", "--ranks", "4"],
    );
    let output = succeed(more);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(said.matches("done after 12 steps").count(), 1, "{said}");
    assert!(said.contains("gives work to 3 of 4 ranks"), "{said}");
    same(at, "one", "two");
}

/// Processes that a launcher has started, with these arguments each.
fn launched(folder: &Path, arguments: &[Vec<&str>]) -> Vec<Child> {
    let (port, world) = (meeting::free_port().to_string(), arguments.len());
    let start = |(rank, arguments): (usize, &Vec<&str>)| {
        let mut command = with(train(folder, "run"), arguments);
        command.env("RANK", rank.to_string());
        command.env("LOCAL_RANK", rank.to_string());
        command
            .env("WORLD_SIZE", world.to_string())
            .env("RAYON_NUM_THREADS", "1");
        command
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", &port);
        command.spawn().unwrap()
    };
    arguments.iter().enumerate().map(start).collect()
}

/// How processes end, and what they say.
fn ends(children: Vec<Child>) -> Vec<(Option<i32>, String)> {
    let end = |child: Child| {
        let output = child.wait_with_output().unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    children.into_iter().map(end).collect()
}

#[test]
fn a_rank_that_is_killed_ends_the_run_of_all_with_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    prepare(folder.path());
    let arguments = vec!["--training.steps", "100000", "--rank-timeout", "20"];
    let children = launched(folder.path(), &vec![arguments; 3]);
    wait_for_lines(&folder.path().join("run"), 5);
    send("-KILL", &children[1]);
    let killed = Instant::now();
    let ends = ends(children);
    assert!(
        killed.elapsed() < Duration::from_secs(20),
        "{:?}",
        killed.elapsed()
    );
    assert_eq!(ends[1].0, None);
    for (rank, (code, said)) in [(0, &ends[0]), (2, &ends[2])] {
        assert_eq!(*code, Some(1), "{said}");
        assert!(
            said.contains("rank 1") && !said.contains("panicked"),
            "rank {rank}: {said}"
        );
    }
    // The last checkpoint is whole.
    assert!(newest(&folder.path().join("run")).progress.step > 0);
}

#[test]
fn a_rank_that_is_stopped_ends_the_run_within_the_time_limit() {
    let folder = tempfile::tempdir().unwrap();
    prepare(folder.path());
    let arguments = vec!["--training.steps", "100000", "--rank-timeout", "2"];
    let mut children = launched(folder.path(), &vec![arguments; 3]);
    wait_for_lines(&folder.path().join("run"), 5);
    send("-STOP", &children[2]);
    let stopped = Instant::now();
    let mut still = children.pop().unwrap();
    let ends = ends(children);
    assert!(
        stopped.elapsed() < Duration::from_secs(15),
        "{:?}",
        stopped.elapsed()
    );
    still.kill().and_then(|()| still.wait()).unwrap();
    for (code, said) in &ends {
        assert_eq!(*code, Some(1), "{said}");
        assert!(said.contains("rank 2"), "{said}");
    }
}

#[test]
fn ranks_that_disagree_say_in_what_before_the_first_step() {
    let folder = tempfile::tempdir().unwrap();
    prepare(folder.path());
    let other = folder.path().join("other.txt");
    std::fs::write(&other, "other words ".repeat(400)).unwrap();
    let other = other.to_str().unwrap();
    for (different, named) in [
        (
            vec!["--training.batch", "4"],
            "training.batch: expected 2 as on rank 0, got 4",
        ),
        (
            vec!["--model.segment.prior-len", "16"],
            "model.segment.prior_len",
        ),
        (vec!["--data.validation", other], "data"),
    ] {
        let children = launched(folder.path(), &[vec![], different, vec![]]);
        for (code, said) in ends(children) {
            assert_eq!(code, Some(1), "{said}");
            assert!(said.contains(named), "{said}");
        }
        assert!(!folder.path().join("run/metrics.jsonl").exists());
    }
}

#[test]
fn an_interrupt_is_heeded_by_all_and_saved_once() {
    let folder = tempfile::tempdir().unwrap();
    prepare(folder.path());
    let arguments = [
        "--training.steps",
        "100000",
        "--checkpoint.every",
        "0",
        "--ranks",
        "2",
    ];
    let mut command = with(train(folder.path(), "run"), &arguments);
    training::heed_interrupts(&mut command);
    let mut child = command.spawn().unwrap();
    wait_for_lines(&folder.path().join("run"), 5);
    send("-INT", &child);
    assert_eq!(training::wait(&mut child).code(), Some(1));
    let run = folder.path().join("run");
    let (found, last) = (newest(&run), losses(&run).last().unwrap().0);
    assert!(found.progress.step > 0 && found.progress.step == last);
}
