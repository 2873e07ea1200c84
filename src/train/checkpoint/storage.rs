//! The few file-system calls a checkpoint is written with, as a trait: a test records them and replays what
//! is left after a crash at each of them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::train::error::{Result, TrainError};

/// Where checkpoints are written.
pub trait Storage {
    /// Creates a folder and those above it, if they are not there.
    ///
    /// # Errors
    /// What the operating system says; so do all of these.
    fn create_folder(&mut self, path: &Path) -> io::Result<()>;
    /// Appends to a file, created if it is not there.
    ///
    /// # Errors
    /// As above.
    fn append(&mut self, path: &Path, bytes: &[u8]) -> io::Result<()>;
    /// Makes a file's content durable.
    ///
    /// # Errors
    /// As above.
    fn sync_file(&mut self, path: &Path) -> io::Result<()>;
    /// Renames a folder, at once or not at all.
    ///
    /// # Errors
    /// As above.
    fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()>;
    /// Makes the names in a folder durable.
    ///
    /// # Errors
    /// As above.
    fn sync_folder(&mut self, path: &Path) -> io::Result<()>;
    /// Removes a folder with all in it, or a file. Links are removed, not followed.
    ///
    /// # Errors
    /// As above.
    fn remove(&mut self, path: &Path) -> io::Result<()>;
}

/// The file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct Disk;

impl Storage for Disk {
    fn create_folder(&mut self, path: &Path) -> io::Result<()> {
        fs::create_dir_all(path)
    }

    fn append(&mut self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut file = OpenOptions::new().create(true).append(true).open(path)?;
        file.write_all(bytes)
    }

    fn sync_file(&mut self, path: &Path) -> io::Result<()> {
        OpenOptions::new().append(true).open(path)?.sync_all()
    }

    fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn sync_folder(&mut self, path: &Path) -> io::Result<()> {
        // Windows neither needs nor allows syncing a folder.
        if cfg!(unix) {
            File::open(path)?.sync_all()?;
        }
        Ok(())
    }

    fn remove(&mut self, path: &Path) -> io::Result<()> {
        if fs::symlink_metadata(path)?.is_dir() {
            return fs::remove_dir_all(path);
        }
        fs::remove_file(path)
    }
}

/// Creates a folder and those above it, and makes the names of the new ones durable: after a crash a synced file in a
/// folder that has lost its name is lost too.
///
/// # Errors
/// [`TrainError::Io`].
pub fn create_folder(storage: &mut dyn Storage, path: &Path) -> Result<()> {
    let above = |path: &'_ Path| match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new(".").to_owned(),
        Some(parent) => parent.to_owned(),
        None => path.to_owned(),
    };
    let mut new = path
        .ancestors()
        .take_while(|p| !p.as_os_str().is_empty() && !p.exists());
    let to_sync: Vec<PathBuf> = new.by_ref().map(above).collect();
    run("create", path, |p| storage.create_folder(p))?;
    for folder in &to_sync {
        run("sync", folder, |p| storage.sync_folder(p))?;
    }
    Ok(())
}

/// A storage call on `path`, its error typed.
pub(super) fn run(
    action: &'static str,
    path: &Path,
    call: impl FnOnce(&Path) -> io::Result<()>,
) -> Result<()> {
    call(path).map_err(|source| TrainError::Io {
        action,
        path: path.to_owned(),
        source,
    })
}
