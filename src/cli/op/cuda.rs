//! A case on the first NVIDIA GPU, in 16 bits.

use std::sync::Arc;

use anyhow::{Context, Result};
use clap::ValueEnum;
use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr, ValidAsZeroBits};
use half::{bf16, f16};
use segattn::attention::cuda::slices::{
    Element, GradientSlices, Input, Output, SavedSlices, Workspace,
};
use segattn::cuda::kernels::DriverKernels;

use super::Case;

/// What the GPU computes with; sums are in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OpDtype {
    /// bfloat16
    Bf16,
    /// IEEE half precision
    F16,
}

/// 16-bit numbers and f32.
trait Number: Element + ValidAsZeroBits + Copy {
    fn narrow(x: f32) -> Self;
    fn widen(self) -> f32;
}

macro_rules! number {
    ($type:ty) => {
        impl Number for $type {
            fn narrow(x: f32) -> Self {
                <$type>::from_f32(x)
            }

            fn widen(self) -> f32 {
                self.to_f32()
            }
        }
    };
}
number!(bf16);
number!(f16);

/// Forward and backward; results as f32 in the order of [`super::case::RESULTS`].
pub fn compute(case: &Case, dtype: OpDtype) -> Result<Vec<Vec<f32>>> {
    let context = segattn::cuda::open(0)?;
    let kernels = DriverKernels::new(&context)?;
    let stream = context.new_stream()?;
    match dtype {
        OpDtype::Bf16 => run::<bf16>(case, &kernels, &stream),
        OpDtype::F16 => run::<f16>(case, &kernels, &stream),
    }
}

/// Zeros on the device: at least one, as an allocation of nothing is an error.
fn zeros<T: DeviceRepr + ValidAsZeroBits>(
    stream: &Arc<CudaStream>,
    len: usize,
) -> Result<CudaSlice<T>> {
    // SAFETY: written by the next call on the stream.
    let mut slice = unsafe { segattn::cuda::alloc(stream, len.max(1)) }?;
    stream.memset_zeros(&mut slice)?;
    Ok(slice)
}

fn upload<T: DeviceRepr + ValidAsZeroBits>(
    stream: &Arc<CudaStream>,
    values: &[T],
) -> Result<CudaSlice<T>> {
    let mut slice = zeros(stream, values.len())?;
    if !values.is_empty() {
        stream.memcpy_htod(values, &mut slice)?;
    }
    Ok(slice)
}

fn run<T: Number>(
    case: &Case,
    kernels: &DriverKernels,
    stream: &Arc<CudaStream>,
) -> Result<Vec<Vec<f32>>> {
    let [batch, segment, q_heads, head_dim] = case.q_shape;
    let kv_shape = |rows| [batch, rows, case.kv_heads, head_dim];
    let device = case
        .floats
        .iter()
        .map(|(_, values)| {
            let values: Vec<T> = values.iter().map(|&x| T::narrow(x)).collect();
            upload(stream, &values)
        })
        .collect::<Result<Vec<_>>>()?;
    let input = |name, shape| {
        let found = case.floats.iter().position(|(n, _)| *n == name);
        let slice = found.map(|i| &device[i]).context("eight tensors")?;
        Ok(Input::packed(slice, shape))
    };
    let problem = case.problem(input)?;
    let mut workspace = Workspace::default();
    let rows = batch * q_heads * segment;
    let like = |shape: [usize; 4]| zeros::<T>(stream, shape.iter().product());

    let mut out = like(case.q_shape)?;
    let mut lse = zeros::<f32>(stream, rows)?;
    let mut lse_rows = lse.slice_mut(..rows);
    let written = Output::packed(&mut out, case.q_shape);
    kernels
        .forward(stream, &problem, written, &mut lse_rows)?
        .run(&mut workspace)?;

    let d_lse = case.d_lse.as_deref().map(|d_lse| upload(stream, d_lse));
    let d_lse = d_lse.transpose()?;
    let d_lse_rows = d_lse.as_ref().map(|d_lse| d_lse.slice(..rows));
    let mut d_q = like(case.q_shape)?;
    let (mut d_k, mut d_v) = (like(kv_shape(segment))?, like(kv_shape(segment))?);
    let (mut d_prior_k, mut d_prior_v) = (like(kv_shape(case.prior))?, like(kv_shape(case.prior))?);
    let mut d_gates = zeros::<f32>(stream, batch * q_heads)?;
    let saved = SavedSlices {
        out: Input::packed(&out, case.q_shape),
        lse: &lse_rows,
        d_out: input("d_out", case.q_shape)?,
        d_lse: d_lse_rows.as_ref().map(|d_lse| d_lse as _),
    };
    let gradients = GradientSlices {
        d_q: Output::packed(&mut d_q, case.q_shape),
        d_k: Output::packed(&mut d_k, kv_shape(segment)),
        d_v: Output::packed(&mut d_v, kv_shape(segment)),
        d_prior: Some((
            Output::packed(&mut d_prior_k, kv_shape(case.prior)),
            Output::packed(&mut d_prior_v, kv_shape(case.prior)),
        )),
        d_past_gate: &mut d_gates.slice_mut(..batch * q_heads),
    };
    kernels
        .backward(stream, &problem, &saved, gradients)?
        .run(&mut workspace)?;

    let mut d_past_gate = vec![0.0; q_heads];
    for (i, gate) in download(stream, &d_gates, batch * q_heads)?
        .iter()
        .enumerate()
    {
        d_past_gate[i % q_heads] += gate;
    }
    let widened = |slice: &CudaSlice<T>, shape: [usize; 4]| -> Result<Vec<f32>> {
        let values = download(stream, slice, shape.iter().product())?;
        Ok(values.into_iter().map(T::widen).collect())
    };
    Ok(vec![
        widened(&out, case.q_shape)?,
        download(stream, &lse, rows)?,
        widened(&d_q, case.q_shape)?,
        widened(&d_k, kv_shape(segment))?,
        widened(&d_v, kv_shape(segment))?,
        widened(&d_prior_k, kv_shape(case.prior))?,
        widened(&d_prior_v, kv_shape(case.prior))?,
        d_past_gate,
    ])
}

/// The first `len` numbers.
fn download<T: DeviceRepr>(
    stream: &Arc<CudaStream>,
    slice: &CudaSlice<T>,
    len: usize,
) -> Result<Vec<T>> {
    let mut values = stream.clone_dtoh(slice)?;
    values.truncate(len);
    Ok(values)
}
