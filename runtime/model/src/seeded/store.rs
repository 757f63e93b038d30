//! Values as each type stores them, rounded to the nearest step of a block's own scale.
//!
//! Converters of real models search for better scales; a test model does not need them.

use half::{bf16, f16};
use std::ops::RangeInclusive;
use trustformers_plan::DType;

/// The bytes of `values`.
pub(super) fn store(values: &[f32], dtype: DType) -> Vec<u8> {
    let blocks = values.chunks_exact(dtype.block_len());
    assert!(blocks.remainder().is_empty(), "{} values are no whole {dtype} blocks", values.len());
    match dtype {
        DType::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
        DType::Q8_0 => blocks.flat_map(store_q8_0).collect(),
        DType::Q4_1 => blocks.flat_map(store_q4_1).collect(),
        DType::Q4_0 => blocks.flat_map(store_q4_0).collect(),
        DType::Q5_0 => blocks.flat_map(store_q5_0).collect(),
        DType::Q4_K => blocks.flat_map(|block| store_affine(block, 4)).collect(),
        DType::Q5_K => blocks.flat_map(|block| store_affine(block, 5)).collect(),
        DType::Q6_K => blocks.flat_map(store_q6_k).collect(),
    }
}

/// `value / step` to the nearest integer in `range`; zero where there is no step.
fn steps(value: f32, step: f32, range: RangeInclusive<f32>) -> f32 {
    let (least, most) = range.into_inner();
    if step == 0.0 { 0.0 } else { (value / step).round().clamp(least, most) }
}

fn largest(block: &[f32]) -> f32 {
    block.iter().fold(0.0, |largest, value| largest.max(value.abs()))
}

fn store_q8_0(block: &[f32]) -> Vec<u8> {
    let scale = f16::from_f32(largest(block) / 127.0);
    let quanta = block.iter().map(|value| steps(*value, scale.to_f32(), -127.0..=127.0) as i8);
    scale.to_le_bytes().into_iter().chain(quanta.map(i8::cast_unsigned)).collect()
}

/// The first half of the weights in the low four bits, the second in the high.
fn nibbles(quanta: &[u8]) -> impl Iterator<Item = u8> {
    let (low, high) = quanta.split_at(quanta.len() / 2);
    low.iter().zip(high).map(|(low, high)| low & 15 | (high & 15) << 4)
}

fn store_q4_1(block: &[f32]) -> Vec<u8> {
    let least = block.iter().copied().fold(f32::INFINITY, f32::min);
    let most = block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let (scale, minimum) = (f16::from_f32((most - least) / 15.0), f16::from_f32(least));
    let quantum = |value: &f32| steps(value - minimum.to_f32(), scale.to_f32(), 0.0..=15.0) as u8;
    let quanta: Vec<u8> = block.iter().map(quantum).collect();
    scale.to_le_bytes().into_iter().chain(minimum.to_le_bytes()).chain(nibbles(&quanta)).collect()
}

fn store_q4_0(block: &[f32]) -> Vec<u8> {
    let scale = f16::from_f32(largest(block) / 7.0);
    let quantum = |value: &f32| (steps(*value, scale.to_f32(), -8.0..=7.0) + 8.0) as u8;
    let quanta: Vec<u8> = block.iter().map(quantum).collect();
    scale.to_le_bytes().into_iter().chain(nibbles(&quanta)).collect()
}

fn store_q5_0(block: &[f32]) -> Vec<u8> {
    let scale = f16::from_f32(largest(block) / 15.0);
    let quantum = |value: &f32| (steps(*value, scale.to_f32(), -16.0..=15.0) + 16.0) as u8;
    let quanta: Vec<u8> = block.iter().map(quantum).collect();
    let fifth = quanta.iter().enumerate().fold(0u32, |bits, (j, q)| bits | u32::from(q >> 4) << j);
    scale.to_le_bytes().into_iter().chain(fifth.to_le_bytes()).chain(nibbles(&quanta)).collect()
}

/// `Q4_K` and `Q5_K`: sub-blocks of 32 with a scale and a minimum of 6 bits each.
fn store_affine(block: &[f32], bits: u32) -> Vec<u8> {
    let most_quanta = (1 << bits) - 1;
    let range = |sub: &[f32]| {
        let least = sub.iter().copied().fold(0.0, f32::min);
        let most = sub.iter().copied().fold(0.0, f32::max);
        ((most - least) / most_quanta as f32, -least)
    };
    let wanted: Vec<(f32, f32)> = block.chunks_exact(32).map(range).collect();
    let d = f16::from_f32(wanted.iter().fold(0.0, |d: f32, w| d.max(w.0)) / 63.0);
    let dmin = f16::from_f32(wanted.iter().fold(0.0, |d: f32, w| d.max(w.1)) / 63.0);
    let six = |value, step: f16| steps(value, step.to_f32(), 0.0..=63.0) as u8;
    let scales: Vec<(u8, u8)> = wanted.iter().map(|w| (six(w.0, d), six(w.1, dmin))).collect();
    let mut quanta = Vec::with_capacity(block.len());
    for (sub, (scale, min)) in block.chunks_exact(32).zip(&scales) {
        let (step, min) = (d.to_f32() * f32::from(*scale), dmin.to_f32() * f32::from(*min));
        quanta.extend(sub.iter().map(|value| steps(value + min, step, 0.0..=most_quanta as f32) as u8));
    }
    let mut bytes: Vec<u8> = d.to_le_bytes().into_iter().chain(dmin.to_le_bytes()).collect();
    let (first, last) = scales.split_at(4);
    bytes.extend(first.iter().zip(last).map(|(a, b)| a.0 | b.0 >> 4 << 6));
    bytes.extend(first.iter().zip(last).map(|(a, b)| a.1 | b.1 >> 4 << 6));
    bytes.extend(last.iter().map(|b| b.0 & 15 | (b.1 & 15) << 4));
    if bits == 5 {
        bytes.extend((0..32).map(|l| (0..8).fold(0, |byte, sub| byte | quanta[sub * 32 + l] >> 4 << sub)));
    }
    bytes.extend(quanta.chunks_exact(64).flat_map(nibbles));
    bytes
}

/// Sub-blocks of sixteen with a signed scale of 8 bits.
fn store_q6_k(block: &[f32]) -> Vec<u8> {
    let wanted: Vec<f32> = block.chunks_exact(16).map(|sub| largest(sub) / 31.0).collect();
    let d = f16::from_f32(largest(&wanted) / 127.0);
    let scales: Vec<i8> = wanted.iter().map(|w| steps(*w, d.to_f32(), 0.0..=127.0) as i8).collect();
    let quantum = |(i, value): (usize, &f32)| {
        (steps(*value, d.to_f32() * f32::from(scales[i / 16]), -32.0..=31.0) + 32.0) as u8
    };
    let quanta: Vec<u8> = block.iter().enumerate().map(quantum).collect();
    let mut bytes: Vec<u8> = quanta.chunks_exact(128).flat_map(nibbles).collect();
    for half in quanta.chunks_exact(128) {
        bytes.extend((0..32).map(|l| (0..4).fold(0, |byte, n| byte | half[n * 32 + l] >> 4 << (2 * n))));
    }
    bytes.extend(scales.into_iter().map(i8::cast_unsigned));
    bytes.extend(d.to_le_bytes());
    bytes
}
