//! How many rows each running sequence gets in the next step: a pure function.
//!
//! Decoding sequences come first, one row each, so that a long prompt never stops a stream. The rest of the
//! budget goes to prompts, ordered by class, then by what their tenants were served, then by arrival; aged
//! sequences precede all others. Prompts have a budget of their own ([`PromptPacer`]), so that a step stays
//! short for a request that arrives while it runs. An *urgent* prompt is exempt from that budget and is not
//! chunked: it fits in one step, and it is aged or its tenant is underserved. For such a step the sequences
//! of tenants that are not underserved pause, decoding ones as well, so that the first token comes as early
//! as possible. In a shared step they would have waited just as long. They never pause in two consecutive
//! steps.

use super::queue::QueueRank;
use super::tenants::TenantUsage;
use std::time::Duration;

/// What a running sequence can compute in the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RowDemand {
    /// The rest of its prompt, this many tokens (at least one); the last of them gives its first token.
    Prompt(usize),
    /// One row: its latest token.
    Decode,
    /// No row: the step that the device computes produces its last token.
    Nothing,
}

/// A running sequence's request for rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowRequest {
    pub(crate) demand: RowDemand,
    pub(crate) rank: QueueRank,
    /// What its tenant uses.
    pub(crate) usage: TenantUsage,
    /// Whether it is aged, its tenant is underserved, or a sequence of a lower class runs.
    pub(crate) underserved: bool,
}

/// How many rows a step may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowBudget {
    /// All rows; at least one for every sequence.
    pub(crate) rows: usize,
    /// Rows of prompts that are not urgent; at least one.
    pub(crate) prompt_rows: usize,
    /// Whether decoding sequences may pause for an urgent prompt.
    pub(crate) may_pause: bool,
}

/// What the pace of prompts depends on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct StepShape {
    /// Rows of prompts that are not urgent.
    pub(crate) paced_rows: usize,
    /// Rows of urgent prompts.
    pub(crate) urgent_rows: usize,
    /// Decoding sequences pause for an urgent prompt.
    pub(crate) pauses: bool,
}

/// The rows of each sequence. Reused, so that steps do not allocate.
#[derive(Debug, Default)]
pub(crate) struct RowAllocation {
    /// In the order of the requests.
    pub(crate) rows: Vec<usize>,
    pub(crate) shape: StepShape,
    /// Indices of the requests that read prompts, in their order; only kept for its memory.
    prompts: Vec<usize>,
}

impl RowAllocation {
    /// Distributes the rows of a step.
    pub(crate) fn allocate(&mut self, requests: &[RowRequest], budget: RowBudget) {
        let Self { rows, shape: StepShape { paced_rows, urgent_rows, pauses }, prompts } = self;
        rows.clear();
        rows.extend(requests.iter().map(|request| usize::from(request.demand == RowDemand::Decode)));
        let mut free = budget.rows.saturating_sub(rows.iter().sum());
        // A prompt fits in one step if it does so beside all of these decode rows.
        let fitting = free;
        prompts.clear();
        prompts.extend((0..requests.len()).filter(|index| rows[*index] == 0));
        prompts.sort_unstable_by_key(|index| {
            let RowRequest { rank: QueueRank { is_young, class, arrival }, usage, .. } = requests[*index];
            (is_young, class, usage, arrival)
        });
        (*paced_rows, *urgent_rows) = (0, 0);
        let is_urgent = |request: &RowRequest| {
            request.underserved && matches!(request.demand, RowDemand::Prompt(tokens) if tokens <= fitting)
        };
        let exclusive = budget.may_pause && requests.iter().any(is_urgent);
        *pauses = false;
        if exclusive {
            let pausing =
                requests.iter().zip(&mut *rows).filter(|(request, rows)| !request.underserved && **rows > 0);
            for (_, rows) in pausing {
                (*rows, *pauses) = (0, true);
                free += 1;
            }
        }
        for index in prompts.iter().copied() {
            let RowDemand::Prompt(tokens) = requests[index].demand else { continue };
            let urgent = is_urgent(&requests[index]);
            let used = *paced_rows + *urgent_rows;
            let paced = if exclusive { 0 } else { budget.prompt_rows.saturating_sub(used) };
            let granted = tokens.min(free).min(if urgent { free } else { paced });
            rows[index] = granted;
            free -= granted;
            *(if urgent { &mut *urgent_rows } else { &mut *paced_rows }) += granted;
        }
    }
}

/// Fewest rows of prompts in a step: with fewer rows, most of the work is reading the weights.
const MIN_PROMPT_ROWS: usize = 16;

/// Rows by which the budget grows after a step that was short enough.
const GROWTH_ROWS: usize = 8;

/// Weight of the newest step without prompts in the running mean of their times.
const DECODE_TIME_WEIGHT: f64 = 0.2;

/// Controls how many prompt rows a step may have, so that a step takes about its target time: a request that
/// arrives waits for the step that runs. The budget is found by trying: a step that took too long lowers it
/// at once, a step that was short enough raises it slowly.
///
/// Prompts may always take as long as the decode rows beside them, so that a large model's decoding alone
/// does not starve them.
#[derive(Debug)]
pub(crate) struct PromptPacer {
    target: Option<Duration>,
    max_rows: usize,
    rows: usize,
    /// Whether decoding sequences paused in the step that was launched last.
    paused: bool,
    /// Mean time of a step without prompts, in seconds.
    decode_s: f64,
}

impl PromptPacer {
    /// For steps of at most `max_rows` rows that should take `target`; `None`: as long as they take.
    pub(crate) fn new(max_rows: usize, target: Option<Duration>) -> Self {
        Self { target, max_rows, rows: max_rows, paused: false, decode_s: 0.0 }
    }

    /// Rows of prompts for the next step. A request that is alone delays no other, so that its prompt is
    /// always chunked in the same way.
    pub(crate) fn prompt_rows(&self, alone: bool) -> usize {
        if alone || self.target.is_none() { self.max_rows } else { self.rows }
    }

    /// Whether decoding sequences may pause in the next step.
    pub(crate) fn may_pause(&self) -> bool {
        !self.paused
    }

    /// Records that a step was launched.
    pub(crate) fn record_launch(&mut self, step: StepShape) {
        self.paused = step.pauses;
    }

    /// Records the time that a step took.
    pub(crate) fn record(&mut self, step: StepShape, took: Duration) {
        let Some(target) = self.target else { return };
        let took = took.as_secs_f64();
        if step.urgent_rows > 0 {
            return;
        }
        if step.paced_rows == 0 {
            self.decode_s += DECODE_TIME_WEIGHT * (took - self.decode_s);
            return;
        }
        let limit = target.as_secs_f64().max(2.0 * self.decode_s);
        if took > limit {
            // At most halved: one slow step does not mean that all steps are slow.
            let rows = self.rows.min(step.paced_rows) as f64 * (limit / took).max(0.5);
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a fraction of a row count is in range"
            )]
            let rows = rows as usize;
            self.rows = rows.max(MIN_PROMPT_ROWS).min(self.max_rows);
        } else if took < 0.8 * limit && step.paced_rows >= self.rows {
            self.rows = (self.rows + GROWTH_ROWS).min(self.max_rows);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::priority::Priority;

    fn rank(class: Priority, arrival: u64) -> QueueRank {
        QueueRank { is_young: true, class, arrival }
    }

    fn request(demand: RowDemand) -> RowRequest {
        let usage = TenantUsage { served_tokens: 0, inflight: 1 };
        RowRequest { demand, rank: rank(Priority::Normal, 0), usage, underserved: false }
    }

    fn served(served_tokens: u64) -> TenantUsage {
        TenantUsage { served_tokens, inflight: 1 }
    }

    fn allocation(requests: &[RowRequest], rows: usize, prompt_rows: usize) -> RowAllocation {
        let mut allocation = RowAllocation::default();
        allocation.allocate(requests, RowBudget { rows, prompt_rows, may_pause: false });
        allocation
    }

    fn rows(requests: &[RowRequest], rows: usize, prompt_rows: usize) -> Vec<usize> {
        allocation(requests, rows, prompt_rows).rows
    }

    #[test]
    fn decoding_comes_first_then_prompts_in_order() {
        use RowDemand::{Decode, Prompt};
        let requests: Vec<RowRequest> = [Prompt(10), Decode, Prompt(10), Decode]
            .into_iter()
            .zip(0..)
            .map(|(demand, arrival)| RowRequest { rank: rank(Priority::Normal, arrival), ..request(demand) })
            .collect();
        assert_eq!(rows(&requests, 8, 100), [6, 1, 0, 1]);
        assert_eq!(rows(&requests, 16, 100), [10, 1, 4, 1]);
        assert_eq!(rows(&requests, 100, 100), [10, 1, 10, 1]);
        assert_eq!(rows(&requests, 100, 7), [7, 1, 0, 1]);
    }

    #[test]
    fn prompts_wait_when_all_rows_decode() {
        use RowDemand::{Decode, Prompt};
        assert_eq!(rows(&[request(Decode), request(Decode), request(Prompt(3))], 2, 2), [1, 1, 0]);
    }

    #[test]
    fn prompts_are_ordered_by_class_then_usage_then_arrival() {
        let prompt = |class, served_tokens, arrival| RowRequest {
            rank: rank(class, arrival),
            usage: served(served_tokens),
            ..request(RowDemand::Prompt(4))
        };
        let requests = [
            prompt(Priority::Low, 0, 0),
            prompt(Priority::Normal, 9, 1),
            prompt(Priority::Normal, 3, 3),
            prompt(Priority::Normal, 3, 2),
            prompt(Priority::High, 9, 4),
        ];
        assert_eq!(rows(&requests, 10, 100), [0, 0, 2, 4, 4]);
        let aged_rank = QueueRank { is_young: false, class: Priority::High, arrival: 5 };
        let aged = RowRequest { rank: aged_rank, ..requests[1] };
        assert_eq!(rows(&[requests[4], aged], 6, 100), [2, 4], "an aged one precedes its class");
    }

    #[test]
    fn an_urgent_prompt_is_not_chunked() {
        let long = RowRequest { usage: served(9), ..request(RowDemand::Prompt(500)) };
        let short = RowRequest {
            underserved: true,
            rank: rank(Priority::Normal, 7),
            ..request(RowDemand::Prompt(40))
        };
        let stream = request(RowDemand::Decode);
        let step = allocation(&[long, short, stream], 64, 24);
        assert_eq!(
            (step.rows.as_slice(), step.shape.urgent_rows, step.shape.paced_rows),
            (&[0, 40, 1][..], 40, 0)
        );
        // A prompt that does not fit in one step is not urgent: it comes first, within the budget of prompts.
        let second_long = RowRequest { underserved: true, ..request(RowDemand::Prompt(64)) };
        assert_eq!(rows(&[long, second_long, stream], 64, 24), [0, 24, 1]);
    }

    #[test]
    fn streams_pause_for_an_urgent_prompt_but_not_twice() {
        let long = RowRequest { usage: served(9), ..request(RowDemand::Prompt(500)) };
        let short = RowRequest { underserved: true, ..request(RowDemand::Prompt(40)) };
        let stream = request(RowDemand::Decode);
        let other = RowRequest { underserved: true, ..stream };
        let requests = [long, short, stream, other];
        let mut budget = RowBudget { rows: 64, prompt_rows: 50, may_pause: true };
        let mut step = RowAllocation::default();
        step.allocate(&requests, budget);
        assert_eq!(
            (step.rows.as_slice(), step.shape.pauses, step.shape.paced_rows),
            (&[0, 40, 0, 1][..], true, 0)
        );
        let mut pacer = PromptPacer::new(64, None);
        pacer.record_launch(step.shape);
        budget.may_pause = pacer.may_pause();
        step.allocate(&requests, budget);
        assert_eq!((step.rows.as_slice(), step.shape.pauses), (&[10, 40, 1, 1][..], false));
        pacer.record_launch(step.shape);
        assert!(pacer.may_pause());
        // Without an urgent prompt no sequence pauses.
        step.allocate(&[long, stream, other], RowBudget { may_pause: true, ..budget });
        assert_eq!((step.rows.as_slice(), step.shape.pauses), (&[50, 1, 1][..], false));
    }

    fn step(prompt_rows: usize) -> StepShape {
        StepShape { paced_rows: prompt_rows, ..StepShape::default() }
    }

    #[test]
    fn the_prompt_budget_falls_at_once_and_grows_slowly() {
        let ms = Duration::from_millis;
        let mut pacer = PromptPacer::new(128, Some(ms(50)));
        assert_eq!((pacer.prompt_rows(true), pacer.prompt_rows(false)), (128, 128));
        pacer.record(step(128), ms(100));
        assert_eq!((pacer.prompt_rows(true), pacer.prompt_rows(false)), (128, 64));
        pacer.record(step(64), ms(2000));
        assert_eq!(pacer.prompt_rows(false), 32);
        pacer.record(step(32), ms(20));
        assert_eq!(pacer.prompt_rows(false), 40);
        pacer.record(step(12), ms(10));
        assert_eq!(pacer.prompt_rows(false), 40, "a step below the budget says nothing about it");
        pacer.record(step(40), ms(45));
        assert_eq!(pacer.prompt_rows(false), 40);
        for _ in 0..9 {
            pacer.record(step(40), ms(500));
        }
        assert_eq!(pacer.prompt_rows(false), MIN_PROMPT_ROWS);
        assert_eq!(PromptPacer::new(128, None).prompt_rows(false), 128);
    }

    #[test]
    fn prompts_may_take_as_long_as_decoding_does() {
        let ms = Duration::from_millis;
        let mut pacer = PromptPacer::new(128, Some(ms(50)));
        for _ in 0..50 {
            pacer.record(step(0), ms(300));
        }
        pacer.record(step(128), ms(580));
        assert_eq!(pacer.prompt_rows(false), 128);
        pacer.record(step(128), ms(1200));
        assert!((60..=70).contains(&pacer.prompt_rows(false)));
    }
}
