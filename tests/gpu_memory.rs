//! Plans of a GPU's memory, made without one: a dry run holds what the run holds, a million tokens take the device
//! memory of 32 thousand, and pools go where there is room.

use std::ops::ControlFlow;
use std::sync::Arc;

use segattn::cuda::kernels::KernelMetadata;
use segattn::device::gpu::{DryRun, Gpu, MemoryPlan, MemoryUse, PoolPlacement};
use segattn::device::{DeviceError, PoolBits, Purpose};
use segattn::eval::perplexity::{Document, PerplexityConfig, perplexity};
use segattn::generate::dry_run::{Reading, dry_run};
use segattn::generate::sampler::SamplerConfig;
use segattn::generate::{GenerateError, Generator, GeneratorConfig, Prompt};
use segattn::model::config::{ModelConfig, RetrievalConfig};
use segattn::model::decoder::Decoder;
use segattn::model::parameters::specs;
use segattn::model::segmentation::Tokens;
use segattn::model::session::{Session, score};
use segattn::ranks::Ranks;
use segattn::train::config::{Config, MixtureSection, TaskSection};
use segattn::train::data::Example;
use segattn::train::trainer::Trainer;

type Dry = Gpu<DryRun<KernelMetadata>>;

fn kernels() -> Arc<KernelMetadata> {
    Arc::new(KernelMetadata {
        multiprocessors: 132,
        hopper: true,
    })
}

fn dry(bytes: Option<usize>) -> Dry {
    Gpu::new(DryRun::new(kernels(), bytes))
}

/// `layers` layers of `heads` heads of 128, half of which read the past in every fourth layer.
fn config(layers: usize, heads: usize, segment_len: usize) -> ModelConfig {
    let read = |l: usize, g: usize| match (l % 4, g % 2) {
        (_, 0) => vec!["prior"],
        (3, _) => vec!["past"],
        _ => Vec::new(),
    };
    let layer = |l| (0..heads).map(|g| read(l, g)).collect::<Vec<_>>();
    ModelConfig::from_json(serde_json::json!({
        "model_type": "llama", "vocab_size": 32_000, "hidden_size": heads * 128,
        "intermediate_size": heads * 344, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "head_dim": 128,
        "segment": {
            "segment_len": segment_len, "prior_len": segment_len / 8, "past_len": segment_len / 8,
            "head_reads": (0..layers).map(layer).collect::<Vec<_>>(),
        },
    }))
    .expect("a config")
}

fn dry_run_use(config: &ModelConfig, reading: &Reading, pool_limit: usize) -> MemoryUse {
    let gpu = dry(None);
    gpu.limit_pool(pool_limit);
    let model = Decoder::for_dry_run(gpu.clone(), config.clone(), false).expect("a model");
    dry_run(&model, reading, || ()).expect("a dry run");
    gpu.memory_use()
}

/// The whole run, token by token where tokens are generated.
fn run(model: &Decoder<Dry>, reading: &Reading) -> Result<(), GenerateError> {
    if reading.scored {
        let sequence = vec![0; reading.sequences[0][1] + 1];
        score(model, &sequence, reading.segments_per_step)?;
        return Ok(());
    }
    let longest = reading
        .sequences
        .iter()
        .map(|[_, tokens]| tokens + reading.new);
    let longest = longest.max().expect("sequences");
    let count = reading.sequences.len();
    let mut session = Session::new(model, count, longest, reading.segments_per_step)?;
    let tokens: Vec<Vec<u32>> = reading.sequences.iter().map(|s| vec![0; s[1]]).collect();
    let prompt = |tokens| Prompt {
        before: &[],
        breaks: &[],
        tokens,
        stream: 0,
        rereads: &[],
    };
    let prompts: Vec<Prompt<'_>> = tokens.iter().map(|t| prompt(t)).collect();
    let config = GeneratorConfig {
        sampler: SamplerConfig::greedy(),
        max_new: reading.new,
        end_tokens: Vec::new(),
    };
    Generator::new(&mut session, &prompts, config)?.run(|_| ControlFlow::Continue(()))?;
    Ok(())
}

fn readings() -> [Reading; 6] {
    let reading = |sequences: &[usize], scored, new, segments_per_step| Reading {
        sequences: sequences.iter().map(|tokens| [0, *tokens]).collect(),
        scored,
        new,
        segments_per_step,
    };
    [
        reading(&[2100], true, 0, 1),
        reading(&[2100], true, 0, 3),
        reading(&[1500], false, 20, 1),
        reading(&[10], false, 300, 1),
        reading(&[1500, 40, 700], false, 150, 2),
        reading(&[64], false, 1, 1),
    ]
}

#[test]
fn a_dry_run_holds_what_the_run_holds() {
    for pool_len in [0, 64, 320] {
        for (suffix, rereads) in [
            (None, 0),
            (Some(0), 0),
            (Some(3), 0),
            (Some(50), 0),
            (Some(3), 2),
            (Some(50), 1),
        ] {
            let mut config = bounded(config(8, 2, 64), pool_len);
            let segment = config.segment.as_mut().expect("segments");
            segment.break_after_prompt = suffix.is_some();
            segment.prompt_suffix_len = suffix.unwrap_or(0);
            segment.reread_suffix = rereads;
            config.switches.sink_logits = suffix == Some(3);
            holds_what_the_run_holds(&config);
        }
    }
}

/// The same with pools of at most so many tokens.
fn bounded(mut config: ModelConfig, pool_len: usize) -> ModelConfig {
    config.segment.as_mut().expect("segments").pool_len = pool_len;
    config.validate().expect("a config");
    config
}

fn holds_what_the_run_holds(config: &ModelConfig) {
    for reading in readings() {
        for pool_limit in [usize::MAX, 0, 100_000] {
            let gpu = dry(None);
            gpu.limit_pool(pool_limit);
            let model = Decoder::for_dry_run(gpu.clone(), config.clone(), false).expect("a model");
            run(&model, &reading).expect("a run");
            let (held, planned) = (gpu.memory_use(), dry_run_use(config, &reading, pool_limit));
            for (held, planned) in [
                (held.buffers, planned.buffers),
                (held.pool, planned.pool),
                (held.host, planned.host),
            ] {
                let [held, planned] = [held, planned].map(|h| h.high_water as f64);
                // In a plan all sequences drop tokens in one step; here they end their segments in different ones.
                let together = config.segment.as_ref().is_some_and(|s| s.pool_len > 0);
                let most = if together && reading.sequences.len() > 1 {
                    1.5
                } else {
                    1.02
                };
                assert!(
                    held <= planned && planned <= most * held,
                    "{reading:?}, {pool_limit}: {planned} planned, {held} held"
                );
            }
        }
    }
}

/// Tokens of a dry run are arbitrary, and must not end segments early; a run with breaks holds no more than planned.
#[test]
fn breaks_take_no_more_memory_than_a_dry_run_without() {
    let config = config(8, 2, 64);
    let mut broken = config.clone();
    broken.segment.as_mut().expect("segments").break_ids = vec![0];
    for reading in &readings()[..2] {
        let planned = dry_run_use(&config, reading, 100_000);
        assert_eq!(dry_run_use(&broken, reading, 100_000), planned);
        let gpu = dry(None);
        gpu.limit_pool(100_000);
        let model = Decoder::for_dry_run(gpu.clone(), config.clone(), false).expect("a model");
        let len = reading.sequences[0][1] + 1;
        let sequence = Tokens {
            ids: vec![0; len],
            breaks: (1..len).filter(|i| i % 7 == 0 || i % 50 < 3).collect(),
            rereads: Vec::new(),
        };
        score(&model, &sequence, reading.segments_per_step).expect("scores");
        let held = gpu.memory_use();
        assert!(
            held.buffers.high_water <= planned.buffers.high_water,
            "{held:?} {planned:?}"
        );
        let pools = |used: &MemoryUse| used.pool.high_water + used.host.high_water;
        assert!(
            pools(&held) <= pools(&planned) * 104 / 100,
            "{held:?} {planned:?}"
        );
    }
}

/// An element of the pool and its part of a step.
#[test]
fn a_pool_of_fewer_bits_takes_so_much_less_memory() {
    let mut config = config(8, 2, 64);
    let reading = &readings()[0];
    let pool = |config: &ModelConfig| dry_run_use(config, reading, usize::MAX).pool.high_water;
    let whole = pool(&config);
    for (bits, of_128_numbers) in [(PoolBits::Eight, 64 + 4), (PoolBits::Four, 32 + 4)] {
        config.segment.as_mut().expect("segments").pool_bits = bits;
        assert_eq!(pool(&config) * 128, whole * of_128_numbers, "{bits:?}");
    }
}

/// Reading takes what the pools of before a step and after it take, and the rows of a segment of the layer at work.
#[test]
fn a_bounded_pool_takes_the_same_memory_for_a_text_of_any_length() {
    let config = bounded(config(8, 2, 64), 256);
    let of = |tokens, scored| {
        let reading = Reading {
            sequences: vec![[0, tokens]],
            scored,
            new: if scored { 0 } else { 3 },
            segments_per_step: 1,
        };
        dry_run_use(&config, &reading, usize::MAX)
    };
    for scored in [false, true] {
        let (short, long, longest) = (of(2048, scored), of(8192, scored), of(1 << 20, scored));
        assert_eq!(short.pool.high_water, long.pool.high_water);
        assert_eq!(short.pool.high_water, longest.pool.high_water);
        // Results of scoring grow.
        if !scored {
            assert_eq!(short.buffers.high_water, long.buffers.high_water);
            assert_eq!(short.buffers.high_water, longest.buffers.high_water);
        }
        // Keys and values of one head in two layers.
        assert_eq!(short.pool.peak, 2 * 2 * 128 * (2 * 2 * 256 + 64));
    }
}

/// The break of a prompt makes a segment of what would be a part, which is then read side by side with those before.
#[test]
fn segments_side_by_side_before_a_break_stay_within_their_plan() {
    for (tokens, suffix, rereads) in [
        (8064, 0, 0),
        (8064, 2, 0),
        (8064, 64, 0),
        (8064, 64, 2),
        (8192, 64, 2),
        (8300, 64, 1),
        (65_500, 64, 2),
    ] {
        let mut config = config(4, 4, 1024);
        let segment = config.segment.as_mut().expect("segments");
        segment.break_after_prompt = true;
        (segment.prompt_suffix_len, segment.reread_suffix) = (suffix, rereads);
        config.validate().expect("a config");
        let reading = Reading {
            sequences: vec![[0, tokens]; 4],
            scored: false,
            new: 30,
            segments_per_step: 8,
        };
        let planned = dry_run_use(&config, &reading, usize::MAX);
        let gpu = dry(None);
        let model = Decoder::for_dry_run(gpu.clone(), config, false).expect("a model");
        run(&model, &reading).expect("a run");
        let held = gpu.memory_use();
        assert!(
            held.buffers.peak <= planned.buffers.peak,
            "{reading:?}, {suffix}, {rereads}: {held:?} {planned:?}"
        );
    }
}

/// Retrieval takes memory for every token that it scores, so more with each segment.
#[test]
fn a_long_prompt_and_its_break_stay_within_their_plan() {
    for retrieval in [RetrievalConfig::default(), RetrievalConfig::windows()] {
        let mut config = config(6, 4, 1024);
        let segment = config.segment.as_mut().expect("segments");
        (segment.retrieval, segment.break_after_prompt) = (retrieval, true);
        for segments_per_step in [1, 8] {
            let reading = Reading {
                sequences: vec![[0, 129_522]],
                scored: false,
                new: 256,
                segments_per_step,
            };
            let gpu = dry(Some(100 << 30));
            let dry_run = |dry| {
                let model = Decoder::for_dry_run(dry, config.clone(), false)?;
                dry_run(&model, &reading, || ())
            };
            gpu.reserve_for(
                &kernels(),
                PoolPlacement::Auto,
                Purpose::Activations,
                dry_run,
            )
            .expect("a plan");
            let before = gpu.memory_use().on_device();
            let model = Decoder::for_dry_run(gpu.clone(), config.clone(), false).expect("a model");
            run(&model, &reading).expect("a run");
            assert_eq!(gpu.memory_use().on_device(), before, "{reading:?}");
        }
    }
}

/// A model of 7 billion parameters in the paper's setting.
#[test]
fn a_million_tokens_take_the_device_memory_of_32_thousand() {
    let mut config = config(32, 32, 4096);
    config.intermediate_size = 11_008;
    let of = |tokens| {
        let reading = Reading {
            sequences: vec![[0, tokens]],
            scored: false,
            new: 2,
            segments_per_step: 1,
        };
        dry_run_use(&config, &reading, 0)
    };
    let (short, long) = (of(1 << 15), of(1 << 20));
    assert_eq!(short.buffers.high_water, long.buffers.high_water);
    assert_eq!((short.pool.peak, long.pool.peak), (0, 0));
    // Keys and values of 16 heads in 8 layers.
    assert_eq!(long.host.peak, (2 * 16 * 128 * 2 * 8) << 20);
}

fn planned(gpu: &Dry, pool: PoolPlacement, reading: &Reading) -> Result<MemoryPlan, GenerateError> {
    let config = config(8, 2, 64);
    gpu.reserve_for(&kernels(), pool, Purpose::Activations, |dry| {
        let model = Decoder::for_dry_run(dry, config.clone(), false)?;
        dry_run(&model, reading, || ())
    })
}

#[test]
fn a_pool_lies_on_the_device_as_far_as_there_is_room() {
    let [_, _, reading, ..] = readings();
    let all = planned(&dry(None), PoolPlacement::Auto, &reading).expect("a plan");
    assert_eq!(all.host_bytes(), 0);
    let (pool, spare) = (all.planned.pool.high_water, 96 << 20);
    for (bytes, on_device) in [
        (all.device_bytes() + spare, pool),
        (all.device_bytes() + spare - pool / 2, pool / 2),
        (all.device_bytes() + spare - pool, 0),
    ] {
        let gpu = dry(Some(bytes));
        let plan = planned(&gpu, PoolPlacement::Auto, &reading).expect("a plan");
        // Chunks are whole.
        let held = plan.planned.pool.high_water;
        assert!(
            held <= on_device && held + 20_000 >= on_device,
            "{held} of {on_device}"
        );
        assert!(plan.host_bytes() + held >= pool);
        // What is taken is what the plan says, and the run asks for no more.
        let before = gpu.memory_use().on_device();
        assert_eq!(before, plan.device_bytes());
        let config = config(8, 2, 64);
        let model = Decoder::for_dry_run(gpu.clone(), config, false).expect("a model");
        run(&model, &reading).expect("a run");
        assert_eq!(gpu.memory_use().on_device(), before);
    }
}

#[test]
fn a_plan_that_does_not_fit_says_what_would() {
    let [_, _, reading, ..] = readings();
    let all = planned(&dry(None), PoolPlacement::Auto, &reading).expect("a plan");
    let buffers = all.planned.buffers.high_water;
    let refused = |bytes, pool| {
        let error = planned(&dry(Some(bytes)), pool, &reading).expect_err("too little memory");
        match error {
            GenerateError::Device(DeviceError::OutOfMemory(out)) => out,
            error => panic!("{error}"),
        }
    };
    let on_device = PoolPlacement::AtMost(usize::MAX);
    let out = refused(buffers + 1, on_device);
    assert_eq!(out.purpose, Some(Purpose::Pool));
    assert_eq!(
        (out.bytes, out.free),
        (all.device_bytes(), Some(buffers + 1))
    );
    let out = refused(buffers - 256, PoolPlacement::Auto);
    assert_eq!(out.purpose, Some(Purpose::Activations));
    assert!(out.to_string().contains("segments_per_step"), "{out}");
}

/// After a rehearsal for `sequences` sequences, three steps take no more memory.
fn steps_as_planned(gpu: &Dry, mut trainer: Trainer<Dry>, sequences: usize, what: &str) {
    trainer.rehearse(sequences, 256).unwrap();
    let planned = gpu.memory_use().buffers.high_water;
    for _ in 0..3 {
        let step = vec![vec![0u32; 257]; sequences];
        trainer.step_on(&[step]).unwrap();
    }
    assert_eq!(gpu.memory_use().buffers.high_water, planned, "{what}");
}

#[test]
fn later_steps_of_a_rank_take_no_more_than_the_plan() {
    for (rank, world, batch) in [(0, 2, 1), (1, 2, 2), (2, 3, 1)] {
        let gpu = dry(None);
        let mut training = Config::default();
        training.training.sequence_len = 256;
        training.training.batch = batch;
        training.training.group = Some(1);
        let (model, ranks) = (config(4, 4, 128), Ranks::planned(rank, world));
        let trainer = Trainer::for_dry_run(gpu.clone(), model, training, ranks).unwrap();
        let what = format!("rank {rank} of {world}");
        steps_as_planned(&gpu, trainer, world * batch, &what);
    }
}

/// A question that is read twice takes a slot of its own, with the keys and values that its first reading retrieves.
#[test]
fn questions_that_are_read_twice_are_planned() {
    let mut model = config(4, 4, 128);
    // Logits would take more than all else.
    model.vocab_size = 64;
    let segment = model.segment.as_mut().unwrap();
    (segment.break_after_prompt, segment.prompt_suffix_len) = (true, 16);
    segment.reread_suffix = 1;
    let held = |questions: usize| {
        let mut training = Config::default();
        (training.training.sequence_len, training.training.batch) = (1024, 2);
        training.training.segments_per_step = 0;
        training.data.mixture = vec![MixtureSection {
            name: "questions".into(),
            paths: Vec::new(),
            weight: 1.0,
            tasks: Some(TaskSection {
                questions,
                ..TaskSection::default()
            }),
            relay: None,
        }];
        let gpu = dry(None);
        let trainer = Trainer::for_dry_run(gpu.clone(), model.clone(), training, Ranks::alone());
        let mut trainer = trainer.unwrap();
        trainer.rehearse(2, 1024).unwrap();
        let planned = gpu.memory_use().buffers.high_water;
        let asked: Vec<usize> = (1..=10).map(|i| 100 * i).collect();
        let asking = Example {
            tokens: vec![0; 1025],
            breaks: asked.clone(),
            rereads: asked,
            ..Example::default()
        };
        trainer.step_on(&[vec![asking.clone(), asking]]).unwrap();
        (gpu.memory_use().buffers.high_water, planned)
    };
    let (as_planned, planned) = held(10);
    assert_eq!(as_planned, planned);
    let (more, planned) = held(0);
    assert!(more > planned, "{more} of {planned}");
}

#[test]
fn a_teacher_and_its_keys_and_values_are_planned() {
    let (model, mut teacher) = (config(4, 4, 128), config(2, 4, 128));
    teacher.segment = None;
    let taught = |on: bool| {
        let (gpu, mut training) = (dry(None), Config::default());
        training.training.sequence_len = 256;
        training.training.batch = 2;
        training.distillation.model = on.then(|| "teacher".into());
        let run = Trainer::for_dry_run(gpu.clone(), model.clone(), training, Ranks::alone());
        let mut run = run.unwrap();
        if on {
            let teacher = Decoder::for_dry_run(gpu.clone(), teacher.clone(), false).unwrap();
            run = run.with_teacher(teacher).unwrap();
        }
        steps_as_planned(&gpu, run, 2, "with a teacher");
        gpu.memory_use().buffers.high_water
    };
    let parameters = specs(&teacher).into_iter().map(|s| s.role.len());
    let weights = 2 * parameters.sum::<usize>();
    // Keys and values of two sequences of 256 tokens, in bf16. Logits are there at the losses, which is not where most
    // is held.
    let kept = 2 * 256 * 2 * 2 * 512 * 2;
    let logits = 4 * 256 * 32_000;
    let more = taught(true) - taught(false);
    assert!(more >= weights + kept, "{more}");
    assert!(more < weights + kept + logits, "{more}");
}

#[test]
fn a_stage_takes_less_than_the_whole_and_no_more_than_its_plan() {
    let (model, mut training) = (config(4, 4, 128), Config::default());
    training.training.sequence_len = 256;
    let of = |world: usize| -> Vec<usize> {
        let stage = |rank: usize| {
            let (gpu, ranks) = (dry(None), Ranks::planned(rank, world));
            let (model, training) = (model.clone(), training.clone());
            let trainer = Trainer::stage_for_dry_run(gpu.clone(), model, training, ranks);
            let what = format!("stage of rank {rank} of {world}");
            steps_as_planned(&gpu, trainer.unwrap(), 2, &what);
            gpu.memory_use().buffers.high_water
        };
        (0..world).map(stage).collect()
    };
    let (whole, stages) = (of(1)[0], of(2));
    for stage in &stages {
        assert!(*stage < whole * 3 / 4, "{stages:?} of {whole}");
    }
    assert!(stages.iter().sum::<usize>() > whole, "{stages:?}");
}
/// Whole segments are read first, so that slots for parts are taken when those for whole segments are free.
#[test]
fn texts_of_different_lengths_stay_within_the_plan_of_the_longest() {
    let mut config = config(64, 4, 64);
    config.vocab_size = 1000;
    let reading = Reading {
        sequences: vec![[0, 511]; 8],
        scored: true,
        new: 0,
        segments_per_step: 8,
    };
    let planned = dry_run_use(&config, &reading, usize::MAX);
    let gpu = dry(None);
    let model = Decoder::for_dry_run(gpu.clone(), config, false).expect("a model");
    let texts = [58, 223, 308, 512, 166, 512, 46, 167].map(|tokens| Document {
        tokens: vec![0; tokens],
        breaks: Vec::new(),
        bytes: None,
        rereads: Vec::new(),
    });
    let settings = PerplexityConfig {
        window: Some(512),
        batch: 8,
        segments_per_step: 8,
        ..PerplexityConfig::default()
    };
    perplexity(&model, &texts, &settings, |_, _| ()).expect("a loss");
    let held = gpu.memory_use();
    assert!(
        held.buffers.peak <= planned.buffers.peak,
        "{held:?} {planned:?}"
    );
}
