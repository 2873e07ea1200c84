//! The divergence of a row of logits from a teacher's, and the gradient of both losses.
//!
//! The result of a row depends on that row alone. Sums are those of `rows`: 16 lanes in f32, blocks in f64.

use super::math::{exp, for_each_isa, sum_lanes};
use super::rows::{SUM_BLOCK, cross_entropy_row, max_lanes};
use crate::isa::Isa;

#[cfg(test)]
mod tests;

/// A row of a teacher's logits, and how it is learned from.
#[derive(Clone, Copy, Debug)]
pub struct RowLesson<'a> {
    /// The teacher's logits, as many as the student's.
    pub teacher: &'a [f32],
    /// T, above 0.
    pub temperature: f64,
    /// Factors of the gradients of the negative log-probability and of T² times the divergence.
    pub scales: [f32; 2],
}

/// A softmax at a temperature: the probability of `x` is `exp((x - max) * inverse) / sum`.
#[derive(Clone, Copy)]
struct Tempered {
    max: f32,
    inverse: f32,
    sum: f64,
}

/// Returns the log-probability of `target`, with the bits of [`cross_entropy_row`], and the Kullback-Leibler divergence
/// of softmax(logits / T) from softmax(teacher / T). Replaces the logits by the gradient (Hinton, Vinyals and Dean
/// 2015):
///
/// scales\[0\] (softmax(logits) - onehot(target)) + scales\[1\] T (softmax(logits / T) - softmax(teacher / T))
///
/// # Panics
/// If there is no logit `target`, or if the teacher has another number of logits.
pub fn divergence_row(logits: &mut [f32], target: usize, lesson: RowLesson<'_>) -> [f32; 2] {
    let expected = logits.len();
    assert_eq!(lesson.teacher.len(), expected, "logits of the teacher");
    row_on(Isa::best(), logits, target, lesson)
}

fn row_on(isa: Isa, logits: &mut [f32], target: usize, lesson: RowLesson<'_>) -> [f32; 2] {
    let RowLesson {
        teacher,
        temperature,
        scales: [of_target, of_teacher],
    } = lesson;
    let plain = cross_entropy_row(logits, target);
    let inverse = (1.0 / temperature) as f32;
    let student = tempered(isa, logits, inverse);
    let pair = [student, tempered(isa, teacher, inverse)];
    let divergence = divergence_of(isa, logits, teacher, pair);
    let slope = (f64::from(of_teacher) * temperature) as f32;
    let learned = slope * difference([logits[target], teacher[target]], pair, reciprocals(pair));
    let plain_softmax = Tempered {
        inverse: 1.0,
        sum: plain.sum,
        ..student
    };
    gradient(
        isa,
        logits,
        teacher,
        plain_softmax,
        pair,
        [of_target, slope],
    );
    // p - 1 cancels where p is near 1. There it is computed as minus the sum of the other probabilities.
    logits[target] = (plain.logprob as f64).exp_m1() as f32 * of_target + learned;
    [plain.logprob, divergence]
}

#[inline(always)]
fn reciprocals(pair: [Tempered; 2]) -> [f32; 2] {
    pair.map(|softmax| (1.0 / softmax.sum) as f32)
}

/// The student's probability less the teacher's, `over` being the reciprocals of their sums.
#[inline(always)]
fn difference([x, t]: [f32; 2], [student, teacher]: [Tempered; 2], over: [f32; 2]) -> f32 {
    let p = exp((x - student.max) * student.inverse) * over[0];
    let q = exp((t - teacher.max) * teacher.inverse) * over[1];
    p - q
}

for_each_isa! {
    fn tempered(row: &[f32], inverse: f32) -> Tempered {
        let max = max_lanes(row);
        let mut sum = 0f64;
        for block in row.chunks(SUM_BLOCK) {
            sum += sum_lanes([block], |[x], sum| sum + exp((x - max) * inverse)) as f64;
        }
        Tempered { max, inverse, sum }
    }
}

for_each_isa! {
    /// The sum of q (ln q - ln p). Where q is 0, nothing is added, whatever p is.
    fn divergence_of(logits: &[f32], teacher: &[f32], pair: [Tempered; 2]) -> f32 {
        let [student, known] = pair;
        let offset = (student.sum.ln() - known.sum.ln()) as f32;
        let over = (1.0 / known.sum) as f32;
        let term = |[x, t]: [f32; 2], sum: f32| {
            let q = exp((t - known.max) * known.inverse) * over;
            let ratio = ((t - known.max) - (x - student.max)).mul_add(student.inverse, offset);
            // NaN is not 0, so it is passed on.
            sum + if q == 0.0 { 0.0 } else { q * ratio }
        };
        let mut sum = 0f64;
        for (x, t) in logits.chunks(SUM_BLOCK).zip(teacher.chunks(SUM_BLOCK)) {
            sum += sum_lanes([x, t], term) as f64;
        }
        sum as f32
    }
}

for_each_isa! {
    /// `factors`: of the softmax at temperature 1, and of the difference of the tempered ones.
    fn gradient(
        logits: &mut [f32], teacher: &[f32], plain: Tempered, pair: [Tempered; 2], factors: [f32; 2],
    ) {
        let (scale, over) = ((1.0 / plain.sum) as f32, reciprocals(pair));
        for (x, t) in logits.iter_mut().zip(teacher) {
            let learned = factors[1] * difference([*x, *t], pair, over);
            *x = exp(*x - plain.max) * scale * factors[0] + learned;
        }
    }
}
