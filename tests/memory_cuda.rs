//! Memory on a real GPU: what a run takes is what its plan says, pools in host memory change no bit, and too little
//! memory is an error after which the next call works. Where there is no GPU every test says so and passes, unless
//! `SEGATTN_REQUIRE_GPU` is set.
//!
//! `cargo test --release --features cuda --test memory_cuda`

use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

use segattn::cuda::kernels::Error as Kernels;
use segattn::device::gpu::cuda_driver::{Choice, Cuda};
use segattn::device::gpu::{Driver, Gpu, MemoryPlan, PoolPlacement};
use segattn::device::{Device, DeviceError, Kind, Purpose};
use segattn::generate::GenerateError;
use segattn::generate::dry_run::{Reading, dry_run};
use segattn::model::config::ModelConfig;
use segattn::model::decoder::Decoder;
use segattn::model::parameters::{Role, specs};
use segattn::model::session::score;

/// GPU 0 for one test at a time, since they count what is free; `None`, said, where there is none.
fn gpu() -> Option<(MutexGuard<'static, ()>, Gpu<Cuda>)> {
    static ONE: Mutex<()> = Mutex::new(());
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    match Cuda::open(0, Choice::SameBits) {
        Ok(cuda) => Some((one, Gpu::new(cuda))),
        Err(error) => {
            let required = std::env::var_os("SEGATTN_REQUIRE_GPU").is_some();
            let absent = matches!(&error, Kernels::Driver(error) if error.is_absent());
            assert!(!required && absent, "{error}");
            let said = writeln!(std::io::stderr(), "SKIPPED, there is no GPU: {error}");
            said.expect("standard error");
            None
        }
    }
}

/// 8 layers of 8 heads of 128; in every second one half of them read the past.
fn config() -> ModelConfig {
    let read = |l: usize, g: usize| match (l % 2, g % 2) {
        (_, 0) => vec!["prior"],
        (1, _) => vec!["past"],
        _ => Vec::new(),
    };
    let layer = |l| (0..8).map(|g| read(l, g)).collect::<Vec<_>>();
    ModelConfig::from_json(serde_json::json!({
        "model_type": "llama", "vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2816,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128,
        "segment": {
            "segment_len": 1024, "prior_len": 256, "past_len": 256,
            "head_reads": (0..8).map(layer).collect::<Vec<_>>(),
        },
    }))
    .expect("a config")
}

fn model(gpu: &Gpu<Cuda>) -> Decoder<Gpu<Cuda>> {
    let (config, mut state) = (config(), 1u64);
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let specs = specs(&config);
    let values = |i: usize| {
        let role = specs[i].role;
        let one = |_| match role {
            Role::Matrix { inner, .. } => 1.7 * next() / (inner as f32).sqrt(),
            _ => 1.0,
        };
        let values: Vec<f32> = (0..role.len()).map(one).collect();
        let mut buffer = gpu.empty(Kind::Exact, values.len())?;
        gpu.write(&mut buffer, 0, &values)?;
        Ok(buffer)
    };
    Decoder::new(gpu.clone(), config.clone(), values, false).expect("a model")
}

fn tokens(len: usize) -> Vec<u32> {
    (0..len)
        .map(|i| (i * i * 31 + i * 7) as u32 % 32_000)
        .collect()
}

#[test]
fn a_run_takes_what_its_plan_says() {
    const TOKENS: usize = 1 << 15;
    let Some((_one, warm)) = gpu() else { return };
    // The library of products takes memory of its own when it first multiplies.
    score(&model(&warm), &tokens(3000), 1).expect("scores");
    let reading = Reading {
        sequences: vec![[0, TOKENS]],
        scored: true,
        new: 0,
        segments_per_step: 1,
    };
    let run = |dry| -> Result<(), GenerateError> {
        let model = Decoder::for_dry_run(dry, config(), false)?;
        dry_run(&model, &reading, || ())
    };
    for pool in [PoolPlacement::Auto, PoolPlacement::AtMost(0)] {
        let device = Gpu::new(Cuda::open(0, Choice::SameBits).expect("a GPU"));
        let kernels = device.driver().shared_kernels().clone();
        // Kernels are loaded by the first plan.
        let first = MemoryPlan::new(&kernels, pool, None, run).expect("a plan");
        let free = || device.driver().free_memory().expect("free memory");
        let before = free();
        let plan = device.reserve_for(&kernels, pool, Purpose::Activations, run);
        assert_eq!(plan.expect("a plan"), first);
        score(&model(&device), &tokens(TOKENS + 1), 1).expect("scores");
        let (planned, taken) = (first.device_bytes(), before - free());
        assert_eq!(device.memory_use().on_device(), planned);
        assert!(
            taken.abs_diff(planned) * 50 <= planned,
            "{planned} planned, {taken} taken"
        );
        let held = device.memory_use().host;
        assert_eq!(held.peak, first.host_bytes());
        assert!(held.reserved - held.peak < 64 << 20);
    }
}

#[test]
fn scores_do_not_depend_on_where_the_pool_lies() {
    const TOKENS: usize = 20_000;
    let mut expected = None;
    for pool in [usize::MAX, 0, 30 << 20] {
        let Some((_one, device)) = gpu() else { return };
        device.limit_pool(pool);
        let model = model(&device);
        let scores = score(&model, &tokens(TOKENS + 1), 2).expect("scores");
        assert_eq!(device.memory_use().host.peak > 0, pool < usize::MAX);
        assert!(scores == *expected.get_or_insert(scores.clone()), "{pool}");
    }
}

#[test]
fn too_little_memory_is_an_error_and_the_next_call_works() {
    let Some((_one, device)) = gpu() else { return };
    let out = |error| match error {
        DeviceError::OutOfMemory(out) => out,
        error => panic!("{error}"),
    };
    let bytes = 4 << 38;
    let refused = out(device
        .empty(Kind::Exact, bytes / 4)
        .expect_err("a terabyte"));
    assert_eq!(refused.bytes, bytes);
    assert!(refused.free.is_some_and(|free| free > 0 && free < bytes));
    let model = model(&device);
    let refused = out(score(&model, &tokens((1 << 23) + 1), 1 << 13).expect_err("8 million rows"));
    assert!(
        refused.to_string().contains("segments_per_step"),
        "{refused}"
    );
    score(&model, &tokens(3000), 1).expect("scores");
}
