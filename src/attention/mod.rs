//! Segment attention: the queries of one segment read the segment itself (causal), the KV tail of
//! the segment before it (*prior*) and retrieved KV rows of earlier segments (*past*) in one softmax.
//!
//! For query row `i` and head `h`, over the keys `j` the row sees:
//!
//! ```text
//! s_j   = scale * q_i . k_j  (+ ln past_gate[h] for past rows)
//! out_i = sum_j softmax(s)_j v_j        lse_i = ln sum_j exp(s_j)
//! ```
//!
//! [`Problem`] holds the arguments, [`mod@reference`] computes it in f64 for tests.

pub mod cpu;
mod error;
mod problem;
pub mod reference;
mod view;

pub use error::Error;
pub use problem::{Grads, PastLen, Problem};
pub use view::{Batch, Layout, View, ViewMut};
