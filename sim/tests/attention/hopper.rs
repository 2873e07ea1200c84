//! The kernels written for Hopper, on a device that has them: what the others must do, at their head sizes.

use std::sync::OnceLock;

use segattn::attention::cuda::Dtype;
use segattn_sim::Kernels;

use super::attention_cases::gpu::Options;
use super::attention_cases::variants::{self, Named};
use super::attention_cases::{Shape, bits, suite};
use super::simulated::{Entries, Simulated, folder};

const HEAD_DIMS: [usize; 2] = [64, 128];

fn kernels() -> &'static Kernels {
    static KERNELS: OnceLock<Kernels> = OnceLock::new();
    KERNELS.get_or_init(|| Kernels::new(&folder()).hopper())
}

fn check(cases: Vec<Named>, head_dim: usize) {
    for (seed, case) in cases.into_iter().enumerate() {
        let shape = Shape {
            head_dim,
            ..case.shape
        };
        let mut gpu = Simulated::of(seed as u64, kernels());
        suite::check(&mut gpu, &shape, case.query_start, case.options);
    }
}

/// Runs an element type and head size, and shows that its own entry points ran.
fn check_variant(dtype: Dtype, head_dim: usize) {
    let entries = Entries::default();
    for (seed, case) in variants::of(dtype, head_dim).into_iter().enumerate() {
        let mut gpu = Simulated::of(seed as u64, kernels()).noting(&entries);
        suite::check(&mut gpu, &case.shape, case.query_start, case.options);
    }
    // So many queries and keys that the rings turn within an item, and that blocks take several.
    let long = Shape::plain(1, 3, head_dim, [300, 200, 70]);
    let mut gpu = Simulated::of(9, kernels()).noting(&entries);
    suite::check(&mut gpu, &long, None, Options::new(dtype));
    let ran = entries.into_inner().expect("no panic");
    let kernels = [
        "attention_prefill",
        "combine_prefill",
        "attention_query_grad",
        "attention_query_grad_sum",
        "attention_key_grad",
    ];
    for kernel in kernels {
        let own = format!("{kernel}_hopper_{dtype}_d{head_dim}");
        assert!(ran.contains(own.as_str()), "{own}: {ran:?}");
        let other = format!("{kernel}_{dtype}_d{head_dim}");
        assert!(!ran.contains(other.as_str()), "{other}");
    }
}

#[test]
fn bf16_d64() {
    check_variant(Dtype::Bf16, 64);
}

#[test]
fn bf16_d128() {
    check_variant(Dtype::Bf16, 128);
}

#[test]
fn f16_d64() {
    check_variant(Dtype::F16, 64);
}

#[test]
fn f16_d128() {
    check_variant(Dtype::F16, 128);
}

#[test]
fn every_role_and_gate_in_groups_of_1_3_and_8() {
    check(variants::roles(), 64);
}

#[test]
fn every_source_empty_or_there() {
    check(variants::sources(), 128);
}

#[test]
fn every_arrangement_kind_of_numbers_and_scale() {
    check(variants::arrangements_and_values(), 64);
}

/// Whole tiles, ragged ones and queries copied without bulk copies.
#[test]
fn tensors_without_tensor_maps_are_copied_otherwise() {
    let kernels = Kernels::new(&folder()).hopper().without_tensor_maps();
    for head_dim in HEAD_DIMS {
        let shape = Shape::plain(1, 3, head_dim, [300, 200, 70]);
        let mut gpu = Simulated::of(10, &kernels);
        suite::check(&mut gpu, &shape, None, Options::new(Dtype::Bf16));
    }
}

/// Decoded rows are those of the kernels that every device has: the two agree by bits.
#[test]
fn a_row_alone_in_a_tile_in_another_batch_and_decoded_is_the_same() {
    for (dtype, head_dim) in [(Dtype::Bf16, 128), (Dtype::F16, 64)] {
        bits::rows_stand_alone(&mut Simulated::of(3, kernels()), dtype, head_dim);
    }
}

#[test]
fn gradients_do_not_depend_on_the_neighbours_in_the_batch() {
    for head_dim in HEAD_DIMS {
        bits::neighbours_change_no_gradient(
            &mut Simulated::of(4, kernels()),
            Dtype::Bf16,
            head_dim,
        );
    }
}

#[test]
fn batch_elements_of_unequal_lengths_need_no_padding() {
    for (dtype, head_dim) in [(Dtype::Bf16, 64), (Dtype::F16, 128)] {
        bits::packing_changes_no_bit(&mut Simulated::of(6, kernels()), dtype, head_dim);
    }
}

#[test]
fn gradients_of_gates_keep_their_bound() {
    for (dtype, head_dim) in [(Dtype::Bf16, 64), (Dtype::F16, 128)] {
        suite::gates_keep_their_bound(&mut Simulated::of(5, kernels()), dtype, head_dim);
    }
}
