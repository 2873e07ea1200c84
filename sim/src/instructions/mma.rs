//! The arithmetic of mma.sync and the data movement of ldmatrix and stmatrix, by the fragment layouts of the PTX
//! manual (sections "Matrix fragments for mma.m16n8k16" and "ldmatrix").

use half::f16;

use super::collective::Operands;

/// The two 16-bit elements of a register.
fn pair(register: u32, bf16: bool) -> [f32; 2] {
    let decode = |bits: u16| {
        if bf16 {
            f32::from_bits(u32::from(bits) << 16)
        } else {
            f16::from_bits(bits).to_f32()
        }
    };
    [decode(register as u16), decode((register >> 16) as u16)]
}

/// d += a b for one warp: a 16x16, b 16x8, products summed in order of k.
///
/// # Safety
/// Every pointer refers to the live `Operands::Mma` of a waiting lane, whose register arrays hold 4, 4 and 2 values.
pub(crate) unsafe fn m16n8k16(operands: &[*mut Operands; 32], bf16: bool) {
    let mut a = [[0f32; 16]; 16];
    let mut b = [[0f32; 8]; 16];
    let mut accumulators = [std::ptr::null_mut::<f32>(); 32];
    for (lane, &operand) in operands.iter().enumerate() {
        // SAFETY: by contract.
        let Operands::Mma { d, a: ra, b: rb } = (unsafe { &*operand }) else {
            return;
        };
        accumulators[lane] = *d;
        let (group, column) = (lane / 4, lane % 4 * 2);
        for i in 0..4 {
            // SAFETY: by contract.
            let [low, high] = pair(unsafe { *ra.add(i) }, bf16);
            let (row, k) = (group + i % 2 * 8, column + i / 2 * 8);
            (a[row][k], a[row][k + 1]) = (low, high);
        }
        for i in 0..2 {
            // SAFETY: by contract.
            let [low, high] = pair(unsafe { *rb.add(i) }, bf16);
            (b[column + i * 8][group], b[column + i * 8 + 1][group]) = (low, high);
        }
    }
    for (row, a_row) in a.iter().enumerate() {
        let mut sums = [0f32; 8];
        for (&x, b_row) in a_row.iter().zip(&b) {
            for (sum, &y) in sums.iter_mut().zip(b_row) {
                *sum += x * y;
            }
        }
        for (column, sum) in sums.iter().enumerate() {
            let lane = row % 8 * 4 + column / 2;
            // SAFETY: by contract; four accumulators a lane.
            unsafe { *accumulators[lane].add(column % 2 + row / 8 * 2) += sum };
        }
    }
}

/// Moves `count` 8x8 matrices between shared memory and registers.
///
/// # Safety
/// The first `8 * count` rows are addresses of 16 accessible bytes; every register pointer holds `count` values.
pub(crate) unsafe fn move_matrices(
    rows: &[usize; 32],
    registers: &[*mut u32; 32],
    count: usize,
    transpose: bool,
    load: bool,
) {
    for (lane, &lane_registers) in registers.iter().enumerate() {
        for matrix in 0..count {
            for half in 0..2 {
                let (major, minor) = (lane / 4, lane % 4 * 2 + half);
                let (row, column) = if transpose {
                    (minor, major)
                } else {
                    (major, minor)
                };
                let element = (rows[matrix * 8 + row] + column * 2) as *mut u16;
                // SAFETY: by contract; a register is two 16-bit halves, the low one first.
                unsafe {
                    let register = lane_registers.add(matrix).cast::<u16>().add(half);
                    if load {
                        register.write(element.read_unaligned());
                    } else {
                        element.write_unaligned(register.read());
                    }
                }
            }
        }
    }
}
