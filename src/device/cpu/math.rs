//! Arithmetic of row-wise functions: an inlined exponential, sums in a fixed number of lanes, and one source compiled
//! for every instruction set.

/// Lanes of a reduction: element i belongs to lane i % 16 on every instruction set.
pub(super) const LANES: usize = 16;

/// Defines `fn name(isa, ...)`: the body compiled once per instruction set and chosen by `isa`,
/// which the CPU must have.
///
/// Rust does not reorder or fuse floating-point operations, so all versions give the same bits. Wider instruction sets
/// only compute more lanes at a time.
macro_rules! for_each_isa {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$doc])*
        fn $name(isa: $crate::isa::Isa, $($arg: $type),*) $(-> $result)? {
            #[inline(always)]
            fn body($($arg: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,avx512f")]
            fn avx512($($arg: $type),*) $(-> $result)? {
                body($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $type),*) $(-> $result)? {
                body($($arg),*)
            }

            match isa {
                // SAFETY: the instruction set comes from `Isa::best` or `Isa::available`.
                #[cfg(target_arch = "x86_64")]
                $crate::isa::Isa::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::isa::Isa::Avx2 => unsafe { avx2($($arg),*) },
                _ => body($($arg),*),
            }
        }
    };
}
pub(super) use for_each_isa;

/// eˣ to within 1.1 units in the last place, 0 and infinity where f32 ends, NaN for NaN.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2; the Taylor series of e^r up to r^7 / 7! is off by less than
/// 6e-9. 2^n is multiplied in two halves so that subnormal results are rounded once.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts; the first has few bits, so that n times it is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = (std::f64::consts::LN_2 - LN_2_HIGH as f64) as f32;

    let bounded = x.clamp(-104.5, 89.0);
    let rounded = bounded.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, bounded));
    let mut e = 1.0 / 5040.0;
    for term in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        e = r.mul_add(e, term);
    }
    let n = rounded.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    let y = e * power(n >> 1) * power(n - (n >> 1));
    if x.is_nan() { x } else { y }
}

/// The sum of the lanes, always paired the same way.
#[inline(always)]
pub(super) fn add_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// Sum over i of `term(i)`, in lanes.
#[inline(always)]
pub(super) fn sum_lanes<const N: usize>(
    rows: [&[f32]; N],
    term: impl Fn([f32; N], f32) -> f32,
) -> f32 {
    let mut lanes = [0f32; LANES];
    let len = rows[0].len();
    let whole = len - len % LANES;
    for at in (0..whole).step_by(LANES) {
        let chunks = rows.map(|row| &row[at..at + LANES]);
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane = term(chunks.map(|chunk| chunk[l]), *lane);
        }
    }
    for (lane, at) in lanes.iter_mut().zip(whole..len) {
        *lane = term(rows.map(|row| row[at]), *lane);
    }
    add_lanes(lanes)
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn exp_is_right_to_two_units_in_the_last_place_everywhere() {
        for pattern in (0..=u32::MAX).step_by(1009) {
            let x = f32::from_bits(pattern);
            let (got, expected) = (exp(x), (x as f64).exp());
            if x.is_nan() {
                assert!(got.is_nan());
                continue;
            }
            if expected > f32::MAX as f64 * (1.0 + 3e-8) {
                assert_eq!(got, f32::INFINITY, "exp({x})");
                continue;
            }
            let unit = (expected * 2f64.powi(-23)).max(2f64.powi(-149));
            assert!(
                (got as f64 - expected).abs() <= 1.1 * unit,
                "exp({x}) = {got}, not {expected}"
            );
        }
    }

    #[test]
    fn exp_is_exact_at_the_ends() {
        assert_eq!(exp(0.0).to_bits(), 1f32.to_bits());
        assert_eq!(exp(-0.0).to_bits(), 1f32.to_bits());
        assert_eq!(exp(f32::NEG_INFINITY).to_bits(), 0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(89.0), f32::INFINITY);
        assert_eq!(exp(-104.0), 0.0);
        assert_eq!(exp(-103.0).to_bits(), 1, "the smallest subnormal");
    }
}
