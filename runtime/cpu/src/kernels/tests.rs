//! Every tier's kernels against plain definitions in f64.

use std::sync::Arc;

use half::{bf16, f16};
use proptest::prelude::*;
use trustformers_plan::{AttentionShape, DType, KV_BLOCK_TOKENS, Weight};

use super::{
    Kernels,
    attention::{Attend, cache_index, partial_len},
    matmul::{MatMul, Rows, Target},
    quantise::QuantBuffer,
};
use crate::{Tier, memory::SharedF32, pack::Packed};

/// A small generator, so that failures repeat from their seed alone.
struct Dice(u64);

impl Dice {
    fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    /// In -1..1.
    fn float(&mut self) -> f32 {
        self.bits() as f32 / 1_073_741_824.0 - 1.0
    }

    fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.float()).collect()
    }

    fn block(&mut self, dtype: DType) -> Vec<u8> {
        let float = self.float();
        let half = |v: f32| f16::from_f32(v).to_le_bytes();
        let mut block: Vec<u8> = (0..dtype.block_bytes()).map(|_| self.bits() as u8).collect();
        match dtype {
            DType::F32 => block.copy_from_slice(&float.to_le_bytes()),
            DType::F16 => block.copy_from_slice(&half(float)),
            DType::BF16 => block.copy_from_slice(&bf16::from_f32(float).to_le_bytes()),
            DType::Q8_0 | DType::Q4_0 | DType::Q5_0 => block[..2].copy_from_slice(&half(float * 0.02)),
            DType::Q4_1 => {
                block[..2].copy_from_slice(&half(float * 0.02));
                block[2..4].copy_from_slice(&half(self.float() * 0.1));
            }
            DType::Q4_K | DType::Q5_K => {
                block[..2].copy_from_slice(&half(float * 0.001));
                block[2..4].copy_from_slice(&half(self.float() * 0.002));
            }
            DType::Q6_K => block[208..].copy_from_slice(&half(float * 0.0005)),
        }
        block
    }

    /// A stored matrix with every quant and sane scales.
    fn weight(&mut self, dtype: DType, rows: usize, cols: usize) -> Weight {
        let bytes: Vec<u8> = (0..rows * cols / dtype.block_len()).flat_map(|_| self.block(dtype)).collect();
        let range = 0..bytes.len();
        Weight::new("w", dtype, (rows, cols), Arc::new(bytes), range).unwrap()
    }
}

fn tiers() -> impl Iterator<Item = Tier> {
    Tier::ALL.into_iter().filter(|tier| tier.is_available())
}

/// One projection through a tier's kernel, with strides wider than the rows and a residual.
#[derive(Clone, Copy)]
struct Case<'a> {
    weight: &'a Weight,
    x: &'a [f32],
    rows: usize,
    residual: Option<&'a [f32]>,
    fast: bool,
}

impl Case<'_> {
    fn run(&self, tier: Tier) -> Vec<f32> {
        let (kernels, cols, features) = (Kernels::of(tier), self.weight.cols(), self.weight.rows());
        let packed = Packed::new(self.weight).unwrap();
        let panel = SharedF32::new("test", packed.blocks() * 32 * 16).unwrap();
        let memory = SharedF32::new("test", QuantBuffer::bytes(self.rows, cols).div_ceil(4)).unwrap();
        // Outputs have a column of their own on either side, which must stay as it is.
        let stride = features + 2;
        let mut out = vec![7.5f32; self.rows * stride];
        // SAFETY: all memory is as large as the kernels are told.
        unsafe {
            let buffer = QuantBuffer::new(memory.ptr().cast(), self.rows, cols / 32 * 32);
            if self.fast {
                (0..self.rows).for_each(|r| (kernels.quantise)(&buffer, r, self.x[r * cols..].as_ptr()));
            }
            // In two shares, as two threads would take them.
            let middle = packed.groups() / 2;
            for groups in [0..middle, middle..packed.groups()] {
                (kernels.matmul)(&MatMul {
                    matrix: &packed,
                    groups,
                    input: Rows { ptr: self.x.as_ptr(), stride: cols, count: self.rows },
                    quantised: self.fast.then(|| buffer.rows()),
                    target: Target {
                        ptr: out.as_mut_ptr().add(1),
                        stride,
                        residual: self.residual.map(|r| (r.as_ptr(), features)),
                    },
                    panel: panel.ptr(),
                });
            }
        }
        for row in out.chunks(stride) {
            assert_eq!((row[0], row[stride - 1]), (7.5, 7.5), "{tier} wrote beside its outputs");
        }
        out.chunks(stride).flat_map(|row| row[1..=features].to_vec()).collect()
    }

    /// The definition, and for each output the sum of absolute products, which bounds rounding.
    fn expected(&self) -> Vec<(f64, f64)> {
        let (cols, features) = (self.weight.cols(), self.weight.rows());
        let mut stored = vec![0.0; cols];
        let mut out = vec![(0.0, 0.0); self.rows * features];
        for f in 0..features {
            self.weight.dequantise_row(f, &mut stored);
            for r in 0..self.rows {
                let products =
                    stored.iter().zip(&self.x[r * cols..]).map(|(w, x)| f64::from(*w) * f64::from(*x));
                let residual = self.residual.map_or(0.0, |v| f64::from(v[r * features + f]));
                let size = products.clone().map(f64::abs).sum::<f64>() + residual.abs();
                out[r * features + f] = (products.sum::<f64>() + residual, size);
            }
        }
        out
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn exact_projections_follow_the_definition(
        seed in any::<u64>(), dtype in 0..DType::ALL.len(), rows in 1usize..10, blocks in 1usize..9, features in 1usize..70, add: bool,
    ) {
        let dtype = DType::ALL[dtype];
        let mut dice = Dice(seed);
        // Floats need no whole blocks.
        let cols = match dtype.block_len() {
            1 => 32 * blocks - dice.bits() as usize % 31,
            32 => 32 * blocks,
            len => len * blocks.div_ceil(4),
        };
        let weight = dice.weight(dtype, features, cols);
        let (x, residual) = (dice.floats(rows * cols), dice.floats(rows * features));
        let case = Case { weight: &weight, x: &x, rows, residual: add.then_some(&residual[..]), fast: false };
        let expected = case.expected();
        for tier in tiers() {
            let got = case.run(tier);
            for (i, (got, (want, size))) in got.iter().zip(&expected).enumerate() {
                let error = (f64::from(*got) - want).abs();
                prop_assert!(error <= 1e-6 * size + 1e-7, "{tier} {dtype} output {i}: {got} for {want}");
            }
            // Each row alone gives the same bits as in company.
            for r in 0..rows {
                let row = &x[r * cols..(r + 1) * cols];
                let beside = add.then(|| &residual[r * features..(r + 1) * features]);
                let alone = Case { x: row, rows: 1, residual: beside, ..case }.run(tier);
                prop_assert_eq!(&alone[..], &got[r * features..(r + 1) * features], "{} row {}", tier, r);
            }
        }
    }

    #[test]
    fn fast_projections_are_the_products_of_rounded_activations(
        seed in any::<u64>(), dtype in 0usize..4, rows in 1usize..10, blocks in 1usize..9, features in 1usize..70,
    ) {
        let mut dice = Dice(seed);
        let dtype = [DType::Q8_0, DType::Q4_1, DType::Q4_0, DType::Q5_0][dtype];
        let weight = dice.weight(dtype, features, 32 * blocks);
        let mut x = dice.floats(rows * 32 * blocks);
        // A block of nothing but zeros has no scale to divide by.
        x[..32].fill(0.0);
        let case = Case { weight: &weight, x: &x, rows, residual: None, fast: true };
        let rounded: Vec<f32> = x.chunks(32).flat_map(rounded_block).collect();
        let expected = Case { x: &rounded, ..case }.expected();
        for tier in tiers() {
            let got = case.run(tier);
            for (i, (got, (want, size))) in got.iter().zip(&expected).enumerate() {
                // The minimum of a Q4_1 block is taken out of the sum, so what is rounded may exceed the products.
                let error = (f64::from(*got) - want).abs();
                prop_assert!(error <= 4e-6 * size + 1e-5, "{tier} {dtype} output {i}: {got} for {want}");
            }
            for r in 0..rows {
                let alone = Case { x: &x[r * 32 * blocks..(r + 1) * 32 * blocks], rows: 1, ..case }.run(tier);
                prop_assert_eq!(&alone[..], &got[r * features..(r + 1) * features], "{} row {}", tier, r);
            }
        }
    }

    #[test]
    fn rows_ops_follow_their_definitions(seed in any::<u64>(), len in 1usize..150, big: bool) {
        let mut dice = Dice(seed);
        let factor = if big { 60.0 } else { 3.0 };
        let a: Vec<f32> = dice.floats(len).iter().map(|v| v * factor).collect();
        let b = dice.floats(len);
        let mean = a.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / len as f64;
        for tier in tiers() {
            let kernels = Kernels::of(tier);
            let (mut gated, mut sum, mut normed) = (vec![0.0; len], vec![0.0; len], vec![0.0; len]);
            // SAFETY: every slice has `len` values.
            unsafe {
                (kernels.silu_mul)(a.as_ptr(), b.as_ptr(), gated.as_mut_ptr(), len);
                (kernels.add)(a.as_ptr(), b.as_ptr(), sum.as_mut_ptr(), len);
                (kernels.rms_norm)(a.as_ptr(), &b, 1e-5, normed.as_mut_ptr());
            }
            for i in 0..len {
                let (x, y) = (f64::from(a[i]), f64::from(b[i]));
                prop_assert_eq!(sum[i], a[i] + b[i]);
                let silu = x / (1.0 + (-x).exp()) * y;
                prop_assert!((f64::from(gated[i]) - silu).abs() <= 1e-6 * silu.abs() + 1e-12, "{tier} silu({x}) * {y}");
                let norm = x / (mean + 1e-5).sqrt() * y;
                prop_assert!((f64::from(normed[i]) - norm).abs() <= 1e-6 * norm.abs() + 1e-9, "{tier} norm");
            }
        }
    }

    #[test]
    fn attention_follows_its_definition(
        seed in any::<u64>(), positions in 1usize..300, kv_heads in 1usize..4, group in 1usize..7, dim in 1usize..70,
    ) {
        let mut dice = Dice(seed);
        let shape = AttentionShape { heads: kv_heads * group, kv_heads, head_dim: dim };
        let blocks = positions.div_ceil(KV_BLOCK_TOKENS);
        // Blocks in falling order, and not-a-number wherever no position of the row lies.
        let table: Vec<u32> = (0..blocks as u32).rev().collect();
        let mut cache = vec![f32::NAN; cache_index(&shape, blocks, 0)];
        let (keys, values) = (dice.floats(positions * kv_heads * dim), dice.floats(positions * kv_heads * dim));
        for p in 0..positions {
            for h in 0..kv_heads {
                let base = cache_index(&shape, table[p / KV_BLOCK_TOKENS] as usize, h);
                for d in 0..dim {
                    let from = (p * kv_heads + h) * dim + d;
                    cache[base + d * KV_BLOCK_TOKENS + p % KV_BLOCK_TOKENS] = keys[from];
                    cache[base + dim * KV_BLOCK_TOKENS + p % KV_BLOCK_TOKENS * dim + d] = values[from];
                }
            }
        }
        let query: Vec<f32> = dice.floats(shape.heads * dim).iter().map(|v| v * 4.0).collect();
        for tier in tiers() {
            let kernels = Kernels::of(tier);
            let attend = Attend {
                shape, scale: 0.5, cache: cache.as_ptr(), table: &table, query: query.as_ptr(), positions,
            };
            for head in 0..shape.heads {
                let mut partials = vec![0.0; attend.chunks() * group * partial_len(&shape)];
                let mut out = vec![0.0; dim];
                let stride = group * partial_len(&shape);
                // SAFETY: partials have room for every chunk and head, the output for one head.
                unsafe {
                    for chunk in 0..attend.chunks() {
                        (kernels.attend)(&attend, head / group, chunk, partials[chunk * stride..].as_mut_ptr());
                    }
                    let first = partials[head % group * partial_len(&shape)..].as_ptr();
                    (kernels.merge)(first, stride, attend.chunks(), (out.as_mut_ptr(), dim));
                }
                let want = attention_of(head, &query, (&keys, &values), (&shape, positions));
                for (got, want) in out.iter().zip(want) {
                    prop_assert!((f64::from(*got) - want).abs() < 1e-5, "{tier} head {head}: {got} for {want}");
                }
            }
        }
    }
}

/// What quantising makes of 32 activations, by its definition and in f64 where it matters.
fn rounded_block(x: &[f32]) -> Vec<f32> {
    let largest = x.iter().fold(0f32, |a, v| a.max(v.abs()));
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    x.iter()
        .map(|v| (f64::from((v * inverse).round_ties_even()) * f64::from(largest) / 127.0) as f32)
        .collect()
}

fn attention_of(
    head: usize,
    query: &[f32],
    (keys, values): (&[f32], &[f32]),
    (shape, positions): (&AttentionShape, usize),
) -> Vec<f64> {
    let (dim, kv) = (shape.head_dim, head / (shape.heads / shape.kv_heads));
    let at = |p: usize| (p * shape.kv_heads + kv) * dim;
    let scores: Vec<f64> = (0..positions)
        .map(|p| {
            (0..dim).map(|d| f64::from(query[head * dim + d]) * f64::from(keys[at(p) + d])).sum::<f64>() * 0.5
        })
        .collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    let share = |p: usize| (scores[p] - max).exp() / total;
    (0..dim).map(|d| (0..positions).map(|p| share(p) * f64::from(values[at(p) + d])).sum()).collect()
}
