//! The correctness check before the clock: sampled rows of the very tensors that are timed, against f64 on the CPU.

use super::case::{
    D_K, D_OUT, D_PRIOR_K, D_PRIOR_V, D_Q, D_V, Data, K, OUT, PAST_K, PAST_V, PRIOR_K, PRIOR_V, Q,
    V, shape,
};

/// Most that an error may be, relative to the norm of the row: 16-bit results and weights.
const LIMIT: f64 = 0.02;

/// Batch element 0 of the tensors on the host.
struct Host<'a> {
    data: &'a Data,
    tensors: Vec<Option<Vec<half::bf16>>>,
    lse: Vec<f32>,
}

impl<'a> Host<'a> {
    fn new(data: &'a Data, which: &[usize]) -> Result<Self, String> {
        let mut tensors = vec![None; D_PRIOR_V + 1];
        for &i in which {
            let len = shape(&data.case, i)[1..].iter().product();
            let slice = data.tensors[i].slice(..len);
            let values = match len {
                0 => Ok(Vec::new()),
                _ => data.stream.clone_dtoh(&slice),
            };
            tensors[i] = Some(values.map_err(|error| error.to_string())?);
        }
        let lse = data.stream.clone_dtoh(&data.lse);
        Ok(Host {
            data,
            tensors,
            lse: lse.map_err(|error| error.to_string())?,
        })
    }

    fn row(&self, i: usize, row: usize, head: usize) -> Vec<f64> {
        let [_, _, heads, dim] = shape(&self.data.case, i);
        let all = self.tensors[i].as_deref().unwrap_or_default();
        let start = (row * heads + head) * dim;
        all[start..start + dim].iter().map(|x| x.to_f64()).collect()
    }

    fn scale(&self) -> f64 {
        1.0 / (self.data.case.head_dim as f64).sqrt()
    }

    /// Keys that a query row sees: tensors of keys and of values, and row.
    fn visible(&self, row: usize, head: usize) -> Vec<(usize, usize, usize)> {
        let case = &self.data.case;
        let current = case.segment - case.rows + row + 1;
        let past = if head * case.kv_heads / case.q_heads < case.reading_heads {
            case.past
        } else {
            0
        };
        let sources = [
            (PAST_K, PAST_V, past),
            (PRIOR_K, PRIOR_V, case.prior),
            (K, V, current),
        ];
        let rows = |(k, v, rows)| (0..rows).map(move |row| (k, v, row));
        sources.into_iter().flat_map(rows).collect()
    }

    /// Weights of the keys and the row's lse.
    fn weights(&self, row: usize, head: usize) -> (Vec<f64>, f64) {
        let case = &self.data.case;
        let (q, kv) = (self.row(Q, row, head), head * case.kv_heads / case.q_heads);
        let score =
            |&(k, _, r): &(usize, usize, usize)| self.scale() * dot(&q, &self.row(k, r, kv));
        let scores: Vec<f64> = self.visible(row, head).iter().map(score).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        let weights = scores.iter().map(|s| (s - max).exp() / sum).collect();
        (weights, max + sum.ln())
    }

    fn delta(&self, row: usize, head: usize) -> f64 {
        dot(&self.row(D_OUT, row, head), &self.row(OUT, row, head))
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(to: &mut [f64], factor: f64, from: &[f64]) {
    to.iter_mut()
        .zip(from)
        .for_each(|(to, from)| *to += factor * from);
}

fn close(what: &str, got: &[f64], expected: &[f64]) -> Result<(), String> {
    let difference: Vec<f64> = got.iter().zip(expected).map(|(a, b)| a - b).collect();
    let error = (dot(&difference, &difference) / dot(expected, expected).max(1e-12)).sqrt();
    // NaN is not close.
    match error <= LIMIT {
        true => Ok(()),
        false => Err(format!(
            "{what}: relative error {error:.3}, at most {LIMIT}"
        )),
    }
}

/// First, middle and last query rows, of the first and the last head.
fn samples(data: &Data) -> Vec<(usize, usize)> {
    let case = &data.case;
    let rows = [0, case.rows / 2, case.rows - 1];
    rows.iter()
        .flat_map(|&row| [(row, 0), (row, case.q_heads - 1)])
        .collect()
}

/// Checks out and lse.
pub fn forward(data: &Data) -> Result<(), String> {
    let host = Host::new(data, &[Q, K, V, PRIOR_K, PRIOR_V, PAST_K, PAST_V, OUT])?;
    let case = &data.case;
    for (row, head) in samples(data) {
        let (weights, lse) = host.weights(row, head);
        let mut out = vec![0.0; case.head_dim];
        for (weight, (_, v, r)) in weights.iter().zip(host.visible(row, head)) {
            add(
                &mut out,
                *weight,
                &host.row(v, r, head * case.kv_heads / case.q_heads),
            );
        }
        close(
            &format!("out, row {row}, head {head}"),
            &host.row(OUT, row, head),
            &out,
        )?;
        let got = f64::from(host.lse[head * case.rows + row]);
        if (got - lse).abs() > 1e-3 {
            return Err(format!(
                "lse, row {row}, head {head}: {got}, expected {lse}"
            ));
        }
    }
    Ok(())
}

/// Checks the gradients: of sampled query rows, of the first current key and of the last prior key.
pub fn backward(data: &Data) -> Result<(), String> {
    let which: Vec<usize> = (Q..=D_PRIOR_V).collect();
    let host = Host::new(data, &which)?;
    let case = &data.case;
    for (row, head) in samples(data) {
        let (weights, _) = host.weights(row, head);
        let (d_out, delta) = (host.row(D_OUT, row, head), host.delta(row, head));
        let mut d_q = vec![0.0; case.head_dim];
        for (weight, (k, v, r)) in weights.iter().zip(host.visible(row, head)) {
            let ds = weight * (dot(&d_out, &host.row(v, r, head)) - delta);
            add(&mut d_q, host.scale() * ds, &host.row(k, r, head));
        }
        // The first row of a segment without anything in front sees itself alone: its gradient is nothing but rounding.
        if weights.len() > 1 {
            close(
                &format!("d_q, row {row}, head {head}"),
                &host.row(D_Q, row, head),
                &d_q,
            )?;
        }
    }
    let prior = case
        .prior
        .checked_sub(1)
        .map(|last| [PRIOR_K, PRIOR_V, D_PRIOR_K, D_PRIOR_V, last]);
    for [k, v, d_k, d_v, row] in [Some([K, V, D_K, D_V, 0]), prior].into_iter().flatten() {
        for head in [0, case.q_heads - 1] {
            let (key, value) = (host.row(k, row, head), host.row(v, row, head));
            let (mut sum_k, mut sum_v) = (vec![0.0; case.head_dim], vec![0.0; case.head_dim]);
            for query in 0..case.rows {
                let (q, d_out) = (host.row(Q, query, head), host.row(D_OUT, query, head));
                // The forward check has shown that lse is right.
                let lse = f64::from(host.lse[head * case.rows + query]);
                let weight = (host.scale() * dot(&q, &key) - lse).exp();
                let ds = weight * (dot(&d_out, &value) - host.delta(query, head));
                add(&mut sum_k, host.scale() * ds, &q);
                add(&mut sum_v, weight, &d_out);
            }
            close(
                &format!("d_k of key {row}, head {head}"),
                &host.row(d_k, row, head),
                &sum_k,
            )?;
            close(
                &format!("d_v of key {row}, head {head}"),
                &host.row(d_v, row, head),
                &sum_v,
            )?;
        }
    }
    Ok(())
}
