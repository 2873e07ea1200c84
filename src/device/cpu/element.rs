//! Numbers of a packed matrix in memory: f32, or 16 bits for weights that are only read. Those are widened where they
//! are used, which is exact, so results have the bits of equal weights in f32.

use bytemuck::Pod;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

/// A number as it lies in memory.
pub(super) trait Element: Pod + Send + Sync {
    /// Of a number that the format holds.
    fn narrow(wide: f32) -> Self;

    /// The number itself.
    fn wide(self) -> f32;

    /// # Safety
    /// `from` must be valid for 8 numbers, of any alignment; the CPU must have AVX2 and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load8(from: *const Self) -> std::arch::x86_64::__m256;

    /// # Safety
    /// `from` must be valid for 16 numbers, of any alignment; the CPU must have AVX-512F.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load16(from: *const Self) -> std::arch::x86_64::__m512;

    /// The numbers of `block` in f32, for which `scratch` has room.
    fn widened<'a>(block: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        let wide = &mut scratch[..block.len()];
        widen(block, wide);
        wide
    }
}

impl Element for f32 {
    fn narrow(wide: f32) -> Self {
        wide
    }

    fn wide(self) -> f32 {
        self
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load8(from: *const Self) -> std::arch::x86_64::__m256 {
        // SAFETY: the caller's.
        unsafe { std::arch::x86_64::_mm256_loadu_ps(from) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load16(from: *const Self) -> std::arch::x86_64::__m512 {
        // SAFETY: the caller's.
        unsafe { std::arch::x86_64::_mm512_loadu_ps(from) }
    }

    fn widened<'a>(block: &'a [Self], _: &'a mut [f32]) -> &'a [f32] {
        block
    }
}

/// The upper half of single precision.
impl Element for bf16 {
    fn narrow(wide: f32) -> Self {
        Self::from_f32(wide)
    }

    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load8(from: *const Self) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::*;
        // SAFETY: the caller's.
        let halves = unsafe { _mm_loadu_si128(from.cast()) };
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load16(from: *const Self) -> std::arch::x86_64::__m512 {
        use std::arch::x86_64::*;
        // SAFETY: the caller's.
        let halves = unsafe { _mm256_loadu_si256(from.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
    }
}

/// IEEE half precision.
impl Element for f16 {
    fn narrow(wide: f32) -> Self {
        Self::from_f32(wide)
    }

    fn wide(self) -> f32 {
        self.to_f32()
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load8(from: *const Self) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::*;
        // SAFETY: the caller's.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load16(from: *const Self) -> std::arch::x86_64::__m512 {
        use std::arch::x86_64::*;
        // SAFETY: the caller's.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
}

fn widen<E: Element>(from: &[E], to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if crate::isa::Isa::best() != crate::isa::Isa::Portable {
        // SAFETY: every set but the portable one has AVX2 and F16C.
        return unsafe { widen_avx2(from, to) };
    }
    to.iter_mut().zip(from).for_each(|(to, x)| *to = x.wide());
}

/// # Safety
/// The CPU must have AVX2 and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
unsafe fn widen_avx2<E: Element>(from: &[E], to: &mut [f32]) {
    let (eights, rest) = to.as_chunks_mut::<8>();
    let (whole, last) = from.as_chunks::<8>();
    for (to, from) in eights.iter_mut().zip(whole) {
        // SAFETY: both have eight numbers, the CPU has the instructions.
        unsafe { std::arch::x86_64::_mm256_storeu_ps(to.as_mut_ptr(), E::load8(from.as_ptr())) };
    }
    rest.iter_mut().zip(last).for_each(|(to, x)| *to = x.wide());
}

/// A format of numbers in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    F32,
    Bf16,
    F16,
}

impl Format {
    /// The smallest that holds all of `values`.
    pub(super) fn of(values: &[f32]) -> Self {
        const PART: usize = 1 << 16;
        let all = |test: fn(&[f32]) -> bool| values.par_chunks(PART).all(test);
        if all(|part| part.iter().all(|x| x.to_bits() & 0xffff == 0)) {
            Self::Bf16
        } else if all(is_f16) {
            Self::F16
        } else {
            Self::F32
        }
    }
}

fn is_f16(values: &[f32]) -> bool {
    let mut halves = [f16::ZERO; 256];
    let mut back = [0f32; 256];
    values.chunks(256).all(|values| {
        let (halves, back) = (&mut halves[..values.len()], &mut back[..values.len()]);
        halves.convert_from_f32_slice(values);
        halves.convert_to_f32_slice(back);
        let same = |(x, y): (&f32, &f32)| x.to_bits() == y.to_bits();
        values.iter().zip(&*back).all(same)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn comes_back<E: Element>(wide: impl Fn(u16) -> f32, format: Format) {
        let all: Vec<f32> = (0..=u16::MAX).map(wide).filter(|x| x.is_finite()).collect();
        assert_eq!(Format::of(&all), format);
        let narrow: Vec<E> = all.iter().map(|x| E::narrow(*x)).collect();
        let bits = |all: &[f32]| -> Vec<u32> { all.iter().map(|x| x.to_bits()).collect() };
        for range in [0..all.len(), 101..114] {
            let mut back = vec![1.0; range.len()];
            let wide = E::widened(&narrow[range.clone()], &mut back);
            assert!(bits(wide) == bits(&all[range]));
        }
        let one_by_one: Vec<f32> = narrow.iter().map(|x| x.wide()).collect();
        assert!(bits(&one_by_one) == bits(&all));
    }

    #[test]
    fn every_finite_number_of_16_bits_is_widened_to_itself() {
        comes_back::<bf16>(|bits| bf16::from_bits(bits).to_f32(), Format::Bf16);
        comes_back::<f16>(|bits| f16::from_bits(bits).to_f32(), Format::F16);
    }

    #[test]
    fn what_no_format_of_16_bits_holds_stays_wide() {
        // The second is a bf16 number and no f16 number, the first the other way round.
        let (exact, large) = (1.0 + 2f32.powi(-10), 2f32.powi(100));
        assert_eq!(Format::of(&[exact, large]), Format::F32);
        assert_eq!(Format::of(&[0.1]), Format::F32);
        assert_eq!(Format::of(&[large]), Format::Bf16);
        assert_eq!(Format::of(&[exact]), Format::F16);
    }
}
