//! The kernels on a GPU: device-event times under criterion, after a check of the same tensors, against PyTorch's
//! FlashAttention-2, cuDNN and FlexAttention, cuDNN in one call, and FlashAttention-3, at equal visible pairs.
//!
//! Parts are `decode`, `gates` (what heads with a gate of 0 cost), `products` (backward by seven and by five) and
//! `prefill`; `-- decode` runs one of them, `-- 'gates|decode D64'` whatever has one of these texts in its name. `SEGATTN_BENCH_S` (segment lengths),
//! `SEGATTN_BENCH_FLEX` (those for which FlexAttention is compiled, which takes its time) and `SEGATTN_BENCH_SECONDS`
//! (no case begins later) narrow a run. `SEGATTN_BENCH_FA3` is the path of FlashAttention-3's library
//! (benches/attention_gpu/fa3.py says which); without it, and without a Python package, a peer has no figures. Raw
//! results go to `SEGATTN_BENCH_RUNS`, by default benches/runs/.

mod case;
mod check;
#[path = "../measure/date.rs"]
mod date;
mod peers;
mod report;

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::Criterion;
use cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;
use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr};
use segattn::attention::cuda::{BackwardPlan, DeviceSlice, ForwardPlan, Products};
use segattn::attention::{Gradients, Saved};
use segattn::cuda::kernels::DriverKernels;
use segattn::cuda::{DeviceInfo, alloc};

use case::{Case, Data, Source};
use peers::Peers;
use report::{Report, Row};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Numbers of an environment variable, or a default.
fn list(name: &str, default: &[usize]) -> Vec<usize> {
    match std::env::var(name) {
        Ok(text) => text
            .split(',')
            .filter_map(|n| n.trim().parse().ok())
            .collect(),
        Err(_) => default.to_vec(),
    }
}

/// Which peers are asked for a case.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Ask {
    Nobody,
    All,
    /// All but FlexAttention.
    NoFlex,
}

/// Every case, its part of the bench and whom to ask for it: the short parts first.
fn cases() -> Vec<(&'static str, Case, Ask)> {
    let segments = list("SEGATTN_BENCH_S", &[512, 1024, 2048, 4096, 8192, 16_384]);
    let flex = list("SEGATTN_BENCH_FLEX", &segments);
    let mut cases = Vec::new();
    for head_dim in [128, 64] {
        for keys in [1024, 5120, 8192, 32_768] {
            for batch in [1, 8, 64] {
                cases.push(("decode", Case::decode(head_dim, batch, keys), Ask::NoFlex));
            }
        }
    }
    for head_dim in [128, 64] {
        let bases = [
            Case::decode(head_dim, 8, 5120),
            Case::prefill(head_dim, 512, 512, 0),
            Case::prefill(head_dim, 4096, 4096, 0),
        ];
        for base in bases {
            // A past that nobody reads; one that a quarter of the heads read.
            for reading in [0, base.kv_heads / 4] {
                let case = base.gated(32_768, reading);
                cases.push(("gates", case.without_closed(), Ask::Nobody));
                cases.push(("gates", case, Ask::Nobody));
            }
        }
    }
    for &segment in &segments {
        for [prior, past] in [[segment, 0], [segment / 8, 512]] {
            let case = Case::prefill(128, segment, prior, past);
            cases.push(("products", case, Ask::Nobody));
        }
    }
    for head_dim in [128, 64] {
        for &segment in &segments {
            for prior in [segment, segment / 8] {
                for past in [0, 512, 32_768] {
                    let case = Case::prefill(head_dim, segment, prior, past);
                    let ask = match flex.contains(&segment) {
                        true => Ask::All,
                        false => Ask::NoFlex,
                    };
                    cases.push(("prefill", case, ask));
                }
            }
        }
    }
    cases
}

/// The name of a measured pass, which a filter is looked for in.
fn pass_name(part: &str, pass: &str, case: &Case) -> String {
    format!("{part}/{pass} {}", case.name())
}

/// The backward passes of a part's case, by name.
fn backward_passes(part: &str, case: &Case) -> Vec<(&'static str, Products)> {
    let ds_bytes = 512 << 20;
    match part {
        _ if case.is_decode() => Vec::new(),
        "products" => vec![
            ("backward by seven", Products::Seven),
            ("backward by five", Products::Five { ds_bytes }),
        ],
        _ => vec![("backward", Products::Fastest)],
    }
}

/// Whether a pass is wanted: all are, or those with the first argument, or one of several between `|`, in their names.
fn is_wanted(name: &str) -> bool {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    filter.is_none_or(|filter| filter.split('|').any(|text| name.contains(text)))
}

/// Device events around work on a stream.
struct Clock {
    stream: Arc<CudaStream>,
    begin: CudaEvent,
    end: CudaEvent,
}

impl Clock {
    fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        let event = || stream.context().new_event(Some(CU_EVENT_DEFAULT));
        Ok(Clock {
            stream: stream.clone(),
            begin: event()?,
            end: event()?,
        })
    }

    /// How long the work took on the device.
    fn time(&self, work: impl FnOnce()) -> Result<Duration> {
        self.begin.record(&self.stream)?;
        work();
        self.end.record(&self.stream)?;
        self.end.synchronize()?;
        let milliseconds = self.begin.elapsed_ms(&self.end)?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds) / 1e3))
    }
}

/// Bytes a second of a copy on the device, read and written together.
fn bandwidth(clock: &Clock, source: &Source) -> Result<f64> {
    let from = source.tensor(1 << 28, 1)?;
    let mut to = source.tensor(1 << 28, 2)?;
    let mut best = Duration::MAX;
    for _ in 0..10 {
        let copied = clock.time(|| clock.stream.memcpy_dtod(&from, &mut to).expect("a copy"))?;
        best = best.min(copied);
    }
    Ok(4.0 * from.len() as f64 / best.as_secs_f64())
}

fn workspace(stream: &Arc<CudaStream>, bytes: usize) -> Result<CudaSlice<u8>> {
    // SAFETY: kernels read of it only what they wrote.
    Ok(unsafe { alloc(stream, bytes.max(1)) }?)
}

/// A forward call and its memory.
struct Call {
    data: Data,
    plan: ForwardPlan,
    memory: CudaSlice<u8>,
}

impl Call {
    fn new(case: &Case, source: &Source, kernels: &DriverKernels) -> Result<Self> {
        let mut data = Data::new(case, source)?;
        let (out, lse) = (data.tensor(case::OUT), data.lse());
        let plan = ForwardPlan::new(&data.problem(), &out, lse, None, kernels)?;
        let memory = workspace(&data.stream, plan.workspace_bytes())?;
        Ok(Call { data, plan, memory })
    }

    fn workspace(&self) -> DeviceSlice {
        let address = self.memory.device_ptr(&self.data.stream).0;
        DeviceSlice::new(address, self.memory.len())
    }
}

struct Bench<'a> {
    kernels: Arc<DriverKernels>,
    stream: Arc<CudaStream>,
    clock: Clock,
    criterion: &'a mut Criterion,
    peers: std::result::Result<Peers, String>,
    report: Report,
}

impl Bench<'_> {
    /// Seconds of one run of the work, by criterion.
    fn measure(&mut self, name: &str, mut work: impl FnMut()) -> f64 {
        let mut best = f64::INFINITY;
        let clock = &self.clock;
        self.criterion.bench_function(name, |bencher| {
            bencher.iter_custom(|iterations| {
                let time = clock.time(|| (0..iterations).for_each(|_| work()));
                let time = time.expect("a timed run");
                best = best.min(time.as_secs_f64() / iterations as f64);
                time
            });
        });
        best
    }

    /// Checks and times what is wanted of a case: forward and, where there is one, backward.
    fn case(&mut self, part: &str, case: &Case, source: &Source, ask: Ask) -> Result<()> {
        let forward = pass_name(part, "forward", case);
        let forward = Some(forward).filter(|name| part != "products" && is_wanted(name));
        let mut backward = backward_passes(part, case);
        backward.retain(|(pass, _)| is_wanted(&pass_name(part, pass, case)));
        if forward.is_none() && backward.is_empty() {
            return Ok(());
        }
        let stream = self.stream.clone();
        let kernels = self.kernels.clone();
        let mut launcher = kernels.on(&stream)?;
        let calls = (0..case.copies()).map(|_| Call::new(case, source, &kernels));
        let mut calls = calls.collect::<Result<Vec<_>>>()?;
        for call in &calls {
            // SAFETY: here and below: every address is that of a slice in a call's `data` or `memory`, or in `memory`,
            // which live until the clock has waited for the stream; the lengths are those of the slices.
            unsafe { call.plan.run(&mut launcher, call.workspace()) }?;
        }
        check::forward(&calls[0].data)?;
        if let Some(forward) = forward {
            // The host's values are in the workspace already, as in a captured step.
            let mut turns = (0..calls.len()).cycle();
            let seconds = self.measure(&forward, || {
                let call = &calls[turns.next().unwrap_or_default()];
                unsafe { call.plan.launch(&mut launcher, call.workspace()) }.expect("a launch");
            });
            self.finish(case, "forward", seconds, ask);
        }
        if backward.is_empty() {
            return Ok(());
        }
        let data = &mut calls[0].data;
        let saved = Saved {
            out: data.tensor(case::OUT),
            lse: data.lse(),
            d_out: data.tensor(case::D_OUT),
            d_lse: None,
        };
        let gradients = Gradients {
            d_q: data.tensor(case::D_Q),
            d_k: data.tensor(case::D_K),
            d_v: data.tensor(case::D_V),
            d_prior: Some((data.tensor(case::D_PRIOR_K), data.tensor(case::D_PRIOR_V))),
            d_past_gate: data.d_past_gate(),
        };
        for (pass, products) in backward {
            let (problem, kernels) = (data.problem(), &*kernels);
            let plan =
                BackwardPlan::with_products(&problem, &saved, &gradients, kernels, products)?;
            let memory = workspace(&stream, plan.workspace_bytes())?;
            let workspace = DeviceSlice::new(memory.device_ptr(&stream).0, memory.len());
            unsafe { plan.run(&mut launcher, workspace) }?;
            check::backward(data)?;
            let seconds = self.measure(&pass_name(part, pass, case), || {
                unsafe { plan.launch(&mut launcher, workspace) }.expect("a launch");
            });
            self.finish(case, pass, seconds, ask);
        }
        Ok(())
    }

    fn finish(&mut self, case: &Case, pass: &'static str, seconds: f64, ask: Ask) {
        let peers = match &mut self.peers {
            _ if ask == Ask::Nobody => Err("not asked".into()),
            Ok(peers) => peers.time(case, pass != "forward", ask == Ask::All),
            Err(missing) => Err(missing.clone()),
        };
        self.report.push(Row::new(case, pass, seconds, peers));
    }
}

/// Runs everything on a GPU.
pub fn run(context: &Arc<CudaContext>, criterion: &mut Criterion) -> Result<()> {
    let begin = Instant::now();
    let limit = list("SEGATTN_BENCH_SECONDS", &[usize::MAX])[0] as u64;
    let stream = context.new_stream()?;
    let (clock, source) = (Clock::new(&stream)?, Source::new(&stream)?);
    let peers = Peers::start();
    let (hello, peak) = match &peers {
        Ok(peers) => (peers.hello.clone(), peers.hello["peak"].as_f64()),
        Err(missing) => {
            println!("no peers are measured: {missing}");
            (serde_json::Value::Null, None)
        }
    };
    let report = Report::new(
        DeviceInfo::of(context)?,
        hello,
        peak,
        bandwidth(&clock, &source)?,
    );
    let mut bench = Bench {
        kernels: Arc::new(DriverKernels::new(context)?),
        stream,
        clock,
        criterion,
        peers,
        report,
    };
    for (part, case, ask) in cases() {
        if begin.elapsed().as_secs() >= limit {
            println!("left out for lack of time: {}", case.name());
            continue;
        }
        if let Err(error) = bench.case(part, &case, &source, ask) {
            println!("{}: {error}", case.name());
        }
    }
    bench.report.finish()
}
