//! The start of a trainer: from tensors or for a dry run, alone or on one of several ranks.

use super::kept::{Kept, check_adapters, check_sizes, kept, room};
use super::layers::{Layers, owns, part_of_rank, places};
use super::{Stop, Trainer};
use crate::device::{Device, Kind};
use crate::model::config::ModelConfig;
use crate::model::decoder::Decoder;
use crate::model::parameters::{Weights, base_specs, specs};
use crate::model::stage::Stage;
use crate::ranks::Ranks;
use crate::train::config::Config;
use crate::train::data::Position;
use crate::train::error::{Result, TrainError};
use crate::train::guard::Guard;
use crate::train::optimizer::updated;
use crate::train::progress::{Progress, Tensors};
use crate::train::shards::Part;
use crate::train::spread::Spread;
use crate::train::streams::Gradients;

/// What a trainer computes among the ranks of its run.
struct Among<D: Device> {
    /// The model, or this rank's part of it.
    model: ModelConfig,
    /// Where the model's layers are, if they are spread over ranks.
    layers: Option<Layers>,
    stage: Stage<D>,
    /// The ranks that have sequences of their own.
    sequences: Ranks<D>,
}

impl<D: Device> Among<D> {
    fn sequences(model: ModelConfig, sequences: Ranks<D>) -> Self {
        Self {
            stage: Stage::planned(&model.part),
            model,
            layers: None,
            sequences,
        }
    }

    fn layers(device: &D, whole: ModelConfig, config: &Config, ranks: Ranks<D>) -> Result<Self> {
        if config.distillation.is_on() && ranks.world() > 1 {
            let expected =
                "1 where `distillation.model` is given: a teacher is not spread over stages";
            return Err(TrainError::argument("stages", expected, ranks.world()));
        }
        let layers = Layers::new(&whole, &config.training, ranks.world())?;
        let model = part_of_rank(&whole, ranks.rank(), ranks.world())?;
        Ok(Self {
            stage: Stage::in_training(device, &model.part, ranks)?,
            model,
            layers: Some(layers),
            sequences: Ranks::alone(),
        })
    }
}

/// Ranks exchange f32.
fn check_ranks<D: Device>(device: &D, ranks: &Ranks<D>) -> Result<()> {
    let bytes = device.element_bytes(Kind::Exact);
    if ranks.world() > 1 && bytes != size_of::<f32>() {
        let expected = "one whose weights have 4 bytes, where there are several ranks";
        return Err(TrainError::argument("device", expected, bytes));
    }
    Ok(())
}

impl<D: Device> Trainer<D> {
    /// A trainer at the start of a run, or, with `progress`, where that run is.
    ///
    /// # Errors
    /// [`TrainError::Config`], [`TrainError::Device`], or [`TrainError::Argument`] for tensors of other sizes
    /// than the model's.
    pub fn new(
        device: D,
        model: ModelConfig,
        config: Config,
        tensors: &Tensors,
        progress: Option<Progress>,
    ) -> Result<Self> {
        Self::on_ranks(device, model, config, tensors, progress, Ranks::alone())
    }

    /// [`Trainer::new`] on one of several ranks. All of them call each function of the trainer together, and have
    /// results of the same bits as a trainer alone (docs/contract.md, section 4).
    ///
    /// # Errors
    /// As [`Trainer::new`]; also [`TrainError::Argument`] for a device whose weights are not f32.
    pub fn on_ranks(
        device: D,
        model: ModelConfig,
        config: Config,
        tensors: &Tensors,
        progress: Option<Progress>,
        ranks: Ranks<D>,
    ) -> Result<Self> {
        Self::on_weights(None, device, model, config, tensors, progress, ranks)
    }

    /// [`Trainer::new`] on one of several ranks that have consecutive layers of the model each: rank 0 the last ones.
    /// Each holds weights, gradients and moments of its own layers. Otherwise as [`Trainer::on_ranks`].
    ///
    /// # Errors
    /// As [`Trainer::on_ranks`]; also [`TrainError::Argument`] for more ranks than layers, for adapters and for a
    /// teacher.
    pub fn on_stages(
        device: D,
        model: ModelConfig,
        config: Config,
        tensors: &Tensors,
        progress: Option<Progress>,
        ranks: Ranks<D>,
    ) -> Result<Self> {
        let whole = specs(&model);
        check_sizes(&whole, tensors)?;
        check_ranks(&device, &ranks)?;
        let places = places(
            &specs(&part_of_rank(&model, ranks.rank(), ranks.world())?),
            &whole,
        );
        let lists = [&tensors.values, &tensors.m, &tensors.v];
        let tensor = |device: &D, kind: Kept, part: &Part| {
            let mut buffer = room(device, part.range.len())?;
            if let Some(place) = places[part.tensor] {
                let values = &lists[kind as usize][place][part.range.clone()];
                device.write(&mut buffer, 0, values)?;
            }
            Ok(buffer)
        };
        let among = Among::layers(&device, model, &config, ranks)?;
        Self::made(None, device, among, config, progress, tensor)
    }

    /// [`Trainer::on_ranks`] of adapters (`model.lora`) over the weights of `base`, which are shared with it.
    ///
    /// # Errors
    /// As [`Trainer::on_ranks`].
    pub fn adapting(
        base: &Decoder<D>,
        model: ModelConfig,
        config: Config,
        tensors: &Tensors,
        progress: Option<Progress>,
        ranks: Ranks<D>,
    ) -> Result<Self>
    where
        D: Clone,
    {
        let (device, base) = (base.device.clone(), Some(&base.weights));
        Self::on_weights(base, device, model, config, tensors, progress, ranks)
    }

    fn on_weights(
        base: Option<&Weights<D>>,
        device: D,
        model: ModelConfig,
        config: Config,
        tensors: &Tensors,
        progress: Option<Progress>,
        ranks: Ranks<D>,
    ) -> Result<Self> {
        check_sizes(&specs(&model), tensors)?;
        check_ranks(&device, &ranks)?;
        let lists = [&tensors.values, &tensors.m, &tensors.v];
        let tensor = |device: &D, kind: Kept, part: &Part| {
            let values = &lists[kind as usize][part.tensor][part.range.clone()];
            let mut buffer = room(device, values.len())?;
            device.write(&mut buffer, 0, values)?;
            Ok(buffer)
        };
        let among = Among::sequences(model, ranks);
        Self::made(base, device, among, config, progress, tensor)
    }

    /// A trainer at the start of a run, with arbitrary tensors: for dry runs, which only measure memory.
    ///
    /// # Errors
    /// [`TrainError::Config`], [`TrainError::Device`].
    pub fn for_dry_run(
        device: D,
        model: ModelConfig,
        config: Config,
        ranks: Ranks<D>,
    ) -> Result<Self> {
        let tensor = |device: &D, _, part: &Part| room(device, part.range.len());
        let model = model.for_dry_run();
        let base = match model.lora {
            None => None,
            Some(_) => {
                let specs = base_specs(&model);
                let values = |i: usize| device.empty(Kind::Exact, specs[i].role.len());
                Some(Weights::prepare(&device, &specs, values, false)?)
            }
        };
        let among = Among::sequences(model, ranks);
        Self::made(base.as_ref(), device, among, config, None, tensor)
    }

    /// [`Trainer::for_dry_run`] as [`Trainer::on_stages`].
    ///
    /// # Errors
    /// As [`Trainer::for_dry_run`]; [`TrainError::Argument`] as [`Trainer::on_stages`].
    pub fn stage_for_dry_run(
        device: D,
        model: ModelConfig,
        config: Config,
        ranks: Ranks<D>,
    ) -> Result<Self> {
        let tensor = |device: &D, _, part: &Part| room(device, part.range.len());
        let among = Among::layers(&device, model.for_dry_run(), &config, ranks)?;
        Self::made(None, device, among, config, None, tensor)
    }

    fn made(
        base: Option<&Weights<D>>,
        device: D,
        among: Among<D>,
        config: Config,
        progress: Option<Progress>,
        tensor: impl Fn(&D, Kept, &Part) -> crate::device::Result<D::Buffer>,
    ) -> Result<Self> {
        let Among {
            model,
            layers,
            stage,
            sequences,
        } = among;
        check_adapters(&model, &config, base.is_some())?;
        let specs = specs(&model);
        let updated = match &layers {
            Some(layers) => layers.updated(&specs),
            None => updated(&specs, &config.training)?,
        };
        let lens: Vec<usize> = specs.iter().map(kept).collect();
        let own = |(i, len): (usize, &usize)| if owns(&model, i) { *len } else { 0 };
        let own: Vec<usize> = lens.iter().enumerate().map(own).collect();
        let spread = Spread::new(&device, &own, &updated, sequences)?;
        let whole = |i: usize| Part {
            tensor: i,
            range: 0..lens[i],
        };
        let values = (0..lens.len())
            .map(|i| Ok(tensor(&device, Kept::Values, &whole(i))?))
            .collect::<Result<Vec<_>>>()?;
        let own = |kind| -> Result<Vec<D::Buffer>> {
            let parts = spread.own().iter();
            parts.map(|part| Ok(tensor(&device, kind, part)?)).collect()
        };
        let (m, v) = (own(Kept::M)?, own(Kept::V)?);
        let progress = match progress {
            // The settings may be others than when the run was saved.
            Some(progress) => Progress {
                guard: progress.guard.reconfigured(config.guard.clone())?,
                ..progress
            },
            None => Progress {
                step: 0,
                updates: 0,
                tokens: 0,
                position: Position::default(),
                guard: Guard::new(config.guard.clone())?,
            },
        };
        // The model prepares values of its own, one tensor at a time.
        let shared = if base.is_some() {
            base_specs(&model).len()
        } else {
            0
        };
        let value = |i: usize| tensor(&device, Kept::Values, &whole(shared + i));
        let own = Weights::prepare(&device, &specs[shared..], value, true)?;
        let weights = match base {
            Some(base) => base.with(shared, own),
            None => own,
        };
        let model = Decoder {
            stage,
            device,
            config: model,
            specs,
            weights,
        };
        Ok(Self {
            schedule: config.schedule()?,
            gradients: vec![Gradients::of(&model, &updated)?],
            spread,
            layers,
            teacher: None,
            updated,
            config,
            model,
            values,
            m,
            v,
            progress,
            ahead: None,
            stale: false,
            stop: Stop::default(),
        })
    }
}
