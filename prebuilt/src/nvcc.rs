//! Finding nvcc.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Result;

/// nvcc, and what it says of itself.
#[derive(Debug)]
pub struct Compiler {
    pub(crate) nvcc: PathBuf,
    /// Such as "13.0.88".
    pub version: String,
}

impl Compiler {
    /// Finds nvcc: in `NVCC`, `PATH`, `CUDA_HOME`, then the Python package of any interpreter in `PATH`.
    ///
    /// # Errors
    /// There is none, with how to get it; or it does not say its version.
    pub fn find() -> Result<Self> {
        // It runs in another folder.
        let nvcc = std::path::absolute(find_nvcc()?)?;
        // "... release 13.0, V13.0.88"
        let output = Command::new(&nvcc).arg("--version").output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        let version = said.split(", V").nth(1);
        let version = version.and_then(|rest| rest.split_whitespace().next());
        match version {
            Some(version) => Ok(Compiler {
                version: version.to_owned(),
                nvcc,
            }),
            None => Err(format!("{} --version said {said:?}", nvcc.display()).into()),
        }
    }
}

fn find_nvcc() -> Result<PathBuf> {
    if let Some(nvcc) = env::var_os("NVCC") {
        let nvcc = PathBuf::from(nvcc);
        return match nvcc.is_file() {
            true => Ok(nvcc),
            false => Err(format!("NVCC is {}, which is no file", nvcc.display()).into()),
        };
    }
    let in_path = env::var_os("PATH").map(|path| env::split_paths(&path).collect::<Vec<_>>());
    let mut folders = in_path.unwrap_or_default();
    if let Some(home) = env::var_os("CUDA_HOME") {
        folders.push(Path::new(&home).join("bin"));
    }
    folders.push("/usr/local/cuda/bin".into());
    folders.extend(python_packages());
    folders
        .iter()
        .map(|folder| folder.join("nvcc"))
        .find(|nvcc| nvcc.is_file())
        .ok_or_else(|| {
            "the kernels need nvcc 13.0, which was not found through NVCC, PATH, CUDA_HOME or the Python \
             package. Install the CUDA toolkit, or: pip install 'nvidia-cuda-nvcc==13.0.*' \
             'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-cccl==13.0.*'"
                .into()
        })
}

fn python_packages() -> Vec<PathBuf> {
    let script = "import sys, site; print('\\n'.join(sys.path + [site.getusersitepackages()]))";
    let Ok(output) = Command::new("python3").args(["-c", script]).output() else {
        return Vec::new();
    };
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter(|line| !line.is_empty())
        .map(|line| Path::new(line).join("nvidia/cu13/bin"))
        .collect()
}
