//! `segattn op`: the operation on tensors in a safetensors file, for comparison with other programs.

#[cfg(feature = "cuda")]
mod cuda;

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use segattn::attention::{Grads, PastLen, Problem, View, ViewMut, cpu, reference};

use super::files::write_atomically;

/// The case holds q k v prior_k prior_v past_k past_v d_out and past_gate (F32), prior_heads (U8),
/// segment_len prior_len past_len (I32), optionally d_lse (F32) and the metadata key `scale`. A
/// source of zero rows is a tensor with a zero in its shape. The result holds out lse d_q d_k d_v
/// d_prior_k d_prior_v d_past_gate (F32).
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Tensors of the case, safetensors
    #[arg(long, value_name = "FILE")]
    case: PathBuf,
    /// Where the results go, safetensors
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// What computes it
    #[arg(long, value_enum, default_value_t = OpDevice::Cpu)]
    device: OpDevice,
    /// What `--device cuda` rounds tensors to; it sums in f32
    #[cfg(feature = "cuda")]
    #[arg(long, value_enum, default_value_t = cuda::OpDtype::Bf16)]
    dtype: cuda::OpDtype,
}

/// Devices of the operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OpDevice {
    /// f32, all cores
    Cpu,
    /// f64, one thread, written for reading
    Reference,
    /// The first NVIDIA GPU, 16 bits; in a build with the feature `cuda`
    Cuda,
}

/// A case as it lies in the file.
struct Case {
    /// batch, segment, q_heads, head_dim
    q_shape: [usize; 4],
    kv_heads: usize,
    prior: usize,
    past: usize,
    floats: Vec<(&'static str, Vec<f32>)>,
    d_lse: Option<Vec<f32>>,
    past_gate: Vec<f32>,
    prior_heads: Vec<bool>,
    segment_len: Vec<i32>,
    prior_len: Vec<i32>,
    past_len: Vec<i32>,
    scale: Option<f32>,
}

/// Names of the result, in order.
const RESULTS: [&str; 8] = [
    "out",
    "lse",
    "d_q",
    "d_k",
    "d_v",
    "d_prior_k",
    "d_prior_v",
    "d_past_gate",
];

pub fn run(args: &Args) -> Result<()> {
    let bytes = std::fs::read(&args.case)
        .with_context(|| format!("cannot read {}", args.case.display()))?;
    let case = Case::read(&bytes).with_context(|| args.case.display().to_string())?;
    let results = match args.device {
        OpDevice::Cpu => case.compute::<f32>()?,
        OpDevice::Reference => case.compute::<f64>()?,
        #[cfg(feature = "cuda")]
        OpDevice::Cuda => cuda::compute(&case, args.dtype)?,
        #[cfg(not(feature = "cuda"))]
        OpDevice::Cuda => bail!(
            "this segattn was built without GPU kernels: build it with --features cuda (needs nvcc, see the README)"
        ),
    };
    let shapes = case.result_shapes();
    let views = RESULTS
        .iter()
        .zip(&shapes)
        .zip(&results)
        .map(|((name, shape), data)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytemuck::cast_slice(data))?;
            Ok((*name, view))
        });
    let views = views.collect::<Result<Vec<_>>>()?;
    write_atomically(&args.out, &safetensors::serialize(views, None)?)
}

impl Case {
    fn read(bytes: &[u8]) -> Result<Self> {
        let (_, metadata) = SafeTensors::read_metadata(bytes)?;
        let scale =
            match metadata.metadata().as_ref().and_then(|m| m.get("scale")) {
                Some(text) => Some(text.parse().with_context(|| {
                    format!("metadata `scale`: expected a number, got {text:?}")
                })?),
                None => None,
            };
        let file = SafeTensors::deserialize(bytes)?;
        let q_shape = four(&file, "q")?;
        let [batch, segment, q_heads, dim] = q_shape;
        let [.., kv_heads, _] = four(&file, "k")?;
        let rows = |name| Ok::<_, anyhow::Error>(four(&file, name)?[1]);
        let (prior, past) = (rows("prior_k")?, rows("past_k")?);
        let kv = |rows| vec![batch, rows, kv_heads, dim];
        let expected = [
            ("q", q_shape.to_vec()),
            ("k", kv(segment)),
            ("v", kv(segment)),
            ("prior_k", kv(prior)),
            ("prior_v", kv(prior)),
            ("past_k", kv(past)),
            ("past_v", kv(past)),
            ("d_out", q_shape.to_vec()),
        ];
        let floats = expected
            .iter()
            .map(|(name, shape)| Ok((*name, f32s(&file, name, shape)?)))
            .collect::<Result<_>>()?;
        let d_lse = file.tensor("d_lse").is_ok();
        let d_lse = d_lse.then(|| f32s(&file, "d_lse", &[batch, q_heads, segment]));
        let i32s = |name| -> Result<Vec<i32>> {
            let data = tensor(&file, name, Dtype::I32, &[batch])?;
            Ok(bytemuck::allocation::pod_collect_to_vec(data.data()))
        };
        Ok(Self {
            q_shape,
            kv_heads,
            prior,
            past,
            floats,
            d_lse: d_lse.transpose()?,
            past_gate: f32s(&file, "past_gate", &[q_heads])?,
            prior_heads: flags(&file, q_heads)?,
            segment_len: i32s("segment_len")?,
            prior_len: i32s("prior_len")?,
            past_len: i32s("past_len")?,
            scale,
        })
    }

    /// Shapes of the results, in the order of [`RESULTS`].
    fn result_shapes(&self) -> Vec<Vec<usize>> {
        let [batch, segment, q_heads, dim] = self.q_shape;
        let kv = |rows| vec![batch, rows, self.kv_heads, dim];
        vec![
            self.q_shape.to_vec(),
            vec![batch, q_heads, segment],
            self.q_shape.to_vec(),
            kv(segment),
            kv(segment),
            kv(self.prior),
            kv(self.prior),
            vec![q_heads],
        ]
    }

    /// Forward and backward in `T`; results as f32 in the order of [`RESULTS`].
    fn compute<T: Number>(&self) -> Result<Vec<Vec<f32>>> {
        let [batch, segment, q_heads, head_dim] = self.q_shape;
        let inputs: Vec<Vec<T>> = self
            .floats
            .iter()
            .map(|(_, data)| T::from_f32(data))
            .collect();
        let input = |name: &str| {
            let i = self
                .floats
                .iter()
                .position(|(n, _)| *n == name)
                .unwrap_or(0);
            &inputs[i][..]
        };
        let kv = |name, rows| View::packed(input(name), [batch, rows, self.kv_heads, head_dim]);
        let problem = Problem {
            batch,
            q_heads,
            kv_heads: self.kv_heads,
            head_dim,
            q: View::packed(input("q"), self.q_shape),
            k: kv("k", segment),
            v: kv("v", segment),
            prior_k: kv("prior_k", self.prior),
            prior_v: kv("prior_v", self.prior),
            past_k: kv("past_k", self.past),
            past_v: kv("past_v", self.past),
            segment_len: &self.segment_len,
            prior_len: &self.prior_len,
            past_len: PastLen::PerBatch(&self.past_len),
            query_start: None,
            past_gate: &self.past_gate,
            prior_heads: &self.prior_heads,
            scale: self.scale,
        };
        let mut results: Vec<Vec<T>> = self
            .result_shapes()
            .iter()
            .map(|shape| vec![T::default(); shape.iter().product()])
            .collect();
        let [out, lse, d_q, d_k, d_v, d_prior_k, d_prior_v, d_past_gate] = &mut results[..] else {
            bail!("eight results");
        };
        T::forward(&problem, ViewMut::packed(out, self.q_shape), lse)?;
        let kv_shape = |rows| [batch, rows, self.kv_heads, head_dim];
        let mut gates = vec![T::default(); batch * q_heads];
        let grads = Grads {
            d_q: ViewMut::packed(d_q, self.q_shape),
            d_k: ViewMut::packed(d_k, kv_shape(segment)),
            d_v: ViewMut::packed(d_v, kv_shape(segment)),
            d_prior: Some((
                ViewMut::packed(d_prior_k, kv_shape(self.prior)),
                ViewMut::packed(d_prior_v, kv_shape(self.prior)),
            )),
            d_past_gate: &mut gates,
        };
        let d_lse = self.d_lse.as_deref().map(T::from_f32);
        let d_out = View::packed(input("d_out"), self.q_shape);
        let out = View::packed(out, self.q_shape);
        T::backward(&problem, out, lse, d_out, d_lse.as_deref(), grads)?;
        for (i, gate) in gates.iter().enumerate() {
            d_past_gate[i % q_heads] += *gate;
        }
        Ok(results.iter().map(|r| T::to_f32(r)).collect())
    }
}

/// A precision of the operation: which device computes in it.
trait Number: Copy + Default + std::ops::AddAssign {
    fn from_f32(values: &[f32]) -> Vec<Self>;
    fn to_f32(values: &[Self]) -> Vec<f32>;
    fn forward(
        problem: &Problem<'_, Self>,
        out: ViewMut<'_, Self>,
        lse: &mut [Self],
    ) -> Result<(), segattn::attention::Error>;
    fn backward(
        problem: &Problem<'_, Self>,
        out: View<'_, Self>,
        lse: &[Self],
        d_out: View<'_, Self>,
        d_lse: Option<&[Self]>,
        grads: Grads<'_, Self>,
    ) -> Result<(), segattn::attention::Error>;
}

macro_rules! number {
    ($type:ty, $device:path) => {
        impl Number for $type {
            fn from_f32(values: &[f32]) -> Vec<Self> {
                values.iter().map(|x| Self::from(*x)).collect()
            }

            fn to_f32(values: &[Self]) -> Vec<f32> {
                values.iter().map(|x| *x as f32).collect()
            }

            fn forward(
                problem: &Problem<'_, Self>,
                out: ViewMut<'_, Self>,
                lse: &mut [Self],
            ) -> Result<(), segattn::attention::Error> {
                use $device as device;
                device::forward(problem, out, lse)
            }

            fn backward(
                problem: &Problem<'_, Self>,
                out: View<'_, Self>,
                lse: &[Self],
                d_out: View<'_, Self>,
                d_lse: Option<&[Self]>,
                grads: Grads<'_, Self>,
            ) -> Result<(), segattn::attention::Error> {
                use $device as device;
                device::backward(problem, out, lse, d_out, d_lse, grads)
            }
        }
    };
}
number!(f32, cpu);
number!(f64, reference);

fn tensor<'a>(
    file: &SafeTensors<'a>,
    name: &str,
    dtype: Dtype,
    shape: &[usize],
) -> Result<TensorView<'a>> {
    let found = file
        .tensor(name)
        .with_context(|| format!("tensor `{name}`"))?;
    ensure!(
        found.dtype() == dtype,
        "tensor `{name}`: expected {dtype:?}, got {:?}",
        found.dtype()
    );
    ensure!(
        found.shape() == shape,
        "tensor `{name}`: expected shape {shape:?}, got {:?}",
        found.shape()
    );
    Ok(found)
}

/// The shape of a tensor of four dimensions.
fn four(file: &SafeTensors<'_>, name: &str) -> Result<[usize; 4]> {
    let found = file
        .tensor(name)
        .with_context(|| format!("tensor `{name}`"))?;
    let shape = found.shape();
    match <[usize; 4]>::try_from(shape) {
        Ok(shape) => Ok(shape),
        Err(_) => {
            bail!("tensor `{name}`: expected [batch, rows, heads, head_dim], got shape {shape:?}")
        }
    }
}

fn f32s(file: &SafeTensors<'_>, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
    let found = tensor(file, name, Dtype::F32, shape)?;
    Ok(bytemuck::allocation::pod_collect_to_vec(found.data()))
}

fn flags(file: &SafeTensors<'_>, heads: usize) -> Result<Vec<bool>> {
    let found = tensor(file, "prior_heads", Dtype::U8, &[heads])?;
    let flag = |x: &u8| match x {
        0 => Ok(false),
        1 => Ok(true),
        other => bail!("tensor `prior_heads`: expected 0 or 1, got {other}"),
    };
    found.data().iter().map(flag).collect()
}
