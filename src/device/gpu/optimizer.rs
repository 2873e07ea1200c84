//! AdamW over all tensors: the norm of all gradients, then the update.

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

/// Computes the norm of all gradients, and updates every tensor unless the norm is not finite or only it is asked for.
pub(super) fn adamw<D: Driver>(
    gpu: &Gpu<D>,
    tensors: &mut [GradTensor<'_, Buffer<D>>],
    update: &AdamW,
) -> Result<Update> {
    // 1 - beta^t without cancellation at small t.
    let bias = |beta: f64| -(update.step as f64 * beta.ln()).exp_m1();
    let [b1, b2] = update.betas;
    let chunk_len = gpu.driver().kernels().info(NORM)?.split_keys as usize;
    let (table, chunks) = table(gpu, tensors, update, bias(b1), chunk_len)?;
    let held = [
        gpu.upload(as_bytes(&table))?,
        gpu.block(chunks * size_of::<f64>())?,
        gpu.block(size_of::<SegattnAdamwResult>())?,
    ];
    let params = SegattnAdamwParams {
        tensors: pointer(&held[0]),
        chunk_squares: pointer::<f64>(&held[1]).cast_mut(),
        result: pointer::<SegattnAdamwResult>(&held[2]).cast_mut(),
        chunks: chunks as i64,
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
    launch(gpu, NORM, Grid::Blocks(chunks), &params)?;
    launch(gpu, SCALE, Grid::Blocks(1), &params)?;
    let mut result = [0u8; size_of::<SegattnAdamwResult>()];
    // SAFETY: the block has that size, and the second kernel has written it.
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
    if result.applied {
        launch(gpu, UPDATE, Grid::Blocks(chunks), &params)?;
    }
    Ok(result)
}

/// Kernel parameters of the tensors, and the number of their chunks.
fn table<D: Driver>(
    gpu: &Gpu<D>,
    tensors: &mut [GradTensor<'_, Buffer<D>>],
    update: &AdamW,
    bias: f64,
    chunk_len: usize,
) -> Result<(Vec<SegattnAdamwTensor>, usize)> {
    let mut chunks = 0;
    let row = |t: &mut GradTensor<'_, Buffer<D>>| {
        let (len, first_chunk) = (t.values.len, chunks);
        chunks += len.div_ceil(chunk_len);
        let lr = update.lr * t.lr_scale;
        let decay = if t.decay {
            lr * update.weight_decay
        } else {
            0.0
        };
        Ok(SegattnAdamwTensor {
            values: gpu.exact(t.values, 0, len)?,
            grads: gpu.exact(t.grads, 0, len)?,
            m: gpu.exact(t.m, 0, len)?,
            v: gpu.exact(t.v, 0, len)?,
            weights: std::ptr::null_mut(),
            len: len as i64,
            first_chunk: first_chunk as i64,
            step: (lr / bias) as f32,
            keep: (1.0 - decay) as f32,
            floor: t.floor.map_or(-1.0, |f| f as f32),
            changes: (t.lr_scale != 0.0).into(),
        })
    };
    let present = tensors.iter_mut().filter(|t| t.values.len > 0);
    let rows = present.map(row).collect::<Result<_>>()?;
    Ok((rows, chunks))
}

fn as_bytes(table: &[SegattnAdamwTensor]) -> &[u8] {
    // Five addresses, two numbers of 8 bytes, four of 4: nothing between them.
    const { assert!(size_of::<SegattnAdamwTensor>() == 7 * 8 + 4 * 4) };
    // SAFETY: the struct has no padding, so every byte is initialised.
    unsafe { std::slice::from_raw_parts(table.as_ptr().cast(), size_of_val(table)) }
}
