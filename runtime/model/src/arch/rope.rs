//! Rotary positions of models whose context was extended: linear scaling, YaRN, the scaling of Llama 3, and
//! LongRoPE. Each becomes a frequency for every pair of elements, and a factor of what is rotated.
//!
//! Frequencies follow transformers 5; llama.cpp computes the same numbers.

use super::keys::ArchKeys;
use super::tensors::TensorFinder;
use crate::gguf::GgufProblem;
use std::f64::consts::TAU;
use trustformers_plan::rope::base_frequencies;
use trustformers_plan::{RopeLayout, RopeScaling, RopeSpec, Weight};

const KIND: &str = "rope.scaling.type";
const FACTOR: &str = "rope.scaling.factor";
const ORIGINAL: &str = "rope.scaling.original_context_length";
const MAGNITUDE: &str = "rope.scaling.attn_factor";

/// Divisors of the frequencies, one for each pair: how GGUF files store the scaling of Llama 3.
const DIVISORS: &str = "rope_freqs.weight";
/// Divisors of LongRoPE, for contexts beyond the original one and for those within it.
const LONG_DIVISORS: &str = "rope_factors_long.weight";
const SHORT_DIVISORS: &str = "rope_factors_short.weight";

/// How a model's rotation differs from that of its base.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Scaling {
    /// Not at all.
    None,
    /// Positions are divided.
    Linear { factor: f32 },
    /// Low frequencies are divided, high ones are kept, and those between are mixed.
    Llama3 { factor: f32, low_factor: f32, high_factor: f32, original: usize },
    /// The same, mixed by the number of turns in the original context; longer vectors.
    Yarn { factor: f32, beta_fast: f32, beta_slow: f32, original: usize, magnitude: f32 },
    /// Each frequency has a divisor of its own, for short and for long contexts.
    Long { short: Vec<f32>, long: Vec<f32>, original: usize, magnitude: f32 },
    /// Each frequency has a divisor of its own.
    Divisors(Vec<f32>),
}

/// The magnitude of YaRN for a factor.
pub(crate) fn yarn_magnitude(factor: f32) -> f32 {
    if factor <= 1.0 { 1.0 } else { (0.1 * f64::from(factor).ln() + 1.0) as f32 }
}

impl Scaling {
    /// What the file's keys and tensors say. Of a checkpoint, the reader of its configuration has it.
    fn read(keys: &ArchKeys<'_>, tensors: &mut TensorFinder<'_>, pairs: usize) -> Result<Self, GgufProblem> {
        if let Some(config) = keys.config() {
            return Ok(config.scaling.clone());
        }
        let original = keys.optional_size(ORIGINAL)?;
        let magnitude = keys.optional_float(MAGNITUDE)?.unwrap_or(1.0);
        let above_zero = |key: &'static str, value: f32| {
            if value > 0.0 { Ok(value) } else { Err(keys.invalid(key, format!("{value} is not above 0"))) }
        };
        above_zero(MAGNITUDE, magnitude)?;
        if let Some(long) = tensors.optional_floats(LONG_DIVISORS, pairs)? {
            let short = tensors.floats(SHORT_DIVISORS, pairs)?;
            let Some(original) = original else { return Err(keys.missing(ORIGINAL)) };
            keys.one_of_texts(KIND, &["none", "longrope"])?;
            return Ok(Self::Long { short, long, original, magnitude });
        }
        let divisors = tensors.optional_floats(DIVISORS, pairs)?;
        let kind = keys.one_of_texts(KIND, &["none", "linear", "yarn"])?.unwrap_or("none");
        let factor = keys.optional_float(FACTOR)?.filter(|factor| *factor != 0.0).unwrap_or(1.0);
        above_zero(FACTOR, factor)?;
        match (kind, divisors) {
            ("linear", None) if magnitude == 1.0 => Ok(Self::Linear { factor }),
            ("yarn", None) => {
                let Some(original) = original else { return Err(keys.missing(ORIGINAL)) };
                let magnitude = magnitude * yarn_magnitude(factor);
                Ok(Self::Yarn { factor, beta_fast: 32.0, beta_slow: 1.0, original, magnitude })
            }
            ("none", divisors) if factor == 1.0 && magnitude == 1.0 => {
                Ok(divisors.map_or(Self::None, Self::Divisors))
            }
            ("none", _) if factor != 1.0 => {
                Err(keys
                    .invalid(FACTOR, format!("{factor} has no {KIND} (\"linear\" or \"yarn\") beside it")))
            }
            (kind, None) => {
                Err(keys.invalid(MAGNITUDE, format!("{magnitude} is not supported beside {KIND} {kind:?}")))
            }
            (kind, Some(_)) => {
                Err(keys.invalid(KIND, format!("{kind:?} is not supported beside tensor {DIVISORS}")))
            }
        }
    }

    /// The frequencies and magnitude within the original context, or for all contexts.
    fn rotation(&self, base: f32, dims: usize) -> Option<(Vec<f32>, f32)> {
        let plain = base_frequencies(base, dims);
        let divided = |by: &[f32]| plain.iter().zip(by).map(|(f, by)| f / by).collect();
        match self {
            Self::None => None,
            Self::Linear { factor } => Some((plain.iter().map(|f| f / factor).collect(), 1.0)),
            Self::Divisors(by) => Some((divided(by), 1.0)),
            Self::Long { short, magnitude, .. } => Some((divided(short), *magnitude)),
            Self::Llama3 { factor, low_factor, high_factor, original } => {
                let mixed = |f: &f32| llama3(*f, [*factor, *low_factor, *high_factor], *original as f64);
                Some((plain.iter().map(mixed).collect(), 1.0))
            }
            Self::Yarn { factor, beta_fast, beta_slow, original, magnitude } => {
                // The pair that turns so often in the original context.
                let pair = |turns: f32| {
                    let length = *original as f64 / (f64::from(turns) * TAU);
                    dims as f64 * length.ln() / (2.0 * f64::from(base).ln())
                };
                let first = pair(*beta_fast).floor().max(0.0);
                let last = pair(*beta_slow).ceil().min(dims as f64 - 1.0);
                let width = if first == last { 0.001 } else { last - first };
                let mixed = |(i, f): (usize, &f32)| {
                    let divided = ((i as f64 - first) / width).clamp(0.0, 1.0) as f32;
                    f / factor * divided + f * (1.0 - divided)
                };
                Some((plain.iter().enumerate().map(mixed).collect(), *magnitude))
            }
        }
    }
}

/// Llama 3: wave lengths above `original / low` are divided, those below `original / high` are kept.
fn llama3(frequency: f32, [factor, low, high]: [f32; 3], original: f64) -> f32 {
    let (factor, low, high) = (f64::from(factor), f64::from(low), f64::from(high));
    let plain = f64::from(frequency);
    let wave = TAU / plain;
    if wave < original / high {
        return frequency;
    }
    if wave > original / low {
        return (plain / factor) as f32;
    }
    let kept = (original / wave - low) / (high - low);
    ((1.0 - kept) * plain / factor + kept * plain) as f32
}

/// A rotation whose frequencies are weights of the model.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rotation {
    spec: RopeSpec,
    long: Option<LongRotation>,
}

/// What a plan for a longer context rotates by.
#[derive(Debug, Clone, Copy)]
struct LongRotation {
    beyond_tokens: usize,
    scaling: RopeScaling,
}

/// A rotation without its scaling.
#[derive(Debug, Clone, Copy)]
pub(super) struct PlainRotation {
    pub(super) layout: RopeLayout,
    pub(super) base: f32,
    pub(super) dims: usize,
    pub(super) head_dim: usize,
}

impl Rotation {
    /// The rotation by the frequencies of its base.
    pub(super) fn plain(plain: PlainRotation) -> Self {
        let PlainRotation { layout, base, dims, head_dim } = plain;
        let spec = RopeSpec { layout, base, dims, head_dim, scaling: RopeScaling::NONE };
        Self { spec, long: None }
    }

    /// The rotation with the scaling that the file describes, whose frequencies become weights.
    pub(super) fn read(
        plain: PlainRotation,
        keys: &ArchKeys<'_>,
        tensors: &mut TensorFinder<'_>,
    ) -> Result<Self, GgufProblem> {
        let PlainRotation { base, dims, .. } = plain;
        let scaling = Scaling::read(keys, tensors, dims / 2)?;
        let mut rotation = Self::plain(plain);
        let Some((frequencies, magnitude)) = scaling.rotation(base, dims) else { return Ok(rotation) };
        let frequencies = tensors.made(Weight::from_f32("rope.frequencies", (1, dims / 2), &frequencies))?;
        rotation.spec.scaling = RopeScaling { frequencies: Some(frequencies), magnitude };
        if let Scaling::Long { long, original, magnitude, .. } = scaling {
            let own =
                base_frequencies(base, dims).iter().zip(&long).map(|(f, by)| f / by).collect::<Vec<_>>();
            let made = Weight::from_f32("rope.long_frequencies", (1, dims / 2), &own);
            let scaling = RopeScaling { frequencies: Some(tensors.made(made)?), magnitude };
            rotation.long = Some(LongRotation { beyond_tokens: original, scaling });
        }
        Ok(rotation)
    }

    /// What a plan rotates by whose sequences have at most `context_tokens`. LongRoPE has other frequencies
    /// for longer contexts; keys that are cached must all be rotated by the same ones, so the longest
    /// sequence of a plan decides, not the sequence at hand.
    pub(super) fn at(&self, context_tokens: usize) -> RopeSpec {
        match self.long.filter(|long| context_tokens > long.beyond_tokens) {
            Some(long) => RopeSpec { scaling: long.scaling, ..self.spec },
            None => self.spec,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() <= 1e-6 * e.abs(), "{found:?} for {expected:?}");
        }
    }

    #[test]
    fn scaled_frequencies_are_those_of_the_reference() {
        let reference: serde_json::Value = serde_json::from_str(include_str!("rope_reference.json")).unwrap();
        let floats = |value: &serde_json::Value| -> Vec<f32> {
            value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
        };
        let cases = reference.as_object().unwrap();
        let scalings = [
            ("linear", Scaling::Linear { factor: 4.0 }),
            ("llama3", Scaling::Llama3 { factor: 8.0, low_factor: 1.0, high_factor: 4.0, original: 128 }),
            (
                "yarn",
                Scaling::Yarn {
                    factor: 4.0,
                    beta_fast: 32.0,
                    beta_slow: 1.0,
                    original: 128,
                    magnitude: yarn_magnitude(4.0),
                },
            ),
        ];
        assert_eq!(cases.len(), scalings.len());
        for (name, scaling) in scalings {
            let (frequencies, magnitude) = scaling.rotation(10_000.0, 32).unwrap();
            near(&frequencies, &floats(&cases[name]["frequencies"]));
            near(&[magnitude], &[cases[name]["magnitude"].as_f64().unwrap() as f32]);
        }
    }

    #[test]
    fn long_contexts_have_other_frequencies() {
        let plain = PlainRotation { layout: RopeLayout::Neox, base: 10_000.0, dims: 4, head_dim: 4 };
        let scaling = RopeScaling { frequencies: None, magnitude: 1.5 };
        let long = Some(LongRotation { beyond_tokens: 64, scaling });
        let rotation = Rotation { long, ..Rotation::plain(plain) };
        assert_eq!(rotation.at(64).scaling, RopeScaling::NONE);
        assert_eq!(rotation.at(65).scaling, scaling);
    }
}
