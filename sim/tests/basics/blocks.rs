//! Races, bounds and barriers within a block, and order between blocks.

use super::*;

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
