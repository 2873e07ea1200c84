//! GEMMs on the GPU: whether a row has the same bits in any number of rows, and what that costs against
//! cuBLASLt's own choice of algorithm for each number of rows.
//!
//! `cargo bench --features cuda --bench gemm_gpu`. Shapes are those of a Llama-2-7B and a Llama-3.2-1B layer and
//! head. Times are the median of events around [`REPEATS`] calls, both choices in turn.

use std::error::Error;
use std::io::Write;

use cudarc::driver::sys::CUevent_flags;
use segattn::device::Kind;
use segattn::device::gpu::cuda_driver::{Choice, Cuda};
use segattn::device::gpu::{Driver, Epilogue, Gemm, Operand};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const ROWS: [usize; 5] = [1, 8, 64, 512, 4096];
const CHECKED: [usize; 9] = [1, 2, 7, 16, 17, 64, 65, 300, 1000];
const REPEATS: usize = 20;

/// Name, outputs, inputs, whether the weight is read transposed (forward) or not (gradient of the input), result.
const SHAPES: [(&str, usize, usize, bool, Kind); 11] = [
    ("7B q k v", 12288, 4096, true, Kind::Activation),
    ("7B out", 4096, 4096, true, Kind::Activation),
    ("7B gate up", 22016, 4096, true, Kind::Activation),
    ("7B down", 4096, 11008, true, Kind::Activation),
    ("7B head", 32000, 4096, true, Kind::Exact),
    ("1B q k v", 3072, 2048, true, Kind::Activation),
    ("1B gate up", 16384, 2048, true, Kind::Activation),
    ("1B down", 2048, 8192, true, Kind::Activation),
    ("1B head", 128256, 2048, true, Kind::Exact),
    ("1B d gate up", 2048, 16384, false, Kind::Activation),
    ("1B d head", 2048, 128256, false, Kind::Activation),
];

fn main() -> Result<()> {
    let same = match Cuda::open(0, Choice::SameBits) {
        Ok(cuda) => cuda,
        Err(error) => {
            println!("nothing measured: {error}");
            return Ok(());
        }
    };
    let free = Cuda::open(0, Choice::Free)?;
    println!("{}", same.description());
    println!(
        "{:14} {:>7} {:>7} {:>6}  rows: same bits us / free us (ratio) ...",
        "gemm", "n", "k", "bits"
    );
    for (name, n, k, transposed, kind) in SHAPES {
        let most = ROWS[ROWS.len() - 1];
        let a = random(&same, most * k, 1)?;
        let b = random(&same, n * k, 2)?;
        let bytes = if kind == Kind::Exact { 4 } else { 2 };
        let c = same.allocate(most * n * bytes)?;
        let operand = |address, stride, transposed| Operand {
            address,
            stride,
            transposed,
        };
        let gemm = |m| Gemm {
            m,
            n,
            k,
            a: operand(a, k, false),
            b: operand(b, if transposed { k } else { n }, transposed),
            c,
            c_stride: n,
            c_kind: kind,
            epilogue: Epilogue::Store,
        };
        let equal = check(&same, gemm, bytes)?;
        print!(
            "{name:14} {n:7} {k:7} {:>6} ",
            if equal { "equal" } else { "DIFFER" }
        );
        for m in ROWS {
            let (ours, theirs) = (time(&same, &gemm(m))?, time(&free, &gemm(m))?);
            print!(" {m}: {ours:.1}/{theirs:.1} ({:.2})", ours / theirs);
            std::io::stdout().flush()?;
        }
        println!();
        for (address, bytes) in [(a, most * k * 2), (b, n * k * 2), (c, most * n * bytes)] {
            // SAFETY: allocated above, not used after this.
            unsafe { same.free(address, bytes) };
        }
    }
    Ok(())
}

/// Whether the first rows have the bits that they have among all.
fn check(cuda: &Cuda, gemm: impl Fn(usize) -> Gemm, bytes: usize) -> Result<bool> {
    let read = |m: usize, rows: usize| -> Result<Vec<u8>> {
        let p = gemm(m);
        let mut values = vec![0; rows * p.n * bytes];
        // SAFETY: the matrices are allocated for more rows.
        unsafe {
            cuda.zero(p.c, m * p.n * bytes)?;
            cuda.gemm(&p)?;
            cuda.download(p.c, &mut values)?;
        }
        Ok(values)
    };
    let most = CHECKED[CHECKED.len() - 1];
    let all = read(ROWS[ROWS.len() - 1], most)?;
    for m in CHECKED {
        let few = read(m, m)?;
        if few != all[..few.len()] {
            println!("{m} rows differ from {} rows", ROWS[ROWS.len() - 1]);
            return Ok(false);
        }
    }
    Ok(true)
}

/// Microseconds of a GEMM: the median of several measurements.
fn time(cuda: &Cuda, gemm: &Gemm) -> Result<f64> {
    let stream = cuda.stream();
    let flags = Some(CUevent_flags::CU_EVENT_DEFAULT);
    let mut times = Vec::new();
    for round in 0..4 {
        let begin = stream.record_event(flags)?;
        for _ in 0..REPEATS {
            // SAFETY: as above.
            unsafe { cuda.gemm(gemm)? };
        }
        let end = stream.record_event(flags)?;
        end.synchronize()?;
        // The first round chooses the algorithm.
        if round > 0 {
            times.push(f64::from(begin.elapsed_ms(&end)?) * 1000.0 / REPEATS as f64);
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// So many bf16 between -1 and 1.
fn random(cuda: &Cuda, len: usize, seed: u64) -> Result<u64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        half::bf16::from_f32((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
    };
    let values: Vec<half::bf16> = (0..len).map(|_| next()).collect();
    let address = cuda.allocate(len * 2)?;
    // SAFETY: the memory has that size.
    unsafe { cuda.upload(address, bytemuck::cast_slice(&values))? };
    Ok(address)
}
