//! Attention on the CPU against a plain f32 version in the same run, and against the machine: its
//! peak of fused multiply-adds for whole segments, its memory bandwidth for decoding.
//!
//! `cargo bench --bench attention`; the tables come last, for one thread and all, AVX-512 and AVX2. With
//! `-- table`, a filter that no name matches, only they come. With `--features cuda`, the kernels on a GPU instead
//! where there is one (`attention_gpu`).

#[cfg(feature = "cuda")]
mod attention_gpu;

#[path = "../tests/attention_cases/plain.rs"]
mod plain;

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::Criterion;
use plain::Upstream;
use rayon::ThreadPoolBuilder;
use rayon::prelude::*;
use segattn::attention::{
    Gradients, HostProblem, Lengths, PerSource, Problem, Saved, Source, View, ViewMut, cpu,
};
use segattn::isa::Isa;

const Q_HEADS: usize = 4;
const KV_HEADS: usize = 2;

/// One batch element with its tensors.
struct Data {
    head_dim: usize,
    lens: PerSource<i32>,
    query_start: [i32; 1],
    /// Tensors of queries and of the keys and values of each source.
    q: Vec<f32>,
    kv: PerSource<[Vec<f32>; 2]>,
    d_out: Vec<f32>,
}

fn numbers(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

impl Data {
    fn new(head_dim: usize, lens: PerSource<i32>, query_rows: usize) -> Self {
        let q_len = query_rows * Q_HEADS * head_dim;
        Data {
            head_dim,
            lens,
            query_start: [lens.current - query_rows as i32],
            q: numbers(q_len, 1),
            kv: PerSource::from_fn(|source| {
                let len = lens[source] as usize * KV_HEADS * head_dim;
                [2, 3].map(|seed| numbers(len, 2 * source as u32 + seed))
            }),
            d_out: numbers(q_len, 9),
        }
    }

    fn q_shape(&self) -> [usize; 4] {
        let width = Q_HEADS * self.head_dim;
        [1, self.q.len() / width, Q_HEADS, self.head_dim]
    }

    fn kv_shape(&self, source: Source) -> [usize; 4] {
        [1, self.lens[source] as usize, KV_HEADS, self.head_dim]
    }

    fn problem(&self) -> HostProblem<'_, f32> {
        let views = |source| {
            let shape = self.kv_shape(source);
            let [k, v] = &self.kv[source];
            (View::packed(k, shape), View::packed(v, shape))
        };
        let ((k, v), (prior_k, prior_v)) = (views(Source::Current), views(Source::Prior));
        let (past_k, past_v) = views(Source::Past);
        Problem::causal(View::packed(&self.q, self.q_shape()), k, v)
            .prior(prior_k, prior_v, &[true; Q_HEADS])
            .past(past_k, past_v, &[1.0; Q_HEADS])
            .lengths(Lengths::default().query_start(&self.query_start))
    }

    /// Multiply-adds of a pass, counted as two operations, over the keys each row sees.
    fn operations(&self, backward: bool) -> f64 {
        let PerSource {
            past,
            prior,
            current,
        } = self.lens.map(f64::from);
        let own = current * (current + 1.0) / 2.0 + current * prior;
        let past = current * past;
        let products = if backward {
            5.0 * own + 3.0 * past
        } else {
            2.0 * (own + past)
        };
        2.0 * products * (Q_HEADS * self.head_dim) as f64
    }
}

/// Results, reused by every run.
struct Results {
    isa: Isa,
    out: Vec<f32>,
    lse: Vec<f32>,
    grads: [Vec<f32>; 6],
}

impl Results {
    fn new(data: &Data) -> Self {
        Self::on(Isa::best(), data)
    }

    fn on(isa: Isa, data: &Data) -> Self {
        let kv = |source: Source| vec![0.0; data.kv[source][0].len()];
        Results {
            isa,
            out: vec![0.0; data.q.len()],
            lse: vec![0.0; data.q.len() / data.head_dim],
            grads: [
                vec![0.0; data.q.len()],
                kv(Source::Current),
                kv(Source::Current),
                kv(Source::Prior),
                kv(Source::Prior),
                vec![0.0; Q_HEADS],
            ],
        }
    }

    fn forward(&mut self, data: &Data) {
        let out = ViewMut::packed(&mut self.out, data.q_shape());
        cpu::forward_on(self.isa, &data.problem(), out, &mut self.lse).expect("a valid problem");
    }

    fn backward(&mut self, data: &Data) {
        let [d_q, d_k, d_v, d_prior_k, d_prior_v, d_past_gate] = &mut self.grads;
        let kv = |source| data.kv_shape(source);
        let gradients = Gradients {
            d_q: ViewMut::packed(d_q, data.q_shape()),
            d_k: ViewMut::packed(d_k, kv(Source::Current)),
            d_v: ViewMut::packed(d_v, kv(Source::Current)),
            d_prior: Some((
                ViewMut::packed(d_prior_k, kv(Source::Prior)),
                ViewMut::packed(d_prior_v, kv(Source::Prior)),
            )),
            d_past_gate: &mut d_past_gate[..],
        };
        let saved = Saved {
            out: View::packed(&self.out[..], data.q_shape()),
            lse: &self.lse[..],
            d_out: View::packed(&data.d_out[..], data.q_shape()),
            d_lse: None,
        };
        cpu::backward_on(self.isa, &data.problem(), &saved, gradients).expect("a valid problem");
    }
}

/// The shortest of several runs.
fn best(runs: usize, mut f: impl FnMut()) -> f64 {
    (0..runs)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

#[cfg(target_arch = "x86_64")]
mod fma {
    use std::arch::x86_64::*;

    /// # Safety
    /// AVX-512F.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn chains512(steps: usize) -> f32 {
        let mut sums = [_mm512_set1_ps(1.0); 16];
        let factor = _mm512_set1_ps(std::hint::black_box(0.999));
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, factor, factor);
            }
        }
        sums.iter().map(|sum| _mm512_reduce_add_ps(*sum)).sum()
    }

    /// # Safety
    /// AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn chains256(steps: usize) -> f32 {
        let mut sums = [_mm256_set1_ps(1.0); 12];
        let factor = _mm256_set1_ps(std::hint::black_box(0.999));
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, factor, factor);
            }
        }
        sums.iter().map(|sum| _mm256_cvtss_f32(*sum)).sum()
    }
}

/// Operations per second of nothing but fused multiply-adds on every thread, where that is known.
fn peak(isa: Isa) -> Option<f64> {
    const STEPS: usize = 400_000;
    let on_all = |per_step: usize, f: &(dyn Fn() -> f32 + Sync)| {
        let seconds = best(20, || {
            rayon::broadcast(|_| black_box(f()));
        });
        (rayon::current_num_threads() * STEPS * per_step * 2) as f64 / seconds
    };
    #[cfg(target_arch = "x86_64")]
    match isa {
        // SAFETY: the instruction set is there; also below.
        Isa::Avx512 => return Some(on_all(16 * 16, &|| unsafe { fma::chains512(STEPS) })),
        Isa::Avx2 => return Some(on_all(12 * 8, &|| unsafe { fma::chains256(STEPS) })),
        Isa::Portable => {}
    }
    let _ = (isa, on_all);
    None
}

/// Bytes per second of reading far more than the caches hold, on every thread.
fn bandwidth() -> f64 {
    let words = vec![1u64; 1 << 25];
    let seconds = best(5, || {
        let sum = words
            .par_chunks(1 << 20)
            .map(|part| part.iter().fold(0u64, |a, b| a.wrapping_add(*b)))
            .sum::<u64>();
        black_box(sum);
    });
    (words.len() * 8) as f64 / seconds
}

/// As many prior as past rows.
const fn lens(current: i32, others: i32) -> PerSource<i32> {
    PerSource {
        past: others,
        prior: others,
        current,
    }
}

/// Segments of the tables: head_dim, and rows.
const SEGMENTS: [(usize, PerSource<i32>); 6] = [
    (64, lens(512, 0)),
    (64, lens(2048, 0)),
    (64, lens(2048, 512)),
    (128, lens(512, 0)),
    (128, lens(2048, 0)),
    (128, lens(512, 256)),
];
/// Decoding: one row of a long segment.
const DECODING: PerSource<i32> = lens(1 << 16, 512);

fn segment_name(head_dim: usize, lens: PerSource<i32>) -> String {
    format!(
        "D{head_dim} S{} +{} +{}",
        lens.current, lens.prior, lens.past
    )
}

fn criterion_runs(criterion: &mut Criterion) {
    for (head_dim, lens) in SEGMENTS {
        let data = Data::new(head_dim, lens, lens.current as usize);
        let mut results = Results::new(&data);
        let name = segment_name(head_dim, lens);
        criterion.bench_function(&format!("forward {name}"), |b| {
            b.iter(|| results.forward(&data))
        });
        criterion.bench_function(&format!("backward {name}"), |b| {
            b.iter(|| results.backward(&data))
        });
    }
    for head_dim in [64, 128] {
        let data = Data::new(head_dim, DECODING, 1);
        let mut results = Results::new(&data);
        let name = format!("decode D{head_dim} S{}", DECODING.current);
        criterion.bench_function(&name, |b| b.iter(|| results.forward(&data)));
    }
}

/// Seconds of the plain version's forward and backward.
fn plain_seconds(data: &Data) -> [f64; 2] {
    let upstream = Upstream {
        d_out: View::packed(&data.d_out, data.q_shape()),
        d_lse: None,
    };
    let forward = best(1, || drop(black_box(plain::run(&data.problem(), None))));
    let both = best(1, || {
        drop(black_box(plain::run(&data.problem(), Some(upstream))));
    });
    [forward, both - forward]
}

/// What was measured with one instruction set on the threads of the pool that runs it.
fn table(isa: Isa, plain: &[[f64; 2]]) {
    let (peak, bandwidth) = (peak(isa), bandwidth());
    let shown = peak.map_or("unknown".into(), |p| format!("{:.0} GFLOP/s", p / 1e9));
    let threads = rayon::current_num_threads();
    println!("\n{isa:?}, threads: {threads}, peak of multiply-adds {shown}");
    println!(
        "{:26} {:>9} {:>9} {:>7} {:>9} {:>8}",
        "", "ms", "plain ms", "ratio", "GFLOP/s", "of peak"
    );
    for ((head_dim, lens), plain) in SEGMENTS.into_iter().zip(plain) {
        let data = Data::new(head_dim, lens, lens.current as usize);
        let mut results = Results::on(isa, &data);
        let forward = best(10, || results.forward(&data));
        let backward = best(10, || results.backward(&data));
        let passes = [("forward", forward), ("backward", backward)];
        for ((pass, seconds), plain) in passes.into_iter().zip(plain) {
            let speed = data.operations(pass == "backward") / seconds;
            let share = peak.map_or("?".into(), |peak| format!("{:.0}%", 100.0 * speed / peak));
            println!(
                "{:26} {:9.2} {:9.1} {:6.0}x {:9.1} {share:>8}",
                format!("{pass} {}", segment_name(head_dim, lens)),
                1e3 * seconds,
                1e3 * plain,
                plain / seconds,
                speed / 1e9,
            );
        }
    }
    for head_dim in [64, 128] {
        let data = Data::new(head_dim, DECODING, 1);
        let mut results = Results::on(isa, &data);
        let seconds = best(10, || results.forward(&data));
        let kv = Source::ALL.iter().flat_map(|source| &data.kv[*source]);
        let elements: usize = kv.map(Vec::len).sum();
        let speed = (4 * elements) as f64 / seconds;
        println!(
            "{:26} {:9.2} ms {:.1} GB/s, {:.0}% of the {:.1} GB/s of reading memory",
            format!("decode D{head_dim} S{}", DECODING.current),
            1e3 * seconds,
            speed / 1e9,
            100.0 * speed / bandwidth,
            bandwidth / 1e9,
        );
    }
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
        .configure_from_args();
    #[cfg(feature = "cuda")]
    match segattn::cuda::open(0) {
        Ok(context) => {
            let mut criterion = criterion
                .measurement_time(Duration::from_millis(150))
                .without_plots();
            attention_gpu::run(&context, &mut criterion).expect("a bench of the GPU");
            return;
        }
        Err(error) => println!("no GPU is measured, the CPU is: {error}"),
    }
    criterion_runs(&mut criterion);
    criterion.final_summary();
    let plain = SEGMENTS
        .map(|(head_dim, lens)| plain_seconds(&Data::new(head_dim, lens, lens.current as usize)));
    println!("\n{Q_HEADS} query heads on {KV_HEADS}; segments +prior +past");
    println!("plain: tests/attention_cases/plain.rs, one thread");
    let mut sets = vec![Isa::best()];
    sets.extend((Isa::best() == Isa::Avx512).then_some(Isa::Avx2));
    let mut counts = vec![1, rayon::current_num_threads()];
    counts.dedup();
    for isa in sets {
        for &threads in &counts {
            let pool = ThreadPoolBuilder::new().num_threads(threads).build();
            pool.expect("threads start").install(|| table(isa, &plain));
        }
    }
}
