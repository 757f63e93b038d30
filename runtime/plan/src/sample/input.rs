//! The rows of one `sample`: how each token is chosen, in lists that a device can copy as they are.

use std::ops::Range;

use super::{Filters, Penalties, TokenCount};
use crate::StepError;

/// How the token of one row is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleSpec<'a> {
    /// The row among the step's rows of logits.
    pub logits_row: usize,
    /// 0: the best token.
    pub temperature: f32,
    /// Which tokens may be drawn.
    pub filters: Filters,
    /// The random number of the draw, in [0, 1); not read where the temperature is 0.
    pub uniform: f64,
    /// Tokens and what is added to their logits; minus infinity makes the share of a token 0.
    pub bias: &'a [(u32, f32)],
    /// One bit for each id that may be chosen, 32 in a word; `None`: all of them.
    pub mask: Option<&'a [u32]>,
    /// Penalties for the tokens in `counts` and `drafted`.
    pub penalties: Penalties,
    /// Each token of prompt and answer once. Only read where there are penalties.
    pub counts: &'a [TokenCount],
    /// Tokens that count as produced once more each.
    pub drafted: &'a [u32],
    /// Whether the answer has the margin.
    pub margin: bool,
    /// How many of the best tokens the answer has with their log probabilities, beside the chosen one.
    pub logprobs: Option<usize>,
}

impl SampleSpec<'_> {
    /// The best token of a row, and nothing else.
    #[must_use]
    pub const fn greedy(logits_row: usize) -> Self {
        Self {
            logits_row,
            temperature: 0.0,
            filters: Filters::NONE,
            uniform: 0.0,
            bias: &[],
            mask: None,
            penalties: Penalties::NONE,
            counts: &[],
            drafted: &[],
            margin: false,
            logprobs: None,
        }
    }

    /// Whether the token is chosen from other logits than the model's own.
    pub(super) fn changes_logits(&self) -> bool {
        !self.bias.is_empty() || self.mask.is_some() || !self.penalties.is_empty()
    }
}

/// The rows of one [`crate::Executable::sample`]; reuse it with [`SampleInput::clear`] so that steps do not
/// allocate.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SampleInput {
    rows: Vec<StoredSpec>,
    biases: Vec<(u32, f32)>,
    masks: Vec<u32>,
    counts: Vec<TokenCount>,
    drafted: Vec<u32>,
}

/// A [`SampleSpec`] whose lists are ranges of the input's.
#[derive(Debug, Clone, PartialEq)]
struct StoredSpec {
    logits_row: usize,
    temperature: f32,
    filters: Filters,
    uniform: f64,
    bias: Range<usize>,
    mask: Option<Range<usize>>,
    penalties: Penalties,
    counts: Range<usize>,
    drafted: Range<usize>,
    margin: bool,
    logprobs: Option<usize>,
}

impl SampleInput {
    /// No rows.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Removes all rows and keeps the memory.
    pub fn clear(&mut self) {
        let Self { rows, biases, masks, counts, drafted } = self;
        rows.clear();
        biases.clear();
        masks.clear();
        counts.clear();
        drafted.clear();
    }

    /// Adds a row. Rows of logits rise from one to the next; [`Self::validate`] finds others.
    pub fn push(&mut self, spec: &SampleSpec<'_>) {
        let penalises = !spec.penalties.is_empty();
        let counts = if penalises { spec.counts } else { &[] };
        let drafted = if penalises { spec.drafted } else { &[] };
        let row = StoredSpec {
            logits_row: spec.logits_row,
            temperature: spec.temperature,
            filters: spec.filters,
            uniform: spec.uniform,
            bias: appended(&mut self.biases, spec.bias),
            mask: spec.mask.map(|mask| appended(&mut self.masks, mask)),
            penalties: spec.penalties,
            counts: appended(&mut self.counts, counts),
            drafted: appended(&mut self.drafted, drafted),
            margin: spec.margin,
            logprobs: spec.logprobs,
        };
        self.rows.push(row);
    }

    /// How many rows there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is no row.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The row at `index`.
    ///
    /// # Panics
    /// When `index` is not below [`Self::len`].
    #[must_use]
    pub fn row(&self, index: usize) -> SampleSpec<'_> {
        let row = &self.rows[index];
        SampleSpec {
            logits_row: row.logits_row,
            temperature: row.temperature,
            filters: row.filters,
            uniform: row.uniform,
            bias: &self.biases[row.bias.clone()],
            mask: row.mask.clone().map(|mask| &self.masks[mask]),
            penalties: row.penalties,
            counts: &self.counts[row.counts.clone()],
            drafted: &self.drafted[row.drafted.clone()],
            margin: row.margin,
            logprobs: row.logprobs,
        }
    }

    /// Checks the rows for a step with `logits_rows` rows of logits.
    ///
    /// # Errors
    /// [`StepError::SampleRow`] for a row that the step does not have or that does not rise.
    pub fn validate(&self, logits_rows: usize) -> Result<(), StepError> {
        let rows = || self.rows.iter().map(|row| row.logits_row);
        let falls = rows().zip(rows().skip(1)).find(|(row, next)| row >= next).map(|(_, next)| next);
        let outside = rows().next_back().filter(|row| *row >= logits_rows);
        falls.or(outside).map_or(Ok(()), |row| Err(StepError::SampleRow { row, rows: logits_rows }))
    }
}

/// Appends values; returns where they are.
fn appended<T: Copy>(list: &mut Vec<T>, values: &[T]) -> Range<usize> {
    let start = list.len();
    list.extend_from_slice(values);
    start..list.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_as_they_were_pushed() {
        let counts = [TokenCount { id: 3, produced: 1 }];
        let full = SampleSpec {
            temperature: 0.5,
            bias: &[(1, 2.0)],
            mask: Some(&[7, 9]),
            penalties: Penalties { presence: 1.0, ..Penalties::NONE },
            counts: &counts,
            drafted: &[4, 5],
            logprobs: Some(2),
            ..SampleSpec::greedy(1)
        };
        let all = [SampleSpec::greedy(0), full, SampleSpec { mask: Some(&[1]), ..SampleSpec::greedy(2) }];
        let mut input = SampleInput::new();
        for _ in 0..2 {
            input.clear();
            all.iter().for_each(|spec| input.push(spec));
            assert_eq!((0..input.len()).map(|row| input.row(row)).collect::<Vec<_>>(), all);
        }
    }

    #[test]
    fn rows_that_the_step_lacks_are_refused() {
        let of = |rows: &[usize]| {
            let mut input = SampleInput::new();
            rows.iter().for_each(|row| input.push(&SampleSpec::greedy(*row)));
            input.validate(3)
        };
        for rows in [&[][..], &[0, 1, 2], &[0, 2], &[2]] {
            assert_eq!(of(rows), Ok(()), "{rows:?}");
        }
        for (rows, row) in [(&[3][..], 3), (&[0, 0], 0), (&[2, 1], 1)] {
            assert_eq!(of(rows), Err(StepError::SampleRow { row, rows: 3 }), "{rows:?}");
        }
    }
}
