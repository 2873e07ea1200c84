//! A case of the operation on the simulated GPU.

#[path = "../../src/cli/op/case.rs"]
mod case;

use std::path::Path;

use anyhow::Result;
use bytemuck::Pod;
use half::{bf16, f16};
use segattn::attention::cuda::{BackwardPlan, DeviceSlice, Dtype, ForwardPlan, Tensor};
use segattn::attention::{Gradients, Saved};
use segattn_sim::{Buffer, Checks, Gpu, Kernels, Stream};

use case::Case;

/// An element type of the kernels.
pub trait Element: Pod {
    const DTYPE: Dtype;
    fn narrow(x: f32) -> Self;
    fn widen(self) -> f32;
}

macro_rules! element {
    ($type:ty, $dtype:ident) => {
        impl Element for $type {
            const DTYPE: Dtype = Dtype::$dtype;

            fn narrow(x: f32) -> Self {
                <$type>::from_f32(x)
            }

            fn widen(self) -> f32 {
                self.to_f32()
            }
        }
    };
}
element!(bf16, Bf16);
element!(f16, F16);

/// A simulated GPU and what was written to it.
struct Device {
    gpu: Gpu,
    kernels: Kernels,
}

impl Device {
    fn tensor<T: Element>(
        &mut self,
        name: &str,
        values: &[f32],
        shape: [usize; 4],
    ) -> Result<Tensor<'static>> {
        let values: Vec<T> = values.iter().map(|&x| T::narrow(x)).collect();
        let buffer = self.gpu.input(name, &values)?;
        Ok(Tensor::packed(buffer.address() as u64, T::DTYPE, shape))
    }

    /// A tensor to be written.
    fn output<T: Element>(
        &mut self,
        name: &str,
        shape: [usize; 4],
    ) -> Result<(Tensor<'static>, Buffer)> {
        let bytes = shape.iter().product::<usize>() * Dtype::BYTES;
        let buffer = self.gpu.alloc(name, bytes)?;
        let tensor = Tensor::packed(buffer.address() as u64, T::DTYPE, shape);
        Ok((tensor, buffer))
    }

    /// f32 to be written.
    fn floats(&mut self, name: &str, len: usize) -> Result<(DeviceSlice, Buffer)> {
        let buffer = self.gpu.alloc(name, 4 * len)?;
        Ok((DeviceSlice::new(buffer.address() as u64, len), buffer))
    }

    fn workspace(&mut self, bytes: usize) -> Result<DeviceSlice> {
        let buffer = self.gpu.alloc("workspace", bytes)?;
        Ok(DeviceSlice::new(buffer.address() as u64, bytes))
    }

    fn stream(&mut self) -> Stream<'_> {
        Stream {
            gpu: &mut self.gpu,
            kernels: &self.kernels,
        }
    }

    fn widened<T: Element>(&mut self, buffer: Buffer) -> Vec<f32> {
        let values = self.gpu.download::<T>(buffer);
        values.into_iter().map(T::widen).collect()
    }
}

/// Forward and backward in `T`: from the file of a case to that of its results.
pub fn run<T: Element>(bytes: &[u8], seed: u64) -> Result<Vec<u8>> {
    let case = Case::read(bytes)?;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels");
    let mut device = Device {
        gpu: Gpu::new(seed, Checks::All),
        kernels: Kernels::new(&folder),
    };
    let results = compute::<T>(&case, &mut device)?;
    case.serialize(&results)
}

/// Results as f32 in the order of [`case::RESULTS`].
fn compute<T: Element>(case: &Case, device: &mut Device) -> Result<Vec<Vec<f32>>> {
    let [batch, segment, q_heads, head_dim] = case.q_shape;
    let kv = |rows| [batch, rows, case.kv_heads, head_dim];
    let mut input = |name: &'static str, shape| {
        let found = case.floats.iter().find(|(n, _)| *n == name);
        device.tensor::<T>(name, found.map_or(&[][..], |(_, values)| values), shape)
    };
    let problem = case.problem(&mut input)?;
    let d_out = input("d_out", case.q_shape)?;
    let d_lse = match &case.d_lse {
        Some(values) => {
            let buffer = device.gpu.input("d_lse", values)?;
            Some(DeviceSlice::new(buffer.address() as u64, values.len()))
        }
        None => None,
    };

    let (out, out_buffer) = device.output::<T>("out", case.q_shape)?;
    let (lse, lse_buffer) = device.floats("lse", batch * q_heads * segment)?;
    let plan = ForwardPlan::new(&problem, &out, lse, None, &device.kernels)?;
    let workspace = device.workspace(plan.workspace_bytes())?;
    // SAFETY: the buffers live as long as the simulated GPU, which checks every access.
    unsafe { plan.run(&mut device.stream(), workspace) }?;

    let shapes = [
        case.q_shape,
        kv(segment),
        kv(segment),
        kv(case.prior),
        kv(case.prior),
    ];
    let mut tensors = Vec::new();
    for (name, shape) in ["d_q", "d_k", "d_v", "d_prior_k", "d_prior_v"]
        .into_iter()
        .zip(shapes)
    {
        tensors.push(device.output::<T>(name, shape)?);
    }
    let (d_past_gate, gate_buffer) = device.floats("d_past_gate", batch * q_heads)?;
    let gradients = Gradients {
        d_q: tensors[0].0,
        d_k: tensors[1].0,
        d_v: tensors[2].0,
        d_prior: Some((tensors[3].0, tensors[4].0)),
        d_past_gate,
    };
    let saved = Saved {
        out,
        lse,
        d_out,
        d_lse,
    };
    let plan = BackwardPlan::new(&problem, &saved, &gradients, &device.kernels)?;
    let workspace = device.workspace(plan.workspace_bytes())?;
    // SAFETY: as above.
    unsafe { plan.run(&mut device.stream(), workspace) }?;

    let mut results = vec![
        device.widened::<T>(out_buffer),
        device.gpu.download(lse_buffer),
    ];
    for (_, buffer) in tensors {
        results.push(device.widened::<T>(buffer));
    }
    let mut gates = vec![0.0; q_heads];
    for (i, gate) in device
        .gpu
        .download::<f32>(gate_buffer)
        .into_iter()
        .enumerate()
    {
        gates[i % q_heads] += gate;
    }
    results.push(gates);
    Ok(results)
}
