//! wgmma on small kernels: every operand layout multiplies right, and each planted bug is reported by name.

use std::path::PathBuf;
use std::sync::Arc;

use half::bf16;
use segattn_sim::{Checks, Gpu, Kind, Module, SimError, Source};

#[repr(C)]
#[derive(Clone, Copy)]
struct Operands {
    a: *const u16,
    b: *const u16,
    out: *mut f32,
}

/// A kernel of wgmma.cu and how its operands lie in memory.
#[derive(Clone, Copy)]
struct Layout {
    kernel: &'static str,
    n: usize,
    mn_major: bool,
}

const K_MAJOR: Layout = Layout {
    kernel: "k_major",
    n: 64,
    mn_major: false,
};
const MN_MAJOR: Layout = Layout {
    kernel: "mn_major",
    n: 128,
    mn_major: true,
};
const REGISTERS: Layout = Layout {
    kernel: "a_in_registers",
    n: 64,
    mn_major: false,
};

fn path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("kernels/wgmma.cu")
}

fn mutated(from: &str, to: &str) -> Arc<Module> {
    let text = std::fs::read_to_string(path()).expect("kernel source");
    assert!(text.contains(from), "{from} does not occur");
    Module::compile(&Source::new(path()).with_text(text.replace(from, to))).expect("compiles")
}

/// Runs a kernel; whether its product is exact (all values are small integers).
fn run(module: &Arc<Module>, layout: Layout, seed: u64) -> Result<bool, SimError> {
    let value = |i: usize, salt: usize| bf16::from_f32(((i * 7919 + salt) % 15) as f32 - 7.0);
    let a: Vec<bf16> = (0..64 * 64).map(|i| value(i, 3)).collect();
    let b: Vec<bf16> = (0..64 * layout.n).map(|i| value(i, 8)).collect();
    let mut gpu = Gpu::new(seed, Checks::All);
    let (g_a, g_b) = (gpu.input("a", &a)?, gpu.input("b", &b)?);
    let out = gpu.alloc("out", 64 * layout.n * 4)?;
    let params = Operands {
        a: g_a.ptr(),
        b: g_b.ptr(),
        out: out.ptr(),
    };
    let kernel = module.kernel(layout.kernel).expect("kernel");
    gpu.launch(&kernel, [1, 1, 1], [128, 1, 1], 3 * 8192, &params)?;
    let exact = |i: usize| -> f32 {
        let (row, column) = (i / layout.n, i % layout.n);
        let term = |k: usize| match layout.mn_major {
            true => a[k * 64 + row].to_f32() * b[k * layout.n + column].to_f32(),
            false => a[row * 64 + k].to_f32() * b[column * 64 + k].to_f32(),
        };
        (0..64).map(term).sum()
    };
    Ok(gpu
        .download::<f32>(out)
        .iter()
        .enumerate()
        .all(|(i, &got)| got == exact(i)))
}

fn assert_caught(layout: Layout, from: &str, to: &str, kind: Kind) {
    let module = mutated(from, to);
    for seed in 0..3 {
        let error = run(&module, layout, seed).err();
        let found = error
            .as_ref()
            .is_some_and(|e| e.reports().iter().any(|report| report.kind == kind));
        let text = error.map_or(String::new(), |e| e.to_string());
        assert!(found, "seed {seed}, expected {kind}, got: {text}");
    }
}

#[test]
fn every_operand_layout_multiplies_exactly() {
    let module = Module::compile(&Source::new(path())).expect("compiles");
    for layout in [K_MAJOR, MN_MAJOR, REGISTERS] {
        for seed in 0..3 {
            let right = run(&module, layout, seed).unwrap_or_else(|e| panic!("{e}"));
            assert!(right, "{} is wrong", layout.kernel);
        }
    }
}

#[test]
fn operands_stored_without_a_proxy_fence_or_barrier_are_reported() {
    assert_caught(
        K_MAJOR,
        "  sim_fence_proxy_async(SIM_SHARED);\n",
        "\n",
        Kind::ProxyFence,
    );
    assert_caught(
        K_MAJOR,
        "(SIM_SHARED);\n  __syncthreads();\n",
        "(SIM_SHARED);\n\n",
        Kind::Race,
    );
    let swapped = "  __syncthreads();\n  sim_fence_proxy_async(SIM_SHARED);\n";
    let from = "  sim_fence_proxy_async(SIM_SHARED);\n  __syncthreads();\n";
    let module = mutated(from, swapped);
    assert!(
        run(&module, K_MAJOR, 1).is_ok(),
        "a fence after the barrier, by the issuing threads, orders too"
    );
}

#[test]
fn a_missing_wgmma_fence_is_reported() {
    assert_caught(
        K_MAJOR,
        "  sim_wgmma_fence(sim_site());\n",
        "\n",
        Kind::Wgmma,
    );
    assert_caught(
        REGISTERS,
        "  sim_wgmma_fence(sim_site());\n",
        "\n",
        Kind::Wgmma,
    );
}

#[test]
fn accumulators_touched_in_flight_are_reported() {
    let commit = "  sim_wgmma_commit(sim_site());\n  sim_wgmma_wait(0, sim_site());\n  write_out(p.out, d, 64);";
    let touched = commit.replace("  sim_wgmma_wait", "  d[0] = 1;\n  sim_wgmma_wait");
    assert_caught(K_MAJOR, commit, &touched, Kind::Wgmma);
    assert_caught(
        K_MAJOR,
        "  sim_wgmma_wait(0, sim_site());\n",
        "\n",
        Kind::Leak,
    );
    assert_caught(
        K_MAJOR,
        "  sim_wgmma_commit(sim_site());\n  sim",
        "\n  sim",
        Kind::Leak,
    );
    assert_caught(
        REGISTERS,
        "sim_wgmma_wait(0,",
        "sim_wgmma_wait(1,",
        Kind::Leak,
    );
}

#[test]
fn shared_memory_overwritten_under_a_product_is_a_race() {
    assert_caught(
        REGISTERS,
        "  sim_wgmma_wait(0, sim_site());\n  __syncthreads();\n",
        "  __syncthreads();\n",
        Kind::Race,
    );
    let early = "  sim_wgmma_wait(0, sim_site());\n  __syncthreads();\n";
    assert_caught(
        REGISTERS,
        early,
        "  sim_wgmma_wait(0, sim_site());\n",
        Kind::Race,
    );
}

#[test]
fn wrong_descriptors_are_caught() {
    assert_caught(K_MAJOR, "| 1ull << 62", "", Kind::Operand);
    assert_caught(
        K_MAJOR,
        "s_b + step * 32, 0",
        "s_b + step * 8192, 0",
        Kind::OutOfBounds,
    );
    let wrong = |layout, from, to| !matches!(run(&mutated(from, to), layout, 1), Ok(true));
    assert!(wrong(
        MN_MAJOR,
        "s_b + step * 2048, 8192",
        "s_b + step * 2048, 1024"
    ));
    assert!(wrong(
        K_MAJOR,
        "step * 32, 0, 1024), b",
        "step * 32, 0, 512), b"
    ));
    assert!(wrong(MN_MAJOR, "SIM_A_MN_MAJOR | ", ""));
}
