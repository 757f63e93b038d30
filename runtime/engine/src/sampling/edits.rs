//! The edits of a row of logits before a token is chosen: bias, grammar and penalties, in this order.

use crate::grammar::Mask;
use crate::request::GenerateParams;
use std::collections::HashMap;

/// The edits of one sequence, and the token counts that they need.
#[derive(Debug)]
pub(crate) struct Edits {
    bias: Vec<(u32, f32)>,
    repetition: f32,
    presence: f32,
    frequency: f32,
    /// How often each token was produced, 0 for tokens of the prompt alone. Empty without penalties.
    counts: HashMap<u32, u32>,
}

impl Edits {
    pub(crate) fn new(params: &GenerateParams, prompt: &[u32]) -> Self {
        let repetition = params.repetition_penalty;
        Self {
            bias: params.logit_bias.clone(),
            repetition,
            presence: params.presence_penalty,
            frequency: params.frequency_penalty,
            // Presence and frequency penalties concern the answer; only the repetition penalty includes the
            // prompt.
            counts: if repetition == 1.0 {
                HashMap::new()
            } else {
                prompt.iter().map(|id| (*id, 0)).collect()
            },
        }
    }

    /// Makes these tokens impossible: with the least finite logit their share is 0.
    pub(crate) fn exclude(&mut self, ids: &[u32]) {
        self.bias.extend(ids.iter().map(|id| (*id, f32::NEG_INFINITY)));
    }

    fn penalises(&self) -> bool {
        self.repetition != 1.0 || self.presence != 0.0 || self.frequency != 0.0
    }

    /// Whether rows stay unchanged.
    pub(crate) fn is_empty(&self) -> bool {
        self.bias.is_empty() && !self.penalises()
    }

    /// Records a produced token.
    pub(crate) fn record(&mut self, id: u32) {
        if self.penalises() {
            let count = self.counts.entry(id).or_default();
            *count = count.saturating_add(1);
        }
    }

    /// Edits a row of finite logits. A positive logit is divided by the repetition penalty and a negative one
    /// is multiplied by it. The result is finite, except for minus infinity where the mask forbids a token.
    pub(crate) fn apply(&self, row: &mut [f32], mask: Option<&Mask>) {
        for (id, bias) in &self.bias {
            if let Some(logit) = row.get_mut(*id as usize) {
                *logit = finite(*logit + bias);
            }
        }
        if let Some(mask) = mask {
            mask.apply(row);
        }
        for (id, produced) in &self.counts {
            let Some(logit) = row.get_mut(*id as usize).filter(|logit| logit.is_finite()) else { continue };
            if self.repetition != 1.0 {
                *logit = if *logit > 0.0 { *logit / self.repetition } else { *logit * self.repetition };
            }
            if *produced > 0 {
                *logit -= self.frequency * *produced as f32 + self.presence;
            }
            *logit = finite(*logit);
        }
    }
}

/// Limits a logit to finite numbers. Every setting is finite, so that no operation gives NaN.
fn finite(logit: f32) -> f32 {
    logit.clamp(f32::MIN, f32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edited(params: &GenerateParams, prompt: &[u32], produced: &[u32], mut row: Vec<f32>) -> Vec<f32> {
        let mut edits = Edits::new(params, prompt);
        for id in produced {
            edits.record(*id);
        }
        edits.apply(&mut row, None);
        row
    }

    #[test]
    fn excluded_tokens_get_the_least_logit() {
        let mut edits = Edits::new(&GenerateParams::greedy("", 1), &[]);
        assert!(edits.is_empty());
        edits.exclude(&[1]);
        let mut row = [1.0, 9.0, 2.0];
        edits.apply(&mut row, None);
        assert_eq!((row, edits.is_empty()), ([1.0, f32::MIN, 2.0], false));
    }

    #[test]
    fn the_repetition_penalty_depends_on_the_sign_of_a_logit() {
        let params = GenerateParams { repetition_penalty: 2.0, ..GenerateParams::greedy("", 1) };
        let row = edited(&params, &[0, 0, 1], &[2, 2], vec![4.0, -4.0, 1.0, 4.0]);
        assert_eq!(row, [2.0, -8.0, 0.5, 4.0]);
    }

    #[test]
    fn presence_and_frequency_penalties_ignore_the_prompt() {
        let params = GenerateParams {
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            ..GenerateParams::greedy("", 1)
        };
        let row = edited(&params, &[0], &[1, 2, 2], vec![1.0, 1.0, 1.0]);
        assert_eq!(row, [1.0, 0.25, 0.0]);
    }

    #[test]
    fn the_bias_is_added_before_penalties() {
        let params = GenerateParams {
            repetition_penalty: 2.0,
            logit_bias: vec![(0, 3.0)],
            ..GenerateParams::greedy("", 1)
        };
        assert_eq!(edited(&params, &[0], &[], vec![1.0, 1.0]), [2.0, 1.0]);
    }

    #[test]
    fn without_penalties_no_tokens_are_counted() {
        let mut edits = Edits::new(&GenerateParams::greedy("", 1), &[1, 2, 3]);
        edits.record(4);
        assert!(edits.is_empty() && edits.counts.is_empty());
    }

    #[test]
    fn edits_never_make_a_finite_logit_infinite() {
        for repetition_penalty in [1e-38, 0.01, 10.0] {
            let params = GenerateParams {
                repetition_penalty,
                presence_penalty: -2.0,
                frequency_penalty: 2.0,
                logit_bias: vec![(0, 100.0), (1, -100.0)],
                ..GenerateParams::greedy("", 1)
            };
            let row = vec![f32::MAX, f32::MIN, f32::MAX, f32::MIN, 20.0];
            let row = edited(&params, &[0, 1, 2, 3, 4], &[2, 3, 4], row);
            assert!(row.iter().all(|logit| logit.is_finite()), "{repetition_penalty}: {row:?}");
        }
    }
}
