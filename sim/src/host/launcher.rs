//! The simulated GPU behind the crate's own host side: plans of `segattn::attention::cuda` run here unchanged.

use std::path::Path;
use std::sync::{Arc, Mutex};

use segattn::cuda::kernels::{
    BoxedTensor, DeviceLayout, Entry, Error, File, Launch, Launcher, SegattnKernelInfo,
    SegattnTensorMap,
};

use crate::host::gpu::Gpu;
use crate::host::module::{Kernel, Module, Source};
use crate::instructions::tensor_map::TensorMap;

/// The kernels of a folder, each file compiled when it is first asked for, and how many blocks of any of them are
/// resident at once.
#[derive(Debug)]
pub struct Kernels {
    files: [Lazy; File::ALL.len()],
    resident_blocks: u32,
    hopper: bool,
    tensor_maps: bool,
}

/// A source and, once needed, what was compiled from it.
#[derive(Debug)]
struct Lazy {
    source: Source,
    module: Mutex<Option<Arc<Module>>>,
}

impl Kernels {
    /// The files of the folder `kernels`, with checks.
    pub fn new(kernels: &Path) -> Kernels {
        Kernels::from_sources(|file| Source::new(kernels.join(file.stem()).with_extension("cu")))
    }

    /// Kernels from sources of one's own: other texts, flags, or folders.
    pub fn from_sources(source: impl Fn(File) -> Source) -> Kernels {
        Kernels {
            files: File::ALL.map(|file| Lazy {
                source: source(file),
                module: Mutex::new(None),
            }),
            resident_blocks: 3,
            hopper: false,
            tensor_maps: true,
        }
    }

    /// The same as a device that has the kernels written for Hopper, which come first then.
    pub fn hopper(self) -> Kernels {
        Kernels {
            hopper: true,
            ..self
        }
    }

    /// The same where no tensor has a tensor map.
    pub fn without_tensor_maps(self) -> Kernels {
        Kernels {
            tensor_maps: false,
            ..self
        }
    }

    /// Whether a file compiles.
    pub fn compiles(&self, file: File) -> bool {
        self.module(file).is_ok()
    }

    fn module(&self, file: File) -> Result<Arc<Module>, Error> {
        let found = File::ALL.iter().position(|&other| other == file);
        let lazy = found.map(|index| &self.files[index]);
        let lazy = lazy.ok_or_else(|| failed(file.stem(), "not in the list of all files"))?;
        // What a panicking thread left behind is a module or none.
        let mut module = lazy.module.lock().unwrap_or_else(|lock| lock.into_inner());
        if let Some(module) = &*module {
            return Ok(module.clone());
        }
        let compiled = Module::compile(&lazy.source).map_err(|error| failed(file.stem(), error))?;
        if file.has_layout() {
            let layout = compiled.constant::<DeviceLayout>(&DeviceLayout::name(file));
            let layout = layout.map_err(|error| failed(file.stem(), error))?;
            layout.check(file)?;
        }
        Ok(module.insert(compiled).clone())
    }

    fn kernel(&self, entry: Entry) -> Result<Kernel, Error> {
        let found = self.module(entry.file)?.kernel(entry.name);
        found.map_err(|error| failed(entry.name, error))
    }
}

impl segattn::cuda::kernels::Kernels for Kernels {
    fn info(&self, entry: Entry) -> Result<SegattnKernelInfo, Error> {
        let name = format!("{}_info", entry.name);
        let info = self.module(entry.file)?.constant::<[i32; 7]>(&name);
        let info = info.map_err(|error| failed(entry.name, error))?;
        let [
            threads,
            shared_bytes,
            blocks,
            tile_rows,
            key_rows,
            split_keys,
            params_bytes,
        ] = info;
        Ok(SegattnKernelInfo {
            threads,
            shared_bytes,
            blocks_per_multiprocessor: blocks,
            tile_rows,
            key_rows,
            split_keys,
            params_bytes,
        })
    }

    fn ready(&self, entry: Entry) -> Result<(), Error> {
        self.kernel(entry).map(|_| ())
    }

    fn resident_blocks(&self, _: Entry, _: &SegattnKernelInfo) -> Result<u32, Error> {
        Ok(self.resident_blocks)
    }

    fn hopper(&self) -> bool {
        self.hopper
    }

    fn tensor_map(&self, tensor: &BoxedTensor) -> Result<Option<SegattnTensorMap>, Error> {
        let BoxedTensor {
            data,
            dims,
            strides,
            box_dims,
        } = tensor;
        if !self.tensor_maps {
            return Ok(None);
        }
        let map = TensorMap::new(*data as usize, 2, dims, strides, box_dims, 128);
        Ok(Some(
            map.map_err(|error| failed("tensor map", error))?.into(),
        ))
    }
}

/// A stream of a simulated GPU. What is asked of it is done when the call returns.
pub struct Stream<'a> {
    /// Where the memory is.
    pub gpu: &'a mut Gpu,
    /// What is launched.
    pub kernels: &'a Kernels,
}

impl Launcher for Stream<'_> {
    unsafe fn upload(&mut self, to: u64, bytes: &[u8]) -> Result<(), Error> {
        match self.gpu.locate(to as usize, bytes.len()) {
            Some((buffer, offset)) => {
                self.gpu.write(buffer, offset, bytes);
                Ok(())
            }
            None => Err(failed("upload", format!("{to:#x}: no buffer holds it"))),
        }
    }

    unsafe fn zero(&mut self, at: u64, bytes: usize) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { self.upload(at, &vec![0; bytes]) }
    }

    unsafe fn launch<P: Copy>(&mut self, launch: &Launch, params: &P) -> Result<(), Error> {
        let kernel = self.kernels.kernel(launch.entry)?;
        let (grid, block) = ([launch.blocks, 1, 1], [launch.threads, 1, 1]);
        let result = self
            .gpu
            .launch(&kernel, grid, block, launch.shared_bytes as usize, params);
        result.map_err(|error| failed(launch.entry.name, error))?;
        Ok(())
    }
}

fn failed(entry: &str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::Launcher {
        entry: entry.into(),
        source: source.into(),
    }
}
