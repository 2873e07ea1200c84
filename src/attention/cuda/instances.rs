//! The attention kernels: the one table from element type and head size to entry points.

use std::fmt;

use crate::cuda::kernels::{Entry, Error, File};

/// Element type of queries, keys, values and their gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl Dtype {
    /// Bytes of an element.
    pub const BYTES: usize = 2;
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
        })
    }
}

/// The entry points of an element type and a head size.
#[derive(Debug, Clone, Copy)]
pub(super) struct Instance {
    pub prefill: Entry,
    pub prefill_combine: Entry,
    pub decode: Entry,
    pub decode_combine: Entry,
    pub prepare: Entry,
    pub query_grad: Entry,
    pub query_grad_sum: Entry,
    pub key_grad: Entry,
    /// Used instead on a device that has [`Kernels::hopper`](crate::cuda::kernels::Kernels::hopper).
    pub hopper: Option<HopperInstance>,
}

/// The entry points written for Hopper. Blocks of all but the merging and summing
/// ones take work tiles in a loop.
#[derive(Debug, Clone, Copy)]
pub(super) struct HopperInstance {
    pub prefill: Entry,
    pub prefill_combine: Entry,
    pub query_grad: Entry,
    pub query_grad_sum: Entry,
    pub key_grad: Entry,
    /// The d_q and the d_k pass of five products.
    pub stored: Option<[Entry; 2]>,
}

macro_rules! entry {
    ($file:ident, $prefix:literal, $suffix:literal) => {
        Entry {
            file: File::$file,
            name: concat!($prefix, $suffix),
        }
    };
}

macro_rules! instance {
    ($suffix:literal) => {
        instance!($suffix, None)
    };
    ($suffix:literal, hopper) => {
        instance!($suffix, hopper, None)
    };
    ($suffix:literal, hopper, stored) => {
        instance!(
            $suffix,
            hopper,
            Some([
                entry!(
                    AttentionBackwardHopper,
                    "attention_query_grad_stored_hopper_",
                    $suffix
                ),
                entry!(
                    AttentionBackwardHopper,
                    "attention_key_grad_stored_hopper_",
                    $suffix
                ),
            ])
        )
    };
    ($suffix:literal, hopper, $stored:expr) => {
        instance!(
            $suffix,
            Some(HopperInstance {
                prefill: entry!(AttentionForwardHopper, "attention_prefill_hopper_", $suffix),
                prefill_combine: entry!(AttentionForwardHopper, "combine_prefill_hopper_", $suffix),
                query_grad: entry!(
                    AttentionBackwardHopper,
                    "attention_query_grad_hopper_",
                    $suffix
                ),
                query_grad_sum: entry!(
                    AttentionBackwardHopper,
                    "attention_query_grad_sum_hopper_",
                    $suffix
                ),
                key_grad: entry!(
                    AttentionBackwardHopper,
                    "attention_key_grad_hopper_",
                    $suffix
                ),
                stored: $stored,
            })
        )
    };
    ($suffix:literal, $hopper:expr) => {
        Some(Instance {
            prefill: entry!(AttentionForward, "attention_prefill_", $suffix),
            prefill_combine: entry!(AttentionForward, "combine_prefill_", $suffix),
            decode: entry!(AttentionDecode, "attention_decode_", $suffix),
            decode_combine: entry!(AttentionDecode, "combine_decode_", $suffix),
            prepare: entry!(AttentionBackward, "attention_prepare_", $suffix),
            query_grad: entry!(AttentionBackward, "attention_query_grad_", $suffix),
            query_grad_sum: entry!(AttentionBackward, "attention_query_grad_sum_", $suffix),
            key_grad: entry!(AttentionBackward, "attention_key_grad_", $suffix),
            hopper: $hopper,
        })
    };
}

fn find(dtype: Dtype, head_dim: usize) -> Option<Instance> {
    match (dtype, head_dim) {
        (Dtype::Bf16, 32) => instance!("bf16_d32"),
        (Dtype::Bf16, 64) => instance!("bf16_d64", hopper),
        (Dtype::Bf16, 96) => instance!("bf16_d96"),
        (Dtype::Bf16, 128) => instance!("bf16_d128", hopper, stored),
        (Dtype::Bf16, 256) => instance!("bf16_d256"),
        (Dtype::F16, 32) => instance!("f16_d32"),
        (Dtype::F16, 64) => instance!("f16_d64", hopper),
        (Dtype::F16, 96) => instance!("f16_d96"),
        (Dtype::F16, 128) => instance!("f16_d128", hopper, stored),
        (Dtype::F16, 256) => instance!("f16_d256"),
        _ => None,
    }
}

impl Instance {
    /// The kernels for an element type and head size.
    ///
    /// # Errors
    /// [`Error::NoKernel`] where there are none.
    pub fn of(dtype: Dtype, head_dim: usize) -> Result<Instance, Error> {
        find(dtype, head_dim).ok_or_else(|| {
            let dims = (1..=1024).filter(|&dim| find(dtype, dim).is_some());
            let dims: Vec<String> = dims.map(|dim| dim.to_string()).collect();
            Error::NoKernel {
                dtype: dtype.to_string(),
                head_dim,
                supported: format!("bf16 and f16 with head_dim {}", dims.join(", ")),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_refused_with_what_is() {
        let error = Instance::of(Dtype::F16, 80).expect_err("no kernel");
        assert_eq!(
            error.to_string(),
            "no kernel for f16 with head_dim 80: supported are bf16 and f16 with head_dim 32, 64, 96, 128, 256"
        );
    }

    #[test]
    fn every_entry_is_written_in_its_file() {
        let sources = [
            include_str!("../../../kernels/attention_forward.cu"),
            include_str!("../../../kernels/attention_decode.cu"),
            include_str!("../../../kernels/attention_backward.cu"),
            include_str!("../../../kernels/attention_backward_hopper.cu"),
            include_str!("../../../kernels/attention_forward_hopper.cu"),
        ];
        for (dtype, dim) in [Dtype::Bf16, Dtype::F16]
            .into_iter()
            .flat_map(|dtype| [32, 64, 96, 128, 256].map(|dim| (dtype, dim)))
        {
            let instance = Instance::of(dtype, dim).expect("kernels");
            assert!(instance.prefill.name.ends_with(&format!("{dtype}_d{dim}")));
            assert!(sources[0].contains(&format!("FORWARD(prefill_{dtype}_d{dim},")));
            assert!(sources[0].contains(&format!("COMBINE(prefill_{dtype}_d{dim})")));
            assert!(sources[1].contains(&format!("DECODE(decode_{dtype}_d{dim},")));
            assert!(sources[1].contains(&format!("COMBINE(decode_{dtype}_d{dim})")));
            let backward = format!("BACKWARD({dtype}_d{dim},");
            assert!(sources[2].contains(&backward));
            let forward = format!("FORWARD({dtype}_d{dim},");
            for (source, entry) in [(sources[3], &backward), (sources[4], &forward)] {
                assert_eq!(source.contains(entry.as_str()), instance.hopper.is_some());
            }
            let stored = instance.hopper.and_then(|hopper| hopper.stored);
            let entry = format!("STORED({dtype}_d{dim},");
            assert_eq!(sources[3].contains(&entry), stored.is_some());
        }
    }
}
