//! The CUDA kernels of segattn, compiled: `images/NAME.fatbin` for each `kernels/NAME.cu`, and what they were made of.
//!
//! The build of segattn takes these images where the hash of its `kernels/` fits, and needs no nvcc then ([`provide`]).
//! Where sources have changed since, it compiles them ([`Compiler`]).
#![deny(missing_docs)]

mod compile;
mod nvcc;

use std::collections::BTreeMap;
use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

pub use nvcc::Compiler;

/// What these functions return: errors are texts that say what to do.
pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// What an image was made from, and by what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The version of nvcc, such as "13.0.88".
    pub nvcc: String,
    /// The hash of its sources, see [`sources`].
    pub sources: String,
}

/// A set of images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// Such as "sm_80, sm_90, PTX 80".
    pub architectures: String,
    /// By name.
    pub images: BTreeMap<String, Image>,
}

/// The folder of the images.
pub fn images() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("images")
}

/// The file in a folder of images that says what they are.
const MADE: &str = "made.txt";

impl Made {
    /// Reads what the images of a folder are.
    ///
    /// # Errors
    /// The file is missing or damaged.
    pub fn read(folder: &Path) -> Result<Made> {
        let path = folder.join(MADE);
        let text = fs::read_to_string(&path);
        let text = text.map_err(|error| format!("{}: {error}", path.display()))?;
        let wrong =
            |line: &str| format!("{}: expected NAME NVCC HASH, got {line:?}", path.display());
        let mut lines = text.lines();
        let architectures = lines.next().unwrap_or_default().to_owned();
        let mut images = BTreeMap::new();
        for line in lines {
            let [name, nvcc, sources] = line.split(' ').collect::<Vec<_>>()[..] else {
                return Err(wrong(line).into());
            };
            let (nvcc, sources) = (nvcc.to_owned(), sources.to_owned());
            images.insert(name.to_owned(), Image { nvcc, sources });
        }
        Ok(Made {
            architectures,
            images,
        })
    }

    /// Writes it beside the images.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let mut text = format!("{}\n", self.architectures);
        for (name, Image { nvcc, sources }) in &self.images {
            text += &format!("{name} {nvcc} {sources}\n");
        }
        Ok(fs::write(folder.join(MADE), text)?)
    }

    /// The image of a kernel file, if it is of the present sources.
    ///
    /// # Errors
    /// A source cannot be read.
    pub fn fitting(&self, kernels: &Path, name: &str) -> Result<Option<&Image>> {
        let sources = sources(kernels, name)?;
        Ok(self
            .images
            .get(name)
            .filter(|image| image.sources == sources))
    }
}

/// A version of nvcc as the driver counts CUDA's: 13000 is 13.0.
fn toolkit(nvcc: &str) -> Result<u32> {
    let mut parts = nvcc.split('.').map(str::parse::<u32>);
    match (parts.next(), parts.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok(1000 * major + 10 * minor),
        _ => Err(format!("expected a version of nvcc, got {nvcc:?}").into()),
    }
}

/// The files `NAME.cu` of a folder without their ending, the largest first: they take longest.
///
/// # Errors
/// The folder cannot be read.
pub fn names(kernels: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(kernels)? {
        let entry = entry?;
        let path = entry.path();
        if path.extension().is_some_and(|ending| ending == "cu")
            && let Some(name) = path.file_stem().and_then(|name| name.to_str())
        {
            files.push((entry.metadata()?.len(), name.to_owned()));
        }
    }
    files.sort_by(|a, b| b.cmp(a));
    Ok(files.into_iter().map(|(_, name)| name).collect())
}

/// The hash of all that the image of a kernel file is made from: the file, the headers of its folder that it includes,
/// and how it is compiled. Carriage returns do not count.
///
/// # Errors
/// A file cannot be read.
pub fn sources(kernels: &Path, name: &str) -> Result<String> {
    let mut files = BTreeMap::new();
    let mut open = vec![format!("{name}.cu")];
    while let Some(file) = open.pop() {
        let path = kernels.join(&file);
        // What is not in the folder is the toolkit's, or the simulator's.
        if files.contains_key(&file) || !path.is_file() {
            continue;
        }
        let text =
            fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let included = text
            .lines()
            .filter_map(|line| line.trim_start().strip_prefix("#include \""));
        open.extend(included.filter_map(|rest| Some(rest.split_once('"')?.0.to_owned())));
        files.insert(file, text);
    }
    let mut hash = Sha256::new();
    let mut add = |text: &str| {
        let text = text.replace('\r', "");
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    };
    add(&compile::options());
    for (file, text) in &files {
        add(file);
        add(text);
    }
    Ok(hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

/// What a build got.
#[derive(Debug)]
pub struct Provided {
    /// The architectures that every image has, such as "sm_80, sm_90, PTX 80".
    pub architectures: String,
    /// The newest CUDA version that made an image, as the driver counts: 13000 is 13.0.
    pub toolkit: u32,
    /// The files that nvcc has compiled now, as there were no fitting images.
    pub compiled: Vec<String>,
}

/// Puts the images of the folder `kernels` into `out`: the ones of this crate where their sources are the same, else
/// what nvcc makes. `SEGATTN_KERNELS=compile` takes nvcc for all.
///
/// # Errors
/// There is no nvcc where it is needed, or what it says.
pub fn provide(kernels: &Path, out: &Path) -> Result<Provided> {
    let is_forced = match env::var("SEGATTN_KERNELS").as_deref() {
        Err(_) | Ok("") => false,
        Ok("compile") => true,
        Ok(other) => {
            return Err(
                format!("SEGATTN_KERNELS: expected \"compile\" or nothing, got {other:?}").into(),
            );
        }
    };
    let made = Made::read(&images())?;
    let mut provided = Provided {
        architectures: made.architectures.clone(),
        toolkit: 0,
        compiled: Vec::new(),
    };
    for name in names(kernels)? {
        match made.fitting(kernels, &name)?.filter(|_| !is_forced) {
            Some(image) => {
                let file = format!("{name}.fatbin");
                fs::write(out.join(&file), fs::read(images().join(&file))?)?;
                provided.toolkit = provided.toolkit.max(toolkit(&image.nvcc)?);
            }
            None => provided.compiled.push(name),
        }
    }
    if !provided.compiled.is_empty() {
        let compiler = Compiler::find().map_err(|error| {
            let files = provided.compiled.join(", ");
            format!("there are no compiled kernels of the present sources of {files}: {error}")
        })?;
        provided.architectures = compiler.compile(kernels, &provided.compiled, out)?;
        provided.toolkit = provided.toolkit.max(toolkit(&compiler.version)?);
    }
    Ok(provided)
}
