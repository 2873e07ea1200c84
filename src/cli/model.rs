//! Flags that name a model folder and say how it runs, shared by commands; and its loading.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use segattn::device::Purpose;
use segattn::eval::execution::apply;
use segattn::eval::{Execution, SegmentOverrides};
use segattn::generate::GenerateError;
use segattn::generate::dry_run::{Reading, dry_run};
use segattn::model::config::{CONFIG_FILE, ModelConfig};
use segattn::model::decoder::Decoder;
use segattn::model::lora::folder::{ADAPTER_CONFIG_FILE, AdapterFolder};
use segattn::model::session::rehearse;
use segattn::model::stage::Stage;
use segattn::model::tokenizer::{Tokenizer, end_ids};
use segattn::model::weights::{Checkpoint, INDEX_FILE, WEIGHTS_FILE};
use segattn::train::checkpoint::list;

use super::device::{DeviceArgs, DeviceName, Planned, Pool};
use super::ranks::Party;
use super::stages::{agree, part, rehearsal};

/// Which model, and how it runs.
#[derive(Debug, clap::Args)]
pub struct ModelArgs {
    /// Folder of the model: config.json, *.safetensors, tokenizer.json; also as `-m`
    #[arg(value_name = "MODEL", required_unless_present = "model")]
    folder: Option<PathBuf>,
    /// The same
    #[arg(
        short,
        long,
        value_name = "DIR",
        conflicts_with = "folder",
        hide = true
    )]
    model: Option<PathBuf>,
    /// Folder with adapters for the model, in PEFT's layout or as `train` saved it
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Run as the checkpoint says, in segments, or as full attention
    #[arg(
        long,
        value_name = "checkpoint|segmented|full",
        default_value = "checkpoint",
        help_heading = "Segments"
    )]
    execution: Execution,
    /// Tokens of a segment, instead of the checkpoint's
    #[arg(long, value_name = "N", help_heading = "Segments")]
    segment_len: Option<usize>,
    /// Rows of the prior tail, instead of the checkpoint's
    #[arg(long, value_name = "N", help_heading = "Segments")]
    prior_len: Option<usize>,
    /// Rows retrieved from the past, instead of the checkpoint's
    #[arg(long, value_name = "N", help_heading = "Segments")]
    past_len: Option<usize>,
    /// Layers that read the past, instead of the checkpoint's
    #[arg(
        long,
        value_name = "L,...",
        value_delimiter = ',',
        help_heading = "Segments"
    )]
    past_layers: Option<Vec<usize>>,
    /// KV heads that read the past in these layers; the rest read the prior tail
    #[arg(
        long,
        value_name = "H,...",
        value_delimiter = ',',
        help_heading = "Segments"
    )]
    past_heads: Option<Vec<usize>>,
}

impl ModelArgs {
    /// The same on another device.
    pub fn on(self, device: DeviceArgs) -> Self {
        Self { device, ..self }
    }

    pub fn path(&self) -> &Path {
        let given = self.folder.as_deref().or(self.model.as_deref());
        given.unwrap_or(Path::new("."))
    }

    pub fn device(&self) -> DeviceName {
        self.device.device
    }

    pub fn pool(&self) -> Pool {
        self.device.pool
    }

    pub fn execution(&self) -> Execution {
        self.execution
    }

    /// What the model's folder holds; without `needs_text` a tokenizer that cannot be read is no error.
    pub fn open(&self, needs_text: bool) -> Result<Opened> {
        self.open_as(needs_text, &|_| Ok(()))
    }

    /// The same, under a configuration that `adapt` has changed before the flags do.
    pub fn open_as(&self, needs_text: bool, adapt: Adapt<'_>) -> Result<Opened> {
        let mut config = self.config(adapt)?;
        config.eos_token_id = end_ids(self.path(), &config)?;
        let text = match Tokenizer::open(self.path(), &config) {
            Ok(text) => Some(text),
            Err(error) if needs_text => return Err(error.into()),
            Err(error) => {
                tracing::debug!("no tokenizer: {error}");
                None
            }
        };
        let weights = Checkpoint::open(self.path())?;
        weights.check(&config)?;
        let adapter = match &self.adapter {
            Some(folder) => Some(AdapterFolder::open(folder, &config)?),
            None => None,
        };
        config.lora = adapter.as_ref().map(|adapter| adapter.lora().clone());
        Ok(Opened {
            config,
            text,
            weights,
            adapter,
            pool: self.device.pool,
            party: Party::alone(),
        })
    }

    fn config(&self, adapt: Adapt<'_>) -> Result<ModelConfig> {
        let mut config = load_config(self.path())?;
        if let Some(folder) = &self.adapter {
            AdapterFolder::set_segments(folder, &mut config)?;
        }
        adapt(&mut config)?;
        let overrides = SegmentOverrides {
            segment_len: self.segment_len,
            prior_len: self.prior_len,
            past_len: self.past_len,
            past_layers: self.past_layers.clone(),
            past_heads: self.past_heads.clone(),
        };
        apply(&mut config, self.execution, &overrides)?;
        Ok(config)
    }
}

/// What changes a model's configuration before it runs.
pub type Adapt<'a> = &'a dyn Fn(&mut ModelConfig) -> Result<()>;

/// A model's folder, before its weights are read.
pub struct Opened {
    /// As the model will run.
    pub config: ModelConfig,
    /// Its tokenizer, where it has one.
    pub text: Option<Tokenizer>,
    /// Its weights.
    pub weights: Checkpoint,
    /// Its adapters, where it has some.
    adapter: Option<AdapterFolder>,
    pool: Pool,
    /// The processes that have its layers.
    party: Party,
}

impl Opened {
    /// The same, its layers spread over these processes.
    pub fn shared(self, party: &Party) -> Self {
        Self {
            party: party.clone(),
            ..self
        }
    }

    /// The model of a folder by another configuration, without its tokenizer.
    pub fn of(config: ModelConfig, folder: &Path) -> Result<Self> {
        let weights = Checkpoint::open(folder)?;
        weights.check(&config)?;
        Ok(Self {
            config,
            text: None,
            weights,
            adapter: None,
            pool: Pool(segattn::device::gpu::PoolPlacement::Auto),
            party: Party::alone(),
        })
    }

    /// The model, or this process's part of it, on a device that has taken the memory for these readings. What rank 0
    /// reads counts for all.
    pub fn load<D: Planned>(&self, device: D, readings: &[Reading]) -> Result<Decoder<D>> {
        ensure!(
            self.party.world() == 1 || self.adapter.is_none(),
            "--stages: expected a model without an adapter"
        );
        let readings = agree(&device, &self.config, &self.weights, readings, &self.party)?;
        let config = part(&self.config, &readings, &self.party)?;
        let ranks = self.party.ranks(&device)?;
        let mut model = self.load_part(device, config, |model| {
            let mut each = readings.iter();
            each.try_for_each(|reading| dry_run(model, reading, || ()))
        })?;
        if ranks.world() > 1 {
            if model.device.gains_from_rehearsal() {
                rehearse(&model, rehearsal(&model.config, &readings))?;
            }
            let (part, whole) = (&model.config.part, self.config.clone());
            model.stage = Stage::connected(&model.device, part, whole, ranks)?;
        }
        Ok(model)
    }

    /// The model, on a device that has taken the memory for what `run` does.
    pub fn load_for<D: Planned>(
        &self,
        device: D,
        run: impl Fn(&Decoder<D::Dry>) -> Result<(), GenerateError>,
    ) -> Result<Decoder<D>> {
        self.load_part(device, self.config.clone(), run)
    }

    fn load_part<D: Planned>(
        &self,
        device: D,
        config: ModelConfig,
        run: impl Fn(&Decoder<D::Dry>) -> Result<(), GenerateError>,
    ) -> Result<Decoder<D>> {
        device.plan(self.pool, Purpose::Activations, |dry| {
            let model = Decoder::for_dry_run(dry, config.clone(), false)?;
            Ok(run(&model)?)
        })?;
        self.on(device, config)
    }

    /// The model on a device, or a part of it.
    fn on<D: Planned>(&self, device: D, config: ModelConfig) -> Result<Decoder<D>> {
        let base = self.weights.load(device, config, false)?;
        match &self.adapter {
            Some(adapter) => Ok(adapter.over(&base)?),
            None => Ok(base),
        }
    }

    /// Names the weights, those of adapters too. Reads all of them.
    pub fn fingerprint(&self) -> Result<String> {
        let base = self.weights.fingerprint()?;
        Ok(match &self.adapter {
            Some(adapter) => format!("{base} {}", adapter.fingerprint()?),
            None => base,
        })
    }
}

/// The configuration of the model in a folder. For a run's own folder the error names its newest model.
pub fn load_config(folder: &Path) -> Result<ModelConfig> {
    if !folder.join(CONFIG_FILE).exists()
        && let Some((_, newest)) = list(&folder.join("checkpoints"))?.first()
    {
        bail!(
            "{} is the folder of a run; name one of its models, the newest is {}",
            folder.display(),
            newest.display()
        );
    }
    if folder.join(ADAPTER_CONFIG_FILE).exists() && !has_weights(folder) {
        bail!(
            "{} holds adapters, not a model; name the model that they were trained on, and this folder by --adapter",
            folder.display()
        );
    }
    Ok(ModelConfig::load(folder)?)
}

/// Whether the weights of a model lie in the folder.
fn has_weights(folder: &Path) -> bool {
    [WEIGHTS_FILE, INDEX_FILE]
        .iter()
        .any(|name| folder.join(name).exists())
}
