//! Moves of rows, one after the other: for devices on which a call costs little.

use crate::device::{Accumulate, Device, Move, Result, RowsMut};

/// Each move as a rotation or as a copy.
pub(in crate::device) fn one_by_one<D: Device>(
    device: &D,
    moves: &[Move<'_, D::Buffer>],
    targets: &mut [&mut D::Buffer],
    head_dim: usize,
    tables: (&D::Buffer, &D::Buffer),
    inverse: bool,
    accumulate: Accumulate,
) -> Result<()> {
    for at in moves {
        let dst = RowsMut {
            buffer: &mut *targets[at.target],
            start: at.start,
            stride: at.stride,
        };
        match at.first_angle {
            Some(first) => {
                let angles: Vec<usize> = (first..first + at.rows).collect();
                device.rope(
                    at.src, dst, at.heads, head_dim, tables, &angles, inverse, accumulate,
                )?;
            }
            None => device.copy(at.src, dst, at.rows, at.heads * head_dim, accumulate)?,
        }
    }
    Ok(())
}
