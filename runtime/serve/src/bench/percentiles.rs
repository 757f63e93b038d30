//! Percentiles of measured values.

use serde_json::{Value, json};

/// Values in ascending order.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Percentiles {
    sorted: Vec<f64>,
}

impl Percentiles {
    /// Takes values in any order. Those that are no numbers say nothing and are left out.
    pub(super) fn new(values: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = values.into_iter().filter(|value| !value.is_nan()).collect();
        sorted.sort_by(f64::total_cmp);
        Self { sorted }
    }

    /// All of them, in ascending order.
    pub(super) fn values(&self) -> impl Iterator<Item = f64> {
        self.sorted.iter().copied()
    }

    /// The smallest value that at least `percent` of all values do not exceed (the nearest rank): always one
    /// that was measured, and of few values the largest, so that no tail is made up. `None` of nothing.
    pub(super) fn percentile(&self, percent: f64) -> Option<f64> {
        let rank = (percent.clamp(0.0, 100.0) / 100.0 * self.sorted.len() as f64).ceil();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "between 0 and the number of values"
        )]
        let index = (rank as usize).saturating_sub(1);
        self.sorted.get(index).copied()
    }

    /// The middle one; of an even number the mean of the two in the middle.
    pub(super) fn median(&self) -> Option<f64> {
        let middle = self.sorted.len() / 2;
        let upper = *self.sorted.get(middle)?;
        Some(if self.sorted.len() % 2 == 1 { upper } else { f64::midpoint(self.sorted[middle - 1], upper) })
    }

    /// The smallest.
    pub(super) fn min(&self) -> Option<f64> {
        self.sorted.first().copied()
    }

    /// The largest.
    pub(super) fn max(&self) -> Option<f64> {
        self.sorted.last().copied()
    }

    /// Percentiles as an object; `null` of nothing.
    pub(super) fn percentiles_json(&self) -> Value {
        let at = |percent| self.percentile(percent).map(rounded);
        match self.max() {
            None => Value::Null,
            Some(max) => json!({"p50": at(50.0), "p90": at(90.0), "p99": at(99.0), "max": rounded(max)}),
        }
    }
}

/// Three decimals: more digits of milliseconds or tokens per second have no use.
pub(super) fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let hundred = Percentiles::new((1..=100).rev().map(f64::from));
        for (percent, value) in
            [(0.0, 1.0), (1.0, 1.0), (50.0, 50.0), (90.0, 90.0), (99.0, 99.0), (100.0, 100.0)]
        {
            assert_eq!(hundred.percentile(percent), Some(value), "p{percent}");
        }
        let few = Percentiles::new([3.0, 1.0, 2.0]);
        assert_eq!((few.percentile(50.0), few.percentile(99.0)), (Some(2.0), Some(3.0)));
        assert_eq!(few.percentile(33.4), Some(2.0), "a third of the values is below");
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert_eq!(Percentiles::new([4.0, 1.0, 3.0, 2.0]).median(), Some(2.5));
        assert_eq!(Percentiles::new([9.0, 1.0, 5.0]).median(), Some(5.0));
    }

    #[test]
    fn nothing_has_no_percentile() {
        let nothing = Percentiles::new([f64::NAN]);
        assert_eq!((nothing.values().count(), nothing.percentile(50.0), nothing.median()), (0, None, None));
        assert_eq!(nothing.percentiles_json(), Value::Null);
    }
}
