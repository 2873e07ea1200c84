//! The mutation test on the simulator's own tiled product: bugs of every class, at least 95% of them caught.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::bf16;
use segattn_sim::mutate::{Rule, drop_statement, mutants, replace};
use segattn_sim::{Checks, Gpu, Module, SimError, Source};

/// Barriers, waits and commits dropped or weakened; bounds, swizzles, stages and indices wrong.
const RULES: [Rule; 22] = [
    drop_statement("__syncthreads"),
    drop_statement("sim_cp_async_wait"),
    drop_statement("sim_cp_async_commit"),
    replace("sim_cp_async_wait(0", "sim_cp_async_wait(1"),
    replace("__syncthreads()", "if (warp == 0) __syncthreads()"),
    replace("__syncthreads()", "__syncwarp()"),
    replace("g_row < rows && ", ""),
    replace(" && column < k", ""),
    replace("g_row < rows", "g_row <= rows"),
    replace("inside ? 16 : 0", "16"),
    replace("(tile + 1) & 1", "tile & 1"),
    replace("(tile & 1)", "0"),
    replace("(tile + 1) * kTile", "tile * kTile"),
    replace("row < p.m && ", ""),
    replace("out_column < p.n", "true"),
    replace("p.k + kTile - 1", "p.k"),
    replace("+ i / 2 * 8", "+ i % 2 * 8"),
    replace("lane / 8 % 2", "lane / 16"),
    replace("lane % 16,", "lane % 8,"),
    replace("i += kThreads", "i += 2 * kThreads"),
    replace("first_column, p.n", "first_row, p.n"),
    replace("warp * 16", "0"),
];

#[repr(C)]
#[derive(Clone, Copy)]
struct TiledProduct {
    a: *const u16,
    b: *const u16,
    out: *mut f32,
    m: i32,
    n: i32,
    k: i32,
}

const SIZES: [[usize; 3]; 3] = [[40, 72, 104], [32, 32, 32], [1, 33, 8]];

/// Runs one size; whether the product is right.
fn run(
    module: &std::sync::Arc<Module>,
    [m, n, k]: [usize; 3],
    seed: u64,
) -> Result<bool, SimError> {
    let values = |count: usize, salt: usize| -> Vec<bf16> {
        (0..count)
            .map(|i| bf16::from_f32(((i * 7919 + salt) % 61) as f32 / 8.0 - 3.5))
            .collect()
    };
    let (a, b) = (values(m * k, 5), values(n * k, 11));
    let mut gpu = Gpu::new(seed, Checks::All);
    let (g_a, g_b) = (gpu.input("a", &a)?, gpu.input("b", &b)?);
    let out = gpu.alloc("out", m * n * 4)?;
    let (m32, n32, k32) = (m as i32, n as i32, k as i32);
    let params = TiledProduct {
        a: g_a.ptr(),
        b: g_b.ptr(),
        out: out.ptr(),
        m: m32,
        n: n32,
        k: k32,
    };
    let kernel = module.kernel("tiled_product").expect("kernel");
    let grid = [n.div_ceil(32) as u32, m.div_ceil(32) as u32, 1];
    gpu.launch(&kernel, grid, [64, 1, 1], 4 * 32 * 32 * 2, &params)?;
    let exact = |i: usize| {
        (0..k)
            .map(|j| a[i / n * k + j].to_f64() * b[i % n * k + j].to_f64())
            .sum::<f64>()
    };
    let got = gpu.download::<f32>(out);
    Ok(got
        .iter()
        .enumerate()
        .all(|(i, &got)| (f64::from(got) - exact(i)).abs() < 1e-2))
}

fn source() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("kernels/tiled_product.cu")
}

#[test]
fn the_correct_kernel_passes_every_size_and_schedule() {
    let module = Module::compile(&Source::new(source())).expect("compiles");
    for seed in 0..20 {
        for size in SIZES {
            match run(&module, size, seed) {
                Ok(right) => assert!(right, "wrong product of {size:?}"),
                Err(error) => panic!("{error}"),
            }
        }
    }
}

#[test]
fn at_least_95_percent_of_planted_bugs_are_caught() {
    let text = std::fs::read_to_string(source()).expect("kernel source");
    let all = mutants(&text, &RULES);
    for rule in &RULES {
        assert!(
            all.iter().any(|mutant| mutant.find == rule.find),
            "{} matches nothing",
            rule.find
        );
    }
    let (next, survivors) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let worker = || {
        while let Some(mutant) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
            let module =
                Module::compile(&Source::new(source()).with_text(&*mutant.text)).expect("compiles");
            let caught = SIZES
                .iter()
                .any(|&size| !matches!(run(&module, size, 3), Ok(true)));
            if !caught {
                let bug = format!("line {}: {} {:?}", mutant.line, mutant.find, mutant.change);
                survivors.lock().expect("no panic").push(bug);
            }
        }
    };
    std::thread::scope(|scope| (0..2).for_each(|_| drop(scope.spawn(worker))));
    let survivors = survivors.into_inner().expect("no panic");
    assert!(
        survivors.len() * 20 <= all.len(),
        "{} of {} survived:\n{survivors:#?}",
        survivors.len(),
        all.len()
    );
}
