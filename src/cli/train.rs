//! `segattn train`: starts a run from a configuration.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use segattn::device::{Device, Purpose};
use segattn::model::config::ModelConfig;
use segattn::model::memory::{Use, memory};
use segattn::model::parameters::specs;
use segattn::model::weights;
use segattn::train::agreement::agreement;
use segattn::train::checkpoint::list;
use segattn::train::config::Config;
use segattn::train::gradient_sets;
use segattn::train::progress::{Progress, Tensors};
use segattn::train::trainer::{Trainer, part_of_rank};

use super::device::{DeviceArgs, Planned, on_device};
use super::model::load_config;
use super::overrides::Overrides;
use super::past_heads;
use super::ranks::{Party, RanksArgs};
use super::run::{Data, Ended, Run, checkpoints, claim};
use super::teacher::Teacher;
use super::text::{Text, companion_files};

/// What the others wait for while rank 0 makes a run's folder its own.
pub const PREPARED: &str = "rank 0 prepares the run's folder";

/// Every key of the configuration is a flag too, and the flag wins; in brackets, what holds without either.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// TOML file, see configs/train.toml; without it the defaults
    #[arg(value_name = "CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    ranks: RanksArgs,
    #[command(flatten)]
    overrides: Overrides,
}

pub fn run(args: &Args, quiet: bool) -> Result<()> {
    let config = match &args.config {
        Some(path) => Config::load(path, &args.overrides.0)?,
        None => Config::parse("", &args.overrides.0)?,
    };
    match args.ranks.start()? {
        Some(party) => begin(&config, args.device, &party, quiet)?.conclude(quiet),
        None => Ok(()),
    }
}

/// A run under this configuration, from its first step.
pub fn begin(config: &Config, device: DeviceArgs, party: &Party, quiet: bool) -> Result<Ended> {
    party.take_part(|| begin_alone(config, device, party, quiet || !party.leads()))
}

/// This process's part.
fn begin_alone(config: &Config, device: DeviceArgs, party: &Party, quiet: bool) -> Result<Ended> {
    let output = &config.training.output;
    let _lock = party.leads().then(|| claim(output)).transpose()?;
    ensure!(
        !party.leads() || list(&checkpoints(output))?.is_empty(),
        "{0} holds checkpoints already; go on with `segattn resume {0}`, or name another folder with \
         --training.output",
        output.display()
    );
    party.wait(PREPARED)?;
    let text = Text::open(config, None)?;
    let (model, tensors) = start(config, &text)?;
    let text = text.with_template(&config.data, &model)?;
    let mut data = Data::read(config, &model, &text, output, quiet)?;
    data.base = base(config)?.map(|base| base.fingerprint()).transpose()?;
    data.teacher = Teacher::open(config, &model, &text)?;
    let (extra, pool) = (companion_files(config)?, device.pool);
    on_device!(device.device, party.local_rank(), device => {
        let peak = device.peak_flops()?;
        device.warn_of(estimate(&model, config, &data, party)?);
        device.plan(pool, Purpose::Backward, |dry| dry_run(dry, &model, config, &data, party))?;
        let trainer = trainer(device, model, config.clone(), &data, tensors, None, party)?;
        Run::new(output, trainer, data, extra, peak, quiet)?.go()
    })
}

/// A trainer, once all processes have said that they are of one run.
pub fn trainer<D: Planned>(
    device: D,
    model: ModelConfig,
    config: Config,
    data: &Data<'_>,
    tensors: Tensors,
    progress: Option<Progress>,
    party: &Party,
) -> Result<Trainer<D>> {
    if let Some(mesh) = party.mesh() {
        let (device, data) = (device.description(), data.fingerprints());
        let progress = progress.as_ref();
        let shared = match party.shares_layers() {
            true => "layers",
            false => "sequences",
        };
        let agreement = agreement(&device, &config, &model, &data, &tensors, progress)?;
        agreement.on("what ranks share", shared).check(mesh)?;
    }
    let ranks = party.ranks(&device)?;
    if party.shares_layers() {
        let trainer = Trainer::on_stages(device, model, config, &tensors, progress, ranks)?;
        return Ok(trainer);
    }
    let longest = data.longest(config.training.sequence_len);
    let teacher = data.teacher.as_ref().map(|teacher| {
        teacher.warn_of_length(&config, longest);
        teacher.load(device.clone())
    });
    let teacher = teacher.transpose()?;
    let trainer = match base(&config)? {
        Some(base) => {
            let base = base.load(device, model.clone(), false)?;
            Trainer::adapting(&base, model, config, &tensors, progress, ranks)?
        }
        None => Trainer::on_ranks(device, model, config, &tensors, progress, ranks)?,
    };
    let trainer = match teacher {
        Some(teacher) => trainer.with_teacher(teacher)?,
        None => trainer,
    };
    let training = &trainer.config().training;
    let (world, sequences) = (
        trainer.ranks().world(),
        training.batch * training.accumulation,
    );
    let groups = sequences.div_ceil(training.group());
    if party.leads() && world > groups {
        tracing::warn!(
            "a step of {sequences} sequences in groups of {} gives work to {groups} of {world} ranks; a lower \
             `training.group` (1, say) or a larger `training.batch` gives work to more",
            training.group()
        );
    }
    Ok(trainer)
}

/// All that a run does, on the longest sequences there may be, for its memory.
pub fn dry_run<D: Device + Clone>(
    device: D,
    model: &ModelConfig,
    config: &Config,
    data: &Data<'_>,
    party: &Party,
) -> Result<()> {
    let training = &config.training;
    let (model_config, run, ranks) = (model.clone(), config.clone(), party.planned());
    let mut trainer = match (party.shares_layers(), &data.teacher) {
        (true, _) => Trainer::stage_for_dry_run(device, model_config, run, ranks)?,
        (false, None) => Trainer::for_dry_run(device, model_config, run, ranks)?,
        (false, Some(teacher)) => {
            let teacher = teacher.for_dry_run(device.clone())?;
            Trainer::for_dry_run(device, model_config, run, ranks)?.with_teacher(teacher)?
        }
    };
    let sequences = training.batch * training.accumulation;
    let tokens = data.longest(training.sequence_len);
    Ok(trainer.rehearse(sequences, tokens)?)
}

/// Bytes that training takes on one of these processes where all numbers are f32, for the longest sequences of the
/// data.
///
/// # Errors
/// That the model's layers cannot be spread over so many.
pub fn estimate(
    model: &ModelConfig,
    config: &Config,
    data: &Data<'_>,
    party: &Party,
) -> Result<u64> {
    let training = &config.training;
    let longest = data.longest(training.sequence_len);
    let (rank, world) = (party.rank(), party.world());
    let (model, ranks, behind) = match party.shares_layers() {
        true => (&part_of_rank(model, rank, world)?, 1, rank),
        false => (model, world, 0),
    };
    let sequences = training.batch * training.accumulation;
    let (group, side_by_side) = (
        training.group(),
        training.batch.min(sequences.div_ceil(ranks)),
    );
    let run = Use::Train {
        tbptt: training.tbptt,
        segments_per_step: match training.segments_per_step {
            0 => usize::MAX,
            count => count,
        },
        recompute: training.recompute,
        gradient_sets: gradient_sets(sequences.div_ceil(group), training.batch / group, ranks),
        ranks,
        behind,
    };
    let one = memory(model, longest, run, size_of::<f32>());
    let segment_len = model.segment.as_ref().map_or(longest, |s| s.segment_len);
    let rows = match training.segments_per_step {
        0 => longest,
        count => segment_len.saturating_mul(count),
    };
    let teacher = data.teacher.as_ref();
    let [taught, each_taught] = teacher.map_or([0; 2], |teacher| teacher.estimate(longest, rows));
    let each = one.total() - one.weights + each_taught;
    let weights = one.weights.saturating_add(taught);
    Ok(weights.saturating_add(each.saturating_mul(side_by_side as u64)))
}

/// The weights that adapters are added to, where the run trains adapters.
pub fn base(config: &Config) -> Result<Option<weights::Checkpoint>> {
    let folder = config.model.folder.as_deref();
    let Some(folder) = folder.filter(|_| config.lora.is_on()) else {
        return Ok(None);
    };
    let weights = weights::Checkpoint::open(folder).with_context(|| {
        let folder = folder.display();
        format!("the model that the adapters belong to cannot be read from {folder}; `--model.folder` names another")
    })?;
    Ok(Some(weights))
}

/// The model before its first step.
fn start(config: &Config, text: &Text) -> Result<(ModelConfig, Tensors)> {
    let Some(folder) = &config.model.folder else {
        let mut model = config.model.new_config(text.vocab_size())?;
        text.note(&mut model);
        let tensors = Tensors::initial(&model, config.training.seed);
        return Ok((model, tensors));
    };
    let mut model = load_config(folder)?;
    model.check_training()?;
    past_heads::named(&config.model, folder, &model)?.apply(&mut model)?;
    let files = weights::Checkpoint::open(folder)?;
    files.check(&model)?;
    model.lora = config.lora.adapters(&model)?;
    if model.lora.is_some() {
        let tensors = Tensors::initial(&model, config.training.seed);
        return Ok((model, tensors));
    }
    let values = specs(&model).into_iter().map(|spec| files.read(&spec));
    let values = values.collect::<Result<_, _>>()?;
    Ok((model, Tensors::new(values)))
}
