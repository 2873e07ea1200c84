//! Results as lines of JSON, one a row, appended as soon as they are there.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::{ExperimentError, Result};

/// Metric of losses, in nats a token.
pub const NATS: &str = "nats";
/// Metric of tasks: a share from 0 to 1.
pub const SCORE: &str = "score";

/// A result. Fields that a row of another program has beside these are passed over.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The experiment.
    pub experiment: String,
    /// The arm.
    pub arm: String,
    /// The seed of its run.
    pub seed: u64,
    /// Tokens that its weights were trained on, those of its parents included.
    pub tokens: u64,
    /// Seconds of the device that the training took.
    pub gpu_seconds: f64,
    /// How the arm ran, where that is another way than it was trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_as: Option<String>,
    /// What was evaluated.
    pub task: String,
    /// Tokens of a window or of a prompt with its answer.
    pub length: u64,
    /// [`NATS`], [`SCORE`], or another share.
    pub metric: String,
    /// The mean over all samples; none where the task does not fit the length.
    pub value: Option<f64>,
    /// Samples: tokens of a loss, prompts of a task.
    pub samples: u64,
    /// Why there is no value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
    /// The loss in equal parts of the windows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by_position: Option<Vec<f64>>,
    /// The loss by length of context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by_context: Option<Vec<Context>>,
    /// The value of each window or prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub values: Option<Vec<f64>>,
    /// The largest share of what was asked for that a head had selected: mean over the prompts, of one head.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recall: Option<f64>,
    /// Tokens that each of `values` is a mean over; one each where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<Vec<f64>>,
    /// The document of each of `values`; each its own where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub groups: Option<Vec<u64>>,
    /// Seconds that this evaluation took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_seconds: Option<f64>,
    /// Identifies the settings of the arm and of the evaluation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
}

/// The loss of tokens with so many before them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Context {
    /// Fewest tokens before.
    pub from: u64,
    /// One more than the most.
    pub to: u64,
    /// Tokens.
    pub tokens: u64,
    /// Their mean loss.
    pub loss: f64,
}

impl Row {
    /// A value that is no share, where the metric says that all are.
    fn beyond_a_share(&self) -> Option<f64> {
        let values = self.value.iter().chain(self.values.iter().flatten());
        let values = values.chain(&self.recall);
        let beyond = |value: &&f64| self.metric != NATS && !(0.0..=1.0).contains(*value);
        values.copied().find(|value| beyond(&value))
    }

    /// The arm, and how it ran where that is another way than it was trained.
    pub fn label(&self) -> String {
        match &self.run_as {
            Some(other) => format!("{} ({other})", self.arm),
            None => self.arm.clone(),
        }
    }
}

/// What a result answers: arm, seed, task, length.
type Key = (String, u64, String, u64);

/// A file of rows, open for more, and locked: two processes that append to it would write over each other's rows.
#[derive(Debug)]
pub struct Rows {
    path: PathBuf,
    file: File,
    done: BTreeSet<Key>,
    rows: Vec<Row>,
}

impl Rows {
    /// Opens the file, or makes it. A last line that was torn is removed.
    ///
    /// # Errors
    /// [`ExperimentError::Io`], [`ExperimentError::InUse`], or [`ExperimentError::Row`] for a line that is no row.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |action| ExperimentError::io(action, path);
        if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).map_err(ExperimentError::io("create", folder))?;
        }
        check_kind(path)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(path).map_err(failed("open"))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => {
                let path = path.to_owned();
                return Err(ExperimentError::InUse { path });
            }
            // Some network file systems have no locks.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(failed("read"))?;
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        let torn = serde_json::from_str::<Value>(&text[whole..]).is_err();
        if whole < text.len() {
            match torn {
                true => {
                    text.truncate(whole);
                    file.set_len(whole as u64).map_err(failed("write"))?;
                }
                false => file.write_all(b"\n").map_err(failed("write"))?,
            }
        }
        file.seek(SeekFrom::End(0)).map_err(failed("write"))?;
        let rows = parse(path, &text)?;
        let done = rows.iter().map(key).collect();
        Ok(Self {
            path: path.to_owned(),
            file,
            done,
            rows,
        })
    }

    /// Those that are there.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Whether a result is there.
    pub fn has(&self, arm: &str, seed: u64, task: &str, length: u64) -> bool {
        let key = (arm.to_owned(), seed, task.to_owned(), length);
        self.done.contains(&key)
    }

    /// Appends a row and makes it durable.
    ///
    /// # Errors
    /// [`ExperimentError::Io`].
    pub fn append(&mut self, row: Row) -> Result<()> {
        let mut line = serde_json::to_vec(&row).expect("numbers and text are JSON");
        line.push(b'\n');
        let written = self.file.write_all(&line);
        written
            .and_then(|()| self.file.sync_data())
            .map_err(ExperimentError::io("write", &self.path))?;
        self.done.insert(key(&row));
        self.rows.push(row);
        Ok(())
    }
}

fn key(row: &Row) -> Key {
    (row.label(), row.seed, row.task.clone(), row.length)
}

/// The rows of a file.
///
/// # Errors
/// As [`Rows::open`].
pub fn read(path: &Path) -> Result<Vec<Row>> {
    check_kind(path)?;
    let text = std::fs::read_to_string(path).map_err(ExperimentError::io("read", path))?;
    parse(path, &text)
}

/// Refuses a device or a pipe, whose end may never come.
fn check_kind(path: &Path) -> Result<()> {
    match std::fs::metadata(path) {
        Ok(found) if !found.is_file() => {
            let error = std::io::Error::other("expected a regular file, got something else");
            Err(ExperimentError::io("read", path)(error))
        }
        _ => Ok(()),
    }
}

/// Lines without a task are something else: progress of a training, for example.
fn parse(path: &Path, text: &str) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (i, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let wrong = |got: String| ExperimentError::Row {
            path: path.to_owned(),
            line: i + 1,
            expected: "a JSON object with experiment, arm, seed, tokens, gpu_seconds, task, length, metric, value and \
                       samples",
            got,
        };
        let value: Value = serde_json::from_str(line).map_err(|e| wrong(e.to_string()))?;
        if !value.is_object() {
            return Err(wrong(line.chars().take(40).collect()));
        }
        if value.get("task").is_some() {
            let row: Row = serde_json::from_value(value).map_err(|e| wrong(e.to_string()))?;
            if let Some(value) = row.beyond_a_share() {
                return Err(ExperimentError::Row {
                    path: path.to_owned(),
                    line: i + 1,
                    expected: "shares from 0 to 1, since the metric is no loss",
                    got: value.to_string(),
                });
            }
            rows.push(row);
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_is_a_share() {
        let line = |metric, value| {
            let row = Row {
                metric: String::from(metric),
                value: Some(value),
                ..row(1)
            };
            serde_json::to_string(&row).unwrap()
        };
        let parsed = |metric, value| parse(Path::new("rows.jsonl"), &line(metric, value));
        assert!(parsed(SCORE, 1.0).is_ok() && parsed(NATS, 2.0).is_ok());
        let error = parsed(SCORE, 2.0).unwrap_err().to_string();
        assert!(error.contains("shares from 0 to 1"), "{error}");
        assert!(parsed("recall", -0.5).is_err());
    }

    fn row(seed: u64) -> Row {
        Row {
            experiment: "e".into(),
            arm: "a".into(),
            seed,
            task: "loss".into(),
            length: 64,
            metric: NATS.into(),
            value: Some(1.25),
            ..Row::default()
        }
    }

    #[test]
    fn rows_survive_a_torn_line_and_are_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/rows.jsonl");
        Rows::open(&path).unwrap().append(row(1)).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let torn = [&whole[..], &whole[..whole.len() / 2]].concat();
        std::fs::write(&path, torn).unwrap();
        let mut rows = Rows::open(&path).unwrap();
        assert_eq!(rows.rows(), [row(1)]);
        assert!(rows.has("a", 1, "loss", 64));
        assert!(!rows.has("a", 2, "loss", 64) && !rows.has("a", 1, "loss", 65));
        rows.append(row(2)).unwrap();
        assert!(rows.has("a", 2, "loss", 64));
        assert_eq!(read(&path).unwrap(), [row(1), row(2)]);
        drop(rows);
        // A whole line without its end is kept, and the next one begins a line.
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        Rows::open(&path).unwrap().append(row(3)).unwrap();
        assert_eq!(read(&path).unwrap(), [row(1), row(3)]);
    }

    #[test]
    fn a_file_of_rows_has_one_writer() {
        let folder = tempfile::tempdir().unwrap();
        for open in [
            read(folder.path()),
            Rows::open(folder.path()).map(|_| Vec::new()),
        ] {
            assert!(open.unwrap_err().to_string().contains("regular file"));
        }
        let path = folder.path().join("rows.jsonl");
        let mut first = Rows::open(&path).unwrap();
        let second = Rows::open(&path).unwrap_err();
        assert!(matches!(second, ExperimentError::InUse { .. }), "{second}");
        first.append(row(1)).unwrap();
        assert_eq!(read(&path).unwrap(), [row(1)]);
        drop(first);
        Rows::open(&path).unwrap();
    }

    #[test]
    fn lines_of_other_kinds_are_passed_over_and_wrong_rows_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        let training = "{\"experiment\": \"e\", \"metric\": \"training\", \"step\": 1}\n";
        std::fs::write(&path, training).unwrap();
        assert_eq!(read(&path).unwrap(), []);
        std::fs::write(&path, format!("{training}{{\"task\": \"loss\"}}\n")).unwrap();
        let message = read(&path).unwrap_err().to_string();
        assert!(
            message.contains("line 2") && message.contains("missing field"),
            "{message}"
        );
    }
}
