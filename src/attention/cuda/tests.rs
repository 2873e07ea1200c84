//! Plans without a GPU: what they refuse, what they launch and what they write. Forward plans are here.

mod backward;

use super::*;
use crate::attention::{Batch, Gates, Gradients, Layout, Len, Lengths, Problem, Saved};
use crate::cuda::kernels::params::{
    SegattnBackwardParams, SegattnForwardParams, SegattnHopperForwardParams, SegattnKernelInfo,
    SegattnTensorMap,
};
use crate::cuda::kernels::{self, BoxedTensor, Entry, Kernels, Launch, Launcher};

/// Kernels of the sizes that the D 64 ones have, on a device of 8 blocks.
struct Table;

impl Kernels for Table {
    fn info(&self, entry: Entry) -> Result<SegattnKernelInfo, kernels::Error> {
        let forward = size_of::<SegattnForwardParams>() as i32;
        let [tile_rows, key_rows, split_keys, params_bytes] = match entry.name {
            name if name.starts_with("attention_prefill_hopper") => [
                128,
                64,
                8192,
                size_of::<SegattnHopperForwardParams>() as i32,
            ],
            name if name.starts_with("attention_prefill") => [128, 64, 8192, forward],
            name if name.starts_with("attention_decode") => [16, 64, 1024, forward],
            name if name.starts_with("combine") => [4, 0, 0, forward],
            name if name.starts_with("attention_prepare") => {
                [64, 0, 0, size_of::<SegattnBackwardParams>() as i32]
            }
            _ => [128, 32, 8192, size_of::<SegattnBackwardParams>() as i32],
        };
        Ok(SegattnKernelInfo {
            threads: 128,
            shared_bytes: 1000,
            blocks_per_multiprocessor: 2,
            tile_rows,
            key_rows,
            split_keys,
            params_bytes,
        })
    }

    fn ready(&self, _: Entry) -> Result<(), kernels::Error> {
        Ok(())
    }

    fn resident_blocks(&self, _: Entry, _: &SegattnKernelInfo) -> Result<u32, kernels::Error> {
        Ok(8)
    }

    fn hopper(&self) -> bool {
        false
    }

    fn tensor_map(&self, _: &BoxedTensor) -> Result<Option<SegattnTensorMap>, kernels::Error> {
        panic!("no other kernel copies by tensor maps")
    }
}

/// The same where there are kernels for Hopper.
struct HopperTable;

impl Kernels for HopperTable {
    fn info(&self, entry: Entry) -> Result<SegattnKernelInfo, kernels::Error> {
        Table.info(entry)
    }

    fn ready(&self, entry: Entry) -> Result<(), kernels::Error> {
        Table.ready(entry)
    }

    fn resident_blocks(
        &self,
        entry: Entry,
        info: &SegattnKernelInfo,
    ) -> Result<u32, kernels::Error> {
        Table.resident_blocks(entry, info)
    }

    fn hopper(&self) -> bool {
        true
    }

    /// A map that says which tensor it is of.
    fn tensor_map(&self, tensor: &BoxedTensor) -> Result<Option<SegattnTensorMap>, kernels::Error> {
        let mut map = SegattnTensorMap::NONE;
        map.words[0] = tensor.data;
        Ok(Some(map))
    }
}

/// What was asked of a stream.
#[derive(Default)]
struct Recorder {
    uploads: Vec<(u64, Vec<u8>)>,
    zeroed: Vec<(u64, usize)>,
    launches: Vec<(Launch, Vec<u8>)>,
    workspace_end: u64,
}

impl Launcher for Recorder {
    unsafe fn upload(&mut self, to: u64, bytes: &[u8]) -> Result<(), kernels::Error> {
        self.uploads.push((to, bytes.to_vec()));
        Ok(())
    }

    unsafe fn zero(&mut self, at: u64, bytes: usize) -> Result<(), kernels::Error> {
        self.zeroed.push((at, bytes));
        Ok(())
    }

    unsafe fn launch<P: Copy>(
        &mut self,
        launch: &Launch,
        params: &P,
    ) -> Result<(), kernels::Error> {
        // SAFETY: the structs of params.h have no padding between their fields but at most behind the last; bytes
        // there are read, never used.
        let bytes = unsafe {
            std::slice::from_raw_parts(std::ptr::from_ref(params).cast::<u8>(), size_of::<P>())
        };
        self.launches.push((*launch, bytes.to_vec()));
        Ok(())
    }
}

const Q: u64 = 1 << 20;
const WORKSPACE: u64 = 1 << 40;

type GpuProblem<'a> = Problem<'a, Tensor<'a>>;

fn lengths(past: &'static [i32]) -> Lengths<'static> {
    Lengths::segment(&[200, 100]).prior(&[40, 0]).past(past)
}

fn tensor(data: u64, shape: [usize; 4]) -> Tensor<'static> {
    Tensor::packed(data, Dtype::Bf16, shape)
}

/// Two batch elements, as many heads as there are roles on two, `rows` rows of 64.
fn of_heads(
    rows: usize,
    gates: impl Into<Gates<'static>>,
    prior_heads: &'static [bool],
) -> GpuProblem<'static> {
    let kv = |data, rows| tensor(data, [2, rows, 2, 64]);
    let q = tensor(Q, [2, rows, prior_heads.len(), 64]);
    Problem::causal(q, kv(Q + 16, 200), kv(Q + 32, 200))
        .prior(kv(Q + 48, 40), kv(Q + 64, 40), prior_heads)
        .past(kv(Q + 80, 70_000), kv(Q + 96, 70_000), gates)
        .lengths(lengths(&[70, 0]))
}

/// Two batch elements, four heads on two, 200 rows of 64.
fn problem() -> GpuProblem<'static> {
    of_heads(200, &[0.0, 0.0, 1.0, 0.5], &[true, true, false, false])
}

/// Two batch elements, four heads on two, one row.
fn one_row() -> GpuProblem<'static> {
    of_heads(1, &[0.0, 0.0, 1.0, 0.5], &[true, true, false, false])
}

fn with_gates<'a>(problem: GpuProblem<'a>, gates: impl Into<Gates<'a>>) -> GpuProblem<'a> {
    let past = problem.past.expect("a past");
    problem.past(past.k, past.v, gates)
}

fn plan(problem: &GpuProblem<'_>, phase: Option<Phase>) -> Result<ForwardPlan, Error> {
    let numbers = problem.batch() * problem.q_heads() * problem.rows();
    let lse = DeviceSlice::new(4096, numbers);
    ForwardPlan::new(problem, &problem.q, lse, phase, &Table)
}

fn workspace(bytes: usize) -> DeviceSlice {
    DeviceSlice::new(WORKSPACE, bytes)
}

fn params<P: Copy>(bytes: &[u8]) -> P {
    assert_eq!(bytes.len(), size_of::<P>());
    // SAFETY: the recorder copied the bytes from a `P`, as the caller knows from the launch.
    unsafe { bytes.as_ptr().cast::<P>().read_unaligned() }
}

fn forward_params(bytes: &[u8]) -> SegattnForwardParams {
    params(bytes)
}

/// Entry points and numbers of blocks.
fn launches(recorder: &Recorder) -> Vec<(&'static str, u32)> {
    let launches = recorder.launches.iter();
    launches
        .map(|(launch, _)| (launch.entry.name, launch.blocks))
        .collect()
}

fn run(plan: &ForwardPlan) -> Recorder {
    let mut recorder = Recorder::default();
    // SAFETY: a recorder touches no memory.
    unsafe { plan.run(&mut recorder, workspace(plan.workspace_bytes())) }.expect("a plan");
    recorder
}

#[test]
fn host_values_travel_and_are_pointed_at() {
    let plan = plan(&problem(), None).expect("a plan");
    assert_eq!(plan.phase(), Phase::Prefill);
    let recorder = run(&plan);
    let [(launch, bytes)] = &recorder.launches[..] else {
        panic!("one launch: nothing is split")
    };
    assert_eq!(launch.entry.name, "attention_prefill_bf16_d64");
    let params = forward_params(bytes);
    assert_eq!(
        (params.tiles, params.max_splits, params.packed_heads),
        (2, 1, 1)
    );
    let [(at, uploaded)] = &recorder.uploads[..] else {
        panic!("one copy")
    };
    assert_eq!(*at, WORKSPACE);
    let value = |address: usize| &uploaded[(address as u64 - WORKSPACE) as usize..];
    assert_eq!(
        value(params.problem.segment_len as usize)[..8],
        *bytemuck::bytes_of(&[200i32, 100])
    );
    assert_eq!(
        value(params.problem.past_gate as usize)[8..12],
        1f32.to_ne_bytes()
    );
    assert_eq!(
        value(params.problem.prior_heads as usize)[..4],
        [1, 1, 0, 0]
    );
    assert!(params.problem.query_start.is_null());
    assert_eq!(params.problem.scale, 0.125);
    assert_eq!(recorder.zeroed, [(params.work_counter as u64, 4)]);
    assert_eq!(params.problem.past_v.data as u64, Q + 96);
    assert_eq!(
        (params.problem.past_k.rows, params.problem.past_k.row_stride),
        (70_000, 128)
    );
}

#[test]
fn keys_are_split_by_the_longest_batch_element_and_then_combined() {
    let mut problem = problem();
    problem.lengths = lengths(&[70, 70_000]);
    let long = plan(&problem, None).expect("a plan");
    let recorder = run(&long);
    // 1094 + 2 tiles (of batch element 1) of 64 keys, 128 tiles to a KV split.
    assert_eq!(forward_params(&recorder.launches[0].1).max_splits, 9);
    let combine = &recorder.launches[1].0;
    assert_eq!(
        (combine.entry.name, combine.blocks),
        ("combine_prefill_bf16_d64", 2 * 4 * 200 / 4)
    );
    assert!(long.workspace_bytes() > 9 * 2 * 4 * 200 * 64 * 4);
    let closed = with_gates(problem, &[0.0; 4]);
    assert_eq!(run(&plan(&closed, None).expect("a plan")).launches.len(), 1);
}

#[test]
fn lengths_on_the_device_are_planned_for_at_their_largest() {
    let mut problem = problem();
    problem.lengths = Lengths::segment(Len::Device(256))
        .prior(Len::Device(512))
        .past_per_head(Len::Device(768));
    let recorder = run(&plan(&problem, None).expect("a plan"));
    let params = forward_params(&recorder.launches[0].1);
    assert_eq!(params.max_splits, 9);
    assert_eq!(params.problem.past_len as u64, 768);
    let strides = (
        params.problem.past_len_batch_stride,
        params.problem.past_len_head_stride,
    );
    assert_eq!(strides, (2, 1));
}

/// The same launches and the same host values as long as segments grow; the host's values lie where the caller says.
#[test]
fn a_plan_serves_segments_that_grow() {
    let lengths = Lengths::segment(Len::Device(256))
        .query_start(Len::Device(512))
        .prior(&[40, 0])
        .past_per_head(&[70, 0, 3, 4]);
    let plan = plan(&one_row().lengths(lengths), None).expect("a plan");
    assert_eq!(plan.phase(), Phase::Decode);
    let mut recorder = Recorder::default();
    // SAFETY: a recorder touches no memory.
    unsafe { plan.launch_with(&mut recorder, 8192, workspace(plan.workspace_bytes())) }
        .expect("a launch");
    assert!(recorder.uploads.is_empty());
    let params = forward_params(&recorder.launches[0].1);
    // 1094 tiles of past, one of prior and four of the segment, or 1, in chunks of 16 tiles.
    assert_eq!(params.max_splits, 69);
    let of = &params.problem;
    assert_eq!([of.segment_len as u64, of.query_start as u64], [256, 512]);
    let value = |at: u64, len: usize| -> Vec<i32> {
        let first = (at - 8192) as usize;
        bytemuck::pod_collect_to_vec(&plan.values()[first..first + 4 * len])
    };
    assert_eq!(value(of.prior_len as u64, 2), [40, 0]);
    assert_eq!(value(of.past_len as u64, 4), [70, 0, 3, 4]);
    assert!(params.work_counter as u64 >= WORKSPACE);
}

#[test]
fn heads_share_a_tile_only_where_they_read_the_same() {
    let lengths = Lengths::segment(&[200, 100])
        .prior(&[40, 0])
        .past_per_head(&[70, 0, 3, 4])
        .query_start(&[199, 99]);
    let gates = &[0.5, 1.0, 2.0, 0.1, 0.0, 0.0, 1.0, 1.0];
    for (prior_heads, heads) in [
        (&[true, true, true, true, true, true, false, false], 2),
        (&[true, false, true, true, true, true, false, false], 1),
    ] {
        let problem = of_heads(1, gates, prior_heads).lengths(lengths);
        let plan = plan(&problem, None).expect("a plan");
        let got = (plan.phase(), plan.packed_heads());
        assert_eq!(got, (Phase::Decode, heads));
    }
    let gates = Gates::Device {
        past_gate: 1024,
        reads_past: &[true, true, true, true, false, false, false, false],
    };
    let problem = of_heads(1, gates, &[true; 8]).lengths(lengths);
    let plan = plan(&problem, None).expect("a plan");
    assert_eq!(plan.packed_heads(), 4);
    let params = forward_params(&run(&plan).launches[0].1);
    assert_eq!(params.problem.past_gate as u64, 1024);
    assert_eq!(params.problem.past_len_batch_stride, 2);
}

/// Their lengths are 0 and their gates and roles closed, so that a kernel finds what it always finds.
#[test]
fn sources_that_are_not_there_have_no_rows_and_no_readers() {
    let kv = tensor(Q + 16, [2, 200, 2, 64]);
    let problem = Problem::causal(tensor(Q, [2, 200, 4, 64]), kv, kv);
    let recorder = run(&plan(&problem, None).expect("a plan"));
    let params = forward_params(&recorder.launches[0].1);
    let value = |address: u64, bytes: usize| {
        let first = (address - WORKSPACE) as usize;
        &recorder.uploads[0].1[first..first + bytes]
    };
    let of = &params.problem;
    assert_eq!(
        *value(of.segment_len as u64, 8),
        *bytemuck::bytes_of(&[200i32; 2])
    );
    for (address, bytes) in [
        (of.prior_len as u64, 8),
        (of.past_len as u64, 8),
        (of.past_gate as u64, 16),
        (of.prior_heads as u64, 4),
    ] {
        assert!(value(address, bytes).iter().all(|&byte| byte == 0));
    }
    assert!(of.past_k.data.is_null() && of.prior_v.rows == 0);
}

#[test]
fn batch_elements_that_lie_anywhere_have_their_offsets_copied() {
    let mut problem = problem();
    let offsets = [1 << 35, 64];
    problem.k = Tensor {
        data: Q,
        len: 1 << 36,
        dtype: Dtype::Bf16,
        layout: Layout {
            rows: 200,
            heads: 2,
            head_dim: 64,
            row_stride: 128,
            head_stride: 64,
            batch: Batch::Offsets(&offsets),
        },
    };
    let recorder = run(&plan(&problem, None).expect("a plan"));
    let params = forward_params(&recorder.launches[0].1);
    let at = params.problem.k.batch_offsets as u64 - WORKSPACE;
    assert_eq!(
        recorder.uploads[0].1[at as usize..][..16],
        *bytemuck::bytes_of(&[1i64 << 35, 64])
    );
    problem.k.len = 1 << 35;
    let refused = plan(&problem, None).expect_err("out of bounds").to_string();
    assert!(
        refused.starts_with("k: batch element 0: expected at least"),
        "{refused}"
    );
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let refused = |change: fn(&mut GpuProblem<'static>)| {
        let mut problem = problem();
        change(&mut problem);
        plan(&problem, None).expect_err("refused").to_string()
    };
    let of_80 = |p: &mut GpuProblem<'static>| p.q = tensor(Q, [2, 200, 4, 80]);
    assert!(refused(of_80).starts_with("no kernel for bf16 with head_dim 80"));
    assert_eq!(
        refused(|p| p.v.dtype = Dtype::F16),
        "v: expected bf16 like q, got f16"
    );
    assert!(refused(|p| p.v.data += 8).starts_with("v: expected an address"));
    assert!(
        refused(|p| p.prior.as_mut().expect("a prior").k.layout.head_stride = 65)
            .starts_with("prior_k: ")
    );
    assert!(refused(|p| *p = with_gates(*p, &[1.0; 3])).starts_with("past_gate: "));
    assert!(refused(|p| *p = with_gates(*p, &[1.0, 0.0, -1.0, 0.0])).starts_with("past_gate[2]: "));
    assert!(refused(|p| p.lengths = lengths(&[70_001, 0])).starts_with("past_len[0]: "));
    assert!(
        refused(|p| p.past.as_mut().expect("a past").v.len = 64)
            .starts_with("past_v: batch element 0")
    );
    let lse = DeviceSlice::new(4096, 7);
    let error = ForwardPlan::new(&problem(), &problem().q, lse, None, &Table).expect_err("lse");
    assert!(error.to_string().starts_with("lse: "), "{error}");
}

#[test]
fn a_workspace_that_is_too_small_launches_nothing() {
    let plan = plan(&problem(), None).expect("a plan");
    for workspace in [
        workspace(plan.workspace_bytes() - 1),
        DeviceSlice::new(WORKSPACE + 8, plan.workspace_bytes()),
        DeviceSlice::new(0, plan.workspace_bytes()),
    ] {
        let mut recorder = Recorder::default();
        // SAFETY: a recorder touches no memory.
        let result = unsafe { plan.run(&mut recorder, workspace) };
        assert!(matches!(result, Err(Error::Workspace { .. })));
        assert!(recorder.uploads.is_empty() && recorder.launches.is_empty());
    }
}

#[test]
fn an_empty_batch_launches_nothing() {
    let (q, kv) = (tensor(0, [0, 200, 4, 64]), tensor(0, [0, 200, 2, 64]));
    let problem = Problem::causal(q, kv, kv)
        .prior(kv, kv, &[true; 4])
        .past(kv, kv, &[1.0; 4]);
    assert!(
        run(&plan(&problem, None).expect("a plan"))
            .launches
            .is_empty()
    );
}

/// Maps of the tensors that have rows, in the problem's order, and where each batch element lies in them.
#[test]
fn a_prefill_for_hopper_gets_maps_of_the_tensors() {
    let mut problem = problem();
    let offsets = [1 << 20, 128];
    problem.v.len = 1 << 21;
    problem.v.layout.batch = Batch::Offsets(&offsets);
    problem.prior = None;
    let lse = DeviceSlice::new(4096, 2 * 4 * 200);
    let problem = problem.lengths(Lengths::segment(&[200, 100]).past(&[70, 0]));
    let plan = ForwardPlan::new(&problem, &problem.q, lse, None, &HopperTable).expect("a plan");
    let recorder = run(&plan);
    let (launch, bytes) = &recorder.launches[0];
    assert_eq!(launch.entry.name, "attention_prefill_hopper_bf16_d64");
    assert_eq!(bytes.len(), size_of::<SegattnHopperForwardParams>());
    // SAFETY: the bytes are those of such a struct.
    let params = unsafe {
        bytes
            .as_ptr()
            .cast::<SegattnHopperForwardParams>()
            .read_unaligned()
    };
    assert_eq!(params.mapped, 0b110_0111);
    let data = params.maps.map(|map| map.words[0]);
    assert_eq!(data, [Q, Q + 16, Q + 32, 0, 0, Q + 80, Q + 96]);
    let at = (params.batch_coordinates as u64 - WORKSPACE) as usize;
    let coordinates: Vec<i32> = bytemuck::pod_collect_to_vec(&recorder.uploads[0].1[at..at + 56]);
    assert_eq!(
        coordinates,
        [0, 0, 1 << 13, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1]
    );
}
