//! Which rows of a step are parts of prompts whose projections may be computed in another way.
//!
//! Rows of prompts are many, so their weights are unpacked to bf16 once for all of them. The bits of such a
//! row differ from those of the row alone. So only sequences with many rows in the step are computed so:
//! decoding rows and draft tokens keep the bits that they have in any step.

use trustformers_plan::StepInput;

/// Fewest rows of a sequence in a step that are computed as a prompt. With fewer rows unpacking to bf16 takes
/// longer than it saves; draft tokens are at most eight.
const LEAST_PROMPT_ROWS: usize = 64;

/// The rows of a step, in two lists.
#[derive(Debug, Default)]
pub(crate) struct PromptRows {
    /// Rows of long parts of prompts, ascending.
    pub(crate) prompts: Vec<u32>,
    /// All other rows, ascending.
    pub(crate) others: Vec<u32>,
    /// Where each row is in its list.
    indices: Vec<u32>,
}

/// A row's place in one of the lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowPlace {
    pub(crate) is_prompt: bool,
    pub(crate) index: usize,
}

impl PromptRows {
    /// Lists the rows of a step. Without `enabled` no row is part of a prompt.
    pub(crate) fn list(&mut self, input: &StepInput, enabled: bool) {
        let Self { prompts, others, indices } = self;
        for list in [&mut *prompts, &mut *others, &mut *indices] {
            list.clear();
        }
        for sequence in 0..input.sequences() {
            let rows = input.rows_of(sequence);
            let list = if enabled && rows.len() >= LEAST_PROMPT_ROWS { &mut *prompts } else { &mut *others };
            for row in rows {
                // Validation bounds rows by the plan, which counts them in 32 bits.
                indices.push(list.len() as u32);
                list.push(row as u32);
            }
        }
    }

    /// The place of a row.
    pub(crate) fn place(&self, row: usize) -> RowPlace {
        let index = self.indices[row] as usize;
        RowPlace { is_prompt: self.prompts.get(index) == Some(&(row as u32)), index }
    }
}

#[cfg(test)]
mod tests {
    use trustformers_plan::{LogitsRows, SequenceStep};

    use super::*;

    #[test]
    fn only_long_sequences_are_prompts() {
        let mut input = StepInput::new();
        for len in [1, LEAST_PROMPT_ROWS, LEAST_PROMPT_ROWS - 1, LEAST_PROMPT_ROWS + 1] {
            let tokens = vec![0; len];
            input.push_sequence(SequenceStep {
                tokens: &tokens,
                cached_tokens: 0,
                blocks: &[],
                logits: LogitsRows::None,
            });
        }
        let mut rows = PromptRows::default();
        rows.list(&input, true);
        assert_eq!((rows.prompts.len(), rows.others.len()), (129, 64));
        assert_eq!((rows.others[0], rows.prompts[0], rows.others[1]), (0, 1, 65));
        for row in 0..input.rows() {
            let RowPlace { is_prompt, index } = rows.place(row);
            let list = if is_prompt { &rows.prompts } else { &rows.others };
            assert_eq!(list[index] as usize, row);
        }
        rows.list(&input, false);
        assert!(rows.prompts.is_empty() && (0..input.rows()).all(|row| !rows.place(row).is_prompt));
    }
}
