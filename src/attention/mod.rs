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
//! [`Problem`] holds the arguments, [`cpu`] computes it in f32, [`mod@reference`] in f64 for tests.
//!
//! ```
//! use segattn::attention::{PastLen, Problem, View, ViewMut, cpu};
//!
//! // One segment of 3 tokens, 2 query heads on 1 KV head, 2 rows carried over, nothing retrieved.
//! let (q, kv, prior) = (vec![0.1; 3 * 2 * 8], vec![0.2; 3 * 8], vec![0.3; 2 * 8]);
//! let problem = Problem {
//!     batch: 1,
//!     q_heads: 2,
//!     kv_heads: 1,
//!     head_dim: 8,
//!     q: View::packed(&q, [1, 3, 2, 8]),
//!     k: View::packed(&kv, [1, 3, 1, 8]),
//!     v: View::packed(&kv, [1, 3, 1, 8]),
//!     prior_k: View::packed(&prior, [1, 2, 1, 8]),
//!     prior_v: View::packed(&prior, [1, 2, 1, 8]),
//!     past_k: View::empty(1),
//!     past_v: View::empty(1),
//!     segment_len: &[3],
//!     prior_len: &[2],
//!     past_len: PastLen::PerBatch(&[0]),
//!     query_start: None,
//!     past_gate: &[0.0, 0.0],
//!     prior_heads: &[true, false],
//!     scale: None,
//! };
//! let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; 2 * 3]);
//! cpu::forward(&problem, ViewMut::packed(&mut out, [1, 3, 2, 8]), &mut lse)?;
//! // Head 1 reads no prior rows: a mean of rows that are all 0.2.
//! assert!((out[8] - 0.2).abs() < 1e-6);
//! # Ok::<(), segattn::attention::Error>(())
//! ```

pub mod cpu;
pub mod cuda;
mod error;
mod problem;
pub mod reference;
mod view;

pub use error::Error;
pub use problem::{Grads, PastLen, Problem};
pub use view::{Batch, Layout, View, ViewMut};
