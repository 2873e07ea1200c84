//! setmaxnreg on small kernels: registers that are there are handed over, and each planted bug is reported by name.

use std::path::PathBuf;
use std::sync::Arc;

use segattn_sim::{Checks, Gpu, Kind, Module, SimError, Source};

const KERNELS: [(&str, u32); 2] = [("hand_over", 384), ("back_and_forth", 256)];

fn path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("kernels/registers.cu")
}

fn run(module: &Arc<Module>, name: &str, threads: u32, seed: u64) -> Result<Vec<u32>, SimError> {
    let mut gpu = Gpu::new(seed, Checks::All);
    let out = gpu.alloc("done", threads as usize * 4)?;
    let kernel = module.kernel(name).expect("kernel");
    gpu.launch(&kernel, [1, 1, 1], [threads, 1, 1], 0, &out.ptr::<u32>())?;
    Ok(gpu.download(out))
}

/// What is reported of `kernel` (0 or 1) when one text is put in another's place.
fn reports(kernel: usize, from: &str, to: &str) -> Vec<(Kind, String)> {
    let text = std::fs::read_to_string(path()).expect("kernel source");
    assert_eq!(text.matches(from).count(), 1, "{from}");
    let source = Source::new(path()).with_text(text.replace(from, to));
    let module = Module::compile(&source).expect("compiles");
    let (name, threads) = KERNELS[kernel];
    let mut found = Vec::new();
    for seed in 0..3 {
        let error = run(&module, name, threads, seed).expect_err("a bug");
        found.extend(error.reports().iter().map(|r| (r.kind, r.to_string())));
    }
    found
}

fn assert_caught(kernel: usize, from: &str, to: &str, kind: Kind, words: &str) {
    let reports = reports(kernel, from, to);
    let found = |(k, text): &(Kind, String)| *k == kind && text.contains(words);
    assert!(reports.iter().any(found), "{from} -> {to}: {reports:#?}");
}

#[test]
fn registers_that_are_there_are_handed_over() {
    let module = Module::compile(&Source::new(path())).expect("compiles");
    for (name, threads) in KERNELS {
        for seed in 0..20 {
            let done = run(&module, name, threads, seed).unwrap_or_else(|e| panic!("{e}"));
            assert!(done.iter().all(|&done| done > 0), "{name}");
        }
    }
}

#[test]
fn a_pool_too_small_is_a_deadlock() {
    let assert_stuck = |kernel, from, to, words: &str| {
        let place = "waits for ever in setmaxnreg.inc at registers.cu:";
        assert_caught(kernel, from, to, Kind::Deadlock, place);
        assert_caught(kernel, from, to, Kind::Deadlock, words);
    };
    // 128 * 80 registers are given back, 256 * 40 wanted; with one more step of 8 some warps are left without.
    let words = "for 1536 more registers, of which the block has";
    assert_stuck(0, "(208, 1", "(216, 1", words);
    assert_stuck(0, "(88, 0", "(96, 0", "for 1280 more registers");
    let none = "for 1280 more registers, of which the block has 0 free";
    assert_stuck(0, "sim_set_registers(88, 0, sim_site());", "", none);
    let call = "sim_set_registers(48, 0, sim_site());";
    let words = "for 6656 more registers, of which the block has 5632 free";
    assert_stuck(1, call, "", words);
    // Taken back before the other has taken its own: 8 too many.
    let early = "sim_barrier_sync(1, 256, sim_site());\n    sim_set_registers(248, 1, sim_site());";
    let late = "sim_set_registers(248, 1, sim_site());\n    sim_barrier_sync(1, 256, sim_site());";
    assert_caught(1, early, late, Kind::Deadlock, "more registers");
}

#[test]
fn a_warp_that_stays_away_is_reported() {
    let found = |guard: &str| {
        let call = format!("if ({guard}) sim_set_registers(88,");
        reports(0, "sim_set_registers(88,", &call)
    };
    for guard in ["threadIdx.x >= 32", "threadIdx.x != 5"] {
        let found = found(guard);
        assert!(!found.is_empty(), "{guard}");
        let divergence = |(kind, _): &(Kind, String)| *kind == Kind::Divergence;
        let deadlock = |(kind, _): &(Kind, String)| *kind == Kind::Deadlock;
        assert!(
            found.iter().any(|r| divergence(r) || deadlock(r)),
            "{found:#?}"
        );
    }
    // Enough without the warp that stays away: reported at the end.
    let call = "if (threadIdx.x >= 32) sim_set_registers(24,";
    let words = "ended without a setmaxnreg";
    assert_caught(0, "sim_set_registers(88,", call, Kind::Divergence, words);
    let call = "sim_set_registers(threadIdx.x < 32 ? 88 : 80,";
    let words = "another warp of its warpgroup did not";
    assert_caught(0, "sim_set_registers(88,", call, Kind::Divergence, words);
}

#[test]
fn numbers_that_the_hardware_refuses_are_reported() {
    for (each, take, words) in [
        (90, 0, "multiples of 8 from 24 to 256"),
        (16, 0, "multiples of 8 from 24 to 256"),
        (264, 1, "multiples of 8 from 24 to 256"),
        (176, 0, "to 176 registers, more than the 168 it has"),
        (160, 1, "to 160 registers, fewer than the 168 it has"),
    ] {
        let call = format!("(({each}), {take},");
        assert_caught(0, "(88, 0,", &call, Kind::Operand, words);
    }
}
