//! `--device` and `--pool`: which device a command runs on, and where the past lies.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Result, bail};
#[cfg(feature = "cuda")]
use segattn::cuda::kernels::DriverKernels;
use segattn::device::cpu::Cpu;
use segattn::device::gpu::PoolPlacement;
#[cfg(feature = "cuda")]
use segattn::device::gpu::cuda_driver::{Choice, Cuda};
#[cfg(feature = "cuda")]
use segattn::device::gpu::{DryRun, Gpu};
use segattn::device::{Device, HostMemory, Purpose};
#[cfg(feature = "cuda")]
use segattn::ranks::Nccl;
use segattn::ranks::{Mesh, Ranks};

use super::ranks::EngineName;

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
        $crate::cli::device::on_device!($name, 0, $device => $value)
    };
    // The number of the GPU, too.
    ($name:expr, $ordinal:expr, $device:ident => $value:expr) => {{
        let _ordinal: usize = $ordinal;
        match $name {
            $crate::cli::device::DeviceName::Cpu => {
                let $device = segattn::device::cpu::Cpu;
                $value
            }
            #[cfg(feature = "cuda")]
            $crate::cli::device::DeviceName::Cuda => {
                let $device = $crate::cli::device::open_gpu(_ordinal)?;
                $value
            }
            #[cfg(not(feature = "cuda"))]
            $crate::cli::device::DeviceName::Cuda => anyhow::bail!(
                "--device cuda: this program was built without it; build with `cargo build --release --features cuda`"
            ),
        }
    }};
}
pub(crate) use on_device;

/// A GPU by its number.
#[cfg(feature = "cuda")]
pub fn open_gpu(ordinal: usize) -> Result<Gpu<Cuda>> {
    Ok(Gpu::new(Cuda::open(ordinal, Choice::SameBits)?))
}

/// Which device.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct DeviceArgs {
    /// Where to compute
    #[arg(long, value_enum, default_value_t)]
    pub device: DeviceName,
    /// Of a GPU, where the keys and values of the past lie: `device`, `host` (pinned memory, read over the bus), so
    /// many GiB on the device and the rest on the host, or `auto`: on the device as far as there is room beside
    /// everything else. Changes no bit
    #[arg(
        long,
        value_name = "auto|device|host|GIB",
        default_value = "auto",
        allow_negative_numbers = true
    )]
    pub pool: Pool,
}

/// Where pools lie.
#[derive(Debug, Clone, Copy)]
pub struct Pool(pub PoolPlacement);

impl FromStr for Pool {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let gib: f64 = match text {
            "auto" => return Ok(Pool(PoolPlacement::Auto)),
            "device" => return Ok(Pool(PoolPlacement::AtMost(usize::MAX))),
            "host" => 0.0,
            text => text.parse().unwrap_or(-1.0),
        };
        if gib.is_nan() || gib < 0.0 {
            bail!("expected auto, device, host, or GiB of device memory");
        }
        Ok(Pool(PoolPlacement::AtMost(
            (gib * f64::from(1 << 30)) as usize,
        )))
    }
}

/// Devices whose memory is planned before a run.
pub trait Planned: Device + Clone {
    /// A device that counts memory and does nothing else.
    type Dry: Device + Clone;

    /// Makes the run without doing it, then takes the memory that it needs, all at once. `purpose` is what most of it
    /// beside weights and pools is for.
    ///
    /// # Errors
    /// Those of the run, or that there is not as much memory.
    fn plan(
        &self,
        pool: Pool,
        purpose: Purpose,
        run: impl Fn(Self::Dry) -> Result<()>,
    ) -> Result<()>;

    /// Warns where a run by this estimate takes more memory than the machine has left. A device that plans its memory
    /// knows better.
    fn warn_of(&self, _estimate: u64) {}

    /// The device's measured GEMM throughput, in operations per second. Asked for before memory is planned.
    ///
    /// # Errors
    /// What the device says.
    fn peak_flops(&self) -> Result<Option<f64>> {
        Ok(None)
    }

    /// Whether its first steps take longer than the next ones.
    fn gains_from_rehearsal(&self) -> bool {
        false
    }

    /// Ranks that have met and exchange this device's buffers; `both_ways`: neighbours send to each other at a time.
    ///
    /// # Errors
    /// That the device has no such engine, or what the engine says.
    fn ranks(&self, mesh: &Arc<Mesh>, engine: EngineName, _both_ways: bool) -> Result<Ranks<Self>> {
        match engine {
            EngineName::Host => Ok(Ranks::new(mesh.clone())),
            EngineName::Nccl => bail!("--rank-engine nccl: expected --device cuda, got another"),
        }
    }

    /// Bytes of the device's own memory that are taken.
    fn memory_taken(&self) -> Option<usize> {
        None
    }
}

impl Planned for Cpu {
    type Dry = Cpu;

    /// The system has as much memory as it has; nothing is planned.
    fn plan(&self, _: Pool, _: Purpose, _: impl Fn(Cpu) -> Result<()>) -> Result<()> {
        Ok(())
    }

    fn warn_of(&self, estimate: u64) {
        if let Some(shortage) = shortage(estimate, HostMemory::now().left()) {
            tracing::warn!("{shortage}");
        }
    }
}

/// What to say of a run that takes `estimate` bytes where `left` are free.
fn shortage(estimate: u64, left: Option<usize>) -> Option<String> {
    let left = left.filter(|left| estimate > *left as u64)?;
    let gib = |bytes: f64| bytes / f64::from(1 << 30);
    Some(format!(
        "this run takes about {:.1} GiB of memory, and {:.1} GiB are free: the system may end it. Less is taken with \
         training.recompute = true, a smaller training.batch, training.segments_per_step or training.sequence_len",
        gib(estimate as f64),
        gib(left as f64)
    ))
}

#[cfg(feature = "cuda")]
impl Planned for Gpu<Cuda> {
    type Dry = Gpu<DryRun<DriverKernels>>;

    fn plan(
        &self,
        pool: Pool,
        purpose: Purpose,
        run: impl Fn(Self::Dry) -> Result<()>,
    ) -> Result<()> {
        let kernels = self.driver().shared_kernels().clone();
        let plan = self.reserve_for(&kernels, pool.0, purpose, run)?;
        let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
        tracing::info!(
            "device memory: {:.3} GiB, of it {:.3} GiB pool; pinned host memory: {:.3} GiB",
            gib(plan.device_bytes()),
            gib(plan.planned.pool.high_water),
            gib(plan.host_bytes())
        );
        Ok(())
    }

    fn ranks(&self, mesh: &Arc<Mesh>, engine: EngineName, both_ways: bool) -> Result<Ranks<Self>> {
        Ok(match engine {
            EngineName::Host => Ranks::new(mesh.clone()),
            EngineName::Nccl => Ranks::new(Nccl::new(mesh.clone(), self, both_ways)?),
        })
    }

    fn gains_from_rehearsal(&self) -> bool {
        true
    }

    fn peak_flops(&self) -> Result<Option<f64>> {
        Ok(Some(self.driver().measure_peak()?))
    }

    fn memory_taken(&self) -> Option<usize> {
        Some(self.memory_use().on_device())
    }
}

#[cfg(test)]
mod tests {
    use super::shortage;

    #[test]
    fn only_runs_that_take_more_than_is_free_are_warned_of() {
        const GIB: usize = 1 << 30;
        let said = shortage(3 * GIB as u64, Some(2 * GIB)).unwrap();
        assert!(
            said.contains("3.0 GiB") && said.contains("2.0 GiB"),
            "{said}"
        );
        assert_eq!(shortage(2 * GIB as u64, Some(2 * GIB)), None);
        assert_eq!(shortage(u64::MAX, None), None);
    }
}
