//! What a pool of fewer bits holds (docs/contract.md, section 2).

use half::bf16;

/// A group of elements as a pool holds it: multiples of a step up to `limit`; `narrow`: in bf16.
pub fn rounded(group: &[f32], limit: f32, narrow: bool) -> Vec<f32> {
    if group.iter().any(|x| !x.is_finite()) {
        return vec![f32::NAN; group.len()];
    }
    let largest = group.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let step = largest / limit;
    let one = |x: &f32| {
        let n = (x / step).round_ties_even().clamp(-limit, limit);
        // An integer has no negative zero.
        let x = if step == 0.0 { 0.0 } else { n * step + 0.0 };
        if narrow {
            bf16::from_f32(x).to_f32()
        } else {
            x
        }
    };
    group.iter().map(one).collect()
}
