//! A run has the same bits on any number of ranks (docs/contract.md, section 4): losses, norms, weights and moments.

use crate::common::config_of;
use crate::spread::{At, Run, Spread, bits, config, same, sequences};
use segattn::train::config::Config;

/// Steps up to `end` on so many ranks, from the start or from where a run was.
fn run(world: usize, config: &Config, tied: bool, count: usize, from: Option<&At>, end: u64) -> At {
    let run = Run {
        model: &config_of(tied, 8),
        config,
        sequences: &|step| sequences(step, count),
    };
    run.to(Spread::Sequences(world), from, end)
}

#[test]
fn losses_weights_and_moments_have_the_same_bits_on_any_number_of_ranks() {
    for (tied, group, count, gate_l1) in [
        (true, "1", 8, "0"),
        (false, "1", 5, "0.1"),
        (true, "2", 7, "0.1"),
    ] {
        let config = config(&[("training.group", group), ("training.gate_l1", gate_l1)]);
        let one = run(1, &config, tied, count, None, 3);
        for world in [2, 3, 4, 8] {
            let several = run(world, &config, tied, count, None, 3);
            same(
                &one,
                &several,
                &format!("{world} ranks, groups of {group}, {count} sequences"),
            );
        }
    }
}

#[test]
fn how_many_sequences_are_computed_side_by_side_changes_no_bit() {
    for group in ["1", "2"] {
        let of = |batch: &str| config(&[("training.group", group), ("training.batch", batch)]);
        let one = run(1, &of("1"), true, 7, None, 3);
        for (world, batch) in [(1, "3"), (1, "8"), (2, "2")] {
            let several = run(world, &of(batch), true, 7, None, 3);
            same(
                &one,
                &several,
                &format!("{batch} side by side, groups of {group}, {world} ranks"),
            );
        }
    }
}

#[test]
fn the_order_of_sums_matters_here() {
    let bits_of = |group: &str| {
        let config = config(&[("training.group", group)]);
        bits(&run(1, &config, true, 8, None, 3).tensors)
    };
    assert!(
        bits_of("1") != bits_of("8"),
        "the test above could not fail"
    );
}

#[test]
fn only_tensors_that_are_updated_are_exchanged_and_all_keep_their_bits() {
    let config = config(&[("training.train_only", "norm,past_gate")]);
    let one = run(1, &config, true, 4, None, 2);
    same(&one, &run(3, &config, true, 4, None, 2), "3 ranks");
}

#[test]
fn a_run_goes_on_with_another_number_of_ranks_to_the_same_bits() {
    let config = config(&[]);
    let whole = run(1, &config, true, 8, None, 4);
    let two = run(2, &config, true, 8, None, 2);
    same(
        &whole,
        &run(4, &config, true, 8, Some(&two), 4),
        "2 ranks, then 4",
    );
    same(
        &whole,
        &run(1, &config, true, 8, Some(&two), 4),
        "2 ranks, then 1",
    );
}
