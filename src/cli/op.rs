//! `segattn op`: the operation on tensors in a safetensors file, for comparison with other programs.

mod case;
#[cfg(feature = "cuda")]
mod cuda;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use segattn::attention::{
    Gradients, HostGradients, HostProblem, HostSaved, Saved, View, ViewMut, cpu, reference,
};

use super::files::Results;
use case::Case;

/// The case holds q k v prior_k prior_v past_k past_v d_out and past_gate (F32), prior_heads (U8),
/// segment_len prior_len past_len (I32), optionally sink_len (I32), d_lse (F32) and the metadata key
/// `scale`. A source of zero rows is a tensor with a zero in its shape. The result holds out lse d_q
/// d_k d_v d_prior_k d_prior_v d_past_gate (F32).
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

/// Smallest gate above 0 whose gradient f32 can hold.
const MIN_GATE: f32 = 1e-30;

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

pub fn run(args: &Args) -> Result<()> {
    let place = Results::at(&args.out)?;
    let bytes = std::fs::read(&args.case)
        .with_context(|| format!("cannot read {}", args.case.display()))?;
    let case = Case::read(&bytes).with_context(|| args.case.display().to_string())?;
    // The gradient of a gate divides by it, which f32 cannot do with every number of its own.
    if args.device != OpDevice::Reference
        && let Some(i) = case
            .past_gate
            .iter()
            .position(|g| *g != 0.0 && *g < MIN_GATE)
    {
        bail!(
            "past_gate[{i}]: expected 0 or at least {MIN_GATE:e} in f32 (--device reference takes any), got {:e}",
            case.past_gate[i]
        );
    }
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
    place.write(&case.serialize(&results)?)
}

impl Case {
    /// Forward and backward in `T`; results as f32 in the order of [`case::RESULTS`].
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
        let problem = self.problem(|name, shape| Ok(View::packed(input(name), shape)))?;
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
        let grads = Gradients {
            d_q: ViewMut::packed(d_q, self.q_shape),
            d_k: ViewMut::packed(d_k, kv_shape(segment)),
            d_v: ViewMut::packed(d_v, kv_shape(segment)),
            d_prior: Some((
                ViewMut::packed(d_prior_k, kv_shape(self.prior)),
                ViewMut::packed(d_prior_v, kv_shape(self.prior)),
            )),
            d_past_gate: &mut gates[..],
        };
        let d_lse = self.d_lse.as_deref().map(T::from_f32);
        let saved = Saved {
            out: View::packed(out, self.q_shape),
            lse: &lse[..],
            d_out: View::packed(input("d_out"), self.q_shape),
            d_lse: d_lse.as_deref(),
        };
        T::backward(&problem, &saved, grads)?;
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
        problem: &HostProblem<'_, Self>,
        out: ViewMut<'_, Self>,
        lse: &mut [Self],
    ) -> Result<(), segattn::attention::Error>;
    fn backward(
        problem: &HostProblem<'_, Self>,
        saved: &HostSaved<'_, Self>,
        grads: HostGradients<'_, Self>,
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
                problem: &HostProblem<'_, Self>,
                out: ViewMut<'_, Self>,
                lse: &mut [Self],
            ) -> Result<(), segattn::attention::Error> {
                use $device as device;
                device::forward(problem, out, lse)
            }

            fn backward(
                problem: &HostProblem<'_, Self>,
                saved: &HostSaved<'_, Self>,
                grads: HostGradients<'_, Self>,
            ) -> Result<(), segattn::attention::Error> {
                use $device as device;
                device::backward(problem, saved, grads)
            }
        }
    };
}
number!(f32, cpu);
number!(f64, reference);
