//! Rounding of what a pool holds, on devices with buffers in host memory (docs/contract.md, section 2).

use crate::device::PoolBits;

/// Consecutive elements that share a step.
const GROUP: usize = 32;

/// Rounds a key or a value of one head. `narrow` gives an element of the buffer.
pub fn round<T: Copy + Into<f64>>(head: &mut [T], bits: PoolBits, narrow: impl Fn(f64) -> T) {
    let Some(limit) = bits.limit().map(f64::from) else {
        return;
    };
    for group in head.chunks_mut(GROUP) {
        let step = step(group.iter().map(|x| (*x).into()), limit);
        for x in group {
            let n = match step {
                0.0 => 0.0,
                _ => f64::from(((*x).into() / step) as f32).round_ties_even(),
            };
            // An integer has no negative zero.
            *x = narrow(n.clamp(-limit, limit) * step + 0.0);
        }
    }
}

/// The step of a group: NaN where a number is not finite.
fn step(group: impl Iterator<Item = f64>, limit: f64) -> f64 {
    let largest = group.fold(0.0, |largest: f64, x| match x.is_finite() {
        // A NaN of before stays.
        true if largest >= x.abs() || largest.is_nan() => largest,
        true => x.abs(),
        false => f64::NAN,
    });
    f64::from((largest / limit) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounded(mut head: Vec<f64>, bits: PoolBits) -> Vec<f64> {
        round(&mut head, bits, |x| x);
        head
    }

    #[test]
    fn a_group_has_multiples_of_one_step() {
        let head: Vec<f64> = (0..40).map(|i| f64::from(i) - 11.0).collect();
        for (bits, limit) in [(PoolBits::Eight, 127.0), (PoolBits::Four, 7.0)] {
            let out = rounded(head.clone(), bits);
            for (group, out) in head.chunks(GROUP).zip(out.chunks(GROUP)) {
                let largest = group.iter().fold(0.0, |a: f64, x| a.max(x.abs()));
                let step = f64::from((largest / limit) as f32);
                for (x, out) in group.iter().zip(out) {
                    assert_eq!((out / step).fract(), 0.0, "{x}");
                    assert!((x - out).abs() <= step * 0.500_001, "{x} {out}");
                }
            }
        }
        assert_eq!(rounded(head.clone(), PoolBits::Sixteen), head);
    }

    #[test]
    fn ties_go_to_the_even_multiple_and_the_largest_stays() {
        let out = rounded(vec![7.0, 0.5, 1.5, 2.5, -0.5, -2.5], PoolBits::Four);
        assert_eq!(out, [7.0, 0.0, 2.0, 2.0, 0.0, -2.0]);
    }

    #[test]
    fn groups_of_zeros_and_steps_below_the_smallest_number() {
        assert_eq!(rounded(vec![0.0; 3], PoolBits::Eight), [0.0; 3]);
        let smallest = f64::from(f32::from_bits(1));
        assert_eq!(rounded(vec![smallest * 3.0], PoolBits::Four), [0.0]);
    }

    #[test]
    fn what_is_held_stays_what_it_is_in_16_bits_too() {
        let steps = (0..1 << 8).map(|i| 1.0 + f64::from(i) / f64::from(1 << 8));
        for (step, bits) in steps.flat_map(|s| [(s, PoolBits::Eight), (s, PoolBits::Four)]) {
            let narrow = |x: f64| half::bf16::from_f64(x).to_f64();
            let numbers = (0..32).map(|i| narrow(step * f64::from(i * i) / 3.0));
            let head: Vec<f64> = numbers.collect();
            let mut held = head.clone();
            round(&mut held, bits, narrow);
            let mut again = held.clone();
            round(&mut again, bits, narrow);
            assert_eq!(again, held, "{bits:?} {step}");
        }
    }

    #[test]
    fn a_number_that_is_not_finite_makes_its_group_nan_and_no_other() {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let mut head = vec![1.0; 64];
            head[40] = bad;
            let out = rounded(head, PoolBits::Eight);
            assert!(
                out[..32]
                    .iter()
                    .all(|x| *x == 1.0 || (x - 1.0).abs() < 0.01)
            );
            assert!(out[32..].iter().all(|x| x.is_nan()), "{bad}");
        }
    }
}
