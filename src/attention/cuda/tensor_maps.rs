//! The tensor maps of a forward call on Hopper: what its bulk copies know of Q, K and V.

use super::tensor::Tensor;
use super::workspace::{Address, Bases, Workspace};
use crate::attention::layout::{Batch, Layout};
use crate::attention::problem::Problem;
use crate::cuda::kernels::params::{
    SegattnForwardParams, SegattnHopperForwardParams, SegattnTensorMap,
};
use crate::cuda::kernels::{self, BoxedTensor, Kernels};

/// Tensors of a problem.
const MAPS: usize = 7;
/// Elements of a panel of a tile, and so of a map's innermost dimension.
const PANEL: usize = 64;

/// A problem's maps, in the order of its tensors. A tensor without rows, or with strides that a map cannot have, has
/// none: its rows are copied by other instructions, with the same result.
#[derive(Debug)]
pub(super) struct TensorMaps {
    maps: [SegattnTensorMap; MAPS],
    mapped: u32,
    batch_coordinates: Address,
}

impl TensorMaps {
    /// Maps of a validated problem, for copies of `rows` rows of a head.
    pub fn new(
        problem: &Problem<'_, Tensor<'_>>,
        rows: u32,
        workspace: &mut Workspace,
        kernels: &impl Kernels,
    ) -> Result<Self, kernels::Error> {
        let mut maps = [SegattnTensorMap::NONE; MAPS];
        let mut mapped = 0;
        let mut coordinates = vec![[0i32; MAPS]; problem.batch()];
        for (i, (_, tensor)) in problem.tensors().into_iter().enumerate() {
            let boxed = tensor.and_then(|tensor| Some((tensor, boxed(tensor, rows)?)));
            let Some((tensor, (boxed, unit))) = boxed else {
                continue;
            };
            let Some(map) = kernels.tensor_map(&boxed)? else {
                continue;
            };
            maps[i] = map;
            mapped |= 1 << i;
            for (b, coordinates) in coordinates.iter_mut().enumerate() {
                // Below the dimension's size, which `boxed` has checked.
                coordinates[i] = coordinate(&tensor.layout, unit, b) as i32;
            }
        }
        Ok(TensorMaps {
            maps,
            mapped,
            batch_coordinates: workspace.upload(&coordinates),
        })
    }

    pub fn fill(&self, forward: SegattnForwardParams, bases: Bases) -> SegattnHopperForwardParams {
        SegattnHopperForwardParams {
            maps: self.maps,
            forward,
            batch_coordinates: self.batch_coordinates.at(bases),
            mapped: self.mapped,
        }
    }
}

/// Elements from one coordinate of the batch to the next: batch elements that lie anywhere begin at multiples of it.
fn batch_unit(layout: &Layout<'_>) -> usize {
    match layout.batch {
        Batch::Stride { stride, .. } => stride,
        Batch::Offsets(offsets) => offsets.iter().fold(0, |unit, &x| gcd(unit, x)),
        Batch::Packed(_) => layout.row_stride,
    }
}

fn coordinate(layout: &Layout<'_>, unit: usize, batch_index: usize) -> usize {
    match layout.batch {
        Batch::Stride { .. } => batch_index,
        Batch::Offsets(offsets) => offsets[batch_index].checked_div(unit).unwrap_or(0),
        Batch::Packed(offsets) => offsets[batch_index],
    }
}

/// The tensor as a map sees it, and its batch unit; `None` if it cannot have one.
fn boxed(tensor: &Tensor<'_>, rows: u32) -> Option<(BoxedTensor, usize)> {
    let layout = &tensor.layout;
    let unit = batch_unit(layout);
    let most = (0..layout.batch.len())
        .map(|b| coordinate(layout, unit, b))
        .max()?;
    let panels = layout.head_dim / PANEL;
    let dims = [PANEL, layout.rows, panels, layout.heads, most + 1].map(|n| n as u64);
    let strides = [layout.row_stride, PANEL, layout.head_stride, unit];
    let strides = std::array::from_fn(|i| match dims[i + 1] {
        // Never used, so it may be what a map cannot have.
        1 => (2 * PANEL) as u64,
        _ => 2 * strides[i] as u64,
    });
    let boxed = BoxedTensor {
        data: tensor.data,
        dims,
        strides,
        box_dims: [PANEL as u32, rows, panels as u32, 1, 1],
    };
    // Coordinates are signed.
    let fits = boxed.is_mappable() && dims.iter().all(|&n| n <= i32::MAX as u64);
    fits.then_some((boxed, unit))
}

fn gcd(a: usize, b: usize) -> usize {
    match b {
        0 => a,
        b => gcd(b, a % b),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::cuda::Dtype;

    fn tensor(layout: Layout<'_>) -> Tensor<'_> {
        Tensor {
            data: 4096,
            len: usize::MAX,
            dtype: Dtype::Bf16,
            layout,
        }
    }

    #[test]
    fn batch_elements_anywhere_have_coordinates_in_units_that_divide_their_offsets() {
        let layout = Layout {
            rows: 300,
            heads: 2,
            head_dim: 128,
            row_stride: 256,
            head_stride: 128,
            batch: Batch::Offsets(&[480, 0, 1 << 20]),
        };
        let (map, unit) = boxed(&tensor(layout), 64).expect("a map");
        assert_eq!(unit, 32);
        assert_eq!(map.dims, [64, 300, 2, 2, (1 << 15) + 1]);
        assert_eq!(map.strides, [512, 128, 256, 64]);
        assert_eq!(map.box_dims, [64, 64, 2, 1, 1]);
        let coordinates = [0, 1, 2].map(|b| coordinate(&layout, unit, b));
        assert_eq!(coordinates, [15, 0, 1 << 15]);
    }

    #[test]
    fn one_element_of_a_dimension_needs_no_stride_and_several_need_one() {
        let layout = |heads, stride| Layout {
            rows: 64,
            heads,
            head_dim: 64,
            row_stride: 64,
            head_stride: 0,
            batch: Batch::Stride { len: 1, stride },
        };
        let (map, _) = boxed(&tensor(layout(1, 0)), 64).expect("a map");
        assert_eq!(map.strides, [128; 4]);
        assert!(boxed(&tensor(layout(2, 0)), 64).is_none());
        let empty = Layout {
            rows: 0,
            ..layout(1, 0)
        };
        assert!(boxed(&tensor(empty), 64).is_none());
        let unaligned = Layout {
            row_stride: 68,
            ..layout(1, 0)
        };
        assert!(boxed(&tensor(unaligned), 64).is_none());
    }
}
