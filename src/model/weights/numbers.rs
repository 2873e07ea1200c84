//! Numbers of weight files: exact into f32, to nearest (ties to even) out of it.

use half::{bf16, f16};

use super::header::FloatType;
use crate::model::config::WeightType;

/// Appends the numbers in `bytes`. Every F16 and BF16 number, subnormal ones too, is an f32; F64 is rounded to nearest.
pub(super) fn decode(format: FloatType, bytes: &[u8], values: &mut Vec<f32>) {
    match format {
        FloatType::F64 => {
            let numbers = bytes.as_chunks().0.iter();
            values.extend(numbers.map(|b| f64::from_le_bytes(*b) as f32));
        }
        FloatType::F32 => {
            values.extend(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)));
        }
        FloatType::F16 => {
            let numbers = bytes.as_chunks().0.iter();
            values.extend(numbers.map(|b| f16::from_le_bytes(*b).to_f32()));
        }
        FloatType::Bf16 => {
            let numbers = bytes.as_chunks().0.iter();
            values.extend(numbers.map(|b| bf16::from_le_bytes(*b).to_f32()));
        }
    }
}

/// Appends the numbers' bytes; the index of the first whose rounded value is not finite otherwise.
pub(super) fn encode(format: WeightType, values: &[f32], bytes: &mut Vec<u8>) -> Result<(), usize> {
    let finite = |(i, x): (usize, &f32)| match format {
        WeightType::F32 => (!x.is_finite()).then_some(i),
        WeightType::F16 => (!f16::from_f32(*x).is_finite()).then_some(i),
        WeightType::Bf16 => (!bf16::from_f32(*x).is_finite()).then_some(i),
    };
    if let Some(i) = values.iter().enumerate().find_map(finite) {
        return Err(i);
    }
    match format {
        WeightType::F32 => bytes.extend(values.iter().flat_map(|x| x.to_le_bytes())),
        WeightType::F16 => {
            bytes.extend(values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()))
        }
        WeightType::Bf16 => {
            bytes.extend(values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_and_brain_number_survives_both_ways() {
        for format in [WeightType::F16, WeightType::Bf16] {
            for bits in 0..=u16::MAX {
                let mut values = Vec::new();
                decode(format.into(), &bits.to_le_bytes(), &mut values);
                let mut bytes = Vec::new();
                match encode(format, &values, &mut bytes) {
                    Ok(()) => assert_eq!(bytes, bits.to_le_bytes(), "{format:?} {bits:#06x}"),
                    Err(i) => {
                        assert_eq!(i, 0);
                        assert!(!values[0].is_finite(), "{format:?} {bits:#06x}");
                    }
                }
            }
        }
    }

    #[test]
    fn decoding_is_exact_for_subnormal_numbers_and_keeps_what_is_not_a_number() {
        let mut values = Vec::new();
        let bits = [0x0001u16, 0x03ff, 0x8001, 0x7c00, 0x7e00];
        let bytes: Vec<u8> = bits.iter().flat_map(|b| b.to_le_bytes()).collect();
        decode(FloatType::F16, &bytes, &mut values);
        let unit = 2f32.powi(-24);
        assert_eq!(values[..3], [unit, 1023.0 * unit, -unit]);
        assert_eq!(values[3], f32::INFINITY);
        assert!(values[4].is_nan());
        values.clear();
        decode(FloatType::Bf16, &[0x01, 0x00], &mut values);
        assert_eq!(values, [f32::from_bits(0x0001_0000)]);
    }

    #[test]
    fn encoding_rounds_to_nearest_even_and_refuses_what_becomes_infinite() {
        let mut bytes = Vec::new();
        // 1 + 2^-8 and 1 + 3 * 2^-8 lie half way between two BF16 numbers.
        let ties = [1.0 + 2f32.powi(-8), 1.0 + 3.0 * 2f32.powi(-8)];
        encode(WeightType::Bf16, &ties, &mut bytes).unwrap();
        let mut values = Vec::new();
        decode(FloatType::Bf16, &bytes, &mut values);
        assert_eq!(values, [1.0, 1.0 + 2f32.powi(-6)]);
        bytes.clear();
        assert_eq!(
            encode(WeightType::F16, &[65504.0, 65520.0], &mut bytes),
            Err(1)
        );
        assert_eq!(encode(WeightType::Bf16, &[f32::MAX], &mut bytes), Err(0));
        assert_eq!(
            encode(WeightType::F32, &[0.0, f32::NAN], &mut bytes),
            Err(1)
        );
        assert!(bytes.is_empty());
    }
}
