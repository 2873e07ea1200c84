//! Where the pools lie: on the device, in host memory or in both, to the same bits; and memory that is too small.

use crate::common::{config, gpu, model, tokens, values};
use crate::memory::dry;
use segattn::device::gpu::{DryRun, Gpu, MemoryUse};
use segattn::device::{Device, DeviceError, OutOfMemory, Purpose};
use segattn::model::decoder::Decoder;
use segattn::model::files::OutputFile;
use segattn::model::session::{Feed, Session, score};
use segattn::model::session_file::{Origin, StateFile, save};
use segattn::train::streams::{Gradients, StreamConfig, accumulate};
use segattn_sim::{Checks, Driver, Kernels};

/// Tokens of a segment, and bytes of the keys that a layer's two heads leave of it.
const SEGMENT: usize = 8;
const CHUNK: usize = SEGMENT * 2 * 32 * 2;
const LAYERS: usize = 2;

fn on(gpu: Gpu<Driver>) -> Decoder<Gpu<Driver>> {
    let config = config(false);
    model(gpu, &config, &values(&config, 21))
}

fn limited(pool_bytes: usize) -> Decoder<Gpu<Driver>> {
    let gpu = gpu(4, Checks::None);
    gpu.limit_pool(pool_bytes);
    on(gpu)
}

fn sequence(len: usize) -> Vec<u32> {
    tokens(22, len, config(false).vocab_size)
}

fn feed(session: &mut Session<'_, Gpu<Driver>>, tokens: &[u32]) {
    let feed = Feed {
        sequence: 0,
        tokens,
        targets: &[],
        breaks: &[],
        rereads: &[],
    };
    session.feed(&[feed]).expect("a feed");
}

#[test]
fn scores_do_not_depend_on_where_the_pool_lies() {
    const SEGMENTS: usize = 5;
    let sequence = sequence(SEGMENTS * SEGMENT + 4);
    let all = 2 * LAYERS * SEGMENTS * CHUNK;
    let expected = score(&limited(usize::MAX), &sequence, 1).expect("scores");
    for budget in [0, CHUNK - 1, CHUNK, 3 * CHUNK, all / 2, all - CHUNK, all] {
        let model = limited(budget);
        assert_eq!(
            score(&model, &sequence, 2).expect("scores"),
            expected,
            "{budget}"
        );
        let MemoryUse { pool, host, .. } = model.device.memory_use();
        let on_device = budget / CHUNK * CHUNK;
        assert_eq!((pool.peak, pool.used, host.used), (on_device, 0, 0));
        assert_eq!(host.peak, all - on_device, "{budget}");
    }
}

#[test]
fn gradients_do_not_depend_on_where_the_pool_lies() {
    let sequences = [sequence(3 * SEGMENT + 2), sequence(2 * SEGMENT)];
    let gradients = |model: &Decoder<Gpu<Driver>>| {
        let streams = StreamConfig {
            tbptt: 1,
            segments_per_step: 1,
            recompute: false,
        };
        let mut gradients = Gradients::new(model).expect("memory");
        accumulate(model, &sequences, streams, 1.0, &mut gradients).expect("gradients");
        let device = &model.device;
        let all = gradients.finish(device).expect("gradients");
        let read = |b| device.read(b, 0..device.len(b)).expect("a read");
        all.iter().map(read).collect::<Vec<_>>()
    };
    let expected = gradients(&limited(usize::MAX));
    let model = limited(3 * CHUNK);
    assert!(gradients(&model) == expected);
    assert!(model.device.memory_use().host.peak > 0);
}

#[test]
fn device_memory_does_not_grow_with_the_context() {
    for budget in [0, 5 * CHUNK] {
        let model = limited(budget);
        let mut session = Session::new(&model, 1, 40 * SEGMENT, 1).expect("a session");
        let mut after = Vec::new();
        for segment in sequence(40 * SEGMENT).chunks(SEGMENT) {
            feed(&mut session, segment);
            after.push(model.device.memory_use());
        }
        let (third, last) = (after[2], after[39]);
        assert_eq!(third.buffers.peak, last.buffers.peak);
        // What retrieval is told of: nothing that stays.
        assert_eq!(third.buffers.used, last.buffers.used);
        assert_eq!(last.pool.peak, budget);
        assert_eq!(last.host.used + last.pool.used, 2 * LAYERS * 40 * CHUNK);
    }
}

#[test]
fn a_session_is_saved_and_restored_wherever_its_pool_lies() {
    let folder = tempfile::tempdir().expect("a folder");
    let (read, more) = (sequence(3 * SEGMENT + 3), sequence(SEGMENT));
    let mut logits = Vec::new();
    for (i, from) in [usize::MAX, 0, 3 * CHUNK].into_iter().enumerate() {
        let path = folder.path().join(i.to_string());
        let model = limited(from);
        let mut session = Session::new(&model, 1, 64, 1).expect("a session");
        feed(&mut session, &read);
        save(
            &session,
            Origin::default(),
            &OutputFile::open(&path).unwrap(),
        )
        .expect("a file");
        for to in [usize::MAX, 0, 3 * CHUNK] {
            let model = limited(to);
            let mut session = Session::new(&model, 1, 64, 1).expect("a session");
            let mut file = StateFile::open(&path).expect("a file");
            file.restore(&mut session, "").expect("a session");
            feed(&mut session, &more);
            logits.push(session.logits(0).expect("logits"));
        }
    }
    assert!(logits.windows(2).all(|pair| pair[0] == pair[1]));
}

fn out_of_memory<T: std::fmt::Debug>(result: Result<T, DeviceError>) -> OutOfMemory {
    match result.expect_err("too little memory") {
        DeviceError::OutOfMemory(out) => out,
        error => panic!("{error}"),
    }
}

/// The model on a GPU that has `bytes` bytes beside it.
fn small(bytes: usize) -> Decoder<Gpu<Driver>> {
    let model = limited(usize::MAX);
    model.device.driver().leave(bytes);
    model
}

/// Scores, and the most bytes of buffers and of the pool that they took beside the model.
fn scored(pool_bytes: usize, sequence: &[u32], segments_per_step: usize) -> (Vec<f32>, [usize; 2]) {
    let model = limited(pool_bytes);
    model.device.reset_peaks();
    let scores = score(&model, sequence, segments_per_step).expect("scores");
    let MemoryUse { buffers, pool, .. } = model.device.memory_use();
    (scores, [buffers.peak - buffers.used, pool.peak])
}

#[test]
fn too_little_memory_is_an_error_that_names_the_setting_and_the_next_call_works() {
    let sequence = sequence(6 * SEGMENT + 1);
    // Enough for two segments at a time, and the pool.
    let (expected, [buffers, pool]) = scored(usize::MAX, &sequence, 2);
    let model = small(buffers + pool);
    let out = out_of_memory(score(&model, &sequence, 6));
    assert!(
        matches!(out.purpose, Some(Purpose::Activations | Purpose::Segments)),
        "{out}"
    );
    assert!(out.to_string().contains("segments_per_step"), "{out}");
    assert!(out.free.is_some_and(|free| free < out.bytes), "{out}");
    assert_eq!(score(&model, &sequence, 1).expect("scores"), expected);
}

#[test]
fn a_pool_that_does_not_fit_is_an_error_until_it_may_lie_in_host_memory() {
    let (config, sequence) = (config(false), sequence(12 * SEGMENT + 1));
    let work = |gpu: &Gpu<DryRun<Kernels>>| {
        let model = model(gpu.clone(), &config, &values(&config, 21));
        score(&model, &sequence, 1)
    };
    let roomy = dry(None);
    roomy.limit_pool(0);
    work(&roomy).expect("a dry run");
    let planned = roomy.memory_use();
    let gpu = dry(Some(planned.buffers.high_water + 2 * CHUNK));
    gpu.reserve(&planned).expect("memory for all but the pool");
    let out = out_of_memory(work(&gpu));
    assert_eq!(out.purpose, Some(Purpose::Pool), "{out}");
    assert!(out.to_string().contains("--pool host"), "{out}");
    gpu.limit_pool(0);
    work(&gpu).expect("a run");
}
