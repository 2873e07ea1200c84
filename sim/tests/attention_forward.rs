//! The forward attention kernel of `kernels/` under every check, against the formula in f64.

#[allow(dead_code)]
mod attention;

use std::sync::Arc;

use attention::*;
use half::bf16;
use segattn_sim::{Checks, Gpu, Module, SimError};

/// out and lse of the kernel.
fn run(
    module: &Arc<Module>,
    inputs: &Inputs,
    seed: u64,
) -> Result<(Vec<bf16>, Vec<f32>), SimError> {
    let mut gpu = Gpu::new(seed, Checks::All);
    let forward = forward(&mut gpu, module, inputs)?;
    Ok((gpu.download(forward.out), gpu.download(forward.lse)))
}

#[test]
fn forward_agrees_with_the_formula_and_with_itself_in_every_schedule() {
    let module = module("attention_forward.cu");
    let inputs = inputs();
    let (out, lse) = run(&module, &inputs, 0).unwrap_or_else(|e| panic!("{e}"));
    for (entry, head, row) in
        (0..BATCH * Q_HEADS * ROWS).map(|i| (i / ROWS / Q_HEADS, i / ROWS % Q_HEADS, i % ROWS))
    {
        let got = &out[((entry * ROWS + row) * Q_HEADS + head) * DIM..][..DIM];
        let got_lse = lse[(entry * Q_HEADS + head) * ROWS + row];
        if row >= SEGMENT_LEN[entry] as usize {
            assert!(got_lse == f32::NEG_INFINITY && got.iter().all(|x| x.to_f32() == 0.0));
            continue;
        }
        let (want, want_lse) = exact(&inputs, entry, row, head);
        assert!(
            (f64::from(got_lse) - want_lse).abs() < 1e-4,
            "lse of {entry} {head} {row}: {got_lse}, {want_lse}"
        );
        for (got, want) in got.iter().zip(want) {
            assert!(
                (got.to_f64() - want).abs() < 0.012,
                "{entry} {head} {row}: {got} {want}"
            );
        }
    }
    for seed in 1..4 {
        let again = run(&module, &inputs, seed).unwrap_or_else(|e| panic!("{e}"));
        let bits = |(out, lse): &(Vec<bf16>, Vec<f32>)| {
            let lse = lse.iter().map(|x| x.to_bits());
            out.iter()
                .map(|x| u32::from(x.to_bits()))
                .chain(lse)
                .collect::<Vec<_>>()
        };
        assert!(
            bits(&again) == bits(&(out.clone(), lse.clone())),
            "seed {seed} has other bits"
        );
    }
}
