//! Random weights in every stored form, from a seed.

use half::{bf16, f16};
use trustformers_plan::DType;

/// A small generator whose numbers are the same everywhere.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    /// A generator that begins at `seed`.
    #[must_use]
    pub const fn seeded(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 31 random bits.
    pub fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    /// The next number in -1..1.
    pub fn signed(&mut self) -> f32 {
        self.bits() as f32 / 1_073_741_824.0 - 1.0
    }
}

/// The bytes of `elements` random weights of about -0.3..0.3, stored as `dtype`. Scales are chosen so that the mean is
/// zero and a few layers stay tame; all bits of the quants are used.
#[must_use]
pub fn bytes(dtype: DType, elements: usize, dice: &mut Dice) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(elements / dtype.block_len() * dtype.block_bytes());
    for _ in 0..elements / dtype.block_len() {
        push_block(dtype, dice, &mut bytes);
    }
    bytes
}

fn push_block(dtype: DType, dice: &mut Dice, bytes: &mut Vec<u8>) {
    let start = bytes.len();
    let float = dice.signed();
    let mut half = |value: f32| bytes.extend(f16::from_f32(value).to_le_bytes());
    // The size of a quant's step, by up to a half more.
    let step = |base: f32| base * (1.0 + float.abs() / 2.0);
    match dtype {
        DType::F32 => bytes.extend((float * 0.3).to_le_bytes()),
        DType::F16 => half(float * 0.3),
        DType::BF16 => bytes.extend(bf16::from_f32(float * 0.3).to_le_bytes()),
        DType::Q8_0 => half(step(0.002)),
        DType::Q4_0 => half(step(0.03)),
        DType::Q5_0 => half(step(0.015)),
        // The middle of 0..=15 is moved to zero.
        DType::Q4_1 => {
            half(step(0.03));
            half(step(0.03) * -7.5);
        }
        // Sub-blocks have scales and minima of 0..=63 each: 63 · 15 steps make 0.3, and the means cancel.
        DType::Q4_K => {
            half(step(0.0004));
            half(step(0.0004) * 7.5);
        }
        DType::Q5_K => {
            half(step(0.0002));
            half(step(0.0002) * 15.5);
        }
        // Its scale comes last.
        DType::Q6_K => {}
    }
    let end = start + dtype.block_bytes();
    let quants_end = if dtype == DType::Q6_K { end - 2 } else { end };
    while bytes.len() < quants_end {
        bytes.push(dice.bits() as u8);
    }
    if dtype == DType::Q6_K {
        // 127 · 32 steps make 0.3.
        bytes.extend(f16::from_f32(step(0.000_08)).to_le_bytes());
    }
}
