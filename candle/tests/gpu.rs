//! The operation on a GPU: against f64 on the CPU with the same rounded numbers, and by bits. Where there is no GPU
//! every test says so and passes, unless `SEGATTN_REQUIRE_GPU` is set.
#![cfg(feature = "cuda")]

mod numbers;

use std::io::Write;

use candle_core::{DType, Device, Result, Tensor, Var};
use numbers::numbers;
use segattn_candle::{Options, Past, segment_attn};

const BATCH: usize = 2;
const ROWS: usize = 150;
const PRIOR: usize = 40;
const PAST: usize = 70;
const Q_HEADS: usize = 4;
const KV_HEADS: usize = 2;

/// GPU 0, with a stream of its own, as a program that uses candle has it.
fn gpu() -> Result<Option<Device>> {
    match Device::new_cuda_with_stream(0) {
        Ok(device) => Ok(Some(device)),
        Err(error) if std::env::var_os("SEGATTN_REQUIRE_GPU").is_some() => Err(error),
        Err(error) => {
            // Not by a macro, whose output the test harness keeps to itself.
            writeln!(std::io::stderr(), "SKIPPED, no kernel runs here: {error}")?;
            Ok(None)
        }
    }
}

/// q, kv, prior_kv on the CPU in f64, rounded to `dtype`.
fn inputs(dtype: DType, head_dim: usize) -> Result<[Tensor; 3]> {
    let rounded =
        |shape: &[usize], seed| numbers(shape, seed)?.to_dtype(dtype)?.to_dtype(DType::F64);
    Ok([
        rounded(&[BATCH, ROWS, Q_HEADS, head_dim], 1)?,
        rounded(&[BATCH, ROWS, 2, KV_HEADS, head_dim], 2)?,
        rounded(&[BATCH, PRIOR, 2, KV_HEADS, head_dim], 3)?,
    ])
}

/// Heads of every role, a gated past with sinks, and padding rows; the past is in f64 on the CPU.
fn options(dtype: DType, head_dim: usize) -> Result<Options> {
    let past = numbers(&[BATCH, PAST, 2, KV_HEADS, head_dim], 4)?;
    Ok(Options {
        prior_heads: Some(vec![true, false, true, false]),
        past: Some(Past {
            kv: past.to_dtype(dtype)?.to_dtype(DType::F64)?,
            gate: Some(vec![1.0, 0.5, 0.0, 2.0]),
            len: Some(vec![PAST as i32, 33]),
            sink_len: Some(vec![3, 0]),
        }),
        segment_len: Some(vec![ROWS as i32, 101]),
        prior_len: Some(vec![PRIOR as i32, 7]),
        ..Options::default()
    })
}

/// The result and the gradients of q, kv and prior_kv, for a gradient of the result that looks random.
fn both_passes(inputs: &[Tensor; 3], options: &Options) -> Result<[Tensor; 4]> {
    let vars = [0, 1, 2].map(|i: usize| Var::from_tensor(&inputs[i]).expect("a variable"));
    let out = segment_attn(&vars[0], &vars[1], Some(&vars[2]), options)?;
    let weights = numbers(out.dims(), 9)?;
    let weights = weights.to_dtype(DType::BF16)?;
    let weights = weights.to_device(out.device())?.to_dtype(out.dtype())?;
    let gradients = (&out * weights)?.sum_all()?.backward()?;
    let [d_q, d_kv, d_prior] =
        [0, 1, 2].map(|i: usize| gradients.get(&vars[i]).expect("a gradient").clone());
    Ok([out, d_q, d_kv, d_prior])
}

fn moved(x: &Tensor, dtype: DType, device: &Device) -> Result<Tensor> {
    x.to_dtype(dtype)?.to_device(device)
}

/// The same arguments on the GPU.
fn on_gpu(
    inputs: &[Tensor; 3],
    options: &Options,
    dtype: DType,
    device: &Device,
) -> Result<([Tensor; 3], Options)> {
    let [q, kv, prior_kv] = inputs;
    let mut options = options.clone();
    if let Some(past) = &mut options.past {
        past.kv = moved(&past.kv, dtype, device)?;
    }
    Ok((
        [
            moved(q, dtype, device)?,
            moved(kv, dtype, device)?,
            moved(prior_kv, dtype, device)?,
        ],
        options,
    ))
}

fn norm(x: &Tensor) -> Result<f64> {
    Ok(x.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt())
}

#[test]
fn results_and_gradients_are_near_f64() -> Result<()> {
    let Some(device) = gpu()? else {
        return Ok(());
    };
    // Relative to the norm: results, probabilities and their gradients are rounded to 8 bits (bf16) or 11 (f16).
    for (dtype, bound) in [(DType::BF16, 1e-2), (DType::F16, 2e-3)] {
        for head_dim in [64, 128] {
            let (inputs, options) = (inputs(dtype, head_dim)?, options(dtype, head_dim)?);
            let expected = both_passes(&inputs, &options)?;
            let (inputs, options) = on_gpu(&inputs, &options, dtype, &device)?;
            let got = both_passes(&inputs, &options)?;
            for (name, (expected, got)) in ["out", "d_q", "d_kv", "d_prior_kv"]
                .iter()
                .zip(expected.iter().zip(&got))
            {
                assert_eq!(got.dtype(), dtype);
                let got = moved(&got.to_dtype(DType::F32)?, DType::F64, &Device::Cpu)?;
                let wrong = norm(&(expected - got)?)? / norm(expected)?;
                assert!(wrong < bound, "{dtype:?}, {head_dim}, {name}: {wrong}");
            }
        }
    }
    Ok(())
}

fn bits(x: &Tensor) -> Result<Vec<u32>> {
    let x = x.flatten_all()?.to_dtype(DType::F32)?;
    Ok(x.to_vec1::<f32>()?.iter().map(|x| x.to_bits()).collect())
}

#[test]
fn repeated_calls_and_views_have_equal_bits() -> Result<()> {
    let Some(device) = gpu()? else {
        return Ok(());
    };
    let dtype = DType::BF16;
    let (inputs, options) = (inputs(dtype, 64)?, options(dtype, 64)?);
    let (inputs, options) = on_gpu(&inputs, &options, dtype, &device)?;
    let first = both_passes(&inputs, &options)?;
    let [q, kv, prior_kv] = &inputs;
    let turned = q.transpose(1, 2)?.contiguous()?.transpose(1, 2)?;
    let longer = Tensor::cat(&[kv, kv], 1)?;
    let views = [turned, longer.narrow(1, ROWS, ROWS)?, prior_kv.clone()];
    for (i, inputs) in [&inputs, &inputs, &views].into_iter().enumerate() {
        let again = both_passes(inputs, &options)?;
        for (first, again) in first.iter().zip(&again) {
            assert_eq!(bits(first)?, bits(again)?, "run {i}");
        }
    }
    Ok(())
}

#[test]
fn what_the_gpu_has_not_is_refused() -> Result<()> {
    let Some(device) = gpu()? else {
        return Ok(());
    };
    let [q, kv, prior_kv] = inputs(DType::BF16, 64)?;
    let refused = |q: &Tensor, kv: &Tensor, prior_kv: &Tensor, text: &str| {
        let error = segment_attn(q, kv, Some(prior_kv), &Options::default())
            .expect_err("refused")
            .to_string();
        assert!(error.contains(text), "{error}");
    };
    let here = |x: &Tensor, dtype| moved(x, dtype, &device);
    let [q32, kv32, prior32] = [
        here(&q, DType::F32)?,
        here(&kv, DType::F32)?,
        here(&prior_kv, DType::F32)?,
    ];
    refused(
        &q32,
        &kv32,
        &prior32,
        "q: supported are bf16 and f16 on CUDA, got F32",
    );
    let [q, kv, prior_kv] = [
        here(&q, DType::BF16)?,
        here(&kv, DType::F16)?,
        here(&prior_kv, DType::BF16)?,
    ];
    refused(&q, &kv, &prior_kv, "dtype");
    Ok(())
}
