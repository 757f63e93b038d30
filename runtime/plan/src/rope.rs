//! Sines and cosines of rotary position embeddings, computed once at load.
//!
//! The angle is the f32 product of the position and the f32 frequency, as the float32 reference
//! implementation has it; only its sine and cosine are taken in f64 and rounded, so that every backend
//! rotates by the same numbers.

use crate::{RopeSpec, Weights};

/// `(cos, sin)` of every position and pair.
#[derive(Debug, Clone)]
pub struct RopeTable {
    pairs: usize,
    /// Position after position: `pairs` cosines, then `pairs` sines.
    values: Vec<f32>,
}

impl RopeTable {
    /// Positions `0..context` of a rotation in a plan over `weights`.
    ///
    /// # Panics
    /// When the weights have no frequencies of that rotation, which the builder of the plan checked.
    #[must_use]
    pub fn new(spec: &RopeSpec, weights: &Weights, context: usize) -> Self {
        let (pairs, magnitude) = (spec.dims / 2, f64::from(spec.scaling.magnitude));
        let mut frequencies = base_frequencies(spec.base, spec.dims);
        if let Some(id) = spec.scaling.frequencies {
            weights.get(id).dequantise_row(0, &mut frequencies);
        }
        let mut values = Vec::with_capacity(context * 2 * pairs);
        for position in 0..context {
            let angles = frequencies.iter().map(|f| f64::from(position as f32 * f));
            values.extend(angles.clone().map(|a| (a.cos() * magnitude) as f32));
            values.extend(angles.map(|a| (a.sin() * magnitude) as f32));
        }
        Self { pairs, values }
    }

    /// Cosines and sines of one position, `dims / 2` each.
    ///
    /// # Panics
    /// When `position` is not below the context.
    #[must_use]
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        self.values[position * 2 * self.pairs..(position + 1) * 2 * self.pairs].split_at(self.pairs)
    }

    /// Bytes of the table that [`Self::new`] would make.
    #[must_use]
    pub const fn bytes_of(spec: &RopeSpec, context: usize) -> u64 {
        (context * 2 * (spec.dims / 2) * size_of::<f32>()) as u64
    }

    /// Bytes it takes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (self.values.len() * size_of::<f32>()) as u64
    }
}

/// The frequency of each of `dims / 2` pairs: `base^(-2i/dims)`, in radians for each position.
#[must_use]
pub fn base_frequencies(base: f32, dims: usize) -> Vec<f32> {
    let frequency = |i: usize| {
        let exponent = (2 * i) as f32 / dims as f32;
        (1.0 / f64::from(base).powf(f64::from(exponent))) as f32
    };
    (0..dims / 2).map(frequency).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{RopeLayout, RopeScaling, Weight};

    #[test]
    fn stored_frequencies_and_a_magnitude_replace_those_of_the_base() {
        let mut weights = Weights::new();
        let stored = Weight::from_f32("frequencies", (1, 2), &[0.5, 0.25]).unwrap();
        let frequencies = Some(weights.push(stored).unwrap());
        let scaling = RopeScaling { frequencies, magnitude: 2.0 };
        let spec = RopeSpec { layout: RopeLayout::Neox, base: 10_000.0, dims: 4, head_dim: 8, scaling };
        let table = RopeTable::new(&spec, &weights, 3);
        let (cos, sin) = table.at(2);
        assert_eq!((cos[0], sin[0]), ((2.0 * 1f64.cos()) as f32, (2.0 * 1f64.sin()) as f32));
        assert_eq!((cos[1], sin[1]), ((2.0 * 0.5f64.cos()) as f32, (2.0 * 0.5f64.sin()) as f32));
    }

    #[test]
    fn first_pair_rotates_by_the_position_in_radians() {
        let scaling = RopeScaling::NONE;
        let spec =
            RopeSpec { layout: RopeLayout::Interleaved, base: 10_000.0, dims: 4, head_dim: 4, scaling };
        let table = RopeTable::new(&spec, &Weights::new(), 3);
        assert_eq!(table.at(0), (&[1.0, 1.0][..], &[0.0, 0.0][..]));
        let (cos, sin) = table.at(2);
        assert_eq!((cos[0], sin[0]), (2f64.cos() as f32, 2f64.sin() as f32));
        // The second of two pairs rotates base^(-2/4) = 1/100 as fast.
        let (c, s) = ((0.02f32 as f64).cos() as f32, (0.02f32 as f64).sin() as f32);
        assert!((cos[1] - c).abs() < 1e-7 && (sin[1] - s).abs() < 1e-8);
        assert_eq!(table.bytes(), 3 * 4 * 4);
        assert_eq!(RopeTable::bytes_of(&spec, 3), table.bytes());
    }
}
