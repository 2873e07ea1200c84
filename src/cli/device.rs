//! `--device`: which device a command runs on.

use std::fmt;

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
pub fn open_gpu() -> anyhow::Result<segattn::device::gpu::Gpu<segattn::device::gpu::cuda::Cuda>> {
    use segattn::device::gpu::Gpu;
    use segattn::device::gpu::cuda::{Choice, Cuda};
    Ok(Gpu::new(Cuda::open(0, Choice::SameBits)?))
}
