//! `--device`: which device a command runs on.

use std::fmt;

use anyhow::Result;
#[cfg(feature = "cuda")]
use anyhow::ensure;
#[cfg(feature = "cuda")]
use segattn::attention::cuda::DriverKernels;
use segattn::device::Device;
use segattn::device::cpu::Cpu;
#[cfg(feature = "cuda")]
use segattn::device::gpu::cuda::{Choice, Cuda};
#[cfg(feature = "cuda")]
use segattn::device::gpu::{Driver, DryRun, Gpu};

/// A device by name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceName {
    /// All cores, f32.
    #[default]
    Cpu,
    /// The first NVIDIA GPU that the driver shows, bf16 activations; needs a build with feature `cuda`.
    Cuda,
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DeviceName::Cpu => "cpu",
            DeviceName::Cuda => "cuda",
        })
    }
}

/// The value of an expression that may use `$device`, the device of that name.
macro_rules! on_device {
    ($name:expr, $device:ident => $value:expr) => {
        match $name {
            $crate::cli::device::DeviceName::Cpu => {
                let $device = segattn::device::cpu::Cpu;
                $value
            }
            #[cfg(feature = "cuda")]
            $crate::cli::device::DeviceName::Cuda => {
                let $device = $crate::cli::device::open_gpu()?;
                $value
            }
            #[cfg(not(feature = "cuda"))]
            $crate::cli::device::DeviceName::Cuda => anyhow::bail!(
                "--device cuda: this program was built without it; build with `cargo build --release --features cuda`"
            ),
        }
    };
}
pub(crate) use on_device;

/// The first GPU.
#[cfg(feature = "cuda")]
pub fn open_gpu() -> Result<Gpu<Cuda>> {
    Ok(Gpu::new(Cuda::open(0, Choice::SameBits)?))
}

/// Devices whose memory is planned before a run.
pub trait Planned: Device {
    /// A device that counts memory and does nothing else.
    type Dry: Device;

    /// Makes the run without doing it, then takes the memory that it needs, all at once.
    ///
    /// # Errors
    /// Those of the run, or that there is not as much memory.
    fn plan(&self, run: impl FnOnce(Self::Dry) -> Result<()>) -> Result<()>;
}

impl Planned for Cpu {
    type Dry = Cpu;

    /// The system has as much memory as it has; nothing is planned.
    fn plan(&self, _: impl FnOnce(Cpu) -> Result<()>) -> Result<()> {
        Ok(())
    }
}

#[cfg(feature = "cuda")]
impl Planned for Gpu<Cuda> {
    type Dry = Gpu<DryRun<DriverKernels>>;

    fn plan(&self, run: impl FnOnce(Self::Dry) -> Result<()>) -> Result<()> {
        let dry = Gpu::new(DryRun::new(self.driver().shared_kernels().clone(), None));
        run(dry.clone())?;
        let (planned, gib) = (dry.memory_use(), f64::from(1 << 30));
        let needed = planned.buffers.high_water + planned.pool.high_water;
        let free = self.driver().free_memory()?;
        ensure!(
            needed <= free,
            "this run needs {:.2} GiB of device memory, {:.2} GiB are free: lower training.segments_per_step, \
             training.batch or training.sequence_len, or set training.recompute",
            needed as f64 / gib,
            free as f64 / gib
        );
        tracing::info!("device memory: {:.3} GiB", needed as f64 / gib);
        Ok(self.reserve(&planned)?)
    }
}
