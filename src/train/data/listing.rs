//! Which files are read as data, and in which format: one rule for training and evaluation.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::error::{data_error, io_error};
use super::marks::COMPANIONS;
use crate::train::error::Result;
use crate::train::folder::is_output;

/// Deepest folder that is looked into.
const MAX_DEPTH: usize = 64;
/// The file that marks a folder as a cache (Cache Directory Tagging Specification).
pub(super) const CACHE_TAG: &str = "CACHEDIR.TAG";
/// Names of files with a JSON object a line.
const LINES: [&str; 4] = ["jsonl", "ndjson", "jsonlines", "ldjson"];

/// What a file's name says about its content. Upper and lower case are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A JSON object a line: `.jsonl`, `.ndjson`, `.jsonlines`, `.ldjson`.
    Lines,
    /// Token ids in JSON: `.json`.
    Ids,
    /// Token ids in binary: `.bin`.
    Binary,
    /// A table with columns of texts, conversations or token ids: `.parquet`.
    Table,
    /// Text: every other name.
    Text,
}

impl Format {
    /// The format of the file `path`; of a compressed one ([`is_compressed`]) that of what is in it.
    pub fn of(path: &Path) -> Self {
        match extension(path).as_str() {
            name if LINES.contains(&name) => Self::Lines,
            "json" => Self::Ids,
            "bin" => Self::Binary,
            "parquet" => Self::Table,
            _ => Self::Text,
        }
    }
}

/// The files that `paths` name, and those at and below the folders that they name, folders in order of their names.
///
/// What is named itself is read whatever its name. Of a folder's files those with one of `extensions` are read, or
/// all without; links to files are followed. Passed over are hidden files and folders, the breaks and
/// rereads of `.bin` files (`NAME.bin.breaks`, `NAME.bin.rereads`), caches (folders with a file
/// `CACHEDIR.TAG`), what a run has written into its own folder, and links to folders, which could lead back up: these
/// with a warning.
///
/// # Errors
/// [`TrainError::Io`](crate::train::TrainError::Io) for what cannot be read, a dangling link among it;
/// [`TrainError::Data`](crate::train::TrainError::Data) for what is neither file nor folder, and if the folders have no
/// file to read; one of several without is a warning.
pub fn list_files(paths: &[PathBuf], extensions: Option<&[String]>) -> Result<Vec<PathBuf>> {
    let (mut list, mut nothing) = (Vec::new(), None);
    for path in paths {
        let kind = fs::metadata(path).map_err(|e| io_error("read", path, e))?;
        if kind.is_file() {
            list.push(path.clone());
        } else if kind.is_dir() {
            let mut folder = Folder {
                extensions,
                list: &mut list,
                passed_over: 0,
            };
            let before = folder.list.len();
            folder.collect(path, 0)?;
            if folder.list.len() == before {
                let error = folder.nothing(path);
                tracing::warn!("{error}");
                nothing.get_or_insert(error);
            }
        } else {
            return Err(data_error(path, None, "a file or folder", "something else"));
        }
    }
    match nothing {
        Some(error) if list.is_empty() => Err(error),
        _ => Ok(list),
    }
}

/// A folder that is searched.
struct Folder<'a> {
    extensions: Option<&'a [String]>,
    list: &'a mut Vec<PathBuf>,
    /// Files of other extensions.
    passed_over: usize,
}

impl Folder<'_> {
    fn collect(&mut self, path: &Path, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            let expected = format!("at most {MAX_DEPTH} folders in each other");
            return Err(data_error(path, None, &expected, "another one"));
        }
        let failed = |e| io_error("read", path, e);
        let entries = fs::read_dir(path).map_err(failed)?;
        let entries: io::Result<Vec<_>> = entries
            .map(|e| e.and_then(|e| Ok((e.path(), e.file_type()?))))
            .collect();
        let mut entries = entries.map_err(failed)?;
        entries.sort_by(|a, b| a.0.cmp(&b.0));
        for (entry, kind) in entries {
            let name = entry.file_name().unwrap_or_default();
            let marks = COMPANIONS
                .iter()
                .any(|(_, marks)| entry.extension() == Some(marks.as_ref()))
                && Format::of(Path::new(entry.file_stem().unwrap_or_default())) == Format::Binary;
            if name.as_encoded_bytes().starts_with(b".") || marks {
                continue;
            }
            if is_output(&entry) || entry.join(CACHE_TAG).is_file() {
                tracing::info!("{} is a run's own or a cache: no data", entry.display());
                continue;
            }
            self.entry(&entry, kind, depth)?;
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, kind: fs::FileType, depth: usize) -> Result<()> {
        if kind.is_dir() {
            return self.collect(path, depth + 1);
        }
        let wanted = self.wants(path);
        let mut is_file = kind.is_file();
        if kind.is_symlink() {
            match fs::metadata(path) {
                Ok(to) if to.is_dir() => {
                    let path = path.display();
                    tracing::warn!(
                        "{path} is a link to a folder: not read; name the folder itself to read it"
                    );
                }
                Ok(to) => is_file = to.is_file(),
                Err(error) if wanted => return Err(io_error("read", path, error)),
                Err(_) => {}
            }
        }
        match (is_file, wanted) {
            (true, true) => self.list.push(path.to_owned()),
            (true, false) => self.passed_over += 1,
            (false, _) => {}
        }
        Ok(())
    }

    fn wants(&self, path: &Path) -> bool {
        let Some(extensions) = self.extensions else {
            return true;
        };
        let own = extension(path);
        extensions.iter().any(|wanted| {
            let wanted = wanted.trim_start_matches('.').to_lowercase();
            wanted == own || [&wanted, &own].iter().all(|e| LINES.contains(&e.as_str()))
        })
    }

    fn nothing(&self, path: &Path) -> crate::train::TrainError {
        let expected = match self.extensions {
            None => "files in it".to_owned(),
            Some(list) => format!(
                "files with an extension of `data.extensions` ({})",
                list.join(", ")
            ),
        };
        let got = match self.passed_over {
            0 => "none".to_owned(),
            1 => "one with another extension".to_owned(),
            n => format!("{n} with other extensions"),
        };
        data_error(path, None, &expected, got)
    }
}

/// Whether the file's name says that it is compressed: `.zst`.
pub fn is_compressed(path: &Path) -> bool {
    path.extension()
        .is_some_and(|end| end.eq_ignore_ascii_case("zst"))
}

/// The end of the name, of a compressed file that of the name before `.zst`.
fn extension(path: &Path) -> String {
    let inner = path.file_stem().filter(|_| is_compressed(path));
    let extension = inner
        .map_or(path, Path::new)
        .extension()
        .unwrap_or_default();
    extension.to_string_lossy().to_lowercase()
}
