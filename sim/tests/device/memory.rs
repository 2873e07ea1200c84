//! What a dry run says a run will need, is what it needs.

use std::path::Path;
use std::sync::Arc;

use crate::common::{config, gpu, model, tokens, values};
use segattn::device::gpu::{Driver, DryRun, Gpu};
use segattn::device::{Device, DeviceError};
use segattn::model::session::score;
use segattn::train::streams::{Gradients, StreamConfig, accumulate};
use segattn_sim::{Checks, Kernels};

fn dry(bytes: Option<usize>) -> Gpu<DryRun<Kernels>> {
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

fn needed() -> usize {
    let gpu = dry(None);
    work(&gpu).expect("a dry run");
    gpu.memory_use().high_water
}

#[test]
fn a_region_of_the_planned_size_is_enough_and_a_smaller_one_is_not() {
    let bytes = needed();
    work(&dry(Some(bytes))).expect("a run in as much as was planned");
    let refused = work(&dry(Some(bytes - 256))).expect_err("too little");
    assert!(
        matches!(refused, DeviceError::OutOfMemory { .. }),
        "{refused}"
    );
}

/// The same requests: a block is rounded up to 256 bytes where blocks share a region, and not on the simulated GPU.
#[test]
fn a_run_holds_what_its_dry_run_held() {
    let planned = dry(None);
    work(&planned).expect("a dry run");
    let real = gpu(1, Checks::None);
    work(&real).expect("a run");
    let (planned, real) = (planned.memory_use(), real.memory_use());
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

#[test]
fn a_device_that_has_reserved_does_not_ask_again() {
    let gpu = dry(Some(1 << 30));
    gpu.reserve(1 << 30).expect("all of it");
    assert!(gpu.driver().allocate(256).is_err());
    work(&gpu).expect("a run");
    assert_eq!(gpu.memory_use().reserved, 1 << 30);
}
