//! When a step begins and who takes part in it: the pure core of the encoder engine.
//!
//! There is no clock in here. Every call that needs the time is given it, as the time since the engine's start, so that
//! tests are tables. One step computes a batch: whole texts, at most so many, and at most so many tokens together.
//!
//! | strategy | a free device begins a step when |
//! |---|---|
//! | `time` | the oldest text has waited for `max_wait`; whatever is there goes |
//! | `size` | the batch is full, or the oldest text has waited for `max_wait` |
//! | `dynamic` | the batch is full, or waiting for one more text would cost more than it saves |
//! | `priority` | as `dynamic`, but a text of class high never waits for others, and classes overtake each other |
//!
//! Who goes is decided text by text, as generation decides it request by request ([`crate::queue`]): the class first,
//! where classes count; within it the tenant that was served fewest tokens; within that the oldest. So a long list
//! leaves places in every step to whoever else waits.
//!
//! What waiting saves is the part of a step's time that does not grow with its tokens (reading the weights, starting
//! kernels): texts that share a step pay it once. `dynamic` measures that part, and how long callers take to send the
//! next text. While `k` texts wait for one that is due in a time `g`, `k * g` is lost; where that is more than what is
//! to be gained, the step begins at once. So sparse requests never wait, and a crowd is gathered.

use super::estimate::{Arrivals, StepTimes};
use crate::priority::Priority;
use crate::queue::{Place, Placed, Queue};
use crate::tenants::{Tenant, Tenants};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A point in time: the time since the engine's start.
pub(crate) type Moment = Duration;

/// When the texts that wait become a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum BatchStrategy {
    /// A fixed window from the first text on.
    Time,
    /// A full batch, or the end of the window.
    Size,
    /// A window that follows the rate of arrivals and the time of steps; none at all where nothing is to be gained.
    #[default]
    Dynamic,
    /// The same with classes that overtake each other.
    Priority,
}

impl BatchStrategy {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Time, Self::Size, Self::Dynamic, Self::Priority];

    /// The word in configurations.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Time => "time",
            Self::Size => "size",
            Self::Dynamic => "dynamic",
            Self::Priority => "priority",
        }
    }
}

impl fmt::Display for BatchStrategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for BatchStrategy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|strategy| strategy.as_str() == text);
        found.ok_or_else(|| {
            format!("{text:?} is no strategy; use \"time\", \"size\", \"dynamic\" or \"priority\"")
        })
    }
}

/// What a batcher goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rules {
    pub(crate) strategy: BatchStrategy,
    /// Longest time that a free device waits for more texts.
    pub(crate) max_wait: Duration,
    /// Whether classes overtake each other; otherwise all are of class normal.
    pub(crate) by_class: bool,
    /// Most texts of a step.
    pub(crate) max_texts: usize,
    /// Most tokens of a step; no text is longer.
    pub(crate) max_tokens: usize,
}

/// What the device should do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Wait for a request.
    Idle,
    /// Wait for more until this moment.
    Until(Moment),
    /// Take a batch and compute it.
    Run,
}

/// A text that waits.
#[derive(Debug)]
struct Waiting<T> {
    place: Place,
    arrived: Moment,
    tokens: usize,
    item: T,
}

impl<T> Placed for Waiting<T> {
    fn place(&self) -> &Place {
        &self.place
    }
}

/// The texts that wait, and what is known of arrivals and steps.
#[derive(Debug)]
pub(crate) struct Batcher<T> {
    rules: Rules,
    waiting: Queue<Waiting<T>>,
    /// Texts in `waiting`.
    texts: usize,
    /// Their tokens together.
    tokens: usize,
    tenants: Tenants,
    /// Texts that have come so far.
    order: u64,
    arrivals: Arrivals,
    steps: StepTimes,
    /// When the last step ended.
    free_since: Moment,
}

impl<T> Batcher<T> {
    pub(crate) fn new(rules: Rules) -> Self {
        Self {
            rules,
            waiting: Queue::default(),
            texts: 0,
            tokens: 0,
            tenants: Tenants::default(),
            order: 0,
            arrivals: Arrivals::default(),
            steps: StepTimes::default(),
            free_since: Moment::ZERO,
        }
    }

    /// Texts that wait.
    pub(crate) fn len(&self) -> usize {
        self.texts
    }

    /// Notes that a caller sent a request. Its texts follow.
    pub(crate) fn arrived(&mut self, at: Moment) {
        self.arrivals.note(at);
    }

    /// The class that counts of a request that gives this one.
    fn class(&self, given: Priority) -> Priority {
        if self.rules.by_class { given } else { Priority::Normal }
    }

    /// A request of this tenant has come. Its texts follow.
    pub(crate) fn enter(&mut self, tenant: &Tenant) {
        self.tenants.enter(tenant);
    }

    /// A request of this tenant has ended, one way or another.
    pub(crate) fn leave(&mut self, tenant: &Tenant) {
        self.tenants.leave(tenant);
    }

    /// A text of `tokens` tokens, at most [`Rules::max_tokens`], now waits, of a request that has entered.
    pub(crate) fn push(&mut self, at: Moment, (class, tenant): (Priority, &Tenant), tokens: usize, item: T) {
        let place =
            Place { class: self.class(class), tenant: Tenant::clone(tenant), order: self.order, due: false };
        self.order += 1;
        self.texts += 1;
        self.tokens += tokens;
        self.waiting.push(Waiting { place, arrived: at, tokens, item });
    }

    /// Forgets the texts that are no longer wanted.
    pub(crate) fn retain(&mut self, mut wanted: impl FnMut(&T) -> bool) {
        let Self { waiting, texts, tokens, .. } = self;
        waiting.retain(|text| {
            let stays = wanted(&text.item);
            if !stays {
                *texts -= 1;
                *tokens -= text.tokens;
            }
            stays
        });
    }

    /// What a free device should do.
    pub(crate) fn decide(&self, now: Moment) -> Decision {
        let Some(oldest) = self.waiting.fronts().map(|text| text.arrived).min() else {
            return Decision::Idle;
        };
        // Without classes there is none of class high.
        let urgent = self.waiting.fronts().any(|text| text.place.class == Priority::High);
        // Texts are taken in order and never split, so more tokens than a step has also fill it as far as it goes.
        let full = self.texts >= self.rules.max_texts || self.tokens >= self.rules.max_tokens;
        let begin = match self.rules.strategy {
            _ if urgent => now,
            BatchStrategy::Time => oldest + self.rules.max_wait,
            _ if full => now,
            BatchStrategy::Size => oldest + self.rules.max_wait,
            BatchStrategy::Dynamic | BatchStrategy::Priority => self.worth_waiting_until(oldest),
        };
        if begin <= now { Decision::Run } else { Decision::Until(begin) }
    }

    /// Until when it pays to wait for one more text. The time in which the device was busy is not waiting for others.
    fn worth_waiting_until(&self, oldest: Moment) -> Moment {
        let Some(gap) = self.arrivals.gap() else { return oldest };
        let gain = self.steps.fixed().min(self.rules.max_wait);
        let waiting = u32::try_from(self.texts).unwrap_or(u32::MAX);
        if gap.saturating_mul(waiting) >= gain {
            return oldest;
        }
        let next_is_due = self.arrivals.last().max(self.free_since) + gap;
        next_is_due.min(oldest.max(self.free_since) + gain)
    }

    /// Moves the next step's texts to `batch`, in turn, until one does not fit. Each counts for its tenant at once, so
    /// that turns change within a step.
    pub(crate) fn take(&mut self, batch: &mut Vec<T>) {
        let mut tokens = 0;
        while batch.len() < self.rules.max_texts {
            let Some(turn) = self.waiting.turn(&self.tenants, |_| 0, true) else { break };
            let fits = |next: &Waiting<T>| tokens + next.tokens <= self.rules.max_tokens;
            if !self.waiting.peek(&turn).is_some_and(fits) {
                break;
            }
            let Some(text) = self.waiting.take(&turn) else { break };
            tokens += text.tokens;
            self.texts -= 1;
            self.tokens -= text.tokens;
            self.tenants.charge(&text.place.tenant, text.tokens);
            batch.push(text.item);
        }
    }

    /// Notes a step of `tokens` tokens that took `took` and ended `now`.
    pub(crate) fn step_done(&mut self, now: Moment, tokens: usize, took: Duration) {
        self.free_since = now;
        self.steps.note(tokens, took);
    }
}

#[cfg(test)]
mod tests;
