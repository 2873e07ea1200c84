//! The addresses of a call: in the caller's memory, among the host values, or in the workspace.

use super::error::Error;
use super::tensor::DeviceSlice;
use crate::cuda::kernels;

/// Alignment of every array in the workspace, bytes.
const ALIGNMENT: usize = 256;

/// An address that is known now, or an offset to a base that [`Bases`] names later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Address {
    Device(u64),
    Value(usize),
    Workspace(usize),
}

/// The addresses of the host values' copy and of the workspace.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bases {
    pub values: u64,
    pub workspace: u64,
}

impl From<u64> for Bases {
    /// The host values are copied to the beginning of the workspace.
    fn from(workspace: u64) -> Self {
        Bases {
            values: workspace,
            workspace,
        }
    }
}

impl Address {
    pub const NULL: Address = Address::Device(0);

    /// The address, given the bases.
    pub fn at<T>(self, bases: impl Into<Bases>) -> *mut T {
        let bases = bases.into();
        let address = match self {
            Address::Device(address) => address,
            Address::Value(offset) => bases.values + offset as u64,
            Address::Workspace(offset) => bases.workspace + offset as u64,
        };
        address as usize as *mut T
    }
}

/// The layout of a workspace: the host values first, then the kernels' arrays.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    bytes: usize,
    uploads: Vec<u8>,
}

impl Workspace {
    /// Adds host values. Call it before any [`reserve`](Self::reserve).
    pub fn upload<T: bytemuck::NoUninit>(&mut self, values: &[T]) -> Address {
        debug_assert_eq!(self.bytes, self.uploads.len());
        self.uploads.resize(self.bytes.next_multiple_of(16), 0);
        let address = Address::Value(self.uploads.len());
        self.uploads.extend_from_slice(bytemuck::cast_slice(values));
        self.bytes = self.uploads.len();
        address
    }

    /// Adds an array of `product(counts)` elements of `size` bytes.
    pub fn reserve(
        &mut self,
        what: &'static str,
        size: usize,
        counts: &[usize],
    ) -> Result<Address, kernels::Error> {
        let begin = self.bytes.next_multiple_of(ALIGNMENT);
        let bytes = counts
            .iter()
            .try_fold(size, |bytes, &n| bytes.checked_mul(n));
        let end = bytes.and_then(|bytes| begin.checked_add(bytes));
        match end {
            Some(end) if end < isize::MAX as usize => self.bytes = end,
            _ => {
                return Err(kernels::Error::TooLarge {
                    what,
                    expected: isize::MAX as u64,
                    got: u64::MAX,
                });
            }
        }
        Ok(Address::Workspace(begin))
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn uploads(&self) -> &[u8] {
        &self.uploads
    }

    /// Checks the size and alignment of the caller's memory.
    pub fn check(&self, workspace: DeviceSlice) -> Result<(), Error> {
        let aligned = workspace.data.is_multiple_of(ALIGNMENT as u64) && workspace.data != 0;
        if self.bytes == 0 || (aligned && workspace.len >= self.bytes) {
            return Ok(());
        }
        Err(Error::Workspace {
            expected: self.bytes,
            got: workspace.len,
            address: workspace.data,
        })
    }
}
