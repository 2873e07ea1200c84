//! Order between the lanes of a warp and between warps, and asynchronous copies.

use super::*;

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
