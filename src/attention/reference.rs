//! Segment attention in f64, written to be read: one query row at a time, every visible key in a list, a full softmax,
//! and the gradient formulas of docs/contract.md, section 1. For tests; time and memory are quadratic.

use super::error::Error;
use super::layout::ViewMut;
use super::problem::{HostGradients, HostProblem, HostSaved};
use super::source::Part;

/// A key that a query row sees.
struct Key<'a> {
    part: Part,
    row: usize,
    k: &'a [f64],
    v: &'a [f64],
    score: f64,
}

/// Computes `out` (like `q`) and `lse` `[batch, q_heads, rows]`; padding rows are 0 and -inf.
///
/// # Errors
/// See [`Problem::validate`](super::Problem::validate); likewise for `out` and `lse`. Any `head_dim` is accepted.
pub fn forward(
    problem: &HostProblem<'_, f64>,
    mut out: ViewMut<'_, f64>,
    lse: &mut [f64],
) -> Result<(), Error> {
    problem.check_on_host("host values in the reference")?;
    problem.validate_forward(&out, &lse)?;
    for_each_query(problem, |batch_index, head, row, lse_idx| {
        let out_row = out.row([batch_index, row, head]);
        out_row.fill(0.0);
        lse[lse_idx] = f64::NEG_INFINITY;
        if row >= problem.query_rows(batch_index) {
            return;
        }
        let keys = visible_keys(problem, batch_index, head, row);
        lse[lse_idx] = log_sum_exp(&keys);
        for key in &keys {
            let p = (key.score - lse[lse_idx]).exp();
            add_scaled(out_row, p, key.v);
        }
    });
    Ok(())
}

/// Computes the gradients of a loss from those with respect to `out` and `lse`.
///
/// # Errors
/// See [`Problem::validate`](super::Problem::validate); likewise for every other argument. `query_start` must be 0.
pub fn backward(
    problem: &HostProblem<'_, f64>,
    saved: &HostSaved<'_, f64>,
    mut grads: HostGradients<'_, f64>,
) -> Result<(), Error> {
    problem.check_on_host("host values in the reference")?;
    problem.validate_backward(saved, &grads)?;
    clear(&mut grads);
    let (lse, q_heads) = (saved.lse, problem.q_heads());
    for_each_query(problem, |batch_index, head, row, lse_idx| {
        if row >= problem.query_rows(batch_index) {
            return;
        }
        let at = [batch_index, row, head];
        let (q, d_out) = (problem.q.row(at), saved.d_out.row(at));
        let d_lse = saved.d_lse.map_or(0.0, |d_lse| d_lse[lse_idx]);
        let delta = dot(d_out, saved.out.row(at)) - d_lse;
        for key in visible_keys(problem, batch_index, head, row) {
            let p = (key.score - lse[lse_idx]).exp();
            let ds = p * (dot(d_out, key.v) - delta);
            let d_score = scale(problem) * ds;
            add_scaled(grads.d_q.row(at), d_score, key.k);
            let key_at = [batch_index, key.row, head / problem.group()];
            match (key.part, &mut grads.d_prior) {
                (Part::Current, _) => {
                    add_scaled(grads.d_k.row(key_at), d_score, q);
                    add_scaled(grads.d_v.row(key_at), p, d_out);
                }
                (Part::Prior, Some((d_k, d_v))) => {
                    add_scaled(d_k.row(key_at), d_score, q);
                    add_scaled(d_v.row(key_at), p, d_out);
                }
                (Part::Prior, None) | (Part::Sinks, _) => {}
                (Part::Gated, _) => {
                    let gate = f64::from(problem.gate(head));
                    grads.d_past_gate[batch_index * q_heads + head] += ds / gate;
                }
            }
        }
    });
    Ok(())
}

/// Calls `f(batch element, head, row, lse_idx)` for every query row, padding included.
fn for_each_query(problem: &HostProblem<'_, f64>, mut f: impl FnMut(usize, usize, usize, usize)) {
    for batch_index in 0..problem.batch() {
        for head in 0..problem.q_heads() {
            for row in 0..problem.rows_of(batch_index) {
                let lse_idx = problem.row_index([batch_index, row, head]);
                f(batch_index, head, row, lse_idx);
            }
        }
    }
}

/// The keys that query row `row` of `head` sees, with their scores.
fn visible_keys<'a>(
    problem: &HostProblem<'a, f64>,
    batch_index: usize,
    head: usize,
    row: usize,
) -> Vec<Key<'a>> {
    let q = problem.q.row([batch_index, row, head]);
    let kv_head = head / problem.group();
    let mut keys = Vec::new();
    for part in Part::ALL {
        let Some([k, v]) = problem
            .source(part.source())
            .filter(|_| problem.reads_part(part, head))
        else {
            continue;
        };
        let (rows, bias) = match part {
            Part::Current => (0..problem.query_start(batch_index) + row + 1, 0.0),
            Part::Gated => (
                problem.part_rows(part, batch_index, kv_head),
                f64::from(problem.gate(head)).ln(),
            ),
            Part::Sinks | Part::Prior => (problem.part_rows(part, batch_index, kv_head), 0.0),
        };
        keys.extend(rows.map(|row| {
            let k = k.row([batch_index, row, kv_head]);
            Key {
                part,
                row,
                k,
                v: v.row([batch_index, row, kv_head]),
                score: scale(problem) * dot(q, k) + bias,
            }
        }));
    }
    keys
}

fn clear(grads: &mut HostGradients<'_, f64>) {
    let mut views = vec![&mut grads.d_q, &mut grads.d_k, &mut grads.d_v];
    if let Some((d_k, d_v)) = &mut grads.d_prior {
        views.extend([d_k, d_v]);
    }
    for view in views {
        let layout = view.layout;
        for batch_index in 0..layout.batch.len() {
            for row in 0..layout.rows_of(batch_index) {
                for head in 0..layout.heads {
                    view.row([batch_index, row, head]).fill(0.0);
                }
            }
        }
    }
    grads.d_past_gate.fill(0.0);
}

fn scale(problem: &HostProblem<'_, f64>) -> f64 {
    problem
        .scale
        .map_or(1.0 / (problem.head_dim() as f64).sqrt(), f64::from)
}

fn log_sum_exp(keys: &[Key<'_>]) -> f64 {
    let max = keys
        .iter()
        .fold(f64::NEG_INFINITY, |max, key| max.max(key.score));
    let sum: f64 = keys.iter().map(|key| (key.score - max).exp()).sum();
    max + sum.ln()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add_scaled(target: &mut [f64], factor: f64, source: &[f64]) {
    for (target, source) in target.iter_mut().zip(source) {
        *target += factor * source;
    }
}
