//! The ops of encoders by their definitions.

use super::ops::{Step, dot};
use crate::{AttentionShape, Buf, EncoderScores, GeluForm, Pooling, WeightId};

/// Parameters of a layer norm.
pub(super) struct LayerNorm {
    pub(super) weight: WeightId,
    pub(super) bias: WeightId,
    pub(super) eps: f32,
}

/// Operands of an encoder's attention.
pub(super) struct EncoderAttention {
    pub(super) query: Buf,
    pub(super) keys: Buf,
    pub(super) values: Buf,
    pub(super) shape: AttentionShape,
    pub(super) scores: EncoderScores,
}

impl Step<'_> {
    pub(super) fn add_row(&mut self, input: Buf, weight: WeightId, out: Buf) {
        let added = self.vector(weight);
        for r in 0..self.rows(out) {
            let values: Vec<f32> = self.row(input, r).iter().zip(&added).map(|(v, a)| v + a).collect();
            self.store(out, r, &values);
        }
    }

    /// The normed rows of a buffer.
    pub(super) fn layer_norm(&self, input: Buf, norm: &LayerNorm) -> Vec<Vec<f32>> {
        let (weight, bias, eps) = (self.vector(norm.weight), self.vector(norm.bias), norm.eps);
        let normed = |r| {
            let row = self.row(input, r);
            let mean = row.iter().map(|v| f64::from(*v)).sum::<f64>() / row.len() as f64;
            let variance = row.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / row.len() as f64;
            let factor = 1.0 / (variance + f64::from(eps)).sqrt();
            let scaled = weight.iter().zip(&bias).map(|(w, b)| (f64::from(*w), f64::from(*b)));
            let values = row.iter().zip(scaled);
            values.map(|(v, (w, b))| ((f64::from(*v) - mean) * factor * w + b) as f32).collect()
        };
        (0..self.rows(input)).map(normed).collect()
    }

    pub(super) fn gelu(&mut self, input: Buf, form: GeluForm, out: Buf) {
        let gelu = match form {
            GeluForm::Erf => gelu,
            GeluForm::Tanh => gelu_tanh,
        };
        for r in 0..self.rows(out) {
            let values: Vec<f32> = self.row(input, r).iter().map(|v| gelu(*v)).collect();
            self.store(out, r, &values);
        }
    }

    pub(super) fn encoder_attention(&mut self, operands: &EncoderAttention, out: Buf) {
        let EncoderAttention { query, keys, values, shape, scores: rule } = *operands;
        let AttentionShape { heads, kv_heads, head_dim } = shape;
        let distances = rule.distances.map(|table| self.vector(table));
        // What is added to the score of head `h` for a key at a position.
        let added = |h: usize, query_at: usize, key_at: usize| match &distances {
            Some(table) => {
                let own = table.len() / heads;
                f64::from(table[h * own + own / 2 + key_at - query_at])
            }
            None => 0.0,
        };
        for s in 0..self.input.sequences() {
            let rows = self.input.rows_of(s);
            let (keys, values): (Vec<_>, Vec<_>) =
                rows.map(|r| (self.row(keys, r).to_vec(), self.row(values, r).to_vec())).unzip();
            let asking = self.input.rows_within(query.rows, s);
            for r in asking.clone() {
                // The first row of a sequence has position 0, also where only first rows were kept.
                let position = r - asking.start;
                let attended = rule.attended(position, keys.len());
                let (keys, values) = (&keys[attended.clone()], &values[attended.clone()]);
                let mut mixed = vec![0.0; query.cols];
                for h in 0..heads {
                    let kv = h / (heads / kv_heads) * head_dim..(h / (heads / kv_heads) + 1) * head_dim;
                    let q = &self.row(query, r)[h * head_dim..(h + 1) * head_dim];
                    let product = |k: &Vec<f32>| f64::from(dot(q, &k[kv.clone()]) * rule.scale);
                    let score = |(k, at): (&Vec<f32>, usize)| product(k) + added(h, position, at);
                    let scores: Vec<f64> = keys.iter().zip(attended.clone()).map(score).collect();
                    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let shares: Vec<f64> = scores.iter().map(|v| (v - largest).exp()).collect();
                    let total: f64 = shares.iter().sum();
                    for d in 0..head_dim {
                        let sum: f64 =
                            shares.iter().zip(values).map(|(s, v)| s * f64::from(v[kv.start + d])).sum();
                        mixed[h * head_dim + d] = (sum / total) as f32;
                    }
                }
                self.store(out, r, &mixed);
            }
        }
    }

    pub(super) fn pool(&mut self, input: Buf, pooling: Pooling, normalise: bool, out: Buf) {
        for s in 0..self.input.sequences() {
            let rows = self.input.rows_of(s);
            let mut pooled: Vec<f64> = match pooling {
                Pooling::Cls => self
                    .row(input, self.input.rows_within(input.rows, s).start)
                    .iter()
                    .map(|v| f64::from(*v))
                    .collect(),
                Pooling::Last => self
                    .row(input, self.input.rows_within(input.rows, s).end - 1)
                    .iter()
                    .map(|v| f64::from(*v))
                    .collect(),
                Pooling::Mean => {
                    let sum = |c: usize| rows.clone().map(|r| f64::from(self.row(input, r)[c])).sum::<f64>();
                    (0..out.cols).map(|c| sum(c) / rows.len() as f64).collect()
                }
                Pooling::Max => {
                    let column = |c: usize| rows.clone().map(move |r| (r, c));
                    let value = |(r, c): (usize, usize)| f64::from(self.row(input, r)[c]);
                    (0..out.cols).map(|c| column(c).map(value).fold(f64::NEG_INFINITY, f64::max)).collect()
                }
            };
            if normalise {
                let length = pooled.iter().map(|v| v * v).sum::<f64>().sqrt().max(1e-12);
                pooled.iter_mut().for_each(|v| *v /= length);
            }
            let values: Vec<f32> = pooled.iter().map(|v| *v as f32).collect();
            self.store(out, s, &values);
        }
    }
}

pub(super) fn gelu(x: f32) -> f32 {
    let x = f64::from(x);
    (x * 0.5 * erfc(-x * std::f64::consts::FRAC_1_SQRT_2)) as f32
}

fn gelu_tanh(x: f32) -> f32 {
    let x = f64::from(x);
    let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
    (x * 0.5 * (1.0 + inner.tanh())) as f32
}

/// `2/sqrt(pi) · ∫ e^(-t²) dt` from `x` to infinity, to about twelve digits: the power series of the error
/// function near zero, the continued fraction beyond.
fn erfc(x: f64) -> f64 {
    if x < 0.0 {
        return 2.0 - erfc(-x);
    }
    if x < 2.5 {
        // erf(x) = 2/sqrt(pi) · e^(-x²) · Σ 2^n x^(2n+1) / (1·3·5···(2n+1)); every term is positive.
        let (mut term, mut sum) = (x, x);
        for n in 1..100 {
            term *= 2.0 * x * x / (2 * n + 1) as f64;
            sum += term;
        }
        return 1.0 - std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum;
    }
    // erfc(x) = e^(-x²)/sqrt(pi) · 1/(x + (1/2)/(x + 1/(x + (3/2)/(x + …))))
    let fraction = (1..=60).rev().fold(x, |tail, n| x + f64::from(n) / 2.0 / tail);
    (-x * x).exp() / (std::f64::consts::PI.sqrt() * fraction)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_reaches_as_far_on_either_side() {
        let rule = EncoderScores { window: Some(2), ..1.0.into() };
        let attended: Vec<_> = (0..6).map(|position| rule.attended(position, 6)).collect();
        assert_eq!(attended, [0..3, 0..4, 0..5, 1..6, 2..6, 3..6]);
        assert_eq!(EncoderScores { window: Some(usize::MAX), ..rule }.attended(3, 6), 0..6);
        assert_eq!(EncoderScores { window: Some(0), ..rule }.attended(3, 6), 3..4);
        assert_eq!(EncoderScores::from(1.0).attended(3, 6), 0..6);
        assert_eq!(EncoderScores { causal: true, ..rule }.attended(3, 6), 1..4);
        assert_eq!(EncoderScores { causal: true, window: None, ..rule }.attended(3, 6), 0..4);
    }

    #[test]
    fn the_error_function_has_tabulated_values() {
        // Tables of the complementary error function; 2.5 is where the two forms meet.
        let known = [
            (0.0, 1.0),
            (0.5, 0.479_500_122_186_953_5),
            (1.0, 0.157_299_207_050_285_13),
            (2.0, 0.004_677_734_981_047_266),
            (2.5, 4.069_520_174_449_589e-4),
            (3.0, 2.209_049_699_858_544e-5),
            (5.0, 1.537_459_794_428_035e-12),
        ];
        for (x, want) in known {
            assert!((erfc(x) - want).abs() < 1e-12 + 1e-11 * want, "erfc({x}) = {}, not {want}", erfc(x));
            assert!((erfc(-x) - (2.0 - want)).abs() < 1e-12);
        }
        assert!((erfc(2.499_999_999) - erfc(2.5)).abs() < 1e-11);
        assert_eq!(gelu(0.0), 0.0);
        assert!((gelu(1.0) - 0.841_345).abs() < 1e-6 && (gelu(-1.0) + 0.158_655).abs() < 1e-6);
        assert_eq!((gelu(20.0), gelu(-40.0)), (20.0, -0.0));
        assert_eq!(gelu_tanh(0.0), 0.0);
        assert!((gelu_tanh(1.0) - 0.841_192).abs() < 1e-6 && (gelu_tanh(-1.0) + 0.158_808).abs() < 1e-6);
    }
}
