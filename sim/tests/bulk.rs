//! mbarriers, TMA and the async proxy on small kernels: each works, and each planted bug is reported by name.

use std::path::PathBuf;
use std::sync::Arc;

use segattn_sim::{Checks, Gpu, Kind, Module, SimError, Source, TensorMap};

#[repr(C)]
#[derive(Clone, Copy)]
struct Doubled {
    input: TensorMap,
    out: TensorMap,
    num_tiles: i32,
}

fn source() -> Source {
    Source::new(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("kernels/bulk.cu"))
}

fn mutated(from: &str, to: &str) -> Arc<Module> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("kernels/bulk.cu");
    let text = std::fs::read_to_string(path).expect("kernel source");
    assert!(text.contains(from), "{from} does not occur");
    Module::compile(&source().with_text(text.replacen(from, to, 1))).expect("compiles")
}

const ROWS: usize = 37;

fn run(module: &Arc<Module>, seed: u64) -> Result<Vec<f32>, SimError> {
    let mut gpu = Gpu::new(seed, Checks::All);
    let values: Vec<f32> = (0..ROWS * 32).map(|i| i as f32 / 4.0).collect();
    let input = gpu.input("in", &values)?;
    let out = gpu.alloc("out", ROWS * 32 * 4)?;
    let map = |address| {
        TensorMap::new(address, 4, &[32, ROWS as u64], &[128], &[32, 8], 128).expect("valid map")
    };
    let num_tiles = ROWS.div_ceil(8) as i32;
    let params = Doubled {
        input: map(input.address()),
        out: map(out.address()),
        num_tiles,
    };
    let kernel = module.kernel("doubled").expect("kernel");
    gpu.launch(&kernel, [1, 1, 1], [64, 1, 1], 3 * 1024 + 32, &params)?;
    assert!(gpu.unwritten(out).is_empty());
    Ok(gpu.download(out))
}

fn assert_caught(from: &str, to: &str, kinds: &[Kind]) {
    let module = mutated(from, to);
    for seed in 0..5 {
        let error = run(&module, seed).err();
        let found: Vec<Kind> = error
            .iter()
            .flat_map(|e| e.reports())
            .map(|r| r.kind)
            .collect();
        let text = error.map_or(String::new(), |e| e.to_string());
        assert!(
            found.iter().any(|kind| kinds.contains(kind)),
            "seed {seed}, expected {kinds:?}, got: {text}"
        );
    }
}

#[test]
fn a_ring_of_stages_carries_every_tile_in_every_schedule() {
    let module = Module::compile(&source()).expect("compiles");
    for seed in 0..20 {
        let got = run(&module, seed).unwrap_or_else(|e| panic!("{e}"));
        let expected = |i: usize| i as f32 / 2.0 + (i / 32 % 8) as f32;
        assert!(got.iter().enumerate().all(|(i, &got)| got == expected(i)));
    }
}

#[test]
fn a_stage_filled_before_it_is_free_is_reported() {
    let wait = "      sim_mbarrier_wait(s_empty + stage * 8, phase ^ 1, sim_site());\n";
    assert_caught(wait, "\n", &[Kind::Race, Kind::NotWaited]);
    let (early, late) = (
        "    float values[8];\n",
        "    sim_mbarrier_arrive(s_empty + stage * 8, 1, sim_site());\n",
    );
    let both = mutated(early, &format!("{late}{early}"));
    assert!(run(&both, 1).is_err());
}

#[test]
fn a_stage_read_before_it_is_full_is_reported() {
    let wait = "    sim_mbarrier_wait(s_full + stage * 8, phase, sim_site());\n";
    assert_caught(
        wait,
        "\n",
        &[Kind::NotWaited, Kind::Race, Kind::Uninitialized],
    );
    assert_caught(
        wait,
        &wait.replace("phase,", "phase ^ 1,"),
        &[Kind::NotWaited, Kind::Race, Kind::Uninitialized],
    );
}

#[test]
fn wrong_counts_and_bytes_are_reported() {
    let stuck = [Kind::Deadlock, Kind::Mbarrier, Kind::Divergence];
    assert_caught(
        "s_full + stage * 8, kTileBytes, s",
        "s_full + stage * 8, kTileBytes / 2, s",
        &stuck,
    );
    assert_caught(
        "s_empty + stage * 8, 32, s",
        "s_empty + stage * 8, 33, s",
        &stuck,
    );
    assert_caught(
        "s_empty + stage * 8, 32, s",
        "s_empty + stage * 8, 31, s",
        &[Kind::Race, Kind::NotWaited, Kind::Mbarrier],
    );
    assert_caught(
        "sim_mbarrier_init(s_full + stage * 8, 1, sim_site());",
        "",
        &[Kind::Mbarrier],
    );
}

#[test]
fn missing_fences_of_the_async_proxy_are_reported() {
    assert_caught(
        "    sim_fence_proxy_async(SIM_SHARED);\n",
        "\n",
        &[Kind::ProxyFence],
    );
    assert_caught(
        "    sim_fence_mbarrier_init();\n",
        "\n",
        &[Kind::ProxyFence],
    );
    assert_caught(
        "  __syncthreads();\n  if (warp == 0) {",
        "  if (warp == 0) {",
        &[Kind::Race, Kind::Mbarrier],
    );
}

#[test]
fn stores_not_waited_for_are_reported() {
    assert_caught(
        "    if (lane == 0) sim_bulk_wait(0, 1, sim_site());\n",
        "\n",
        &[Kind::Race],
    );
    let plain = "*(float*)(s_in + stage * kTileBytes + offset)";
    assert_caught(plain, "*(float*)(s_full + offset % 8)", &[Kind::Mbarrier]);
    assert_caught(
        "s_in + stage * kTileBytes, &p.in",
        "s_in + 512, &p.in",
        &[Kind::Operand],
    );
    let end = "  if (lane == 0) sim_bulk_wait(0, 0, sim_site());\n";
    let module = mutated(end, "\n");
    let leaks =
        |seed| run(&module, seed).is_err_and(|e| e.reports().iter().any(|r| r.kind == Kind::Leak));
    assert!((0..20).any(leaks));
}

#[test]
fn bulk_reductions_add_to_global_memory() {
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Plain {
        input: *const f32,
        out: *mut f32,
    }
    let module = Module::compile(&source()).expect("compiles");
    let kernel = module.kernel("add_twice").expect("kernel");
    let mut gpu = Gpu::new(3, Checks::All);
    let input = gpu
        .input("in", &(0..64).map(|i| i as f32).collect::<Vec<_>>())
        .expect("memory");
    let out = gpu.upload("out", &[1f32; 64]).expect("memory");
    let params = Plain {
        input: input.ptr(),
        out: out.ptr(),
    };
    gpu.launch(&kernel, [1, 1, 1], [32, 1, 1], 512, &params)
        .unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(
        gpu.download::<f32>(out),
        (0..64).map(|i| 1.0 + 2.0 * i as f32).collect::<Vec<_>>()
    );
}
