//! A problem of segment attention with every kind of source, its launch on the simulated GPU, and its formula.

use std::path::PathBuf;
use std::sync::Arc;

use half::bf16;
use segattn_sim::{Buffer, Gpu, Module, SimError, Source};

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Tensor {
    pub data: usize,
    pub batch_offsets: usize,
    pub strides: [i64; 3],
    pub rows: i64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Problem {
    pub q_k_v_prior_past: [Tensor; 7],
    pub segment_len: usize,
    pub prior_len: usize,
    pub past_len: usize,
    pub query_start: usize,
    pub past_gate: usize,
    pub prior_heads: usize,
    pub past_len_strides: [i32; 2],
    pub batch: i32,
    pub q_heads: i32,
    pub kv_heads: i32,
    pub scale: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct ForwardParams {
    pub problem: Problem,
    pub out: Tensor,
    pub lse: usize,
    pub partial_out: usize,
    pub partial_state: usize,
    pub fold: usize,
    pub next_item: usize,
    pub heads_per_tile: i32,
    pub tiles: i32,
    pub max_items: i32,
}

pub const BATCH: usize = 2;
pub const Q_HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const DIM: usize = 64;
pub const ROWS: usize = 150;
pub const PRIOR: usize = 40;
pub const PAST: usize = 70;
pub const SEGMENT_LEN: [i32; BATCH] = [150, 97];
pub const PRIOR_LEN: [i32; BATCH] = [40, 0];
pub const SCALE: f64 = 0.125;
pub const PAST_LEN: [i32; BATCH] = [70, 33];
pub const GATES: [f32; Q_HEADS] = [0.0, 0.5, 1.0, 0.25];
pub const PRIOR_HEADS: [u8; Q_HEADS] = [1, 1, 0, 1];

pub struct Inputs {
    pub q: Vec<bf16>,
    /// k and v of the past, the prior and the current rows.
    pub sources: [[Vec<bf16>; 2]; 3],
}

pub fn values(rows: usize, heads: usize, salt: u64) -> Vec<bf16> {
    let mut state = salt;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        bf16::from_f32((state >> 40) as f32 / (1u64 << 24) as f32 * 3.0 - 1.4)
    };
    (0..BATCH * rows * heads * DIM).map(|_| next()).collect()
}

pub fn inputs() -> Inputs {
    let source = |rows, salt| {
        [
            values(rows, KV_HEADS, salt),
            values(rows, KV_HEADS, salt + 1),
        ]
    };
    Inputs {
        q: values(ROWS, Q_HEADS, 1),
        sources: [source(PAST, 2), source(PRIOR, 4), source(ROWS, 6)],
    }
}

pub fn tensor(buffer: Buffer, rows: usize, heads: usize) -> Tensor {
    let row = heads * DIM;
    let strides = [(rows * row) as i64, row as i64, DIM as i64];
    Tensor {
        data: buffer.address(),
        batch_offsets: 0,
        strides,
        rows: rows as i64,
    }
}

/// A compiled file of `kernels/`.
pub fn module(file: &str) -> Arc<Module> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../kernels")
        .join(file);
    Module::compile(&Source::new(path)).unwrap_or_else(|e| panic!("{e}"))
}

/// Uploads the inputs.
fn problem(gpu: &mut Gpu, inputs: &Inputs) -> Result<Problem, SimError> {
    let mut upload =
        |name: &str, rows: usize, heads: usize, data: &[bf16]| -> Result<Tensor, SimError> {
            Ok(tensor(gpu.input(name, data)?, rows, heads))
        };
    let [[past_k, past_v], [prior_k, prior_v], [k, v]] = &inputs.sources;
    let tensors = [
        upload("q", ROWS, Q_HEADS, &inputs.q)?,
        upload("k", ROWS, KV_HEADS, k)?,
        upload("v", ROWS, KV_HEADS, v)?,
        upload("prior_k", PRIOR, KV_HEADS, prior_k)?,
        upload("prior_v", PRIOR, KV_HEADS, prior_v)?,
        upload("past_k", PAST, KV_HEADS, past_k)?,
        upload("past_v", PAST, KV_HEADS, past_v)?,
    ];
    Ok(Problem {
        q_k_v_prior_past: tensors,
        segment_len: gpu.input("segment_len", &SEGMENT_LEN)?.address(),
        prior_len: gpu.input("prior_len", &PRIOR_LEN)?.address(),
        past_len: gpu.input("past_len", &PAST_LEN)?.address(),
        query_start: 0,
        past_gate: gpu.input("past_gate", &GATES)?.address(),
        prior_heads: gpu.input("prior_heads", &PRIOR_HEADS)?.address(),
        past_len_strides: [1, 0],
        batch: BATCH as i32,
        q_heads: Q_HEADS as i32,
        kv_heads: KV_HEADS as i32,
        scale: SCALE as f32,
    })
}

/// What the forward kernel was given and wrote.
pub struct Forward {
    pub problem: Problem,
    pub out: Buffer,
    pub lse: Buffer,
}

/// Launches the forward kernel.
pub fn forward(gpu: &mut Gpu, module: &Arc<Module>, inputs: &Inputs) -> Result<Forward, SimError> {
    // threads, shared bytes, blocks, rows and keys of a tile, keys of an item, bytes of the parameters
    let info: [i32; 7] = module
        .constant("attention_prefill_bf16_d64_info")
        .expect("info");
    assert_eq!(info[6] as usize, size_of::<ForwardParams>());
    let problem = problem(gpu, inputs)?;
    let blocks = 3;
    let out = gpu.alloc("out", BATCH * ROWS * Q_HEADS * DIM * 2)?;
    let lse = gpu.alloc("lse", BATCH * ROWS * Q_HEADS * 4)?;
    let params = ForwardParams {
        problem,
        out: tensor(out, ROWS, Q_HEADS),
        lse: lse.address(),
        partial_out: 0,
        partial_state: 0,
        fold: gpu
            .alloc("fold", blocks * DIM * info[3] as usize * 4)?
            .address(),
        next_item: gpu.upload("next_item", &[0u32])?.address(),
        heads_per_tile: 1,
        tiles: ROWS.div_ceil(info[3] as usize) as i32,
        max_items: 1,
    };
    let kernel = module.kernel("attention_prefill_bf16_d64").expect("kernel");
    let (threads, shared) = (info[0] as u32, info[1] as usize);
    gpu.launch(
        &kernel,
        [blocks as u32, 1, 1],
        [threads, 1, 1],
        shared,
        &params,
    )?;
    assert!(gpu.unwritten(out).is_empty() && gpu.unwritten(lse).is_empty());
    Ok(Forward { problem, out, lse })
}

/// The formula for one row: its output and lse.
pub fn exact(inputs: &Inputs, entry: usize, row: usize, head: usize) -> ([f64; DIM], f64) {
    let kv = head / (Q_HEADS / KV_HEADS);
    let q = &inputs.q[((entry * ROWS + row) * Q_HEADS + head) * DIM..][..DIM];
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
    let (mut sum, mut out) = (0.0, [0.0; DIM]);
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
            let at = ((entry * rows + key) * KV_HEADS + kv) * DIM;
            let [k, v] = inputs.sources[source]
                .each_ref()
                .map(|tensor| &tensor[at..at + DIM]);
            let score: f64 = q.iter().zip(k).map(|(a, b)| a.to_f64() * b.to_f64()).sum();
            let weight = gate * (score * SCALE).exp();
            sum += weight;
            out.iter_mut()
                .zip(v)
                .for_each(|(o, v)| *o += weight * v.to_f64());
        }
    }
    (out.map(|o| o / sum), sum.ln())
}
