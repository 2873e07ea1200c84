//! GEMMs of the CPU device: 256 rows against the `gemm` crate, one row against the bandwidth at which the same weights
//! can be read, and weights of 16 bits against the same in f32, all measured in this run on the same threads.
//!
//! Criterion reports the times; the ratios are printed first, each from the best of interleaved
//! repetitions, so that a neighbour on the machine slows both sides alike.

mod measure;

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group};
use gemm::Parallelism;
use half::{bf16, f16};
use measure::{best, read_all};
use rayon::prelude::*;
use segattn::device::cpu::PackedMatrix;
use segattn::device::cpu::gemm::{
    Strided, gemm as our_gemm, linear, linear_input_grad, linear_weight_grad,
};

/// rows, outputs, inputs.
const TRAINING: [[usize; 3]; 5] = [
    [256, 688, 256],
    [256, 256, 688],
    [256, 1024, 1024],
    [256, 4096, 1024],
    [2048, 1024, 1024],
];
/// outputs, inputs: the first fits a cache, the last two do not.
const DECODING: [[usize; 2]; 4] = [[688, 256], [2048, 1024], [8192, 4096], [32000, 2048]];

fn values(len: usize) -> Vec<f32> {
    (0..len)
        .map(|i| (i * 2_654_435_761 % 1000) as f32 / 1000.0 - 0.4)
        .collect()
}

/// Buffers of one layer's three GEMMs.
struct Layer {
    shape: [usize; 3],
    x: Vec<f32>,
    y: Vec<f32>,
    w: Vec<f32>,
    packed: PackedMatrix,
}

impl Layer {
    fn new([rows, outputs, inputs]: [usize; 3]) -> Layer {
        let w = values(outputs * inputs);
        Layer {
            shape: [rows, outputs, inputs],
            x: values(rows * inputs),
            y: values(rows * outputs),
            packed: PackedMatrix::pack(&w, outputs, inputs, true),
            w,
        }
    }

    fn forward(&mut self) {
        let [rows, outputs, inputs] = self.shape;
        linear(
            &self.x,
            inputs,
            rows,
            &self.packed,
            &mut self.y,
            outputs,
            false,
        );
    }

    fn input_grad(&mut self) {
        let [rows, outputs, inputs] = self.shape;
        linear_input_grad(
            &self.y,
            outputs,
            rows,
            &self.packed,
            &mut self.x,
            inputs,
            false,
        );
    }

    fn weight_grad(&mut self) {
        let [rows, outputs, inputs] = self.shape;
        linear_weight_grad(
            &self.y,
            outputs,
            &self.x,
            inputs,
            rows,
            &mut self.w,
            [outputs, inputs],
        );
    }

    fn unpacked(&mut self) {
        let [rows, outputs, inputs] = self.shape;
        let (x, w) = (
            Strided::rows(&self.x, inputs),
            Strided::columns(&self.w, inputs),
        );
        our_gemm([rows, outputs, inputs], x, w, &mut self.y, outputs, false);
    }

    /// The forward by the `gemm` crate: y = x wᵀ.
    fn crate_forward(&mut self) {
        let [m, n, k] = self.shape;
        let (y, x, w) = (self.y.as_mut_ptr(), self.x.as_ptr(), self.w.as_ptr());
        // SAFETY: the strides are those of the row-major buffers, whose lengths are m n, m k, n k.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                y,
                1,
                n as isize,
                false,
                x,
                1,
                k as isize,
                w,
                k as isize,
                1,
                0.0,
                1.0,
                false,
                false,
                false,
                Parallelism::Rayon(0),
            );
        }
    }

    /// The weight gradient by the `gemm` crate: w += yᵀ x.
    fn crate_weight_grad(&mut self) {
        let [rows, n, k] = self.shape;
        let (y, x, w) = (self.y.as_ptr(), self.x.as_ptr(), self.w.as_mut_ptr());
        // SAFETY: as above.
        unsafe {
            gemm::gemm(
                n,
                k,
                rows,
                w,
                1,
                k as isize,
                true,
                y,
                n as isize,
                1,
                x,
                1,
                k as isize,
                1.0,
                1.0,
                false,
                false,
                false,
                Parallelism::Rayon(0),
            );
        }
    }

    fn flops(&self) -> f64 {
        2.0 * self.shape.iter().map(|&d| d as f64).product::<f64>()
    }
}

fn ratios() {
    let budget = Duration::from_secs(1);
    println!("{} threads", rayon::current_num_threads());
    println!(
        "rows x out x in    GFLOP/s: crate  forward (ratio)   unpacked   input grad | crate  weight grad (ratio)"
    );
    for shape in TRAINING {
        let layers = &mut [(); 6].map(|_| Layer::new(shape));
        let flops = layers[0].flops();
        let [a, b, c, d, e, f] = layers;
        let times = best(
            5,
            budget,
            [
                &mut || a.crate_forward(),
                &mut || b.forward(),
                &mut || c.unpacked(),
                &mut || d.input_grad(),
                &mut || e.crate_weight_grad(),
                &mut || f.weight_grad(),
            ],
        );
        let [a, b, c, d, e, f] = times.map(|t| flops / t / 1e9);
        println!(
            "{shape:?} {a:7.0} {b:7.0} ({:.2}) {c:7.0} ({:.2}) {d:7.0} ({:.2}) | {e:7.0} {f:7.0} ({:.2})",
            b / a,
            c / a,
            d / a,
            f / e
        );
    }
    println!("one row, out x in    GB/s: read   memcpy   gemm    (ratio to read)");
    for [outputs, inputs] in DECODING {
        let mut layer = Layer::new([1, outputs, inputs]);
        let weights = values(outputs * inputs);
        let mut copy = vec![0.0; weights.len()];
        let times = best(
            5,
            budget,
            [
                &mut || read_all(&weights),
                &mut || {
                    let part = weights.len().div_ceil(rayon::current_num_threads());
                    let to = copy.par_chunks_mut(part);
                    to.zip(weights.par_chunks(part))
                        .for_each(|(to, from)| to.copy_from_slice(from));
                },
                &mut || layer.forward(),
            ],
        );
        let [read, copy, gemm] = times.map(|t| 4e-9 * weights.len() as f64 / t);
        println!(
            "{outputs} x {inputs} {read:7.1} {copy:7.1} {gemm:7.1} ({:.2})",
            gemm / read
        );
    }
}

/// Matrices that are only read, one after the other, in f32 and in 16 bits: together they fit no cache.
fn widths() {
    const SHAPE: [usize; 2] = [1536, 576];
    const COUNT: usize = 120;
    let [outputs, inputs] = SHAPE;
    let w = values(outputs * inputs);
    let rounded = |round: fn(f32) -> f32| w.iter().map(|x| round(*x)).collect::<Vec<_>>();
    let pack = |w: &[f32]| vec![PackedMatrix::pack_narrow(w, outputs, inputs); COUNT];
    let wide = vec![PackedMatrix::pack(&w, outputs, inputs, false); COUNT];
    let brain = pack(&rounded(|x| bf16::from_f32(x).to_f32()));
    let half = pack(&rounded(|x| f16::from_f32(x).to_f32()));
    println!(
        "rows by {COUNT} matrices of {outputs} x {inputs}    Gweights/s: f32  bf16 (ratio)  f16 (ratio)"
    );
    for rows in [1, 2, 4, 6, 8, 16, 64, 256] {
        let x = values(rows * inputs);
        let mut ys = [(); 3].map(|()| vec![0.0; rows * outputs]);
        let [a, b, c] = &mut ys;
        let all = |matrices: &[PackedMatrix], y: &mut [f32]| {
            rayon::scope(|_| {
                for w in matrices {
                    linear(&x, inputs, rows, w, y, outputs, false);
                }
            });
        };
        let times = best(
            5,
            Duration::from_secs(1),
            [&mut || all(&wide, a), &mut || all(&brain, b), &mut || {
                all(&half, c)
            }],
        );
        let [a, b, c] = times.map(|t| 1e-9 * (COUNT * outputs * inputs) as f64 / t);
        println!(
            "{rows:4} {a:7.2} {b:7.2} ({:.2}) {c:7.2} ({:.2})",
            b / a,
            c / a
        );
    }
}

fn gemms(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("gemm");
    for shape in TRAINING {
        let mut layer = Layer::new(shape);
        let name = shape.map(|d| d.to_string()).join("x");
        group.throughput(Throughput::Elements(layer.flops() as u64));
        let id = |what: &str| BenchmarkId::new(what, &name);
        group.bench_function(id("forward"), |b| b.iter(|| layer.forward()));
        group.bench_function(id("input_grad"), |b| b.iter(|| layer.input_grad()));
        group.bench_function(id("weight_grad"), |b| b.iter(|| layer.weight_grad()));
        group.bench_function(id("gemm_crate"), |b| b.iter(|| layer.crate_forward()));
    }
    for [outputs, inputs] in DECODING {
        let mut layer = Layer::new([1, outputs, inputs]);
        group.throughput(Throughput::Bytes(4 * (outputs * inputs) as u64));
        let id = BenchmarkId::new("one_row", format!("{outputs}x{inputs}"));
        group.bench_function(id, |b| b.iter(|| layer.forward()));
    }
    group.finish();
}

criterion_group!(timed, gemms);

fn main() {
    ratios();
    widths();
    timed();
    Criterion::default().configure_from_args().final_summary();
}
