//! With feature `cuda`: compiles each `kernels/*.cu` for every architecture into `OUT_DIR/<name>.fatbin`,
//! and fails where a kernel does not stay within its registers. Without it: nothing.

use std::collections::VecDeque;
use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Real architectures of the fat binary; its PTX, for GPUs to come, is of `PTX_ARCH`.
const ARCHS: &[&str] = &["80", "86", "89", "90", "100", "120"];
const PTX_ARCH: &str = "80";
/// Files whose names end so use Hopper's own instructions: they are compiled for `HOPPER_ARCH` alone, where sm_90 is
/// among the architectures, and are empty where it is not.
const HOPPER_ENDING: &str = "_hopper";
const HOPPER_ARCH: &str = "90a";
/// How ptxas weighs registers against instructions (0 to 10, 5 by default). Kernels whose accumulators fill the
/// registers fit at one level or another, by architecture; none may use local memory.
const REGISTER_LEVELS: &[&str] = &["5", "0", "10"];

fn main() -> Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    for name in ["NVCC", "CUDA_HOME", "PATH", "SEGATTN_CUDA_ARCHS", "DOCS_RS"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    println!("cargo:rerun-if-changed=kernels");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let kernels = kernels()?;
    if env::var_os("DOCS_RS").is_some() {
        export("none", 0);
        // Documentation needs the files to be there, not what is in them.
        for kernel in &kernels {
            fs::write(out.join(format!("{kernel}.fatbin")), [])?;
        }
        return Ok(());
    }
    let nvcc = find_nvcc()?;
    let archs = architectures()?;
    export(
        &format!("sm_{}, PTX {PTX_ARCH}", archs.join(", sm_")),
        version(&nvcc)?,
    );
    compile_all(&nvcc, &kernels, &archs, &out)?;
    for kernel in &kernels {
        link(&nvcc, kernel, &archs, &out)?;
    }
    Ok(())
}

/// The files `kernels/*.cu` without their ending, the largest first: they take longest.
fn kernels() -> Result<Vec<String>> {
    let mut files = Vec::new();
    for entry in fs::read_dir("kernels")? {
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

/// For error messages and `doctor`: what the kernels were compiled for, and by which CUDA (13.0 is 13000).
fn export(archs: &str, version: u32) {
    println!("cargo:rustc-env=SEGATTN_KERNEL_ARCHS={archs}");
    println!("cargo:rustc-env=SEGATTN_NVCC_VERSION={version}");
}

/// nvcc says "... release 13.0, V13.0.88".
fn version(nvcc: &Path) -> Result<u32> {
    let output = Command::new(nvcc).arg("--version").output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let release = said.split("release ").nth(1).and_then(|rest| {
        let (major, minor) = rest.split(',').next()?.trim().split_once('.')?;
        Some(1000 * major.parse::<u32>().ok()? + 10 * minor.parse::<u32>().ok()?)
    });
    release.ok_or_else(|| format!("{} --version said {said:?}", nvcc.display()).into())
}

/// `NVCC`, `PATH`, `CUDA_HOME`, then the Python package of any interpreter in `PATH`.
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
            "feature `cuda` needs nvcc 13.0, which was not found through NVCC, PATH, CUDA_HOME or the Python \
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

/// All of [`ARCHS`], or those in `SEGATTN_CUDA_ARCHS` ("90" or "80,90").
fn architectures() -> Result<Vec<String>> {
    let Ok(wanted) = env::var("SEGATTN_CUDA_ARCHS") else {
        return Ok(ARCHS.iter().map(|arch| (*arch).to_owned()).collect());
    };
    let archs: Vec<String> = wanted
        .split([',', ' '])
        .filter(|arch| !arch.is_empty())
        .map(str::to_owned)
        .collect();
    match archs.iter().find(|arch| !ARCHS.contains(&arch.as_str())) {
        Some(arch) => {
            Err(format!("SEGATTN_CUDA_ARCHS: expected some of {ARCHS:?}, got {arch}").into())
        }
        None if archs.is_empty() => Err("SEGATTN_CUDA_ARCHS names no architecture".into()),
        None => Ok(archs),
    }
}

/// One compilation each of every kernel file and architecture (and PTX), as many at a time as there are cores.
fn compile_all(nvcc: &Path, kernels: &[String], archs: &[String], out: &Path) -> Result<()> {
    let jobs: VecDeque<(&str, Option<&str>)> = kernels
        .iter()
        .flat_map(|kernel| targets(kernel, archs).map(|target| (kernel.as_str(), target)))
        .collect();
    let jobs = Mutex::new(jobs);
    let errors = Mutex::new(Vec::new());
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let job = jobs.lock().map(|mut jobs| jobs.pop_front());
                    let Ok(Some((kernel, arch))) = job else {
                        return;
                    };
                    if let Err(error) = compile(nvcc, kernel, arch, out)
                        && let Ok(mut errors) = errors.lock()
                    {
                        errors.push(error.to_string());
                    }
                }
            });
        }
    });
    let errors = errors
        .into_inner()
        .map_err(|_| "a compiler thread panicked")?;
    match errors.is_empty() {
        true => Ok(()),
        false => Err(errors.join("\n").into()),
    }
}

/// What a file is compiled for: architectures, and PTX as `None`.
fn targets<'a>(kernel: &str, archs: &'a [String]) -> impl Iterator<Item = Option<&'a str>> {
    let hopper = kernel.ends_with(HOPPER_ENDING);
    let own = archs.iter().filter_map(move |arch| match hopper {
        true => (arch == "90").then_some(HOPPER_ARCH),
        false => Some(arch.as_str()),
    });
    own.map(Some).chain((!hopper).then_some(None))
}

fn object(kernel: &str, arch: Option<&str>, out: &Path) -> PathBuf {
    match arch {
        Some(arch) => out.join(format!("{kernel}.sm_{arch}.cubin")),
        None => out.join(format!("{kernel}.ptx")),
    }
}

/// The first of [`REGISTER_LEVELS`] at which no kernel of the file uses local memory, or waits for each of its
/// products.
fn compile(nvcc: &Path, kernel: &str, arch: Option<&str>, out: &Path) -> Result<()> {
    let mut entries = Vec::new();
    for level in REGISTER_LEVELS {
        let mut command = Command::new(nvcc);
        command.args(["-std=c++17", "-O3"]);
        match arch {
            Some(arch) => command.args([
                "-cubin",
                &format!("-gencode=arch=compute_{arch},code=sm_{arch}"),
                &format!("-Xptxas=-v,--register-usage-level={level}"),
            ]),
            None => command.args(["-ptx", &format!("-arch=compute_{PTX_ARCH}")]),
        };
        let output = command
            .arg("-o")
            .arg(object(kernel, arch, out))
            .arg(format!("kernels/{kernel}.cu"))
            .output()?;
        let log = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            let status = output.status;
            return Err(format!("{}: {kernel}.cu: {status}\n{log}", nvcc.display()).into());
        }
        entries = spilled(&log);
        entries.extend(
            log.lines()
                .filter(|line| is_lost_speed(line))
                .map(str::to_owned),
        );
        if entries.is_empty() {
            return Ok(());
        }
    }
    let entries = entries.join(", ");
    Err(
        format!("{kernel}.cu, architecture {arch:?}: local memory or lost speed in {entries}")
            .into(),
    )
}

/// Entry points that by the report of `ptxas -v` use local memory: a stack, which is where spilled registers go too.
fn spilled(log: &str) -> Vec<String> {
    let mut entry = "";
    let mut found = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            entry = rest.split('\'').next().unwrap_or(rest);
        } else if let Some((number, _)) = line.split_once(" bytes stack frame") {
            let bytes: u32 = number.trim().parse().unwrap_or(u32::MAX);
            if bytes > 0 {
                found.push(format!("{entry} ({bytes} bytes)"));
            }
        }
    }
    found
}

/// ptxas took the overlap out of a warpgroup's products, or left its registers as they are.
fn is_lost_speed(line: &str) -> bool {
    line.contains("are serialized") || (line.contains("setmaxnreg") && line.contains("ignored"))
}

fn link(nvcc: &Path, kernel: &str, archs: &[String], out: &Path) -> Result<()> {
    let mut command = Command::new(nvcc.with_file_name("fatbinary"));
    command.arg("-64").arg(format!(
        "--create={}",
        out.join(format!("{kernel}.fatbin")).display()
    ));
    let mut images = 0;
    for target in targets(kernel, archs) {
        let (kind, arch) = target.map_or(("ptx", PTX_ARCH), |arch| ("elf", arch));
        let file = object(kernel, target, out);
        command.arg(format!(
            "--image3=kind={kind},sm={arch},file={}",
            file.display()
        ));
        images += 1;
    }
    if images == 0 {
        return Ok(fs::write(out.join(format!("{kernel}.fatbin")), [])?);
    }
    let output = command.output()?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!(
            "fatbinary, {kernel}: {}",
            String::from_utf8_lossy(&output.stderr)
        )
        .into()),
    }
}
