//! What a dry run says a run will need, is what it needs.

use std::path::Path;
use std::sync::Arc;

use crate::common::{config, gpu, model, tokens, values};
use segattn::device::gpu::{Driver, DryRun, Gpu, Held, MemoryUse};
use segattn::device::{Device, DeviceError, Purpose};
use segattn::model::session::score;
use segattn::train::streams::{Gradients, StreamConfig, accumulate};
use segattn_sim::{Checks, Kernels};

/// A dry run on the project's kernels, with so much memory.
pub fn dry(bytes: Option<usize>) -> Gpu<DryRun<Kernels>> {
    let kernels = Kernels::new(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels"));
    Gpu::new(DryRun::new(Arc::new(kernels), bytes))
}

/// Scores a sequence and takes a gradient.
fn work<D: Device + Clone>(device: &D) -> Result<(), DeviceError> {
    let config = config(false);
    let model = model(device.clone(), &config, &values(&config, 1));
    let sequence = tokens(2, 26, config.vocab_size);
    score(&model, &sequence, 2)?;
    let streams = StreamConfig {
        tbptt: 1,
        segments_per_step: 1,
        recompute: true,
    };
    let mut gradients = Gradients::new(&model)?;
    accumulate(&model, &[sequence], streams, 1.0, &mut gradients).map(|_| ())
}

fn needed() -> MemoryUse {
    let gpu = dry(None);
    work(&gpu).expect("a dry run");
    gpu.memory_use()
}

/// A device of `bytes` bytes, all of it taken as planned, but for `less` bytes of buffers.
fn planned(planned: MemoryUse, less: usize) -> Gpu<DryRun<Kernels>> {
    let high_water = planned.buffers.high_water - less;
    let buffers = Held {
        high_water,
        ..planned.buffers
    };
    let gpu = dry(Some(high_water + planned.pool.high_water));
    gpu.reserve(&MemoryUse { buffers, ..planned })
        .expect("all of it");
    gpu
}

#[test]
fn memory_of_the_planned_size_is_enough_and_less_is_not() {
    let needed = needed();
    assert!(needed.buffers.high_water > 0 && needed.pool.high_water > 0);
    work(&planned(needed, 0)).expect("a run in as much as was planned");
    let refused = work(&planned(needed, 256)).expect_err("too little");
    let DeviceError::OutOfMemory(out) = refused else {
        panic!("{refused}");
    };
    assert_eq!((out.purpose, out.free), (Some(Purpose::Backward), Some(0)));
    assert_eq!(out.held, needed.buffers.high_water - 256);
}

/// The same requests: a block is rounded up to 256 bytes where blocks share a region, and not on the simulated GPU.
#[test]
fn a_run_holds_what_its_dry_run_held() {
    let planned = needed();
    let real = gpu(1, Checks::None);
    work(&real).expect("a run");
    let real = real.memory_use();
    for (planned, real) in [
        (planned.buffers, real.buffers),
        (planned.pool, real.pool),
        (planned.host, real.host),
    ] {
        assert!(
            real.peak <= planned.peak,
            "{} of {}",
            real.peak,
            planned.peak
        );
        // Some hundred blocks are alive at once.
        assert!(
            planned.peak <= real.peak + 500 * 256,
            "{} of {}",
            planned.peak,
            real.peak
        );
        assert_eq!((planned.used, real.used), (0, 0));
    }
}

#[test]
fn a_device_that_has_reserved_does_not_ask_again() {
    let gpu = planned(needed(), 0);
    assert!(gpu.driver().allocate(256).is_err());
    let before = gpu.memory_use().on_device();
    work(&gpu).expect("a run");
    assert_eq!(gpu.memory_use().on_device(), before);
}
