//! What draft tokens cost on this machine, measured from the steps themselves.
//!
//! All costs are multiples of a plain step: one that decodes the same sequences without draft tokens. Whether
//! a further row is nearly free or costs 0.4 steps depends on the processor and the model, so no constant
//! could say from which acceptance rate on speculation gains.
//!
//! Estimates can be wrong, so what speculation has lost against plain decoding is counted too. An allowance
//! pays for losses; it fills by [`ALLOWANCE_SHARE`] with each plain step. While it is used up nothing is
//! drafted, so speculation never loses more than [`MAX_ALLOWANCE`], one draft, and that share.

use super::MAX_VERIFY_ROWS;
use crate::config::SpeculationCosts;
use std::time::Duration;

/// Cost of a further row before any was measured, in steps.
const ROW_COST: f64 = 0.1;

/// Share of the time of plain steps that may be lost by drafts that do not pay.
const ALLOWANCE_SHARE: f64 = 0.01;

/// The allowance at the start, in steps: three drafts of one token that are rejected, at one step each.
const FIRST_ALLOWANCE: f64 = 3.0;

/// The largest allowance, in steps: a series of rejections beside gains does not end speculation.
const MAX_ALLOWANCE: f64 = 8.0;

/// Plain steps that are measured before anything is drafted.
const FIRST_PLAIN_STEPS: u32 = 3;

/// Steps with draft tokens after which a plain one is measured again: steps become slower with the context,
/// and with other work on the machine.
const PLAIN_INTERVAL: u32 = 32;

/// Plain steps without a draft after which costs count as unknown: a first measurement may have been wrong,
/// or the machine has become faster since.
const FORGET_STEPS: u32 = 512;

/// Weight of the newest time in a mean of times.
const NEWEST_TIME_WEIGHT: f64 = 1.0 / 8.0;

/// Times of which the shortest counts, before there is a mean.
const FIRST_TIMES: u32 = 3;

/// Most that one time counts, as a multiple of the mean: what else the system did meanwhile is no cost of a
/// step.
const MAX_OUTLIER: f64 = 1.25;

/// Weight of the newest outcome in the rate that new sequences start with.
const NEWEST_OUTCOME_WEIGHT: f64 = 1.0 / 64.0;

/// A running mean of times in seconds.
#[derive(Debug, Clone, Copy, Default)]
struct MeanTime {
    seconds: f64,
    count: u32,
}

impl MeanTime {
    fn record(&mut self, seconds: f64) {
        self.seconds = match self.count {
            0 => seconds,
            1..FIRST_TIMES => seconds.min(self.seconds),
            _ => self.seconds + NEWEST_TIME_WEIGHT * (self.without_outlier(seconds) - self.seconds),
        };
        self.count = self.count.saturating_add(1);
    }

    /// A time, cut where it is far above the mean.
    fn without_outlier(&self, seconds: f64) -> f64 {
        if self.count == 0 { seconds } else { seconds.min(MAX_OUTLIER * self.seconds) }
    }

    fn get(&self) -> Option<f64> {
        (self.count > 0).then_some(self.seconds)
    }
}

/// What is expected of a source of draft tokens before anything was measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Expected {
    /// The share of its tokens that the model accepts.
    pub(crate) acceptance: f64,
    /// What a token costs, beside its row, in plain steps.
    pub(crate) draft_step: f64,
}

/// A finished step in which every sequence decoded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DecodeStep {
    /// Sequences that decoded.
    pub(crate) sequences: usize,
    /// Rows of draft tokens beside their own.
    pub(crate) draft_rows: usize,
    /// Steps of the draft model: the most draft tokens of one sequence.
    pub(crate) draft_steps: usize,
    /// Time to propose the draft tokens.
    pub(crate) proposing: Duration,
    /// Time of the model's step on the device.
    pub(crate) step: Duration,
    /// Tokens that all sequences have got.
    pub(crate) tokens: usize,
}

/// What draft tokens would cost now.
#[derive(Debug, Clone)]
pub(crate) struct DraftOffer {
    /// Costs of one draft token for each sequence, of two, and so on, in plain steps and the step included.
    costs: [f64; MAX_VERIFY_ROWS - 1],
    /// How many of these are within the rows of a step.
    len: usize,
    /// Whether anything may be drafted at all.
    pub(super) affordable: bool,
}

impl DraftOffer {
    pub(super) fn costs(&self) -> &[f64] {
        &self.costs[..self.len]
    }
}

/// The measured costs of one model's steps, and what speculation has lost.
#[derive(Debug)]
pub(crate) struct StepCosts {
    source: SpeculationCosts,
    expected: Expected,
    /// By rows of a step, from one on.
    steps: [MeanTime; MAX_VERIFY_ROWS],
    draft_step: MeanTime,
    /// What may still be lost, in steps.
    allowance: f64,
    /// Steps with draft tokens since the last plain one.
    since_plain: u32,
    /// Plain steps since the last one with draft tokens.
    since_draft: u32,
    /// The acceptance rate over all sequences.
    acceptance: f64,
}

impl StepCosts {
    /// Without a measurement yet.
    pub(crate) fn new(source: SpeculationCosts, expected: Expected) -> Self {
        Self {
            source,
            expected,
            steps: [MeanTime::default(); MAX_VERIFY_ROWS],
            draft_step: MeanTime::default(),
            allowance: FIRST_ALLOWANCE,
            since_plain: 0,
            since_draft: 0,
            acceptance: expected.acceptance,
        }
    }

    /// The acceptance rate that a new sequence starts with.
    pub(crate) fn acceptance(&self) -> f64 {
        self.acceptance
    }

    /// What draft tokens cost for so many sequences that decode. One more than was measured is offered: the
    /// first drafts are short.
    pub(crate) fn offer(&self, sequences: usize) -> DraftOffer {
        let fitting = (MAX_VERIFY_ROWS / sequences.max(1)).saturating_sub(1);
        let measured_rows = self.steps.iter().rposition(|mean| mean.count > 0).map_or(0, |index| index + 1);
        let measured = (measured_rows / sequences.max(1)).saturating_sub(1);
        let len = match self.source {
            SpeculationCosts::Assumed { .. } => fitting,
            SpeculationCosts::Measured => fitting.min(measured + 1),
        };
        let mut costs = [1.0; MAX_VERIFY_ROWS - 1];
        let (plain, affordable) = match self.source {
            SpeculationCosts::Assumed { .. } => (1.0, true),
            SpeculationCosts::Measured => {
                let plain = sequences.checked_sub(1).and_then(|index| self.steps.get(index));
                let measured = plain.is_some_and(|plain| plain.count >= FIRST_PLAIN_STEPS);
                let affordable = measured && self.allowance > 0.0 && self.since_plain < PLAIN_INTERVAL;
                (plain.and_then(MeanTime::get).unwrap_or(1.0), affordable)
            }
        };
        for (index, cost) in costs.iter_mut().enumerate() {
            let drafts = (index + 1) as f64;
            *cost = match self.source {
                SpeculationCosts::Assumed { row, draft_step } => {
                    1.0 + drafts * (row * sequences as f64 + draft_step)
                }
                SpeculationCosts::Measured => {
                    let draft_step = self.draft_step.get().unwrap_or(self.expected.draft_step * plain);
                    (self.step_seconds(sequences * (index + 2), plain) + drafts * draft_step) / plain
                }
            };
        }
        DraftOffer { costs, len, affordable }
    }

    /// The time of a step of `rows` rows: measured, or on a line through the nearest that were. `plain` is
    /// the time of the fewest rows that matter.
    fn step_seconds(&self, rows: usize, plain: f64) -> f64 {
        let measured = |rows: usize| Some((rows, self.steps.get(rows.checked_sub(1)?)?.get()?));
        if let Some((_, seconds)) = measured(rows) {
            return seconds;
        }
        let mut below = (1..rows).rev().filter_map(measured);
        let Some((near, near_seconds)) = below.next() else { return plain };
        let other = (rows..=MAX_VERIFY_ROWS).find_map(measured).or_else(|| below.next());
        let slope = match other {
            Some((other, seconds)) => (seconds - near_seconds) / (other as f64 - near as f64),
            None => ROW_COST * plain,
        };
        near_seconds + slope.max(0.0) * (rows - near) as f64
    }

    /// Records a step in which every sequence decoded.
    pub(crate) fn record(&mut self, step: &DecodeStep) {
        self.count_loss(step);
        let DecodeStep { sequences, draft_rows, draft_steps, proposing, step: took, .. } = *step;
        if let Some(mean) =
            (sequences + draft_rows).checked_sub(1).and_then(|index| self.steps.get_mut(index))
        {
            mean.record(took.as_secs_f64());
        }
        if draft_rows == 0 {
            self.since_plain = 0;
            self.since_draft += 1;
            if self.since_draft >= FORGET_STEPS {
                self.forget(sequences);
            }
            return;
        }
        let each = proposing.as_secs_f64() / draft_steps.max(1) as f64;
        // After a pause the draft model also reads what it has missed, so that only a shorter time says
        // something.
        if self.since_plain > 0 || self.draft_step.get().is_none_or(|mean| each < mean) {
            self.draft_step.record(each);
        }
        self.since_draft = 0;
        self.since_plain += 1;
        self.count_outcomes(step);
    }

    /// Counts what a step has gained or lost against plain steps.
    fn count_loss(&mut self, step: &DecodeStep) {
        let DecodeStep { sequences, draft_rows, draft_steps, proposing, step: took, tokens } = *step;
        let plain = sequences.checked_sub(1).and_then(|index| self.steps.get(index)).and_then(MeanTime::get);
        let Some(plain) = plain else { return };
        let (took, proposing) = (took.as_secs_f64(), proposing.as_secs_f64());
        let gained = if draft_rows == 0 {
            ALLOWANCE_SHARE - proposing / plain
        } else {
            let of_rows = (sequences + draft_rows).checked_sub(1).and_then(|index| self.steps.get(index));
            let took = of_rows.map_or(took, |mean| mean.without_outlier(took));
            let proposing = if self.since_plain > 0 {
                self.draft_step.without_outlier(proposing / draft_steps.max(1) as f64) * draft_steps as f64
            } else {
                proposing
            };
            tokens as f64 / sequences as f64 - (proposing + took) / plain
        };
        self.allowance = (self.allowance + gained).min(MAX_ALLOWANCE);
    }

    fn count_outcomes(&mut self, step: &DecodeStep) {
        let accepted = step.tokens.saturating_sub(step.sequences).min(step.draft_rows);
        // Of several sequences that share a step, each has at most one rejected token that says something.
        let rejected = (step.draft_rows - accepted).min(step.sequences);
        let outcomes = std::iter::repeat_n(1.0, accepted).chain(std::iter::repeat_n(0.0, rejected));
        for outcome in outcomes {
            self.acceptance += NEWEST_OUTCOME_WEIGHT * (outcome - self.acceptance);
        }
    }

    /// Forgets what was measured of drafts.
    fn forget(&mut self, sequences: usize) {
        self.since_draft = 0;
        self.draft_step = MeanTime::default();
        self.steps.iter_mut().skip(sequences).for_each(|mean| *mean = MeanTime::default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::speculation::acceptance::AcceptanceRate;

    /// A machine on which a plain step takes 10 ms.
    #[derive(Debug, Clone, Copy)]
    struct Machine {
        row: f64,
        draft_step: f64,
        /// The share of draft tokens that the model accepts.
        acceptance: f64,
    }

    const MODEL: Expected = Expected { acceptance: 0.8, draft_step: 0.25 };

    const PLAIN: Duration = Duration::from_millis(10);

    impl Machine {
        /// The speed of `tokens` tokens as a multiple of plain decoding, in answers of 128 tokens. The
        /// measured times vary by a tenth, and one in 50 is three times as long, as on a machine that others
        /// use.
        fn speed(self, tokens: usize, seed: u64) -> f64 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut costs = StepCosts::new(SpeculationCosts::Measured, MODEL);
            let mut rate = AcceptanceRate::DISABLED;
            let (mut produced, mut next_answer, mut lag, mut took) = (0, 0, 0, 0.0);
            while produced < tokens {
                if produced >= next_answer {
                    (rate, lag) = (AcceptanceRate::new(costs.acceptance(), 6, Some(64)), 0);
                    next_answer += 128;
                }
                let drafts = rate.draft_len(&costs.offer(1));
                let step = 1.0 + self.row * drafts as f64;
                // The draft model reads what it has missed at a fifth of a step for each token.
                let missed = if drafts > 0 { 0.2 * self.draft_step * f64::from(lag) } else { 0.0 };
                let proposing = self.draft_step * drafts as f64 + missed;
                lag = if drafts > 0 { 0 } else { lag + 1 };
                let accepted = (0..drafts).take_while(|_| random.f64() < self.acceptance).count();
                rate.record(drafts, accepted);
                let mut noise = || {
                    let outlier = if random.f64() < 0.02 { 3.0 } else { 1.0 };
                    (0.9 + 0.2 * random.f64()) * outlier
                };
                costs.record(&DecodeStep {
                    sequences: 1,
                    draft_rows: drafts,
                    draft_steps: drafts,
                    proposing: PLAIN.mul_f64(proposing * noise()),
                    step: PLAIN.mul_f64(step * noise()),
                    tokens: accepted + 1,
                });
                produced += accepted + 1;
                took += proposing + step;
            }
            produced as f64 / took
        }
    }

    #[test]
    fn speculation_never_loses_and_gains_where_drafts_are_cheap() {
        for row in [0.05, 0.1, 0.4, 0.8] {
            for draft_step in [0.0, 0.1, 0.25, 0.4, 1.0] {
                for acceptance in [0.0, 0.3, 0.6, 0.8, 0.95] {
                    for seed in 0..4 {
                        let machine = Machine { row, draft_step, acceptance };
                        let speed = machine.speed(2000, seed);
                        assert!(speed >= 0.98, "{speed:.3} of plain decoding on {machine:?} with {seed}");
                    }
                }
            }
        }
        // The best lengths give 3.36 tokens for 1.7 steps (k = 4), 6.03 for 3.1 (k = 6), 4.52 for 3 (k = 4).
        for (row, draft_step, acceptance, least) in
            [(0.1, 0.075, 0.8, 1.4), (0.1, 0.25, 0.95, 1.4), (0.4, 0.1, 0.95, 1.2)]
        {
            let machine = Machine { row, draft_step, acceptance };
            for seed in 0..4 {
                let speed = machine.speed(2000, seed);
                assert!(speed >= least, "{speed:.3} of plain decoding on {machine:?} with {seed}");
            }
        }
    }

    #[test]
    fn nothing_is_drafted_before_plain_steps_were_measured_or_once_losses_are_used_up() {
        let mut costs = StepCosts::new(SpeculationCosts::Measured, MODEL);
        let step = |draft_rows: usize, tokens: usize| DecodeStep {
            sequences: 1,
            draft_rows,
            draft_steps: draft_rows,
            proposing: PLAIN.mul_f64(0.25 * draft_rows as f64),
            step: PLAIN.mul_f64(1.0 + 0.1 * draft_rows as f64),
            tokens,
        };
        for _ in 0..FIRST_PLAIN_STEPS {
            assert!(!costs.offer(1).affordable);
            costs.record(&step(0, 1));
        }
        assert!(costs.offer(1).affordable);
        assert!(!costs.offer(2).affordable, "steps of two sequences are measured by themselves");
        // Each loses 0.7 steps of the allowance of some three.
        let lost = (0..20).take_while(|_| {
            let affordable = costs.offer(1).affordable;
            costs.record(&step(2, 1));
            affordable
        });
        assert_eq!(lost.count(), 5);
        let waits = (0..1000).take_while(|_| {
            costs.record(&step(0, 1));
            !costs.offer(1).affordable
        });
        let waits = waits.count();
        assert!((50..250).contains(&waits), "plain steps until it is tried again: {waits}");
    }

    #[test]
    fn costs_are_those_of_the_rows_that_were_measured() {
        let mut costs = StepCosts::new(SpeculationCosts::Measured, MODEL);
        let record = |costs: &mut StepCosts, draft_rows: usize, millis: u64| {
            costs.record(&DecodeStep {
                sequences: 1,
                draft_rows,
                draft_steps: draft_rows,
                proposing: Duration::ZERO,
                step: Duration::from_millis(millis),
                tokens: draft_rows + 1,
            });
        };
        record(&mut costs, 0, 10);
        assert_eq!(costs.offer(1).costs().len(), 1, "the first draft is one token");
        // As if the longest draft had been tried, at what is assumed of its rows.
        record(&mut costs, 7, 17);
        costs.draft_step = MeanTime::default();
        let offered = |costs: &StepCosts| -> Vec<u32> {
            costs.offer(1).costs().iter().map(|cost| (cost * 100.0).round() as u32).collect()
        };
        // As assumed: 0.1 for a row and 0.25 for a draft step.
        assert_eq!(offered(&costs), [135, 170, 205, 240, 275, 310, 345]);
        record(&mut costs, 2, 18);
        record(&mut costs, 4, 20);
        // Rows 1, 3, 5 and 8 take 10, 18, 20 and 17 ms; the others lie between, and more rows are not faster.
        assert_eq!(offered(&costs), [140, 180, 190, 200, 200, 200, 170]);
    }
}
