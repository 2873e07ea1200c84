//! The layout of the structs of `kernels/params.h` on the host, compared with the device's when a file is loaded.

use std::mem::offset_of;

use super::error::Error;
use super::params::{
    SegattnBackwardParams, SegattnForwardParams, SegattnHopperForwardParams, SegattnKernelInfo,
    SegattnProblem, SegattnTensor, SegattnTensorMap,
};
use super::registry::File;

/// A size (of a struct) or an offset (of `Struct.field`), in bytes, by name.
type Item = (&'static str, usize);

macro_rules! layout {
    ($($name:ident { $($field:ident),* $(,)? })*) => {
        &[$(
            (stringify!($name), size_of::<$name>()),
            $((concat!(stringify!($name), ".", stringify!($field)), offset_of!($name, $field)),)*
        )*]
    };
}

/// In the order of `kernels/layout.cuh`.
const HOST: &[Item] = layout! {
    SegattnTensor { data, batch_offsets, batch_stride, row_stride, head_stride, rows }
    SegattnProblem {
        q, k, v, prior_k, prior_v, past_k, past_v, segment_len, prior_len, past_len, sink_len, query_start,
        row_offsets, past_gate, prior_heads, past_len_batch_stride, past_len_head_stride, sink_len_batch_stride,
        sink_len_head_stride, batch, q_heads, kv_heads, scale,
    }
    SegattnForwardParams {
        problem, out, lse, partial_out, partial_state, chunk_totals, work_counter, packed_heads, tiles, max_splits,
    }
    SegattnTensorMap { words }
    SegattnHopperForwardParams { maps, forward, batch_coordinates, mapped }
    SegattnBackwardParams {
        problem, out, d_out, lse, d_lse, d_q, d_k, d_v, d_prior_k, d_prior_v, d_past_gate, row_lse, row_delta,
        partial_d_q, partial_gate, work_counter, ds, row_pitch, tiles, max_splits, first_group, groups,
    }
    SegattnKernelInfo {
        threads, shared_bytes, blocks_per_multiprocessor, tile_rows, key_rows, split_keys, params_bytes,
    }
};

/// The constant `<file>_layout` of the attention kernels.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct DeviceLayout([i32; HOST.len()]);

// SAFETY: an array of i32.
unsafe impl bytemuck::Zeroable for DeviceLayout {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for DeviceLayout {}

impl DeviceLayout {
    /// The constant's name in a file.
    pub fn name(file: File) -> String {
        format!("{}_layout", file.stem())
    }

    /// Compares it with the host's structs.
    ///
    /// # Errors
    /// The first size or offset that differs.
    pub fn check(&self, file: File) -> Result<(), Error> {
        let mut both = HOST.iter().zip(&self.0);
        match both.find(|((_, host), device)| *host as i64 != i64::from(**device)) {
            None => Ok(()),
            Some(((name, host), device)) => Err(Error::Mismatch {
                entry: file.stem().to_owned(),
                what: name,
                expected: host.to_string(),
                got: device.to_string(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_of_the_mirror_is_listed() {
        let mirror = include_str!("params.rs");
        let flat = mirror.split_whitespace().collect::<Vec<_>>().join(" ");
        let fields = flat.matches("[\"Offset of field: ").count();
        let structs = flat.matches("[\"Size of ").count();
        assert_eq!(HOST.len(), fields + structs);
        assert!(HOST.contains(&("SegattnProblem.scale", 428)));
    }

    #[test]
    fn a_field_that_lies_elsewhere_is_named() {
        let mut device = DeviceLayout(std::array::from_fn(|i| HOST[i].1 as i32));
        device
            .check(File::AttentionForward)
            .expect("the host's own");
        device.0[3] += 8;
        let error = device
            .check(File::AttentionForward)
            .expect_err("other offset");
        assert_eq!(
            error.to_string(),
            "attention_forward: SegattnTensor.batch_stride: expected 16, got 24; build kernels and library from the \
             same source tree"
        );
    }
}
