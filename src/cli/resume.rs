//! `segattn resume`: goes on with a run from its newest checkpoint that holds.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use segattn::device::Purpose;
use segattn::train::checkpoint::{list, load_latest};
use segattn::train::config::Config;

use super::device::{DeviceArgs, Planned, on_device};
use super::overrides::Overrides;
use super::ranks::{Party, RanksArgs};
use super::run::{Data, Ended, Run, checkpoints, claim};
use super::teacher::Teacher;
use super::text::Text;
use super::train::{PREPARED, base, dry_run, estimate, trainer};

/// The run goes on under its own configuration; keys given here replace its own, such as --training.steps.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The run's folder (`training.output`)
    #[arg(value_name = "DIR", default_value = "run")]
    output: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    ranks: RanksArgs,
    #[command(flatten)]
    overrides: Overrides,
}

pub fn run(args: &Args, quiet: bool) -> Result<()> {
    let Some(party) = args.ranks.start()? else {
        return Ok(());
    };
    go_on(&args.output, &args.overrides.0, args.device, &party, quiet)?.conclude(quiet)
}

/// The run in the folder `output`, from its newest checkpoint that holds, with `overrides` over its configuration.
pub fn go_on(
    output: &Path,
    overrides: &[(String, String)],
    device: DeviceArgs,
    party: &Party,
    quiet: bool,
) -> Result<Ended> {
    let quiet = quiet || !party.leads();
    party.take_part(|| go_on_alone(output, overrides, device, party, quiet))
}

/// This process's part.
fn go_on_alone(
    output: &Path,
    overrides: &[(String, String)],
    device: DeviceArgs,
    party: &Party,
    quiet: bool,
) -> Result<Ended> {
    let root = checkpoints(output);
    ensure!(
        !list(&root)?.is_empty(),
        "there is no checkpoint in {}; start a run with `segattn train`",
        root.display()
    );
    let _lock = party.leads().then(|| claim(output)).transpose()?;
    party.wait(PREPARED)?;
    let (folder, checkpoint) = load_latest(&root)?;
    let mut config = Config::parse(&checkpoint.config.to_toml()?, overrides)?;
    // The folder may have been moved since; a name that is not UTF-8 cannot be noted.
    if output.to_str().is_some() {
        config.training.output = output.to_owned();
    }
    let text = Text::open(&config, Some(&folder))?;
    let text = text.with_template(&config.data, &checkpoint.model)?;
    let before = &checkpoint.config;
    config.check_resumed(before)?;
    let mut data = Data::read(&config, &checkpoint.model, &text, output, quiet)?;
    data.base = base(&config)?.map(|base| base.fingerprint()).transpose()?;
    ensure!(
        data.base == checkpoint.data.base,
        "the weights in `model.folder` are others than when {} was saved; adapters go on over the same weights",
        folder.display()
    );
    data.teacher = Teacher::open(&config, &checkpoint.model, &text)?;
    let now = data.fingerprints();
    ensure!(
        now.teacher == checkpoint.data.teacher,
        "the weights in `distillation.model` are others than when {} was saved; to learn from another teacher, start a \
         new run with --model.folder",
        folder.display()
    );
    ensure!(
        now.train == checkpoint.data.train,
        "the training data changed since {} was saved; resuming needs the same documents, in the same files, and the \
         same of them held out for validation",
        folder.display()
    );
    if now.validation != checkpoint.data.validation {
        tracing::warn!(
            "the validation data changed since {} was saved: losses before and after do not compare",
            folder.display()
        );
    }
    data.check_order(before, &config)?;
    let (tensors, progress) = (checkpoint.tensors, Some(checkpoint.progress));
    let pool = device.pool;
    on_device!(device.device, party.local_rank(), device => {
        let peak = device.peak_flops()?;
        device.warn_of(estimate(&checkpoint.model, &config, &data, party)?);
        device.plan(pool, Purpose::Backward, |dry| dry_run(dry, &checkpoint.model, &config, &data, party))?;
        let trainer = trainer(device, checkpoint.model, config, &data, tensors, progress, party)?;
        Run::new(output, trainer, data, checkpoint.extra, peak, quiet)?.go()
    })
}
