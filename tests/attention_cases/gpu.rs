//! A case on a GPU, real or simulated: uploads with NaN wherever nothing may be read, poisoned outputs and
//! workspace, plans, runs, and what came out.

use half::{bf16, f16};
use segattn::attention::cuda::{
    self, BackwardPlan, DeviceSlice, Dtype, Error, ForwardPlan, Phase, Products,
};
use segattn::attention::{Batch, Gradients, Layout, Prior, Problem, Saved};
use segattn::cuda::kernels::Kernels;

use super::{Case, Tensor};

/// A device with memory, as the tests see it. Freed with the value.
pub trait Gpu {
    /// What plans are made with.
    fn kernels(&self) -> &impl Kernels;
    /// Memory that holds these bytes.
    fn input(&mut self, name: &str, bytes: &[u8]) -> u64;
    /// Memory of 0xff bytes: NaN in every format.
    fn output(&mut self, name: &str, bytes: usize) -> u64;
    fn download(&mut self, address: u64, bytes: usize) -> Vec<u8>;
    fn forward(&mut self, plan: &ForwardPlan, workspace: DeviceSlice) -> Result<(), Error>;
    fn backward(&mut self, plan: &BackwardPlan, workspace: DeviceSlice) -> Result<(), Error>;
}

/// An element's bits; NaN becomes that of all ones.
pub fn to_bits(dtype: Dtype, x: f64) -> u16 {
    match dtype {
        _ if x.is_nan() => 0xffff,
        Dtype::Bf16 => bf16::from_f64(x).to_bits(),
        Dtype::F16 => f16::from_f64(x).to_bits(),
    }
}

pub fn to_f64(dtype: Dtype, bits: u16) -> f64 {
    match dtype {
        Dtype::Bf16 => bf16::from_bits(bits).to_f64(),
        Dtype::F16 => f16::from_bits(bits).to_f64(),
    }
}

impl Case<f64> {
    /// The case with every number rounded to the type, which the kernels read exactly.
    pub fn rounded(&self, dtype: Dtype) -> Case<f64> {
        let mut case = self.clone();
        for tensor in case.tensors_mut() {
            *tensor = tensor.map(|x| to_f64(dtype, to_bits(dtype, x)));
        }
        case.d_lse
            .iter_mut()
            .for_each(|x| *x = f64::from(*x as f32));
        case
    }

    fn tensors_mut(&mut self) -> [&mut Tensor<f64>; 8] {
        [
            &mut self.q,
            &mut self.k,
            &mut self.v,
            &mut self.prior_k,
            &mut self.prior_v,
            &mut self.past_k,
            &mut self.past_v,
            &mut self.d_out,
        ]
    }
}

/// How a case is run.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub dtype: Dtype,
    pub phase: Option<Phase>,
    pub with_d_lse: bool,
    pub read_only_prior: bool,
    pub products: Products,
}

impl Options {
    pub fn new(dtype: Dtype) -> Self {
        Options {
            dtype,
            phase: None,
            with_d_lse: false,
            read_only_prior: false,
            products: Products::Fastest,
        }
    }
}

/// A problem in a GPU's memory.
pub type GpuProblem<'a> = Problem<'a, cuda::Tensor<'a>>;

/// A case in a GPU's memory.
pub struct Loaded<'a> {
    pub problem: GpuProblem<'a>,
    d_out: cuda::Tensor<'a>,
    d_lse: DeviceSlice,
}

/// Outputs, in the layout of their inputs.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    pub out: Vec<u16>,
    pub lse: Vec<u32>,
    /// Rows of out in row-major order.
    pub rows: Vec<u16>,
}

/// Gradients by name, in row-major order.
#[derive(Debug, Clone, PartialEq)]
pub struct Grads {
    pub tensors: Vec<(&'static str, Vec<u16>)>,
    pub d_past_gate: Vec<u32>,
}

fn tensor<'a>(
    gpu: &mut impl Gpu,
    name: &str,
    dtype: Dtype,
    tensor: &'a Tensor<f64>,
) -> cuda::Tensor<'a> {
    let bits: Vec<u16> = tensor.data.iter().map(|&x| to_bits(dtype, x)).collect();
    cuda::Tensor {
        data: gpu.input(name, bytemuck::cast_slice(&bits)),
        len: bits.len(),
        dtype,
        layout: tensor.layout(),
    }
}

/// Uploads a case.
pub fn load<'a>(gpu: &mut impl Gpu, case: &'a Case<f64>, dtype: Dtype) -> Loaded<'a> {
    let problem = case.problem_of(|name, from| tensor(gpu, name, dtype, from));
    let d_lse: Vec<f32> = case.d_lse.iter().map(|&x| x as f32).collect();
    Loaded {
        problem,
        d_out: tensor(gpu, "d_out", dtype, &case.d_out),
        d_lse: DeviceSlice::new(
            gpu.input("d_lse", bytemuck::cast_slice(&d_lse)),
            d_lse.len(),
        ),
    }
}

/// Where a forward pass left its results.
pub struct Written<'a> {
    pub out: cuda::Tensor<'a>,
    pub lse: DeviceSlice,
}

/// A tensor like another, of poison.
fn like<'a>(gpu: &mut impl Gpu, name: &str, tensor: &cuda::Tensor<'a>) -> cuda::Tensor<'a> {
    cuda::Tensor {
        data: gpu.output(name, tensor.len * Dtype::BYTES),
        ..*tensor
    }
}

/// The gradient of current keys or values: like the tensor, or without padding where the queries have none.
fn like_key<'a>(
    gpu: &mut impl Gpu,
    name: &str,
    tensor: &cuda::Tensor<'a>,
    q: &cuda::Tensor<'a>,
) -> cuda::Tensor<'a> {
    let Batch::Packed(offsets) = q.layout.batch else {
        return like(gpu, name, tensor);
    };
    let layout = Layout::ragged(offsets, [tensor.layout.heads, tensor.layout.head_dim]);
    let len = layout.extent().expect("few rows") + 24;
    let packed = cuda::Tensor {
        len,
        layout,
        ..*tensor
    };
    like(gpu, name, &packed)
}

fn workspace(gpu: &mut impl Gpu, bytes: usize) -> DeviceSlice {
    DeviceSlice::new(gpu.output("workspace", bytes), bytes)
}

/// Runs the forward pass.
pub fn forward<'a>(
    gpu: &mut impl Gpu,
    problem: &GpuProblem<'a>,
    phase: Option<Phase>,
) -> Result<Written<'a>, Error> {
    let rows: usize = (0..problem.batch()).map(|b| problem.rows_of(b)).sum();
    let rows = rows * problem.q_heads();
    let out = like(gpu, "out", &problem.q);
    let lse = DeviceSlice::new(gpu.output("lse", 4 * rows), rows);
    let plan = ForwardPlan::new(problem, &out, lse, phase, gpu.kernels())?;
    let workspace = workspace(gpu, plan.workspace_bytes());
    gpu.forward(&plan, workspace)?;
    Ok(Written { out, lse })
}

/// The bits of a tensor's rows in row-major order; what lies between rows is still poison.
fn rows_of(
    gpu: &mut impl Gpu,
    name: &str,
    at: &cuda::Tensor<'_>,
    shape: [usize; 4],
) -> (Vec<u16>, Vec<u16>) {
    let bytes = gpu.download(at.data, at.len * Dtype::BYTES);
    let all: Vec<u16> = bytemuck::allocation::pod_collect_to_vec(&bytes);
    let [batch, _, heads, head_dim] = shape;
    let (mut found, mut between) = (Vec::new(), all.clone());
    for batch_index in 0..batch {
        for row in 0..at.layout.rows_of(batch_index) {
            for head in 0..heads {
                let start = at.layout.offset(batch_index, row, head);
                found.extend_from_slice(&all[start..start + head_dim]);
                between[start..start + head_dim].fill(0xffff);
            }
        }
    }
    assert!(
        between.iter().all(|&x| x == 0xffff),
        "{name}: written between its rows"
    );
    (found, all)
}

fn floats(gpu: &mut impl Gpu, at: DeviceSlice) -> Vec<u32> {
    bytemuck::allocation::pod_collect_to_vec(&gpu.download(at.data, 4 * at.len))
}

/// Forward results as the host sees them.
pub fn outcome(gpu: &mut impl Gpu, case: &Case<f64>, written: &Written<'_>) -> Outcome {
    let (rows, out) = rows_of(gpu, "out", &written.out, case.q.shape);
    Outcome {
        out,
        lse: floats(gpu, written.lse),
        rows,
    }
}

/// What a backward pass reads and, of poison, what it writes.
pub fn backward_arguments<'a>(
    gpu: &mut impl Gpu,
    loaded: &Loaded<'a>,
    written: &Written<'a>,
    options: Options,
) -> (
    Saved<cuda::Tensor<'a>, DeviceSlice>,
    Gradients<cuda::Tensor<'a>, DeviceSlice>,
) {
    let problem = &loaded.problem;
    let saved = Saved {
        out: written.out,
        lse: written.lse,
        d_out: loaded.d_out,
        d_lse: options.with_d_lse.then_some(loaded.d_lse),
    };
    let gates = problem.batch() * problem.q_heads();
    let prior = problem.prior.as_ref().filter(|_| !options.read_only_prior);
    let d_prior = prior.map(|Prior { k, v, .. }| {
        let d_k = like(gpu, "d_prior_k", k);
        (d_k, like(gpu, "d_prior_v", v))
    });
    let gradients = Gradients {
        d_q: like(gpu, "d_q", &problem.q),
        d_k: like_key(gpu, "d_k", &problem.k, &problem.q),
        d_v: like_key(gpu, "d_v", &problem.v, &problem.q),
        d_prior,
        d_past_gate: DeviceSlice::new(gpu.output("d_past_gate", 4 * gates), gates),
    };
    (saved, gradients)
}

/// Runs the backward pass.
pub fn backward(
    gpu: &mut impl Gpu,
    case: &Case<f64>,
    loaded: &Loaded<'_>,
    written: &Written<'_>,
    options: Options,
) -> Result<Grads, Error> {
    let (saved, gradients) = backward_arguments(gpu, loaded, written, options);
    let plan = BackwardPlan::with_products(
        &loaded.problem,
        &saved,
        &gradients,
        gpu.kernels(),
        options.products,
    )?;
    let workspace = workspace(gpu, plan.workspace_bytes());
    gpu.backward(&plan, workspace)?;
    let mut parts = vec![
        ("d_q", gradients.d_q, case.q.shape),
        ("d_k", gradients.d_k, case.k.shape),
        ("d_v", gradients.d_v, case.v.shape),
    ];
    if let Some((d_k, d_v)) = gradients.d_prior {
        parts.push(("d_prior_k", d_k, case.prior_k.shape));
        parts.push(("d_prior_v", d_v, case.prior_v.shape));
    }
    let tensors = parts
        .into_iter()
        .map(|(name, at, shape)| (name, rows_of(gpu, name, &at, shape).0));
    Ok(Grads {
        tensors: tensors.collect(),
        d_past_gate: floats(gpu, gradients.d_past_gate),
    })
}
