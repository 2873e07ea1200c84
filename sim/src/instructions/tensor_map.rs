//! Tensor maps, and the chunks of 16 bytes that a box of a tensor consists of.

use segattn::cuda::kernels::SegattnTensorMap;

/// What cuTensorMapEncodeTiled was told; mirrored by `CUtensorMap` in simulator.h. All sizes innermost first.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default)]
pub struct TensorMap {
    base: u64,
    dims: [u64; 5],
    strides: [u64; 4],
    box_dims: [u32; 5],
    rank: u16,
    element_bytes: u16,
    swizzle_bytes: u16,
    is_f32: u16,
    unused: [u32; 5],
}

/// 16 bytes of shared memory and the part of them that lies inside the tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// Offset in the box's shared memory before swizzling.
    pub offset: usize,
    /// Bytes before the part inside.
    pub skip: usize,
    /// Bytes inside the tensor, from `global` on.
    pub valid: usize,
    pub global: usize,
}

/// Bytes of a chunk, the unit of swizzling.
pub(crate) const CHUNK: usize = 16;

impl TensorMap {
    /// A map of a tensor at address `base`: `dims` elements of `element_bytes`, `strides` in bytes of `dims[1..]`,
    /// copied in boxes of `box_dims`, with a swizzle of 0 or 128 bytes. `is_f32` is for reductions.
    ///
    /// # Errors
    /// What the driver would refuse, in words.
    pub fn new(
        base: usize,
        element_bytes: usize,
        dims: &[u64],
        strides: &[u64],
        box_dims: &[u32],
        swizzle_bytes: u16,
    ) -> Result<TensorMap, String> {
        let rank = dims.len();
        if !(1..=5).contains(&rank) || strides.len() + 1 != rank || box_dims.len() != rank {
            return Err(format!(
                "rank {rank} with {} strides and {} box sizes",
                strides.len(),
                box_dims.len()
            ));
        }
        let inner = box_dims[0] as usize * element_bytes;
        if !base.is_multiple_of(16)
            || strides
                .iter()
                .any(|s| !s.is_multiple_of(16) || *s >= 1 << 40)
        {
            return Err(format!(
                "base {base:#x} or strides {strides:?} are not multiples of 16 below 2^40"
            ));
        }
        if box_dims.iter().any(|&size| size == 0 || size > 256) || !inner.is_multiple_of(CHUNK) {
            return Err(format!(
                "box {box_dims:?}: sizes 1 to 256, the inner one a multiple of 16 bytes"
            ));
        }
        if !matches!(swizzle_bytes, 0 | 128) || (swizzle_bytes == 128 && inner > 128) {
            return Err(format!(
                "swizzle of {swizzle_bytes} bytes with an inner box of {inner} bytes"
            ));
        }
        let mut map = TensorMap {
            base: base as u64,
            rank: rank as u16,
            swizzle_bytes,
            ..TensorMap::default()
        };
        map.element_bytes = element_bytes as u16;
        map.is_f32 = u16::from(element_bytes == 4);
        map.dims[..rank].copy_from_slice(dims);
        map.strides[..rank - 1].copy_from_slice(strides);
        map.box_dims[..rank].copy_from_slice(box_dims);
        Ok(map)
    }

    /// Dimensions, and so coordinates.
    pub(crate) fn rank(&self) -> usize {
        self.rank as usize
    }

    /// Whether the chunks of a box are permuted within 1024 bytes.
    pub(crate) fn swizzled(&self) -> bool {
        self.swizzle_bytes == 128
    }

    /// Whether reductions add f32.
    pub(crate) fn is_f32(&self) -> bool {
        self.is_f32 != 0
    }

    /// The chunks of the box at `coordinates`.
    pub(crate) fn chunks(&self, coordinates: &[i32]) -> Vec<Chunk> {
        let rank = self.rank();
        let element = self.element_bytes as usize;
        let inner = self.box_dims[0] as usize * element;
        let rows = self.box_dims[1..rank]
            .iter()
            .map(|&size| size as usize)
            .product::<usize>();
        let mut chunks = Vec::with_capacity(rows * inner / CHUNK);
        for row in 0..rows {
            let start = self.row_start(row, coordinates);
            for at in (0..inner).step_by(CHUNK) {
                let first = i64::from(coordinates[0]) * element as i64 + at as i64;
                let end = (first + CHUNK as i64).clamp(0, self.dims[0] as i64 * element as i64);
                let begin = first.clamp(0, end);
                let valid = if start.is_some() {
                    (end - begin) as usize
                } else {
                    0
                };
                let global = start.unwrap_or(0).wrapping_add(begin as u64) as usize;
                chunks.push(Chunk {
                    offset: row * inner + at,
                    skip: (begin - first).clamp(0, 16) as usize,
                    valid,
                    global,
                });
            }
        }
        chunks
    }

    /// Address of a row of the box, if it lies inside the tensor.
    fn row_start(&self, mut row: usize, coordinates: &[i32]) -> Option<u64> {
        let mut address = self.base;
        let outer = self
            .dims
            .iter()
            .zip(&self.box_dims)
            .zip(coordinates)
            .skip(1);
        for (((&dim, &size), &at), &stride) in outer.zip(&self.strides).take(self.rank() - 1) {
            let index = i64::from(at) + (row % size as usize) as i64;
            row /= size as usize;
            let index = u64::try_from(index).ok().filter(|&index| index < dim)?;
            address += index * stride;
        }
        Some(address)
    }
}

impl From<TensorMap> for SegattnTensorMap {
    fn from(map: TensorMap) -> Self {
        // SAFETY: 128 bytes of integers each, none of them padding.
        unsafe { std::mem::transmute(map) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_outside_the_tensor_are_empty_and_partial_ones_cut() {
        let map = TensorMap::new(4096, 2, &[12, 3], &[64], &[16, 2], 0).expect("valid");
        let chunks = map.chunks(&[-4, 2]);
        let inside = |c: &Chunk| (c.offset, c.skip, c.valid, c.global);
        let rows: Vec<_> = chunks.iter().map(inside).collect();
        assert_eq!(
            rows[..2],
            [(0, 8, 8, 4096 + 128), (16, 0, 16, 4096 + 128 + 8)]
        );
        assert_eq!((chunks[2].valid, chunks[3].valid), (0, 0));
        assert_eq!(map.chunks(&[8, 0])[0].valid, 8);
        assert!(TensorMap::new(8, 2, &[12, 3], &[64], &[16, 2], 0).is_err());
        assert!(TensorMap::new(0, 2, &[12, 3], &[64], &[128, 2], 128).is_err());
    }
}
