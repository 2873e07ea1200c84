//! A launch that never ends is ended by the simulator, with a report of who waits for what and where.

use segattn_sim::Limits;

use super::*;

/// Runs `kernel` of basics.cu with `from` replaced by `to`, two blocks of 64 threads; the error it ends with.
fn run(kernel: &str, from: &str, to: &str, limits: Limits) -> SimError {
    let module = mutated(from, to);
    let mut gpu = Gpu::new(1, Checks::All).limits(limits);
    let params = Arrays {
        input: gpu.input("in", &[1i32; 128]).expect("memory").ptr(),
        out: gpu.alloc("out", 128 * 4).expect("memory").ptr(),
        counter: gpu.upload("counter", &[0i32]).expect("memory").ptr(),
        offset: 0,
    };
    let kernel = module.kernel(kernel).expect("kernel");
    let result = gpu.launch(&kernel, [2, 1, 1], [64, 1, 1], 2048, &params);
    result.expect_err("a launch that does not end")
}

fn assert_report(error: &SimError, kind: Kind, words: &[&str]) {
    let found = error.reports().iter().filter(|report| report.kind == kind);
    let texts: Vec<String> = found.map(ToString::to_string).collect();
    let fits = |text: &String| words.iter().all(|word| text.contains(word));
    assert!(
        texts.iter().any(fits),
        "no {kind} with {words:?} in:\n{error}"
    );
}

fn limits() -> Limits {
    Limits {
        turn_steps: 1 << 16,
        total_steps: 1 << 24,
        ..Limits::default()
    }
}

#[test]
fn a_thread_that_computes_for_ever_is_ended_while_the_others_wait_for_it() {
    let spin = "  volatile int go = i != 7;\n  while (!go) {}\n  __syncthreads();\n  p.out[blockIdx.x * n + i]";
    let error = run("rotate_block", ROTATE_BARRIER, spin, limits());
    let words = [
        "thread (7,0,0)",
        "neither waited nor ended in 65536 steps",
        "basics.cu:17",
    ];
    assert_report(&error, Kind::Endless, &words);
    let others = ["waits in __syncthreads", "basics.cu:18", "threads "];
    assert_report(&error, Kind::Endless, &others);
}

#[test]
fn a_thread_that_reads_memory_without_a_pause_is_ended() {
    let spin = "  while (*(volatile int*)&s_values[i] != 12345) {}\n  p.out[blockIdx.x * n + i]";
    let error = run("rotate_block", ROTATE_BARRIER, spin, limits());
    let words = ["neither waited nor ended", "basics.cu:16"];
    assert_report(&error, Kind::Endless, &words);
}

#[test]
fn a_loop_of_barriers_that_never_ends_reaches_the_limit_of_the_launch() {
    let spin = "  for (;;) __syncthreads();\n  p.out[blockIdx.x * n + i]";
    let error = run("rotate_block", ROTATE_BARRIER, spin, limits());
    let words = ["was running when the launch had taken 16777216 steps"];
    assert_report(&error, Kind::Endless, &words);
    let others = ["waits in __syncthreads", "basics.cu:16", "threads "];
    assert_report(&error, Kind::Endless, &others);
}

#[test]
fn threads_that_poll_in_vain_are_named_with_their_line() {
    let (from, to) = (
        "p.counter, 1, 0, SIM_RELEASE",
        "p.counter, 2, 0, SIM_RELEASE",
    );
    let error = run("wait_for_block", from, to, Limits::default());
    let words = ["spins at an atomic operation", "basics.cu:", "of its block"];
    assert_report(&error, Kind::Deadlock, &words);
}

#[test]
fn limits_that_suffice_change_nothing() {
    let kernel = correct().kernel("rotate_block").expect("kernel");
    let steps = |limits: Limits| {
        let mut gpu = Gpu::new(1, Checks::All).limits(limits);
        let params = Arrays {
            input: gpu.input("in", &[1i32; 128]).expect("memory").ptr(),
            out: gpu.alloc("out", 128 * 4).expect("memory").ptr(),
            counter: std::ptr::null_mut(),
            offset: 0,
        };
        let stats = gpu.launch(&kernel, [2, 1, 1], [64, 1, 1], 2048, &params);
        stats.map(|stats| stats.steps)
    };
    let needed = steps(Limits::default()).expect("it ends");
    let total = |total_steps| Limits {
        total_steps,
        ..Limits::default()
    };
    assert_eq!(steps(total(needed)).expect("it ends"), needed);
    assert!(steps(total(needed / 2)).is_err());
}
