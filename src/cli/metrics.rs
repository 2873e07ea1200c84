//! `metrics.jsonl`: one line a step and one a validation.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use segattn::train::trainer::StepReport;
use serde::{Deserialize, Serialize};

use super::events::Events;
use super::files::write_atomically;

/// A line: a step, or a validation after `step` steps. Numbers that are not finite are left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// Steps done.
    pub step: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// From the teacher, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub divergence: Option<f64>,
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
            divergence: report.divergence.and_then(finite),
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

    /// `None` for what is no such line.
    fn parse(text: &[u8]) -> Option<Self> {
        // The library would take an array for the fields in their order.
        let is_object = text.trim_ascii_start().first() == Some(&b'{');
        serde_json::from_slice(text).ok().filter(|_| is_object)
    }
}

fn finite(x: f64) -> Option<f64> {
    Some(x).filter(|x| x.is_finite())
}

/// The file, open for more lines. The caller holds the run's lock.
pub struct Metrics {
    path: PathBuf,
    file: File,
    /// The same for TensorBoard.
    events: Option<Events>,
}

impl Metrics {
    /// Opens the file of a run that has done `step` steps. Lines of later steps, and a last line that was torn, are
    /// removed, since these steps will be done again; every other line stays as it is. Lines that cannot be read
    /// stay too, and are said.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        let failed = || format!("cannot write {}", path.display());
        if path.exists() {
            let text = read_bytes(path)?;
            let kept = kept(&text, path, step);
            if kept.concat() != text {
                // Removed from the end, as nearly always, without room on the disk.
                if text.starts_with(&kept.concat()) {
                    let file = OpenOptions::new().write(true).open(path);
                    let cut = file.and_then(|file| file.set_len(kept.concat().len() as u64));
                    cut.with_context(failed)?;
                } else {
                    write_atomically(path, &kept.concat())?;
                }
            }
        }
        let file = OpenOptions::new().create(true).append(true).open(path);
        Ok(Self {
            path: path.to_owned(),
            file: file.with_context(failed)?,
            events: None,
        })
    }

    /// Writes further lines into a file of events beside it too.
    pub fn with_events(mut self, step: u64) -> Result<Self> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        self.events = Some(Events::create(folder, step)?);
        Ok(self)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn write(&mut self, line: &Line) -> Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        let failed = || format!("cannot write {}", self.path.display());
        self.file.write_all(&text).with_context(failed)?;
        match &mut self.events {
            Some(events) => events.write(line),
            None => Ok(()),
        }
    }

    /// Makes the lines durable: a checkpoint must not know of steps that they do not.
    pub fn sync(&self) -> Result<()> {
        let failed = || format!("cannot sync {}", self.path.display());
        self.file.sync_data().with_context(failed)
    }
}

/// The lines that a run which has done `step` steps keeps, each with its end.
fn kept<'a>(text: &'a [u8], path: &Path, step: u64) -> Vec<&'a [u8]> {
    let mut kept = Vec::new();
    for (i, line) in text.split_inclusive(|b| *b == b'\n').enumerate() {
        match Line::parse(line) {
            Some(line) if step == 0 || line.step > step => {}
            None if !line.ends_with(b"\n") => {
                tracing::warn!("{}: the last line was torn and is removed", path.display());
            }
            parsed => {
                if parsed.is_none() && !line.trim_ascii().is_empty() {
                    let (path, at) = (path.display(), i + 1);
                    tracing::error!(
                        "{path}, line {at}: not a line of metrics; it stays there and is not drawn"
                    );
                }
                kept.push(line);
            }
        }
    }
    // A last line without its end would run into the next one.
    if kept.last().is_some_and(|line| !line.ends_with(b"\n")) {
        kept.push(b"\n");
    }
    kept
}

/// The lines that can be read.
pub fn read(path: &Path) -> Result<Vec<Line>> {
    let text = read_bytes(path)?;
    Ok(text
        .split(|b| *b == b'\n')
        .filter_map(Line::parse)
        .collect())
}

fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    let is_file = std::fs::metadata(path).map_or(true, |found| found.is_file());
    ensure!(
        is_file,
        "{}: expected a regular file, got something else",
        path.display()
    );
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
