//! Every tier's encoder kernels, compared with plain definitions in f64.

use proptest::prelude::*;
use trustformers_plan::{EncoderScores, seeded::SeededRng};

use super::{EncoderAttend, LayerNorm, scratch_len};
use crate::{Tier, kernels::Kernels, memory::SharedF32};

fn floats(seed: u64, len: usize, factor: f32) -> Vec<f32> {
    let mut rng = SeededRng::new(seed);
    (0..len).map(|_| rng.next_signed() * factor).collect()
}

fn tiers() -> impl Iterator<Item = Tier> {
    Tier::ALL.into_iter().filter(|tier| tier.is_available())
}

/// One sequence's query, key and value rows side by side, as the output of a concatenated projection.
struct EncoderCase {
    len: usize,
    heads: usize,
    dim: usize,
    window: Option<usize>,
    causal: bool,
    /// For each head the values of all distances.
    distances: Option<Vec<f32>>,
    qkv: Vec<f32>,
}

impl EncoderCase {
    fn stride(&self) -> usize {
        (self.heads + 2) * self.dim
    }

    /// The outputs of the rows from `first` on.
    fn run(&self, tier: Tier, first: usize) -> Vec<f32> {
        let (heads, dim, stride) = (self.heads, self.dim, self.stride());
        let rows = self.len - first;
        let mut qkv = self.qkv.clone();
        // The columns on either side are not the kernel's.
        let mut out = vec![7.5f32; rows * (heads * dim + 2)];
        // Values of earlier sequences in the scratch space must not matter.
        let scratch = SharedF32::new("test", scratch_len(self.len, dim)).unwrap();
        // SAFETY: all memory has the sizes that the kernel is given.
        unsafe {
            std::slice::from_raw_parts_mut(scratch.ptr(), scratch_len(self.len, dim)).fill(f32::NAN);
            (Kernels::of(tier).encoder_attend)(&EncoderAttend {
                len: self.len,
                rows,
                first,
                head_dim: dim,
                heads,
                scores: EncoderScores { window: self.window, causal: self.causal, ..0.5.into() },
                distances: self.distances.as_deref(),
                query: (qkv.as_mut_ptr().add(first * stride), stride),
                keys: (qkv.as_mut_ptr().add(heads * dim), stride),
                values: (qkv.as_mut_ptr().add((heads + 1) * dim), stride),
                out: (out.as_mut_ptr().add(1), heads * dim + 2),
                scratch: scratch.ptr(),
            });
        }
        for row in out.chunks(heads * dim + 2) {
            assert_eq!((row[0], row[heads * dim + 1]), (7.5, 7.5), "{tier} wrote outside its outputs");
        }
        out.chunks(heads * dim + 2).flat_map(|row| row[1..=heads * dim].to_vec()).collect()
    }

    fn expected(&self) -> Vec<f64> {
        let (heads, dim, stride) = (self.heads, self.dim, self.stride());
        let at = |row: usize, col: usize| f64::from(self.qkv[row * stride + col]);
        let mut out = Vec::new();
        for row in 0..self.len {
            for head in 0..heads {
                let product =
                    |p| (0..dim).map(|d| at(row, head * dim + d) * at(p, heads * dim + d)).sum::<f64>() / 2.0;
                let score = |p: usize| {
                    let added = self.distances.as_ref().map_or(0.0, |table| {
                        let own = table.len() / heads;
                        f64::from(table[head * own + own / 2 + p - row])
                    });
                    product(p) + added
                };
                let far = |p: usize| {
                    self.window.is_some_and(|window| row.abs_diff(p) > window) || self.causal && p > row
                };
                let score = |p| if far(p) { f64::NEG_INFINITY } else { score(p) };
                let scores: Vec<f64> = (0..self.len).map(score).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let shares: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let total: f64 = shares.iter().sum();
                out.extend((0..dim).map(|d| {
                    let mixed = shares.iter().enumerate().map(|(p, s)| s * at(p, (heads + 1) * dim + d));
                    mixed.sum::<f64>() / total
                }));
            }
        }
        out
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn attention_follows_its_definition(
        seed in any::<u64>(), len in 1usize..80, heads in 1usize..4, dim in 1usize..70,
        window in prop::option::of(0usize..40), causal: bool, by_distance: bool,
        from in any::<prop::sample::Index>(), longer in 0usize..5,
    ) {
        let qkv = floats(seed, len * (heads + 2) * dim, 2.0);
        let distances = by_distance.then(|| floats(seed ^ 3, heads * (2 * (len + longer) - 1), 2.0));
        let case = EncoderCase { len, heads, dim, window, causal, distances, qkv };
        let expected = case.expected();
        let from = from.index(len);
        for tier in tiers() {
            let whole = case.run(tier, 0);
            let tail = case.run(tier, from);
            prop_assert!(tail[..] == whole[from * heads * dim..], "{tier}: other bits from row {from}");
            for (i, (got, want)) in whole.iter().zip(&expected).enumerate() {
                prop_assert!((f64::from(*got) - want).abs() < 1e-5, "{tier} value {i}: {got} for {want}");
            }
        }
    }

    #[test]
    fn layer_norm_and_gelu_follow_their_definitions(seed in any::<u64>(), len in 1usize..150, big: bool) {
        let x = floats(seed, len, if big { 30.0 } else { 2.0 });
        let (weight, bias) = (floats(seed ^ 1, len, 1.0), floats(seed ^ 2, len, 1.0));
        let mean = x.iter().map(|v| f64::from(*v)).sum::<f64>() / len as f64;
        let variance = x.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / len as f64;
        for tier in tiers() {
            let kernels = Kernels::of(tier);
            let (mut normed, mut curved) = (vec![0.0; len], vec![0.0; len]);
            // SAFETY: every slice has `len` values.
            unsafe {
                let norm = LayerNorm { weight: &weight, bias: &bias, eps: 1e-3 };
                (kernels.layer_norm)(x.as_ptr(), &norm, normed.as_mut_ptr());
                (kernels.gelu)(x.as_ptr(), curved.as_mut_ptr(), len);
            }
            for i in 0..len {
                let v = f64::from(x[i]);
                let norm = (v - mean) / (variance + 1e-3).sqrt() * f64::from(weight[i]) + f64::from(bias[i]);
                prop_assert!((f64::from(normed[i]) - norm).abs() < 4e-6, "{tier} norm: {} for {norm}", normed[i]);
                let gelu = v * normal_below(v);
                prop_assert!((f64::from(curved[i]) - gelu).abs() < 1e-6, "{tier} gelu({v}): {} for {gelu}", curved[i]);
            }
        }
    }
}

/// The normal distribution below `x`, by summing its density in small steps from far below (Simpson's rule).
fn normal_below(x: f64) -> f64 {
    let density = |t: f64| (-t * t / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let (from, steps) = (-12.0f64, 2000);
    if x <= from {
        return 0.0;
    }
    let x = x.min(12.0);
    let h = (x - from) / f64::from(steps);
    let inner: f64 =
        (1..steps).map(|i| density(from + f64::from(i) * h) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
    (density(from) + inner + density(x)) * h / 3.0
}
