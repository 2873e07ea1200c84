//! Segment attention on cudarc slices: forward and backward of two segments on a GPU, compared with the CPU.
//!
//! `cargo run --release --features cuda --example attention_slices`

use half::bf16;
use segattn::attention::cuda::slices::{GradientSlices, Input, Output, SavedSlices, Workspace};
use segattn::attention::cuda::{Dtype, Gates, Lengths, Problem};
use segattn::attention::{self, PastLen, View, ViewMut, cpu};
use segattn::cuda::kernels::DriverKernels;

// Two segments side by side, 8 query heads on 2 KV heads. Heads 0..4 read the prior, 4..8 the past.
const BATCH: usize = 2;
const ROWS: usize = 300;
const PRIOR: usize = 64;
const PAST: usize = 500;
const Q_HEADS: usize = 8;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;

type Error = Box<dyn std::error::Error>;

/// Numbers that a bf16 holds, from -1 to 1.
fn numbers(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bf16::from_f32((state >> 8) as f32 / 8_388_608.0 - 1.0).to_f32()
    };
    (0..len).map(|_| next()).collect()
}

fn main() -> Result<(), Error> {
    let context = match segattn::cuda::open(0) {
        Ok(context) => context,
        Err(error) if error.is_absent() => {
            println!("nothing to show here: {error}");
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    let kernels = DriverKernels::new(&context)?;
    let stream = context.new_stream()?;

    let shape = |rows, heads| [BATCH, rows, heads, HEAD_DIM];
    let (q_shape, kv_shape) = (shape(ROWS, Q_HEADS), shape(ROWS, KV_HEADS));
    let (prior_shape, past_shape) = (shape(PRIOR, KV_HEADS), shape(PAST, KV_HEADS));
    let host: Vec<Vec<f32>> = [
        q_shape,
        kv_shape,
        kv_shape,
        prior_shape,
        prior_shape,
        past_shape,
        past_shape,
        q_shape,
    ]
    .iter()
    .zip(1..)
    .map(|(shape, seed)| numbers(shape.iter().product(), seed))
    .collect();
    let device = host
        .iter()
        .map(|x| stream.clone_htod(&x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>()))
        .collect::<Result<Vec<_>, _>>()?;
    let [q, k, v, prior_k, prior_v, past_k, past_v, d_out] = &device[..] else {
        unreachable!("eight tensors")
    };

    let past_gate = [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.5];
    let prior_heads = [true, true, true, true, false, false, false, false];
    let (segment_len, prior_len, past_len) = ([300, 211], [64, 0], [500, 37]);
    let problem = Problem {
        dtype: Dtype::Bf16,
        batch: BATCH,
        q_heads: Q_HEADS,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        q: Input::packed(q, q_shape),
        k: Input::packed(k, kv_shape),
        v: Input::packed(v, kv_shape),
        prior_k: Input::packed(prior_k, prior_shape),
        prior_v: Input::packed(prior_v, prior_shape),
        past_k: Input::packed(past_k, past_shape),
        past_v: Input::packed(past_v, past_shape),
        lengths: Lengths::Host {
            segment_len: &segment_len,
            prior_len: &prior_len,
            past_len: PastLen::PerBatch(&past_len),
            query_start: None,
        },
        past_gate: Gates::Host(&past_gate),
        prior_heads: &prior_heads,
        scale: None,
    };

    // Forward. One workspace serves every call of the stream; asking first is only for those who plan their memory.
    let mut workspace = Workspace::default();
    let zeros = |shape: [usize; 4]| stream.alloc_zeros::<bf16>(shape.iter().product());
    let mut out = zeros(q_shape)?;
    let mut lse = stream.alloc_zeros::<f32>(BATCH * Q_HEADS * ROWS)?;
    {
        let written = Output::packed(&mut out, q_shape);
        let mut call = kernels.forward(&stream, &problem, written, &mut lse, None)?;
        println!("forward: {} bytes of workspace", call.workspace_bytes());
        call.run(&mut workspace)?;
    }

    // Backward, behind it on the stream.
    let (mut d_q, mut d_k, mut d_v) = (zeros(q_shape)?, zeros(kv_shape)?, zeros(kv_shape)?);
    let (mut d_prior_k, mut d_prior_v) = (zeros(prior_shape)?, zeros(prior_shape)?);
    let mut d_past_gate = stream.alloc_zeros::<f32>(BATCH * Q_HEADS)?;
    {
        let saved = SavedSlices {
            out: Input::packed(&out, q_shape),
            lse: &lse,
            d_out: Input::packed(d_out, q_shape),
            d_lse: None,
        };
        let gradients = GradientSlices {
            d_q: Output::packed(&mut d_q, q_shape),
            d_k: Output::packed(&mut d_k, kv_shape),
            d_v: Output::packed(&mut d_v, kv_shape),
            d_prior: Some((
                Output::packed(&mut d_prior_k, prior_shape),
                Output::packed(&mut d_prior_v, prior_shape),
            )),
            d_past_gate: &mut d_past_gate,
        };
        let mut call = kernels.backward(&stream, &problem, &saved, gradients)?;
        println!("backward: {} bytes of workspace", call.workspace_bytes());
        call.run(&mut workspace)?;
    }

    // The same on the CPU. Reading results back waits for the stream.
    let view = |i: usize, shape| View::packed(&host[i][..], shape);
    let on_cpu = attention::Problem {
        batch: BATCH,
        q_heads: Q_HEADS,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        q: view(0, q_shape),
        k: view(1, kv_shape),
        v: view(2, kv_shape),
        prior_k: view(3, prior_shape),
        prior_v: view(4, prior_shape),
        past_k: view(5, past_shape),
        past_v: view(6, past_shape),
        segment_len: &segment_len,
        prior_len: &prior_len,
        past_len: PastLen::PerBatch(&past_len),
        query_start: None,
        past_gate: &past_gate,
        prior_heads: &prior_heads,
        scale: None,
    };
    let (mut cpu_out, mut cpu_lse) = (vec![0.0; host[0].len()], vec![0.0; lse.len()]);
    cpu::forward(
        &on_cpu,
        ViewMut::packed(&mut cpu_out, q_shape),
        &mut cpu_lse,
    )?;
    let gpu_out = stream.clone_dtoh(&out)?;
    let differences = gpu_out.iter().zip(&cpu_out);
    let largest = differences.fold(0.0f32, |m, (a, b)| m.max((a.to_f32() - b).abs()));
    println!("out: at most {largest:.4} away from the CPU's f32");
    let gates: f32 = stream.clone_dtoh(&d_past_gate)?.iter().sum();
    println!("gradient of the gates, summed: {gates:.4}");
    match largest < 0.02 {
        true => Ok(()),
        false => Err("GPU and CPU differ".into()),
    }
}
