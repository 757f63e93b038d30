//! One attempt, and another one beside it where the first takes long: the first answer counts.
//!
//! The attempt that loses is dropped. That resets its stream, so that its pod stops, and counts it as
//! cancelled: whoever was slower has not failed.

use std::sync::Arc;

use tokio::time::{Instant, sleep};
use trustformers_api::surfaces::Kind;
use trustformers_proto::Task;

use super::{Attempts, Failure, PodAnswer, TriedEndpoint, try_endpoint};
use crate::attempt::Attempt;
use crate::call::Call;
use crate::hedge::HedgeRules;
use crate::metrics::RetryReason;
use crate::routing::{Choice, Criteria};

/// Whether a request may be answered twice: it encodes, has one answer, and is all here.
pub(super) fn may_hedge(call: &Call) -> bool {
    let surface = call.surface;
    let encodes = surface.task.is_some_and(|task| task != Task::Generate);
    encodes && surface.idempotent && surface.kind == Kind::Unary && call.body.is_whole()
}

impl Attempts<'_> {
    /// One attempt on an endpoint, with another one beside it where the route says so. `choice` is then the
    /// endpoint whose answer or failure it is.
    pub(super) async fn attempt_hedged(&mut self, choice: &mut Choice) -> Result<PodAnswer, Failure> {
        // Once for a request: a retry is a second attempt already.
        let Some(rules) = self.hedge.take() else {
            self.begin(choice);
            let tried = try_endpoint(self.call, choice).await;
            return self.conclude(tried);
        };
        let (call, began, primary) = (self.call, Instant::now(), choice.clone());
        let hedges = Arc::clone(&self.hedges);
        hedges.budget.request(self.gateway.now(), &rules.budget());
        let delay = rules.delay.or_else(|| hedges.tail.p95());
        self.begin(&primary);
        let first = try_endpoint(call, &primary);
        tokio::pin!(first);
        let waited = async {
            match delay {
                Some(delay) => sleep(delay).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            tried = &mut first => return self.observed(tried, began),
            () = waited => {}
        }
        let Some(other) = self.choose_beside(&primary, &rules) else {
            let tried = first.await;
            return self.observed(tried, began);
        };
        primary.metrics.retried(RetryReason::Hedge);
        self.record.attempts += 1;
        let other_attempt = Attempt::begin(&other.metrics);
        let second = try_endpoint(call, &other);
        tokio::pin!(second);
        tokio::select! {
            tried = &mut first => {
                if tried.result.is_ok() {
                    return self.observed(tried, began);
                }
                self.failed_beside(&primary, tried);
                self.take_over(choice, &other, other_attempt);
                let tried = second.await;
                self.observed(tried, began)
            }
            tried = &mut second => {
                if tried.result.is_ok() {
                    self.take_over(choice, &other, other_attempt);
                    return self.observed(tried, began);
                }
                if let Some(outcome) = tried.outcome {
                    other_attempt.end(outcome, None);
                }
                self.failed_beside(&other, TriedEndpoint { outcome: None, ..tried });
                let tried = first.await;
                self.observed(tried, began)
            }
        }
    }

    /// Another endpoint of the same revision, where there is one and the budget allows it.
    fn choose_beside(&self, primary: &Choice, rules: &HedgeRules) -> Option<Choice> {
        let routing = self.gateway.routing()?;
        let index = routing.table.find(&self.route).ok()?;
        let mut tried = self.tried.clone();
        tried.push(Arc::clone(&primary.endpoint));
        let revision = Some(primary.metrics.revision.as_str());
        let choice = routing
            .choose_beside(index, &Criteria { key: &self.key, hash: None, revision, tried: &tried })?;
        if self.hedges.budget.try_retry(self.gateway.now(), &rules.budget()) {
            return Some(choice);
        }
        // It may be the probe of a breaker, which another request can be then.
        drop(choice.enter());
        None
    }

    /// The answer is that of the other attempt. The first one has ended, or is cancelled with this.
    fn take_over(&mut self, choice: &mut Choice, other: &Choice, attempt: Attempt) {
        self.record.answered_by(other);
        self.current = Some(attempt);
        *choice = other.clone();
    }

    /// One of two attempts failed, and the other one runs.
    fn failed_beside(&mut self, choice: &Choice, tried: TriedEndpoint) {
        self.tried.push(Arc::clone(&choice.endpoint));
        if let Err(failure) = self.conclude(tried) {
            self.note(failure);
        }
    }

    fn observed(&mut self, tried: TriedEndpoint, began: Instant) -> Result<PodAnswer, Failure> {
        if tried.result.as_ref().is_ok_and(|answer| answer.response.status().is_success()) {
            // Where the second attempt was faster, the first one would have taken longer than this.
            self.hedges.tail.observe(began.elapsed());
        }
        self.conclude(tried)
    }
}
