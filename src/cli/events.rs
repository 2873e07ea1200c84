//! The numbers of `metrics.jsonl` once more, as TensorBoard reads them.
//!
//! A file of events is a sequence of records: length (u64), its checksum, the event, its checksum; all little endian.
//! An event is a message in the encoding of Protocol Buffers. This writes the few fields that scalars need: time 1,
//! step 2, version of the file 3, summary 5 (values 1: tag 1, number 2), and session 7 (status 1). Each start of a run
//! has a file of its own, which says from which step on those before hold no more.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use segattn::train::folder::EVENTS_PREFIX;

use super::metrics::Line;

/// What every file begins with.
const VERSION: &str = "brain.Event:2";

/// A file of events, open for more.
pub struct Events {
    path: PathBuf,
    file: File,
}

impl Events {
    /// A new file in `folder`, of a run that has done `step` steps.
    pub fn create(folder: &Path, step: u64) -> Result<Self> {
        let (seconds, process) = (now() as u64, std::process::id());
        let path = folder.join(format!(
            "{EVENTS_PREFIX}.{seconds}.segattn.{process}.{step}"
        ));
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.with_context(|| format!("cannot write {}", path.display()))?;
        let mut events = Self { path, file };
        let mut first = Message::event(0);
        first.bytes(3, VERSION.as_bytes());
        events.record(&first)?;
        // Steps after these are done again.
        let mut session = Message::event(step + 1);
        session.bytes(7, &[0x08, 1]);
        events.record(&session)?;
        Ok(events)
    }

    /// Writes the numbers of a line.
    pub fn write(&mut self, line: &Line) -> Result<()> {
        let rate = line
            .tokens
            .zip(line.seconds)
            .filter(|(_, seconds)| *seconds > 0.0);
        let scalars = [
            ("train/loss", line.loss),
            ("train/divergence", line.divergence),
            ("train/lr", line.lr),
            ("train/grad_norm", line.grad_norm),
            (
                "train/tokens_per_second",
                rate.map(|(tokens, seconds)| tokens as f64 / seconds),
            ),
            (
                "train/model_flops_utilisation",
                line.model_flops_utilisation,
            ),
            ("validation/loss", line.validation_loss),
        ];
        let mut summary = Message::default();
        for (tag, number) in scalars {
            let Some(number) = number else { continue };
            let mut value = Message::default();
            value.bytes(1, tag.as_bytes());
            value.fixed(2, 5, &(number as f32).to_le_bytes());
            summary.bytes(1, &value.0);
        }
        if summary.0.is_empty() {
            return Ok(());
        }
        let mut event = Message::event(line.step);
        event.bytes(5, &summary.0);
        self.record(&event)
    }

    fn record(&mut self, event: &Message) -> Result<()> {
        let length = (event.0.len() as u64).to_le_bytes();
        let record = [
            &length[..],
            &checksum(&length),
            &event.0,
            &checksum(&event.0),
        ]
        .concat();
        let written = self.file.write_all(&record);
        written.with_context(|| format!("cannot write {}", self.path.display()))
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0.0, |since| since.as_secs_f64())
}

/// CRC-32C, turned and moved so that a checksum over text with checksums is none by chance.
fn checksum(bytes: &[u8]) -> [u8; 4] {
    let crc = crc32c::crc32c(bytes);
    crc.rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// A message of Protocol Buffers: fields one after the other, each with its number and the kind of its value.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn event(step: u64) -> Self {
        let mut event = Self::default();
        event.fixed(1, 1, &now().to_le_bytes());
        event.key(2, 0);
        event.number(step);
        event
    }

    fn key(&mut self, field: u64, kind: u64) {
        self.number(field << 3 | kind);
    }

    /// Seven bits a byte, the lowest first.
    fn number(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.0.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.0.push(number as u8);
    }

    fn bytes(&mut self, field: u64, bytes: &[u8]) {
        self.key(field, 2);
        self.number(bytes.len() as u64);
        self.0.extend(bytes);
    }

    fn fixed(&mut self, field: u64, kind: u64, bytes: &[u8]) {
        self.key(field, kind);
        self.0.extend(bytes);
    }
}
