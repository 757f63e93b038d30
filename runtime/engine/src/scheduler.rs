//! Which rows the next step has: a pure function, so that fairness can be read and tested without a model.

/// What a running sequence wants from the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wants {
    /// The rest of its prompt, this many tokens (at least one); the last of them gives its first token.
    Prompt(usize),
    /// One row: its latest token.
    Decode,
}

/// Rows for each sequence, in the order given (admission order). Decoding sequences come first, one row each, so that
/// a long prompt never stops a stream; what is left of the budget goes to prompts, oldest first.
///
/// `budget` is at least the number of sequences, hence every decoding one gets its row.
pub(crate) fn rows(wants: &[Wants], budget: usize, rows: &mut Vec<usize>) {
    let decoding = wants.iter().filter(|want| **want == Wants::Decode).count();
    let mut left = budget.saturating_sub(decoding);
    rows.clear();
    rows.extend(wants.iter().map(|want| match want {
        Wants::Decode => 1,
        Wants::Prompt(tokens) => {
            let given = left.min(*tokens);
            left -= given;
            given
        }
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(wants: &[Wants], budget: usize) -> Vec<usize> {
        let mut out = Vec::new();
        rows(wants, budget, &mut out);
        out
    }

    #[test]
    fn decoding_comes_first_then_prompts_in_order() {
        let wants = [Wants::Prompt(10), Wants::Decode, Wants::Prompt(10), Wants::Decode];
        assert_eq!(split(&wants, 8), [6, 1, 0, 1]);
        assert_eq!(split(&wants, 16), [10, 1, 4, 1]);
        assert_eq!(split(&wants, 100), [10, 1, 10, 1]);
    }

    #[test]
    fn prompts_wait_when_all_rows_decode() {
        assert_eq!(split(&[Wants::Decode, Wants::Decode, Wants::Prompt(3)], 2), [1, 1, 0]);
    }
}
