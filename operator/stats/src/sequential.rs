//! Tests and intervals that hold at every look.
//!
//! A mixture of likelihood ratios over a normal prior of the effect with standard deviation `tau` is a test
//! martingale under no effect: it ever exceeds `1/alpha` with a probability of at most `alpha`. Its clock is
//! the information `1/se²`. A user count is no clock: with returning users it stands still while the estimate
//! moves.

use crate::buckets::ArmDifference;
use crate::special::normal_cdf;

/// Width of the prior for a smallest effect that matters: the test is tightest when the information has just
/// reached what that effect needs.
#[must_use]
pub fn tau_for(smallest_effect: f64) -> f64 {
    0.7 * smallest_effect
}

/// What one look gives.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Look {
    /// Logarithm of the evidence against no effect.
    pub ln_evidence: f64,
    /// Half the width of the interval around the estimate; infinite while there is too little information.
    pub half_width: f64,
    /// `1/se²`.
    pub information: f64,
}

/// A look with the variance taken as exact.
#[must_use]
pub fn normal_look(difference: &ArmDifference, tau: f64, alpha: f64) -> Look {
    let se = difference.standard_error;
    let (z, u) = (difference.estimate / se, (tau / se).powi(2));
    Look {
        ln_evidence: -0.5 * u.ln_1p() + z * z * u / (2.0 * (1.0 + u)),
        half_width: se * ((1.0 + 1.0 / u) * (u.ln_1p() - 2.0 * alpha.ln())).sqrt(),
        information: se.powi(-2),
    }
}

/// A look with the variance estimated from few buckets: Student's t in place of the normal distribution.
#[must_use]
pub fn student_look(difference: &ArmDifference, tau: f64, alpha: f64) -> Look {
    let (se, nu) = (difference.standard_error, difference.degrees_of_freedom);
    let (z, r) = (difference.estimate / se, 1.0 / (1.0 + (tau / se).powi(2)));
    let x = z * z / nu;
    let q = (r * alpha * alpha).powf(1.0 / (nu + 1.0));
    Look {
        ln_evidence: 0.5 * r.ln() + 0.5 * (nu + 1.0) * (x.ln_1p() - (r * x).ln_1p()),
        half_width: if q > r { se * (nu * (1.0 - q) / (q - r)).sqrt() } else { f64::INFINITY },
        information: se.powi(-2),
    }
}

/// Logarithm of the evidence that the effect is above 0, against at most 0: for guardrails.
#[must_use]
pub fn ln_evidence_above(difference: &ArmDifference, tau: f64) -> f64 {
    let se = difference.standard_error;
    let (z, u) = (difference.estimate / se, (tau / se).powi(2));
    let shrink = u / (1.0 + u);
    std::f64::consts::LN_2 - 0.5 * u.ln_1p() + 0.5 * z * z * shrink + ln_normal_cdf(z * shrink.sqrt())
}

/// Logarithm of the normal distribution function, also where the function itself is 0 in doubles.
fn ln_normal_cdf(z: f64) -> f64 {
    if z > -30.0 {
        return normal_cdf(z).ln();
    }
    // Mills' ratio; at this distance three terms are exact to 1e-8.
    let square = z * z;
    let series = 1.0 - 1.0 / square + 3.0 / (square * square);
    -0.5 * square - 0.5 * (2.0 * std::f64::consts::PI).ln() - (-z).ln() + series.ln()
}

/// The evidence of all looks so far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LookSequence {
    best_ln_evidence: f64,
    information: f64,
    frozen: bool,
    low: f64,
    high: f64,
}

impl Default for LookSequence {
    fn default() -> Self {
        Self {
            best_ln_evidence: 0.0,
            information: 0.0,
            frozen: false,
            low: f64::NEG_INFINITY,
            high: f64::INFINITY,
        }
    }
}

impl LookSequence {
    /// Adds a look at this estimate. Information that falls by more than 5 % freezes the sequence: late heavy
    /// users break the order in which the test is valid.
    pub fn add(&mut self, estimate: f64, look: Look) {
        self.frozen = look.information < 0.95 * self.information;
        self.information = self.information.max(look.information);
        if self.frozen {
            return;
        }
        self.best_ln_evidence = self.best_ln_evidence.max(look.ln_evidence);
        self.low = self.low.max(estimate - look.half_width);
        self.high = self.high.min(estimate + look.half_width);
    }

    /// Probability, valid at every look, of such evidence without an effect.
    #[must_use]
    pub fn p_value(&self) -> f64 {
        (-self.best_ln_evidence).exp()
    }

    /// Whether the last look was not taken because information fell.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.frozen
    }

    /// Whether the intervals of all looks have nothing in common: the effect drifts.
    #[must_use]
    pub fn drifts(&self) -> bool {
        self.low > self.high
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(estimate: f64, standard_error: f64, degrees_of_freedom: f64) -> ArmDifference {
        ArmDifference { estimate, standard_error, degrees_of_freedom, skewness: 0.0 }
    }

    #[test]
    fn the_interval_excludes_no_effect_exactly_when_the_evidence_suffices() {
        for look in [normal_look, student_look] {
            for z in [0.5, 2.0, 3.0, 3.2, 4.0, 8.0] {
                let one = look(&at(z * 0.01, 0.01, 300.0), 0.035, 0.05);
                assert_eq!(one.ln_evidence >= -(0.05_f64.ln()), one.half_width <= z * 0.01, "{z}");
            }
        }
    }

    #[test]
    fn many_buckets_are_nearly_normal() {
        let (normal, student) =
            (normal_look(&at(0.03, 0.01, 1e9), 0.035, 0.05), student_look(&at(0.03, 0.01, 1e9), 0.035, 0.05));
        assert!((normal.ln_evidence - student.ln_evidence).abs() < 1e-6);
        assert!((normal.half_width - student.half_width).abs() < 1e-6);
        assert!(student_look(&at(0.03, 0.01, 5.0), 0.035, 0.05).half_width > 1.5 * normal.half_width);
    }

    #[test]
    fn one_sided_evidence_is_for_one_side() {
        let above = ln_evidence_above(&at(0.05, 0.01, 300.0), 0.035);
        assert!(above > normal_look(&at(0.05, 0.01, 300.0), 0.035, 0.05).ln_evidence);
        assert!(ln_evidence_above(&at(-0.05, 0.01, 300.0), 0.035) < 0.0);
        let far = ln_evidence_above(&at(-1.0, 0.01, 300.0), 0.035);
        assert!(far.is_finite() && far < 0.0, "{far}");
    }

    #[test]
    fn falling_information_freezes_and_disjoint_intervals_are_drift() {
        let mut sequence = LookSequence::default();
        sequence.add(0.05, normal_look(&at(0.05, 0.01, 300.0), 0.035, 0.05));
        let p = sequence.p_value();
        assert!(p < 0.001);
        sequence.add(0.2, normal_look(&at(0.2, 0.02, 300.0), 0.035, 0.05));
        assert!(sequence.is_frozen() && (sequence.p_value() - p).abs() < 1e-15);
        sequence.add(-0.05, normal_look(&at(-0.05, 0.01, 300.0), 0.035, 0.05));
        assert!(sequence.drifts());
    }
}
