//! The plan of a GPU's memory that `segattn serve` makes holds what its engine does, without a GPU.

use std::sync::Arc;

use segattn::cuda::kernels::KernelMetadata;
use segattn::device::gpu::{DryRun, Gpu};
use segattn::generate::GeneratorConfig;
use segattn::generate::dry_run::dry_run_serving;
use segattn::generate::sampler::SamplerConfig;
use segattn::model::config::{ModelConfig, PromptBreak};
use segattn::model::decoder::Decoder;
use segattn::serve::job::{Event, Events, Job};
use segattn::serve::{Limits, Shared, engine};
use serde_json::json;
use tokio::sync::mpsc::unbounded_channel;

type Dry = Gpu<DryRun<KernelMetadata>>;

fn dry() -> Dry {
    let kernels = KernelMetadata {
        multiprocessors: 132,
        hopper: true,
    };
    Gpu::new(DryRun::new(Arc::new(kernels), None))
}

fn config(segmented: bool) -> ModelConfig {
    let layer = [vec!["prior"], vec!["past"]];
    let segment =
        json!({"segment_len": 64, "prior_len": 16, "past_len": 16, "head_reads": vec![layer; 4]});
    let config = json!({
        "model_type": "llama", "vocab_size": 32_000, "hidden_size": 256, "intermediate_size": 688,
        "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128,
        "max_position_embeddings": 4096, "segment": if segmented { segment } else { json!(null) },
    });
    ModelConfig::from_json(config).expect("a config")
}

#[test]
fn a_server_holds_no_more_than_its_dry_run() {
    for (segmented, pool_len, read_at_once) in [
        (true, 0, 40),
        (true, 0, 200),
        (true, 64, 40),
        (true, 96, 200),
        (false, 0, 40),
    ] {
        let mut config = config(segmented);
        if let Some(segment) = &mut config.segment {
            segment.pool_len = pool_len;
        }
        let limits = Limits {
            running: 3,
            waiting: 100,
            longest: 300,
            read_at_once,
            cache_bytes: 1 << 30,
        };
        let gpu = dry();
        let model = Decoder::for_dry_run(gpu.clone(), config.clone(), false).expect("a model");
        dry_run_serving(&model, limits.running, limits.longest, read_at_once).expect("a dry run");
        let planned = gpu.memory_use();

        let gpu = dry();
        let model = Decoder::for_dry_run(gpu.clone(), config.clone(), false).expect("a model");
        let shared = Arc::new(Shared::new(
            limits,
            config.vocab_size,
            PromptBreak::default(),
        ));
        let (handle, inbox) = engine::connect(shared.clone());
        let (to, mut from) = unbounded_channel();
        let jobs = [
            (280, 20, None),
            (1, 299, None),
            (290, 10, Some(0)),
            (150, 150, None),
            (100, 3, Some(2)),
            (64, 60, None),
        ];
        let places = handle.places(jobs.len()).expect("places");
        for (index, ((prompt, max_new, prompt_top), permit)) in
            jobs.into_iter().zip(places).enumerate()
        {
            let job = Job {
                // All begin alike, so that states are kept and restored.
                prompt: vec![0; prompt],
                breaks: Vec::new(),
                config: GeneratorConfig {
                    sampler: SamplerConfig::greedy(),
                    max_new,
                    end_tokens: Vec::new(),
                },
                stream: 0,
                stops: Vec::new(),
                top: 20,
                prompt_top,
                events: Events {
                    index,
                    to: to.clone(),
                },
                permit,
                rereads: Vec::new(),
            };
            handle.run(job).expect("an engine");
        }
        drop((handle, to));
        engine::run(&model, None, &shared, &inbox).expect("a run");
        let held = gpu.memory_use();
        let (mut tokens, mut ended, mut cached) = (0, 0, 0);
        while let Some((_, event)) = from.blocking_recv() {
            match event {
                Event::Prompt(prompt) => cached += prompt.cached,
                Event::Token(_) => tokens += 1,
                Event::End(_) => ended += 1,
                Event::Failed(failure) => panic!("{failure}"),
            }
        }
        assert_eq!((tokens, ended), (20 + 299 + 10 + 150 + 3 + 60, jobs.len()));
        assert!(cached > 0);
        for (held, planned) in [
            (held.buffers, planned.buffers),
            (held.pool, planned.pool),
            (held.host, planned.host),
        ] {
            let [held, planned] = [held, planned].map(|h| h.high_water);
            assert!(
                held <= planned,
                "{segmented}, {pool_len}, {read_at_once}: {planned} planned, {held} held"
            );
        }
    }
}
