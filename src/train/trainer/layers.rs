//! A trainer's part of a model whose layers are spread over stages (`model::stage`): which tensors a rank has, and how
//! what all of them have becomes that of the whole model.
//!
//! Each stage has weights, gradients and moments of its own layers. A tied embedding belongs to the first stage, which
//! updates it; the last one has a copy of its values for the head, and sends the head's share of its gradient.

use std::collections::HashMap;

use crate::device::Device;
use crate::model::config::ModelConfig;
use crate::model::parameters::{TensorSpec, index, specs};
use crate::model::stage::Stage;
use crate::ranks::{Piece, RankError, Ranks};
use crate::train::config::TrainingSection;
use crate::train::error::{Result, TrainError};
use crate::train::optimizer::updated;
use crate::train::progress::Tensors;
use crate::train::spread::WINDOW;

use super::Trainer;
use super::kept::kept;

/// What the ranks do with the state for a checkpoint.
const COLLECTED: &str = "the state is collected";

/// The layers of a model on the ranks of a run.
#[derive(Debug)]
pub(super) struct Layers {
    /// The whole model.
    pub whole: ModelConfig,
    /// Elements of its tensors.
    lens: Vec<usize>,
    /// Which of them change.
    updated: Vec<bool>,
    /// Of each rank, the tensors that it owns: their places in its part and in the whole model, in order.
    owned: Vec<Vec<[usize; 2]>>,
}

impl Layers {
    /// # Errors
    /// [`TrainError::Argument`] for more ranks than layers, and for a model with adapters; [`TrainError::Config`] as
    /// [`updated`].
    pub fn new(whole: &ModelConfig, training: &TrainingSection, world: usize) -> Result<Self> {
        check(whole, world)?;
        let all = specs(whole);
        let owned = (0..world).map(|rank| {
            let part = part(whole, rank, world);
            let places = places(&specs(&part), &all).into_iter().enumerate();
            let owned = places.filter_map(|(i, at)| Some([i, at?]));
            owned.filter(|[i, _]| owns(&part, *i)).collect()
        });
        Ok(Self {
            whole: whole.clone(),
            lens: all.iter().map(kept).collect(),
            updated: updated(&all, training)?,
            owned: owned.collect(),
        })
    }

    /// Which of a part's tensors change.
    pub fn updated(&self, part: &[TensorSpec]) -> Vec<bool> {
        let places = places(part, &specs(&self.whole)).into_iter();
        places
            .map(|at| at.is_some_and(|at| self.updated[at]))
            .collect()
    }

    /// The sums of squares of the chunks of all gradients, in the order of the whole model's tensors, from those of
    /// each rank. A plan, which has only its own, gets as many zeros.
    pub fn in_order(&self, lists: Vec<Vec<f64>>, chunk: usize) -> Vec<f64> {
        let chunks = |at: usize| match self.updated[at] {
            true => self.lens[at].div_ceil(chunk),
            false => 0,
        };
        if lists.len() < self.owned.len() {
            return vec![0.0; (0..self.lens.len()).map(chunks).sum()];
        }
        let mut all: Vec<Vec<f64>> = vec![Vec::new(); self.lens.len()];
        for (owned, list) in self.owned.iter().zip(lists) {
            let mut list = list.into_iter();
            for [_, at] in owned {
                all[*at] = list.by_ref().take(chunks(*at)).collect();
            }
        }
        all.concat()
    }

    /// The whole state on rank 0, from each rank's; on the others their own, and nothing of the rest.
    pub fn collect<D: Device>(&self, ranks: &Ranks<D>, own: &Tensors) -> Result<Tensors> {
        let mut mine = Vec::new();
        for [i, _] in &self.owned[ranks.rank()] {
            for list in [&own.values, &own.m, &own.v] {
                mine.extend_from_slice(bytemuck::cast_slice(&list[*i]));
            }
        }
        let mut all = Tensors::new(vec![Vec::new(); self.lens.len()]);
        let collected = match ranks.mesh() {
            Some(mesh) => mesh.collect(&mine, COLLECTED)?,
            None => None,
        };
        match collected {
            Some(collected) => {
                for (rank, bytes) in collected.iter().enumerate() {
                    self.place(&mut all, rank, bytes)?;
                }
            }
            None => self.place(&mut all, ranks.rank(), &mine)?,
        }
        Ok(all)
    }

    /// Puts what a rank owns into its place.
    fn place(&self, all: &mut Tensors, rank: usize, bytes: &[u8]) -> Result<()> {
        let mut rest = bytes;
        for [_, at] in &self.owned[rank] {
            for list in [&mut all.values, &mut all.m, &mut all.v] {
                let len = self.lens[*at] * size_of::<f32>();
                let (values, after) =
                    rest.split_at_checked(len)
                        .ok_or_else(|| RankError::Message {
                            rank,
                            doing: COLLECTED,
                            expected: format!("{len} bytes more"),
                            got: rest.len().to_string(),
                        })?;
                list[*at] = bytemuck::pod_collect_to_vec(values);
                rest = after;
            }
        }
        Ok(())
    }
}

/// Whether layers can be spread over so many ranks.
fn check(model: &ModelConfig, world: usize) -> Result<()> {
    let layers = model.num_hidden_layers;
    if world > layers {
        let expected = format!("at most {layers}, the model's layers");
        return Err(TrainError::argument("stages", expected, world));
    }
    match model.lora {
        Some(_) if world > 1 => Err(TrainError::argument(
            "stages",
            "1 where adapters are trained: layers under adapters are not spread yet",
            world,
        )),
        _ => Ok(()),
    }
}

/// The part of a whole model that a rank of a training run has, if each has consecutive layers.
///
/// # Errors
/// [`TrainError::Argument`] for more ranks than layers, and for a model with adapters.
pub fn part_of_rank(model: &ModelConfig, rank: usize, world: usize) -> Result<ModelConfig> {
    check(model, world)?;
    Ok(part(model, rank, world))
}

fn part(model: &ModelConfig, rank: usize, world: usize) -> ModelConfig {
    let stage = Stage::<crate::device::cpu::Cpu>::of_rank(rank, world);
    model.part_of(model.stages(world, true)[stage].clone())
}

/// Whether a part's own tensor is also its to update: another part's is the table that a tied head reads.
pub(super) fn owns(part: &ModelConfig, i: usize) -> bool {
    i != index::EMBEDDING || part.part.begins
}

/// Where the tensors of a part are in the whole model.
pub(super) fn places(part: &[TensorSpec], whole: &[TensorSpec]) -> Vec<Option<usize>> {
    let name = |spec: &TensorSpec| spec.parts.first().map(|(name, _)| name.clone());
    let known = whole.iter().enumerate();
    let known: HashMap<_, _> = known.filter_map(|(i, s)| Some((name(s)?, i))).collect();
    let place = |spec| known.get(&name(spec)?).copied();
    part.iter().map(place).collect()
}

impl<D: Device> Trainer<D> {
    /// Brings the new values of a tied embedding from the first stage to the head of the last one.
    pub(super) fn share_embedding(&mut self) -> Result<()> {
        let (config, ranks) = (&self.model.config, self.model.stage.ranks());
        let part = config.part;
        let tied = config.tie_word_embeddings && self.updated[index::EMBEDDING];
        if !tied || part.begins == part.ends {
            return Ok(());
        }
        let device = &self.model.device;
        let values = &mut self.values[index::EMBEDDING];
        let len = device.len(values);
        for start in (0..len).step_by(WINDOW) {
            let piece = Piece {
                peer: if part.begins { 0 } else { ranks.world() - 1 },
                buffer: 0,
                range: start..len.min(start + WINDOW),
            };
            let (sends, receives) = match part.begins {
                true => (vec![piece], Vec::new()),
                false => (Vec::new(), vec![piece]),
            };
            let doing = "the tied embedding goes to the head";
            ranks.exchange(device, &mut [&mut *values], &sends, &receives, doing)?;
        }
        Ok(())
    }
}
