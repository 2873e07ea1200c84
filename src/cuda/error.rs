//! Errors of the driver, each with what the user can do about it.

use std::fmt;

/// A CUDA version as the driver encodes it: 13.0 is `Version(13000)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub i32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}

impl Version {
    /// The first driver for Linux that loads images of this CUDA version, compressed as this build's are: such as
    /// "driver 580 or newer".
    pub fn driver(self) -> String {
        match self.0 / 1000 {
            12 => "driver 550 or newer".to_owned(),
            13 => "driver 580 or newer".to_owned(),
            major => format!("a driver for CUDA {major}"),
        }
    }
}

/// A failed driver call. Later calls can succeed, except after [`Error::ContextLost`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A library of the CUDA toolkit is missing.
    #[error(
        "{library} was not found. It comes with the CUDA toolkit, and with `pip install nvidia-cublas`; add its \
         folder to LD_LIBRARY_PATH"
    )]
    NoLibrary {
        /// The library's name.
        library: &'static str,
    },
    /// The driver's library libcuda was not found.
    #[error(
        "no NVIDIA driver: the library libcuda was not found. On a machine with a GPU install the driver; \
         in a container start it with GPU access (--gpus all)"
    )]
    NoDriver,
    /// The driver is installed but finds no GPU.
    #[error(
        "the NVIDIA driver finds no GPU ({reason}). See `nvidia-smi`; in a container pass the GPU in (--gpus all); \
         CUDA_VISIBLE_DEVICES may hide it"
    )]
    NoDevice {
        /// The driver's error text.
        reason: String,
    },
    /// There is no GPU of this number.
    #[error(
        "GPU {ordinal}: expected a number below {count}, which is how many GPUs the driver lists"
    )]
    Ordinal {
        /// The requested number.
        ordinal: usize,
        /// How many GPUs there are.
        count: usize,
    },
    /// The driver is older than the toolkit that compiled the kernels.
    #[error(
        "the NVIDIA driver supports CUDA {driver}, but the kernels were compiled by CUDA {toolkit}: install a driver \
         for CUDA {toolkit} or later ({}), or compile the kernels with an older nvcc (SEGATTN_KERNELS=compile, NVCC)",
        toolkit.driver()
    )]
    DriverTooOld {
        /// The newest CUDA version that the driver supports.
        driver: Version,
        /// The version of the toolkit that compiled the kernels.
        toolkit: Version,
    },
    /// None of the compiled kernel images runs on this GPU.
    #[error(
        "no kernel image for {gpu} (sm_{architecture}): {image} was compiled for {compiled}. \
         Build with SEGATTN_CUDA_ARCHS={architecture} or without it; GPUs before sm_80 are not supported"
    )]
    NoKernelImage {
        /// The GPU's name.
        gpu: String,
        /// Its compute capability, such as "90".
        architecture: String,
        /// The kernel file.
        image: String,
        /// The architectures that it was compiled for.
        compiled: String,
    },
    /// The device has too little free memory for an allocation.
    #[error(
        "out of device memory: {doing}: {free} of {total} bytes are free; use a smaller batch or shorter segments, \
         or end other programs that use the GPU (see `nvidia-smi`)"
    )]
    OutOfMemory {
        /// What the memory was for.
        doing: String,
        /// Free bytes.
        free: usize,
        /// All bytes of the device.
        total: usize,
    },
    /// A kernel needs more shared memory than a block may use.
    #[error(
        "{kernel}: expected {expected} bytes of shared memory per block, got {got} on this GPU; use a smaller \
         head_dim or another GPU"
    )]
    SharedMemory {
        /// The entry point of the kernel.
        kernel: String,
        /// Bytes that the kernel needs.
        expected: usize,
        /// Bytes that a block may use.
        got: usize,
    },
    /// A constant of the compiled kernels has another size than the host's type.
    #[error(
        "{name}: expected {expected} bytes, got {got}; build kernels and library from the same source tree"
    )]
    Constant {
        /// The constant's name.
        name: String,
        /// Size of the host's type in bytes.
        expected: usize,
        /// Size of the constant in bytes.
        got: usize,
    },
    /// The device failed while it ran a kernel. Every later call on this context fails.
    #[error(
        "the GPU's context is lost: {doing}: {name}, {text}. Restart the program; compute-sanitizer finds the access"
    )]
    ContextLost {
        /// The call that reported the error. Earlier work may have caused it.
        doing: String,
        /// The driver's name of the error.
        name: String,
        /// The driver's error text.
        text: String,
    },
    /// Any other error of the driver.
    #[error("{doing}: the driver said {name} ({code}), {text}; {remedy}")]
    Driver {
        /// What the call was for.
        doing: String,
        /// The `CUresult`.
        code: u32,
        /// The driver's name of the error.
        name: String,
        /// The driver's error text.
        text: String,
        /// What the user can do.
        remedy: &'static str,
    },
}

/// `CUresult` values that have their own variant.
mod code {
    pub const OUT_OF_MEMORY: u32 = 2;
    pub const STUB_LIBRARY: u32 = 34;
    pub const DEVICE_UNAVAILABLE: u32 = 46;
    pub const NO_DEVICE: u32 = 100;
    /// Failed accesses, instructions and hardware under a kernel. After these every call on the context fails.
    pub const LOST: [u32; 14] = [
        214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721,
    ];
}

/// What to do about a `CUresult` without a variant.
fn remedy(code: u32) -> &'static str {
    match code {
        // Device unlicensed, system or MPS not ready, unknown: the driver did not start.
        102 | 304 | 802 | 805..=810 | 999 => {
            "the driver is not ready: see `nvidia-smi`; a reboot may help"
        }
        803 => "the driver's library and kernel module differ: reboot after a driver update",
        804 => "this GPU cannot use the CUDA compatibility package in LD_LIBRARY_PATH: remove it",
        221 | 223 => {
            "the GPU needs kernels compiled for it: build with SEGATTN_CUDA_ARCHS naming its architecture"
        }
        701 => "the kernel needs more registers than the GPU has: build for its architecture",
        // Stream capture.
        900..=908 => "while a stream is captured call `launch` of a plan, after one `run` outside",
        _ => {
            "see `segattn doctor`; if it finds no fault of the machine, please report this as a bug"
        }
    }
}

impl Error {
    /// The error of a `CUresult`. `memory` gives (free, total) bytes; it is called only for [`Error::OutOfMemory`].
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

    /// Whether the error means that the machine has no usable GPU.
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
                .ends_with("reboot after a driver update")
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
                .contains("supports CUDA 12.8, but the kernels were compiled by CUDA 13.0")
        );
        assert!(error.to_string().contains("or later (driver 580 or newer)"));
    }
}
