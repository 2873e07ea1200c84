//! `segattn doctor`: what this machine offers, what is missing, and what to do about it.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::out::{out, out_part};
use anyhow::Result;
use segattn::device::HostMemory;
use segattn::isa::Isa;
use serde::Serialize;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    system: String,
    cpu: Cpu,
    memory: HostMemory,
    gpu: Gpu,
    nvcc: Option<Nvcc>,
    advice: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Cpu {
    name: Option<String>,
    threads: usize,
    /// Instruction sets the kernels are written for, of this CPU.
    instruction_sets: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Gpu {
    /// The driver's library.
    driver: Option<PathBuf>,
    /// Models that the driver has taken, whether or not they can be used.
    names: Vec<String>,
    /// The driver's own version, such as "580.95.05".
    driver_release: Option<String>,
    /// What this build's kernels were compiled for; `None` in a build without the feature `cuda`.
    kernels: Option<&'static str>,
    /// Whether they came with the source, or the build has compiled them.
    kernels_from: Option<&'static str>,
    /// The drivers that load them, such as "driver 580 or newer".
    kernels_need: Option<String>,
    /// The CUDA version that the driver knows.
    driver_version: Option<String>,
    /// GPUs that can be used.
    devices: Vec<Device>,
    /// Why there are none, or what is wrong with one of them.
    error: Option<String>,
    /// Whether cuBLASLt is there, which models need; `None` where no GPU can be used.
    cublaslt: Option<bool>,
}

/// A GPU as its driver describes it.
#[derive(Debug, Serialize)]
struct Device {
    name: String,
    /// "sm_90".
    architecture: String,
    /// Bytes.
    memory: u64,
    free: Option<u64>,
    multiprocessors: u32,
    /// `None` where it could not load the kernels.
    loading: Option<Loading>,
}

/// Times in milliseconds.
#[derive(Debug, Serialize)]
struct Loading {
    files: BTreeMap<&'static str, f64>,
    all: f64,
}

#[derive(Debug, Serialize)]
struct Nvcc {
    path: PathBuf,
    version: Option<String>,
}

pub fn run(args: &Args) -> Result<()> {
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        system: format!("{} {}", env::consts::OS, env::consts::ARCH),
        cpu: cpu(),
        memory: HostMemory::now(),
        gpu: gpu(),
        nvcc: nvcc(),
        advice: Vec::new(),
    };
    report.advice = advice(&report);
    match args.json {
        true => Ok(out!("{}", serde_json::to_string_pretty(&report)?)?),
        false => Ok(out_part!("{}", text(&report))?),
    }
}

fn cpu() -> Cpu {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    Cpu {
        name: field(&info, "model name"),
        threads: rayon::current_num_threads(),
        instruction_sets: Isa::available()
            .iter()
            .map(|isa| format!("{isa:?}"))
            .collect(),
    }
}

/// The value of `name: value` on its own line.
fn field(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn driver_names() -> &'static [&'static str] {
    match env::consts::OS {
        "windows" => &["nvcuda.dll"],
        _ => &["libcuda.so.1", "libcuda.so"],
    }
}

/// Where the loader looks, in order, and where drivers are put.
fn driver_folders() -> Vec<PathBuf> {
    let listed = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let known = [
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
        "/usr/lib/wsl/lib",
        "/run/opengl-driver/lib",
        "/usr/local/nvidia/lib64",
        "C:\\Windows\\System32",
    ];
    env::split_paths(&listed)
        .chain(known.map(PathBuf::from))
        .collect()
}

fn find(folders: &[PathBuf], names: &[&str]) -> Option<PathBuf> {
    let paths = folders
        .iter()
        .flat_map(|folder| names.iter().map(|name| folder.join(name)));
    paths.into_iter().find(|path| path.is_file())
}

fn gpu() -> Gpu {
    let gpu = Gpu {
        driver: find(&driver_folders(), driver_names()),
        names: gpu_names(Path::new("/proc/driver/nvidia/gpus")),
        driver_release: driver_release(Path::new("/proc/driver/nvidia/version")),
        kernels: None,
        kernels_from: None,
        kernels_need: None,
        driver_version: None,
        devices: Vec::new(),
        error: None,
        cublaslt: None,
    };
    #[cfg(feature = "cuda")]
    let gpu = asked(gpu);
    gpu
}

/// What the driver itself says.
#[cfg(feature = "cuda")]
fn asked(mut gpu: Gpu) -> Gpu {
    use segattn::cuda;
    gpu.kernels = Some(cuda::KERNEL_ARCHITECTURES);
    gpu.kernels_from = Some(cuda::KERNEL_ORIGIN);
    gpu.kernels_need = Some(cuda::toolkit().driver());
    gpu.driver_version = cuda::driver_version().ok().map(|v| v.to_string());
    let devices = match cuda::devices() {
        Ok(devices) => devices,
        Err(error) => {
            gpu.error = Some(error.to_string());
            return gpu;
        }
    };
    gpu.cublaslt = Some(segattn::device::gpu::cuda_driver::load_library().is_ok());
    for (ordinal, info) in devices.into_iter().enumerate() {
        // Opening it and loading the kernels also shows whether they work.
        let opened = cuda::open(ordinal);
        let free = opened
            .as_ref()
            .ok()
            .and_then(|context| context.mem_get_info().ok());
        let loading = opened
            .map_err(anyhow::Error::from)
            .and_then(|context| loading(&context));
        gpu.devices.push(Device {
            name: info.name,
            architecture: format!("sm_{}{}", info.architecture.0, info.architecture.1),
            memory: info.memory as u64,
            free: free.map(|(free, _)| free as u64),
            multiprocessors: info.multiprocessors,
            loading: loading
                .map_err(|error| gpu.error = Some(error.to_string()))
                .ok(),
        });
    }
    gpu
}

/// Loads all kernels.
#[cfg(feature = "cuda")]
fn loading(context: &std::sync::Arc<cudarc::driver::CudaContext>) -> Result<Loading> {
    use segattn::cuda::kernels::DriverKernels;
    let loaded = DriverKernels::new(context)?.load_all()?;
    let files: BTreeMap<_, _> = loaded
        .into_iter()
        .map(|(file, time)| (file.stem(), 1e3 * time.as_secs_f64()))
        .collect();
    let all = files.values().sum();
    Ok(Loading { files, all })
}

/// The driver's version: "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Mon ...".
fn driver_release(file: &Path) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let words = text.lines().next()?.split_whitespace();
    let is_release =
        |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    words.into_iter().find(is_release).map(str::to_owned)
}

/// Models of the GPUs that the driver has taken.
fn gpu_names(folder: &Path) -> Vec<String> {
    let gpus = fs::read_dir(folder).into_iter().flatten().flatten();
    let name = |gpu: fs::DirEntry| {
        field(
            &fs::read_to_string(gpu.path().join("information")).ok()?,
            "Model",
        )
    };
    gpus.filter_map(name).collect()
}

fn nvcc() -> Option<Nvcc> {
    let homes = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(env::var_os);
    let homes = homes.map(|home| PathBuf::from(home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = homes
        .chain(env::split_paths(&path))
        .chain([PathBuf::from("/usr/local/cuda/bin")]);
    let path = find(&folders.collect::<Vec<_>>(), &["nvcc", "nvcc.exe"])?;
    let said = Command::new(&path).arg("--version").output().ok();
    let version = said.and_then(|said| release(&String::from_utf8_lossy(&said.stdout)));
    Some(Nvcc { path, version })
}

/// The version in `nvcc --version`: "... release 12.8, V12.8.61".
fn release(said: &str) -> Option<String> {
    let rest = said.split_once("release ")?.1;
    Some(rest.split(',').next()?.trim().to_owned())
}

fn advice(report: &Report) -> Vec<String> {
    let mut advice = Vec::new();
    if report.cpu.instruction_sets.len() == 1 {
        advice.push("this CPU has neither AVX2 nor AVX-512: results are the same, but slow".into());
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    if report.cpu.threads < threads {
        advice.push(format!(
            "{} of {threads} threads are used; leave out --threads and RAYON_NUM_THREADS for all",
            report.cpu.threads
        ));
    }
    match (&report.gpu.driver, report.gpu.names.is_empty()) {
        (None, true) => advice.push("no NVIDIA GPU: everything runs on the CPU".into()),
        (None, false) => advice.push(
            "a GPU but no libcuda: in a container start it with GPU access (--gpus all), else install the driver"
                .into(),
        ),
        (Some(_), true) if env::consts::OS == "linux" => advice.push(
            "libcuda but no GPU that the driver has taken: see `nvidia-smi`; in a container pass the GPU in"
                .into(),
        ),
        _ => {}
    }
    let gpu = &report.gpu;
    if let (Some(error), true) = (&gpu.error, gpu.driver.is_some()) {
        advice.push(error.clone());
    }
    if gpu.cublaslt == Some(false) {
        advice.push(
            "no libcublasLt: the operation runs, models do not; it comes with the CUDA toolkit and with \
             `pip install nvidia-cublas`; add its folder to LD_LIBRARY_PATH"
                .into(),
        );
    }
    if gpu.kernels.is_none() && !gpu.names.is_empty() {
        advice.push(
            "this segattn was built without GPU kernels: build it with --features cuda".into(),
        );
    }
    if gpu.kernels.is_none() && !gpu.names.is_empty() && report.nvcc.is_none() {
        advice.push(
            "no nvcc: needed only where kernels/ has changed since its compiled kernels were made"
                .into(),
        );
    }
    advice
}

fn text(report: &Report) -> String {
    let mut all = String::new();
    let gib = |bytes: Option<u64>| match bytes {
        Some(bytes) => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
        None => "unknown".into(),
    };
    let none = || "none found".to_owned();
    let mut line = |name: &str, text: String| all += &format!("{name:<9} {text}\n");
    line("segattn", format!("{}, {}", report.version, report.system));
    let cpu = &report.cpu;
    let name = cpu.name.as_deref().unwrap_or("unknown");
    let sets = cpu.instruction_sets.join(", ");
    line(
        "cpu",
        format!("{name}, {} threads, kernels: {sets}", cpu.threads),
    );
    let memory = &report.memory;
    let limit = memory
        .limit
        .map(|limit| format!(", limited to {}", gib(Some(limit))));
    let (total, free) = (gib(memory.total), gib(memory.available));
    line(
        "memory",
        format!("{total}, {free} available{}", limit.unwrap_or_default()),
    );
    let gpu = &report.gpu;
    for device in &gpu.devices {
        let (total, free) = (gib(Some(device.memory)), gib(device.free));
        let Device {
            name,
            architecture,
            multiprocessors,
            loading,
            ..
        } = device;
        line(
            "gpu",
            format!(
                "{name}, {architecture}, {multiprocessors} multiprocessors, {total}, {free} free"
            ),
        );
        if let Some(Loading { files, all }) = loading {
            let text = format!("{} files of kernels loaded in {all:.0} ms", files.len());
            line("", text);
        }
    }
    if gpu.devices.is_empty() {
        let names = gpu.names.join(", ");
        line("gpu", if names.is_empty() { none() } else { names });
    }
    let driver = gpu.driver.as_ref().map(|path| {
        let release = gpu.driver_release.as_ref();
        let release = release.map(|release| format!("{release}, "));
        let version = gpu.driver_version.as_ref();
        let version = version.map(|version| format!("knows CUDA {version}, "));
        let [release, version] = [release, version].map(Option::unwrap_or_default);
        format!("{release}{version}{}", path.display())
    });
    line("driver", driver.unwrap_or_else(none));
    let kernels = match (gpu.kernels, gpu.kernels_from, &gpu.kernels_need) {
        (Some(archs), Some(from), Some(need)) => format!("{archs}; {from}; need {need}"),
        _ => "none: built without --features cuda".to_owned(),
    };
    line("kernels", kernels);
    if let Some(there) = gpu.cublaslt {
        line("cublasLt", if there { "found".into() } else { none() });
    }
    let nvcc = report.nvcc.as_ref().map(|nvcc| {
        let version = nvcc.version.as_deref().unwrap_or("unknown version");
        format!("{version}, {}", nvcc.path.display())
    });
    line("nvcc", nvcc.unwrap_or_else(none));
    for advice in &report.advice {
        line("->", advice.clone());
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_is_read_from_what_nvcc_says() {
        let said = "Cuda compilation tools, release 12.8, V12.8.61\n";
        assert_eq!(release(said).as_deref(), Some("12.8"));
        assert_eq!(release("command not found"), None);
    }

    #[test]
    fn the_drivers_release_is_read_from_its_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let said = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23\nGCC version: 12.2.0\n";
        fs::write(&file, said).unwrap();
        assert_eq!(driver_release(file.path()).as_deref(), Some("580.95.05"));
        fs::write(&file, "").unwrap();
        assert_eq!(driver_release(file.path()), None);
    }

    #[test]
    fn gpus_are_named_by_the_drivers_files() {
        let folder = tempfile::tempdir().unwrap();
        let gpu = folder.path().join("0000:01:00.0");
        fs::create_dir(&gpu).unwrap();
        fs::write(gpu.join("information"), "Model: \t\t NVIDIA X\nIRQ: 1\n").unwrap();
        assert_eq!(gpu_names(folder.path()), ["NVIDIA X"]);
        assert!(gpu_names(&folder.path().join("missing")).is_empty());
        assert_eq!(
            find(
                &[folder.path().to_owned(), gpu.clone()],
                &["a", "information"]
            ),
            Some(gpu.join("information"))
        );
    }

    /// A machine with a GPU and all that this build needs.
    fn well() -> Report {
        Report {
            version: "",
            system: String::new(),
            cpu: cpu(),
            memory: HostMemory::now(),
            gpu: Gpu {
                driver: Some("libcuda.so.1".into()),
                driver_release: Some("580.95.05".into()),
                names: vec!["X".into()],
                kernels: Some("sm_80, PTX 80"),
                kernels_from: Some("prebuilt"),
                kernels_need: Some("driver 580 or newer".into()),
                driver_version: Some("13.0".into()),
                devices: vec![Device {
                    name: "X".into(),
                    architecture: "sm_90".into(),
                    memory: 1 << 30,
                    free: None,
                    multiprocessors: 132,
                    loading: Some(Loading {
                        files: BTreeMap::from([("copy", 1.5), ("loss", 2.0)]),
                        all: 3.5,
                    }),
                }],
                error: None,
                cublaslt: Some(true),
            },
            nvcc: None,
            advice: Vec::new(),
        }
    }

    fn advises(report: &Report, what: &str) -> bool {
        advice(report).iter().any(|advice| advice.contains(what))
    }

    #[test]
    fn what_a_gpu_can_load_is_said() {
        let mut report = well();
        assert!(!advises(&report, "GPU") && !advises(&report, "driver"));
        let said = text(&report);
        for what in [
            "580.95.05, knows CUDA 13.0, libcuda.so.1",
            "sm_80, PTX 80; prebuilt; need driver 580 or newer",
            "2 files of kernels loaded in 4 ms",
            "cublasLt  found",
        ] {
            assert!(said.contains(what), "{what}: {said}");
        }
        report.gpu.cublaslt = Some(false);
        assert!(advises(&report, "pip install nvidia-cublas"));
        report.gpu.devices[0].loading = None;
        assert!(!text(&report).contains("files of kernels"));
        report.gpu.error = Some("the NVIDIA driver supports CUDA 12.4, but".into());
        assert!(advises(&report, "supports CUDA 12.4"));
    }

    #[test]
    fn a_gpu_without_its_library_gets_advice() {
        let mut report = well();
        report.gpu.driver = None;
        assert!(advises(&report, "no libcuda"));
        report.gpu.kernels = None;
        assert!(advises(&report, "no nvcc") && advises(&report, "--features cuda"));
        report.gpu.names.clear();
        assert!(advises(&report, "runs on the CPU"));
        report.gpu.driver = Some("libcuda.so.1".into());
        assert!(advises(&report, "nvidia-smi"));
    }
}
