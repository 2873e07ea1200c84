//! What a model takes on a GPU, from dry runs of the code that will run there: no GPU is needed.

use std::cell::Cell;
use std::sync::Arc;

use anyhow::Result;
use segattn::cuda::kernels::{KernelMetadata, Kernels};
use segattn::device::gpu::{DryRun, Gpu, MemoryPlan, PoolPlacement};
use segattn::generate::dry_run::{Reading, dry_run};
use segattn::model::config::ModelConfig;
use segattn::model::decoder::Decoder;
use segattn::ranks::Ranks;
use segattn::train::config::Config;
use segattn::train::trainer::{Trainer, part_of_rank};
use serde::Serialize;

/// Multiprocessors of the GPU that is assumed where there is none: an H100 or H200.
const MULTIPROCESSORS: u32 = 132;

/// What is to be planned.
pub struct Planner<'a> {
    pub config: &'a ModelConfig,
    pub pool: PoolPlacement,
    /// Sequences side by side.
    pub batch: usize,
    pub segments_per_step: usize,
    pub tbptt: usize,
    pub recompute: bool,
    /// Ranks that train together, each on `batch` sequences.
    pub ranks: usize,
    /// As `training.group`.
    pub group: Option<usize>,
    /// Stages that share the layers.
    pub stages: usize,
}

/// Where a plan holds.
#[derive(Serialize)]
pub struct Place {
    /// The GPU, or what was assumed of it.
    pub gpu: String,
    /// Its memory that other programs, the driver and loaded kernels hold, bytes, where there is a GPU.
    pub elsewhere: Option<usize>,
    #[serde(skip)]
    free: Option<usize>,
}

/// Bytes, by what they are for; of several stages of the one that takes most.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Tokens of each sequence.
    pub tokens: usize,
    /// score, generate (the tokens are a prompt, and one more segment is generated) or train.
    #[serde(rename = "for")]
    pub run: &'static str,
    /// Prepared weights.
    pub weights: usize,
    /// Weights in f32, gradients, moments.
    pub optimizer: usize,
    /// Prior tails and angle tables.
    pub state: usize,
    /// Everything that comes and goes: segments in flight, activations, their gradients, workspace.
    pub activations: usize,
    /// Pools on the device.
    pub pool: usize,
    /// All of these.
    pub device: usize,
    /// Pools in pinned host memory.
    pub host: usize,
    /// Of several stages, `device` of each, the first to the last.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<usize>,
}

/// Plans for these lengths, with the kernels of the machine's GPU or, where there is none, assumed ones.
pub fn rows(planner: &Planner<'_>, contexts: &[usize]) -> Result<(Place, Vec<Row>)> {
    #[cfg(feature = "cuda")]
    match super::device::open_gpu(0) {
        Ok(gpu) => {
            use segattn::device::gpu::Driver;
            let kernels = gpu.driver().shared_kernels();
            let rows = planner.rows(kernels, None, contexts)?;
            // The dry runs have loaded the kernels.
            let (total, free) = (gpu.driver().info().memory, gpu.driver().free_memory()?);
            let place = Place {
                gpu: segattn::device::Device::description(&gpu),
                elsewhere: Some(total.saturating_sub(free)),
                free: Some(free),
            };
            let rows = match planner.pool {
                PoolPlacement::Auto => planner.rows(kernels, place.free, contexts)?,
                PoolPlacement::AtMost(_) => rows,
            };
            return Ok((place, rows));
        }
        Err(error) => tracing::debug!("no GPU: {error}"),
    }
    let place = Place {
        gpu: format!("assumed: {MULTIPROCESSORS} multiprocessors"),
        elsewhere: None,
        free: None,
    };
    let kernels = Arc::new(KernelMetadata {
        multiprocessors: MULTIPROCESSORS,
        hopper: true,
    });
    let rows = planner.rows(&kernels, place.free, contexts)?;
    Ok((place, rows))
}

impl Planner<'_> {
    fn rows<K: Kernels + Send + Sync>(
        &self,
        kernels: &Arc<K>,
        free: Option<usize>,
        contexts: &[usize],
    ) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for tokens in contexts {
            let segment = self.config.segment.as_ref();
            let new = segment.map_or(1, |s| s.segment_len);
            rows.push(self.read(kernels, free, "score", [*tokens, 0])?);
            rows.push(self.read(kernels, free, "generate", [*tokens, new])?);
            rows.push(self.train(kernels, free, *tokens)?);
        }
        Ok(rows)
    }

    fn read<K: Kernels + Send + Sync>(
        &self,
        kernels: &Arc<K>,
        free: Option<usize>,
        run: &'static str,
        [tokens, new]: [usize; 2],
    ) -> Result<Row> {
        let reading = Reading {
            sequences: vec![[0, tokens]; self.batch],
            scored: new == 0,
            new,
            segments_per_step: self.segments_per_step,
        };
        let mut rows = Vec::new();
        for layers in self.config.stages(self.stages, reading.scored) {
            let part = self.config.part_of(layers);
            let (weights, opened) = (Cell::new(0), Cell::new(0));
            let plan = MemoryPlan::new(kernels, self.pool, free, |dry| -> Result<()> {
                let model = Decoder::for_dry_run(dry.clone(), part.clone(), false)?;
                weights.set(used(&dry));
                Ok(dry_run(&model, &reading, || opened.set(used(&dry)))?)
            })?;
            let state = opened.get() - weights.get();
            rows.push(row(run, tokens, &plan, [weights.get(), 0, state]));
        }
        Ok(most(rows))
    }

    fn train<K: Kernels + Send + Sync>(
        &self,
        kernels: &Arc<K>,
        free: Option<usize>,
        tokens: usize,
    ) -> Result<Row> {
        let mut config = Config::default();
        config.training.sequence_len = tokens;
        config.training.batch = self.batch;
        config.training.segments_per_step = self.segments_per_step;
        config.training.tbptt = self.tbptt;
        config.training.recompute = self.recompute;
        config.training.group = self.group;
        let mut rows = Vec::new();
        for stage in 0..self.stages {
            // The last rank has no fewer sequences than another.
            let (rank, world) = match self.stages {
                1 => (self.ranks - 1, self.ranks),
                stages => (stages - 1 - stage, stages),
            };
            rows.push(self.train_on(kernels, free, &config, rank, world)?);
        }
        Ok(most(rows))
    }

    /// Of one rank of a run that is spread over ranks or stages.
    fn train_on<K: Kernels + Send + Sync>(
        &self,
        kernels: &Arc<K>,
        free: Option<usize>,
        config: &Config,
        rank: usize,
        world: usize,
    ) -> Result<Row> {
        let (model, config) = (self.config, || config.clone());
        let tokens = config().training.sequence_len;
        let by_layers = self.stages > 1;
        let part = match by_layers {
            true => part_of_rank(model, rank, world)?,
            false => model.clone(),
        };
        let dry = Gpu::new(DryRun::new(kernels.clone(), None));
        let held = Decoder::for_dry_run(dry.clone(), part, true)?;
        let (weights, made) = (used(&dry), Cell::new(0));
        drop(held);
        let plan = MemoryPlan::new(kernels, self.pool, free, |dry| -> Result<()> {
            let (model, ranks) = (model.clone(), Ranks::planned(rank, world));
            let mut trainer = match by_layers {
                true => Trainer::stage_for_dry_run(dry.clone(), model, config(), ranks)?,
                false => Trainer::for_dry_run(dry.clone(), model, config(), ranks)?,
            };
            made.set(used(&dry));
            Ok(trainer.rehearse(self.batch * self.ranks, tokens)?)
        })?;
        let optimizer = made.get() - weights;
        Ok(row("train", tokens, &plan, [weights, optimizer, 0]))
    }
}

/// The row of the stage that takes most, with what each of them takes.
fn most(rows: Vec<Row>) -> Row {
    let each: Vec<usize> = rows.iter().map(|row| row.device).collect();
    let most = rows.into_iter().max_by_key(|row| row.device + row.host);
    Row {
        stages: if each.len() > 1 { each } else { Vec::new() },
        ..most.expect("a stage")
    }
}

fn used<K: Kernels + Send + Sync>(dry: &Gpu<DryRun<K>>) -> usize {
    dry.memory_use().buffers.used
}

fn row(
    run: &'static str,
    tokens: usize,
    plan: &MemoryPlan,
    [weights, optimizer, state]: [usize; 3],
) -> Row {
    let stays = weights + optimizer + state;
    Row {
        tokens,
        run,
        weights,
        optimizer,
        state,
        activations: plan.planned.buffers.high_water - stays,
        pool: plan.planned.pool.high_water,
        device: plan.device_bytes(),
        host: plan.host_bytes(),
        stages: Vec::new(),
    }
}
