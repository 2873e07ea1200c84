//! Checkpoints: whole after a crash at any of their writes, checked to the bit, and a run goes on from them.

#[allow(dead_code, reason = "each test uses a part")]
mod common;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use common::config as model_config;
use segattn::train::TrainError;
use segattn::train::checkpoint::{Checkpoint, Disk, Storage, list, load, load_latest, save};
use segattn::train::config::Config;
use segattn::train::data::Position;
use segattn::train::guard::{Guard, GuardConfig};
use segattn::train::progress::{Progress, Tensors};

fn checkpoint(step: u64) -> Checkpoint {
    let model = model_config(step.is_multiple_of(2));
    let mut tensors = Tensors::initial(&model, step);
    tensors.m[2][3] = f32::from_bits(1);
    tensors.v[0][1] = -0.0;
    let mut guard = Guard::new(GuardConfig::default()).unwrap();
    guard.decide(0, 0.1 + 0.2, f64::MIN_POSITIVE);
    guard.decide(1, f64::NAN, 1.0);
    let progress = Progress {
        step,
        updates: step.saturating_sub(1),
        tokens: 1 << 40,
        position: Position { epoch: 2, index: 7 },
        guard,
    };
    let train = [("data.train".to_owned(), "x".to_owned())];
    Checkpoint {
        config: Config::parse("", &train).unwrap(),
        model,
        tensors,
        progress,
        data: "fingerprint".into(),
        extra: vec![("tokenizer.json".into(), b"{}".to_vec())],
    }
}

fn same(a: &Checkpoint, b: &Checkpoint) -> bool {
    let bits = |t: &Tensors| -> Vec<u32> {
        let all = [&t.values, &t.m, &t.v];
        all.into_iter()
            .flatten()
            .flatten()
            .map(|x| x.to_bits())
            .collect()
    };
    // The loaded model keeps its source text beside the same fields.
    let fields = |c: &Checkpoint| c.model.to_json();
    bits(&a.tensors) == bits(&b.tensors)
        && (&a.progress, &a.config, &a.data, &a.extra)
            == (&b.progress, &b.config, &b.data, &b.extra)
        && fields(a) == fields(b)
}

#[test]
fn what_is_saved_loads_to_the_bit_and_only_the_newest_are_kept() {
    let root = tempfile::tempdir().unwrap();
    assert!(matches!(
        load_latest(root.path()),
        Err(TrainError::Checkpoint { .. })
    ));
    for step in [3, 10, 9_999_999_999, 12] {
        let folder = save(&mut Disk, root.path(), &checkpoint(step), 2).unwrap();
        if step < 100 {
            assert!(!folder.exists() || same(&load(&folder).unwrap(), &checkpoint(step)));
        }
    }
    let steps: Vec<u64> = list(root.path())
        .unwrap()
        .into_iter()
        .map(|c| c.0)
        .collect();
    assert_eq!(steps, [9_999_999_999, 12]);
    assert_eq!(
        fs::read_dir(root.path()).unwrap().count(),
        2,
        "nothing else is left"
    );
    save(&mut Disk, root.path(), &checkpoint(12), 2).unwrap();
    assert!(same(
        &load(&list(root.path()).unwrap()[1].1).unwrap(),
        &checkpoint(12)
    ));
}

/// Every call, also carried out.
struct Recorder {
    root: PathBuf,
    calls: Vec<Call>,
}

#[derive(Clone, Debug)]
enum Call {
    Create(PathBuf),
    Append(PathBuf, Vec<u8>),
    SyncFile(PathBuf),
    Rename(PathBuf, PathBuf),
    SyncFolder,
    Remove(PathBuf),
}

impl Recorder {
    fn relative(&self, path: &Path) -> PathBuf {
        path.strip_prefix(&self.root).unwrap().to_owned()
    }
}

impl Storage for Recorder {
    fn create_folder(&mut self, path: &Path) -> io::Result<()> {
        self.calls.push(Call::Create(self.relative(path)));
        Disk.create_folder(path)
    }
    fn append(&mut self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.calls
            .push(Call::Append(self.relative(path), bytes.to_vec()));
        Disk.append(path, bytes)
    }
    fn sync_file(&mut self, path: &Path) -> io::Result<()> {
        self.calls.push(Call::SyncFile(self.relative(path)));
        Disk.sync_file(path)
    }
    fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let call = Call::Rename(self.relative(from), self.relative(to));
        self.calls.push(call);
        Disk.rename(from, to)
    }
    fn sync_folder(&mut self, path: &Path) -> io::Result<()> {
        self.calls.push(Call::SyncFolder);
        Disk.sync_folder(path)
    }
    fn remove_folder(&mut self, path: &Path) -> io::Result<()> {
        self.calls.push(Call::Remove(self.relative(path)));
        Disk.remove_folder(path)
    }
}

/// What a crash may do to calls that were not synced yet.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Loss {
    Nothing,
    /// Content that was not synced is lost, the last write is torn.
    Content,
    /// So are renames whose folder was not synced.
    Names,
}

/// What is on disk after a crash behind `calls`.
fn crash(calls: &[Call], loss: Loss, root: &Path) {
    for (i, call) in calls.iter().enumerate() {
        let later = &calls[i + 1..];
        match call {
            Call::Create(path) => fs::create_dir_all(root.join(path)).unwrap(),
            Call::Append(path, bytes) => {
                let synced = later
                    .iter()
                    .any(|c| matches!(c, Call::SyncFile(p) if p == path));
                let kept = if synced || loss == Loss::Nothing {
                    bytes.len()
                } else {
                    bytes.len() / 2
                };
                Disk.append(&root.join(path), &bytes[..kept]).unwrap();
            }
            Call::Rename(from, to) => {
                let synced = later.iter().any(|c| matches!(c, Call::SyncFolder));
                if synced || loss != Loss::Names {
                    fs::rename(root.join(from), root.join(to)).unwrap();
                }
            }
            Call::Remove(path) => {
                // A removal whose rename was lost would remove nothing under this name.
                let _ = fs::remove_dir_all(root.join(path));
            }
            Call::SyncFile(_) | Call::SyncFolder => {}
        }
    }
}

#[test]
fn after_a_crash_at_any_call_the_newest_whole_checkpoint_loads() {
    let recorded = tempfile::tempdir().unwrap();
    let mut recorder = Recorder {
        root: recorded.path().to_owned(),
        calls: Vec::new(),
    };
    let (steps, mut done) = ([1, 2, 3, 4], Vec::new());
    for step in steps {
        save(&mut recorder, recorded.path(), &checkpoint(step), 2).unwrap();
        done.push(recorder.calls.len());
    }
    let saved: Vec<Checkpoint> = steps.map(checkpoint).to_vec();
    let mut seen = [0; 5];
    for end in 0..=recorder.calls.len() {
        for loss in [Loss::Nothing, Loss::Content, Loss::Names] {
            let root = tempfile::tempdir().unwrap();
            crash(&recorder.calls[..end], loss, root.path());
            let complete = done.iter().filter(|n| **n <= end).count();
            match load_latest(root.path()) {
                Ok((_, found)) => {
                    let step = found.progress.step as usize;
                    assert!(
                        step >= complete && step <= complete + 1,
                        "{step} at {end} {loss:?}"
                    );
                    assert!(
                        same(&found, &saved[step - 1]),
                        "step {step} at {end} {loss:?}"
                    );
                    seen[step] += 1;
                }
                Err(error) => assert_eq!(complete, 0, "{error} at {end} {loss:?}"),
            }
            // A crash leaves nothing that hinders the next save.
            if end % 7 == 0 {
                save(&mut Disk, root.path(), &checkpoint(9), 2).unwrap();
                assert!(same(&load_latest(root.path()).unwrap().1, &checkpoint(9)));
            }
        }
    }
    assert!(seen[1..].iter().all(|n| *n > 0), "{seen:?}");
}

fn flip(path: &Path, byte: usize) {
    let mut content = fs::read(path).unwrap();
    content[byte] ^= 1 << (byte % 8);
    fs::write(path, content).unwrap();
}

#[test]
fn a_flipped_bit_in_a_tensor_is_an_error_that_names_it_and_the_checkpoint_before_is_used() {
    let root = tempfile::tempdir().unwrap();
    save(&mut Disk, root.path(), &checkpoint(1), 2).unwrap();
    let newest = save(&mut Disk, root.path(), &checkpoint(2), 2).unwrap();
    for (file, name) in [
        ("model.safetensors", "tensor `model.norm.weight`"),
        ("optimizer.safetensors", "tensor `v.model.norm.weight`"),
    ] {
        let path = newest.join(file);
        // Written in the model's order: the last norm is the last tensor of a tied model.
        let last = fs::metadata(&path).unwrap().len() as usize - 1;
        flip(&path, last);
        let TrainError::Checkpoint { what, expected, .. } = load(&newest).unwrap_err() else {
            panic!("another error")
        };
        assert_eq!(what, name);
        assert!(expected.contains("SHA-256"), "{expected}");
        assert!(same(&load_latest(root.path()).unwrap().1, &checkpoint(1)));
        flip(&path, last);
    }
    assert!(same(&load(&newest).unwrap(), &checkpoint(2)));
}

#[test]
fn a_flipped_bit_or_a_missing_byte_anywhere_never_loads_other_content() {
    let root = tempfile::tempdir().unwrap();
    let folder = save(&mut Disk, root.path(), &checkpoint(2), 2).unwrap();
    let whole = load(&folder).unwrap();
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let len = fs::metadata(&path).unwrap().len() as usize;
        for byte in (0..len).step_by(len / 40 + 1) {
            flip(&path, byte);
            if let Ok(found) = load(&folder) {
                assert!(same(&found, &whole), "{} byte {byte}", path.display());
                assert!(path.ends_with("manifest.json"));
            }
            flip(&path, byte);
        }
        let content = fs::read(&path).unwrap();
        fs::write(&path, &content[..len - 1]).unwrap();
        assert!(load(&folder).is_err(), "{}", path.display());
        fs::remove_file(&path).unwrap();
        assert!(load(&folder).is_err(), "{}", path.display());
        fs::write(&path, content).unwrap();
    }
    let error = {
        flip(&folder.join("state.json"), 20);
        load_latest(root.path()).unwrap_err()
    };
    assert!(
        matches!(error, TrainError::NoValidCheckpoint { .. }),
        "{error}"
    );
}
