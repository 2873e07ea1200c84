//! AdamW over all tensors: the norm of all gradients, then the update.

use std::ops::Range;

use super::bounds::pointer;
use super::rows::{Grid, entry, launch};
use super::{Buffer, Driver, Gpu};
use crate::cuda::kernels::layer_params::{
    SegattnAdamwParams, SegattnAdamwResult, SegattnAdamwTensor,
};
use crate::cuda::kernels::{Entry, File, Kernels};
use crate::device::{AdamW, GradTensor, Result, Update};

const NORM: Entry = entry(File::Adamw, "adamw_norm_f32");
const SCALE: Entry = entry(File::Adamw, "adamw_scale_f32");
const UPDATE: Entry = entry(File::Adamw, "adamw_update_f32");

/// Elements of a chunk of the norm, and of an update.
pub(super) fn norm_chunk<D: Driver>(gpu: &Gpu<D>) -> Result<usize> {
    Ok(gpu.driver().kernels().info(NORM)?.split_keys as usize)
}

/// The sum of squares of every chunk of these ranges.
pub(super) fn squares<D: Driver>(
    gpu: &Gpu<D>,
    grads: &[(&Buffer<D>, Range<usize>)],
) -> Result<Vec<f64>> {
    let mut chunks = Chunks::new(gpu)?;
    let row = |(grads, range): &(&Buffer<D>, Range<usize>)| {
        Ok(SegattnAdamwTensor {
            grads: gpu.exact(grads, range.start, range.len())?,
            len: range.len() as i64,
            first_chunk: chunks.next(range.len()),
            ..unused()
        })
    };
    let present = grads.iter().filter(|(_, range)| !range.is_empty());
    let table = present.map(row).collect::<Result<Vec<_>>>()?;
    let mut squares = vec![0f64; chunks.count];
    if squares.is_empty() {
        return Ok(squares);
    }
    let held = [
        gpu.upload(as_bytes(&table))?,
        gpu.block(size_of_val(&squares[..]))?,
    ];
    let params = SegattnAdamwParams {
        tensors: pointer(&held[0]),
        chunk_squares: pointer::<f64>(&held[1]).cast_mut(),
        result: std::ptr::null_mut(),
        chunks: chunks.count as i64,
        clip_norm: -1.0,
        count: table.len() as i32,
        only_measure: 1,
        beta1: 0.0,
        beta2: 0.0,
        rest1: 0.0,
        rest2: 0.0,
        root: 0.0,
        eps: 0.0,
    };
    launch(gpu, NORM, Grid::Blocks(chunks.count), &params)?;
    let bytes = bytemuck::cast_slice_mut(&mut squares);
    // SAFETY: the block has that size, and the kernel has written it.
    unsafe { gpu.driver().download(held[1].address(), bytes)? };
    Ok(squares)
}

/// Computes the norm from the squares of all chunks, and updates every tensor unless the norm is not finite or only it
/// is asked for.
pub(super) fn adamw<D: Driver>(
    gpu: &Gpu<D>,
    tensors: &mut [GradTensor<'_, Buffer<D>>],
    squares: &[f64],
    update: &AdamW,
) -> Result<Update> {
    // 1 - beta^t without cancellation at small t.
    let bias = |beta: f64| -(update.step as f64 * beta.ln()).exp_m1();
    let [b1, b2] = update.betas;
    let (table, chunks) = table(gpu, tensors, update, bias(b1))?;
    let held = [
        gpu.upload(as_bytes(&table))?,
        gpu.upload(squares)?,
        gpu.block(size_of::<SegattnAdamwResult>())?,
    ];
    let params = SegattnAdamwParams {
        tensors: pointer(&held[0]),
        chunk_squares: pointer::<f64>(&held[1]).cast_mut(),
        result: pointer::<SegattnAdamwResult>(&held[2]).cast_mut(),
        chunks: squares.len() as i64,
        clip_norm: update.clip_norm.unwrap_or(-1.0),
        count: table.len() as i32,
        only_measure: update.only_measure.into(),
        beta1: b1 as f32,
        beta2: b2 as f32,
        rest1: (1.0 - b1) as f32,
        rest2: (1.0 - b2) as f32,
        root: (1.0 / bias(b2).sqrt()) as f32,
        eps: update.eps as f32,
    };
    launch(gpu, SCALE, Grid::Blocks(1), &params)?;
    let mut result = [0u8; size_of::<SegattnAdamwResult>()];
    // SAFETY: the block has that size, and the kernel has written it.
    unsafe { gpu.driver().download(held[2].address(), &mut result)? };
    let norm = result
        .first_chunk()
        .expect("the result begins with the norm");
    let applied = result
        .last_chunk()
        .expect("and ends with whether there was an update");
    let result = Update {
        grad_norm: f64::from_ne_bytes(*norm),
        applied: i32::from_ne_bytes(*applied) != 0,
    };
    // The only call that changes anything is the last one that can fail: after an error the tensors are as they were.
    if result.applied && chunks > 0 {
        launch(gpu, UPDATE, Grid::Blocks(chunks), &params)?;
    }
    Ok(result)
}

/// The chunks of a table's tensors, numbered through.
struct Chunks {
    len: usize,
    count: usize,
}

impl Chunks {
    fn new<D: Driver>(gpu: &Gpu<D>) -> Result<Self> {
        Ok(Self {
            len: norm_chunk(gpu)?,
            count: 0,
        })
    }

    /// The first chunk of the next tensor, of `len` elements.
    fn next(&mut self, len: usize) -> i64 {
        let first = self.count;
        self.count += len.div_ceil(self.len);
        first as i64
    }
}

/// A row of the table that points nowhere.
fn unused() -> SegattnAdamwTensor {
    SegattnAdamwTensor {
        values: std::ptr::null_mut(),
        grads: std::ptr::null_mut(),
        m: std::ptr::null_mut(),
        v: std::ptr::null_mut(),
        weights: std::ptr::null_mut(),
        len: 0,
        first_chunk: 0,
        step: 0.0,
        keep: 1.0,
        floor: -1.0,
        changes: 0,
    }
}

/// Kernel parameters of the tensors, and the number of their chunks.
fn table<D: Driver>(
    gpu: &Gpu<D>,
    tensors: &mut [GradTensor<'_, Buffer<D>>],
    update: &AdamW,
    bias: f64,
) -> Result<(Vec<SegattnAdamwTensor>, usize)> {
    let mut chunks = Chunks::new(gpu)?;
    let row = |t: &mut GradTensor<'_, Buffer<D>>| {
        let (first, len) = (t.range.start, t.range.len());
        let lr = update.lr * t.lr_scale;
        let decay = if t.decay {
            lr * update.weight_decay
        } else {
            0.0
        };
        Ok(SegattnAdamwTensor {
            values: gpu.exact(t.values, first, len)?,
            grads: gpu.exact(t.grads, first, len)?,
            m: gpu.exact(t.m, 0, len)?,
            v: gpu.exact(t.v, 0, len)?,
            len: len as i64,
            first_chunk: chunks.next(len),
            step: (lr / bias) as f32,
            keep: (1.0 - decay) as f32,
            floor: t.floor.map_or(-1.0, |f| f as f32),
            changes: (t.lr_scale != 0.0).into(),
            ..unused()
        })
    };
    let present = tensors.iter_mut().filter(|t| !t.range.is_empty());
    let rows = present.map(row).collect::<Result<_>>()?;
    Ok((rows, chunks.count))
}

fn as_bytes(table: &[SegattnAdamwTensor]) -> &[u8] {
    // Five addresses, two numbers of 8 bytes, four of 4: nothing between them.
    const { assert!(size_of::<SegattnAdamwTensor>() == 7 * 8 + 4 * 4) };
    // SAFETY: the struct has no padding, so every byte is initialised.
    unsafe { std::slice::from_raw_parts(table.as_ptr().cast(), size_of_val(table)) }
}
