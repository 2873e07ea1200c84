//! The manifest of a checkpoint: hashes of its files and tensors, taken while writing, checked while reading.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::names::{MANIFEST, damaged, is_inside};
use super::storage::{Storage, create_folder, run};
use super::tensors::{Named, Part};
use crate::train::error::{Result, TrainError};
use crate::train::hex::hex;

const VERSION: u32 = 2;
/// Largest manifest that is read, in bytes.
const MAX_BYTES: u64 = 1 << 28;

/// What belongs to a checkpoint.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    version: u32,
    files: BTreeMap<String, Entry>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    bytes: u64,
    sha256: String,
    /// SHA-256 of each tensor's bytes, for tensor files.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    tensors: BTreeMap<String, String>,
}

/// Writes a checkpoint's files and notes their hashes; [`Writer::finish`] writes the manifest last.
pub(super) struct Writer<'a> {
    storage: &'a mut dyn Storage,
    folder: &'a Path,
    manifest: Manifest,
}

impl<'a> Writer<'a> {
    pub(super) fn new(storage: &'a mut dyn Storage, folder: &'a Path) -> Self {
        Self {
            storage,
            folder,
            manifest: Manifest {
                version: VERSION,
                files: BTreeMap::new(),
            },
        }
    }

    /// A file; `name` may have folders before it.
    pub(super) fn file(&mut self, name: &str, content: &[u8]) -> Result<()> {
        let path = self.folder.join(name);
        let above = path.parent().filter(|above| *above != self.folder);
        if let Some(above) = above {
            create_folder(self.storage, above)?;
        }
        let mut entry = Entry::default();
        let mut hash = Sha256::new();
        self.append(name, content, &mut hash, &mut entry)?;
        self.close(name, hash, entry)?;
        match above {
            Some(above) => run("sync", above, |p| self.storage.sync_folder(p)),
            None => Ok(()),
        }
    }

    /// A safetensors file: length of the header, header, tensors in their order.
    pub(super) fn tensors(&mut self, name: &str, parts: &[Part<'_>]) -> Result<()> {
        let (mut header, mut end) = (serde_json::Map::new(), 0);
        header.insert("__metadata__".into(), serde_json::json!({"format": "pt"}));
        for (name, shape, values) in parts {
            let offsets = [end, end + size_of_val(&values[..])];
            end = offsets[1];
            let info = serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": offsets});
            header.insert(name.clone(), info);
        }
        let mut header = serde_json::Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let (mut hash, mut entry) = (Sha256::new(), Entry::default());
        let len = (header.len() as u64).to_le_bytes();
        self.append(name, &[&len, &header[..]].concat(), &mut hash, &mut entry)?;
        for (tensor, _, values) in parts {
            let bytes = little_endian(values);
            let digest = hex(&Sha256::digest(&bytes));
            entry.tensors.insert(tensor.clone(), digest);
            self.append(name, &bytes, &mut hash, &mut entry)?;
        }
        self.close(name, hash, entry)
    }

    pub(super) fn finish(mut self) -> Result<()> {
        let text = serde_json::to_vec_pretty(&self.manifest).expect("strings and numbers are JSON");
        self.file(MANIFEST, &text)
    }

    fn append(
        &mut self,
        name: &str,
        bytes: &[u8],
        hash: &mut Sha256,
        entry: &mut Entry,
    ) -> Result<()> {
        hash.update(bytes);
        entry.bytes += bytes.len() as u64;
        let path = self.folder.join(name);
        run("write", &path, |p| self.storage.append(p, bytes))
    }

    fn close(&mut self, name: &str, hash: Sha256, mut entry: Entry) -> Result<()> {
        entry.sha256 = hex(&hash.finalize());
        self.manifest.files.insert(name.to_owned(), entry);
        run("sync", &self.folder.join(name), |p| {
            self.storage.sync_file(p)
        })
    }
}

impl Manifest {
    pub(super) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(MANIFEST);
        let text = read_bytes(&path, MAX_BYTES)?;
        let wrong = |got: String| damaged(folder, MANIFEST, "a manifest", got);
        let manifest: Self = serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))?;
        if manifest.version != VERSION {
            let expected = format!("version {VERSION}");
            return Err(damaged(
                folder,
                MANIFEST,
                expected,
                manifest.version.to_string(),
            ));
        }
        Ok(manifest)
    }

    fn entry(&self, folder: &Path, name: &str) -> Result<&Entry> {
        let missing = || {
            damaged(
                folder,
                MANIFEST,
                format!("an entry for `{name}`"),
                "none".into(),
            )
        };
        self.files.get(name).ok_or_else(missing)
    }

    /// A file's content, after its hash has been checked.
    pub(super) fn read_file(&self, folder: &Path, name: &str) -> Result<Vec<u8>> {
        let content = self.read_sized(folder, name)?;
        self.check_file(folder, name, &content)?;
        Ok(content)
    }

    /// A tensor file's content, after every tensor's hash and the file's have been checked.
    pub(super) fn read_tensors(&self, folder: &Path, name: &str) -> Result<Named> {
        let content = self.read_sized(folder, name)?;
        let file = match SafeTensors::deserialize(&content) {
            Ok(file) => file,
            Err(e) => return Err(damaged(folder, name, "a safetensors file", e.to_string())),
        };
        let mut named = BTreeMap::new();
        for (tensor, expected) in &self.entry(folder, name)?.tensors {
            let what = format!("tensor `{tensor}`");
            let view = file
                .tensor(tensor)
                .map_err(|e| damaged(folder, &what, "the tensor", e.to_string()))?;
            let digest = hex(&Sha256::digest(view.data()));
            if digest != *expected {
                return Err(damaged(
                    folder,
                    &what,
                    format!("SHA-256 {expected}"),
                    digest,
                ));
            }
            if view.dtype() != Dtype::F32 {
                return Err(damaged(folder, &what, "F32", format!("{:?}", view.dtype())));
            }
            let values = view.data().as_chunks().0.iter();
            let values = values.map(|b| f32::from_le_bytes(*b)).collect();
            named.insert(tensor.clone(), (view.shape().to_vec(), values));
        }
        self.check_file(folder, name, &content)?;
        Ok(Named(named))
    }

    /// Checks that the files of these names are there, and every file's hash, a part of a file in memory at a time.
    pub(super) fn check(&self, folder: &Path, needed: &[&str]) -> Result<()> {
        for name in needed {
            self.entry(folder, name)?;
        }
        for name in self.files.keys() {
            let path = self.sized(folder, name)?;
            let mut file = File::open(&path).map_err(|e| read_error(&path, e))?;
            let mut hash = Sha256::new();
            let mut part = vec![0; 1 << 20];
            loop {
                match file.read(&mut part).map_err(|e| read_error(&path, e))? {
                    0 => break,
                    len => hash.update(&part[..len]),
                }
            }
            self.check_hash(folder, name, hash)?;
        }
        Ok(())
    }

    /// Reads a file only if it is as long as it should be.
    fn read_sized(&self, folder: &Path, name: &str) -> Result<Vec<u8>> {
        let path = self.sized(folder, name)?;
        read_bytes(&path, self.entry(folder, name)?.bytes)
    }

    /// A file's place, if it is inside the folder and as long as it should be.
    fn sized(&self, folder: &Path, name: &str) -> Result<PathBuf> {
        if !is_inside(name) {
            let expected = "names of files in the folder";
            return Err(damaged(folder, MANIFEST, expected, format!("{name:?}")));
        }
        let expected = self.entry(folder, name)?.bytes;
        let path = folder.join(name);
        let got = fs::metadata(&path).map_err(|e| read_error(&path, e))?.len();
        if got != expected {
            let what = format!("file `{name}`");
            return Err(damaged(
                folder,
                &what,
                format!("{expected} bytes"),
                got.to_string(),
            ));
        }
        Ok(path)
    }

    fn check_file(&self, folder: &Path, name: &str, content: &[u8]) -> Result<()> {
        self.check_hash(folder, name, Sha256::new_with_prefix(content))
    }

    fn check_hash(&self, folder: &Path, name: &str, hash: Sha256) -> Result<()> {
        let (expected, got) = (&self.entry(folder, name)?.sha256, hex(&hash.finalize()));
        if got != *expected {
            let what = format!("file `{name}`");
            return Err(damaged(folder, &what, format!("SHA-256 {expected}"), got));
        }
        Ok(())
    }
}

fn little_endian(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn read_bytes(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let failed = |e| read_error(path, e);
    let mut content = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(limit).read_to_end(&mut content).map_err(failed)?;
    Ok(content)
}

fn read_error(path: &Path, source: std::io::Error) -> TrainError {
    let path: PathBuf = path.to_owned();
    TrainError::Io {
        action: "read",
        path,
        source,
    }
}
