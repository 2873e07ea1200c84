//! The plan of a backward call: preparation, d_k and d_v, d_q, the sum over its KV splits.

use super::error::Error;
use super::forward::{info, launch};
use super::instances::Instance;
use super::params::{ProblemParams, TensorParams, count, most_splits};
use super::stored::{Groups, Products};
use super::tensor::{DeviceSlice, Tensor, check_tensors};
use super::workspace::{Address, Workspace};
use crate::attention::{Gradients, Problem, Saved};
use crate::cuda::kernels::params::SegattnBackwardParams;
use crate::cuda::kernels::{Entry, Kernels, Launch, Launcher};

/// The arrays that preparation writes are padded to a multiple of this many rows.
const ROW_PITCH: usize = 128;
/// Kernels with one warp a row, which have no metadata constant.
const ROWS_PER_BLOCK: usize = 4;
const ROW_THREADS: u32 = 128;
/// Work counters of a pair of launches: one for each kernel whose blocks take work tiles in a loop.
const WORK_COUNTERS: usize = 2;
/// Sums of a row for the gradient of its head's gate: `kGateSums` of the kernels.
const GATE_SUMS: usize = 3;

/// A validated backward call.
#[derive(Debug)]
pub struct BackwardPlan {
    problem: ProblemParams,
    /// out, d_out, d_q, d_k, d_v, d_prior_k, d_prior_v
    tensors: [TensorParams; 7],
    lse: u64,
    d_lse: u64,
    d_past_gate: DeviceSlice,
    workspace: Workspace,
    row_lse: Address,
    row_delta: Address,
    partial_d_q: Address,
    partial_gate: Address,
    work_counter: Address,
    ds: Address,
    row_pitch: u32,
    tiles: u32,
    max_splits: u32,
    groups: Groups,
    /// d_k with d_v, then d_q: once for each launch of groups. Here and below those of 0 blocks are skipped.
    passes: [Launch; 2],
    prepare: Launch,
    sum: Launch,
}

impl BackwardPlan {
    /// Plans a call. `query_start` must be 0.
    ///
    /// # Errors
    /// An argument that does not fit, a head size without kernels, or what `kernels` says.
    pub fn new(
        problem: &Problem<'_, Tensor<'_>>,
        saved: &Saved<Tensor<'_>, DeviceSlice>,
        gradients: &Gradients<Tensor<'_>, DeviceSlice>,
        kernels: &impl Kernels,
    ) -> Result<Self, Error> {
        BackwardPlan::with_products(problem, saved, gradients, kernels, Products::Fastest)
    }

    /// As [`new`](Self::new), by so many products.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_products(
        problem: &Problem<'_, Tensor<'_>>,
        saved: &Saved<Tensor<'_>, DeviceSlice>,
        gradients: &Gradients<Tensor<'_>, DeviceSlice>,
        kernels: &impl Kernels,
        products: Products,
    ) -> Result<Self, Error> {
        let instance = Instance::of(problem.q.dtype, problem.head_dim())?;
        check(problem, saved, gradients)?;
        let mut workspace = Workspace::default();
        let params = ProblemParams::new(problem, &mut workspace)?;
        let mut tensors = [TensorParams::NONE; 7];
        for (params, (name, tensor)) in tensors.iter_mut().zip(named(saved, gradients)) {
            if let Some(tensor) = tensor {
                *params = TensorParams::new(name, tensor, &mut workspace)?;
            }
        }
        let hopper = instance.hopper.filter(|_| kernels.hopper());
        let stored = hopper.and_then(|hopper| hopper.stored);
        let groups = Groups::of(products, problem, gradients, stored.is_some())?;
        let [query_grad, key_grad, query_grad_sum] = match (hopper, stored) {
            (Some(hopper), Some([query, key])) if groups.ds_bytes > 0 => {
                [query, key, hopper.query_grad_sum]
            }
            (Some(hopper), _) => [hopper.query_grad, hopper.key_grad, hopper.query_grad_sum],
            (None, _) => [
                instance.query_grad,
                instance.key_grad,
                instance.query_grad_sum,
            ],
        };
        let query = info::<SegattnBackwardParams>(kernels, query_grad)?;
        let key = info::<SegattnBackwardParams>(kernels, key_grad)?;
        let (batch, heads, rows) = (problem.batch(), problem.q_heads(), params.rows());
        let row_pitch = rows.next_multiple_of(ROW_PITCH);
        let tiles = rows.div_ceil(query.tile_rows as usize);
        let max_splits = most_splits(problem, &query);
        let work_tiles = count(
            "query tiles * KV splits * heads * batch",
            &[tiles, max_splits, groups.of_launch, problem.group()],
        )?;
        let prepare = info::<SegattnBackwardParams>(kernels, instance.prepare)?;
        let prepare_blocks = row_pitch.div_ceil(prepare.tile_rows as usize);
        let prepare_blocks = count("blocks of a grid", &[batch, heads, prepare_blocks])?;
        // With one KV split only the gate's gradient is summed, for which one row a head is enough.
        let sum_rows = if max_splits > 1 { rows } else { rows.min(1) };
        let key_rows = |tensor: &TensorParams| tensor.rows().div_ceil(key.tile_rows as usize);
        let key_blocks = key_rows(&tensors[3]) + key_rows(&tensors[5]);
        let key_blocks = count("blocks of a grid", &[key_blocks, groups.of_launch])?;
        let split = usize::from(max_splits > 1) * max_splits;
        // A kernel whose blocks take work tiles in a loop gets as many blocks as run at once.
        let grid = |entry, tiles: u32, info: &_| match hopper {
            Some(_) if tiles > 0 => {
                Ok(kernels.resident_blocks(entry, info)?.max(1).min(tiles)) as Result<_, Error>
            }
            _ => Ok(tiles),
        };
        let query_blocks = grid(query_grad, work_tiles, &query)?;
        let key_blocks = grid(key_grad, key_blocks, &key)?;
        let entries = [instance.prepare, query_grad, query_grad_sum, key_grad];
        entries.iter().try_for_each(|&entry| kernels.ready(entry))?;
        Ok(BackwardPlan {
            problem: params,
            tensors,
            lse: saved.lse.data,
            d_lse: saved.d_lse.map_or(0, |d_lse| d_lse.data),
            d_past_gate: gradients.d_past_gate,
            row_lse: workspace.reserve("row_lse", 4, &[batch, heads, row_pitch])?,
            row_delta: workspace.reserve("row_delta", 4, &[batch, heads, row_pitch])?,
            partial_d_q: workspace.reserve(
                "partial_d_q",
                4,
                &[split, problem.all_rows(), heads, problem.head_dim()],
            )?,
            partial_gate: workspace.reserve(
                "partial_gate",
                4,
                &[max_splits, problem.all_rows(), heads, GATE_SUMS],
            )?,
            work_counter: match hopper {
                Some(_) => {
                    let counters = [groups.launches().count(), WORK_COUNTERS];
                    workspace.reserve("work_counter", 4, &counters)?
                }
                None => Address::NULL,
            },
            ds: match groups.ds_bytes {
                0 => Address::NULL,
                bytes => workspace.reserve("ds", bytes, &[])?,
            },
            workspace,
            row_pitch: count("row_pitch", &[row_pitch])?,
            tiles: count("tiles", &[tiles])?,
            max_splits: count("KV splits", &[max_splits])?,
            groups,
            passes: [
                launch(key_grad, key_blocks, &key),
                launch(query_grad, query_blocks, &query),
            ],
            prepare: launch(instance.prepare, prepare_blocks, &prepare),
            sum: row_launch(query_grad_sum, &[batch, heads, sum_rows])?,
        })
    }

    /// Bytes of device memory that [`run`](Self::run) needs, at a multiple of 256.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace.bytes()
    }

    /// Enqueues the call on the launcher's stream: the copy of the host values, then the kernels.
    ///
    /// # Safety
    /// As [`super::ForwardPlan::run`], for every address of the problem, of what was saved and of the gradients.
    ///
    /// # Errors
    /// As [`super::ForwardPlan::run`].
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
        self.workspace.check(workspace)?;
        let params = self.params(workspace.data);
        let mut launches = vec![(&self.prepare, params)];
        for (i, (first, groups)) in self.groups.launches().enumerate() {
            let mut params = params;
            params.first_group = first as i32;
            params.groups = groups as i32;
            if self.work_counter != Address::NULL {
                params.work_counter = params.work_counter.wrapping_add(i * WORK_COUNTERS);
            }
            launches.extend(self.passes.iter().map(|pass| (pass, params)));
        }
        launches.push((&self.sum, params));
        // SAFETY: the caller's promise; `params` is the struct of these entry points.
        unsafe {
            if self.problem.rows() == 0 && self.d_past_gate.len > 0 {
                // The kernels that write d_past_gate have no blocks without query rows.
                launcher.zero(self.d_past_gate.data, 4 * self.d_past_gate.len)?;
            }
            if self.work_counter != Address::NULL {
                let counters = self.groups.launches().count() * WORK_COUNTERS;
                launcher.zero(params.work_counter as u64, 4 * counters)?;
            }
            for (launch, params) in launches.iter().filter(|(launch, _)| launch.blocks > 0) {
                launcher.launch(launch, params)?;
            }
        }
        Ok(())
    }

    fn params(&self, workspace: u64) -> SegattnBackwardParams {
        let [out, d_out, d_q, d_k, d_v, d_prior_k, d_prior_v] =
            self.tensors.map(|tensor| tensor.fill(workspace));
        SegattnBackwardParams {
            problem: self.problem.fill(workspace),
            out,
            d_out,
            lse: Address::Device(self.lse).at(workspace),
            d_lse: Address::Device(self.d_lse).at(workspace),
            d_q,
            d_k,
            d_v,
            d_prior_k,
            d_prior_v,
            d_past_gate: Address::Device(self.d_past_gate.data).at(workspace),
            row_lse: self.row_lse.at(workspace),
            row_delta: self.row_delta.at(workspace),
            partial_d_q: self.partial_d_q.at(workspace),
            partial_gate: self.partial_gate.at(workspace),
            work_counter: self.work_counter.at(workspace),
            ds: self.ds.at(workspace),
            row_pitch: self.row_pitch as i32,
            tiles: self.tiles as i32,
            max_splits: self.max_splits as i32,
            first_group: 0,
            groups: self.groups.all as i32,
        }
    }
}

/// Every tensor of the call besides the problem's.
fn named<'a>(
    saved: &'a Saved<Tensor<'a>, DeviceSlice>,
    gradients: &'a Gradients<Tensor<'a>, DeviceSlice>,
) -> [(&'static str, Option<&'a Tensor<'a>>); 7] {
    let prior = gradients.d_prior.as_ref();
    [
        ("out", Some(&saved.out)),
        ("d_out", Some(&saved.d_out)),
        ("d_q", Some(&gradients.d_q)),
        ("d_k", Some(&gradients.d_k)),
        ("d_v", Some(&gradients.d_v)),
        ("d_prior_k", prior.map(|(d_k, _)| d_k)),
        ("d_prior_v", prior.map(|(_, d_v)| d_v)),
    ]
}

fn check(
    problem: &Problem<'_, Tensor<'_>>,
    saved: &Saved<Tensor<'_>, DeviceSlice>,
    gradients: &Gradients<Tensor<'_>, DeviceSlice>,
) -> Result<(), Error> {
    problem.validate_backward(saved, gradients)?;
    check_tensors(problem, named(saved, gradients))?;
    saved.lse.check_alignment("lse")?;
    if let Some(d_lse) = saved.d_lse {
        d_lse.check_alignment("d_lse")?;
    }
    gradients.d_past_gate.check_alignment("d_past_gate")
}

/// The launch of a kernel with one warp a row.
fn row_launch(entry: Entry, rows: &[usize]) -> Result<Launch, Error> {
    let rows = rows
        .iter()
        .fold(1, |product: usize, &n| product.saturating_mul(n));
    Ok(Launch {
        entry,
        blocks: count("blocks of a grid", &[rows.div_ceil(ROWS_PER_BLOCK)])?,
        threads: ROW_THREADS,
        shared_bytes: 0,
        overlaps: false,
    })
}
