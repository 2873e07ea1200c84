//! Equal bits: in every schedule, for a row alone or among others, in a batch of any neighbours.

use segattn::attention::cuda::Dtype;

use super::attention_cases::gpu::Options;
use super::attention_cases::variants::{DTYPES, HEAD_DIMS};
use super::attention_cases::{Case, Shape, bits, suite};
use super::simulated::Simulated;

#[test]
fn a_row_alone_in_a_tile_in_another_batch_and_decoded_is_the_same() {
    for (i, head_dim) in HEAD_DIMS.into_iter().enumerate() {
        bits::rows_stand_alone(&mut Simulated::new(3), DTYPES[i % 2], head_dim);
    }
}

#[test]
fn gradients_do_not_depend_on_the_neighbours_in_the_batch() {
    for (i, head_dim) in HEAD_DIMS.into_iter().enumerate() {
        bits::neighbours_change_no_gradient(&mut Simulated::new(4), DTYPES[(i + 1) % 2], head_dim);
    }
}

#[test]
fn batch_elements_of_unequal_lengths_need_no_padding() {
    for (i, head_dim) in HEAD_DIMS.into_iter().enumerate() {
        bits::packing_changes_no_bit(&mut Simulated::new(6), DTYPES[i % 2], head_dim);
    }
}

#[test]
fn gradients_of_gates_keep_their_bound() {
    for (i, head_dim) in HEAD_DIMS.into_iter().enumerate() {
        suite::gates_keep_their_bound(&mut Simulated::new(5), DTYPES[i % 2], head_dim);
    }
}

/// Runs a case in 20 schedules, with one to five blocks at a time.
fn assert_equal_in_every_schedule(shape: &Shape, dtype: Dtype) {
    let case = Case::new(shape).rounded(dtype);
    let options = Options {
        with_d_lse: true,
        ..Options::new(dtype)
    };
    let run = |seed: u64| {
        let mut gpu = Simulated::new(seed);
        gpu.gpu = gpu.gpu.resident_blocks(1 + seed as usize % 5);
        bits::both(&mut gpu, &case, options)
    };
    let first = run(0);
    for seed in 1..20 {
        assert!(run(seed) == first, "seed {seed} has other bits");
    }
}

#[test]
fn twenty_schedules_have_equal_bits() {
    let shape = Shape {
        segment_len: vec![130, 1, 0],
        prior_len: vec![33, 0, 5],
        past_len: vec![40, 64, 1],
        past_gate: vec![0.25, 0.0],
        ..Shape::plain(1, 2, 32, [0; 3])
    };
    assert_equal_in_every_schedule(&shape, Dtype::Bf16);
}

#[test]
fn twenty_schedules_of_keys_in_several_items_have_equal_bits() {
    let shape = Shape {
        past_len: vec![8192 + 70],
        ..Shape::plain(1, 1, 32, [2, 3, 0])
    };
    assert_equal_in_every_schedule(&shape, Dtype::F16);
}
