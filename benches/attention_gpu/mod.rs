//! The kernels on a GPU: device-event times under criterion, after a check of the same tensors, against PyTorch's
//! FlashAttention-2, cuDNN and FlexAttention at equal visible pairs.
//!
//! `SEGATTN_BENCH_S` (segment lengths), `SEGATTN_BENCH_FLEX` (those for which FlexAttention is compiled, which takes its
//! time) and `SEGATTN_BENCH_SECONDS` (no case begins later) narrow a run. Raw results go to `SEGATTN_BENCH_RUNS`, by
//! default benches/runs/.

mod case;
mod check;
mod peers;
mod report;

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::Criterion;
use cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DevicePtr};
use segattn::attention::cuda::{
    BackwardPlan, DeviceSlice, DriverKernels, ForwardPlan, Gradients, Saved,
};
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

/// Every case and whether FlexAttention is asked for it.
fn cases() -> Vec<(Case, bool)> {
    let segments = list("SEGATTN_BENCH_S", &[512, 1024, 2048, 4096, 8192, 16_384]);
    let flex = list("SEGATTN_BENCH_FLEX", &segments);
    let mut cases = Vec::new();
    for head_dim in [128, 64] {
        for &segment in &segments {
            for prior in [segment, segment / 8] {
                for past in [0, 512, 32_768] {
                    let case = Case::prefill(head_dim, segment, prior, past);
                    cases.push((case, flex.contains(&segment)));
                }
            }
        }
        for batch in [1, 8, 64] {
            cases.push((Case::decode(head_dim, batch), false));
        }
    }
    cases
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

struct Bench<'a> {
    kernels: DriverKernels,
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

    fn workspace(&self, bytes: usize) -> Result<cudarc::driver::CudaSlice<u8>> {
        // SAFETY: kernels read of it only what they wrote.
        Ok(unsafe { alloc(&self.stream, bytes.max(1)) }?)
    }

    /// Checks and times a case, forward and, where there is one, backward.
    fn case(&mut self, case: &Case, source: &Source, flex: bool) -> Result<()> {
        let mut data = Data::new(case, source)?;
        let (out, lse) = (data.tensor(case::OUT), data.lse());
        let plan = ForwardPlan::new(&data.problem(), &out, lse, None, &self.kernels)?;
        let memory = self.workspace(plan.workspace_bytes())?;
        let workspace = DeviceSlice::new(memory.device_ptr(&self.stream).0, memory.len());
        // SAFETY: here and below: every address is that of a slice in `data` or of `memory`, which live until the
        // clock has waited for the stream; the lengths are those of the slices.
        unsafe { plan.run(&mut self.kernels.on(&self.stream)?, workspace) }?;
        check::forward(&data)?;
        let (stream, name) = (self.stream.clone(), case.name());
        let kernels = DriverKernels::new(stream.context())?;
        let mut launcher = kernels.on(&stream)?;
        // The host's values are in the workspace already, as in a captured step.
        let seconds = self.measure(&format!("forward {name}"), || {
            unsafe { plan.launch(&mut launcher, workspace) }.expect("a launch");
        });
        self.finish(case, false, seconds, flex);
        if case.is_decode() {
            return Ok(());
        }
        let saved = Saved {
            out,
            lse,
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
        let plan = BackwardPlan::new(&data.problem(), &saved, &gradients, &self.kernels)?;
        let memory = self.workspace(plan.workspace_bytes())?;
        let workspace = DeviceSlice::new(memory.device_ptr(&self.stream).0, memory.len());
        unsafe { plan.run(&mut launcher, workspace) }?;
        check::backward(&data)?;
        let seconds = self.measure(&format!("backward {name}"), || {
            unsafe { plan.launch(&mut launcher, workspace) }.expect("a launch");
        });
        self.finish(case, true, seconds, flex);
        Ok(())
    }

    fn finish(&mut self, case: &Case, backward: bool, seconds: f64, flex: bool) {
        let peers = match &mut self.peers {
            Ok(peers) => peers.time(case, backward, flex),
            Err(missing) => Err(missing.clone()),
        };
        self.report.push(Row::new(case, backward, seconds, peers));
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
        kernels: DriverKernels::new(context)?,
        stream,
        clock,
        criterion,
        peers,
        report,
    };
    for (case, flex) in cases() {
        if begin.elapsed().as_secs() >= limit {
            println!("left out for lack of time: {}", case.name());
            continue;
        }
        if let Err(error) = bench.case(&case, &source, flex) {
            println!("{}: {error}", case.name());
        }
    }
    bench.report.finish()
}
