//! Small training runs of the command, shared by tests.

#![cfg(feature = "cli")]
// Every test program uses a part of this.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use segattn::train::checkpoint::{Checkpoint, load_latest};

pub const CONFIG: &str = r#"
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
warmup_steps = 2
[guard]
z_score = 4.0
window = 16
max_skipped = 100
[checkpoint]
every = 3
"#;

pub fn segattn() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_segattn"));
    command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .env_remove("RUST_LOG");
    command
}

/// Text of 6000 bytes and a configuration that trains on it.
pub fn prepare(folder: &Path) {
    let words = ["segment", "prior", "past", "gate", "the", "of", "a"];
    let text: Vec<&str> = (0..1400u64)
        .map(|i| words[(i * i + i / 3) as usize % 7])
        .collect();
    std::fs::write(folder.join("text.txt"), text.join(" ")).unwrap();
    std::fs::write(folder.join("run.toml"), CONFIG).unwrap();
}

/// A run on the text.
pub fn train(folder: &Path, output: &str) -> Command {
    train_on(folder, output, &folder.join("text.txt"))
}

/// A run on other data.
pub fn train_on(folder: &Path, output: &str, data: &Path) -> Command {
    let mut command = segattn();
    command.arg("train").arg(folder.join("run.toml"));
    command.arg("--data.train").arg(data);
    command.arg("--training.output").arg(folder.join(output));
    command
}

pub fn resume(folder: &Path, output: &str) -> Command {
    let mut command = segattn();
    command.arg("resume").arg(folder.join(output));
    command
}

pub fn succeed(mut command: Command) -> Output {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Losses without the times, which no run repeats.
pub fn losses(run: &Path) -> Vec<(u64, Option<u64>, Option<u64>)> {
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

/// Weights and moments.
fn bits(checkpoint: &Checkpoint) -> Vec<u32> {
    let tensors = &checkpoint.tensors;
    let all = [&tensors.values, &tensors.m, &tensors.v];
    let all = all.into_iter().flatten().flatten();
    all.map(|x| x.to_bits()).collect()
}

/// A run in `folder` that is the same as another one but for its name.
pub fn same(folder: &Path, a: &str, b: &str) {
    let [x, y] = [a, b].map(|run| newest(&folder.join(run)));
    assert_eq!(x.progress, y.progress);
    assert_eq!(x.model, y.model);
    assert!(
        bits(&x) == bits(&y),
        "weights or moments of {a} and {b} differ"
    );
    assert_eq!(losses(&folder.join(a)), losses(&folder.join(b)));
}

/// Lines so far.
pub fn losses_len(run: &Path) -> usize {
    std::fs::read(run.join("metrics.jsonl"))
        .map_or(0, |text| text.iter().filter(|b| **b == b'\n').count())
}

/// Runs `command`, which must fail with a message that says `what`, and not by a panic or a signal.
pub fn fail(mut command: Command, what: &str) {
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(
        errors.contains(what) && !errors.contains("panicked"),
        "{errors}"
    );
}

/// Waits until the run in `run` has written so many lines of metrics.
pub fn wait_for_lines(run: &Path, lines: usize) {
    let started = Instant::now();
    while losses_len(run) < lines {
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "no step was done"
        );
        sleep(Duration::from_millis(5));
    }
}

/// Waits until the process ends, for 30 seconds at most.
pub fn wait(child: &mut Child) -> std::process::ExitStatus {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(
            started.elapsed() < Duration::from_secs(30),
            "the process does not end"
        );
        sleep(Duration::from_millis(5));
    }
}

/// The command heeds SIGINT even where the tests run in the background of a shell, which lets its children ignore it.
#[cfg(unix)]
pub fn heed_interrupts(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    let heed = || {
        // SAFETY: SIG_DFL is a valid disposition, and signal() may be called between fork and exec.
        unsafe { libc::signal(libc::SIGINT, libc::SIG_DFL) };
        Ok(())
    };
    // SAFETY: the closure makes one async-signal-safe call and takes no memory.
    unsafe { command.pre_exec(heed) };
}

pub fn send(signal: &str, child: &Child) {
    let sent = Command::new("kill")
        .args([signal, &child.id().to_string()])
        .status();
    assert!(sent.unwrap().success());
}

/// The newest checkpoint of a run.
pub fn newest(run: &Path) -> Checkpoint {
    load_latest(&run.join("checkpoints")).unwrap().1
}

/// Its folder.
pub fn newest_folder(run: &Path) -> PathBuf {
    load_latest(&run.join("checkpoints")).unwrap().0
}
