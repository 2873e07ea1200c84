//! `--stages`: several processes that read with one model, each with a part of its layers.

use std::num::NonZeroUsize;

use anyhow::{Result, ensure};
use segattn::device::Device;
use segattn::generate::dry_run::Reading;
use segattn::model::config::ModelConfig;
use segattn::model::session::follow;
use segattn::model::stage::Stage;
use segattn::model::weights::Checkpoint;
use segattn::ranks::Agreement;

use super::device::{Planned, on_device};
use super::model::ModelArgs;
use super::ranks::{LinkArgs, Party};
use super::reader_left;

/// What the others wait for.
const PLANNED: &str = "rank 0 says what it reads";

/// How many processes read together.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct StageArgs {
    /// Starts so many processes on this machine, each with a part of the model's layers; changes no bit. For models and
    /// pools that do not fit one GPU, and for long prompts: the parts work on different segments at a time
    #[arg(long, value_name = "N", help_heading = "Stages")]
    stages: Option<NonZeroUsize>,
    #[command(flatten, next_help_heading = "Stages")]
    links: LinkArgs,
}

impl StageArgs {
    /// Does what `lead` says with the model that the arguments name. Other processes than the first follow it.
    pub fn run(&self, model: &ModelArgs, lead: impl FnOnce(&Party) -> Result<()>) -> Result<()> {
        if self.stages.is_none() {
            return lead(&Party::alone());
        }
        match self.links.start("--stages", self.stages)? {
            None => Ok(()),
            Some(party) if party.leads() => match lead(&party) {
                // The others have been dismissed with the model.
                Err(error) if reader_left(&error) => Err(error),
                led => party.take_part(|| led),
            },
            Some(party) => party.take_part(|| {
                on_device!(model.device(), party.local_rank(), device => follow_on(device, model, &party))
            }),
        }
    }
}

/// This process's part where another one leads.
fn follow_on<D: Planned>(device: D, args: &ModelArgs, party: &Party) -> Result<()> {
    let model = args.open(false)?.shared(party).load(device, &[])?;
    Ok(follow(&model)?)
}

/// This process's part of a model.
pub fn part(model: &ModelConfig, readings: &[Reading], party: &Party) -> Result<ModelConfig> {
    let (layers, world) = (model.num_hidden_layers, party.world());
    ensure!(
        world <= layers,
        "--stages: expected at most {layers}, the model's layers, got {world}"
    );
    let scored = readings.iter().any(|reading| reading.scored);
    let stage = Stage::<segattn::device::cpu::Cpu>::of_rank(party.rank(), world);
    Ok(model.part_of(model.stages(world, scored)[stage].clone()))
}

/// Tokens of a rehearsal: a segment and what begins the next one, as far as the run reads as many.
pub fn rehearsal(model: &ModelConfig, readings: &[Reading]) -> usize {
    let read = readings.iter().flat_map(|reading| &reading.sequences);
    let longest = read.map(|[_, tokens]| *tokens).max().unwrap_or(0);
    let segment = model
        .segment
        .as_ref()
        .map_or(0, |segment| segment.segment_len);
    longest.min(segment + 1)
}

/// What rank 0 reads, on all ranks, once they have said that they have the same model.
pub fn agree<D: Device>(
    device: &D,
    model: &ModelConfig,
    weights: &Checkpoint,
    readings: &[Reading],
    party: &Party,
) -> Result<Vec<Reading>> {
    let Some(mesh) = party.mesh() else {
        return Ok(readings.to_vec());
    };
    let agreement = Agreement::new()
        .on("version of segattn", env!("CARGO_PKG_VERSION"))
        .on("device", device.description())
        .on("model configuration", model.to_json());
    let samples = weights.samples()?.into_iter();
    let agreement = samples.fold(agreement, |all, (file, hash)| {
        all.on(format!("weights in {file} (hash of samples)"), hash)
    });
    agreement.check(mesh)?;
    let all = mesh.gather(&serde_json::to_vec(readings)?, PLANNED)?;
    Ok(serde_json::from_slice(&all[0])?)
}
