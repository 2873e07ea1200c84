//! Runs that are spread over ranks, by sequences or by layers, as threads of one process. Shared by tests.

#![allow(dead_code)]

use std::time::Duration;

use segattn::device::Device;
use segattn::device::cpu::Cpu;
use segattn::model::config::ModelConfig;
use segattn::ranks::Ranks;
use segattn::train::config::Config;
use segattn::train::data::Example;
use segattn::train::progress::{Progress, Tensors};
use segattn::train::trainer::{StepReport, Trainer};

use crate::common::{random, run_config, tokens};
use crate::meeting::on_ranks;

const LIMIT: Duration = Duration::from_secs(60);

/// How many ranks share a run, and what of it.
#[derive(Clone, Copy, Debug)]
pub enum Spread {
    Sequences(usize),
    Layers(usize),
}

pub fn config(overrides: &[(&str, &str)]) -> Config {
    let base = [
        ("data.train", "x"),
        ("schedule.warmup_steps", "0"),
        ("schedule.lr", "1e-2"),
        ("optimizer.clip_norm", "0.5"),
        ("training.learn_gates", "true"),
        ("training.group", "1"),
    ];
    run_config(&base, overrides)
}

/// The sequences of a step: of several lengths, with weights, whose sums depend on their order.
pub fn sequences(step: u64, count: usize) -> Vec<Example> {
    let mut next = random(step);
    let one = |i: usize| {
        let tokens = tokens(100 * step + i as u64, 5 + (7 * i) % 23);
        Example {
            weights: Some(tokens.iter().map(|_| (next() + 0.5) as f32).collect()),
            ..Example::from(tokens)
        }
    };
    (0..count).map(one).collect()
}

/// A run: a model and the sequences of each step.
pub struct Run<'a> {
    pub model: &'a ModelConfig,
    pub config: &'a Config,
    pub sequences: &'a (dyn Fn(u64) -> Vec<Example> + Sync),
}

/// Where a run is.
pub struct At {
    pub reports: Vec<StepReport>,
    pub validated: Option<u64>,
    pub tensors: Tensors,
    pub progress: Progress,
}

impl Run<'_> {
    /// Steps up to `end` on the CPU, from the start or from where a run was.
    pub fn to(&self, spread: Spread, from: Option<&At>, end: u64) -> At {
        self.on(&|_| Cpu, spread, from, end)
    }

    /// The same on a device for each rank.
    pub fn on<D: Device + Clone + 'static>(
        &self,
        device: &(dyn Fn(usize) -> D + Sync),
        spread: Spread,
        from: Option<&At>,
        end: u64,
    ) -> At {
        let initial = Tensors::initial(self.model, 3);
        let (Spread::Sequences(world) | Spread::Layers(world)) = spread;
        let mut all = on_ranks(world, LIMIT, |rank, mesh| {
            let (tensors, progress) = match from {
                Some(at) => (&at.tensors, Some(at.progress.clone())),
                None => (&initial, None),
            };
            let (model, config) = (self.model.clone(), self.config.clone());
            let ranks = Ranks::new(mesh.unwrap());
            let start = match spread {
                Spread::Sequences(_) => Trainer::on_ranks,
                Spread::Layers(_) => Trainer::on_stages,
            };
            // Ranks that wait for each other must not wait for each other's threads.
            let threads = rayon::ThreadPoolBuilder::new().num_threads(1).build();
            threads.unwrap().install(|| {
                let trainer = start(device(rank), model, config, tensors, progress, ranks);
                self.steps(trainer.unwrap(), end)
            })
        });
        // A report has the log-probabilities of its rank's sequences alone, which are consecutive.
        for step in 0..all[0].reports.len() {
            let own = all.iter_mut().map(|at| &mut at.reports[step]);
            let of_all: Vec<_> = own.flat_map(|r| r.log_probabilities.drain(..)).collect();
            for at in &mut all {
                at.reports[step].log_probabilities = of_all.clone();
            }
        }
        for other in &all {
            assert_eq!(other.reports, all[0].reports);
            assert_eq!(other.validated, all[0].validated);
            assert_eq!(other.progress, all[0].progress);
            let values = |at: &At| bits(&Tensors::new(at.tensors.values.clone()));
            assert!(
                matches!(spread, Spread::Layers(_)) || values(other) == values(&all[0]),
                "weights differ between ranks"
            );
        }
        all.swap_remove(0)
    }

    fn steps<D: Device + Clone>(&self, mut trainer: Trainer<D>, end: u64) -> At {
        let mut reports = Vec::new();
        while trainer.progress().step < end {
            let batch = (self.sequences)(trainer.progress().step);
            reports.push(trainer.step_on(&[batch]).unwrap());
        }
        let validated = trainer.validate(&(self.sequences)(99)).unwrap();
        At {
            reports,
            validated: validated.map(f64::to_bits),
            tensors: trainer.tensors().unwrap(),
            progress: trainer.progress().clone(),
        }
    }
}

pub fn bits(tensors: &Tensors) -> Vec<u32> {
    let all = [&tensors.values, &tensors.m, &tensors.v]
        .into_iter()
        .flatten();
    all.flatten().map(|x| x.to_bits()).collect()
}

pub fn same(a: &At, b: &At, what: &str) {
    let reports = |at: &At| -> Vec<_> {
        let bits = |r: &StepReport| {
            let scores = r.log_probabilities.iter().flatten();
            let scores: Vec<u64> = scores.map(|x| x.to_bits()).collect();
            let sums = [r.loss, r.grad_norm].map(f64::to_bits);
            (r.step, sums, r.tokens, scores)
        };
        at.reports.iter().map(bits).collect()
    };
    let (a_reports, b_reports) = (reports(a), reports(b));
    let last = a_reports.len().min(b_reports.len());
    let tail = |reports: &[_]| reports[reports.len() - last..].to_vec();
    assert_eq!(tail(&a_reports), tail(&b_reports), "{what}");
    assert_eq!(a.validated, b.validated, "{what}");
    assert_eq!(a.progress, b.progress, "{what}");
    assert!(
        bits(&a.tensors) == bits(&b.tensors),
        "{what}: weights or moments"
    );
}
