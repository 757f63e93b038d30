//! Which rows the next step has: a pure function, so that fairness can be read and tested without a model.
//!
//! Sequences that are past their prompt come first, one row each, so that a long prompt never stops a stream. What is
//! left of the budget goes to prompts, in the order of class, of what their tenants were served, and of arrival; what
//! is due, because it has waited long enough, goes before all. So that a step stays short whoever arrives while it
//! runs, prompts have a budget of their own ([`Pace`]); a prompt that is *urgent*, because it fits in one step and is
//! due or its tenant is behind others, is read whole all the same. Those that are not behind pause meanwhile, streams as
//! well, so that its first token comes as soon as it can. They would have waited for it in a shared step just as long, and
//! they never pause twice in a row.

use crate::priority::Priority;
use crate::tenants::Standing;
use std::time::Duration;

/// What a running sequence wants from the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wants {
    /// The rest of its prompt, this many tokens (at least one); the last of them gives its first token.
    Prompt(usize),
    /// One row: its latest token.
    Decode,
}

/// A running sequence's request for rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ask {
    pub(crate) wants: Wants,
    /// Its place's: whether it is not due, its class, and its number in the order of arrival.
    pub(crate) rank: (bool, Priority, u64),
    /// Its tenant's.
    pub(crate) standing: Standing,
    /// Whether it is due, or others were served more than its tenant, or are of a lower class.
    pub(crate) behind: bool,
}

/// How many rows a step may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Budget {
    /// All rows; at least one for every sequence.
    pub(crate) rows: usize,
    /// Those of prompts that are not urgent; at least one.
    pub(crate) prompt_rows: usize,
    /// Whether streams may pause for an urgent prompt.
    pub(crate) may_pause: bool,
}

/// Rows for each sequence, with the room that working them out takes.
#[derive(Debug, Default)]
pub(crate) struct Split {
    /// In the order of the asks.
    pub(crate) rows: Vec<usize>,
    /// Rows of prompts that are not urgent.
    pub(crate) patient_rows: usize,
    /// Rows of urgent prompts.
    pub(crate) urgent_rows: usize,
    /// Streams pause for an urgent prompt.
    pub(crate) pauses: bool,
    prompts: Vec<usize>,
}

impl Split {
    /// Shares a step out.
    pub(crate) fn share_out(&mut self, asks: &[Ask], budget: Budget) {
        let Self { rows, patient_rows, urgent_rows, pauses, prompts } = self;
        rows.clear();
        rows.extend(asks.iter().map(|ask| usize::from(ask.wants == Wants::Decode)));
        let mut left = budget.rows.saturating_sub(rows.iter().sum());
        // A prompt fits in one step if it would with all of these streams beside it.
        let fits = left;
        prompts.clear();
        prompts.extend((0..asks.len()).filter(|index| rows[*index] == 0));
        prompts.sort_unstable_by_key(|index| {
            let Ask { rank: (not_due, class, order), standing, .. } = asks[*index];
            (not_due, class, standing, order)
        });
        (*patient_rows, *urgent_rows) = (0, 0);
        let is_urgent =
            |ask: &Ask| ask.behind && matches!(ask.wants, Wants::Prompt(tokens) if tokens <= fits);
        let alone = budget.may_pause && asks.iter().any(is_urgent);
        *pauses = false;
        if alone {
            let streams = asks.iter().zip(&mut *rows).filter(|(ask, rows)| !ask.behind && **rows > 0);
            for (_, rows) in streams {
                (*rows, *pauses) = (0, true);
                left += 1;
            }
        }
        for index in prompts.iter().copied() {
            let Wants::Prompt(tokens) = asks[index].wants else { continue };
            let urgent = is_urgent(&asks[index]);
            let taken = *patient_rows + *urgent_rows;
            let patient = if alone { 0 } else { budget.prompt_rows.saturating_sub(taken) };
            let given = tokens.min(left).min(if urgent { left } else { patient });
            rows[index] = given;
            left -= given;
            *(if urgent { &mut *urgent_rows } else { &mut *patient_rows }) += given;
        }
    }
}

/// Fewest rows that prompts have in a step: below it, reading the weights for so few rows is most of the work.
const FEWEST_PROMPT_ROWS: usize = 16;

/// Rows by which a step that was short enough lets the next one grow.
const GROWTH_ROWS: usize = 8;

/// How much a step without prompts counts in the time that they take.
const NEWEST: f64 = 0.2;

/// How many rows of prompts a step may have so that it takes about as long as wanted: whoever arrives has to wait for
/// the step that runs. Found by trying: a step that was too long makes the next ones smaller at once, one that was
/// short enough lets them grow slowly.
///
/// Prompts may always take as long as the streams beside them do, so that they are not starved by a large model's
/// decoding alone.
#[derive(Debug)]
pub(crate) struct Pace {
    wanted: Option<Duration>,
    most: usize,
    rows: usize,
    /// Whether streams paused in the last step.
    paused: bool,
    /// Seconds of a step without prompts.
    decode_s: f64,
}

impl Pace {
    /// For steps of at most `most` rows that should take `wanted`; `None`: whatever they take.
    pub(crate) fn new(most: usize, wanted: Option<Duration>) -> Self {
        Self { wanted, most, rows: most, paused: false, decode_s: 0.0 }
    }

    /// Rows of prompts for the next step. Alone, a request has nobody to wait for it, and its prompt is always cut
    /// alike.
    pub(crate) fn prompt_rows(&self, alone: bool) -> usize {
        if alone || self.wanted.is_none() { self.most } else { self.rows }
    }

    /// Whether streams may pause in the next step.
    pub(crate) fn may_pause(&self) -> bool {
        !self.paused
    }

    /// Takes note of a step.
    pub(crate) fn note(&mut self, split: &Split, took: Duration) {
        self.paused = split.pauses;
        let Some(wanted) = self.wanted else { return };
        let took = took.as_secs_f64();
        if split.urgent_rows > 0 {
            return;
        }
        if split.patient_rows == 0 {
            self.decode_s += NEWEST * (took - self.decode_s);
            return;
        }
        let limit = wanted.as_secs_f64().max(2.0 * self.decode_s);
        if took > limit {
            // At most halved: one step that the machine was slow in is not all steps.
            let rows = self.rows.min(split.patient_rows) as f64 * (limit / took).max(0.5);
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "it is a part of a row count"
            )]
            let rows = rows as usize;
            self.rows = rows.max(FEWEST_PROMPT_ROWS).min(self.most);
        } else if took < 0.8 * limit && split.patient_rows >= self.rows {
            self.rows = (self.rows + GROWTH_ROWS).min(self.most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(wants: Wants) -> Ask {
        Ask { wants, rank: (true, Priority::Normal, 0), standing: (0, 1), behind: false }
    }

    fn split_of(asks: &[Ask], rows: usize, prompt_rows: usize) -> Split {
        let mut split = Split::default();
        split.share_out(asks, Budget { rows, prompt_rows, may_pause: false });
        split
    }

    fn rows(asks: &[Ask], rows: usize, prompt_rows: usize) -> Vec<usize> {
        split_of(asks, rows, prompt_rows).rows
    }

    #[test]
    fn decoding_comes_first_then_prompts_in_order() {
        let asks: Vec<Ask> = [Wants::Prompt(10), Wants::Decode, Wants::Prompt(10), Wants::Decode]
            .into_iter()
            .zip(0..)
            .map(|(wants, order)| Ask { rank: (true, Priority::Normal, order), ..ask(wants) })
            .collect();
        assert_eq!(rows(&asks, 8, 100), [6, 1, 0, 1]);
        assert_eq!(rows(&asks, 16, 100), [10, 1, 4, 1]);
        assert_eq!(rows(&asks, 100, 100), [10, 1, 10, 1]);
        assert_eq!(rows(&asks, 100, 7), [7, 1, 0, 1]);
    }

    #[test]
    fn prompts_wait_when_all_rows_decode() {
        assert_eq!(rows(&[ask(Wants::Decode), ask(Wants::Decode), ask(Wants::Prompt(3))], 2, 2), [1, 1, 0]);
    }

    #[test]
    fn class_then_what_was_served_then_arrival_decides_among_prompts() {
        let prompt = |class, served, order| Ask {
            rank: (true, class, order),
            standing: (served, 1),
            ..ask(Wants::Prompt(4))
        };
        let asks = [
            prompt(Priority::Low, 0, 0),
            prompt(Priority::Normal, 9, 1),
            prompt(Priority::Normal, 3, 3),
            prompt(Priority::Normal, 3, 2),
            prompt(Priority::High, 9, 4),
        ];
        assert_eq!(rows(&asks, 10, 100), [0, 0, 2, 4, 4]);
        let due = Ask { rank: (false, Priority::High, 5), ..asks[1] };
        assert_eq!(rows(&[asks[4], due], 6, 100), [2, 4], "what is due goes before its class");
    }

    #[test]
    fn an_urgent_prompt_is_read_whole_and_others_wait_for_it() {
        let long = Ask { standing: (9, 1), ..ask(Wants::Prompt(500)) };
        let short = Ask { behind: true, rank: (true, Priority::Normal, 7), ..ask(Wants::Prompt(40)) };
        let split = split_of(&[long, short, ask(Wants::Decode)], 64, 24);
        assert_eq!((split.rows.as_slice(), split.urgent_rows, split.patient_rows), (&[0, 40, 1][..], 40, 0));
        // What does not fit in one step is not urgent: it goes first, at the pace of all.
        let second_long = Ask { behind: true, ..ask(Wants::Prompt(64)) };
        assert_eq!(rows(&[long, second_long, ask(Wants::Decode)], 64, 24), [0, 24, 1]);
    }

    #[test]
    fn who_is_not_behind_pauses_for_an_urgent_prompt_but_not_twice() {
        let long = Ask { standing: (9, 1), ..ask(Wants::Prompt(500)) };
        let short = Ask { behind: true, ..ask(Wants::Prompt(40)) };
        let stream = ask(Wants::Decode);
        let other = Ask { behind: true, ..stream };
        let asks = [long, short, stream, other];
        let mut budget = Budget { rows: 64, prompt_rows: 50, may_pause: true };
        let mut split = Split::default();
        split.share_out(&asks, budget);
        assert_eq!((split.rows.as_slice(), split.pauses, split.patient_rows), (&[0, 40, 0, 1][..], true, 0));
        let mut pace = Pace::new(64, None);
        pace.note(&split, Duration::ZERO);
        budget.may_pause = pace.may_pause();
        split.share_out(&asks, budget);
        assert_eq!((split.rows.as_slice(), split.pauses), (&[10, 40, 1, 1][..], false));
        pace.note(&split, Duration::ZERO);
        assert!(pace.may_pause());
        // Without an urgent prompt nobody pauses.
        split.share_out(&[long, stream, other], Budget { may_pause: true, ..budget });
        assert_eq!((split.rows.as_slice(), split.pauses), (&[50, 1, 1][..], false));
    }

    fn step(prompt_rows: usize) -> Split {
        Split { patient_rows: prompt_rows, ..Split::default() }
    }

    #[test]
    fn the_pace_falls_at_once_and_grows_back_slowly() {
        let ms = Duration::from_millis;
        let mut pace = Pace::new(128, Some(ms(50)));
        assert_eq!((pace.prompt_rows(true), pace.prompt_rows(false)), (128, 128));
        pace.note(&step(128), ms(100));
        assert_eq!((pace.prompt_rows(true), pace.prompt_rows(false)), (128, 64));
        pace.note(&step(64), ms(2000));
        assert_eq!(pace.prompt_rows(false), 32);
        pace.note(&step(32), ms(20));
        assert_eq!(pace.prompt_rows(false), 40);
        pace.note(&step(12), ms(10));
        assert_eq!(pace.prompt_rows(false), 40, "a step that was not full says nothing");
        pace.note(&step(40), ms(45));
        assert_eq!(pace.prompt_rows(false), 40);
        for _ in 0..9 {
            pace.note(&step(40), ms(500));
        }
        assert_eq!(pace.prompt_rows(false), FEWEST_PROMPT_ROWS);
        assert_eq!(Pace::new(128, None).prompt_rows(false), 128);
    }

    #[test]
    fn prompts_may_take_as_long_as_streams_do() {
        let ms = Duration::from_millis;
        let mut pace = Pace::new(128, Some(ms(50)));
        for _ in 0..50 {
            pace.note(&step(0), ms(300));
        }
        pace.note(&step(128), ms(580));
        assert_eq!(pace.prompt_rows(false), 128);
        pace.note(&step(128), ms(1200));
        assert!((60..=70).contains(&pace.prompt_rows(false)));
    }
}
