//! Checkpoints: whole after a crash at any of their writes, checked to the bit, and a run goes on from them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::common::config as model_config;
use segattn::train::TrainError;
use segattn::train::checkpoint::{
    Checkpoint, Disk, Fingerprints, Storage, list, load, load_latest, save,
};
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
        position: Position {
            epoch: 2,
            index: 7,
            ..Position::default()
        },
        guard,
    };
    let train = [("data.train".to_owned(), "x".to_owned())];
    Checkpoint {
        config: Config::parse("", &train).unwrap(),
        model,
        tensors,
        progress,
        data: Fingerprints {
            train: "documents".into(),
            validation: "others".into(),
            base: None,
            teacher: None,
        },
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
    SyncFolder(PathBuf),
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
        self.calls.push(Call::SyncFolder(self.relative(path)));
        Disk.sync_folder(path)
    }
    fn remove(&mut self, path: &Path) -> io::Result<()> {
        self.calls.push(Call::Remove(self.relative(path)));
        Disk.remove(path)
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
                let synced = later.iter().any(|c| matches!(c, Call::SyncFolder(_)));
                if synced || loss != Loss::Names {
                    fs::rename(root.join(from), root.join(to)).unwrap();
                }
            }
            Call::Remove(path) => {
                // A removal whose rename was lost would remove nothing under this name.
                let _ = fs::remove_dir_all(root.join(path));
            }
            Call::SyncFile(_) | Call::SyncFolder(_) => {}
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

#[test]
fn the_names_of_new_folders_above_a_checkpoint_are_synced_before_it_is_written() {
    let recorded = tempfile::tempdir().unwrap();
    let mut recorder = Recorder {
        root: recorded.path().to_owned(),
        calls: Vec::new(),
    };
    let root = recorded.path().join("runs/a/checkpoints");
    save(&mut recorder, &root, &checkpoint(1), 2).unwrap();
    let first_write = recorder
        .calls
        .iter()
        .position(|c| matches!(c, Call::Append(..)));
    let before = &recorder.calls[..first_write.unwrap()];
    for above in ["", "runs", "runs/a"] {
        let synced = |c: &Call| matches!(c, Call::SyncFolder(p) if p == Path::new(above));
        assert!(before.iter().any(synced), "`{above}`: {before:?}");
    }
    recorder.calls.clear();
    save(&mut recorder, &root, &checkpoint(2), 2).unwrap();
    let of_root = |c: &Call| matches!(c, Call::SyncFolder(p) if p.ends_with("a"));
    assert!(!recorder.calls.iter().any(of_root), "nothing above is new");
}

#[test]
fn a_damaged_checkpoint_does_not_count_among_those_that_are_kept() {
    let root = tempfile::tempdir().unwrap();
    let steps = || -> Vec<u64> {
        let list = list(root.path()).unwrap();
        list.into_iter().map(|c| c.0).collect()
    };
    save(&mut Disk, root.path(), &checkpoint(1), 2).unwrap();
    let damaged = save(&mut Disk, root.path(), &checkpoint(9), 2).unwrap();
    flip(&damaged.join("model.safetensors"), 2000);
    // The run goes on from step 1: the damaged one is newer than all that come.
    save(&mut Disk, root.path(), &checkpoint(2), 2).unwrap();
    assert_eq!(steps(), [9, 2, 1]);
    let newest = save(&mut Disk, root.path(), &checkpoint(3), 2).unwrap();
    assert_eq!(steps(), [9, 3, 2]);
    fs::remove_file(newest.join("state.json")).unwrap();
    assert!(same(&load_latest(root.path()).unwrap().1, &checkpoint(2)));
    // Damaged ones older than all that are kept go.
    save(&mut Disk, root.path(), &checkpoint(10), 2).unwrap();
    save(&mut Disk, root.path(), &checkpoint(11), 2).unwrap();
    assert_eq!(steps(), [11, 10]);
}

#[test]
fn stray_files_and_folders_neither_block_saving_nor_count_as_checkpoints() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    for name in [
        "step-0000000003",
        ".writing-step-0000000004",
        "step-7",
        "notes.txt",
    ] {
        fs::write(at(name), "not a checkpoint").unwrap();
    }
    fs::create_dir(at(".writing-removed-step-0000000001")).unwrap();
    assert_eq!(list(root.path()).unwrap(), []);
    for step in [3, 4, 5, 6] {
        save(&mut Disk, root.path(), &checkpoint(step), 2).unwrap();
    }
    assert!(same(&load_latest(root.path()).unwrap().1, &checkpoint(6)));
    let mut names: Vec<_> = fs::read_dir(root.path())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(
        names,
        ["notes.txt", "step-0000000005", "step-0000000006", "step-7"]
    );
}

/// A disk with room for so many bytes.
struct Full(usize);

impl Storage for Full {
    fn create_folder(&mut self, path: &Path) -> io::Result<()> {
        Disk.create_folder(path)
    }
    fn append(&mut self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let fits = bytes.len().min(self.0);
        self.0 -= fits;
        Disk.append(path, &bytes[..fits])?;
        match fits == bytes.len() {
            true => Ok(()),
            false => Err(io::ErrorKind::StorageFull.into()),
        }
    }
    fn sync_file(&mut self, path: &Path) -> io::Result<()> {
        Disk.sync_file(path)
    }
    fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        Disk.rename(from, to)
    }
    fn sync_folder(&mut self, path: &Path) -> io::Result<()> {
        Disk.sync_folder(path)
    }
    fn remove(&mut self, path: &Path) -> io::Result<()> {
        Disk.remove(path)
    }
}

#[test]
fn a_full_disk_is_a_typed_error_that_leaves_the_checkpoints_before_and_nothing_else() {
    let root = tempfile::tempdir().unwrap();
    save(&mut Disk, root.path(), &checkpoint(1), 2).unwrap();
    save(&mut Disk, root.path(), &checkpoint(2), 2).unwrap();
    for room in [0, 100, 5_000, 20_000] {
        let error = save(&mut Full(room), root.path(), &checkpoint(3), 2).unwrap_err();
        assert!(
            matches!(
                error,
                TrainError::Io {
                    action: "write",
                    ..
                }
            ),
            "{error}"
        );
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2, "{room}");
    }
    assert!(same(&load_latest(root.path()).unwrap().1, &checkpoint(2)));
}

#[test]
fn further_files_cannot_leave_the_checkpoints_folder_or_stand_for_its_own() {
    let root = tempfile::tempdir().unwrap();
    let names = [
        "../out",
        "/tmp/out",
        "a/../../out",
        "",
        ".",
        "a/",
        "config.json",
        "MANIFEST.json",
    ];
    for name in names {
        let mut wrong = checkpoint(1);
        wrong.extra = vec![(name.into(), b"x".to_vec())];
        let error = save(&mut Disk, root.path(), &wrong, 2).unwrap_err();
        assert!(
            matches!(error, TrainError::Argument { .. }),
            "{name}: {error}"
        );
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0, "{name}");
    }
    // Folders below are inside.
    let mut nested = checkpoint(1);
    nested
        .extra
        .push(("templates/tool/a.jinja".into(), b"y".to_vec()));
    let folder = save(&mut Disk, root.path(), &nested, 2).unwrap();
    assert!(same(&load(&folder).unwrap(), &nested));

    // A checkpoint whose own lists lead out, with hashes that hold.
    fs::write(root.path().join("secret"), "{}").unwrap();
    let path = folder.join("manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("tokenizer.json", "../secret")).unwrap();
    let error = load(&folder).unwrap_err();
    assert!(matches!(error, TrainError::Checkpoint { .. }), "{error}");
    assert!(!error.to_string().contains("SHA"), "{error}");
}
