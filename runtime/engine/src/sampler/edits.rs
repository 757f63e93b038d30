//! What is changed in a row of logits before anything is chosen: bias, grammar and penalties, in this order.

use crate::grammar::Mask;
use crate::request::GenerateParams;
use std::collections::HashMap;

/// One sequence's edits, and what they have to remember.
#[derive(Debug)]
pub(crate) struct Edits {
    bias: Vec<(u32, f32)>,
    repetition: f32,
    presence: f32,
    frequency: f32,
    /// How often each token was produced; tokens of the prompt are there with 0. Empty where nothing is penalised.
    seen: HashMap<u32, u32>,
}

impl Edits {
    pub(crate) fn new(params: &GenerateParams, prompt: &[u32]) -> Self {
        let repetition = params.repetition_penalty;
        Self {
            bias: params.logit_bias.clone(),
            repetition,
            presence: params.presence_penalty,
            frequency: params.frequency_penalty,
            // Presence and frequency concern what was produced; only repetition asks for the prompt.
            seen: if repetition == 1.0 { HashMap::new() } else { prompt.iter().map(|id| (*id, 0)).collect() },
        }
    }

    fn penalises(&self) -> bool {
        self.repetition != 1.0 || self.presence != 0.0 || self.frequency != 0.0
    }

    /// Whether the next row stays as it is.
    pub(crate) fn none(&self) -> bool {
        self.bias.is_empty() && !self.penalises()
    }

    /// Takes note of a produced token.
    pub(crate) fn produced(&mut self, id: u32) {
        if self.penalises() {
            let count = self.seen.entry(id).or_default();
            *count = count.saturating_add(1);
        }
    }

    /// Changes a row. A positive logit is divided by the repetition penalty and a negative one multiplied with it.
    pub(crate) fn apply(&self, row: &mut [f32], mask: Option<&Mask>) {
        for (id, bias) in &self.bias {
            if let Some(logit) = row.get_mut(*id as usize) {
                *logit += bias;
            }
        }
        if let Some(mask) = mask {
            mask.apply(row);
        }
        for (id, produced) in &self.seen {
            let Some(logit) = row.get_mut(*id as usize) else { continue };
            if self.repetition != 1.0 {
                *logit = if *logit > 0.0 { *logit / self.repetition } else { *logit * self.repetition };
            }
            if *produced > 0 {
                *logit -= self.frequency * *produced as f32 + self.presence;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edited(params: &GenerateParams, prompt: &[u32], produced: &[u32], mut row: Vec<f32>) -> Vec<f32> {
        let mut edits = Edits::new(params, prompt);
        for id in produced {
            edits.produced(*id);
        }
        edits.apply(&mut row, None);
        row
    }

    #[test]
    fn repetition_counts_prompt_and_answer_once_and_turns_with_the_sign() {
        let params = GenerateParams { repetition_penalty: 2.0, ..GenerateParams::greedy("", 1) };
        let row = edited(&params, &[0, 0, 1], &[2, 2], vec![4.0, -4.0, 1.0, 4.0]);
        assert_eq!(row, [2.0, -8.0, 0.5, 4.0]);
    }

    #[test]
    fn presence_and_frequency_count_the_answer_alone() {
        let params = GenerateParams {
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            ..GenerateParams::greedy("", 1)
        };
        let row = edited(&params, &[0], &[1, 2, 2], vec![1.0, 1.0, 1.0]);
        assert_eq!(row, [1.0, 0.25, 0.0]);
    }

    #[test]
    fn bias_comes_before_penalties() {
        let params = GenerateParams {
            repetition_penalty: 2.0,
            logit_bias: vec![(0, 3.0)],
            ..GenerateParams::greedy("", 1)
        };
        assert_eq!(edited(&params, &[0], &[], vec![1.0, 1.0]), [2.0, 1.0]);
    }

    #[test]
    fn without_penalties_nothing_is_remembered() {
        let mut edits = Edits::new(&GenerateParams::greedy("", 1), &[1, 2, 3]);
        edits.produced(4);
        assert!(edits.none() && edits.seen.is_empty());
    }
}
