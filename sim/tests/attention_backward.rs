//! The backward attention kernels of `kernels/` under every check, against the formula in f64.

#[allow(dead_code)]
mod attention;

use attention::*;
use half::bf16;
use segattn_sim::{Buffer, Checks, Gpu};

#[repr(C)]
#[derive(Clone, Copy)]
struct BackwardParams {
    problem: Problem,
    out_and_d_out: [Tensor; 2],
    lse: usize,
    d_lse: usize,
    d_q_k_v_prior: [Tensor; 5],
    d_past_gate: usize,
    row_lse: usize,
    row_delta: usize,
    partial_d_q: usize,
    partial_gate: usize,
    row_pitch: i32,
    tiles: i32,
    max_items: i32,
}

/// Gradients of q, k, v, prior_k, prior_v, and of the gates.
fn exact_gradients(inputs: &Inputs, d_out: &[bf16]) -> ([Vec<f64>; 5], Vec<f64>) {
    let zeros = |rows: usize, heads: usize| vec![0f64; BATCH * rows * heads * DIM];
    let current = || zeros(ROWS, KV_HEADS);
    let prior = || zeros(PRIOR, KV_HEADS);
    let mut tensors = [zeros(ROWS, Q_HEADS), current(), current(), prior(), prior()];
    let mut gates = vec![0f64; BATCH * Q_HEADS];
    for (entry, head) in (0..BATCH * Q_HEADS).map(|i| (i / Q_HEADS, i % Q_HEADS)) {
        for row in 0..SEGMENT_LEN[entry] as usize {
            let gate = &mut gates[entry * Q_HEADS + head];
            add_row(inputs, d_out, [entry, head, row], &mut tensors, gate);
        }
    }
    (tensors, gates)
}

/// What one query row adds to every gradient.
fn add_row(
    inputs: &Inputs,
    d_out: &[bf16],
    [entry, head, row]: [usize; 3],
    tensors: &mut [Vec<f64>; 5],
    d_gate: &mut f64,
) {
    let dot = |a: &[bf16], b: &[bf16]| {
        a.iter()
            .zip(b)
            .map(|(a, b)| a.to_f64() * b.to_f64())
            .sum::<f64>()
    };
    let (out, lse) = exact(inputs, entry, row, head);
    let q_at = ((entry * ROWS + row) * Q_HEADS + head) * DIM;
    let (q, g) = (&inputs.q[q_at..q_at + DIM], &d_out[q_at..q_at + DIM]);
    let delta: f64 = out.iter().zip(g).map(|(o, g)| o * g.to_f64()).sum();
    let past = if GATES[head] > 0.0 {
        PAST_LEN[entry] as usize
    } else {
        0
    };
    let prior = if PRIOR_HEADS[head] != 0 {
        PRIOR_LEN[entry] as usize
    } else {
        0
    };
    for (source, (count, rows)) in [(past, PAST), (prior, PRIOR), (row + 1, ROWS)]
        .into_iter()
        .enumerate()
    {
        let gate = if source == 0 {
            f64::from(GATES[head])
        } else {
            1.0
        };
        for key in 0..count {
            let at = ((entry * rows + key) * KV_HEADS + head / (Q_HEADS / KV_HEADS)) * DIM;
            let [k, v] = inputs.sources[source]
                .each_ref()
                .map(|tensor| &tensor[at..at + DIM]);
            let weight = gate * (dot(q, k) * SCALE - lse).exp();
            let d_score = weight * (dot(g, v) - delta);
            if source == 0 {
                *d_gate += d_score / gate;
            }
            for d in 0..DIM {
                tensors[0][q_at + d] += d_score * SCALE * k[d].to_f64();
                if source > 0 {
                    let (d_k, d_v) = [(3, 4), (1, 2)][source - 1];
                    tensors[d_k][at + d] += d_score * SCALE * q[d].to_f64();
                    tensors[d_v][at + d] += weight * g[d].to_f64();
                }
            }
        }
    }
}

#[test]
fn backward_agrees_with_the_formula() {
    let (forward_module, module) = (
        module("attention_forward.cu"),
        module("attention_backward.cu"),
    );
    let inputs = inputs();
    let mut gpu = Gpu::new(1, Checks::All);
    let forward = forward(&mut gpu, &forward_module, &inputs).unwrap_or_else(|e| panic!("{e}"));
    let d_out = values(ROWS, Q_HEADS, 99);
    let g_d_out = gpu.input("d_out", &d_out).expect("memory");
    let mut alloc = |name: &str, bytes: usize| gpu.alloc(name, bytes).expect("memory");
    let sizes = [
        (ROWS, Q_HEADS),
        (ROWS, KV_HEADS),
        (ROWS, KV_HEADS),
        (PRIOR, KV_HEADS),
        (PRIOR, KV_HEADS),
    ];
    let names = ["d_q", "d_k", "d_v", "d_prior_k", "d_prior_v"];
    let gradients: Vec<Buffer> = names
        .iter()
        .zip(sizes)
        .map(|(name, (rows, heads))| alloc(name, BATCH * rows * heads * DIM * 2))
        .collect();
    let d_past_gate = alloc("d_past_gate", BATCH * Q_HEADS * 4);
    let row_pitch = ROWS.next_multiple_of(128);
    let query_info: [i32; 7] = module
        .constant("attention_query_grad_bf16_d64_info")
        .expect("info");
    let key_info: [i32; 7] = module
        .constant("attention_key_grad_bf16_d64_info")
        .expect("info");
    assert_eq!(query_info[6] as usize, size_of::<BackwardParams>());
    let tiles = ROWS.div_ceil(query_info[3] as usize);
    let params = BackwardParams {
        problem: forward.problem,
        out_and_d_out: [forward.out, g_d_out].map(|buffer| tensor(buffer, ROWS, Q_HEADS)),
        lse: forward.lse.address(),
        d_lse: 0,
        d_q_k_v_prior: std::array::from_fn(|i| tensor(gradients[i], sizes[i].0, sizes[i].1)),
        d_past_gate: d_past_gate.address(),
        row_lse: alloc("row_lse", BATCH * Q_HEADS * row_pitch * 4).address(),
        row_delta: alloc("row_delta", BATCH * Q_HEADS * row_pitch * 4).address(),
        partial_d_q: alloc("partial_d_q", BATCH * Q_HEADS * ROWS * DIM * 4).address(),
        partial_gate: alloc("partial_gate", BATCH * Q_HEADS * tiles * 4).address(),
        row_pitch: row_pitch as i32,
        tiles: tiles as i32,
        max_items: 1,
    };
    let key_tiles = |rows: usize| rows.div_ceil(key_info[3] as usize);
    let launches = [
        ("prepare", (BATCH * Q_HEADS * row_pitch).div_ceil(4), 128, 0),
        (
            "query_grad",
            tiles * Q_HEADS * BATCH,
            query_info[0],
            query_info[1],
        ),
        (
            "query_grad_sum",
            (BATCH * Q_HEADS * ROWS).div_ceil(4),
            128,
            0,
        ),
        (
            "key_grad",
            BATCH * KV_HEADS * (key_tiles(PRIOR) + key_tiles(ROWS)),
            key_info[0],
            key_info[1],
        ),
    ];
    for (name, grid, threads, shared) in launches {
        let kernel = module
            .kernel(&format!("attention_{name}_bf16_d64"))
            .expect("kernel");
        let result = gpu.launch(
            &kernel,
            [grid as u32, 1, 1],
            [threads as u32, 1, 1],
            shared as usize,
            &params,
        );
        result.unwrap_or_else(|e| panic!("{e}"));
    }
    let (exact, exact_gates) = exact_gradients(&inputs, &d_out);
    for ((name, &buffer), exact) in names.iter().zip(&gradients).zip(&exact) {
        assert!(gpu.unwritten(buffer).is_empty(), "{name}");
        let got = gpu.download::<bf16>(buffer);
        let error: f64 = got
            .iter()
            .zip(exact)
            .map(|(got, exact)| (got.to_f64() - exact).powi(2))
            .sum();
        let norm: f64 = exact.iter().map(|x| x * x).sum();
        assert!(
            (error / norm).sqrt() < 0.005,
            "{name}: relative error {}",
            (error / norm).sqrt()
        );
    }
    for (got, exact) in gpu.download::<f32>(d_past_gate).iter().zip(exact_gates) {
        assert!(
            (f64::from(*got) - exact).abs() < 0.05,
            "gate: {got}, {exact}"
        );
    }
}
