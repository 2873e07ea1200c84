//! Pools of past tokens and retrieval from them on the simulated GPU, against the f64 reference.

use crate::common::{config, gpu, model, tokens, values};
use crate::retrieval_cases::{
    self, a_device_selects_what_the_reference_does, pools_take_any_runs,
    selections_do_not_depend_on_chunks_and_rings,
};
use segattn::device::PoolBits;
use segattn::model::config::RetrievalConfig;
use segattn::model::segmentation::Sequence;
use segattn::model::session::{Feed, Session, score};
use segattn_sim::Checks;

#[test]
fn a_pool_holds_the_same_tokens_however_it_was_filled() {
    pools_take_any_runs(&gpu(31, Checks::All));
}

#[test]
fn a_pool_of_fewer_bits_holds_multiples_of_a_step() {
    retrieval_cases::pools_round_to_their_bits(&gpu(35, Checks::All));
}

#[test]
fn a_pool_of_fewer_bits_selects_by_what_it_holds() {
    retrieval_cases::pools_of_fewer_bits_select_by_what_they_hold(&gpu(36, Checks::All));
}

#[test]
fn what_is_selected_does_not_depend_on_chunks_and_rings() {
    selections_do_not_depend_on_chunks_and_rings(&gpu(32, Checks::All));
}

#[test]
fn the_gpu_selects_what_the_reference_does() {
    a_device_selects_what_the_reference_does(&gpu(33, Checks::All), 0..3);
}

#[test]
fn keys_of_any_finite_size_give_a_selection() {
    retrieval_cases::keys_of_any_finite_size_give_a_selection(&gpu(34, Checks::All));
}

#[test]
fn the_gpu_drops_what_the_reference_does() {
    retrieval_cases::a_device_drops_what_the_reference_does(&gpu(37, Checks::All), 0..2);
}

#[test]
fn what_is_left_of_a_pool_is_what_it_was() {
    retrieval_cases::what_is_left_is_what_it_was(&gpu(38, Checks::All));
}

#[test]
fn calls_for_several_pools_have_the_bits_of_one_call_each() {
    retrieval_cases::calls_together_are_calls_alone(&gpu(40, Checks::All));
}

#[test]
fn what_a_pool_cannot_drop_is_refused() {
    retrieval_cases::what_cannot_be_dropped_is_refused(&gpu(39, Checks::All));
}

#[test]
fn a_model_that_selects_windows_has_the_same_bits_on_every_path() {
    has_the_same_bits_on_every_path(0);
}

#[test]
fn a_model_whose_pools_are_bounded_has_the_same_bits_on_every_path() {
    has_the_same_bits_on_every_path(13);
}

/// A model whose heads select windows of lengths that are multiples of nothing, over chunks of the pool that segments
/// do not fill.
fn has_the_same_bits_on_every_path(pool_len: usize) {
    let mut config = config(false);
    let segment = config.segment.as_mut().expect("segments");
    (segment.past_len, segment.prior_len) = (7, 3);
    (segment.pool_bits, segment.pool_len) = (PoolBits::Four, pool_len);
    segment.retrieval = RetrievalConfig::Windows {
        queries: 3,
        window_len: 3,
        window_before: 1,
    };
    config.validate().expect("a config");
    let model = model(gpu(35, Checks::None), &config, &values(&config, 21));
    let tokens = tokens(22, 45, config.vocab_size);
    let breaks = [5, 16, 17, 30];
    let sequence = Sequence {
        tokens: &tokens,
        breaks: &breaks,
        rereads: &[],
    };
    let expected = score(&model, sequence, 1).expect("scores");
    assert_eq!(score(&model, sequence, 4).expect("scores"), expected);
    let mut session = Session::new(&model, 1, tokens.len(), 2).expect("a session");
    let (mut got, mut first) = (Vec::new(), 0);
    for rows in [3, 1, 9, 4, 1, 1, 25] {
        let range = first..first + rows;
        let within = breaks
            .iter()
            .filter(|b| range.start < **b && **b <= range.end);
        let within: Vec<usize> = within.map(|b| b - range.start).collect();
        let feed = Feed {
            sequence: 0,
            tokens: &tokens[range.clone()],
            targets: &tokens[range.start + 1..range.end + 1],
            breaks: &within,
            rereads: &[],
        };
        got.extend(session.feed(&[feed]).expect("a feed").concat());
        first += rows;
    }
    assert_eq!(got, expected);
}
