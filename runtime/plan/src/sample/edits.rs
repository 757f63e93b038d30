//! The edits of a row of logits before a token is chosen: biases, mask and penalties, in this order.

use super::SampleSpec;

/// Penalties for tokens that the prompt or the answer has already.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Penalties {
    /// Divides the positive and multiplies the negative logits of tokens of prompt and answer; 1: none.
    pub repetition: f32,
    /// Subtracted from the logits of tokens of the answer; 0: none.
    pub presence: f32,
    /// Subtracted once for each time that a token is in the answer; 0: none.
    pub frequency: f32,
}

impl Penalties {
    /// No penalty.
    pub const NONE: Self = Self { repetition: 1.0, presence: 0.0, frequency: 0.0 };

    /// Whether they change nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.repetition == 1.0 && self.presence == 0.0 && self.frequency == 0.0
    }
}

/// How often a token is in an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenCount {
    /// The token.
    pub id: u32,
    /// How often it was produced; 0 for a token of the prompt alone.
    pub produced: u32,
}

/// Edits a row of finite logits. The result is finite, except for minus infinity where the mask forbids a
/// token.
pub(super) fn apply(spec: &SampleSpec<'_>, row: &mut [f32]) {
    for (id, bias) in spec.bias {
        if let Some(logit) = row.get_mut(*id as usize) {
            *logit = biased(*logit, *bias);
        }
    }
    if let Some(mask) = spec.mask {
        forbid(mask, row);
    }
    if spec.penalties.is_empty() {
        return;
    }
    for count in spec.counts {
        let drafted = spec.drafted.iter().filter(|id| **id == count.id).count();
        penalise(&spec.penalties, TokenCount { produced: added(count.produced, drafted), ..*count }, row);
    }
    for (index, &id) in spec.drafted.iter().enumerate() {
        let is_first = !spec.drafted[..index].contains(&id);
        if is_first && !spec.counts.iter().any(|count| count.id == id) {
            let drafted = spec.drafted.iter().filter(|other| **other == id).count();
            penalise(&spec.penalties, TokenCount { id, produced: added(0, drafted) }, row);
        }
    }
}

/// A logit with a bias.
pub(super) fn biased(logit: f32, bias: f32) -> f32 {
    finite(logit + bias)
}

fn added(produced: u32, drafted: usize) -> u32 {
    produced.saturating_add(u32::try_from(drafted).unwrap_or(u32::MAX))
}

fn penalise(penalties: &Penalties, count: TokenCount, row: &mut [f32]) {
    let Some(logit) = row.get_mut(count.id as usize).filter(|logit| logit.is_finite()) else { return };
    if penalties.repetition != 1.0 {
        *logit = if *logit > 0.0 { *logit / penalties.repetition } else { *logit * penalties.repetition };
    }
    if count.produced > 0 {
        *logit -= penalties.frequency * count.produced as f32 + penalties.presence;
    }
    *logit = finite(*logit);
}

/// Makes every token impossible that is not in the mask: one bit for each id, 32 in a word. Ids beyond the
/// last word are not in it.
fn forbid(mask: &[u32], row: &mut [f32]) {
    let covered = row.len().min(mask.len() * 32);
    for (bits, logits) in mask.iter().zip(row[..covered].chunks_mut(32)) {
        if *bits == 0 {
            logits.fill(f32::NEG_INFINITY);
        } else if *bits != u32::MAX {
            for (logit, bit) in logits.iter_mut().zip(0..) {
                *logit = if bits >> bit & 1 == 1 { *logit } else { f32::NEG_INFINITY };
            }
        }
    }
    row[covered..].fill(f32::NEG_INFINITY);
}

/// Limits a logit to finite numbers. Every setting is finite, so that no operation gives NaN.
fn finite(logit: f32) -> f32 {
    logit.clamp(f32::MIN, f32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edited(spec: &SampleSpec<'_>, mut row: Vec<f32>) -> Vec<f32> {
        apply(spec, &mut row);
        row
    }

    fn counts(all: &[(u32, u32)]) -> Vec<TokenCount> {
        all.iter().map(|(id, produced)| TokenCount { id: *id, produced: *produced }).collect()
    }

    #[test]
    fn an_impossible_bias_gives_the_least_finite_logit() {
        let spec = SampleSpec { bias: &[(1, f32::NEG_INFINITY)], ..SampleSpec::greedy(0) };
        assert_eq!(edited(&spec, vec![1.0, 9.0, 2.0]), [1.0, f32::MIN, 2.0]);
    }

    #[test]
    fn the_repetition_penalty_depends_on_the_sign_of_a_logit() {
        let spec = SampleSpec {
            penalties: Penalties { repetition: 2.0, ..Penalties::NONE },
            counts: &counts(&[(0, 0), (1, 0), (2, 2)]),
            ..SampleSpec::greedy(0)
        };
        assert_eq!(edited(&spec, vec![4.0, -4.0, 1.0, 4.0]), [2.0, -8.0, 0.5, 4.0]);
    }

    #[test]
    fn presence_and_frequency_penalties_concern_produced_tokens() {
        let spec = SampleSpec {
            penalties: Penalties { presence: 0.5, frequency: 0.25, ..Penalties::NONE },
            counts: &counts(&[(0, 0), (1, 1), (2, 2)]),
            ..SampleSpec::greedy(0)
        };
        assert_eq!(edited(&spec, vec![1.0, 1.0, 1.0]), [1.0, 0.25, 0.0]);
    }

    #[test]
    fn drafted_tokens_count_as_produced() {
        let penalties = Penalties { repetition: 1.5, presence: 0.5, frequency: 0.25 };
        let row = vec![1.0, -2.0, 3.0, 4.0];
        let produced =
            SampleSpec { penalties, counts: &counts(&[(0, 2), (1, 1), (2, 3)]), ..SampleSpec::greedy(0) };
        let drafted = SampleSpec {
            penalties,
            counts: &counts(&[(0, 0), (2, 2)]),
            drafted: &[0, 1, 2, 0],
            ..SampleSpec::greedy(0)
        };
        assert_eq!(edited(&drafted, row.clone()), edited(&produced, row));
    }

    #[test]
    fn the_bias_is_added_before_penalties() {
        let spec = SampleSpec {
            bias: &[(0, 3.0)],
            penalties: Penalties { repetition: 2.0, ..Penalties::NONE },
            counts: &counts(&[(0, 0)]),
            ..SampleSpec::greedy(0)
        };
        assert_eq!(edited(&spec, vec![1.0, 1.0]), [2.0, 1.0]);
    }

    #[test]
    fn ids_outside_the_mask_are_impossible_and_stay_so() {
        let mut mask = vec![u32::MAX, 0, 1 << 3];
        mask[0] &= !2;
        let penalties = Penalties { repetition: 2.0, ..Penalties::NONE };
        let counts = counts(&[(1, 1), (40, 1)]);
        let spec = SampleSpec { mask: Some(&mask), penalties, counts: &counts, ..SampleSpec::greedy(0) };
        let row = edited(&spec, vec![1.0; 100]);
        let allowed: Vec<usize> = (0..100).filter(|id| row[*id].is_finite()).collect();
        let wanted: Vec<usize> = (0..32).filter(|id| *id != 1).chain([67]).collect();
        assert_eq!(allowed, wanted);
    }

    #[test]
    fn edits_never_make_a_finite_logit_infinite() {
        for repetition in [1e-38, 0.01, 10.0] {
            let spec = SampleSpec {
                bias: &[(0, 100.0), (1, -100.0)],
                penalties: Penalties { repetition, presence: -2.0, frequency: 2.0 },
                counts: &counts(&[(0, 0), (1, 0), (2, 1), (3, 1), (4, 1)]),
                ..SampleSpec::greedy(0)
            };
            let row = edited(&spec, vec![f32::MAX, f32::MIN, f32::MAX, f32::MIN, 20.0]);
            assert!(row.iter().all(|logit| logit.is_finite()), "{repetition}: {row:?}");
        }
    }
}
