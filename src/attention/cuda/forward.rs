//! The plan of a forward call: which kernel, how many blocks, which workspace.

use super::error::Error;
use super::instances::Instance;
use super::params::{ProblemParams, TensorParams, count, most_splits};
use super::tensor::{DeviceSlice, Tensor, check_tensors};
use super::tensor_maps::TensorMaps;
use super::workspace::{Address, Bases, Workspace};
use crate::attention::{Problem, Source};
use crate::cuda::kernels::params::{
    SegattnForwardParams, SegattnHopperForwardParams, SegattnKernelInfo,
};
use crate::cuda::kernels::{self, Entry, Kernels, Launch, Launcher};

/// How the work is partitioned. Both phases give the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Many query rows: a block computes a tile of them against a long range of keys.
    Prefill,
    /// A few query rows: their keys are split over the whole device, and the heads of a group share a tile (PackGQA).
    Decode,
}

/// A validated forward call. It writes `out` and `lse`; padding rows become 0 and -inf.
#[derive(Debug)]
pub struct ForwardPlan {
    problem: ProblemParams,
    out: TensorParams,
    lse: u64,
    workspace: Workspace,
    // Where the arrays of the workspace are.
    work_counter: Address,
    chunk_totals: Address,
    partial_out: Address,
    partial_state: Address,
    phase: Phase,
    packed_heads: u32,
    tiles: u32,
    max_splits: u32,
    attention: Launch,
    /// Of a kernel for Hopper.
    maps: Option<TensorMaps>,
    /// 0 blocks where no work tile is split.
    combine: Launch,
}

impl ForwardPlan {
    /// Plans a call that writes `out` (like `q`, but with a layout of its own) and `lse` `[batch, q_heads, rows]` f32
    /// (`[q_heads, rows]` of each batch element where `q` is packed).
    /// Without a `phase` the number of query rows decides.
    ///
    /// # Errors
    /// An argument that does not fit, a head size without kernels, or what `kernels` says.
    pub fn new(
        problem: &Problem<'_, Tensor<'_>>,
        out: &Tensor<'_>,
        lse: DeviceSlice,
        phase: Option<Phase>,
        kernels: &impl Kernels,
    ) -> Result<Self, Error> {
        let instance = Instance::of(problem.q.dtype, problem.head_dim())?;
        problem.validate_forward(out, &lse)?;
        check_tensors(problem, [("out", Some(out))])?;
        lse.check_alignment("lse")?;
        let mut workspace = Workspace::default();
        let params = ProblemParams::new(problem, &mut workspace)?;
        let out = TensorParams::new("out", out, &mut workspace)?;

        let rows = params.rows();
        let packed = shared_heads(problem);
        let decode = info::<SegattnForwardParams>(kernels, instance.decode)?;
        let phase = match phase {
            Some(phase) => phase,
            None if rows.saturating_mul(packed) > decode.tile_rows as usize => Phase::Prefill,
            None => Phase::Decode,
        };
        let hopper = instance.hopper.filter(|_| kernels.hopper());
        let (entry, combine, info, packed) = match (phase, hopper) {
            (Phase::Decode, _) => (instance.decode, instance.decode_combine, decode, packed),
            (Phase::Prefill, None) => {
                let info = info::<SegattnForwardParams>(kernels, instance.prefill)?;
                (instance.prefill, instance.prefill_combine, info, 1)
            }
            (Phase::Prefill, Some(hopper)) => {
                let info = info::<SegattnHopperForwardParams>(kernels, hopper.prefill)?;
                (hopper.prefill, hopper.prefill_combine, info, 1)
            }
        };
        let maps = match (phase, hopper) {
            (Phase::Prefill, Some(_)) => {
                let rows = info.key_rows as u32;
                Some(TensorMaps::new(problem, rows, &mut workspace, kernels)?)
            }
            _ => None,
        };
        let (tile_rows, head_dim) = (info.tile_rows as usize, problem.head_dim());
        let tiles = rows.saturating_mul(packed).div_ceil(tile_rows);
        let max_splits = most_splits(problem, &info);
        let (batch, q_heads) = (problem.batch(), problem.q_heads());
        let work_tiles = count(
            "query tiles * KV splits * heads * batch",
            &[tiles, max_splits, q_heads / packed, batch],
        )?;
        // A prefill block takes work tiles in a loop and keeps the totals of a tile's chunks in the workspace, or on
        // Hopper in shared memory. In decoding each work tile is a block.
        let (blocks, totals) = match (work_tiles, phase) {
            (0, _) => (0, 0),
            (tiles, Phase::Decode) => (tiles, 0),
            (tiles, Phase::Prefill) => {
                let blocks = kernels.resident_blocks(entry, &info)?.max(1).min(tiles);
                (blocks, if maps.is_some() { 0 } else { blocks as usize })
            }
        };
        let query_rows = [batch, q_heads, rows];
        let is_split = max_splits > 1 && work_tiles > 0;
        let split_rows = usize::from(is_split) * max_splits;
        let partial_rows = [split_rows, problem.all_rows(), q_heads];
        kernels.ready(entry)?;
        kernels.ready(combine)?;
        let combined = info_blocks(kernels, combine, &query_rows)?;
        Ok(ForwardPlan {
            problem: params,
            out,
            lse: lse.data,
            work_counter: workspace.reserve("work_counter", 4, &[1])?,
            chunk_totals: workspace.reserve("chunk_totals", 4, &[totals, tile_rows, head_dim])?,
            partial_out: workspace.reserve(
                "partial_out",
                4,
                &[&partial_rows[..], &[head_dim]].concat(),
            )?,
            partial_state: workspace.reserve("partial_state", 8, &partial_rows)?,
            workspace,
            phase,
            packed_heads: packed as u32,
            tiles: count("tiles", &[tiles])?,
            max_splits: count("KV splits", &[max_splits])?,
            attention: launch(entry, blocks, &info),
            maps,
            combine: Launch {
                blocks: if is_split { combined.blocks } else { 0 },
                overlaps: phase == Phase::Decode,
                ..combined
            },
        })
    }

    /// Bytes of device memory that [`run`](Self::run) needs, at a multiple of 256.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace.bytes()
    }

    /// How the work is partitioned.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Query heads of a group that share a tile (PackGQA).
    pub fn packed_heads(&self) -> usize {
        self.packed_heads as usize
    }

    /// Enqueues the call on the launcher's stream: the copy of the host values, then the kernels.
    ///
    /// # Safety
    /// Every address of the problem, of `out`, `lse` and `workspace` is device memory of the stated length that stays
    /// allocated until the stream has run the call. Nothing else uses `out`, `lse` and `workspace` until then.
    /// Device-resident lengths and gates are as [`Len::Device`](crate::attention::Len::Device) and
    /// [`Gates::Device`](crate::attention::Gates::Device) say.
    ///
    /// # Errors
    /// [`Error::Workspace`], or the launcher's error; no further kernel is launched then.
    pub unsafe fn run(
        &self,
        launcher: &mut impl Launcher,
        workspace: DeviceSlice,
    ) -> Result<(), Error> {
        self.workspace.check(workspace)?;
        // SAFETY: the caller's promise; the beginning of the workspace is its host values.
        unsafe {
            launcher.upload(workspace.data, self.workspace.uploads())?;
            self.launch(launcher, workspace)
        }
    }

    /// As [`run`](Self::run), without copying the host values: the workspace still holds those of this plan's last
    /// run. For graphs.
    ///
    /// # Safety
    /// As [`run`](Self::run).
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub unsafe fn launch(
        &self,
        launcher: &mut impl Launcher,
        workspace: DeviceSlice,
    ) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_with(launcher, workspace.data, workspace) }
    }

    /// The host values (lengths, gates, offsets) that [`run`](Self::run) copies.
    pub fn values(&self) -> &[u8] {
        self.workspace.uploads()
    }

    /// As [`launch`](Self::launch), with the host values in memory of their own.
    ///
    /// # Safety
    /// As [`run`](Self::run); `values` is the device address, a multiple of 16, of a copy of [`values`](Self::values).
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub unsafe fn launch_with(
        &self,
        launcher: &mut impl Launcher,
        values: u64,
        workspace: DeviceSlice,
    ) -> Result<(), Error> {
        self.workspace.check(workspace)?;
        if self.attention.blocks == 0 {
            return Ok(());
        }
        let bases = Bases {
            values,
            workspace: workspace.data,
        };
        let params = self.params(bases);
        // SAFETY: the caller's promise; `params` is the struct of these entry points.
        unsafe {
            if self.phase == Phase::Prefill {
                launcher.zero(params.work_counter as u64, 4)?;
            }
            match &self.maps {
                None => launcher.launch(&self.attention, &params)?,
                Some(maps) => launcher.launch(&self.attention, &maps.fill(params, bases))?,
            }
            if self.combine.blocks > 0 {
                launcher.launch(&self.combine, &params)?;
            }
        }
        Ok(())
    }

    fn params(&self, bases: Bases) -> SegattnForwardParams {
        SegattnForwardParams {
            problem: self.problem.fill(bases),
            out: self.out.fill(bases),
            lse: Address::Device(self.lse).at(bases),
            partial_out: self.partial_out.at(bases),
            partial_state: self.partial_state.at(bases),
            chunk_totals: self.chunk_totals.at(bases),
            work_counter: self.work_counter.at(bases),
            packed_heads: self.packed_heads as i32,
            tiles: self.tiles as i32,
            max_splits: self.max_splits as i32,
        }
    }
}

/// PackGQA: how many neighbouring query heads can share a tile. It divides the group, and heads that share a tile read
/// the same sources.
fn shared_heads(problem: &Problem<'_, Tensor<'_>>) -> usize {
    let group = problem.group();
    let roles = |head| Source::ALL.map(|source| problem.reads(source, head));
    let same =
        |heads: usize| (0..problem.q_heads()).all(|head| roles(head) == roles(head - head % heads));
    (1..=group)
        .rev()
        .find(|&heads| group.is_multiple_of(heads) && same(heads))
        .unwrap_or(1)
}

/// The metadata of an entry point whose params struct is `P`.
pub(super) fn info<P>(kernels: &impl Kernels, entry: Entry) -> Result<SegattnKernelInfo, Error> {
    let info = kernels.info(entry)?;
    if info.params_bytes as usize == size_of::<P>() && info.threads > 0 && info.tile_rows > 0 {
        return Ok(info);
    }
    Err(kernels::Error::Mismatch {
        entry: entry.name.into(),
        what: "bytes of the params struct",
        expected: size_of::<P>().to_string(),
        got: info.params_bytes.to_string(),
    }
    .into())
}

/// The launch of a kernel whose blocks compute `tile_rows` of `product(rows)` rows each.
pub(super) fn info_blocks(
    kernels: &impl Kernels,
    entry: Entry,
    rows: &[usize],
) -> Result<Launch, Error> {
    let info = info::<SegattnForwardParams>(kernels, entry)?;
    // The kernels count rows in 32 bits.
    let rows = count("rows of all heads", rows)?;
    Ok(launch(entry, rows.div_ceil(info.tile_rows as u32), &info))
}

pub(super) fn launch(entry: Entry, blocks: u32, info: &SegattnKernelInfo) -> Launch {
    Launch {
        entry,
        blocks,
        threads: info.threads as u32,
        shared_bytes: info.shared_bytes as u32,
        overlaps: false,
    }
}
