//! For any machine: arrays that the compiler vectorizes for the target's baseline.

use super::{LANES, Lanes};

/// Sixteen lanes in an array.
#[derive(Clone, Copy)]
pub(in crate::attention::cpu) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        let mut lanes = self.0;
        for (lane, other) in lanes.iter_mut().zip(other.0) {
            *lane = f(*lane, other);
        }
        Portable(lanes)
    }
}

// SAFETY of all blocks below: no instruction set is needed, and the caller guarantees valid pointers.
impl Lanes for Portable {
    const BLOCK: usize = 1;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Portable([x; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { Portable(from.cast::<[f32; LANES]>().read()) }
    }

    #[inline(always)]
    unsafe fn load_half(from: *const f32) -> Self {
        let mut lanes = [0.0; LANES];
        lanes[..8].copy_from_slice(unsafe { &*from.cast::<[f32; 8]>() });
        Portable(lanes)
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { to.cast::<[f32; LANES]>().write(self.0) }
    }

    #[inline(always)]
    unsafe fn store_half(self, to: *mut f32) {
        unsafe { to.copy_from_nonoverlapping(self.0.as_ptr(), 8) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        let products = self.0.iter().zip(factor.0).zip(term.0);
        let mut lanes = [0.0; LANES];
        for (lane, ((a, b), c)) in lanes.iter_mut().zip(products) {
            *lane = a.mul_add(b, c);
        }
        Portable(lanes)
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        self.0
            .into_iter()
            .fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn round(self) -> Self {
        // After adding 1.5 * 2^23 no fraction bits are left, so the sum is rounded to an integer.
        const SHIFT: f32 = 12_582_912.0;
        self.zip(self, |x, _| (x + SHIFT) - SHIFT)
    }

    #[inline(always)]
    unsafe fn times_pow2(self, n: Self) -> Self {
        self.zip(n, |x, n| {
            x * f32::from_bits(((n as i32).wrapping_add(127) as u32) << 23)
        })
    }

    #[inline(always)]
    unsafe fn zero_where_below(self, x: Self, limit: Self) -> Self {
        let mut lanes = self.0;
        for (lane, (x, limit)) in lanes.iter_mut().zip(x.0.iter().zip(limit.0)) {
            *lane = if *x < limit { 0.0 } else { *lane };
        }
        Portable(lanes)
    }

    #[inline(always)]
    unsafe fn first(self, count: usize, fill: Self) -> Self {
        let mut lanes = fill.0;
        for (i, (lane, x)) in lanes.iter_mut().zip(self.0).enumerate() {
            *lane = if i < count { x } else { *lane };
        }
        Portable(lanes)
    }

    #[inline(always)]
    unsafe fn transpose(rows: &mut [Self; LANES]) {
        for row in 0..LANES {
            for column in 0..row {
                let (a, b) = (rows[row].0[column], rows[column].0[row]);
                rows[row].0[column] = b;
                rows[column].0[row] = a;
            }
        }
    }
}
