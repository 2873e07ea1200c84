//! Every entry point, role, source, length around a tile's, arrangement and kind of numbers.

use std::collections::BTreeSet;

use segattn::attention::cuda::Dtype;

use super::attention_cases::suite;
use super::attention_cases::variants::{self, Named};
use super::simulated::{Entries, Simulated};

fn check(cases: &[Named], entries: &Entries) {
    for (seed, case) in cases.iter().enumerate() {
        let mut gpu = Simulated::new(seed as u64).noting(entries);
        suite::check(
            &mut gpu,
            &case.shape,
            case.query_start.clone(),
            case.options,
        );
    }
}

/// Runs an element type and head size, and shows that none of its entry points was left out.
fn check_variant(dtype: Dtype, head_dim: usize) {
    let entries = Entries::default();
    check(&variants::of(dtype, head_dim), &entries);
    let kernels = [
        "attention_prefill",
        "combine_prefill",
        "attention_decode",
        "combine_decode",
        "attention_prepare",
        "attention_query_grad",
        "attention_query_grad_sum",
        "attention_key_grad",
    ];
    let expected = kernels.map(|kernel| format!("{kernel}_{dtype}_d{head_dim}"));
    let ran = entries.into_inner().expect("no panic");
    let ran: BTreeSet<String> = ran.into_iter().map(str::to_string).collect();
    assert_eq!(ran, BTreeSet::from(expected));
}

macro_rules! variants {
    ($($name:ident: $dtype:ident $head_dim:literal;)*) => {
        $(#[test]
        fn $name() {
            check_variant(Dtype::$dtype, $head_dim);
        })*

        #[test]
        fn no_variant_is_left_out() {
            let tested = [$((Dtype::$dtype, $head_dim)),*];
            for variant in variants::DTYPES.into_iter().flat_map(|t| variants::HEAD_DIMS.map(|d| (t, d))) {
                assert!(tested.contains(&variant), "{variant:?}");
            }
        }
    };
}

variants! {
    bf16_d32: Bf16 32;
    bf16_d64: Bf16 64;
    bf16_d96: Bf16 96;
    bf16_d128: Bf16 128;
    bf16_d256: Bf16 256;
    f16_d32: F16 32;
    f16_d64: F16 64;
    f16_d96: F16 96;
    f16_d128: F16 128;
    f16_d256: F16 256;
}

#[test]
fn every_role_and_gate_in_groups_of_1_3_and_8() {
    check(&variants::roles(), &Entries::default());
}

#[test]
fn every_source_empty_or_there() {
    check(&variants::sources(), &Entries::default());
}

#[test]
fn every_arrangement_kind_of_numbers_and_scale() {
    check(&variants::arrangements_and_values(), &Entries::default());
}
