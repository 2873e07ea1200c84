//! What a row of logits is compared with, where a model learns from another one.

use super::Rows;

/// Argument of [`Device::divergences`](super::Device::divergences).
#[derive(Debug)]
pub struct Lesson<'a, B> {
    /// The teacher's logits `[rows, vocab]`, in a buffer of kind [`Exact`](super::Kind::Exact).
    pub teacher: Rows<'a, B>,
    /// What both models' logits are divided by for the divergence: above 0.
    pub temperature: f64,
    /// Of each row the factors of the gradients of its negative log-probability and of its divergence times
    /// `temperature^2`: finite.
    pub scales: &'a [[f64; 2]],
}
