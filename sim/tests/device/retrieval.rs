//! Pools of past tokens and retrieval from them on the simulated GPU, against the f64 reference.

use crate::common::gpu;
use crate::retrieval_cases::{
    RULES, Tokens, pool, pools_take_any_runs, select, selections_do_not_depend_on_chunks_and_rings,
};
use segattn::device::reference::Reference;
use segattn_sim::Checks;

#[test]
fn a_pool_holds_the_same_tokens_however_it_was_filled() {
    pools_take_any_runs(&gpu(31, Checks::All));
}

#[test]
fn what_is_selected_does_not_depend_on_chunks_and_rings() {
    selections_do_not_depend_on_chunks_and_rings(&gpu(32, Checks::All));
}

#[test]
fn the_gpu_selects_what_the_reference_does() {
    let gpu = gpu(33, Checks::All);
    for seed in 0..4 {
        let tokens = Tokens::new(64, 200, 1 + 3 * seed as usize, seed);
        let (exact, fast) = (
            pool(&Reference, &tokens, 1, &[200]),
            pool(&gpu, &tokens, 64, &[50]),
        );
        for rule in RULES {
            for eligible in [[0..200, 4..195], [7..8, 100..100], [0..17, 183..200]] {
                let expected = select(&Reference, &exact, &tokens, (0, 0), &eligible, rule);
                let got = select(&gpu, &fast, &tokens, (3, 2), &eligible, rule);
                assert_eq!(got, expected);
            }
        }
    }
}
