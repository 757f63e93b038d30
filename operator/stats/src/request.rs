//! Tests that assign single requests and not users: the design itself gives the variance.
//!
//! Each request counts with the inverse of the probability of its arm. That holds also while the weights
//! change, because every request has the probability of its own time.

/// Sums of one arm within a time of constant weights.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RequestSums {
    /// Probability of the arm, above 0.
    pub probability: f64,
    /// Requests.
    pub requests: f64,
    /// Sum of the values.
    pub sum: f64,
    /// Sum of the squares of the values.
    pub squares: f64,
}

/// Sums of both arms within a time of constant weights.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RequestEpoch {
    /// The treatment.
    pub treatment: RequestSums,
    /// The control.
    pub control: RequestSums,
}

/// An estimate with an interval that holds at every look.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RequestDifference {
    /// Mean of the treatment minus mean of the control.
    pub estimate: f64,
    /// Half the width of the interval.
    pub half_width: f64,
}

/// The difference of the means over all requests. `center` is subtracted from all values: a past mean makes
/// the interval narrow. `eta` fixes where it is tightest. `None` without requests.
#[must_use]
pub fn difference(epochs: &[RequestEpoch], center: f64, eta: f64, alpha: f64) -> Option<RequestDifference> {
    let (mut all, mut sum, mut square) = (0.0, 0.0, 0.0);
    for epoch in epochs {
        for (sums, sign) in [(epoch.treatment, 1.0), (epoch.control, -1.0)] {
            if sums.requests <= 0.0 {
                continue;
            }
            let centred = sums.sum - center * sums.requests;
            let squares = sums.squares - 2.0 * center * sums.sum + center * center * sums.requests;
            all += sums.requests;
            sum += sign * centred / sums.probability;
            square += squares / sums.probability.powi(2);
        }
    }
    if all <= 0.0 {
        return None;
    }
    let eta = eta * eta;
    let width = ((1.0 + eta * square) / eta * ((1.0 + eta * square) / (alpha * alpha)).ln()).sqrt();
    Some(RequestDifference { estimate: sum / all, half_width: width / all })
}

/// The `eta` with which the interval is tightest at about this sum of squares.
#[must_use]
pub fn eta_for(square: f64, alpha: f64) -> f64 {
    let needed = -2.0 * alpha.ln();
    ((needed + needed.ln_1p()) / square).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sums(probability: f64, requests: f64, mean: f64) -> RequestSums {
        RequestSums { probability, requests, sum: requests * mean, squares: requests * (mean * mean + 1.0) }
    }

    #[test]
    fn changing_weights_do_not_bias_the_estimate() {
        // The level moves from 10 to 20 while the weights change; the treatment adds 1 in both.
        let epoch = |p: f64, level: f64| RequestEpoch {
            treatment: sums(p, 10_000.0 * p, level + 1.0),
            control: sums(1.0 - p, 10_000.0 * (1.0 - p), level),
        };
        let epochs = [epoch(0.1, 10.0), epoch(0.5, 20.0)];
        let eta = eta_for(20_000.0 * 100.0, 0.05);
        let found = difference(&epochs, 15.0, eta, 0.05).unwrap();
        assert!((found.estimate - 1.0).abs() < 1e-9, "{found:?}");
        assert!(found.half_width.is_finite() && found.half_width > 0.0);
        assert!(difference(&epochs, 0.0, eta, 0.05).unwrap().half_width > found.half_width);
        assert_eq!(difference(&[], 0.0, 1.0, 0.05), None);
    }
}
