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
use segattn::model::lora::folder::AdapterFolder;
use segattn::model::parameters::specs;
use segattn::model::segmentation::Tokens;
use segattn::model::session::Session;
use segattn::model::tokenizer::end_ids;
use segattn::model::weights;
use segattn::ranks::Ranks;
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
        /// Names the weights under the adapters, where adapters are trained.
        base: Option<String>,
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
                rereads: &prompt.rereads,
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
        let Held::Training {
            trainer,
            extra,
            base,
        } = self
        else {
            return Err(not_training());
        };
        // The caller chooses the data of each step.
        let data = Fingerprints {
            train: String::new(),
            validation: String::new(),
            base: base.clone(),
            teacher: None,
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

/// The model in a folder, for generation, with the adapters in another.
pub fn open(folder: &Path, adapter: Option<&Path>, device: &str) -> Result<Box<dyn Engine>> {
    let mut config = ModelConfig::load(folder).map_err(Failure::other)?;
    if let Some(adapter) = adapter {
        AdapterFolder::set_segments(adapter, &mut config)?;
    }
    config.eos_token_id = end_ids(folder, &config).map_err(Failure::other)?;
    let files = weights::Checkpoint::open(folder).map_err(Failure::other)?;
    files.check(&config).map_err(Failure::other)?;
    let adapter = adapter.map(|adapter| AdapterFolder::open(adapter, &config));
    let adapter = adapter.transpose()?;
    match device {
        "cpu" => loaded(Cpu, config, &files, adapter.as_ref()),
        #[cfg(feature = "cuda")]
        "cuda" => loaded(gpu()?, config, &files, adapter.as_ref()),
        other => Err(no_device(other)),
    }
}

fn loaded<D: Device + Clone + 'static>(
    device: D,
    config: ModelConfig,
    files: &weights::Checkpoint,
    adapter: Option<&AdapterFolder>,
) -> Result<Box<dyn Engine>> {
    let base = files.load(device, config, false)?;
    let model = match adapter {
        Some(adapter) => adapter.over(&base)?,
        None => base,
    };
    Ok(Box::new(Held::Model(Box::new(model))))
}

/// What a training begins with.
pub enum Start {
    /// The model that the configuration names, or a new one of so many token ids.
    Config { vocab_size: usize },
    /// The newest state that was saved in a folder.
    Saved(PathBuf),
}

/// A training before its next step.
struct Beginning {
    model: ModelConfig,
    config: Config,
    tensors: Tensors,
    progress: Option<Progress>,
    extra: Vec<(String, Vec<u8>)>,
    /// The weights under the adapters, and what names them, where adapters are trained.
    base: Option<(weights::Checkpoint, String)>,
}

/// A model in training, by the keys of configs/train.toml.
pub fn train(start: Start, keys: &[(String, String)], device: &str) -> Result<Box<dyn Engine>> {
    let beginning = match start {
        Start::Config { vocab_size } => fresh(keys, vocab_size)?,
        Start::Saved(root) => saved(keys, &root)?,
    };
    match device {
        "cpu" => begun(Cpu, beginning),
        #[cfg(feature = "cuda")]
        "cuda" => begun(gpu()?, beginning),
        other => Err(no_device(other)),
    }
}

fn begun<D: Device + Clone + 'static>(device: D, beginning: Beginning) -> Result<Box<dyn Engine>> {
    let Beginning {
        model,
        config,
        tensors,
        progress,
        extra,
        base,
    } = beginning;
    let (trainer, base) = match base {
        Some((files, name)) => {
            let base = files.load(device, model.clone(), false)?;
            let ranks = Ranks::alone();
            let trainer = Trainer::adapting(&base, model, config, &tensors, progress, ranks)?;
            (trainer, Some(name))
        }
        None => (
            Trainer::new(device, model, config, &tensors, progress)?,
            None,
        ),
    };
    let trainer = Box::new(trainer);
    Ok(Box::new(Held::Training {
        trainer,
        extra,
        base,
    }))
}

fn fresh(keys: &[(String, String)], vocab_size: usize) -> Result<Beginning> {
    let mut keys = keys.to_vec();
    // A run needs data; here each step brings its own.
    keys.push(("data.train".into(), "none".into()));
    let config = Config::parse("", &keys)?;
    check_teacher(&config)?;
    let Some(folder) = &config.model.folder else {
        let model = config.model.new_config(vocab_size)?;
        let tensors = Tensors::initial(&model, config.training.seed);
        return Ok(Beginning {
            model,
            config,
            tensors,
            progress: None,
            extra: Vec::new(),
            base: None,
        });
    };
    let mut model = ModelConfig::load(folder).map_err(Failure::other)?;
    model.check_training().map_err(Failure::other)?;
    config.model.apply(&mut model)?;
    model.eos_token_id = end_ids(folder, &model).map_err(Failure::other)?;
    let files = weights::Checkpoint::open(folder).map_err(Failure::other)?;
    files.check(&model).map_err(Failure::other)?;
    model.lora = config.lora.adapters(&model)?;
    let tensors = match model.lora {
        Some(_) => Tensors::initial(&model, config.training.seed),
        None => {
            let values = specs(&model).into_iter().map(|spec| files.read(&spec));
            let values = values.collect::<std::result::Result<_, _>>();
            Tensors::new(values.map_err(Failure::other)?)
        }
    };
    Ok(Beginning {
        extra: companions(folder).map_err(Failure::other)?,
        base: base(&config)?,
        model,
        config,
        tensors,
        progress: None,
    })
}

fn saved(keys: &[(String, String)], root: &Path) -> Result<Beginning> {
    let (folder, saved) = load_latest(root)?;
    let config = Config::parse(&saved.config.to_toml()?, keys)?;
    config.check_resumed(&saved.config)?;
    check_teacher(&config)?;
    let base = base(&config)?;
    let name = base.as_ref().map(|(_, name)| name);
    if name != saved.data.base.as_ref() {
        let expected = format!("the weights over which {} was trained", folder.display());
        return Err(Failure::argument("model.folder", expected, "others"));
    }
    Ok(Beginning {
        model: saved.model,
        config,
        tensors: saved.tensors,
        progress: Some(saved.progress),
        extra: saved.extra,
        base,
    })
}

/// A trainer here has no teacher.
fn check_teacher(config: &Config) -> Result<()> {
    match &config.distillation.model {
        Some(folder) => {
            let expected = "none, since only the command `segattn train` has teachers yet";
            let got = folder.display().to_string();
            Err(Failure::argument("distillation.model", expected, got))
        }
        None => Ok(()),
    }
}

/// The weights under the adapters that the configuration trains, where it trains some, and what names them.
fn base(config: &Config) -> Result<Option<(weights::Checkpoint, String)>> {
    let folder = config.model.folder.as_ref();
    let Some(folder) = folder.filter(|_| config.lora.is_on()) else {
        return Ok(None);
    };
    let files = weights::Checkpoint::open(folder).map_err(Failure::other)?;
    let name = files.fingerprint().map_err(Failure::other)?;
    Ok(Some((files, name)))
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
