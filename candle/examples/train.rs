//! Trains one attention layer to repeat what it has read in the segment before: each sequence is a segment of random
//! tokens, and the same tokens again. Token i + 1 of the first segment is the answer to row i of the second, so
//! gradients must flow through the tail of the first. `cargo run --release --example train [-- --cuda]`

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{AdamW, Embedding, Linear, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use segattn_candle::{Options, segment_attn};

const TOKENS: usize = 16;
const ROWS: usize = 16;
const BATCH: usize = 32;
const HEADS: usize = 2;
const HEAD_DIM: usize = 32;
const WIDTH: usize = HEADS * HEAD_DIM;
const STEPS: usize = 300;

struct Model {
    tokens: Embedding,
    positions: Embedding,
    q: Linear,
    kv: Linear,
    head: Linear,
    dtype: DType,
}

impl Model {
    fn new(weights: VarBuilder, dtype: DType) -> Result<Self> {
        Ok(Model {
            tokens: candle_nn::embedding(TOKENS, WIDTH, weights.pp("tokens"))?,
            positions: candle_nn::embedding(ROWS, WIDTH, weights.pp("positions"))?,
            q: candle_nn::linear_no_bias(WIDTH, WIDTH, weights.pp("q"))?,
            kv: candle_nn::linear_no_bias(WIDTH, 2 * WIDTH, weights.pp("kv"))?,
            head: candle_nn::linear_no_bias(WIDTH, TOKENS, weights.pp("head"))?,
            dtype,
        })
    }

    /// Queries, and keys beside values, of the rows of a segment.
    fn rows(&self, tokens: &Tensor) -> Result<[Tensor; 2]> {
        let positions = Tensor::arange(0, ROWS as u32, tokens.device())?;
        let x = self
            .tokens
            .forward(tokens)?
            .broadcast_add(&self.positions.forward(&positions)?)?;
        let q = self
            .q
            .forward(&x)?
            .reshape((BATCH, ROWS, HEADS, HEAD_DIM))?;
        let kv = self
            .kv
            .forward(&x)?
            .reshape((BATCH, ROWS, 2, HEADS, HEAD_DIM))?;
        Ok([q.to_dtype(self.dtype)?, kv.to_dtype(self.dtype)?])
    }

    /// Scores of the token after each row of the second segment but the last.
    fn forward(&self, tokens: &Tensor, reads_prior: bool) -> Result<Tensor> {
        let [_, tail] = self.rows(tokens)?;
        let [q, kv] = self.rows(tokens)?;
        let options = Options {
            prior_heads: Some(vec![reads_prior; HEADS]),
            ..Options::default()
        };
        let out = segment_attn(&q, &kv, Some(&tail), &options)?.to_dtype(DType::F32)?;
        self.head
            .forward(&out.reshape((BATCH, ROWS, WIDTH))?)?
            .narrow(1, 0, ROWS - 1)
    }
}

/// A model trained for some steps: the share of tokens that it repeats rightly at the end.
fn trained(device: &Device, reads_prior: bool) -> Result<f64> {
    let dtype = if device.is_cuda() {
        DType::BF16
    } else {
        DType::F32
    };
    let variables = VarMap::new();
    let weights = VarBuilder::from_varmap(&variables, DType::F32, device);
    let model = Model::new(weights, dtype)?;
    let settings = ParamsAdamW {
        lr: 3e-3,
        ..ParamsAdamW::default()
    };
    let mut optimizer = AdamW::new(variables.all_vars(), settings)?;
    let mut state = 1u32;
    let mut right = 0.0;
    for step in 0..=STEPS {
        let mut token = || {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 24) % TOKENS as u32
        };
        let tokens: Vec<u32> = (0..BATCH * ROWS).map(|_| token()).collect();
        let tokens = Tensor::from_vec(tokens, (BATCH, ROWS), device)?;
        let scores = model.forward(&tokens, reads_prior)?;
        let answers = tokens.narrow(1, 1, ROWS - 1)?.contiguous()?;
        let loss = candle_nn::loss::cross_entropy(&scores.flatten(0, 1)?, &answers.flatten_all()?)?;
        let guesses = scores.argmax(D::Minus1)?;
        let hits = guesses.eq(&answers)?.to_dtype(DType::F32)?;
        right = f64::from(hits.mean_all()?.to_scalar::<f32>()?);
        if step % 100 == 0 {
            println!(
                "step {step:3}  loss {:.4}  right {right:.3}",
                loss.to_scalar::<f32>()?
            );
        }
        optimizer.backward_step(&loss)?;
    }
    Ok(right)
}

fn main() -> Result<()> {
    let device = match std::env::args().any(|argument| argument == "--cuda") {
        true => Device::new_cuda(0)?,
        false => Device::Cpu,
    };
    println!("heads read the segment before:");
    let with = trained(&device, true)?;
    println!("they do not:");
    let without = trained(&device, false)?;
    match with > 0.95 && without < 0.4 {
        true => Ok(()),
        false => candle_core::bail!(
            "expected above 0.95 with and below 0.4 without the prior, got {with}, {without}"
        ),
    }
}
