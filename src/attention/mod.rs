//! Segment attention (arXiv 2605.11744): the queries of one segment read the segment itself (causal), the KV tail of
//! the segment before it (*prior*) and retrieved KV rows of earlier segments (*past*) in one softmax.
//!
//! For query row `i` and head `h`, over the keys `j` the row sees:
//!
//! ```text
//! s_j   = scale * q_i . k_j  (+ ln past_gate[h] for past rows that are no sinks)
//! out_i = sum_j softmax(s)_j v_j        lse_i = ln sum_j exp(s_j)
//! ```
//!
//! The contract is `docs/contract.md`, section 1. A [`Problem`] holds the arguments, whatever computes it: [`cpu`] in
//! f32, [`cuda`] in bf16 and f16, [`mod@reference`] in f64 for tests.
//!
//! ```
//! use segattn::attention::{Problem, View, ViewMut, cpu};
//!
//! // One segment of 3 tokens, 2 query heads on 1 KV head.
//! let (q, kv) = (vec![0.1; 3 * 2 * 8], vec![0.2; 3 * 8]);
//! let (mut out, mut lse) = (vec![0.0; 3 * 2 * 8], vec![0.0; 2 * 3]);
//!
//! let (q, kv) = (View::packed(&q, [1, 3, 2, 8]), View::packed(&kv, [1, 3, 1, 8]));
//! let problem = Problem::causal(q, kv, kv);
//! cpu::forward(&problem, ViewMut::packed(&mut out, [1, 3, 2, 8]), &mut lse)?;
//! assert!((out[8] - 0.2).abs() < 1e-6);
//!
//! // The same with 2 rows carried over, which the first head reads.
//! let prior = vec![0.3; 2 * 8];
//! let prior = View::packed(&prior, [1, 2, 1, 8]);
//! let problem = problem.prior(prior, prior, &[true, false]);
//! cpu::forward(&problem, ViewMut::packed(&mut out, [1, 3, 2, 8]), &mut lse)?;
//! assert!(out[0] > 0.25 && (out[8] - 0.2).abs() < 1e-6);
//! # Ok::<(), segattn::attention::Error>(())
//! ```

pub mod cpu;
pub mod cuda;
mod error;
mod layout;
mod lengths;
mod problem;
pub mod reference;
mod source;
mod validate;

pub use error::Error;
pub use layout::{Batch, Elements, Layout, Strided, View, ViewMut};
pub use lengths::{Len, Lengths, PastLen};
pub use problem::{
    Gates, Gradients, HostGradients, HostProblem, HostSaved, Past, Prior, Problem, Saved,
};
pub use source::{PerSource, Source};
