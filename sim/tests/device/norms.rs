//! Gradients of norms' weights on the simulated GPU.

use crate::common::{gpu, random, upload};
use segattn::device::{Device, Kind, Rows};
use segattn_sim::Checks;

/// A chain over many rows, in several calls on a workspace, has the bits of calls that have no workspace.
#[test]
fn a_long_chain_has_the_bits_of_short_ones() {
    let gpu = gpu(1, Checks::None);
    let mut next = random(5);
    for (rows, width, short) in [(2100, 1000, 700), (1500, 40, 1023)] {
        let mut numbers = |len: usize| (0..len).map(|_| next() - 0.5).collect::<Vec<f32>>();
        let [d_y, x] = [0, 1].map(|_| upload(&gpu, Kind::Activation, &numbers(rows * width)));
        let rstd = upload(&gpu, Kind::Exact, &numbers(rows));
        let before = numbers(width);
        let gradient = |at_once: usize| {
            let mut sum = upload(&gpu, Kind::Exact, &before);
            for first in (0..rows).step_by(at_once) {
                let [d_y, x] = [&d_y, &x].map(|of| Rows::packed(of, first, width));
                let (rstd, count) = (Rows::packed(&rstd, first, 1), at_once.min(rows - first));
                let done = gpu.rms_norm_weight_grad(d_y, x, rstd, [count, 1], &mut sum);
                done.expect("a gradient");
            }
            let sum = gpu.read(&sum, 0..width).expect("a read");
            sum.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        assert_eq!(gradient(rows), gradient(short), "{rows} rows of {width}");
        assert_ne!(gradient(rows)[0], before[0].to_bits());
    }
}
