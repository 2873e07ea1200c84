//! The simulator's own features on small kernels: each works, and each class of planted bug is reported by name.

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

fn path(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("kernels")
        .join(file)
}

/// A kernel file compiled after replacing `from`, which must occur, by `to`.
fn mutated(from: &str, to: &str) -> Arc<Module> {
    let text = std::fs::read_to_string(path("basics.cu")).expect("kernel source");
    assert!(text.contains(from), "{from} does not occur");
    Module::compile(&Source::new(path("basics.cu")).with_text(text.replace(from, to)))
        .expect("compiles")
}

fn correct() -> Arc<Module> {
    Module::compile(&Source::new(path("basics.cu"))).expect("compiles")
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
fn barrier_orders_shared_memory() {
    let expected: Vec<i32> = (0..256)
        .map(|i| value(i / 64 * 64 + (i + 1) % 64))
        .collect();
    assert_correct(&ROTATE, &expected);
}

#[test]
fn missing_barrier_is_a_race_with_both_lines() {
    let words = [
        "rotate_block",
        "thread (",
        "of block (",
        "of shared memory",
        "basics.cu:15",
        "basics.cu:17",
    ];
    assert_caught(
        &ROTATE,
        ROTATE_BARRIER,
        "\n  p.out[blockIdx.x * n + i]",
        Kind::Race,
        &words,
    );
}

#[test]
fn divergent_barrier_names_both_sides() {
    let skipped = "  if (i != 5) __syncthreads();\n  p.out[blockIdx.x * n + i]";
    assert_caught(
        &ROTATE,
        ROTATE_BARRIER,
        skipped,
        Kind::Divergence,
        &["thread (5,0,0)", "ended", "basics.cu:16"],
    );
    let two = "  if (i < 32) __syncthreads();\n else { p.out[0] = 0; __syncthreads(); }\n  p.out[blockIdx.x * n + i]";
    assert_caught(
        &ROTATE,
        ROTATE_BARRIER,
        two,
        Kind::Divergence,
        &["basics.cu:16", "basics.cu:17"],
    );
}

#[test]
fn access_outside_a_buffer_is_named_to_the_byte() {
    let (store, load) = ("p.out[blockIdx.x * n + i] =", "s_values[i] = p.in");
    let beyond = "p.out[blockIdx.x * n + i + 1] =";
    assert_caught(
        &ROTATE,
        store,
        beyond,
        Kind::OutOfBounds,
        &["0 bytes past the end of out (1024 bytes)"],
    );
    let shared = "s_values[i + 1000] = p.in";
    assert_caught(
        &ROTATE,
        load,
        shared,
        Kind::OutOfBounds,
        &["past the end of shared memory (2048 bytes)"],
    );
    assert_caught(
        &ROTATE,
        store,
        "((int*)p.in)[i] =",
        Kind::ReadOnly,
        &["of in"],
    );
}

#[test]
fn read_of_memory_never_written_is_reported() {
    let (from, to) = ("s_values[(i + 1) % n]", "s_values[(i + 1) % n + 64]");
    assert_caught(&ROTATE, from, to, Kind::Uninitialized, &["shared memory"]);
    let (from, to) = (
        "s_values[i] = p.in[blockIdx.x * n + i]",
        "s_values[i] = p.out[i]",
    );
    assert_caught(&ROTATE, from, to, Kind::Uninitialized, &["of out"]);
}

#[test]
fn misaligned_access_is_reported() {
    let to = "*(volatile int*)((char*)&s_values[i] + 2) = p.in[";
    assert_caught(
        &ROTATE,
        "s_values[i] = p.in[",
        to,
        Kind::Misaligned,
        &["4 bytes"],
    );
}

#[test]
fn blocks_that_write_one_place_race() {
    let words = ["of out", "of block ("];
    assert_caught(
        &ROTATE,
        "p.out[blockIdx.x * n + i] =",
        "p.out[i] =",
        Kind::Race,
        &words,
    );
}

const ROTATE_WARP: Case = case("rotate_warp", 1, 64, 64);

#[test]
fn syncwarp_orders_its_lanes_only() {
    let expected: Vec<i32> = (0..64).map(|i| value(i / 32 * 32 + (i + 1) % 32)).collect();
    assert_correct(&ROTATE_WARP, &expected);
    assert_caught(
        &ROTATE_WARP,
        "  __syncwarp();\n",
        "\n",
        Kind::Race,
        &["rotate_warp"],
    );
    assert_caught(
        &ROTATE_WARP,
        "i - lane + (lane + 1) % 32",
        "(i + 1) % 64",
        Kind::Race,
        &["rotate_warp"],
    );
}

const HALVES: Case = case("half_warp_sums", 1, 32, 32);

#[test]
fn partial_masks_meet_separately() {
    let sum = |range: std::ops::Range<usize>| range.map(value).sum::<i32>();
    let expected: Vec<i32> = (0..32)
        .map(|i| if i < 16 { sum(0..16) } else { sum(16..32) })
        .collect();
    assert_correct(&HALVES, &expected);
}

#[test]
fn wrong_masks_are_named() {
    assert_caught(
        &HALVES,
        "0x0000ffffu",
        "0xffff0000u",
        Kind::Divergence,
        &["lacks its own lane"],
    );
    assert_caught(
        &HALVES,
        "0x0000ffffu",
        "0xffffffffu",
        Kind::Divergence,
        &["shuffle"],
    );
    assert_caught(
        &HALVES,
        "step = 8",
        "step = 16",
        Kind::Divergence,
        &["not among the lanes"],
    );
}

const LAST: Case = case("last_block_sums", 5, 32, 160);

#[test]
fn fences_and_atomics_order_blocks() {
    let module = correct();
    for seed in 0..20 {
        let run = run(&module, &Case { seed, ..LAST });
        assert!(run.result.is_ok(), "{}", run.text());
        assert_eq!(run.counter, (0..160).map(value).sum::<i32>());
    }
}

#[test]
fn missing_fence_between_blocks_is_a_race() {
    let release = "    __threadfence();\n    *s_last";
    assert_caught(&LAST, release, "    *s_last", Kind::Race, &["of out"]);
    assert_caught(
        &LAST,
        release,
        "    __threadfence_block();\n    *s_last",
        Kind::Race,
        &["of out"],
    );
    assert_caught(
        &LAST,
        "    __threadfence();\n    int sum",
        "    int sum",
        Kind::Race,
        &["of out"],
    );
}

const COPY: Case = Case {
    offset: 120,
    ..case("copy_async", 1, 32, 128)
};

#[test]
fn cp_async_lands_when_waited_for_with_its_tail_zeroed() {
    let expected: Vec<i32> = (0..128)
        .map(|i| if i < 120 { value(i) } else { 0 })
        .collect();
    assert_correct(&COPY, &expected);
}

#[test]
fn copies_not_waited_for_are_reported() {
    let words = ["copies into it", "basics.cu:61"];
    assert_caught(
        &COPY,
        "  sim_cp_async_wait(0, sim_site());\n",
        "\n",
        Kind::NotWaited,
        &words,
    );
    assert_caught(
        &COPY,
        "sim_cp_async_wait(0,",
        "sim_cp_async_wait(1,",
        Kind::NotWaited,
        &[],
    );
    assert_caught(
        &COPY,
        "  sim_cp_async_commit();\n",
        "\n",
        Kind::NotWaited,
        &[],
    );
    assert_caught(
        &COPY,
        "  __syncthreads();\n  int neighbour",
        "  int neighbour",
        Kind::Race,
        &[],
    );
    let from = "valid ? p.in + i * 4 : p.in, 16, valid";
    assert_caught(
        &COPY,
        from,
        "p.in + i * 4 + 140, 16, 16",
        Kind::OutOfBounds,
        &["past the end of in"],
    );
}

#[test]
fn offsets_beyond_2_to_33_elements_cost_no_memory() {
    let offset = (1i64 << 33) + 5;
    let far = case("far_store", 1, 32, (1usize << 33) + 6);
    let exact = run(&correct(), &Case { offset, ..far });
    assert!(exact.result.is_ok(), "{}", exact.text());
    assert_eq!(
        run(
            &correct(),
            &Case {
                offset: offset + 1,
                ..far
            }
        )
        .kinds(),
        [Kind::OutOfBounds]
    );
    let wrapped = mutated("p.out[p.offset]", "p.out[(int)p.offset]");
    assert_eq!(
        run(
            &wrapped,
            &Case {
                offset: 1 << 31,
                ..far
            }
        )
        .kinds(),
        [Kind::OutOfBounds]
    );
}

const PIPE: Case = case("producer_consumer", 1, 64, 128);

#[test]
fn named_barriers_pass_values_between_warps() {
    let expected: Vec<i32> = (0..128).map(|i| value(i / 32 * 32 + 31 - i % 32)).collect();
    assert_correct(&PIPE, &expected);
}

#[test]
fn misused_named_barriers_are_reported() {
    assert_caught(
        &PIPE,
        "if (step > 0) sim_barrier_sync(2",
        "if (step > 9) sim_barrier_sync(2",
        Kind::Race,
        &[],
    );
    assert_caught(
        &PIPE,
        "sim_barrier_arrive(1, 64",
        "sim_barrier_arrive(3, 64",
        Kind::Divergence,
        &["bar.sync"],
    );
    assert_caught(
        &PIPE,
        "sim_barrier_arrive(1, 64",
        "sim_barrier_arrive(1, 96",
        Kind::Divergence,
        &["expect"],
    );
    assert_caught(
        &PIPE,
        "sim_barrier_arrive(1, 64",
        "sim_barrier_arrive(1, 60",
        Kind::Operand,
        &["60 threads"],
    );
}

const WAIT: Case = case("wait_for_block", 2, 32, 2);

#[test]
fn acquire_and_release_order_blocks() {
    assert_correct(&WAIT, &[value(0), value(0) + 1]);
    assert_caught(
        &WAIT,
        "1, 0, SIM_RELEASE",
        "1, 0, SIM_RELAXED",
        Kind::Race,
        &["of out"],
    );
    assert_caught(
        &WAIT,
        "0, 0, SIM_ACQUIRE",
        "0, 0, SIM_RELAXED",
        Kind::Race,
        &["of out"],
    );
    assert_caught(
        &WAIT,
        "p.counter, 1, 0, SIM_RELEASE",
        "p.counter, 2, 0, SIM_RELEASE",
        Kind::Deadlock,
        &["spins"],
    );
}

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
