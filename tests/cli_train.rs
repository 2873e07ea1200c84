//! `segattn train` and `resume` as processes: killed at random moments, a run ends in the bits of one that
//! was not; Ctrl-C saves and stops; a run is never overwritten.
#![cfg(feature = "cli")]

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use segattn::train::checkpoint::{list, load_latest};

const CONFIG: &str = r#"
[model.shape]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
[model.segment]
segment_len = 16
prior_len = 8
past_len = 8
long_range_heads = [1]
[training]
steps = 120
batch = 2
sequence_len = 48
validate_every = 20
validation_sequences = 2
learn_gates = true
[schedule]
lr = 3e-3
warmup_steps = 5
[guard]
z_score = 4.0
window = 16
max_skipped = 100
[checkpoint]
every = 3
"#;

fn segattn() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_segattn"));
    command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .env_remove("RUST_LOG");
    command
}

/// Text of 6000 bytes and a configuration that trains on it.
fn prepare(folder: &Path) {
    let words = ["segment", "prior", "past", "gate", "the", "of", "a"];
    let text: Vec<&str> = (0..1400u64)
        .map(|i| words[(i * i + i / 3) as usize % 7])
        .collect();
    std::fs::write(folder.join("text.txt"), text.join(" ")).unwrap();
    std::fs::write(folder.join("run.toml"), CONFIG).unwrap();
}

fn train(folder: &Path, output: &str) -> Command {
    let mut command = segattn();
    command.arg("train").arg(folder.join("run.toml"));
    command.arg("--data.train").arg(folder.join("text.txt"));
    command.arg("--training.output").arg(folder.join(output));
    command
}

fn resume(folder: &Path, output: &str) -> Command {
    let mut command = segattn();
    command.arg("resume").arg(folder.join(output));
    command
}

fn succeed(mut command: Command) -> Output {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Losses without the times, which no run repeats.
fn losses(run: &Path) -> Vec<(u64, Option<u64>, Option<u64>)> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let bits = |line: &serde_json::Value, key: &str| line[key].as_f64().map(f64::to_bits);
    text.lines()
        .map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let step = line["step"].as_u64().unwrap();
            (step, bits(&line, "loss"), bits(&line, "validation_loss"))
        })
        .collect()
}

/// Lines so far.
fn losses_len(run: &Path) -> usize {
    std::fs::read(run.join("metrics.jsonl"))
        .map_or(0, |text| text.iter().filter(|b| **b == b'\n').count())
}

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
    let last = |run: &str| {
        load_latest(&folder.path().join(run).join("checkpoints"))
            .unwrap()
            .1
    };
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
    let found = load_latest(&folder.path().join("run/checkpoints"))
        .unwrap()
        .1;
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
    let mut command = train(folder.path(), "run");
    command.args(["--training.steps", "100000", "--checkpoint.every", "0"]);
    let mut child = command.spawn().unwrap();
    let metrics = folder.path().join("run/metrics.jsonl");
    let started = Instant::now();
    while std::fs::metadata(&metrics).map_or(0, |m| m.len()) < 2000 {
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "no step was done"
        );
        sleep(Duration::from_millis(5));
    }
    let pid = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &pid])
            .status()
            .unwrap()
            .success()
    );
    assert!(child.wait().unwrap().success());
    let found = load_latest(&folder.path().join("run/checkpoints"))
        .unwrap()
        .1;
    let last = losses(&folder.path().join("run")).last().unwrap().0;
    assert!(found.progress.step > 0 && found.progress.step == last);
}
