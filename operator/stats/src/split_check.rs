//! Whether users are split as configured, at every look: the sequential test of a sample ratio mismatch.
//!
//! The same test tells rare events apart: each error belongs to an arm with the probability of its weight,
//! however the rate of errors varies.

use crate::special::ln_beta;

/// Evidence above this says that the split is broken: it ever happens with a probability of 0.1 % otherwise.
pub const ALARM: f64 = 1000.0;

/// Concentrations of the prior: broken a lot, a little, hardly.
const CONCENTRATIONS: [f64; 3] = [1e2, 1e3, 1e4];

/// One time with constant weights.
#[derive(Debug, Clone, PartialEq)]
pub struct SplitEpoch {
    /// Share of each arm, above 0, together 1.
    pub weights: Vec<f64>,
    /// Distinct users of each arm, first seen in this epoch.
    pub users: Vec<u64>,
}

/// Logarithm of the evidence that users are not split by the weights, over all epochs.
#[must_use]
pub fn ln_evidence(epochs: &[SplitEpoch]) -> f64 {
    epochs.iter().map(ln_evidence_of).sum()
}

/// Whether the split is broken.
#[must_use]
pub fn is_broken(epochs: &[SplitEpoch]) -> bool {
    ln_evidence(epochs) > ALARM.ln()
}

fn ln_evidence_of(epoch: &SplitEpoch) -> f64 {
    let under_weights: f64 =
        epoch.users.iter().zip(&epoch.weights).map(|(users, weight)| *users as f64 * weight.ln()).sum();
    let mixtures = CONCENTRATIONS.map(|concentration| {
        let prior: Vec<f64> = epoch.weights.iter().map(|weight| concentration * weight).collect();
        let posterior: Vec<f64> =
            prior.iter().zip(&epoch.users).map(|(a, users)| a + *users as f64).collect();
        ln_beta(&posterior) - ln_beta(&prior) - under_weights
    });
    let largest = mixtures.into_iter().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = mixtures.iter().map(|one| (one - largest).exp()).sum();
    largest + (sum / CONCENTRATIONS.len() as f64).ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epoch(weights: [f64; 2], users: [u64; 2]) -> SplitEpoch {
        SplitEpoch { weights: weights.to_vec(), users: users.to_vec() }
    }

    #[test]
    fn a_broken_split_is_found_and_a_correct_one_is_not() {
        assert!(!is_broken(&[epoch([0.9, 0.1], [900, 100])]));
        assert!(is_broken(&[epoch([0.9, 0.1], [800, 200])]));
        // Each epoch has its own weights.
        assert!(!is_broken(&[epoch([0.9, 0.1], [900, 100]), epoch([0.5, 0.5], [5000, 5000])]));
        assert!(is_broken(&[epoch([0.9, 0.1], [900, 100]), epoch([0.9, 0.1], [5000, 5000])]));
        assert!(ln_evidence(&[epoch([0.5, 0.5], [0, 0])]).abs() < 1e-9);
    }
}
