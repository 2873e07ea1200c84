//! Five products on Hopper: ds in the workspace, of so many groups of heads at a time as its bound allows.

use super::params::count;
use super::tensor::{DeviceSlice, Tensor};
use crate::attention::{Gradients, Problem, Source};
use crate::cuda::kernels::Error;

/// Rows and columns of a block of ds: `kBlockRows` of the kernels.
const BLOCK_ROWS: usize = 64;
const BLOCK_BYTES: usize = 2 * BLOCK_ROWS * BLOCK_ROWS;
/// The most that ds takes of a workspace.
const MOST_BYTES: usize = 512 << 20;
/// Segments from which on five products are faster (docs/log.md, 2026-11-30).
const LEAST_ROWS: usize = 512;

/// How many matrix products a backward call computes for a pair of tiles, where there are kernels for both: on Hopper
/// at head size 128. The gradients have the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Products {
    /// Whichever is faster. Five keep ds in the workspace, at most 512 MiB of it.
    #[default]
    Fastest,
    /// Seven: four for the gradients of keys and values, three for those of queries.
    Seven,
    /// Five: those for queries need one product, on ds that was stored for those for keys. For tests and benches.
    Five {
        /// The most bytes of ds in the workspace, but those of one KV head at least.
        ds_bytes: usize,
    },
}

/// The groups of a call, which are its pairs of batch element and KV head, divided into launches.
#[derive(Debug, Clone, Copy)]
pub(super) struct Groups {
    /// All groups.
    pub all: usize,
    /// Groups of a launch; the last may have fewer.
    pub of_launch: usize,
    /// Bytes of ds of a launch; 0: ds is not stored.
    pub ds_bytes: usize,
}

impl Groups {
    /// All groups in one launch.
    fn together(all: usize) -> Self {
        Groups {
            all,
            of_launch: all,
            ds_bytes: 0,
        }
    }

    /// The groups of a problem whose kernels can store ds, or cannot.
    pub fn of(
        products: Products,
        problem: &Problem<'_, Tensor<'_>>,
        gradients: &Gradients<Tensor<'_>, DeviceSlice>,
        can_store: bool,
    ) -> Result<Self, Error> {
        let all = problem.batch().saturating_mul(problem.kv_heads());
        let bytes = bytes_of_group(problem, gradients);
        let most = match products {
            Products::Fastest if is_faster(problem) => MOST_BYTES,
            Products::Five { ds_bytes } => ds_bytes.max(bytes),
            Products::Fastest | Products::Seven => 0,
        };
        if !can_store || bytes == 0 || bytes > most || all == 0 {
            return Ok(Groups::together(all));
        }
        // Launches of about as many groups each.
        let launches = all.div_ceil(most / bytes);
        let of_launch = all.div_ceil(launches);
        count("blocks of ds", &[of_launch, bytes / BLOCK_BYTES])?;
        Ok(Groups {
            all,
            of_launch,
            ds_bytes: of_launch * bytes,
        })
    }

    /// First group and number of groups of each launch; one launch at least.
    pub fn launches(&self) -> impl Iterator<Item = (usize, usize)> {
        let Groups { all, of_launch, .. } = *self;
        (0..all.max(1))
            .step_by(of_launch.max(1))
            .map(move |first| (first, of_launch.min(all - first)))
    }
}

/// Bytes of ds of a group: for each query head and tile of queries the blocks of all prior keys that get a gradient,
/// and of the current keys up to the diagonal (`kernels/stored_ds.cuh`).
fn bytes_of_group(
    problem: &Problem<'_, Tensor<'_>>,
    gradients: &Gradients<Tensor<'_>, DeviceSlice>,
) -> usize {
    let prior = gradients.d_prior.as_ref();
    let prior = prior.map_or(0, |(d_k, _)| d_k.layout.rows.div_ceil(BLOCK_ROWS));
    let queries = problem.rows().div_ceil(BLOCK_ROWS);
    let current = queries.saturating_mul(queries + 1) / 2;
    let blocks = queries.saturating_mul(prior).saturating_add(current);
    blocks.saturating_mul(problem.group().saturating_mul(BLOCK_BYTES))
}

/// Whether five products are faster: with long segments, and if the gates of most heads get no gradient, which takes
/// all products.
fn is_faster(problem: &Problem<'_, Tensor<'_>>) -> bool {
    let heads = problem.q_heads();
    let gated = (0..heads).filter(|&head| problem.reads(Source::Past, head));
    problem.rows() >= LEAST_ROWS && 2 * gated.count() <= heads
}
