//! Compiles `kernels/*.cu` for every architecture, and fails where a kernel does not stay within its registers.

use std::collections::VecDeque;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use crate::{Compiler, Result};

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
const FLAGS: &[&str] = &["-std=c++17", "-O3"];
/// Drivers decompress what they need of an image when they load it.
const LINK_FLAGS: &[&str] = &["-64", "--compress-all", "--compress-mode=size"];

/// All that the bytes of an image depend on beside its sources.
pub(crate) fn options() -> String {
    format!(
        "{ARCHS:?} {PTX_ARCH} {HOPPER_ENDING} {HOPPER_ARCH} {REGISTER_LEVELS:?} {FLAGS:?} {LINK_FLAGS:?}"
    )
}

impl Compiler {
    /// Compiles files of the folder `kernels` into `out/NAME.fatbin` (an absolute path), for all architectures or those
    /// in `SEGATTN_CUDA_ARCHS`. Returns them, such as "sm_80, sm_90, PTX 80".
    ///
    /// # Errors
    /// What nvcc says; a kernel that uses local memory.
    pub fn compile(&self, kernels: &Path, names: &[String], out: &Path) -> Result<String> {
        let archs = architectures()?;
        compile_all(&self.nvcc, kernels, names, &archs, out)?;
        for kernel in names {
            link(&self.nvcc, kernel, &archs, out)?;
        }
        Ok(format!("sm_{}, PTX {PTX_ARCH}", archs.join(", sm_")))
    }
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
fn compile_all(
    nvcc: &Path,
    folder: &Path,
    kernels: &[String],
    archs: &[String],
    out: &Path,
) -> Result<()> {
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
                    if let Err(error) = compile(nvcc, folder, kernel, arch, out)
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
fn compile(nvcc: &Path, folder: &Path, kernel: &str, arch: Option<&str>, out: &Path) -> Result<()> {
    let mut entries = Vec::new();
    for level in REGISTER_LEVELS {
        let mut command = Command::new(nvcc);
        command.args(FLAGS);
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
            // The name that the image gets to know does not depend on where the folder lies.
            .arg(format!("{kernel}.cu"))
            .current_dir(folder)
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
    command.args(LINK_FLAGS);
    command.arg(format!(
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
