//! One planted bug, tried in a process of its own within limits of time and memory.

use std::io;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What a trial may take.
#[derive(Clone, Copy, Debug)]
pub struct Allowance {
    /// From its start to its end.
    pub time: Duration,
    /// Resident memory.
    pub bytes: u64,
}

impl Default for Allowance {
    /// Ten minutes and 3 GiB: two trials at a time and what compiles the next ones stay within 8 GiB.
    fn default() -> Allowance {
        Allowance {
            time: Duration::from_secs(600),
            bytes: 3 << 30,
        }
    }
}

/// How a trial ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The tests failed, or the process was ended by a signal.
    Caught,
    /// It was ended because it took too long.
    OutOfTime,
    /// It was ended because it took too much memory.
    OutOfMemory,
    /// The tests passed.
    Survived,
}

/// Runs the tests that `command` stands for on a planted bug.
///
/// # Errors
/// If the process cannot be started or waited for.
pub fn run(command: &mut Command, allowance: Allowance) -> io::Result<Outcome> {
    let quiet = command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = quiet.stdin(Stdio::null()).spawn()?;
    let begin = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(match status.success() {
                true => Outcome::Survived,
                false => Outcome::Caught,
            });
        }
        if begin.elapsed() > allowance.time {
            return end(child, Outcome::OutOfTime);
        }
        if resident_bytes(child.id()).is_some_and(|bytes| bytes > allowance.bytes) {
            return end(child, Outcome::OutOfMemory);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn end(mut child: Child, outcome: Outcome) -> io::Result<Outcome> {
    child.kill()?;
    child.wait()?;
    Ok(outcome)
}

/// Resident memory of a process, where the system tells.
fn resident_bytes(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kilobytes << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(script: &str, allowance: Allowance) -> Outcome {
        let result = run(Command::new("sh").args(["-c", script]), allowance);
        result.expect("a shell")
    }

    #[test]
    fn a_trial_ends_as_its_process_does_or_at_a_limit() {
        let plenty = Allowance::default();
        assert_eq!(outcome("exit 0", plenty), Outcome::Survived);
        assert_eq!(outcome("exit 101", plenty), Outcome::Caught);
        assert_eq!(outcome("kill -SEGV $$", plenty), Outcome::Caught);
        let time = Duration::from_millis(100);
        let short = Allowance { time, ..plenty };
        assert_eq!(outcome("exec sleep 60", short), Outcome::OutOfTime);
        let small = Allowance {
            bytes: 1 << 10,
            ..plenty
        };
        assert_eq!(outcome("exec sleep 60", small), Outcome::OutOfMemory);
    }
}
