//! What the choice of a token depends on beside its logits: biases, penalties, and the counts for these.

use crate::request::GenerateParams;
use std::collections::HashMap;
use trustformers_plan::{Penalties, TokenCount};

/// The edits of one sequence, and the token counts that they need.
#[derive(Debug)]
pub(crate) struct Edits {
    pub(crate) bias: Vec<(u32, f32)>,
    pub(crate) penalties: Penalties,
    /// How often each token was produced, 0 for tokens of the prompt alone. Empty without penalties.
    pub(crate) counts: Vec<TokenCount>,
    /// Where each token is in `counts`.
    indices: HashMap<u32, usize>,
}

impl Edits {
    pub(crate) fn new(params: &GenerateParams, prompt: &[u32]) -> Self {
        let mut edits = Self {
            bias: params.logit_bias.clone(),
            penalties: Penalties {
                repetition: params.repetition_penalty,
                presence: params.presence_penalty,
                frequency: params.frequency_penalty,
            },
            counts: Vec::new(),
            indices: HashMap::new(),
        };
        // Presence and frequency penalties concern the answer; only the repetition penalty includes the
        // prompt.
        if params.repetition_penalty != 1.0 {
            for id in prompt {
                edits.count(*id);
            }
        }
        edits
    }

    /// Makes these tokens impossible: with the least finite logit their share is 0.
    pub(crate) fn exclude(&mut self, ids: &[u32]) {
        self.bias.extend(ids.iter().map(|id| (*id, f32::NEG_INFINITY)));
    }

    /// Records a produced token.
    pub(crate) fn record(&mut self, id: u32) {
        if !self.penalties.is_empty() {
            let count = self.count(id);
            count.produced = count.produced.saturating_add(1);
        }
    }

    fn count(&mut self, id: u32) -> &mut TokenCount {
        let Self { counts, indices, .. } = self;
        let index = *indices.entry(id).or_insert_with(|| {
            counts.push(TokenCount { id, produced: 0 });
            counts.len() - 1
        });
        &mut counts[index]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(params: &GenerateParams) -> Vec<(u32, u32)> {
        let mut edits = Edits::new(params, &[1, 2, 2]);
        [2, 3, 3].into_iter().for_each(|id| edits.record(id));
        edits.counts.iter().map(|count| (count.id, count.produced)).collect()
    }

    #[test]
    fn only_the_repetition_penalty_counts_the_prompt() {
        let plain = GenerateParams::greedy("", 1);
        assert_eq!(counts(&plain), []);
        let presence = GenerateParams { presence_penalty: 0.5, ..plain.clone() };
        assert_eq!(counts(&presence), [(2, 1), (3, 2)]);
        let repetition = GenerateParams { repetition_penalty: 1.5, ..plain };
        assert_eq!(counts(&repetition), [(1, 0), (2, 1), (3, 2)]);
    }
}
