//! The number formats of GGUF tensors, widened to f32: blocks of numbers that share scales (ggml's formats).
//!
//! Widening is the f32 arithmetic of the formats' definition, in the same order: scale times number, then minus
//! minimum.

use half::{bf16, f16};

/// How a tensor's numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of single precision.
    Bf16,
    /// 32 numbers of 4 bits, a scale.
    Q4_0,
    /// 32 numbers of 4 bits, a scale and a minimum.
    Q4_1,
    /// 32 numbers of 5 bits, a scale.
    Q5_0,
    /// 32 numbers of 5 bits, a scale and a minimum.
    Q5_1,
    /// 32 numbers of 8 bits, a scale.
    Q8_0,
    /// 256 numbers of 4 bits, eight scales and minimums of 6 bits.
    Q4K,
    /// 256 numbers of 5 bits, eight scales and minimums of 6 bits.
    Q5K,
    /// 256 numbers of 6 bits, sixteen scales of 8 bits.
    Q6K,
}

use BlockType::{Bf16, F16, F32, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};

/// Type, its id in a file, its name, numbers and bytes of a block.
const TYPES: [(BlockType, u32, &str, usize, usize); 11] = [
    (F32, 0, "F32", 1, 4),
    (F16, 1, "F16", 1, 2),
    (Q4_0, 2, "Q4_0", 32, 18),
    (Q4_1, 3, "Q4_1", 32, 20),
    (Q5_0, 6, "Q5_0", 32, 22),
    (Q5_1, 7, "Q5_1", 32, 24),
    (Q8_0, 8, "Q8_0", 32, 34),
    (Q4K, 12, "Q4_K", 256, 144),
    (Q5K, 13, "Q5_K", 256, 176),
    (Q6K, 14, "Q6_K", 256, 210),
    (Bf16, 30, "BF16", 1, 2),
];

impl BlockType {
    /// The type of an id in a file.
    pub fn from_id(id: u32) -> Option<Self> {
        TYPES.iter().find(|t| t.1 == id).map(|t| t.0)
    }

    /// The names of all types.
    pub fn names() -> String {
        TYPES.map(|t| t.2).join(", ")
    }

    fn row(self) -> &'static (BlockType, u32, &'static str, usize, usize) {
        // Every type stands in the table.
        TYPES.iter().find(|t| t.0 == self).unwrap_or(&TYPES[0])
    }

    /// Its name in GGUF.
    pub fn name(self) -> &'static str {
        self.row().2
    }

    /// Numbers and bytes of one block.
    pub fn block(self) -> (usize, usize) {
        (self.row().3, self.row().4)
    }

    /// Bytes of a tensor whose rows are whole blocks; `None` where they are not or the product overflows.
    pub fn bytes_of(self, shape: &[usize]) -> Option<u64> {
        let (numbers, bytes) = self.block();
        if !shape.last()?.is_multiple_of(numbers) {
            return None;
        }
        let all = shape
            .iter()
            .try_fold(1u64, |n, d| n.checked_mul(*d as u64))?;
        (all / numbers as u64).checked_mul(bytes as u64)
    }

    /// What [`Self::bytes_of`] asks for.
    pub fn row_rule(self) -> String {
        format!(
            "rows of a multiple of {} numbers for {}",
            self.block().0,
            self.name()
        )
    }

    /// Appends the numbers of whole blocks.
    pub fn widen(self, bytes: &[u8], values: &mut Vec<f32>) {
        for block in bytes.chunks_exact(self.block().1) {
            match self {
                F32 => values.push(f32::from_le_bytes([block[0], block[1], block[2], block[3]])),
                F16 => values.push(half_at(block, 0)),
                Bf16 => values.push(bf16::from_le_bytes([block[0], block[1]]).to_f32()),
                Q4_0 => nibbles(
                    &block[2..],
                    |q, _| half_at(block, 0) * (f32::from(q) - 8.0),
                    values,
                ),
                Q4_1 => {
                    let (scale, min) = (half_at(block, 0), half_at(block, 2));
                    nibbles(&block[4..], |q, _| scale * f32::from(q) + min, values);
                }
                Q5_0 => {
                    let (scale, high) = (half_at(block, 0), fifth_bits(block, 2));
                    let number = |q, i| scale * (f32::from(fifth(q, high, i)) - 16.0);
                    nibbles(&block[6..], number, values);
                }
                Q5_1 => {
                    let (scale, min, high) =
                        (half_at(block, 0), half_at(block, 2), fifth_bits(block, 4));
                    let number = |q, i| scale * f32::from(fifth(q, high, i)) + min;
                    nibbles(&block[8..], number, values);
                }
                Q8_0 => {
                    let scale = half_at(block, 0);
                    values.extend(
                        block[2..]
                            .iter()
                            .map(|q| scale * f32::from(q.cast_signed())),
                    );
                }
                Q4K => k_block(block, &block[16..], |_, _| 0, values),
                Q5K => {
                    let high = &block[16..48];
                    k_block(block, &block[48..], |part, i| high[i] >> part & 1, values);
                }
                Q6K => six_bits(block, values),
            }
        }
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn fifth_bits(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// Number `i` of a block with its fifth bit.
fn fifth(low: u8, high: u32, i: usize) -> u8 {
    low | ((high >> i & 1) as u8) << 4
}

/// 32 numbers in 16 bytes: the low halves first, then the high halves.
fn nibbles(bytes: &[u8], number: impl Fn(u8, usize) -> f32, values: &mut Vec<f32>) {
    values.extend(bytes.iter().enumerate().map(|(i, b)| number(b & 15, i)));
    values.extend(
        bytes
            .iter()
            .enumerate()
            .map(|(i, b)| number(b >> 4, i + 16)),
    );
}

/// Q4_K and Q5_K: eight parts of 32 numbers, each with a scale and a minimum of 6 bits; `high` gives the fifth bit of
/// number `i` of a part. Two parts share 32 bytes, low halves and high halves.
fn k_block(block: &[u8], low: &[u8], high: impl Fn(usize, usize) -> u8, values: &mut Vec<f32>) {
    let (scale, min, packed) = (half_at(block, 0), half_at(block, 2), &block[4..16]);
    for part in 0..8 {
        let (s, m) = match part {
            0..4 => (packed[part] & 63, packed[part + 4] & 63),
            _ => (
                packed[part + 4] & 15 | (packed[part - 4] >> 6) << 4,
                packed[part + 4] >> 4 | (packed[part] >> 6) << 4,
            ),
        };
        let (scale, min) = (scale * f32::from(s), min * f32::from(m));
        let bytes = &low[part / 2 * 32..part / 2 * 32 + 32];
        values.extend(bytes.iter().enumerate().map(|(i, b)| {
            let q = b >> (part % 2 * 4) & 15 | high(part, i) << 4;
            scale * f32::from(q) - min
        }));
    }
}

/// Q6_K: 128 bytes of low halves, 64 of upper two bits, 16 scales, one scale of these.
fn six_bits(block: &[u8], values: &mut Vec<f32>) {
    let scale = half_at(block, 208);
    for half in 0..2 {
        let (low, high) = (
            &block[half * 64..half * 64 + 64],
            &block[128 + half * 32..160 + half * 32],
        );
        let scales = &block[192 + half * 8..200 + half * 8];
        for part in 0..4 {
            values.extend((0..32).map(|i| {
                let four = low[part % 2 * 32 + i] >> (part / 2 * 4) & 15;
                let two = high[i] >> (part * 2) & 3;
                let q = (four | two << 4).cast_signed() - 32;
                scale * f32::from(scales[part * 2 + i / 16].cast_signed()) * f32::from(q)
            }));
        }
    }
}
