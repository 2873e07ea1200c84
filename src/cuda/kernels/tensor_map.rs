//! What a kernel's bulk copies need to know of a tensor: a tensor map, which the driver writes.

use super::params::SegattnTensorMap;

/// A tensor of 16-bit elements in device memory, and the box of it that one bulk copy moves to shared memory, swizzled
/// in units of 128 bytes. The innermost of the five dimensions comes first and is contiguous.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BoxedTensor {
    /// Device address of the first element, a multiple of 16.
    pub data: u64,
    /// Elements of each dimension.
    pub dims: [u64; 5],
    /// Bytes from one element of `dims[1..]` to the next, multiples of 16.
    pub strides: [u64; 4],
    /// Elements of the box; those of the innermost dimension have 128 bytes.
    pub box_dims: [u32; 5],
}

impl BoxedTensor {
    /// Whether the driver can describe the tensor: no dimension and no stride is 0 or too large.
    pub fn is_mappable(&self) -> bool {
        let aligned = |bytes: &u64| bytes.is_multiple_of(16);
        let dims = self.dims.iter().all(|&n| (1..=1 << 32).contains(&n));
        let strides = self
            .strides
            .iter()
            .all(|bytes| (1..1 << 40).contains(bytes));
        dims && strides && aligned(&self.data) && self.strides.iter().all(aligned)
    }
}

impl SegattnTensorMap {
    /// No map: no kernel may use it.
    pub const NONE: SegattnTensorMap = SegattnTensorMap { words: [0; 16] };
}
