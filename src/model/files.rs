//! Reading and writing the small files of a model folder: bounded reads, writes beside and renamed.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use super::error::FileError;

pub(crate) fn io_error(path: &Path, source: io::Error) -> FileError {
    FileError::Io {
        path: path.to_owned(),
        source,
    }
}

/// Whether nothing of that name is there. A link that leads nowhere is something, and so is what cannot be looked at:
/// reading it says why.
pub(crate) fn is_absent(path: &Path) -> bool {
    let found = fs::symlink_metadata(path);
    found.is_err_and(|error| {
        let kind = error.kind();
        kind == io::ErrorKind::NotFound || kind == io::ErrorKind::NotADirectory
    })
}

/// Opens a regular file, following links. A pipe, on which opening would wait forever, is refused first.
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64), FileError> {
    let not_a_file = || FileError::NotAFile {
        path: path.to_owned(),
    };
    let found = fs::metadata(path).map_err(|error| io_error(path, error))?;
    if !found.is_file() {
        return Err(not_a_file());
    }
    let file = File::open(path).map_err(|error| io_error(path, error))?;
    let opened = file.metadata().map_err(|error| io_error(path, error))?;
    if !opened.is_file() {
        return Err(not_a_file());
    }
    Ok((file, opened.len()))
}

/// The bytes of a file of at most `limit` bytes.
pub(super) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, FileError> {
    let (file, len) = open_regular(path)?;
    let too_large = |got| FileError::TooLarge {
        path: path.to_owned(),
        limit,
        got,
    };
    if len > limit {
        return Err(too_large(len));
    }
    let mut bytes = Vec::new();
    // The file may have grown since its length was read.
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| io_error(path, error))?;
    if bytes.len() as u64 > limit {
        return Err(too_large(bytes.len() as u64));
    }
    Ok(bytes)
}

/// The value of a JSON file of at most `limit` bytes. A byte order mark before it is passed over.
pub(super) fn read_json(path: &Path, limit: u64) -> Result<serde_json::Value, FileError> {
    let bytes = read_bounded(path, limit)?;
    parse_json(&bytes, path)
}

/// The object of a JSON file of at most `limit` bytes, an empty one where there is no file.
#[cfg(feature = "tokenizer")]
pub(super) fn read_object(
    path: &Path,
    limit: u64,
) -> Result<serde_json::Map<String, serde_json::Value>, FileError> {
    if is_absent(path) {
        return Ok(serde_json::Map::new());
    }
    match read_json(path, limit)? {
        serde_json::Value::Object(object) => Ok(object),
        _ => Err(FileError::Json {
            path: path.to_owned(),
            message: "expected an object".into(),
        }),
    }
}

/// The value of JSON text; `path` is for messages.
pub(super) fn parse_json<'a, T: serde::Deserialize<'a>>(
    bytes: &'a [u8],
    path: &Path,
) -> Result<T, FileError> {
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    serde_json::from_slice(text).map_err(|error| json_error(path, text, &error))
}

fn json_error(path: &Path, text: &[u8], error: &serde_json::Error) -> FileError {
    let message = match number_that_is_none(text, error) {
        Some(number) => format!("expected JSON, which has no {number}: {error}"),
        None if is_lfs_pointer(text) => LFS_POINTER.to_owned(),
        None => error.to_string(),
    };
    FileError::Json {
        path: path.to_owned(),
        message,
    }
}

/// `NaN` or `Infinity`, which Python's json module writes, where the parser stopped.
fn number_that_is_none(text: &[u8], error: &serde_json::Error) -> Option<&'static str> {
    let line = text
        .split(|b| *b == b'\n')
        .nth(error.line().checked_sub(1)?)?;
    // The parser names the character it stopped at, or the one before or after.
    let around = &line[error.column().saturating_sub(3).min(line.len())..];
    let begin = |name: &&str| {
        (0..4).any(|i| {
            around
                .get(i..)
                .is_some_and(|a| a.starts_with(name.as_bytes()))
        })
    };
    ["NaN", "Infinity"].into_iter().find(begin)
}

/// What is said of a pointer.
pub(super) const LFS_POINTER: &str = "a Git LFS pointer, not the file itself; \
     fetch it with `git lfs pull`, or download the model again";

/// Whether these bytes begin a file that Git LFS keeps in the place of a large one.
pub(super) fn is_lfs_pointer(bytes: &[u8]) -> bool {
    bytes.starts_with(b"version https://git-lfs.github.com/spec/")
}

/// A file that results are written to: beside its place, synced and renamed, so that the name never stands for half of
/// them, with the mode of the file that was there. A device or a pipe is written to and stays what it is; of a link the
/// file it leads to is written.
#[derive(Debug)]
pub struct OutputFile {
    path: PathBuf,
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// Of a regular file, or of none yet.
    File(PathBuf),
    /// A device or a pipe.
    Through,
}

impl OutputFile {
    /// Looks whether a file can be written there, and leaves everything as it is.
    ///
    /// # Errors
    /// [`FileError::Io`] where it cannot, [`FileError::NotAFile`] for a folder.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let failed = |error| io_error(path, error);
        let place = match fs::metadata(path) {
            Ok(found) if found.is_dir() => {
                return Err(FileError::NotAFile {
                    path: path.to_owned(),
                });
            }
            // The files of processes must not be replaced, whatever they are.
            Ok(found) if !found.is_file() || is_of_process(path) => Place::Through,
            Ok(found) => {
                let target = fs::canonicalize(path).map_err(failed)?;
                if found.permissions().readonly() {
                    return Err(failed(io::ErrorKind::PermissionDenied.into()));
                }
                File::options().write(true).open(&target).map_err(failed)?;
                Place::File(target)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // A link that leads nowhere would be replaced.
                if fs::symlink_metadata(path).is_ok() || path.file_name().is_none() {
                    return Err(failed(error));
                }
                Place::File(path.to_owned())
            }
            Err(error) => return Err(failed(error)),
        };
        if let Place::File(target) = &place {
            drop(new_beside(folder_of(target))?);
        }
        let path = path.to_owned();
        Ok(Self { path, place })
    }

    /// The name it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes these bytes.
    ///
    /// # Errors
    /// [`FileError::Io`]; a file that was there is then as before.
    pub fn write_all(&self, bytes: &[u8]) -> Result<(), FileError> {
        self.write(|out| {
            out.write_all(bytes)
                .map_err(|error| io_error(&self.path, error))
        })
    }

    /// Writes all that `write` writes.
    ///
    /// # Errors
    /// [`FileError::Io`], and what `write` returns; a file that was there is then as before.
    pub fn write<E: From<FileError>>(
        &self,
        write: impl FnOnce(&mut dyn Write) -> Result<(), E>,
    ) -> Result<(), E> {
        let failed = |error| E::from(io_error(&self.path, error));
        let Place::File(target) = &self.place else {
            // What else has gone there stays.
            let file = File::options().append(true).open(&self.path);
            let mut out = BufWriter::new(file.map_err(failed)?);
            write(&mut out)?;
            return out.flush().map_err(failed);
        };
        let folder = folder_of(target);
        let beside = new_beside(folder)?;
        if let Ok(found) = fs::metadata(target) {
            let kept = beside.as_file().set_permissions(found.permissions());
            kept.map_err(failed)?;
        }
        let mut out = BufWriter::new(beside);
        write(&mut out)?;
        let beside = out.into_inner().map_err(|e| failed(e.into_error()))?;
        persist(beside, target)?;
        Ok(sync_folder(folder)?)
    }
}

/// The folder that a file of this name lies in.
fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// `/dev/stdout` and the like, which lead to whatever a process has open.
fn is_of_process(path: &Path) -> bool {
    let roots = ["/dev", "/proc"];
    cfg!(unix) && !path.starts_with("/dev/shm") && roots.iter().any(|root| path.starts_with(root))
}

/// Writes a whole file: beside its place first, synced, then renamed, so that the name never stands
/// for half a file.
pub(crate) fn write_renamed(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let folder = folder_of(path);
    let failed = |error| io_error(path, error);
    let mut beside = new_beside(folder)?;
    beside.write_all(bytes).map_err(failed)?;
    persist(beside, path)?;
    sync_folder(folder)
}

/// A new file in `folder` that is deleted again unless [`persist`] names it.
pub(super) fn new_beside(folder: &Path) -> Result<tempfile::NamedTempFile, FileError> {
    let mut options = tempfile::Builder::new();
    options.prefix(".writing-");
    // As any new file, by the process's umask; the default of a temporary file is its owner alone.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        options.permissions(fs::Permissions::from_mode(0o666));
    }
    options
        .tempfile_in(folder)
        .map_err(|error| io_error(folder, error))
}

/// Syncs the file and gives it its name.
pub(super) fn persist(file: tempfile::NamedTempFile, path: &Path) -> Result<(), FileError> {
    file.as_file()
        .sync_all()
        .map_err(|error| io_error(path, error))?;
    file.persist(path)
        .map_err(|error| io_error(path, error.error))?;
    Ok(())
}

/// Makes the names in a folder durable.
pub(super) fn sync_folder(folder: &Path) -> Result<(), FileError> {
    // Windows neither needs nor allows syncing a folder.
    #[cfg(unix)]
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(|error| io_error(folder, error))?;
    #[cfg(not(unix))]
    let _ = folder;
    Ok(())
}
