//! The divergence from a teacher, as its formula says (docs/contract.md, section 3).

use super::Buf;
use crate::device::{Lesson, RowsMut};

/// Natural logarithms of the probabilities of a row of logits at a temperature.
fn log_softmax(logits: &[f64], temperature: f64) -> Vec<f64> {
    let tempered = logits.iter().map(|x| x / temperature);
    let max = tempered.clone().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = max + tempered.clone().map(|x| (x - max).exp()).sum::<f64>().ln();
    tempered.map(|x| x - log_sum).collect()
}

/// [`Device::divergences`](crate::device::Device::divergences).
pub(super) fn rows(
    mut logits: RowsMut<'_, Buf>,
    vocab: usize,
    targets: &[u32],
    lesson: &Lesson<'_, Buf>,
    [mut scores, mut divergences]: [RowsMut<'_, Buf>; 2],
) {
    let temperature = lesson.temperature;
    for (r, (target, [a, b])) in targets.iter().zip(lesson.scales).enumerate() {
        let row = logits.row(r, vocab);
        let known = log_softmax(lesson.teacher.row(r, vocab), temperature);
        let (plain, own) = (log_softmax(row, 1.0), log_softmax(row, temperature));
        scores.row(r, 1)[0] = plain[*target as usize];
        let term = |(known, own): (&f64, &f64)| match known.exp() {
            0.0 => 0.0,
            q => q * (known - own),
        };
        divergences.row(r, 1)[0] = known.iter().zip(&own).map(term).sum();
        for (i, x) in row.iter_mut().enumerate() {
            let learned = own[i].exp() - known[i].exp();
            *x = a * plain[i].exp() + b * temperature * learned;
        }
        row[*target as usize] -= a;
    }
}
