//! Every tier's kernels, compared with plain definitions in f64.

mod projections;

use std::sync::Arc;

use half::{bf16, f16};
use proptest::prelude::*;
use trustformers_plan::{AttentionShape, DType, KV_BLOCK_TOKENS, KvType, Scores, Weight, seeded::SeededRng};

use super::{
    Kernels,
    attention::{Attend, BlockEntries, CHUNK_TOKENS, Query, TILE, chunk_len, partial_len},
    kv::{Bf16Element, CacheSlot, HalfElement, KvElement, cache_index},
};
use crate::{CpuBackend, CpuConfig, Tier, TileRule};

/// Random rows and stored matrices.
struct Samples(SeededRng);

impl Samples {
    fn new(seed: u64) -> Self {
        Self(SeededRng::new(seed))
    }

    /// In -1..1.
    fn float(&mut self) -> f32 {
        self.0.next_signed()
    }

    fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.float()).collect()
    }

    fn block(&mut self, dtype: DType) -> Vec<u8> {
        let float = self.float();
        let half = |v: f32| f16::from_f32(v).to_le_bytes();
        let mut block: Vec<u8> = (0..dtype.block_bytes()).map(|_| self.0.next_u8()).collect();
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

/// Whether the AMX tier can be tested, on the processor or on the interpreter. Prints why where it cannot.
fn has_amx() -> bool {
    let has = Tier::Amx.is_available();
    if !has {
        println!(
            "not run: the AMX tier needs AVX-512 with VNNI, and on a processor with AMX the system's permission"
        );
    }
    has
}

/// On a processor with AMX, `tests/conformance.rs` runs this tier like every other.
#[test]
fn tile_registers_pass_the_suite() {
    if has_amx() {
        // Eight rows and more: a measurement would take long where the instructions are interpreted.
        let config = CpuConfig {
            tier: Some(Tier::Amx),
            tiles: TileRule::From(8),
            threads: Some(2),
            ..CpuConfig::default()
        };
        let outcome = trustformers_conformance::check(&|| Ok(Box::new(CpuBackend::new(config)?)));
        assert!(outcome.is_ok(), "{:?}", outcome.unwrap_err());
    }
}

fn tiers() -> impl Iterator<Item = Tier> {
    Tier::ALL.into_iter().filter(|tier| tier.is_available())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn rows_ops_follow_their_definitions(seed in any::<u64>(), len in 1usize..150, big: bool) {
        let mut samples = Samples::new(seed);
        let factor = if big { 60.0 } else { 3.0 };
        let a: Vec<f32> = samples.floats(len).iter().map(|v| v * factor).collect();
        let b = samples.floats(len);
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
        window in prop::option::of(1usize..300), soft_cap in prop::option::of(0.5f32..20.0),
    ) {
        let recipe = AttentionRecipe {
            seed,
            positions,
            shape: AttentionShape { heads: kv_heads * group, kv_heads, head_dim: dim },
            scores: Scores { scale: 0.5, soft_cap, window },
        };
        recipe.check::<f32>(KvType::F32)?;
        recipe.check::<HalfElement>(KvType::F16)?;
        recipe.check::<Bf16Element>(KvType::Bf16)?;
    }
}

/// The parameters of a case of attention.
#[derive(Debug, Clone, Copy)]
struct AttentionRecipe {
    seed: u64,
    positions: usize,
    shape: AttentionShape,
    scores: Scores,
}

impl AttentionRecipe {
    /// Compares every tier with the definition, over a cache of elements `K`.
    fn check<K: KvElement>(self, kv_type: KvType) -> Result<(), TestCaseError> {
        let Self { seed, positions, shape, scores } = self;
        let AttentionShape { kv_heads, head_dim: dim, .. } = shape;
        let group = shape.heads / kv_heads;
        let mut samples = Samples::new(seed);
        let blocks = positions.div_ceil(KV_BLOCK_TOKENS);
        // Blocks in falling order, and NaN in every slot without a position.
        let table: Vec<u32> = (0..blocks as u32).rev().collect();
        let mut cache = vec![K::nearest(f32::NAN); cache_index(&shape, blocks, 0)];
        let mut rounded = || -> Vec<f32> {
            let floats = samples.floats(positions * kv_heads * dim);
            floats.into_iter().map(|v| kv_type.rounded(v)).collect()
        };
        let (keys, values) = (rounded(), rounded());
        for p in 0..positions {
            for kv_head in 0..kv_heads {
                let (block, slot) = (table[p / KV_BLOCK_TOKENS] as usize, p % KV_BLOCK_TOKENS);
                let place = CacheSlot { cache: cache.as_mut_ptr().cast(), kv_head, block, slot };
                let (key, value) = place.of::<K>(&shape);
                for d in 0..dim {
                    let from = (p * kv_heads + kv_head) * dim + d;
                    // SAFETY: the block is one of the cache's.
                    unsafe {
                        *key.add(d * KV_BLOCK_TOKENS) = K::nearest(keys[from]);
                        *value.add(d) = K::nearest(values[from]);
                    }
                }
            }
        }
        // Several rows; the last attends to all positions.
        let rows = 1 + samples.0.next_u8() as usize % positions.min(9);
        let query: Vec<f32> = samples.floats(rows * shape.heads * dim).iter().map(|v| v * 4.0).collect();
        let cache = cache.as_ptr().cast();
        let (table, query) = (&table[..], &query[..]);
        let case = AttentionCase { shape, scores, cache, kv_type, table, query, rows, positions };
        for tier in tiers() {
            let run = |kv_head, first, count| case.tile(tier, kv_head, first..first + count);
            for kv_head in 0..kv_heads {
                for first in (0..rows * group).step_by(TILE) {
                    let count = TILE.min(rows * group - first);
                    let together = run(kv_head, first, count);
                    for (i, together) in together.iter().enumerate() {
                        let (row, head) = ((first + i) / group, kv_head * group + (first + i) % group);
                        let own = &query[row * shape.heads * dim..(row + 1) * shape.heads * dim];
                        let positions = positions - rows + row + 1;
                        let cached = Cached { keys: &keys, values: &values, shape, scores, positions };
                        for (got, want) in together.iter().zip(attention_of(head, own, &cached)) {
                            prop_assert!(
                                (f64::from(*got) - want).abs() < 1e-5,
                                "{tier} {kv_type} {row} {head}: {got} for {want}"
                            );
                        }
                        prop_assert_eq!(&run(kv_head, first + i, 1)[0], together, "{} alone", tier);
                    }
                }
            }
        }
        Ok(())
    }
}

/// A sequence of `positions` positions, of whose last `rows` the queries are given.
struct AttentionCase<'a> {
    shape: AttentionShape,
    scores: Scores,
    cache: *const u8,
    kv_type: KvType,
    table: &'a [u32],
    query: &'a [f32],
    rows: usize,
    positions: usize,
}

impl AttentionCase<'_> {
    /// Queries `range` of a key/value head through a tier's kernels, all chunks merged.
    fn tile(&self, tier: Tier, kv_head: usize, range: std::ops::Range<usize>) -> Vec<Vec<f32>> {
        let Self { ref shape, scores, cache, kv_type, table, query, rows, positions } = *self;
        let (kernels, group, dim) = (Kernels::of(tier), shape.heads / shape.kv_heads, shape.head_dim);
        let count = range.len();
        let queries: Vec<Query> = range
            .map(|q| {
                let ptr = query[(q / group * shape.heads + kv_head * group + q % group) * dim..].as_ptr();
                let position = positions - rows + q / group;
                Query { ptr, first: scores.first(position), positions: position + 1 }
            })
            .collect();
        let mut scratch = vec![0.0; TILE * dim];
        let attend = Attend {
            shape: *shape,
            scale: scores.scale,
            soft_cap: scores.soft_cap,
            cache,
            kv_type,
            table: BlockEntries { entries: table, groups: 1, group: 0 },
            kv_head,
            queries: &queries,
            scratch: scratch.as_mut_ptr(),
        };
        let mut partials = vec![0.0; attend.chunks() * chunk_len(shape)];
        let mut out = vec![vec![0.0; dim]; count];
        // SAFETY: partials have room for every chunk and query, the outputs for one head each.
        unsafe {
            (kernels.attend)(&attend, 0..attend.chunks(), partials.as_mut_ptr());
            for (i, (query, out)) in queries.iter().zip(&mut out).enumerate() {
                let before = query.first / CHUNK_TOKENS;
                let chunks = query.positions.div_ceil(CHUNK_TOKENS) - before;
                let first = partials[before * chunk_len(shape) + i * partial_len(shape)..].as_ptr();
                (kernels.merge)(first, chunk_len(shape), chunks, out.as_mut_ptr(), dim);
            }
        }
        out
    }
}

/// The first positions of a sequence.
struct Cached<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    shape: AttentionShape,
    scores: Scores,
    positions: usize,
}

/// Attention by its definition.
fn attention_of(head: usize, query: &[f32], cached: &Cached<'_>) -> Vec<f64> {
    let Cached { keys, values, ref shape, scores: how, positions } = *cached;
    let (dim, kv) = (shape.head_dim, head / (shape.heads / shape.kv_heads));
    let at = |p: usize| (p * shape.kv_heads + kv) * dim;
    let first = how.first(positions - 1);
    let score = |p: usize| {
        let product = |d: usize| f64::from(query[head * dim + d]) * f64::from(keys[at(p) + d]);
        let scaled = (0..dim).map(product).sum::<f64>() * f64::from(how.scale);
        how.soft_cap.map_or(scaled, |cap| f64::from(cap) * (scaled / f64::from(cap)).tanh())
    };
    let scores: Vec<f64> = (first..positions).map(score).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    let share = |p: usize| (scores[p - first] - max).exp() / total;
    (0..dim).map(|d| (first..positions).map(|p| share(p) * f64::from(values[at(p) + d])).sum()).collect()
}
