//! Segment attention on cudarc slices: forward and backward of two segments on a GPU, compared with the CPU.
//!
//! `cargo run --release --features cuda --example attention_slices`

use half::bf16;
use segattn::attention::cuda::slices::{GradientSlices, Input, Output, SavedSlices, Workspace};
use segattn::attention::{Lengths, Problem, View, ViewMut, cpu};
use segattn::cuda::kernels::DriverKernels;

// Two segments of 300 and 211 tokens side by side, 8 query heads on 2 KV heads of 64 elements.
const Q: [usize; 4] = [2, 300, 8, 64];
const KV: [usize; 4] = [2, 300, 2, 64];
const PRIOR: [usize; 4] = [2, 64, 2, 64];

/// The problem on any tensors: heads 0 to 3 read the prior, which only the first segment has.
fn problem<X: Copy>(q: X, kv: X, prior: X) -> Problem<'static, X> {
    const READ: [bool; 8] = [true, true, true, true, false, false, false, false];
    let lengths = Lengths::segment(&[300, 211]).prior(&[64, 0]);
    let causal = Problem::causal(q, kv, kv).lengths(lengths);
    causal.prior(prior, prior, &READ)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let context = match segattn::cuda::open(0) {
        Err(error) if error.is_absent() => {
            println!("nothing to show here: {error}");
            return Ok(());
        }
        context => context?,
    };
    let (kernels, stream) = (DriverKernels::new(&context)?, context.new_stream()?);
    let numbers = |shape: [usize; 4]| -> Vec<bf16> {
        let number = |i| bf16::from_f32((i * 7919 % 251) as f32 / 125.0 - 1.0);
        (0..shape.iter().product()).map(number).collect()
    };
    let host = [Q, KV, PRIOR].map(numbers);
    let upload = |tensor: usize| stream.clone_htod(&host[tensor]);
    let (q, kv, prior) = (upload(0)?, upload(1)?, upload(2)?);
    let (q, kv) = (Input::packed(&q, Q), Input::packed(&kv, KV));
    let on_gpu = problem(q, kv, Input::packed(&prior, PRIOR));

    // Forward. One workspace serves every call of the stream.
    let mut workspace = Workspace::default();
    let zeros = |shape: [usize; 4]| stream.alloc_zeros::<bf16>(shape.iter().product());
    let (mut out, mut lse) = (zeros(Q)?, stream.alloc_zeros::<f32>(2 * 8 * 300)?);
    let mut call = kernels.forward(&stream, &on_gpu, Output::packed(&mut out, Q), &mut lse)?;
    call.run(&mut workspace)?;
    drop(call);

    // Backward, behind it on the stream. The gradient of the output is like q here, and the prior gets none.
    let saved = SavedSlices::new(Input::packed(&out, Q), &lse, q);
    let (mut d_q, mut d_k, mut d_v) = (zeros(Q)?, zeros(KV)?, zeros(KV)?);
    let [d_k, d_v] = [&mut d_k, &mut d_v].map(|gradient| Output::packed(gradient, KV));
    let mut d_past_gate = stream.alloc_zeros::<f32>(2 * 8)?;
    let d_q = Output::packed(&mut d_q, Q);
    let gradients = GradientSlices::new(d_q, d_k, d_v, &mut d_past_gate);
    let mut call = kernels.backward(&stream, &on_gpu, &saved, gradients)?;
    call.run(&mut workspace)?;

    // The forward on the CPU. Reading results back waits for the stream.
    let [q, kv, prior] = host.map(|x| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>());
    let (q, kv) = (View::packed(&q, Q), View::packed(&kv, KV));
    let on_cpu = problem(q, kv, View::packed(&prior, PRIOR));
    let (mut expected, mut lse) = (vec![0.0; q.data.len()], vec![0.0; 2 * 8 * 300]);
    cpu::forward(&on_cpu, ViewMut::packed(&mut expected, Q), &mut lse)?;
    let pairs = stream.clone_dtoh(&out)?.into_iter().zip(expected);
    let largest = pairs.fold(0f32, |most, (a, b)| most.max((a.to_f32() - b).abs()));
    println!("out: at most {largest:.4} away from the CPU's f32");
    (largest < 0.02).then_some(()).ok_or("they differ".into())
}
