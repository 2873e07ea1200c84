//! Every driver call of a training step, of a prefill and of decoding steps fails once: the error is typed, nothing is
//! leaked, and the same work made again has the bits of work without a failure.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::common::{model, tokens, values};
use crate::retrieval_cases::{self, Tokens};
use segattn::cuda::kernels::{Error, Launch};
use segattn::device::gpu::{self, Gemm, Gpu, MemoryUse};
use segattn::device::sampler::SamplerConfig;
use segattn::device::{Device, DeviceError, OutOfMemory, PastPool, Result, Sampled};
use segattn::model::config::ModelConfig;
use segattn::model::decoder::Decoder;
use segattn::model::segmentation::Sequence;
use segattn::model::session::{Feed, Session};
use segattn::train::config::Config;
use segattn::train::progress::Tensors;
use segattn::train::trainer::Trainer;
use segattn_sim::{Checks, Driver, Kernels};

/// Which call of a [`Faulty`] driver fails.
#[derive(Debug, Default)]
struct Fault {
    /// Calls until then; 0: it fails now.
    countdown: AtomicUsize,
}

impl Fault {
    /// The call after `calls` others fails.
    fn after(&self, calls: usize) {
        self.countdown.store(calls, Ordering::SeqCst);
    }

    /// No call fails from here on; whether one has failed since [`Fault::after`].
    fn end(&self) -> bool {
        self.countdown.swap(usize::MAX, Ordering::SeqCst) > usize::MAX / 2
    }

    fn is_now(&self) -> bool {
        self.countdown.fetch_sub(1, Ordering::SeqCst) == 0
    }

    fn check(&self, call: &'static str) -> std::result::Result<(), Error> {
        match self.is_now() {
            true => Err(Error::Recording { call }),
            false => Ok(()),
        }
    }
}

/// A simulated GPU of which one call fails.
struct Faulty {
    driver: Driver,
    fault: Arc<Fault>,
}

impl fmt::Debug for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty GPU")
    }
}

impl gpu::Driver for Faulty {
    type Kernels = Kernels;
    type Graph = <Driver as gpu::Driver>::Graph;

    fn description(&self) -> String {
        "faulty GPU".into()
    }

    fn kernels(&self) -> &Kernels {
        self.driver.kernels()
    }

    fn region_bytes(&self) -> usize {
        self.driver.region_bytes()
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        match self.fault.is_now() {
            true => Err(OutOfMemory::device(bytes).into()),
            false => self.driver.allocate(bytes),
        }
    }

    unsafe fn free(&self, address: u64, bytes: usize) {
        // SAFETY: the caller's promise, here and below.
        unsafe { self.driver.free(address, bytes) }
    }

    fn allocate_host(&self, bytes: usize) -> Result<u64> {
        match self.fault.is_now() {
            true => Err(OutOfMemory::pinned(bytes).into()),
            false => self.driver.allocate_host(bytes),
        }
    }

    unsafe fn free_host(&self, address: u64, bytes: usize) {
        // SAFETY: as above.
        unsafe { self.driver.free_host(address, bytes) }
    }

    fn free_memory(&self) -> std::result::Result<usize, Error> {
        self.driver.free_memory()
    }

    unsafe fn upload(&self, to: u64, bytes: &[u8]) -> std::result::Result<(), Error> {
        self.fault.check("upload")?;
        // SAFETY: as above.
        unsafe { self.driver.upload(to, bytes) }
    }

    unsafe fn download(&self, from: u64, bytes: &mut [u8]) -> std::result::Result<(), Error> {
        self.fault.check("download")?;
        // SAFETY: as above.
        unsafe { self.driver.download(from, bytes) }
    }

    unsafe fn zero(&self, at: u64, bytes: usize) -> std::result::Result<(), Error> {
        self.fault.check("zero")?;
        // SAFETY: as above.
        unsafe { self.driver.zero(at, bytes) }
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> std::result::Result<(), Error> {
        self.fault.check("copy")?;
        // SAFETY: as above.
        unsafe { self.driver.copy(from, to, bytes) }
    }

    unsafe fn launch<P: Copy>(
        &self,
        launch: &Launch,
        params: &P,
    ) -> std::result::Result<(), Error> {
        self.fault.check("launch")?;
        // SAFETY: as above.
        unsafe { self.driver.launch(launch, params) }
    }

    unsafe fn gemm(&self, gemm: &Gemm) -> std::result::Result<(), Error> {
        self.fault.check("gemm")?;
        // SAFETY: as above.
        unsafe { self.driver.gemm(gemm) }
    }

    fn record(&self) -> std::result::Result<(), Error> {
        self.fault.check("record")?;
        self.driver.record()
    }

    fn recorded(&self) -> std::result::Result<Self::Graph, Error> {
        // The recording ends also where it gives no graph.
        let graph = self.driver.recorded();
        self.fault.check("recorded")?;
        graph
    }

    unsafe fn replay(&self, graph: &Self::Graph) -> std::result::Result<(), Error> {
        self.fault.check("replay")?;
        // SAFETY: as above.
        unsafe { self.driver.replay(graph) }
    }
}

/// A GPU of which no call fails yet; of the pools one chunk lies on the device, the others in host memory.
fn faulty() -> (Gpu<Faulty>, Arc<Fault>) {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels");
    let fault = Arc::new(Fault::default());
    fault.end();
    let gpu = Gpu::new(Faulty {
        driver: Driver::new(&kernels, 1, Checks::None),
        fault: fault.clone(),
    });
    gpu.limit_pool(4 * 32 * 2);
    (gpu, fault)
}

/// The same with pools that drop what they can.
fn bounded() -> ModelConfig {
    let mut config = config();
    config.segment.as_mut().expect("segments").pool_len = 4;
    config.validate().expect("a config");
    config
}

/// One layer, whose two heads read the prior tail and the past.
fn config() -> ModelConfig {
    let json = serde_json::json!({
        "model_type": "llama", "vocab_size": 11, "hidden_size": 32, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
        "segment": {
            "segment_len": 4, "prior_len": 2, "past_len": 2,
            "retrieval": {"block_len": 2, "probe_len": 2, "probe_window": 1, "probe_stride": 1},
            "head_reads": [[["prior", "past"], ["past"]]],
        },
    });
    ModelConfig::from_json(json).expect("a config")
}

fn used(memory: MemoryUse) -> [usize; 3] {
    [memory.buffers, memory.pool, memory.host].map(|held| held.used)
}

#[test]
fn a_training_step_whose_call_failed_can_be_made_again() {
    let config = config();
    let toml = "[data]\ntrain = [\"x\"]\n[training]\nsteps = 1000\nlearn_gates = true\n[schedule]\nlr = 0.01\n";
    let run = Config::parse(toml, &[]).expect("a run");
    let batch = vec![vec![tokens(3, 7, config.vocab_size)]];
    let trainer = || {
        let (gpu, fault) = faulty();
        let tensors = Tensors::initial(&config, 1);
        let trainer = Trainer::new(gpu.clone(), config.clone(), run.clone(), &tensors, None);
        (trainer.expect("a trainer"), gpu, fault)
    };
    let (mut expected, _, _) = trainer();
    let (mut got, gpu, fault) = trainer();
    let before = used(gpu.memory_use());
    let (mut failed, mut steps) = (0, 0);
    loop {
        fault.after(failed);
        let step = got.step_on(&batch);
        let has_failed = fault.end();
        assert_eq!(
            used(gpu.memory_use()),
            before,
            "call {failed}: memory is leaked"
        );
        match step {
            Ok(report) => {
                assert_eq!(
                    report,
                    expected.step_on(&batch).expect("a step"),
                    "call {failed}"
                );
                assert_eq!(got.progress(), expected.progress(), "call {failed}");
                steps += 1;
            }
            Err(_) => assert!(has_failed, "call {failed}"),
        }
        if !has_failed {
            break;
        }
        failed += 1;
    }
    let equal = got.tensors().expect("tensors") == expected.tensors().expect("tensors");
    assert!(equal, "after {failed} failures");
    // The last calls of a step prepare weights of an update that is made: they fail without the step.
    assert!(failed > 50 && steps > 1, "{failed} failures, {steps} steps");
}

type Model = Decoder<Gpu<Faulty>>;

fn made(gpu: Gpu<Faulty>, config: &ModelConfig) -> Model {
    model(gpu, config, &values(config, 5))
}

fn feed(session: &mut Session<'_, Gpu<Faulty>>, tokens: &[u32], breaks: &[usize]) -> Result<()> {
    let feed = Feed {
        sequence: 0,
        tokens,
        targets: &[],
        breaks,
        rereads: &[],
    };
    session.feed(&[feed]).map(|_| ())
}

#[test]
fn a_prefill_whose_call_failed_goes_on_from_its_last_complete_step() {
    prefill_with_failures(&config(), 1);
}

#[test]
fn a_prefill_that_dropped_tokens_before_a_failure_has_them_again() {
    prefill_with_failures(&bounded(), 3);
}

/// Over whole segments, short ones, and tails that reach over several. Every `stride`th call fails.
fn prefill_with_failures(config: &ModelConfig, stride: usize) {
    let (gpu, fault) = faulty();
    let model = made(gpu.clone(), config);
    let before = used(gpu.memory_use());
    let prompt = tokens(9, 10, 11);
    let read = |failing: usize| {
        let mut session = Session::new(&model, 1, 40, 2).expect("a session");
        fault.after(failing);
        let whole = Sequence {
            tokens: &prompt,
            breaks: &[5, 6],
            rereads: &[],
        };
        let fed = feed(&mut session, &prompt, whole.breaks);
        let has_failed = fault.end();
        assert_eq!(fed.is_err(), has_failed, "call {failing}");
        let rest = session.position(0)..prompt.len();
        assert!(has_failed || rest.is_empty());
        let breaks = whole.breaks_within(rest.clone());
        feed(&mut session, &prompt[rest], &breaks).expect("the rest");
        // What is carried to later segments shows in the next one.
        let logits = session.logits(0).expect("logits");
        feed(&mut session, &prompt[..5], &[]).expect("more");
        (has_failed, [logits, session.logits(0).expect("logits")])
    };
    let (_, expected) = read(usize::MAX / 4);
    let mut failing = 0;
    loop {
        let (has_failed, got) = read(failing);
        assert!(got == expected, "call {failing}: other bits");
        assert_eq!(
            used(gpu.memory_use()),
            before,
            "call {failing}: memory is leaked"
        );
        if !has_failed {
            break;
        }
        failing += stride;
    }
    assert!(failing > 50, "{failing}");
}

#[test]
fn a_decoding_step_whose_call_failed_can_be_made_again() {
    decoding_with_failures(&config());
}

#[test]
fn a_decoding_step_that_dropped_tokens_before_a_failure_can_be_made_again() {
    decoding_with_failures(&bounded());
}

/// Over the ends of segments, with steps that run as they are, that are recorded and that are replayed.
fn decoding_with_failures(config: &ModelConfig) {
    let (gpu, fault) = faulty();
    let model = made(gpu.clone(), config);
    let before = used(gpu.memory_use());
    let prompt = tokens(9, 5, 11);
    let settings = SamplerConfig {
        temperature: 0.9,
        repetition_penalty: 1.3,
        seed: 11,
        ..SamplerConfig::default()
    };
    let session = || {
        let mut session = Session::new(&model, 1, 40, 1).expect("a session");
        session
            .choose_by(&settings, &[1], &[&prompt])
            .expect("settings");
        feed(&mut session, &prompt, &[3]).expect("a prompt");
        let first = session.sample(&[0]).expect("a token")[0];
        (session, first)
    };
    let (mut reference, first) = session();
    let (mut faulty, mut last) = session();
    assert_eq!(last, first);
    let mut failures = 0;
    for step in 0..8 {
        let next = [(0, last.token)];
        let expected: Vec<Sampled> = reference.decode(&next).expect("a token");
        for failing in 0.. {
            fault.after(failing);
            let decoded = faulty.decode(&next);
            if !fault.end() {
                assert_eq!(decoded.expect("a token"), expected, "step {step}");
                break;
            }
            let error = decoded.expect_err("a failed call");
            let typed = matches!(error, DeviceError::Gpu(_) | DeviceError::OutOfMemory(_));
            assert!(typed, "step {step}, call {failing}: {error}");
            failures += 1;
        }
        last = expected[0];
    }
    assert_eq!(faulty.position(0), reference.position(0));
    let logits = |session: &Session<'_, _>| session.logits(0).expect("logits");
    assert!(logits(&faulty) == logits(&reference));
    drop((faulty, reference));
    assert_eq!(used(gpu.memory_use()), before);
    assert!(failures > 100, "{failures}");
}

#[test]
fn tokens_whose_append_failed_are_not_in_the_pool() {
    let tokens = Tokens::new(32, 30, 1, 5);
    let (gpu, fault) = faulty();
    gpu.limit_pool(5 * 8 * 2 * 32 * 2);
    let mut pool = retrieval_cases::pool(&gpu, &Tokens::new(32, 21, 1, 5), 8, &[21]);
    let contents = |pool: &<Gpu<Faulty> as Device>::Pool| pool.read(&gpu, 0..21).expect("a read");
    let before = contents(&pool);
    let held = || used(gpu.memory_use()).iter().sum::<usize>();
    let values = vec![1.0; 9 * 2 * 32];
    let mut failed = 0;
    loop {
        let memory = held();
        fault.after(failed);
        let written = pool.write(&gpu, &values, &values);
        let has_failed = fault.end();
        assert_eq!(written.is_err(), has_failed, "call {failed}");
        if !has_failed {
            break;
        }
        assert_eq!(pool.tokens(), 21, "call {failed}");
        assert!(contents(&pool) == before, "call {failed}");
        assert_eq!(held(), memory, "call {failed}");
        pool.read(&gpu, 0..22)
            .expect_err("a token that is not there");
        failed += 1;
    }
    // Memory of a chunk, and writes to the chunk that had room and to the new one.
    assert!(failed >= 4, "{failed} failures");
    assert_eq!(pool.tokens(), tokens.count);
    assert_eq!(
        pool.read(&gpu, 21..30).expect("a read"),
        (values.clone(), values)
    );
}
