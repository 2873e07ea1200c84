//! The call as segattn's types describe it, whatever memory the tensors are in.

use candle_core::{Error, Result, bail};
use segattn::attention::{Gates, Layout, Lengths, Problem};

use crate::Options;

/// An error of segattn as one of candle's.
pub(crate) fn wrapped(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::wrap(error)
}

/// `[batch, rows, heads, head_dim]`.
pub(crate) type Shape = [usize; 4];

/// The shape of `q`.
pub(crate) fn q_shape(dims: &[usize]) -> Result<Shape> {
    match *dims {
        [batch, rows, heads, head_dim] => Ok([batch, rows, heads, head_dim]),
        _ => bail!("q: expected [batch, rows, q_heads, head_dim], got {dims:?}"),
    }
}

/// The shape of the keys, or the values, of a tensor that has both.
pub(crate) fn kv_shape(argument: &str, dims: &[usize]) -> Result<Shape> {
    match *dims {
        [batch, rows, 2, heads, head_dim] => Ok([batch, rows, heads, head_dim]),
        _ => bail!("{argument}: expected [batch, rows, 2, kv_heads, head_dim], got {dims:?}"),
    }
}

/// Where the keys lie in such a tensor; the values are [`values_offset`] elements further on.
pub(crate) fn kv_layout(shape: Shape) -> Layout<'static> {
    let [_, rows, heads, head_dim] = shape;
    let row = 2 * heads * head_dim;
    Layout::strided(shape, [rows * row, row, head_dim])
}

/// Elements from a key to its value, at most `len`.
pub(crate) fn values_offset([_, _, heads, head_dim]: Shape, len: usize) -> usize {
    (heads * head_dim).min(len)
}

/// The options as they are needed for `q_heads` heads.
pub(crate) struct Roles<'a> {
    options: &'a Options,
    every_head: Vec<bool>,
    ones: Vec<f32>,
}

impl<'a> Roles<'a> {
    pub fn new(options: &'a Options, q_heads: usize) -> Self {
        Roles {
            options,
            every_head: vec![true; q_heads],
            ones: vec![1.0; q_heads],
        }
    }

    /// The problem of keys and values.
    pub fn problem<X>(
        &self,
        q: X,
        [k, v]: [X; 2],
        prior: Option<[X; 2]>,
        past: Option<[X; 2]>,
    ) -> Problem<'_, X> {
        let options = self.options;
        let mut lengths = Lengths {
            segment_len: options.segment_len.as_ref().map(Into::into),
            query_start: options.query_start.as_ref().map(Into::into),
            ..Lengths::default()
        };
        if let Some(len) = &options.prior_len {
            lengths = lengths.prior(len);
        }
        let mut problem = Problem::causal(q, k, v);
        if let Some([k, v]) = prior {
            let heads = options.prior_heads.as_deref().unwrap_or(&self.every_head);
            problem = problem.prior(k, v, heads);
        }
        if let (Some([k, v]), Some(given)) = (past, &options.past) {
            let gates: Gates<'_> = given.gate.as_ref().unwrap_or(&self.ones).into();
            problem = problem.past(k, v, gates);
            if let Some(len) = &given.len {
                lengths = lengths.past(len);
            }
            if let Some(len) = &given.sink_len {
                lengths = lengths.sinks(len);
            }
        }
        problem.lengths(lengths).scale(options.scale)
    }
}
