//! The simulated GPU as the shared attention cases see it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use segattn::attention::cuda::{BackwardPlan, DeviceSlice, Error, ForwardPlan};
use segattn::cuda::kernels::{self, Launch, Launcher};
use segattn_sim::{Buffer, Checks, Kernels, Stream};

use super::attention_cases::gpu::Gpu;

/// The folder of the crate's kernels.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels")
}

/// The kernels of the crate.
pub fn kernels() -> &'static Kernels {
    static KERNELS: OnceLock<Kernels> = OnceLock::new();
    KERNELS.get_or_init(|| Kernels::new(&folder()))
}

/// An attention kernel file's text with the entry points of one instance alone, line for line.
pub fn only(text: &str, instance: &str) -> String {
    let wanted = |line: &str| {
        let macros = ["FORWARD(", "DECODE(", "BACKWARD(", "STORED(", "COMBINE("];
        let mut entry = macros.iter().filter_map(|name| line.strip_prefix(name));
        let is_it = |entry: &str| {
            [',', ')']
                .map(|end| format!("{instance}{end}"))
                .iter()
                .any(|name| entry.contains(name))
        };
        entry.next().is_none_or(is_it)
    };
    let lines = text
        .lines()
        .map(|line| if wanted(line) { line } else { "" });
    lines.flat_map(|line| [line, "\n"]).collect()
}

/// Entry points that ran.
pub type Entries = Mutex<BTreeSet<&'static str>>;

/// A simulated GPU, its buffers and the kernels it runs.
pub struct Simulated<'a> {
    pub gpu: segattn_sim::Gpu,
    buffers: Vec<Buffer>,
    kernels: &'a Kernels,
    entries: Option<&'a Entries>,
    /// What the workspace holds before a call; poison where there is none.
    dirt: Option<u8>,
}

impl Simulated<'static> {
    pub fn new(seed: u64) -> Self {
        Simulated::of(seed, kernels())
    }
}

impl<'a> Simulated<'a> {
    pub fn of(seed: u64, kernels: &'a Kernels) -> Self {
        Simulated {
            gpu: segattn_sim::Gpu::new(seed, Checks::All),
            buffers: Vec::new(),
            kernels,
            entries: None,
            dirt: None,
        }
    }

    /// Leaves this byte all over the workspace, as if another call had used it.
    pub fn dirty(self, byte: u8) -> Self {
        Simulated {
            dirt: Some(byte),
            ..self
        }
    }

    /// Notes which entry points run.
    pub fn noting(self, entries: &'a Entries) -> Self {
        Simulated {
            entries: Some(entries),
            ..self
        }
    }

    fn keep(&mut self, buffer: Buffer) -> u64 {
        self.buffers.push(buffer);
        buffer.address() as u64
    }

    pub fn buffer(&self, address: u64) -> Buffer {
        let found = self
            .buffers
            .iter()
            .find(|buffer| buffer.address() as u64 == address);
        *found.expect("a buffer")
    }

    fn stream(&mut self) -> Noting<'_> {
        Noting {
            stream: Stream {
                gpu: &mut self.gpu,
                kernels: self.kernels,
            },
            entries: self.entries,
        }
    }
}

impl Gpu for Simulated<'_> {
    fn kernels(&self) -> &impl kernels::Kernels {
        self.kernels
    }

    fn input(&mut self, name: &str, bytes: &[u8]) -> u64 {
        let buffer = self.gpu.input(name, bytes).expect("memory");
        self.keep(buffer)
    }

    fn output(&mut self, name: &str, bytes: usize) -> u64 {
        let buffer = match self.dirt {
            Some(byte) if name == "workspace" => self.gpu.upload(name, &vec![byte; bytes]),
            _ => self.gpu.alloc(name, bytes),
        };
        self.keep(buffer.expect("memory"))
    }

    fn download(&mut self, address: u64, bytes: usize) -> Vec<u8> {
        let buffer = self.buffer(address);
        self.gpu.download_range(buffer, 0, bytes)
    }

    fn forward(&mut self, plan: &ForwardPlan, workspace: DeviceSlice) -> Result<(), Error> {
        // SAFETY: the simulator checks every access.
        unsafe { plan.run(&mut self.stream(), workspace) }
    }

    fn backward(&mut self, plan: &BackwardPlan, workspace: DeviceSlice) -> Result<(), Error> {
        // SAFETY: as above.
        unsafe { plan.run(&mut self.stream(), workspace) }
    }
}

/// A stream that notes what it launches.
struct Noting<'a> {
    stream: Stream<'a>,
    entries: Option<&'a Entries>,
}

impl Launcher for Noting<'_> {
    unsafe fn upload(&mut self, to: u64, bytes: &[u8]) -> Result<(), kernels::Error> {
        // SAFETY: the caller's promise.
        unsafe { self.stream.upload(to, bytes) }
    }

    unsafe fn zero(&mut self, at: u64, bytes: usize) -> Result<(), kernels::Error> {
        // SAFETY: the caller's promise.
        unsafe { self.stream.zero(at, bytes) }
    }

    unsafe fn launch<P: Copy>(
        &mut self,
        launch: &Launch,
        params: &P,
    ) -> Result<(), kernels::Error> {
        if let Some(entries) = self.entries {
            entries.lock().expect("no panic").insert(launch.entry.name);
        }
        // SAFETY: the caller's promise.
        unsafe { self.stream.launch(launch, params) }
    }
}
