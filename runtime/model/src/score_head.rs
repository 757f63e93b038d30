//! The end of a classifier, on the host: from the rows that the device gives to logits, and from logits to
//! scores.
//!
//! The last projection has as many rows as there are labels, so it costs less than one row of any layer. Its
//! sums are made in one order, so that a text's scores do not depend on what else was computed with it.

use crate::arch::TensorProblem;
use crate::arch::bert::HeadOut;
use crate::arch::encoder_family::HeadActivation;
use trustformers_plan::Weight;

/// How the logits of a text become its scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScoreActivation {
    /// Labels exclude each other: the scores of a text sum to 1.
    Softmax,
    /// Each label by itself: every score is between 0 and 1.
    Sigmoid,
    /// The logits themselves, of any size.
    Identity,
}

impl ScoreActivation {
    /// The word in answers.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Softmax => "softmax",
            Self::Sigmoid => "sigmoid",
            Self::Identity => "none",
        }
    }

    /// Turns the logits of one text into scores.
    pub fn apply(self, logits: &mut [f32]) {
        match self {
            Self::Softmax => {
                let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let shares: Vec<f64> =
                    logits.iter().map(|logit| (f64::from(*logit) - f64::from(largest)).exp()).collect();
                let sum: f64 = shares.iter().sum();
                for (logit, share) in logits.iter_mut().zip(shares) {
                    *logit = (share / sum) as f32;
                }
            }
            Self::Sigmoid => {
                for logit in logits {
                    *logit = (1.0 / (1.0 + (-f64::from(*logit)).exp())) as f32;
                }
            }
            Self::Identity => {}
        }
    }
}

/// The end of a classifier.
#[derive(Debug)]
pub(crate) struct ScoreHead {
    /// Where tokens have labels, the device has computed it.
    last: Option<LastProjection>,
    /// One for each label.
    bias: Vec<f32>,
}

/// The last projection of a classifier, with the activation before it.
#[derive(Debug)]
struct LastProjection {
    activation: HeadActivation,
    /// Labels × width.
    weight: Vec<f32>,
    width: usize,
}

impl ScoreHead {
    /// Checks the tensors of a head whose input is `width` wide.
    pub(crate) fn new(
        out: &HeadOut,
        activation: HeadActivation,
        width: usize,
    ) -> Result<Self, TensorProblem> {
        let HeadOut { weight, bias } = out;
        let labels = weight.rows();
        let wrong = |tensor: &Weight, wanted: String| TensorProblem {
            name: tensor.name().to_owned(),
            why: format!(
                "it is {} x {}, {wanted} was expected; download the model again",
                tensor.rows(),
                tensor.cols()
            ),
        };
        if weight.cols() != width || labels == 0 {
            return Err(wrong(weight, format!("labels x {width}")));
        }
        if (bias.rows(), bias.cols()) != (1, labels) {
            return Err(wrong(bias, format!("1 x {labels}")));
        }
        let mut values = vec![0.0; labels * width];
        for (row, out) in values.chunks_exact_mut(width).enumerate() {
            weight.dequantise_row(row, out);
        }
        let mut biases = vec![0.0; labels];
        bias.dequantise_row(0, &mut biases);
        Ok(Self { last: Some(LastProjection { activation, weight: values, width }), bias: biases })
    }

    /// The head of rows that the device has projected: it adds the bias, which is 1 × labels.
    pub(crate) fn of_labels(bias: &Weight) -> Self {
        let mut biases = vec![0.0; bias.cols()];
        bias.dequantise_row(0, &mut biases);
        Self { last: None, bias: biases }
    }

    /// How many labels there are.
    pub(crate) fn labels(&self) -> usize {
        self.bias.len()
    }

    /// The logits of a text, or of a token, one for each label.
    pub(crate) fn logits(&self, row: &[f32]) -> Vec<f32> {
        let Some(LastProjection { activation, weight, width }) = &self.last else {
            return row.iter().zip(&self.bias).map(|(value, bias)| value + bias).collect();
        };
        let active: Vec<f64> = row
            .iter()
            .map(|value| match activation {
                HeadActivation::Tanh => f64::from(*value).tanh(),
                HeadActivation::Relu => f64::from(value.max(0.0)),
                // The device has computed it, or there is none.
                HeadActivation::Gelu | HeadActivation::None => f64::from(*value),
            })
            .collect();
        let label = |(weights, bias): (&[f32], &f32)| {
            let products = weights.iter().zip(&active).map(|(weight, value)| f64::from(*weight) * value);
            (products.sum::<f64>() + f64::from(*bias)) as f32
        };
        weight.chunks_exact(*width).zip(&self.bias).map(label).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(activation: HeadActivation, width: usize) -> Result<ScoreHead, TensorProblem> {
        let out = HeadOut {
            weight: Weight::from_f32("out", (2, 2), &[1.0, -1.0, 0.5, 2.0]).unwrap(),
            bias: Weight::from_f32("bias", (1, 2), &[0.25, -0.25]).unwrap(),
        };
        ScoreHead::new(&out, activation, width)
    }

    #[test]
    fn logits_follow_their_formula() {
        let row = [0.5_f32, -0.25];
        let (a, b) = (0.5_f64.tanh(), (-0.25_f64).tanh());
        let wanted = [(a - b + 0.25) as f32, (0.5 * a + 2.0 * b - 0.25) as f32];
        assert_eq!(head(HeadActivation::Tanh, 2).unwrap().logits(&row), wanted);
        assert_eq!(head(HeadActivation::Relu, 2).unwrap().logits(&row), [0.75, 0.0]);
        assert_eq!(head(HeadActivation::Gelu, 2).unwrap().logits(&row), [1.0, -0.5]);
        let bias = Weight::from_f32("bias", (1, 2), &[0.25, -0.25]).unwrap();
        let of_token = ScoreHead::of_labels(&bias);
        assert_eq!((of_token.labels(), of_token.logits(&row)), (2, vec![0.75, -0.5]));
        let error = head(HeadActivation::Tanh, 3).unwrap_err().to_string();
        assert_eq!(error, "tensor out: it is 2 x 2, labels x 3 was expected; download the model again");
    }

    #[test]
    fn scores_follow_their_formulas_for_large_logits_too() {
        let apply = |activation: ScoreActivation, logits: [f32; 2]| {
            let mut scores = logits;
            activation.apply(&mut scores);
            scores
        };
        assert_eq!(apply(ScoreActivation::Softmax, [1000.0, 1000.0]), [0.5, 0.5]);
        let [first, second] = apply(ScoreActivation::Softmax, [1.0, 0.0]);
        assert!((first - 0.731_058_6).abs() < 1e-6 && (first + second - 1.0).abs() < 1e-6);
        assert_eq!(apply(ScoreActivation::Sigmoid, [0.0, -1000.0]), [0.5, 0.0]);
        assert_eq!(apply(ScoreActivation::Identity, [3.0, -4.0]), [3.0, -4.0]);
    }
}
