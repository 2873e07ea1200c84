//! What the driver may say, and what to do about it.

use std::fmt;

/// A CUDA version: 13.0 is `Version(13000)`, as the driver counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub i32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}

/// A failed call of the driver. After any of them the next call works, but for [`Error::ContextLost`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A library beside the driver is missing.
    #[error(
        "{library} was not found. It comes with the CUDA toolkit, and with `pip install nvidia-cublas`; name its \
         folder in LD_LIBRARY_PATH"
    )]
    NoLibrary {
        /// Its name.
        library: &'static str,
    },
    /// There is no libcuda.
    #[error(
        "no NVIDIA driver: the library libcuda was not found. On a machine with a GPU install the driver; \
         in a container start it with GPU access (--gpus all)"
    )]
    NoDriver,
    /// libcuda is there, a GPU is not.
    #[error(
        "the NVIDIA driver finds no GPU ({reason}). See `nvidia-smi`; in a container pass the GPU in (--gpus all); \
         CUDA_VISIBLE_DEVICES may hide it"
    )]
    NoDevice {
        /// The driver's words.
        reason: String,
    },
    /// Fewer GPUs than the number asks for.
    #[error("GPU {ordinal}: expected a number below {count}, the GPUs that the driver shows")]
    Ordinal {
        /// The number asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The kernels were compiled by a toolkit that this driver does not know.
    #[error(
        "the NVIDIA driver is of CUDA {driver}, the kernels were compiled by CUDA {toolkit}: install a driver of \
         CUDA {toolkit} or later, or build with an older nvcc (NVCC, CUDA_HOME)"
    )]
    DriverTooOld {
        /// What the driver knows.
        driver: Version,
        /// What compiled the kernels.
        toolkit: Version,
    },
    /// Nothing among the compiled kernels runs on this GPU.
    #[error(
        "no kernel image for {gpu} (sm_{architecture}): {image} was compiled for {compiled}. \
         Build with SEGATTN_CUDA_ARCHS={architecture} or without it; GPUs before sm_80 are not supported"
    )]
    NoKernelImage {
        /// The GPU's name.
        gpu: String,
        /// Its compute capability, "90".
        architecture: String,
        /// The file of kernels.
        image: String,
        /// Architectures it holds.
        compiled: String,
    },
    /// An allocation that the device has no room for.
    #[error(
        "out of device memory: {doing}: {free} of {total} bytes are free; use a smaller batch or shorter segments, \
         or free what other programs hold (see `nvidia-smi`)"
    )]
    OutOfMemory {
        /// What needed memory.
        doing: String,
        /// Bytes that are free.
        free: usize,
        /// Bytes there are.
        total: usize,
    },
    /// A kernel needs more shared memory than a block may have.
    #[error(
        "{kernel}: expected {expected} bytes of shared memory a block, the GPU has {got}; use a smaller head_dim or \
         another GPU"
    )]
    SharedMemory {
        /// The entry point.
        kernel: String,
        /// Bytes that the kernel needs.
        expected: usize,
        /// Bytes that a block may have.
        got: usize,
    },
    /// A constant of the compiled kernels is not what the host expects.
    #[error(
        "{name}: expected {expected} bytes, got {got}; build kernels and library from one source tree"
    )]
    Constant {
        /// Its name.
        name: String,
        /// Bytes of the host's type.
        expected: usize,
        /// Bytes there are.
        got: usize,
    },
    /// The device stopped in the middle of work. Nothing on this context works any more.
    #[error(
        "the GPU's context is lost: {doing}: {name}, {text}. Restart the program; compute-sanitizer finds the access"
    )]
    ContextLost {
        /// What was asked when it showed; the cause may be earlier work.
        doing: String,
        /// The driver's name of it.
        name: String,
        /// The driver's words.
        text: String,
    },
    /// Anything else.
    #[error("{doing}: the driver said {name} ({code}), {text}; {remedy}")]
    Driver {
        /// What was asked.
        doing: String,
        /// `CUresult`.
        code: u32,
        /// The driver's name of it.
        name: String,
        /// The driver's words.
        text: String,
        /// What to do.
        remedy: &'static str,
    },
}

/// `CUresult` values that get a variant of their own.
mod code {
    pub const OUT_OF_MEMORY: u32 = 2;
    pub const STUB_LIBRARY: u32 = 34;
    pub const DEVICE_UNAVAILABLE: u32 = 46;
    pub const NO_DEVICE: u32 = 100;
    /// Memory, instructions and hardware that failed under a kernel: errors that stay with the context.
    pub const LOST: [u32; 14] = [
        214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721,
    ];
}

/// What to do about a `CUresult` without a variant.
fn remedy(code: u32) -> &'static str {
    match code {
        // Device unlicensed, system or MPS not ready, unknown: the driver did not come up.
        102 | 304 | 802 | 805..=810 | 999 => {
            "the driver is not ready: `nvidia-smi` says more, a reboot may help"
        }
        803 => "the driver's library and kernel module differ: reboot after the driver's update",
        804 => {
            "a CUDA compatibility package is in LD_LIBRARY_PATH that this GPU cannot use: remove it"
        }
        221 | 223 => {
            "the GPU needs kernels compiled for it: build with SEGATTN_CUDA_ARCHS naming its architecture"
        }
        701 => "the kernel needs more registers than the GPU has: build for its architecture",
        // Stream capture.
        900..=908 => "in a stream capture use a plan's `launch`, after one `run` outside",
        _ => "see `segattn doctor`; if the machine is well, this is a bug to report",
    }
}

impl Error {
    /// The error of a `CUresult`; `memory` is (free, total) bytes, asked only where they are told.
    pub fn from_code(
        code: u32,
        doing: &str,
        (name, text): (String, String),
        memory: impl FnOnce() -> (usize, usize),
    ) -> Error {
        let doing = doing.to_owned();
        match code {
            code::OUT_OF_MEMORY => {
                let (free, total) = memory();
                Error::OutOfMemory { doing, free, total }
            }
            code::NO_DEVICE | code::DEVICE_UNAVAILABLE | code::STUB_LIBRARY => {
                Error::NoDevice { reason: text }
            }
            code if code::LOST.contains(&code) => Error::ContextLost { doing, name, text },
            code => Error::Driver {
                doing,
                code,
                name,
                text,
                remedy: remedy(code),
            },
        }
    }

    /// Whether the machine simply has no usable GPU.
    pub fn is_absent(&self) -> bool {
        matches!(self, Error::NoDriver | Error::NoDevice { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(code: u32) -> Error {
        let said = ("CUDA_ERROR_X".to_owned(), "x went wrong".to_owned());
        Error::from_code(code, "allocating 12 bytes", said, || (7, 99))
    }

    #[test]
    fn codes_get_the_variant_that_says_what_to_do() {
        assert!(
            of(2)
                .to_string()
                .contains("allocating 12 bytes: 7 of 99 bytes are free")
        );
        assert!(of(100).is_absent() && !of(2).is_absent());
        assert!(matches!(of(700), Error::ContextLost { .. }));
        assert!(matches!(of(719), Error::ContextLost { .. }));
        assert!(of(803).to_string().starts_with(
            "allocating 12 bytes: the driver said CUDA_ERROR_X (803), x went wrong; "
        ));
        assert!(
            of(803)
                .to_string()
                .ends_with("reboot after the driver's update")
        );
    }

    #[test]
    fn versions_are_written_as_they_are_called() {
        let error = Error::DriverTooOld {
            driver: Version(12080),
            toolkit: Version(13000),
        };
        assert!(
            error
                .to_string()
                .contains("of CUDA 12.8, the kernels were compiled by CUDA 13.0")
        );
    }
}
