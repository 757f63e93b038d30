//! When a step begins and which texts are in it: the pure core of the encoder engine.
//!
//! It reads no clock. Every call that needs the time gets it, as the time since the engine's start, so that
//! tests are tables. One step computes a batch: whole texts, up to a number of texts and a number of tokens.
//!
//! | strategy | a free device begins a step when |
//! |---|---|
//! | `time` | the oldest text has waited for `max_wait`; all waiting texts that fit run |
//! | `size` | the batch is full, or the oldest text has waited for `max_wait` |
//! | `dynamic` | the batch is full, or waiting for one more text would cost more than it saves |
//! | `priority` | as `dynamic`, but a text of class high never waits for others, and classes count |
//!
//! The order is decided text by text, as generation decides it request by request
//! ([`crate::scheduling::queue`]): by class, where classes count, then the least served tenant, then the
//! oldest text. So a request of many texts leaves room in every step for the texts of other tenants.
//!
//! Waiting saves the fixed cost of a step (reading the weights, starting kernels), which texts of one step
//! share. `dynamic` estimates that cost and the gap between requests. While `k` texts wait a time `g` for the
//! next one, `k * g` is lost. Where that is more than the fixed cost, the step begins at once. So sparse
//! requests never wait, and requests that arrive in quick succession share a step.

use super::estimate::{Arrivals, StepTimes};
use crate::scheduling::priority::Priority;
use crate::scheduling::queue::{HasQueueKey, Queue, QueueKey};
use crate::scheduling::tenants::{Tenant, TenantId, Tenants};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A point in time: the time since the engine's start.
pub(crate) type Moment = Duration;

/// When the waiting texts become a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, strum::IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub enum BatchStrategy {
    /// At the end of a fixed window, which begins with the first text.
    Time,
    /// When the batch is full, or at the end of the window.
    Size,
    /// At the end of a window that adapts to arrivals and the time of steps; at once where waiting saves
    /// nothing.
    #[default]
    Dynamic,
    /// As `Dynamic`, with priority classes.
    Priority,
}

impl BatchStrategy {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Time, Self::Size, Self::Dynamic, Self::Priority];

    /// The word in configurations.
    pub fn as_str(self) -> &'static str {
        self.into()
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

/// The rules of a batcher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BatchRules {
    pub(crate) strategy: BatchStrategy,
    /// Longest time that a free device waits for more texts.
    pub(crate) max_wait: Duration,
    /// Whether priority classes count; otherwise all texts are of class normal.
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

/// A text that arrives.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewText {
    pub(crate) arrived: Moment,
    pub(crate) class: Priority,
    /// A tenant whose request was counted by [`Batcher::request_arrived`].
    pub(crate) tenant: TenantId,
    /// Its length, at most [`BatchRules::max_tokens`].
    pub(crate) tokens: usize,
}

/// A text that waits.
#[derive(Debug)]
struct WaitingText<T> {
    key: QueueKey,
    arrived: Moment,
    tokens: usize,
    item: T,
}

impl<T> HasQueueKey for WaitingText<T> {
    fn queue_key(&self) -> &QueueKey {
        &self.key
    }
}

/// The waiting texts, and the estimates of arrivals and steps.
#[derive(Debug)]
pub(crate) struct Batcher<T> {
    rules: BatchRules,
    waiting: Queue<WaitingText<T>>,
    /// Texts in `waiting`.
    texts: usize,
    /// Their tokens together.
    tokens: usize,
    tenants: Tenants,
    /// Texts that have arrived so far.
    arrived_texts: u64,
    arrivals: Arrivals,
    steps: StepTimes,
    /// When the last step ended.
    free_since: Moment,
}

impl<T> Batcher<T> {
    pub(crate) fn new(rules: BatchRules) -> Self {
        Self {
            rules,
            waiting: Queue::default(),
            texts: 0,
            tokens: 0,
            tenants: Tenants::default(),
            arrived_texts: 0,
            arrivals: Arrivals::default(),
            steps: StepTimes::default(),
            free_since: Moment::ZERO,
        }
    }

    /// Texts that wait.
    pub(crate) fn len(&self) -> usize {
        self.texts
    }

    /// Records the arrival of a caller's request for the estimate of gaps. Its texts follow.
    pub(crate) fn record_arrival(&mut self, at: Moment) {
        self.arrivals.record(at);
    }

    /// Counts a request of this tenant. Its texts follow.
    pub(crate) fn request_arrived(&mut self, tenant: &Tenant) -> TenantId {
        self.tenants.request_arrived(tenant)
    }

    /// Counts the end of a request of this tenant, for whatever reason.
    pub(crate) fn request_ended(&mut self, tenant: TenantId) {
        self.tenants.request_ended(tenant);
    }

    /// Adds a text.
    pub(crate) fn push(&mut self, text: NewText, item: T) {
        let NewText { arrived, class, tenant, tokens } = text;
        let class = if self.rules.by_class { class } else { Priority::Normal };
        let key = QueueKey { class, tenant, arrival: self.arrived_texts, aged: false };
        self.arrived_texts += 1;
        self.texts += 1;
        self.tokens += tokens;
        self.waiting.push(WaitingText { key, arrived, tokens, item });
    }

    /// Removes the texts that are no longer wanted.
    pub(crate) fn retain(&mut self, mut wanted: impl FnMut(&T) -> bool) {
        let Self { waiting, texts, tokens, .. } = self;
        waiting.retain(|text| {
            let retained = wanted(&text.item);
            if !retained {
                *texts -= 1;
                *tokens -= text.tokens;
            }
            retained
        });
    }

    /// What a free device should do.
    pub(crate) fn decide(&self, now: Moment) -> Decision {
        let Some(oldest) = self.waiting.fronts().map(|text| text.arrived).min() else {
            return Decision::Idle;
        };
        // Where classes do not count, no text is of class high.
        let urgent = self.waiting.fronts().any(|text| text.key.class == Priority::High);
        // Texts run in order and are never split, so a step is full when the waiting tokens exceed its limit.
        let full = self.texts >= self.rules.max_texts || self.tokens >= self.rules.max_tokens;
        let begin = match self.rules.strategy {
            _ if urgent => now,
            BatchStrategy::Time => oldest + self.rules.max_wait,
            _ if full => now,
            BatchStrategy::Size => oldest + self.rules.max_wait,
            BatchStrategy::Dynamic | BatchStrategy::Priority => self.wait_deadline(oldest),
        };
        if begin <= now { Decision::Run } else { Decision::Until(begin) }
    }

    /// Until when it pays to wait for one more text. Time in which the device was busy does not count as
    /// waiting.
    fn wait_deadline(&self, oldest: Moment) -> Moment {
        let Some(gap) = self.arrivals.gap() else { return oldest };
        let gain = self.steps.fixed_cost().min(self.rules.max_wait);
        let waiting = u32::try_from(self.texts).unwrap_or(u32::MAX);
        if gap.saturating_mul(waiting) >= gain {
            return oldest;
        }
        let next_arrival = self.arrivals.last().max(self.free_since) + gap;
        next_arrival.min(oldest.max(self.free_since) + gain)
    }

    /// Moves the texts of the next step to `batch`, in order, until one does not fit. Each is charged to its
    /// tenant at once, so that the order changes within a step.
    pub(crate) fn take_batch(&mut self, batch: &mut Vec<T>) {
        let mut tokens = 0;
        while batch.len() < self.rules.max_texts {
            let Some(next) = self.waiting.select_next(&self.tenants, |_| 0, true) else { break };
            let fits = |text: &WaitingText<T>| tokens + text.tokens <= self.rules.max_tokens;
            if !self.waiting.peek(&next).is_some_and(fits) {
                break;
            }
            let Some(text) = self.waiting.pop(&next) else { break };
            tokens += text.tokens;
            self.texts -= 1;
            self.tokens -= text.tokens;
            self.tenants.charge(text.key.tenant, text.tokens);
            batch.push(text.item);
        }
    }

    /// Records a step of `tokens` tokens that took `took` and ended `now`.
    pub(crate) fn step_done(&mut self, now: Moment, tokens: usize, took: Duration) {
        self.free_since = now;
        self.steps.record(tokens, took);
    }
}

#[cfg(test)]
mod tests;
