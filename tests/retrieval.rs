//! Pools of past tokens and retrieval from them (docs/contract.md, section 2), on the CPU and in the f64 reference.

mod retrieval_cases;

use retrieval_cases::{
    RULES, Tokens, pool, pools_take_any_runs, select, selections_do_not_depend_on_chunks_and_rings,
};
use segattn::device::cpu::Cpu;
use segattn::device::reference::Reference;

#[test]
fn a_pool_holds_the_same_tokens_however_it_was_filled() {
    pools_take_any_runs(&Reference);
    pools_take_any_runs(&Cpu);
}

#[test]
fn what_is_selected_does_not_depend_on_chunks_and_rings() {
    selections_do_not_depend_on_chunks_and_rings(&Reference);
    selections_do_not_depend_on_chunks_and_rings(&Cpu);
}

#[test]
fn the_cpu_selects_what_the_reference_does() {
    for seed in 0..20 {
        let tokens = Tokens::new(32, 260, 1 + seed as usize, seed);
        let (exact, fast) = (
            pool(&Reference, &tokens, 1, &[260]),
            pool(&Cpu, &tokens, 1, &[50]),
        );
        for rule in RULES {
            for eligible in [[0..260, 4..255], [7..8, 100..100], [0..17, 243..260]] {
                let expected = select(&Reference, &exact, &tokens, (0, 0), &eligible, rule);
                let got = select(&Cpu, &fast, &tokens, (3, 2), &eligible, rule);
                assert_eq!(got, expected);
            }
        }
    }
}
