//! A model on a device, as generator and trainer use it, whatever the device.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use segattn::device::Device;
use segattn::device::cpu::Cpu;
use segattn::eval::perplexity::log_probabilities;
use segattn::generate::{Generated, Generator, GeneratorConfig, NewToken, Prompt};
use segattn::model::companions::companions;
use segattn::model::config::ModelConfig;
use segattn::model::decoder::Decoder;
use segattn::model::parameters::specs;
use segattn::model::segmentation::Tokens;
use segattn::model::session::Session;
use segattn::model::tokenizer::end_ids;
use segattn::model::weights;
use segattn::train::checkpoint::{Disk, Fingerprints, load_latest, save};
use segattn::train::config::Config;
use segattn::train::data::Example;
use segattn::train::progress::{Progress, Tensors};
use segattn::train::trainer::{StepReport, Trainer};

use crate::failure::Failure;

type Result<T> = std::result::Result<T, Failure>;

/// Prompts, and how they go on.
pub struct Request {
    pub prompts: Vec<Tokens>,
    /// Number of the random stream of each.
    pub streams: Vec<u64>,
    pub settings: GeneratorConfig,
    pub segments_per_step: usize,
}

/// What models do on every device.
pub trait Engine: Send {
    /// The model's configuration.
    fn config(&self) -> &ModelConfig;
    /// Continues prompts. `on_token` hears of each new token; `Break` ends its sequence.
    fn generate(
        &mut self,
        request: &Request,
        on_token: &mut dyn FnMut(&NewToken) -> Result<ControlFlow<()>>,
    ) -> Result<Vec<Generated>>;
    /// Log-probability of each token but the first.
    fn score(&mut self, sequences: &[Tokens], segments_per_step: usize) -> Result<Vec<Vec<f32>>>;
    /// A training step.
    fn step(&mut self, sequences: Vec<Example>) -> Result<StepReport>;
    /// Saves the state of training, a model folder, among the newest `keep` of `root`.
    fn save(&self, root: &Path, keep: usize) -> Result<PathBuf>;
}

enum Held<D: Device> {
    Model(Box<Decoder<D>>),
    Training {
        trainer: Box<Trainer<D>>,
        /// Files that go along with the model.
        extra: Vec<(String, Vec<u8>)>,
    },
}

impl<D: Device> Held<D> {
    /// The model, after what a step may have left undone.
    fn settled(&mut self) -> Result<&Decoder<D>> {
        if let Held::Training { trainer, .. } = self {
            trainer.settle()?;
        }
        Ok(self.model())
    }

    fn model(&self) -> &Decoder<D> {
        match self {
            Held::Model(model) => model,
            Held::Training { trainer, .. } => trainer.model(),
        }
    }
}

impl<D: Device> Engine for Held<D> {
    fn config(&self) -> &ModelConfig {
        &self.model().config
    }

    fn generate(
        &mut self,
        request: &Request,
        on_token: &mut dyn FnMut(&NewToken) -> Result<ControlFlow<()>>,
    ) -> Result<Vec<Generated>> {
        let model = self.settled()?;
        let lens = request.prompts.iter().map(|prompt| prompt.ids.len());
        let longest = lens.max().unwrap_or(0);
        let longest = longest.saturating_add(request.settings.max_new);
        let sequences = request.prompts.len();
        let mut session = Session::new(model, sequences, longest, request.segments_per_step)?;
        let prompts = request.prompts.iter().zip(&request.streams);
        let prompts: Vec<Prompt<'_>> = prompts
            .map(|(prompt, stream)| Prompt {
                before: &[],
                tokens: &prompt.ids,
                breaks: &prompt.breaks,
                stream: *stream,
            })
            .collect();
        let mut generator = Generator::new(&mut session, &prompts, request.settings.clone())?;
        loop {
            let chosen = generator.step()?;
            if chosen.is_empty() {
                return Ok(generator.generated());
            }
            for token in &chosen {
                if on_token(token)?.is_break() {
                    generator.stop(token.sequence);
                }
            }
        }
    }

    fn score(&mut self, sequences: &[Tokens], segments_per_step: usize) -> Result<Vec<Vec<f32>>> {
        let model = self.settled()?;
        for sequence in sequences {
            model.check_tokens("sequences", &sequence.ids)?;
        }
        let sequences: Vec<_> = sequences.iter().map(Into::into).collect();
        Ok(log_probabilities(
            model,
            &sequences,
            segments_per_step,
            |_| {},
        )?)
    }

    fn step(&mut self, sequences: Vec<Example>) -> Result<StepReport> {
        match self {
            Held::Training { trainer, .. } => Ok(trainer.step_on(&[sequences])?),
            Held::Model(_) => Err(not_training()),
        }
    }

    fn save(&self, root: &Path, keep: usize) -> Result<PathBuf> {
        let Held::Training { trainer, extra } = self else {
            return Err(not_training());
        };
        // The caller chooses the data of each step.
        let data = Fingerprints {
            train: String::new(),
            validation: String::new(),
            base: None,
        };
        let checkpoint = trainer.checkpoint(&data, extra)?;
        Ok(save(&mut Disk, root, &checkpoint, keep)?)
    }
}

fn not_training() -> Failure {
    Failure::argument(
        "model",
        "one that is being trained",
        "one for generation only",
    )
}

/// The model in a folder, for generation.
pub fn open(folder: &Path, device: &str) -> Result<Box<dyn Engine>> {
    let mut config = ModelConfig::load(folder).map_err(Failure::other)?;
    config.eos_token_id = end_ids(folder, &config).map_err(Failure::other)?;
    let files = weights::Checkpoint::open(folder).map_err(Failure::other)?;
    files.check(&config).map_err(Failure::other)?;
    match device {
        "cpu" => {
            let model = files.load(Cpu, config, false).map_err(Failure::other)?;
            Ok(Box::new(Held::Model(Box::new(model))))
        }
        #[cfg(feature = "cuda")]
        "cuda" => {
            let model = files.load(gpu()?, config, false).map_err(Failure::other)?;
            Ok(Box::new(Held::Model(Box::new(model))))
        }
        other => Err(no_device(other)),
    }
}

/// What a training begins with.
pub enum Start {
    /// The model that the configuration names, or a new one of so many token ids.
    Config { vocab_size: usize },
    /// The newest state that was saved in a folder.
    Saved(PathBuf),
}

/// A model in training, by the keys of configs/train.toml.
pub fn train(start: Start, keys: &[(String, String)], device: &str) -> Result<Box<dyn Engine>> {
    let (model, config, tensors, progress, extra) = match start {
        Start::Config { vocab_size } => fresh(keys, vocab_size)?,
        Start::Saved(root) => {
            let (_, saved) = load_latest(&root)?;
            let config = Config::parse(&saved.config.to_toml()?, keys)?;
            let progress = Some(saved.progress);
            (saved.model, config, saved.tensors, progress, saved.extra)
        }
    };
    match device {
        "cpu" => {
            let trainer = Box::new(Trainer::new(Cpu, model, config, &tensors, progress)?);
            Ok(Box::new(Held::Training { trainer, extra }))
        }
        #[cfg(feature = "cuda")]
        "cuda" => {
            let trainer = Trainer::new(gpu()?, model, config, &tensors, progress)?;
            let trainer = Box::new(trainer);
            Ok(Box::new(Held::Training { trainer, extra }))
        }
        other => Err(no_device(other)),
    }
}

type Beginning = (
    ModelConfig,
    Config,
    Tensors,
    Option<Progress>,
    Vec<(String, Vec<u8>)>,
);

fn fresh(keys: &[(String, String)], vocab_size: usize) -> Result<Beginning> {
    let mut keys = keys.to_vec();
    // A run needs data; here each step brings its own.
    keys.push(("data.train".into(), "none".into()));
    let config = Config::parse("", &keys)?;
    let Some(folder) = &config.model.folder else {
        let model = config.model.new_config(vocab_size)?;
        let tensors = Tensors::initial(&model, config.training.seed);
        return Ok((model, config, tensors, None, Vec::new()));
    };
    let mut model = ModelConfig::load(folder).map_err(Failure::other)?;
    model.check_training().map_err(Failure::other)?;
    config.model.apply_segments(&mut model)?;
    model.eos_token_id = end_ids(folder, &model).map_err(Failure::other)?;
    let files = weights::Checkpoint::open(folder).map_err(Failure::other)?;
    files.check(&model).map_err(Failure::other)?;
    let values = specs(&model).into_iter().map(|spec| files.read(&spec));
    let values = values.collect::<std::result::Result<_, _>>();
    let tensors = Tensors::new(values.map_err(Failure::other)?);
    let extra = companions(folder).map_err(Failure::other)?;
    Ok((model, config, tensors, None, extra))
}

#[cfg(feature = "cuda")]
fn gpu() -> Result<segattn::device::gpu::Gpu<segattn::device::gpu::cuda_driver::Cuda>> {
    use segattn::device::gpu::Gpu;
    use segattn::device::gpu::cuda_driver::{Choice, Cuda};
    let opened = Cuda::open(0, Choice::SameBits).map_err(segattn::device::DeviceError::from)?;
    Ok(Gpu::new(opened))
}

fn no_device(got: &str) -> Failure {
    let expected = match cfg!(feature = "cuda") {
        true => "cpu or cuda",
        false => "cpu; this build has no kernels for GPUs",
    };
    Failure::argument("device", expected, got)
}
