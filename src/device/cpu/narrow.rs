//! Numbers of 16 bits in memory, for weights that are only read: each is widened where it is used, which is exact.

use half::{bf16, f16};

use super::buffer::Aligned;

/// A format of 16 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// The upper half of single precision.
    Bf16,
    /// IEEE half precision.
    F16,
}

/// Numbers of one format, two in a word of the memory.
#[derive(Clone)]
pub(super) struct Narrow {
    words: Aligned,
    format: Format,
}

impl Narrow {
    /// `values` in 16 bits, where that is exact for all of them in one format.
    pub(super) fn of(values: &[f32]) -> Option<Self> {
        let same = |wide: f32, x: &f32| wide.to_bits() == x.to_bits();
        let is_bf16 = values.iter().all(|x| x.to_bits() & 0xffff == 0);
        let is_f16 = || values.iter().all(|x| same(f16::from_f32(*x).to_f32(), x));
        let format = match is_bf16 {
            true => Format::Bf16,
            false if is_f16() => Format::F16,
            false => return None,
        };
        let mut narrow = Self {
            words: Aligned::zeroed(values.len().div_ceil(2)),
            format,
        };
        let bits: &mut [u16] = bytemuck::cast_slice_mut(&mut narrow.words);
        for (bits, x) in bits.iter_mut().zip(values) {
            *bits = match format {
                Format::Bf16 => bf16::from_f32(*x).to_bits(),
                Format::F16 => f16::from_f32(*x).to_bits(),
            };
        }
        Some(narrow)
    }

    /// Writes the numbers from `start` on to `to`.
    pub(super) fn widen(&self, start: usize, to: &mut [f32]) {
        let bits: &[u16] = bytemuck::cast_slice(&self.words);
        let bits = &bits[start..start + to.len()];
        match self.format {
            Format::Bf16 => widen_bf16(bits, to),
            Format::F16 => widen_f16(bits, to),
        }
    }

    /// The number at `i`.
    pub(super) fn get(&self, i: usize) -> f32 {
        let mut one = [0.0];
        self.widen(i, &mut one);
        one[0]
    }
}

fn widen_bf16(bits: &[u16], to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has the instructions.
        return unsafe { x86::widen_bf16(bits, to) };
    }
    plain_bf16(bits, to);
}

#[inline(always)]
fn plain_bf16(bits: &[u16], to: &mut [f32]) {
    for (x, bits) in to.iter_mut().zip(bits) {
        *x = f32::from_bits(u32::from(*bits) << 16);
    }
}

fn widen_f16(bits: &[u16], to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
        // SAFETY: the CPU has the instructions.
        return unsafe { x86::widen_f16(bits, to) };
    }
    for (x, bits) in to.iter_mut().zip(bits) {
        *x = f16::from_bits(*bits).to_f32();
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::f16;

    /// # Safety
    /// The CPU must have AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn widen_bf16(bits: &[u16], to: &mut [f32]) {
        super::plain_bf16(bits, to);
    }

    /// # Safety
    /// The CPU must have AVX2 and F16C.
    #[target_feature(enable = "avx2,f16c")]
    pub(super) unsafe fn widen_f16(bits: &[u16], to: &mut [f32]) {
        let (eights, rest) = to.as_chunks_mut::<8>();
        let (from, last) = bits.as_chunks::<8>();
        for (to, from) in eights.iter_mut().zip(from) {
            // SAFETY: both have eight numbers; the addresses need no alignment.
            unsafe {
                let halves = _mm_loadu_si128(from.as_ptr().cast());
                _mm256_storeu_ps(to.as_mut_ptr(), _mm256_cvtph_ps(halves));
            }
        }
        for (x, bits) in rest.iter_mut().zip(last) {
            *x = f16::from_bits(*bits).to_f32();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finite_number_of_16_bits_is_widened_to_itself() {
        for wide in [
            |bits| bf16::from_bits(bits).to_f32(),
            |bits| f16::from_bits(bits).to_f32(),
        ] {
            let all: Vec<f32> = (0..=u16::MAX).map(wide).filter(|x| x.is_finite()).collect();
            let narrow = Narrow::of(&all).expect("numbers of 16 bits");
            let mut back = vec![1.0; all.len()];
            narrow.widen(0, &mut back);
            let bits = |all: &[f32]| -> Vec<u32> { all.iter().map(|x| x.to_bits()).collect() };
            assert!(bits(&back) == bits(&all));
            assert_eq!(narrow.get(777).to_bits(), all[777].to_bits());
            let mut part = [0.0; 13];
            narrow.widen(101, &mut part);
            assert_eq!(bits(&part), bits(&all[101..114]));
        }
    }

    #[test]
    fn what_no_format_holds_is_not_narrowed() {
        // The second is a BF16 number and no F16 number, the first the other way round.
        assert!(Narrow::of(&[1.0 + 2f32.powi(-10), 2f32.powi(100)]).is_none());
        assert!(Narrow::of(&[0.1]).is_none());
        assert_eq!(Narrow::of(&[2f32.powi(100)]).unwrap().format, Format::Bf16);
        assert_eq!(
            Narrow::of(&[1.0 + 2f32.powi(-10)]).unwrap().format,
            Format::F16
        );
    }
}
