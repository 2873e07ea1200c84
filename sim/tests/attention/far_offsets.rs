//! Strides and offsets beyond 2^31 and 2^33 elements, in every tensor that a kernel reads or writes: the bits are those
//! of packed tensors. The memory between the rows is never touched, so it costs none.

use segattn::attention::cuda::{self, BackwardPlan, DeviceSlice, Dtype, ForwardPlan, Phase};
use segattn::attention::{Batch, Gradients, Layout, Saved};

use super::attention_cases::gpu::{self, Gpu, Options};
use super::attention_cases::{Case, Shape, Tensor, bits};
use super::simulated::Simulated;

/// Which stride is far.
#[derive(Debug, Clone, Copy)]
enum Far {
    Row,
    Head,
    Batch,
    Offsets,
}

const OFFSETS: [usize; 2] = [(1 << 33) + 8, 24];

fn layout(far: Far, [batch, rows, heads, head_dim]: [usize; 4]) -> Layout<'static> {
    let packed = Layout::packed([batch, rows, heads, head_dim]);
    let stride = |stride| Batch::Stride { len: batch, stride };
    match far {
        // Entries and heads lie between the rows.
        Far::Row => Layout {
            row_stride: (1 << 32) + 8,
            batch: stride(heads * head_dim),
            ..packed
        },
        Far::Head => Layout {
            row_stride: head_dim,
            head_stride: (1 << 33) + 64,
            ..packed
        },
        Far::Batch => Layout {
            batch: stride((1 << 33) - 8),
            ..packed
        },
        Far::Offsets => Layout {
            batch: Batch::Offsets(&OFFSETS),
            ..packed
        },
    }
}

/// Elements up to the end of the last row.
fn end(layout: &Layout<'_>, [batch, rows, heads, head_dim]: [usize; 4]) -> usize {
    let last = |entry| layout.offset(entry, rows.max(1) - 1, heads - 1) + head_dim;
    (0..batch).map(last).max().unwrap_or(0)
}

/// An output like a tensor, of poison.
fn output(
    gpu: &mut Simulated<'_>,
    name: &str,
    far: Far,
    dtype: Dtype,
    shape: [usize; 4],
) -> cuda::Tensor<'static> {
    let layout = layout(far, shape);
    let len = end(&layout, shape);
    cuda::Tensor {
        data: gpu.output(name, len * Dtype::BYTES),
        len,
        dtype,
        layout,
    }
}

/// A tensor of the case, with its padding never written.
fn input(
    gpu: &mut Simulated<'_>,
    name: &str,
    far: Far,
    dtype: Dtype,
    from: &Tensor<f64>,
) -> cuda::Tensor<'static> {
    let tensor = output(gpu, name, far, dtype, from.shape);
    let buffer = gpu.buffer(tensor.data);
    for_rows(from.shape, |entry, row, head| {
        let values = from.row(entry, row, head);
        if !values[0].is_nan() {
            let bits: Vec<u16> = values.iter().map(|&x| gpu::to_bits(dtype, x)).collect();
            gpu.gpu.write(
                buffer,
                tensor.layout.offset(entry, row, head) * Dtype::BYTES,
                &bits,
            );
        }
    });
    tensor
}

fn for_rows([batch, rows, heads, _]: [usize; 4], mut f: impl FnMut(usize, usize, usize)) {
    for entry in 0..batch {
        for row in 0..rows {
            (0..heads).for_each(|head| f(entry, row, head));
        }
    }
}

/// Rows in row-major order.
fn rows(gpu: &mut Simulated<'_>, tensor: &cuda::Tensor<'_>, shape: [usize; 4]) -> Vec<u16> {
    let buffer = gpu.buffer(tensor.data);
    let mut found = Vec::new();
    for_rows(shape, |entry, row, head| {
        let offset = tensor.layout.offset(entry, row, head) * Dtype::BYTES;
        found.extend(gpu.gpu.download_range::<u16>(buffer, offset, shape[3]));
    });
    found
}

fn check(far: Far, dtype: Dtype, phase: Phase) {
    let shape = Shape {
        segment_len: vec![3, 2],
        prior_len: vec![2, 3],
        past_len: vec![3, 1],
        past_gate: vec![0.5, 1.0, 0.5, 1.0],
        spare_rows: 1,
        ..Shape::plain(2, 2, 64, [0; 3])
    };
    let case = Case::new(&shape).rounded(dtype);
    let options = Options {
        phase: Some(phase),
        ..Options::new(dtype)
    };
    let (expected, expected_grads) = bits::both(&mut Simulated::new(1), &case, options);

    let mut simulated = Simulated::new(1);
    let gpu = &mut simulated;
    // Lengths, gates and lse as ever; every tensor far.
    let mut far_input = |name, tensor| input(gpu, name, far, dtype, tensor);
    let problem = case.problem_of(&mut far_input);
    let d_out = far_input("d_out", &case.d_out);
    let lse_len = case.d_lse.len();
    let lse = DeviceSlice::new(gpu.output("lse", 4 * lse_len), lse_len);
    let out = output(gpu, "out", far, dtype, case.q.shape);
    let plan = ForwardPlan::new(&problem, &out, lse, options.phase, gpu.kernels())
        .unwrap_or_else(|e| panic!("{e}"));
    let workspace = DeviceSlice::new(
        gpu.output("workspace", plan.workspace_bytes()),
        plan.workspace_bytes(),
    );
    gpu.forward(&plan, workspace)
        .unwrap_or_else(|e| panic!("{far:?}: {e}"));
    assert!(
        rows(gpu, &out, case.q.shape) == expected.rows,
        "{far:?}: out"
    );

    let shapes = [
        case.q.shape,
        case.k.shape,
        case.v.shape,
        case.prior_k.shape,
        case.prior_v.shape,
    ];
    let [d_q, d_k, d_v, d_prior_k, d_prior_v] =
        shapes.map(|shape| output(gpu, "gradient", far, dtype, shape));
    let gates = shape.batch() * shape.q_heads();
    let gradients = Gradients {
        d_q,
        d_k,
        d_v,
        d_prior: Some((d_prior_k, d_prior_v)),
        d_past_gate: DeviceSlice::new(gpu.output("d_past_gate", 4 * gates), gates),
    };
    let saved = Saved {
        out,
        lse,
        d_out,
        d_lse: None,
    };
    let plan = BackwardPlan::new(&problem, &saved, &gradients, gpu.kernels())
        .unwrap_or_else(|e| panic!("{e}"));
    let workspace = DeviceSlice::new(
        gpu.output("workspace", plan.workspace_bytes()),
        plan.workspace_bytes(),
    );
    gpu.backward(&plan, workspace)
        .unwrap_or_else(|e| panic!("{far:?}: {e}"));
    let tensors = [d_q, d_k, d_v, d_prior_k, d_prior_v];
    for ((name, expected), (tensor, shape)) in expected_grads
        .tensors
        .iter()
        .zip(tensors.iter().zip(shapes))
    {
        assert!(rows(gpu, tensor, shape) == *expected, "{far:?}: {name}");
    }
}

#[test]
fn row_strides_beyond_2_to_32_elements() {
    check(Far::Row, Dtype::Bf16, Phase::Prefill);
    check(Far::Row, Dtype::F16, Phase::Decode);
}

#[test]
fn head_strides_beyond_2_to_33_elements() {
    check(Far::Head, Dtype::F16, Phase::Prefill);
    check(Far::Head, Dtype::Bf16, Phase::Decode);
}

#[test]
fn batch_strides_and_offsets_of_2_to_33_elements() {
    check(Far::Batch, Dtype::Bf16, Phase::Decode);
    check(Far::Offsets, Dtype::Bf16, Phase::Prefill);
    check(Far::Offsets, Dtype::F16, Phase::Decode);
}
