//! The operation on the CPU: against plain candle operations, and gradients against finite differences in f64.

mod numbers;

use candle_core::{DType, Device, Result, Tensor, Var};
use numbers::numbers;
use segattn_candle::{Options, Past, segment_attn};

const BATCH: usize = 2;
const ROWS: usize = 5;
const PRIOR: usize = 3;
const PAST: usize = 4;
const Q_HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 8;

/// q, kv, prior_kv.
fn inputs() -> Result<[Tensor; 3]> {
    Ok([
        numbers(&[BATCH, ROWS, Q_HEADS, HEAD_DIM], 1)?,
        numbers(&[BATCH, ROWS, 2, KV_HEADS, HEAD_DIM], 2)?,
        numbers(&[BATCH, PRIOR, 2, KV_HEADS, HEAD_DIM], 3)?,
    ])
}

/// Heads of every role, a gated past with sinks, and padding rows.
fn options() -> Result<Options> {
    Ok(Options {
        prior_heads: Some(vec![true, false, true, false]),
        past: Some(Past {
            kv: numbers(&[BATCH, PAST, 2, KV_HEADS, HEAD_DIM], 4)?,
            gate: Some(vec![1.0, 0.5, 0.0, 2.0]),
            len: Some(vec![4, 2]),
            sink_len: Some(vec![1, 0]),
        }),
        segment_len: Some(vec![5, 3]),
        prior_len: Some(vec![3, 1]),
        ..Options::default()
    })
}

/// A number that depends on every element of the result.
fn loss([q, kv, prior_kv]: [&Tensor; 3], options: &Options) -> Result<Tensor> {
    let out = segment_attn(q, kv, Some(prior_kv), options)?;
    let weights = numbers(out.dims(), 9)?.to_dtype(out.dtype())?;
    (out * weights)?.sum_all()
}

#[test]
fn gradients_are_finite_differences() -> Result<()> {
    const STEP: f64 = 1e-5;
    let options = options()?;
    let inputs = inputs()?;
    let vars = [0, 1, 2].map(|i: usize| Var::from_tensor(&inputs[i]).expect("a variable"));
    let gradients = loss([0, 1, 2].map(|i: usize| vars[i].as_tensor()), &options)?.backward()?;
    let mut compared = 0;
    for (which, var) in vars.iter().enumerate() {
        let gradient = gradients
            .get(var)
            .expect("a gradient")
            .flatten_all()?
            .to_vec1::<f64>()?;
        let data = inputs[which].flatten_all()?.to_vec1::<f64>()?;
        for element in (0..data.len()).step_by(7) {
            let at = |step: f64| -> Result<f64> {
                let mut moved = data.clone();
                moved[element] += step;
                let moved = Tensor::from_vec(moved, inputs[which].dims(), &Device::Cpu)?;
                let given = [0, 1, 2].map(|i| if i == which { &moved } else { &inputs[i] });
                loss(given, &options)?.to_scalar::<f64>()
            };
            let expected = (at(STEP)? - at(-STEP)?) / (2.0 * STEP);
            let got = gradient[element];
            assert!(
                (expected - got).abs() < 1e-8,
                "input {which}[{element}]: {expected}, got {got}"
            );
            compared += 1;
        }
    }
    assert!(compared > 80, "{compared}");
    Ok(())
}

#[test]
fn f32_is_close_to_f64() -> Result<()> {
    let options = options()?;
    let mut single = options.clone();
    let past = single.past.as_mut().expect("a past");
    past.kv = past.kv.to_dtype(DType::F32)?;
    let exact = inputs()?.map(|x| Var::from_tensor(&x).expect("a variable"));
    let inexact = inputs()?
        .map(|x| Var::from_tensor(&x.to_dtype(DType::F32).expect("f32")).expect("a variable"));
    let gradients = [
        loss([0, 1, 2].map(|i: usize| exact[i].as_tensor()), &options)?.backward()?,
        loss([0, 1, 2].map(|i: usize| inexact[i].as_tensor()), &single)?.backward()?,
    ];
    for (exact, inexact) in exact.iter().zip(&inexact) {
        let expected = gradients[0].get(exact).expect("a gradient");
        let got = gradients[1]
            .get(inexact)
            .expect("a gradient")
            .to_dtype(DType::F64)?;
        let worst = (expected - got)?.abs()?.max_all()?.to_scalar::<f64>()?;
        assert!(worst < 1e-5, "{worst}");
    }
    Ok(())
}

/// Attention of one head over keys in front and the segment itself, in candle's own operations.
fn plain(q: &Tensor, kv: &Tensor, prior_kv: &Tensor, head: usize) -> Result<Tensor> {
    let group = Q_HEADS / KV_HEADS;
    let of = |which: usize| -> Result<Tensor> {
        let rows = Tensor::cat(&[prior_kv, kv], 1)?;
        rows.narrow(2, which, 1)?
            .squeeze(2)?
            .narrow(2, head / group, 1)?
            .squeeze(2)
    };
    let q = q.narrow(2, head, 1)?.squeeze(2)?;
    let scores = (q.matmul(&of(0)?.t()?)? / (HEAD_DIM as f64).sqrt())?;
    let hidden: Vec<f64> = (0..ROWS)
        .flat_map(|i| {
            (0..PRIOR + ROWS).map(move |j| {
                if j > PRIOR + i {
                    f64::NEG_INFINITY
                } else {
                    0.0
                }
            })
        })
        .collect();
    let mask = Tensor::from_vec(hidden, (ROWS, PRIOR + ROWS), &Device::Cpu)?;
    let weights = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, 2)?;
    weights.matmul(&of(1)?)
}

#[test]
fn the_result_is_that_of_plain_operations() -> Result<()> {
    let [q, kv, prior_kv] = inputs()?;
    let out = segment_attn(&q, &kv, Some(&prior_kv), &Options::default())?;
    for head in 0..Q_HEADS {
        let expected = plain(&q, &kv, &prior_kv, head)?;
        let got = out.narrow(2, head, 1)?.squeeze(2)?;
        let worst = (expected - got)?.abs()?.max_all()?.to_scalar::<f64>()?;
        assert!(worst < 1e-12, "head {head}: {worst}");
    }
    Ok(())
}

/// Two segments: the second reads the tail of the first, through which its loss reaches the first one's keys.
#[test]
fn gradients_reach_the_segment_before_through_its_tail() -> Result<()> {
    let [q, kv, _] = inputs()?;
    let (first, second) = (Var::from_tensor(&kv)?, kv.affine(0.5, 0.1)?);
    let tail = first.narrow(1, ROWS - PRIOR, PRIOR)?;
    let out = segment_attn(&q, &second, Some(&tail), &Options::default())?;
    let gradients = out.sqr()?.sum_all()?.backward()?;
    let gradient = gradients.get(&first).expect("a gradient");
    let size = |from, rows| {
        gradient
            .narrow(1, from, rows)?
            .sqr()?
            .sum_all()?
            .to_scalar::<f64>()
    };
    assert_eq!(size(0, ROWS - PRIOR)?, 0.0);
    assert!(size(ROWS - PRIOR, PRIOR)? > 1e-3);
    Ok(())
}

/// Tensors of other strides, and no prior.
#[test]
fn views_give_the_bits_of_their_copies() -> Result<()> {
    let [q, kv, _] = inputs()?;
    let [q, kv] = [q.to_dtype(DType::F32)?, kv.to_dtype(DType::F32)?];
    let expected = segment_attn(&q, &kv, None, &Options::default())?;
    let turned = q.transpose(1, 2)?.contiguous()?.transpose(1, 2)?;
    let longer = Tensor::cat(&[&kv, &kv], 1)?;
    let got = segment_attn(
        &turned,
        &longer.narrow(1, ROWS, ROWS)?,
        None,
        &Options::default(),
    )?;
    let bits = |x: &Tensor| -> Result<Vec<u32>> {
        Ok(x.flatten_all()?
            .to_vec1::<f32>()?
            .iter()
            .map(|x| x.to_bits())
            .collect())
    };
    assert_eq!(bits(&expected)?, bits(&got)?);
    Ok(())
}

#[test]
fn wrong_arguments_are_refused_with_what_was_expected() -> Result<()> {
    let [q, kv, prior_kv] = inputs()?;
    let refused = |q: &Tensor, kv: &Tensor, options: &Options, text: &str| {
        let error = segment_attn(q, kv, Some(&prior_kv), options)
            .expect_err("refused")
            .to_string();
        assert!(error.contains(text), "{error}");
    };
    let default = Options::default();
    refused(
        &q,
        &q,
        &default,
        "kv: expected [batch, rows, 2, kv_heads, head_dim], got [2, 5, 4, 8]",
    );
    refused(
        &q.narrow(2, 0, 3)?,
        &kv,
        &default,
        "q_heads: expected a positive multiple of kv_heads = 2, got 3",
    );
    refused(
        &q,
        &kv.to_dtype(DType::F32)?,
        &default,
        "kv: expected F64 like q, got F32",
    );
    refused(
        &q.to_dtype(DType::BF16)?,
        &kv,
        &default,
        "q: supported are f32 and f64 on the CPU, got BF16",
    );
    let short = Options {
        segment_len: Some(vec![5, 6]),
        ..Options::default()
    };
    refused(
        &q,
        &kv,
        &short,
        "segment_len[1]: expected 0 to 5 rows, got 6",
    );
    let heads = Options {
        prior_heads: Some(vec![true]),
        ..Options::default()
    };
    refused(
        &q,
        &kv,
        &heads,
        "prior_heads: expected q_heads = 4 elements, got 1",
    );
    Ok(())
}
