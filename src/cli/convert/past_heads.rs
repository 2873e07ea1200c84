//! `--past-heads`: which KV heads read the past, by name or by measurement.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use segattn::eval::EvalError;
use segattn::eval::heads::{HeadScores, best, measure};
use segattn::eval::lookups::lookups;
use segattn::generate::dry_run::Reading;
use segattn::model::config::{HeadReads, ModelConfig};
use segattn::model::tokenizer::Tokenizer;

use super::super::device::{DeviceName, Planned, on_device};
use super::super::generate::progress;
use super::super::model::Opened;
use super::super::out::note;
use super::super::past_heads::gates;

/// Prompts of a measurement, and tokens of each.
const PROMPTS: usize = 24;
const LENGTH: usize = 1024;
/// Seed of the prompts.
const SEED: u64 = 7;

/// The value of the flag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PastHeads {
    /// These heads, by the names of `model.segment.past_heads` in a run's configuration.
    Named(Vec<String>),
    /// So many heads with the highest score.
    Measured(Score, usize),
}

/// What heads are chosen by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Score {
    /// See [`HeadScores::mass`].
    Mass,
    /// See [`HeadScores::copy`].
    Copy,
    /// The gates of the checkpoint, which training has learned.
    Gate,
}

impl fmt::Display for Score {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Score::Mass => "mass",
            Score::Copy => "copy",
            Score::Gate => "gate",
        })
    }
}

impl FromStr for PastHeads {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        if let Some((score, count)) = text.split_once(':') {
            let score = [Score::Mass, Score::Copy, Score::Gate]
                .into_iter()
                .find(|s| s.to_string() == score);
            let count = count.parse().ok().filter(|count| *count > 0);
            return match (score, count) {
                (Some(score), Some(count)) => Ok(Self::Measured(score, count)),
                _ => bail!("expected mass:N, copy:N or gate:N with a number of heads N"),
            };
        }
        Ok(Self::Named(text.split(',').map(str::to_owned).collect()))
    }
}

impl PastHeads {
    /// The heads that are known by name.
    pub fn names(&self) -> Option<Vec<String>> {
        match self {
            Self::Named(names) => Some(names.clone()),
            Self::Measured(..) => None,
        }
    }

    /// Checks the number of heads to measure.
    pub fn check(&self, config: &ModelConfig) -> Result<()> {
        let all = config.num_hidden_layers * config.num_key_value_heads;
        match self {
            Self::Measured(_, count) if *count > all => {
                bail!("--past-heads: expected at most {all} heads, got {count}")
            }
            _ => Ok(()),
        }
    }

    /// Measures the heads of the model in `folder`, and writes into its configuration that the best read the past.
    pub fn measure(&self, folder: &Path, device: DeviceName, quiet: bool) -> Result<()> {
        let Self::Measured(score, count) = self else {
            return Ok(());
        };
        let mut config = ModelConfig::load(folder)?;
        let scores = match score {
            Score::Gate => gates(folder, &config)?,
            Score::Mass | Score::Copy => {
                let measured =
                    on_device!(device, device => scores(device, folder, &config, quiet))?;
                match score {
                    Score::Copy => measured.copy,
                    _ => measured.mass,
                }
            }
        };
        check_finite(&scores).with_context(|| {
            let folder = folder.display();
            format!("{folder} is written, and no head of it reads the past")
        })?;
        let chosen = best(&scores, *count);
        if !quiet {
            note!("heads that read the past, by {score}:");
            for (layer, head) in &chosen {
                note!(
                    "  {:<8}{:.4}",
                    format!("{layer}.{head}"),
                    scores[*layer][*head]
                );
            }
        }
        add(&mut config, chosen.into_iter());
        config.validate()?;
        Ok(config.save(folder)?)
    }
}

/// Where a model's numbers overflow, no head is better than another.
fn check_finite(scores: &[Vec<f64>]) -> Result<()> {
    let wrong = scores.iter().flatten().find(|score| !score.is_finite());
    match wrong {
        None => Ok(()),
        Some(score) => bail!("--past-heads: expected a finite score of every head, got {score}"),
    }
}

fn add(config: &mut ModelConfig, heads: impl Iterator<Item = (usize, usize)>) {
    let reads = |segment: &mut segattn::model::config::SegmentConfig,
                 (layer, head): (usize, usize)| {
        segment.head_reads[layer][head] = HeadReads {
            prior: true,
            past: true,
        };
    };
    if let Some(segment) = &mut config.segment {
        heads.for_each(|head| reads(segment, head));
    }
}

/// Scores under full attention.
fn scores<D: Planned>(
    device: D,
    folder: &Path,
    config: &ModelConfig,
    quiet: bool,
) -> Result<HeadScores> {
    let tokenizer = Tokenizer::open(folder, config)
        .context("--past-heads: measuring heads needs the model's tokenizer")?;
    let encode =
        |text: &str, framed: bool| tokenizer.encode(text, framed).map_err(EvalError::model);
    let prompts = lookups(&encode, PROMPTS, LENGTH, SEED)?;
    let full = ModelConfig {
        segment: None,
        ..config.clone()
    };
    let longest = prompts.iter().map(|p| p.tokens.len()).max().unwrap_or(0);
    let reading = Reading {
        sequences: vec![[0, longest]],
        scored: true,
        new: 0,
        segments_per_step: 1,
    };
    let model = Opened::of(full, folder)?.load(device, &[reading])?;
    let bar = progress(!quiet, prompts.len() as u64, "prompts");
    let scores = measure(&model, &prompts, |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    Ok(scores)
}

#[cfg(test)]
mod tests {
    use super::check_finite;

    #[test]
    fn scores_that_are_no_numbers_choose_no_head() {
        assert!(check_finite(&[vec![0.5, 0.0], vec![1.0, 0.1]]).is_ok());
        for wrong in [f64::NAN, f64::INFINITY] {
            let error = check_finite(&[vec![0.5], vec![wrong]]).unwrap_err();
            assert!(error.to_string().contains(&wrong.to_string()), "{error}");
        }
    }
}
