//! How long a test takes.

/// Standard normal quantile of a power of 80 %.
const POWER_Z: f64 = 0.841_621_233_572_914_3;

/// The effect that a test with this standard error finds with a power of 80 % at this look.
#[must_use]
pub fn detectable_effect(standard_error: f64, tau: f64, alpha: f64) -> f64 {
    let u = (tau / standard_error).powi(2);
    (((1.0 + 1.0 / u) * (u.ln_1p() - 2.0 * alpha.ln())).sqrt() + POWER_Z) * standard_error
}

/// Information with which a test finds `effect` with a power of 80 %.
#[must_use]
pub fn needed_information(effect: f64, tau: f64, alpha: f64) -> f64 {
    // The detectable effect falls with the information. 200 halvings of the logarithm's range are exact.
    let (mut low, mut high) = ((1e-12_f64).ln(), (1e30_f64).ln());
    for _ in 0..200 {
        let middle: f64 = 0.5 * (low + high);
        let found = detectable_effect((-0.5 * middle).exp(), tau, alpha) <= effect;
        if found { high = middle } else { low = middle }
    }
    high.exp()
}

/// Days until `effect` is found, at the information and its growth per day that the test has now. `None` if
/// the information does not grow.
#[must_use]
pub fn days_left(needed: f64, information: f64, per_day: f64) -> Option<f64> {
    if information >= needed {
        return Some(0.0);
    }
    (per_day > 0.0).then(|| (needed - information) / per_day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sequential::tau_for;

    #[test]
    fn the_needed_information_detects_the_effect() {
        let tau = tau_for(0.05);
        let information = needed_information(0.02, tau, 0.05);
        let found = detectable_effect(information.sqrt().recip(), tau, 0.05);
        assert!((found - 0.02).abs() < 1e-9, "{found}");
        assert!(needed_information(0.05, tau, 0.05) < information);
        assert_eq!(days_left(100.0, 40.0, 20.0), Some(3.0));
        assert_eq!(days_left(100.0, 140.0, 0.0), Some(0.0));
        assert_eq!(days_left(100.0, 40.0, 0.0), None);
    }
}
