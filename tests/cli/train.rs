//! `segattn train` and `resume` as processes: killed at random moments, a run ends in the bits of one that
//! was not; Ctrl-C saves and stops; a run is never overwritten.
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::training::{self, losses, losses_len, newest, prepare, resume, succeed, train};
use segattn::train::checkpoint::list;

/// Whether a checkpoint is being written or removed, or was when the run was killed.
fn saving(run: &Path) -> bool {
    let names = std::fs::read_dir(run.join("checkpoints"));
    let unfinished = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with(".writing-");
    names.is_ok_and(|mut names| names.any(|name| unfinished(&name.unwrap().file_name())))
}

#[test]
fn a_run_killed_at_random_moments_and_resumed_ends_in_the_bits_of_one_that_was_not() {
    let folder = tempfile::tempdir().unwrap();
    prepare(folder.path());
    succeed(train(folder.path(), "whole"));

    let mut next = 0x9e37_79b9_7f4a_7c15u64 ^ u64::from(std::process::id());
    let (mut kills, mut torn, mut begun) = (0, 0, false);
    let run = folder.path().join("killed");
    for attempt in 0.. {
        assert!(attempt < 200, "the run does not get on");
        let mut command = if begun {
            resume(folder.path(), "killed")
        } else {
            train(folder.path(), "killed")
        };
        let mut child = command.spawn().unwrap();
        next ^= next << 13;
        next ^= next >> 7;
        next ^= next << 17;
        // One of four while it starts, one while it saves (all, until one was torn), two some steps on.
        let at_save = torn == 0 || next & 3 == 1;
        let old = saving(&run);
        let steps = losses_len(&run) + 1 + (next >> 8) as usize % 30;
        let moment = Duration::from_millis((next >> 8) & 31);
        let started = Instant::now();
        while child.try_wait().unwrap().is_none() {
            let due = match at_save {
                // What the run before left behind is cleared first.
                true => saving(&run) && (!old || losses_len(&run) >= steps),
                false if next & 3 == 0 => started.elapsed() > moment,
                false => losses_len(&run) >= steps,
            };
            if due {
                break;
            }
            sleep(Duration::from_micros(200));
        }
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "attempt {attempt}");
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        torn += usize::from(saving(&run));
        begun = !list(&folder.path().join("killed/checkpoints"))
            .unwrap()
            .is_empty();
    }
    assert!(
        kills >= 2 && torn >= 1,
        "{kills} kills, {torn} during a save"
    );
    let last = |run: &str| newest(&folder.path().join(run));
    let (whole, killed) = (last("whole"), last("killed"));
    assert_eq!(whole.progress, killed.progress);
    let bits = |c: &segattn::train::checkpoint::Checkpoint| -> Vec<u32> {
        let all = [&c.tensors.values, &c.tensors.m, &c.tensors.v];
        all.into_iter()
            .flatten()
            .flatten()
            .map(|x| x.to_bits())
            .collect()
    };
    assert!(
        bits(&whole) == bits(&killed),
        "weights or moments differ after {kills} kills"
    );
    assert_eq!(
        losses(&folder.path().join("whole")),
        losses(&folder.path().join("killed"))
    );
    assert!(folder.path().join("killed/loss.svg").is_file());
}

#[test]
fn training_into_a_folder_with_a_run_is_an_error_that_names_resume_and_resume_needs_the_same_data()
{
    let folder = tempfile::tempdir().unwrap();
    prepare(folder.path());
    let mut first = train(folder.path(), "run");
    first.args(["--training.steps", "6", "--schedule.warmup-steps=2"]);
    succeed(first);
    let again = train(folder.path(), "run").output().unwrap();
    let message = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(
        !again.status.success() && message.contains("segattn resume"),
        "{message}"
    );

    let mut longer = resume(folder.path(), "run");
    longer.args(["--training.steps", "8"]);
    succeed(longer);
    let found = newest(&folder.path().join("run"));
    assert_eq!(found.progress.step, 8);
    assert_eq!(found.config.schedule.warmup_steps, Some(2));

    std::fs::write(folder.path().join("text.txt"), "other text ".repeat(50)).unwrap();
    let changed = resume(folder.path(), "run").output().unwrap();
    let message = String::from_utf8_lossy(&changed.stderr).into_owned();
    assert!(
        !changed.status.success() && message.contains("data changed"),
        "{message}"
    );
}

#[cfg(unix)]
#[test]
fn an_interrupt_saves_the_step_it_was_at_and_stops() {
    let folder = tempfile::tempdir().unwrap();
    prepare(folder.path());
    let run = folder.path().join("run");
    let mut command = train(folder.path(), "run");
    command.args(["--training.steps", "100000", "--checkpoint.every", "0"]);
    training::heed_interrupts(&mut command);
    let mut child = command.spawn().unwrap();
    training::wait_for_lines(&run, 10);
    training::send("-INT", &child);
    assert_eq!(training::wait(&mut child).code(), Some(1));
    let (found, last) = (newest(&run), losses(&run).last().unwrap().0);
    assert!(found.progress.step > 0 && found.progress.step == last);
}
