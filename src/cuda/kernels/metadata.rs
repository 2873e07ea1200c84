//! Kernel metadata for planning without a GPU: the constants `<entry>_info`.

mod table;

use super::error::Error;
use super::launcher::Kernels;
use super::params::{SegattnKernelInfo, SegattnTensorMap};
use super::registry::Entry;
use super::tensor_map::BoxedTensor;
use table::METADATA;

/// Kernel metadata for planning without a GPU. Nothing can be launched.
#[derive(Debug, Clone, Copy)]
pub struct KernelMetadata {
    /// Multiprocessors of the GPU: 132 of an H100 or H200, 108 of an A100.
    pub multiprocessors: u32,
    /// Whether it is an H100 or H200, which have kernels of their own.
    pub hopper: bool,
}

impl Kernels for KernelMetadata {
    fn info(&self, entry: Entry) -> Result<SegattnKernelInfo, Error> {
        match METADATA.binary_search_by_key(&entry.name, |(name, _)| name) {
            Ok(found) => Ok(bytemuck::cast(METADATA[found].1)),
            Err(_) => Err(Error::Launcher {
                entry: entry.name.into(),
                source: "no such kernel is known".into(),
            }),
        }
    }

    fn ready(&self, _: Entry) -> Result<(), Error> {
        Ok(())
    }

    fn resident_blocks(&self, _: Entry, info: &SegattnKernelInfo) -> Result<u32, Error> {
        // What the kernels are compiled for (`__launch_bounds__`); registers and shared memory allow no more.
        Ok((info.blocks_per_multiprocessor as u32 * self.multiprocessors).max(1))
    }

    fn hopper(&self) -> bool {
        self.hopper
    }

    fn tensor_map(&self, _: &BoxedTensor) -> Result<Option<SegattnTensorMap>, Error> {
        Ok(Some(SegattnTensorMap::NONE))
    }
}
