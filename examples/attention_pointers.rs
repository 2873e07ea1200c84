//! Segment attention on device addresses: memory and a stream that another library made, tensors with strides.
//!
//! Keys and values of a layer often lie in one tensor `[batch, rows, 2, kv_heads, head_dim]`. Here they are used in
//! place, on a raw `CUstream`, as they would come from PyTorch, candle or a C++ program.
//!
//! `cargo run --release --features cuda --example attention_pointers`

use cudarc::driver::{DevicePtr, DevicePtrMut, result};
use half::bf16;
use segattn::attention::cuda::{DeviceSlice, Dtype, ForwardPlan, Tensor};
use segattn::attention::{Batch, Layout, Problem};
use segattn::cuda::kernels::DriverKernels;

const BATCH: usize = 2;
const ROWS: usize = 128;
const HEADS: usize = 4;
const HEAD_DIM: usize = 128;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let context = match segattn::cuda::open(0) {
        Ok(context) => context,
        Err(error) if error.is_absent() => {
            println!("nothing to show here: {error}");
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    let kernels = DriverKernels::new(&context)?;

    // Somebody else's stream and memory: the primary context is shared by every library in the process.
    let foreign = result::stream::create(result::stream::StreamKind::NonBlocking)?;
    let owner = context.default_stream();
    let q = owner.clone_htod(&vec![bf16::from_f32(0.5); BATCH * ROWS * HEADS * HEAD_DIM])?;
    let row = 2 * HEADS * HEAD_DIM;
    // Keys 1, values the number of their row.
    let kv: Vec<bf16> = (0..BATCH * ROWS * row)
        .map(|i| match i % row < row / 2 {
            true => bf16::ONE,
            false => bf16::from_f32((i / row % ROWS) as f32),
        })
        .collect();
    let kv = owner.clone_htod(&kv)?;
    let mut out = owner.alloc_zeros::<bf16>(q.len())?;
    let mut lse = owner.alloc_zeros::<f32>(BATCH * HEADS * ROWS)?;
    owner.synchronize()?;
    let (q_address, _q) = q.device_ptr(&owner);
    let (kv_address, _kv) = kv.device_ptr(&owner);
    let (out_address, _out) = out.device_ptr_mut(&owner);
    let (lse_address, _lse) = lse.device_ptr_mut(&owner);

    let layout = Layout {
        row_stride: row,
        batch: Batch::Stride {
            len: BATCH,
            stride: ROWS * row,
        },
        ..Layout::packed([BATCH, ROWS, HEADS, HEAD_DIM])
    };
    let half_of = |offset: usize| Tensor {
        data: kv_address + (offset * Dtype::BYTES) as u64,
        len: kv.len() - offset,
        dtype: Dtype::Bf16,
        layout,
    };
    let packed = |address| Tensor::packed(address, Dtype::Bf16, [BATCH, ROWS, HEADS, HEAD_DIM]);
    let problem = Problem::causal(packed(q_address), half_of(0), half_of(row / 2));
    let out_tensor = packed(out_address);
    let lse_slice = DeviceSlice::new(lse_address, BATCH * HEADS * ROWS);
    let plan = ForwardPlan::new(&problem, &out_tensor, lse_slice, None, &kernels)?;
    // SAFETY: the size is the plan's; the memory is given back below, after the stream has passed.
    let workspace = unsafe { result::malloc_sync(plan.workspace_bytes()) }?;
    // SAFETY: the stream is of the primary context and lives until below. Addresses are those of slices that live as
    // long, of the lengths stated; nobody else uses them meanwhile.
    unsafe {
        let mut stream = kernels.on_raw(foreign)?;
        plan.run(
            &mut stream,
            DeviceSlice::new(workspace, plan.workspace_bytes()),
        )?;
        result::stream::synchronize(foreign)?;
        result::free_sync(workspace)?;
        result::stream::destroy(foreign)?;
    }
    drop((_q, _kv, _out, _lse));

    // All keys are alike, so row i of out is the mean of 0..=i.
    let got = owner.clone_dtoh(&out)?;
    for row in [0, 1, 60, 127] {
        let value = got[row * HEADS * HEAD_DIM].to_f32();
        println!("row {row:3}: {value} (expected {})", row as f32 / 2.0);
        if (value - row as f32 / 2.0).abs() > 0.25 {
            return Err("wrong".into());
        }
    }
    Ok(())
}
