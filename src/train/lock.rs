//! One owner of a run's folder: a lock on a file in it, which the operating system releases when the process ends,
//! however it ends. The file itself stays; its content only says who held the lock last.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::checkpoint::{Disk, create_folder};
use super::error::{Result, TrainError};
use super::folder::LOCK_FILE;

/// Most bytes of the lock's file that are read.
const MAX_BYTES: u64 = 1 << 12;

/// The lock; dropping it releases it.
#[derive(Debug)]
pub struct RunLock {
    /// Held open: closing it releases the lock.
    _file: File,
}

/// Who holds a lock.
#[derive(Debug, Serialize, Deserialize)]
struct Holder {
    process: u32,
    host: Option<String>,
}

impl RunLock {
    /// Takes the lock of the run in `folder`, which is created if it is not there.
    ///
    /// # Errors
    /// [`TrainError::InUse`] while another process, or another lock of this one, holds it; [`TrainError::Io`] if
    /// the folder cannot be written.
    pub fn take(folder: &Path) -> Result<Self> {
        create_folder(&mut Disk, folder)?;
        let path = folder.join(LOCK_FILE);
        let failed = |source| TrainError::Io {
            action: "write",
            path: path.clone(),
            source,
        };
        // Not truncated: until the lock is held, the content is another's.
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(TrainError::InUse {
                    path: folder.to_owned(),
                    holder: Holder::read(&mut file),
                });
            }
            // Some network file systems have no locks. The run is worth more than the protection.
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {
                tracing::warn!(
                    "{} cannot be locked ({error}): take care that no other process trains into this folder",
                    folder.display()
                );
            }
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        // The content only serves the other's message: a full disk must not keep a run from going on.
        let _ = Holder::here().write(&mut file);
        Ok(Self { _file: file })
    }
}

impl Holder {
    fn here() -> Self {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname");
        Self {
            process: std::process::id(),
            host: host.ok().map(|name| name.trim().to_owned()),
        }
    }

    fn write(&self, file: &mut File) -> io::Result<()> {
        file.set_len(0)?;
        file.seek(SeekFrom::Start(0))?;
        serde_json::to_writer(&mut *file, self)?;
        file.write_all(b"\n")
    }

    /// The holder in words, for a message.
    fn read(file: &mut File) -> String {
        let mut text = Vec::new();
        // The holder may not have written yet.
        let _ = file.take(MAX_BYTES).read_to_end(&mut text);
        match serde_json::from_slice(&text) {
            Ok(Self {
                process,
                host: Some(host),
            }) => format!("process {process} on {}", host.escape_debug()),
            Ok(Self { process, .. }) => format!("process {process}"),
            Err(_) => "another process".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{LOCK_FILE, RunLock};
    use crate::train::TrainError;

    #[test]
    fn a_folder_has_one_owner_until_its_lock_is_dropped() {
        let above = tempfile::tempdir().unwrap();
        let folder = above.path().join("runs/a");
        let lock = RunLock::take(&folder).unwrap();
        let refused = RunLock::take(&folder).unwrap_err();
        let TrainError::InUse { holder, .. } = refused else {
            panic!("{refused}");
        };
        assert!(
            holder.contains(&format!("process {}", std::process::id())),
            "{holder}"
        );
        drop(lock);
        RunLock::take(&folder).unwrap();
    }

    #[test]
    fn what_stands_in_a_lock_file_is_no_part_of_the_lock() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(LOCK_FILE);
        std::fs::write(&path, "{\"process\": 1, \"host\": \"\\u001b[31m\"}").unwrap();
        let lock = RunLock::take(folder.path()).unwrap();
        std::fs::write(&path, "{\"process\": 1, \"host\": \"\\u001b[31m\"}").unwrap();
        let message = RunLock::take(folder.path()).unwrap_err().to_string();
        assert!(
            !message.contains('\u{1b}') && message.contains("process 1"),
            "{message}"
        );
        drop(lock);
    }
}
