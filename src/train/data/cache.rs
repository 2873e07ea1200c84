//! A folder that keeps encoded texts, each under a hash of everything its tokens depend on, so that the next run on
//! the same texts begins at once. It may be deleted at any time, and several processes may use it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use tempfile::NamedTempFile;

use super::listing::CACHE_TAG;
use super::store::Stored;

/// End of the names of whole entries.
const ENTRY: &str = "tokens";
/// Start of the names of entries that are being written.
const WRITING: &str = "writing-";
/// Entries that are kept; the one that was used longest ago goes first.
const ENTRIES: usize = 16;
/// What stands in the file that marks the folder as a cache, for backups and for [`list_files`](super::list_files).
const TAG: &str = "Signature: 8a477f597d28d172789f06886806bc55\n\
                   # Encoded training texts of segattn, kept so that the next run on the same texts begins at once.\n\
                   # This folder may be deleted at any time.\n";

/// The folder.
#[derive(Debug)]
pub(super) struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// The folder, created if it is not there.
    pub(super) fn open(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let tag = folder.join(CACHE_TAG);
        if !tag.exists() {
            fs::write(&tag, TAG)?;
        }
        Ok(Self {
            folder: folder.to_owned(),
        })
    }

    /// The entry `key`, if it is there and whole.
    pub(super) fn find(&self, key: &str) -> Option<Stored> {
        let path = self.path(key);
        let file = File::open(&path).ok()?;
        // The time says that it was used; it matters to nothing but which entry goes first.
        let _ = file.set_modified(SystemTime::now());
        match Stored::open(file) {
            Ok(Some(stored)) => Some(stored),
            Ok(None) => {
                tracing::warn!("{} is damaged and made again", path.display());
                None
            }
            Err(error) => {
                tracing::warn!(
                    "{} cannot be read and is made again: {error}",
                    path.display()
                );
                None
            }
        }
    }

    /// A file that becomes an entry with [`Cache::keep`] and is deleted without.
    pub(super) fn begin(&self) -> io::Result<NamedTempFile> {
        self.tidy();
        let file = tempfile::Builder::new()
            .prefix(WRITING)
            .tempfile_in(&self.folder)?;
        // Held while this process writes, so that no other takes the file for what a killed one has left.
        let _ = file.as_file().try_lock();
        Ok(file)
    }

    /// Gives a finished file its name.
    pub(super) fn keep(&self, file: NamedTempFile, key: &str) -> io::Result<()> {
        file.as_file().flush()?;
        file.as_file().sync_data()?;
        file.persist(self.path(key)).map_err(|e| e.error)?;
        Ok(())
    }

    fn path(&self, key: &str) -> PathBuf {
        self.folder.join(format!("{key}.{ENTRY}"))
    }

    /// Removes what killed processes have left, and the entries that were used longest ago. What cannot be removed
    /// stays.
    fn tidy(&self) {
        let Ok(entries) = fs::read_dir(&self.folder) else {
            return;
        };
        let mut whole = Vec::new();
        for path in entries.filter_map(|e| Some(e.ok()?.path())) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(WRITING) {
                let abandoned = File::open(&path).is_ok_and(|file| file.try_lock().is_ok());
                if abandoned {
                    let _ = fs::remove_file(&path);
                }
            } else if path.extension().is_some_and(|e| e == ENTRY) {
                let used = fs::metadata(&path).and_then(|m| m.modified());
                whole.push((used.unwrap_or(SystemTime::UNIX_EPOCH), path));
            }
        }
        whole.sort();
        let surplus = (whole.len() + 1).saturating_sub(ENTRIES);
        for (_, path) in whole.drain(..surplus) {
            let _ = fs::remove_file(path);
        }
    }
}
