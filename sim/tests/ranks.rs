//! Runs over ranks and over stages, each rank on a simulated GPU of its own, have the bits of one
//! (docs/contract.md, section 4).
#![allow(
    clippy::duplicate_mod,
    reason = "the tests' helpers share a module of random numbers"
)]

#[allow(dead_code, reason = "each test uses a part")]
#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/meeting/mod.rs"]
mod meeting;
#[allow(dead_code, reason = "each test uses a part")]
#[path = "device/common.rs"]
mod simulated;
#[path = "../../tests/spread/mod.rs"]
mod spread;

use segattn::model::session::rehearse;
use segattn::train::data::Example;
use segattn_sim::Checks;
use spread::{At, Run, Spread, config, same};

/// Three sequences of up to two segments.
fn sequences(step: u64) -> Vec<Example> {
    let lengths = [9, 3, 12].into_iter().enumerate();
    let tokens = |(i, n)| simulated::tokens(10 * step + i as u64, n, 27);
    lengths.map(|pair| Example::from(tokens(pair))).collect()
}

fn run(tied: bool, spread: Spread, from: Option<&At>, end: u64) -> At {
    let config = config(&[]);
    let run = Run {
        model: &simulated::config(tied),
        config: &config,
        sequences: &sequences,
    };
    // Blocks run in another order on each rank.
    let device = |rank| simulated::gpu(rank as u64, Checks::None);
    run.on(&device, spread, from, end)
}

#[test]
fn ranks_and_stages_on_simulated_gpus_have_the_bits_of_one() {
    let one = run(true, Spread::Sequences(1), None, 2);
    let ranks = run(true, Spread::Sequences(2), None, 1);
    same(
        &one,
        &run(true, Spread::Sequences(2), Some(&ranks), 2),
        "2 ranks",
    );
    same(
        &one,
        &run(true, Spread::Layers(2), Some(&ranks), 2),
        "2 ranks, then 2 stages",
    );
    assert!(
        spread::bits(&one.tensors) != spread::bits(&ranks.tensors),
        "a step changes nothing"
    );
}

#[test]
fn an_untied_model_over_stages_of_simulated_gpus_has_the_bits_of_one() {
    let one = run(false, Spread::Sequences(1), None, 1);
    same(&one, &run(false, Spread::Layers(2), None, 1), "2 stages");
}

#[test]
fn a_stage_rehearses_a_segment_without_its_neighbours() {
    let whole = simulated::config(true);
    for layers in [0..1, 1..2] {
        let part = whole.part_of(layers);
        let values = simulated::values(&part, 3);
        let model = simulated::model(simulated::gpu(5, Checks::All), &part, &values);
        rehearse(&model, 9).expect("a rehearsal");
    }
}
