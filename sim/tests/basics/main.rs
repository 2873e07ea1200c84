//! The simulator's own features on small kernels: each works, and each class of planted bug is reported by name.

mod blocks;
mod buffers;
mod endless;
mod warps_and_copies;

use std::path::PathBuf;
use std::sync::Arc;

use segattn_sim::{Buffer, Checks, Gpu, Kind, Module, SimError, Source, Stats};

#[repr(C)]
#[derive(Clone, Copy)]
struct Arrays {
    input: *const i32,
    out: *mut i32,
    counter: *mut i32,
    offset: i64,
}

/// Path of the file of kernels.
fn path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("kernels/basics.cu")
}

/// The kernels compiled after replacing `from`, which must occur, by `to`.
fn mutated(from: &str, to: &str) -> Arc<Module> {
    let text = std::fs::read_to_string(path()).expect("kernel source");
    assert!(text.contains(from), "{from} does not occur");
    Module::compile(&Source::new(path()).with_text(text.replace(from, to))).expect("compiles")
}

fn correct() -> Arc<Module> {
    Module::compile(&Source::new(path())).expect("compiles")
}

struct Run {
    result: Result<Stats, SimError>,
    out: Vec<i32>,
    counter: i32,
}

impl Run {
    fn kinds(&self) -> Vec<Kind> {
        self.result
            .as_ref()
            .err()
            .map_or(Vec::new(), |e| e.reports().iter().map(|r| r.kind).collect())
    }

    fn text(&self) -> String {
        self.result
            .as_ref()
            .err()
            .map_or(String::new(), ToString::to_string)
    }
}

#[derive(Clone, Copy)]
struct Case {
    kernel: &'static str,
    grid: u32,
    block: u32,
    offset: i64,
    out_len: usize,
    seed: u64,
}

const fn case(kernel: &'static str, grid: u32, block: u32, out_len: usize) -> Case {
    Case {
        kernel,
        grid,
        block,
        offset: 0,
        out_len,
        seed: 1,
    }
}

fn value(i: usize) -> i32 {
    (i * i) as i32 - 7
}

fn run(module: &Arc<Module>, case: &Case) -> Run {
    let mut gpu = Gpu::new(case.seed, Checks::All);
    let input: Vec<i32> = (0..case.out_len.min(256)).map(value).collect();
    let input = gpu.input("in", &input).expect("memory");
    let out: Buffer = gpu.alloc("out", case.out_len * 4).expect("memory");
    let counter = gpu.upload("counter", &[0i32]).expect("memory");
    let params = Arrays {
        input: input.ptr(),
        out: out.ptr(),
        counter: counter.ptr(),
        offset: case.offset,
    };
    let kernel = module.kernel(case.kernel).expect("kernel");
    let result = gpu.launch(
        &kernel,
        [case.grid, 1, 1],
        [case.block, 1, 1],
        2048,
        &params,
    );
    let out = if case.out_len <= 1 << 20 {
        gpu.download(out)
    } else {
        Vec::new()
    };
    Run {
        result,
        out,
        counter: gpu.download::<i32>(counter)[0],
    }
}

/// The correct kernel passes 20 schedules with the expected output.
fn assert_correct(case: &Case, expected: &[i32]) {
    let module = correct();
    for seed in 0..20 {
        let run = run(&module, &Case { seed, ..*case });
        assert!(run.result.is_ok(), "{}", run.text());
        assert_eq!(run.out, expected);
    }
}

/// Every one of 5 schedules of the changed kernel is reported with `kind`, and the text names all of `words`.
fn assert_caught(case: &Case, from: &str, to: &str, kind: Kind, words: &[&str]) {
    let module = mutated(from, to);
    for seed in 0..5 {
        let run = run(&module, &Case { seed, ..*case });
        assert!(
            run.kinds().contains(&kind),
            "seed {seed}: expected {kind}, got: {}",
            run.text()
        );
        words.iter().for_each(|word| {
            assert!(
                run.text().contains(word),
                "{word} is not in: {}",
                run.text()
            )
        });
    }
}

const ROTATE: Case = case("rotate_block", 4, 64, 256);
const ROTATE_BARRIER: &str = "  __syncthreads();\n  p.out[blockIdx.x * n + i]";

#[test]
fn a_seed_replays_its_schedule() {
    let module = mutated(ROTATE_BARRIER, "\n  p.out[blockIdx.x * n + i]");
    let text = |seed| run(&module, &Case { seed, ..ROTATE }).text();
    assert_eq!(text(11), text(11));
    assert!(text(11).contains("seed 11"));
    assert!(
        (0..8)
            .map(text)
            .collect::<std::collections::HashSet<_>>()
            .len()
            > 4
    );
}
