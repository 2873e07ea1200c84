//! How many calls a step makes on a GPU: those of attention do not depend on how the data's breaks cut its sequences,
//! norms of q's and k's heads are no calls of their own, and sink logits are few. Counted on a driver that only counts.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use segattn::cuda::kernels::{Error, KernelMetadata, Launch};
use segattn::device::DeviceError;
use segattn::device::gpu::{Driver, DryRun, Gemm, Gpu};
use segattn::model::config::ModelConfig;
use segattn::model::decoder::Decoder;
use segattn::model::session::score;
use segattn::model::switches::QkNorm;
use segattn::train::data::Example;
use segattn::train::streams::{Gradients, StreamConfig, accumulate};

/// A dry run that counts launches by the kernel's name, and other calls by their own.
#[derive(Debug)]
struct Counting {
    dry: DryRun<KernelMetadata>,
    calls: Mutex<BTreeMap<&'static str, usize>>,
}

impl Counting {
    fn new() -> Self {
        let kernels = KernelMetadata {
            multiprocessors: 132,
            hopper: true,
        };
        Self {
            dry: DryRun::new(Arc::new(kernels), None),
            calls: Mutex::default(),
        }
    }

    fn count(&self, call: &'static str) {
        *self
            .calls
            .lock()
            .expect("no panic")
            .entry(call)
            .or_default() += 1;
    }
}

impl Driver for Counting {
    type Kernels = KernelMetadata;
    type Graph = ();

    fn description(&self) -> String {
        self.dry.description()
    }

    fn kernels(&self) -> &KernelMetadata {
        self.dry.kernels()
    }

    fn computes(&self) -> bool {
        false
    }

    fn region_bytes(&self) -> usize {
        self.dry.region_bytes()
    }

    fn allocate(&self, bytes: usize) -> Result<u64, DeviceError> {
        self.dry.allocate(bytes)
    }

    unsafe fn free(&self, address: u64, bytes: usize) {
        // SAFETY: nothing is freed, here and below.
        unsafe { self.dry.free(address, bytes) }
    }

    fn allocate_host(&self, bytes: usize) -> Result<u64, DeviceError> {
        self.dry.allocate_host(bytes)
    }

    unsafe fn free_host(&self, address: u64, bytes: usize) {
        // SAFETY: as above.
        unsafe { self.dry.free_host(address, bytes) }
    }

    fn free_memory(&self) -> Result<usize, Error> {
        self.dry.free_memory()
    }

    unsafe fn upload(&self, _: u64, _: &[u8]) -> Result<(), Error> {
        self.count("upload");
        Ok(())
    }

    unsafe fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.count("download");
        // SAFETY: nothing is read.
        unsafe { self.dry.download(from, bytes) }
    }

    unsafe fn zero(&self, _: u64, _: usize) -> Result<(), Error> {
        self.count("zero");
        Ok(())
    }

    unsafe fn copy(&self, _: u64, _: u64, _: usize) -> Result<(), Error> {
        self.count("copy");
        Ok(())
    }

    unsafe fn launch<P: Copy>(&self, launch: &Launch, _: &P) -> Result<(), Error> {
        self.count(launch.entry.name);
        Ok(())
    }

    unsafe fn gemm(&self, _: &Gemm) -> Result<(), Error> {
        self.count("gemm");
        Ok(())
    }

    fn record(&self) -> Result<(), Error> {
        Ok(())
    }

    fn recorded(&self) -> Result<(), Error> {
        Ok(())
    }

    unsafe fn replay(&self, (): &()) -> Result<(), Error> {
        Ok(())
    }
}

/// Two layers that read the prior tail, sinks and the past, by the second rule of retrieval.
fn config(kv_heads: usize, qk_norm: QkNorm) -> ModelConfig {
    let mut config =
    ModelConfig::from_json(serde_json::json!({
        "model_type": "llama", "vocab_size": 256, "hidden_size": 192, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 3 * kv_heads, "num_key_value_heads": kv_heads, "head_dim": 64,
        "tie_word_embeddings": true,
        "segment": {
            "segment_len": 64, "prior_len": 64, "past_len": 32, "sink_len": 4,
            "head_reads": vec![vec![vec!["prior", "past"]; kv_heads]; 2],
            "retrieval": {"queries": 16, "window_len": 8},
        },
    }))
    .expect("a config");
    config.switches.qk_norm = qk_norm;
    config
}

type Calls = BTreeMap<&'static str, usize>;

/// Calls of one gradient of 8 sequences of 200 tokens, whose segments end at these breaks too.
fn calls(breaks: impl Fn(usize) -> Vec<usize>) -> Calls {
    training_calls(config(1, QkNorm::None), breaks, false)
}

fn training_calls(
    config: ModelConfig,
    breaks: impl Fn(usize) -> Vec<usize>,
    recompute: bool,
) -> Calls {
    let gpu = Gpu::new(Counting::new());
    let model = Decoder::for_dry_run(gpu.clone(), config, true).expect("a model");
    let mut gradients = Gradients::new(&model).expect("gradients");
    let sequences: Vec<Example> = (0..8)
        .map(|i| Example {
            tokens: vec![1; 201],
            breaks: breaks(i),
            ..Example::default()
        })
        .collect();
    gpu.driver().calls.lock().expect("no panic").clear();
    let config = StreamConfig {
        tbptt: 1,
        segments_per_step: 1,
        recompute,
    };
    accumulate(&model, &sequences, config, 1.0, &mut gradients).expect("a gradient");
    let calls = gpu.driver().calls.lock().expect("no panic").clone();
    let total: usize = calls.values().sum();
    println!("{total} calls: {calls:#?}");
    calls
}

/// Calls of scoring 60 tokens, rows of one segment.
fn scoring_calls(config: ModelConfig) -> Calls {
    let gpu = Gpu::new(Counting::new());
    let model = Decoder::for_dry_run(gpu.clone(), config, false).expect("a model");
    gpu.driver().calls.lock().expect("no panic").clear();
    score(&model, &vec![1; 60], 1).expect("scores");
    gpu.driver().calls.lock().expect("no panic").clone()
}

/// Those whose names begin so.
fn of(calls: &Calls, names: &[&str]) -> usize {
    let wanted = |name: &str| names.iter().any(|start| name.starts_with(start));
    let found = calls.iter().filter(|(name, _)| wanted(name));
    found.map(|(_, count)| count).sum()
}

#[test]
fn unequal_segments_are_one_attention_call() {
    // Four segments a sequence in both cases, of 36 to 64 tokens.
    let equal = calls(|_| vec![50, 100, 150]);
    let unequal = calls(|i| vec![50 + i, 100 - i, 150 + i]);
    const ATTENTION: [&str; 2] = ["attention_", "combine_"];
    assert_eq!(of(&equal, &ATTENTION), of(&unequal, &ATTENTION));
    // Of each layer a forward call a segment. Backward calls: the losses of the first two segments, and from the third
    // on its own loss and, below the last layer, the stream that it sends to the segment before.
    let (forward, backward) = (2 * 4, 2 * (2 + 2) + 2);
    assert_eq!(of(&unequal, &ATTENTION), forward + 4 * backward);
    assert_eq!(of(&equal, &["gemm"]), of(&unequal, &["gemm"]));
}

/// Calls by name that one has and the other has not, or not as often: `(name, theirs, ours)`.
fn differences(theirs: &Calls, ours: &Calls) -> Vec<(&'static str, usize, usize)> {
    let names: BTreeSet<&'static str> = theirs.keys().chain(ours.keys()).copied().collect();
    let counts = names.into_iter().map(|name| {
        let count = |calls: &Calls| calls.get(name).copied().unwrap_or(0);
        (name, count(theirs), count(ours))
    });
    counts.filter(|(_, theirs, ours)| theirs != ours).collect()
}

#[test]
fn norms_of_heads_are_no_calls_of_a_forward() {
    let [without, with] = [QkNorm::None, QkNorm::Head].map(|norm| scoring_calls(config(2, norm)));
    let split = [("split_qkv_bf16", 2, 0), ("split_qkv_norm_bf16", 0, 2)];
    assert_eq!(differences(&without, &with), split);
}

#[test]
fn norms_of_heads_are_one_call_of_a_layer_s_backward_and_two_of_its_weights() {
    for recompute in [false, true] {
        let breaks = |_| vec![50, 100, 150];
        let calls = |norm| training_calls(config(2, norm), breaks, recompute);
        let (without, with) = (calls(QkNorm::None), calls(QkNorm::Head));
        // Two layers of four segments each have a pass of their own loss; of all but the last, and twice below the last
        // layer, one of what they were sent, whose gradient is a temporary that is added to the sum.
        let (own, sent, splits) = (8, 4, without["split_qkv_bf16"]);
        assert_eq!(with["join_qkv_bf16"], without["join_qkv_bf16"]);
        let copies = without["copy_bf16_bf16"];
        let expected = [
            ("copy_bf16_bf16", copies, copies + sent),
            ("head_norms_grad_bf16", 0, own + sent),
            ("rms_norm_chain_f32", 0, own),
            ("rms_norm_group_sums_bf16", 0, own),
            ("split_qkv_bf16", splits, 0),
            ("split_qkv_norm_bf16", 0, splits),
        ];
        assert_eq!(differences(&without, &with), expected);
    }
}

/// Also where breaks cut the sequences differently.
#[test]
fn sink_logits_are_one_call_of_a_layer_s_forward_and_two_of_each_backward_pass() {
    let with_sinks = || {
        let mut config = config(1, QkNorm::None);
        config.switches.sink_logits = true;
        config
    };
    let without = scoring_calls(config(1, QkNorm::None));
    let with = scoring_calls(with_sinks());
    assert_eq!(differences(&without, &with), [("sink_logits_bf16", 0, 2)]);
    let breaks = |i| vec![50 + i, 100 - i, 150 + i];
    let without = training_calls(config(1, QkNorm::None), breaks, false);
    let with = training_calls(with_sinks(), breaks, false);
    let passes = of(&without, &["attention_prepare_"]);
    for (name, count) in [
        ("sink_logits_bf16", of(&without, &["attention_prefill_"])),
        ("sink_logits_grad_bf16", passes),
        ("sink_logits_sums_f32", passes),
    ] {
        assert_eq!(with[name], count, "{name}");
    }
    assert_eq!(with["gemm"], without["gemm"]);
}
