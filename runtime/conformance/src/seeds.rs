//! Random weights of every stored type, from a seed.

use half::{bf16, f16};
use trustformers_plan::{DType, seeded::SeededRng};

/// The bytes of `elements` random weights of about -0.3..0.3, stored as `dtype`. The scales make the mean
/// zero and keep the values of a few layers in range; all bits of the quants are random.
#[must_use]
pub fn bytes(dtype: DType, elements: usize, rng: &mut SeededRng) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(elements / dtype.block_len() * dtype.block_bytes());
    for _ in 0..elements / dtype.block_len() {
        push_block(dtype, rng, &mut bytes);
    }
    bytes
}

fn push_block(dtype: DType, rng: &mut SeededRng, bytes: &mut Vec<u8>) {
    let start = bytes.len();
    let float = rng.next_signed();
    let mut half = |value: f32| bytes.extend(f16::from_f32(value).to_le_bytes());
    // The distance between two quants, enlarged by up to a half.
    let step = |base: f32| base * (1.0 + float.abs() / 2.0);
    match dtype {
        DType::F32 => bytes.extend((float * 0.3).to_le_bytes()),
        DType::F16 => half(float * 0.3),
        DType::BF16 => bytes.extend(bf16::from_f32(float * 0.3).to_le_bytes()),
        DType::Q8_0 => half(step(0.002)),
        DType::Q4_0 => half(step(0.03)),
        DType::Q5_0 => half(step(0.015)),
        // The minimum moves the middle of 0..=15 to zero.
        DType::Q4_1 => {
            half(step(0.03));
            half(step(0.03) * -7.5);
        }
        // Sub-blocks have scales and minima of 0..=63: 63 · 15 distances make 0.3, and the means cancel.
        DType::Q4_K => {
            half(step(0.0004));
            half(step(0.0004) * 7.5);
        }
        DType::Q5_K => {
            half(step(0.0002));
            half(step(0.0002) * 15.5);
        }
        // Its scale is stored last.
        DType::Q6_K => {}
    }
    let end = start + dtype.block_bytes();
    let quants_end = if dtype == DType::Q6_K { end - 2 } else { end };
    while bytes.len() < quants_end {
        bytes.push(rng.next_u8());
    }
    if dtype == DType::Q6_K {
        // 127 · 32 distances make 0.3.
        bytes.extend(f16::from_f32(step(0.000_08)).to_le_bytes());
    }
}
