//! `metrics.jsonl`: one line a step and one a validation.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use segattn::train::trainer::StepReport;
use serde::{Deserialize, Serialize};

use super::files::write_atomically;

/// A line: a step, or a validation after `step` steps. Numbers that are not finite are left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Line {
    /// Steps done.
    pub step: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// The model's own operations over those that the device could have done, where its speed was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_flops_utilisation: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
}

impl Line {
    pub fn step(report: &StepReport, seconds: f64) -> Self {
        Self {
            step: report.step + 1,
            loss: finite(report.loss),
            lr: Some(report.lr),
            grad_norm: finite(report.grad_norm),
            tokens: Some(report.tokens),
            seconds: Some(seconds),
            skipped: report.skipped.as_ref().map(ToString::to_string),
            ..Self::default()
        }
    }

    pub fn validation(step: u64, loss: f64) -> Self {
        Self {
            step,
            validation_loss: finite(loss),
            ..Self::default()
        }
    }
}

fn finite(x: f64) -> Option<f64> {
    Some(x).filter(|x| x.is_finite())
}

/// The file, open for more lines.
pub struct Metrics {
    path: PathBuf,
    file: File,
}

impl Metrics {
    /// Opens the file of a run that has done `step` steps: lines of later steps, and a last line that was
    /// torn, are removed, since these steps will be done again.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        let failed = || format!("cannot write {}", path.display());
        if path.exists() {
            let kept = read(path)?
                .into_iter()
                .filter(|l| step > 0 && l.step <= step);
            let mut text = Vec::new();
            for line in kept {
                serde_json::to_writer(&mut text, &line)?;
                text.push(b'\n');
            }
            write_atomically(path, &text)?;
        }
        let file = OpenOptions::new().create(true).append(true).open(path);
        Ok(Self {
            path: path.to_owned(),
            file: file.with_context(failed)?,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn write(&mut self, line: &Line) -> Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        let failed = || format!("cannot write {}", self.path.display());
        self.file.write_all(&text).with_context(failed)
    }

    /// Makes the lines durable: a checkpoint must not know of steps that they do not.
    pub fn sync(&self) -> Result<()> {
        let failed = || format!("cannot sync {}", self.path.display());
        self.file.sync_data().with_context(failed)
    }
}

/// The lines that can be read.
pub fn read(path: &Path) -> Result<Vec<Line>> {
    let failed = || format!("cannot read {}", path.display());
    let file = BufReader::new(File::open(path).with_context(failed)?);
    let mut lines = Vec::new();
    for line in file.split(b'\n') {
        lines.extend(serde_json::from_slice::<Line>(&line.with_context(failed)?));
    }
    Ok(lines)
}
