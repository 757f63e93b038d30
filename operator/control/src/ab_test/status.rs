//! The next state of a test: when it begins, what starts its samples anew, its ramp, its verdict, and what
//! follows from that.
//!
//! The state is in the status, and routes are made from the stored status: what is decided here reaches a
//! gateway only when it is stored.

mod epochs;
mod looks;
mod notes;
mod plan;

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use trustformers_crds::{ABTestPhase, ABTestStatus, ABTestVerdict, Condition, OnConclusion, VariantStatus};

use super::assess::{AssessInputs, Breach, EpochSample, Judgement, assess};
use super::figures::{decimals, fill, signed};
use super::sample::SampleStore;
use super::validate::{TestConflict, TestSpecError, ValidatedTest};
use epochs::{epoch_sample, thetas};

pub use epochs::{epochs_of, stored_variants};
pub use notes::events;
pub use plan::{Planned, Waiting, plan};

/// How often a test is looked at and its sums are stored.
pub const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(30);
/// Percent of what the others have that the winner gets, step by step.
const PROMOTION_STEPS: [u32; 2] = [50, 100];
/// Restarts of the samples by variants that move. A rollout moves its model two times, to both revisions and
/// to the new one: these are five rollouts. A model that moves more often cannot be tested.
const MAX_RESTARTS: u32 = 10;
/// Longest message of a condition.
const MESSAGE_BYTES: usize = 1000;

/// What the cluster shows of a test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TestFacts {
    /// What keeps the test from its route.
    pub conflict: Option<TestConflict>,
    /// Why a newer spec than the one that the test runs by is not followed yet.
    pub waiting: Option<Waiting>,
    /// The revisions that serve each variant, joined; empty where none does.
    pub revisions: Vec<String>,
    /// The pods that serve each variant.
    pub replicas: Vec<u32>,
    /// Why the sums could not be stored at the last checkpoint.
    pub checkpoint_error: Option<String>,
}

/// What the next state follows from.
#[derive(Debug, Clone, Copy)]
pub struct StepInputs<'a> {
    /// The test.
    pub test: &'a ValidatedTest,
    /// The stored status.
    pub stored: &'a ABTestStatus,
    /// What the cluster shows.
    pub facts: &'a TestFacts,
    /// What was counted, at a checkpoint; none between two.
    pub samples: Option<&'a SampleStore>,
    /// The time.
    pub now: Timestamp,
}

/// The next state of a test.
#[must_use]
pub fn step(inputs: &StepInputs<'_>) -> ABTestStatus {
    let StepInputs { test, stored, facts, now, .. } = *inputs;
    let mut next = Next { status: stored.clone(), test, now };
    next.status.observed_generation = Some(test.generation);
    next.accepted(facts);
    let serving = next.serving(facts);
    let is_new = next.status.epochs.is_empty();
    let is_changed = next.status.samples_of.as_deref() != Some(test.samples_of.as_str());
    if is_new || is_changed {
        if facts.conflict.is_none() && serving {
            next.begin(facts);
        } else if is_new {
            next.status.phase = Some(ABTestPhase::Pending);
        }
    } else {
        next.status.accepted_spec = Some(test.spec.clone());
        next.restart_for_revisions(facts);
        next.end_baseline();
        next.ramp();
        next.promote();
        next.undo();
        next.reweigh();
        if let Some(samples) = inputs.samples {
            next.checkpoint(samples, facts);
        }
    }
    next.stored(facts);
    next.status
}

/// The status of a spec that cannot be honoured, where there is no other that the test could run by.
#[must_use]
pub fn refused(
    error: &TestSpecError,
    generation: i64,
    stored: &ABTestStatus,
    now: Timestamp,
) -> ABTestStatus {
    let mut status = stored.clone();
    status.observed_generation = Some(generation);
    if status.epochs.is_empty() {
        status.phase = Some(ABTestPhase::Pending);
    }
    let fact = Fact { kind: "Accepted", status: "False", reason: "InvalidSpec", message: error.to_string() };
    set(&mut status.conditions, fact, generation, now);
    status
}

/// When a test is looked at again without a change: for its ramp and its promotion.
#[must_use]
pub fn wake_in(test: &ValidatedTest, status: &ABTestStatus, now: Timestamp) -> Duration {
    let until = |since: &Option<Time>, hold: Duration| {
        let since = since.as_ref()?.0;
        let end = since.checked_add(SignedDuration::try_from(hold).ok()?).ok()?;
        Some(Duration::try_from(end.duration_since(now)).unwrap_or_default())
    };
    let ramp = test.ramp.get(status.ramp_step as usize);
    let ramp = ramp.filter(|_| status.phase == Some(ABTestPhase::Ramping));
    let ramp = ramp.and_then(|step| until(&status.ramp_since, step.hold));
    let promotion = (status.phase == Some(ABTestPhase::Promoting))
        .then(|| until(&status.promoted_since, test.promote_hold))
        .flatten();
    let baseline = test.baseline.filter(|_| status.phase == Some(ABTestPhase::Baseline));
    let baseline = baseline.and_then(|length| until(&status.started_at, length));
    let times = ramp.into_iter().chain(promotion).chain(baseline);
    times.chain([CHECKPOINT_INTERVAL]).min().unwrap_or(CHECKPOINT_INTERVAL)
}

/// A condition to set.
struct Fact<'a> {
    kind: &'a str,
    status: &'a str,
    reason: &'a str,
    message: String,
}

fn set(conditions: &mut Vec<Condition>, fact: Fact<'_>, generation: i64, now: Timestamp) {
    let Fact { kind, status, reason, message } = fact;
    let mut end = message.len().min(MESSAGE_BYTES);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    let before = conditions.iter().find(|one| one.type_ == kind && one.status == status);
    let condition = Condition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: message[..end].to_owned(),
        last_transition_time: before.map_or(Time(now), |one| one.last_transition_time.clone()),
        observed_generation: Some(generation),
    };
    match conditions.iter_mut().find(|one| one.type_ == kind) {
        Some(one) => *one = condition,
        None => conditions.push(condition),
    }
}

/// The status while it is made.
struct Next<'a> {
    status: ABTestStatus,
    test: &'a ValidatedTest,
    now: Timestamp,
}

impl Next<'_> {
    fn set(&mut self, fact: Fact<'_>) {
        set(&mut self.status.conditions, fact, self.test.generation, self.now);
    }

    fn names(&self) -> Vec<String> {
        self.test.variants.iter().map(|variant| variant.name.clone()).collect()
    }

    fn is_sampling(&self) -> bool {
        matches!(self.status.phase, Some(ABTestPhase::Ramping | ABTestPhase::Running))
    }

    fn accepted(&mut self, facts: &TestFacts) {
        let fact = match (&facts.waiting, &facts.conflict) {
            (Some(Waiting { reason, message }), _) => {
                let message = format!("{message}; until then the test runs by the spec before");
                Fact { kind: "Accepted", status: "False", reason, message }
            }
            (None, Some(conflict)) => {
                let reason: &'static str = conflict.into();
                Fact { kind: "Accepted", status: "False", reason, message: conflict.to_string() }
            }
            (None, None) => {
                let message = format!("callers use the model {}", self.test.route);
                Fact { kind: "Accepted", status: "True", reason: "Accepted", message }
            }
        };
        self.set(fact);
    }

    fn serving(&mut self, facts: &TestFacts) -> bool {
        let missing = self.test.variants.iter().zip(&facts.revisions);
        let missing: Vec<String> = missing
            .filter(|(_, revision)| revision.is_empty())
            .map(|(variant, _)| format!("{} (InferenceModel {})", variant.name, variant.model))
            .collect();
        let fact = if missing.is_empty() {
            let message = "every variant has a pod that serves".to_owned();
            Fact { kind: "Serving", status: "True", reason: "Serving", message }
        } else {
            let message = format!(
                "no pod serves {}: see the conditions of the model; until then its requests go to the others",
                missing.join(", ")
            );
            Fact { kind: "Serving", status: "False", reason: "VariantNotServing", message }
        };
        self.set(fact);
        missing.is_empty()
    }

    /// The samples begin, for the first time or for another spec.
    fn begin(&mut self, facts: &TestFacts) {
        self.status.samples_of = Some(self.test.samples_of.clone());
        self.status.accepted_spec = Some(self.test.spec.clone());
        self.status.restarts = 0;
        self.status.ramp_step = 0;
        self.status.ramp_since = Some(Time(self.now));
        (self.status.promoted, self.status.promoted_since) = (0, None);
        (self.status.verdict, self.status.winner, self.status.concluded_at) = (None, None, None);
        self.status.phase = Some(match self.test.baseline {
            Some(_) => ABTestPhase::Baseline,
            None if self.test.ramp.is_empty() => ABTestPhase::Running,
            None => ABTestPhase::Ramping,
        });
        // The baseline of another test is none of this one.
        self.status.epochs.iter_mut().for_each(|epoch| epoch.baseline = false);
        self.restart(facts, "Started", "the samples began".to_owned());
    }

    /// The samples begin anew with the same users.
    fn restart(&mut self, facts: &TestFacts, reason: &str, message: String) {
        let of = |name: String, revision: &String| VariantStatus {
            name,
            revision: revision.clone(),
            ..VariantStatus::default()
        };
        self.status.variants = self
            .names()
            .into_iter()
            .zip(&facts.revisions)
            .map(|(name, revision)| of(name, revision))
            .collect();
        self.status.started_at = Some(Time(self.now));
        self.status.samples = 0;
        (self.status.leader, self.status.confidence) = (None, None);
        (self.status.srm, self.status.srm_p_value) = (Some("-".to_owned()), None);
        (self.status.detectable_effect, self.status.days_left) = (None, None);
        self.status.history.clear();
        let weights = self.wanted_weights();
        self.new_epoch(weights);
        let newest = self.status.epochs.last().map(|last| last.epoch);
        self.status.epochs.retain(|one| Some(one.epoch) == newest || one.baseline);
        self.set(Fact { kind: "Sampling", status: "True", reason, message });
    }

    /// A variant that moved to another revision is another variant.
    fn restart_for_revisions(&mut self, facts: &TestFacts) {
        if !self.is_sampling() {
            return;
        }
        let before = self.status.variants.iter().map(|variant| &variant.revision);
        let moved = before.zip(&facts.revisions).zip(&self.test.variants);
        let moved = moved.filter(|((before, now), _)| !now.is_empty() && before != now);
        let moved: Vec<String> = moved
            .map(|((before, now), variant)| format!("{} from {before} to {now}", variant.name))
            .collect();
        if !moved.is_empty() && self.status.restarts >= MAX_RESTARTS {
            self.unstable(&moved);
        } else if !moved.is_empty() {
            self.status.restarts += 1;
            let message = format!(
                "the samples began anew, because a variant moved: {} (restart {} of at most {MAX_RESTARTS})",
                moved.join(", "),
                self.status.restarts
            );
            // A variant without pods keeps the revision that it had.
            let kept = facts
                .revisions
                .iter()
                .zip(&self.status.variants)
                .map(|(now, before)| if now.is_empty() { before.revision.clone() } else { now.clone() });
            let facts = TestFacts { revisions: kept.collect(), ..facts.clone() };
            self.restart(&facts, "VariantChanged", message);
        }
    }

    /// A variant moves again and again: it cannot be compared.
    fn unstable(&mut self, moved: &[String]) {
        let message = format!(
            "a variant moved once more: {}, after {MAX_RESTARTS} restarts of the samples; let its rollout end, or name a revision in modelRef, and create the test anew",
            moved.join(", ")
        );
        self.status.verdict = Some(ABTestVerdict::Invalid);
        self.status.concluded_at = Some(Time(self.now));
        self.status.phase = Some(ABTestPhase::Concluded);
        self.set(Fact { kind: "Sampling", status: "False", reason: "VariantUnstable", message });
    }

    /// The users of each variant get it once the baseline has lasted.
    fn end_baseline(&mut self) {
        let since = self.status.started_at.as_ref().map_or(self.now, |time| time.0);
        let is_over = self.test.baseline.is_some_and(|length| self.elapsed(since) >= length);
        if self.status.phase != Some(ABTestPhase::Baseline) || !is_over {
            return;
        }
        self.status.phase = Some(ABTestPhase::Running);
        self.status.started_at = Some(Time(self.now));
        let weights = self.wanted_weights();
        self.new_epoch(weights);
        let message = "the baseline has ended, and users get their variants".to_owned();
        self.set(Fact { kind: "Sampling", status: "True", reason: "BaselineEnded", message });
    }

    fn ramp(&mut self) {
        let Some(since) = self.status.ramp_since.as_ref().map(|time| time.0) else { return };
        let Some(step) = self.test.ramp.get(self.status.ramp_step as usize) else {
            if self.status.phase == Some(ABTestPhase::Ramping) {
                self.status.phase = Some(ABTestPhase::Running);
            }
            return;
        };
        if self.status.phase == Some(ABTestPhase::Ramping) && self.elapsed(since) >= step.hold {
            self.status.ramp_step += 1;
            self.status.ramp_since = Some(Time(self.now));
            if self.status.ramp_step as usize >= self.test.ramp.len() {
                self.status.phase = Some(ABTestPhase::Running);
            }
        }
    }

    fn elapsed(&self, since: Timestamp) -> Duration {
        Duration::try_from(self.now.duration_since(since)).unwrap_or_default()
    }

    fn promote(&mut self) {
        if self.status.phase != Some(ABTestPhase::Promoting) {
            return;
        }
        let since = self.status.promoted_since.as_ref().map_or(self.now, |time| time.0);
        if self.elapsed(since) < self.test.promote_hold {
            return;
        }
        match PROMOTION_STEPS.iter().find(|step| **step > self.status.promoted) {
            Some(step) => {
                self.status.promoted = *step;
                self.status.promoted_since = Some(Time(self.now));
            }
            None => self.status.phase = Some(ABTestPhase::Concluded),
        }
    }

    /// A promotion whose spec says `Report` now is taken back: the variants have their weights again, and
    /// users the variants that they had.
    fn undo(&mut self) {
        if self.status.promoted == 0 || self.test.on_conclusion == OnConclusion::Promote {
            return;
        }
        (self.status.promoted, self.status.promoted_since) = (0, None);
        self.status.phase = Some(ABTestPhase::Concluded);
        let winner = self.status.winner.clone().unwrap_or_default();
        let message = format!(
            "the promotion of {winner} was undone by spec.onConclusion: users have the variants that they had before"
        );
        self.set(Fact { kind: "Sampling", status: "False", reason: "PromotionUndone", message });
    }

    /// Says where the sums are stored.
    fn stored(&mut self, facts: &TestFacts) {
        if self.status.epochs.is_empty() {
            return;
        }
        let fact = match &facts.checkpoint_error {
            Some(error) => {
                let message = format!("{error}; gateways that run still have their sums");
                Fact { kind: "SamplesStored", status: "False", reason: "NotStored", message }
            }
            None => {
                let message = "the sums are stored every 30 s".to_owned();
                Fact { kind: "SamplesStored", status: "True", reason: "Stored", message }
            }
        };
        self.set(fact);
    }

    fn checkpoint(&mut self, samples: &SampleStore, facts: &TestFacts) {
        if self.status.phase == Some(ABTestPhase::Baseline) {
            return;
        }
        let of = |baseline: bool| {
            let epochs = self.status.epochs.iter().filter(|epoch| epoch.baseline == baseline);
            epochs.map(|epoch| epoch_sample(self.test, epoch, samples)).collect::<Vec<EpochSample>>()
        };
        let (baseline, epochs) = (of(true), of(false));
        let information: Vec<f64> = self
            .status
            .variants
            .iter()
            .map(|variant| variant.information.as_ref().and_then(|text| text.parse().ok()).unwrap_or(0.0))
            .collect();
        let started = self.status.started_at.as_ref().map_or(self.now, |time| time.0);
        let days = self.elapsed(started).as_secs_f64() / 86_400.0;
        let judgement = assess(&AssessInputs {
            test: self.test,
            epochs: &epochs,
            baseline: baseline.first(),
            thetas: &thetas(&self.status),
            earlier_users: &samples.earlier_users(&self.test.uid),
            information: &information,
            days,
        });
        // The figures of a verdict stay as they were.
        let is_promoting = self.status.phase == Some(ABTestPhase::Promoting);
        if self.is_sampling() {
            let requests =
                |status: &ABTestStatus| status.variants.iter().map(|one| one.requests).sum::<i64>();
            let before = requests(&self.status);
            self.figures(&judgement);
            // Without requests there is nothing new to write.
            if requests(&self.status) != before {
                looks::remember(&mut self.status, self.now);
                self.load(epochs.last(), facts);
            }
        } else if !is_promoting {
            return;
        }
        if let Some(breach) = &judgement.breach {
            self.stop(breach);
        } else if self.is_sampling() {
            self.conclude(&judgement, days);
        }
        self.reweigh();
    }

    fn figures(&mut self, judgement: &Judgement) {
        let names = self.names();
        self.status.leader = judgement.leader.and_then(|leader| names.get(leader).cloned());
        self.status.confidence = judgement.confidence.map(|confidence| decimals(confidence, 4));
        self.status.detectable_effect = judgement.detectable_effect.map(|effect| decimals(effect, 4));
        self.status.days_left = judgement.days_left.map(|days| decimals(days, 1));
        let samples: u64 = judgement.variants.iter().map(|variant| variant.samples).sum();
        self.status.samples = signed(samples);
        let broken = judgement.split_is_broken();
        let seen = judgement.split_ln_evidence.filter(|_| samples > 0);
        self.status.srm = Some(match seen {
            Some(_) if broken => "broken".to_owned(),
            Some(_) => "ok".to_owned(),
            None => "-".to_owned(),
        });
        self.status.srm_p_value = seen.map(|evidence| decimals((-evidence).exp().min(1.0), 6));
        if seen.is_some() {
            let message = if broken {
                "users are not divided as configured: compare the users of each variant with the weights, and look for a proxy that drops the header or caches answers"
            } else {
                "users are divided as configured"
            };
            let (status, reason) =
                if broken { ("False", "SampleRatioMismatch") } else { ("True", "AsConfigured") };
            self.set(Fact { kind: "SplitHealthy", status, reason, message: message.to_owned() });
        }
        for (status, one) in self.status.variants.iter_mut().zip(&judgement.variants) {
            fill(status, one);
        }
    }

    fn load(&mut self, epoch: Option<&EpochSample>, facts: &TestFacts) {
        let load = epoch.and_then(|epoch| looks::load(&mut self.status, epoch, facts, self.now));
        if let Some(looks::Load { matched, message }) = load {
            let (status, reason) = if matched { ("True", "Matched") } else { ("False", "LoadDiffers") };
            self.set(Fact { kind: "LoadMatched", status, reason, message });
        }
    }

    fn stop(&mut self, breach: &Breach) {
        let Breach { variant, metric, value, limit } = breach;
        let name = &self.test.variants[*variant].name;
        let message = format!(
            "{metric:?} of {name} is {}, beyond the limit of {}; the control gets every request",
            decimals(*value, 4),
            decimals(*limit, 4)
        );
        self.status.phase = Some(ABTestPhase::Stopped);
        self.status.verdict = Some(ABTestVerdict::Inconclusive);
        (self.status.winner, self.status.promoted) = (None, 0);
        self.status.concluded_at = Some(Time(self.now));
        self.set(Fact { kind: "Sampling", status: "False", reason: "GuardrailBroken", message });
    }

    fn conclude(&mut self, judgement: &Judgement, days: f64) {
        let is_over = days * 86_400.0 >= self.test.max_duration.as_secs_f64();
        let (verdict, winner) = match judgement.conclusion {
            Some(conclusion) => (conclusion.verdict, conclusion.winner),
            None if is_over => (ABTestVerdict::Inconclusive, None),
            None => return,
        };
        let winner = winner.and_then(|winner| self.names().get(winner).cloned());
        let (reason, message) = match (verdict, &winner) {
            (ABTestVerdict::Winner, Some(winner)) => ("Winner", format!("{winner} is better; see its interval in status.variants")),
            (ABTestVerdict::Equivalent, _) => ("Equivalent", "the variants differ by less than spec.goal.margin".to_owned()),
            (ABTestVerdict::Invalid, _) => (
                "SampleRatioMismatch",
                "users were not divided as configured, so nothing can be said; find the cause and create the test anew".to_owned(),
            ),
            _ => (
                "MaxDuration",
                "spec.stopWhen.maxDuration has passed without a verdict; status.detectableEffect says what the test could have found".to_owned(),
            ),
        };
        self.status.verdict = Some(verdict);
        self.status.concluded_at = Some(Time(self.now));
        let promotes = self.test.on_conclusion == OnConclusion::Promote && winner.is_some();
        self.status.phase = Some(if promotes { ABTestPhase::Promoting } else { ABTestPhase::Concluded });
        if promotes {
            self.status.promoted = PROMOTION_STEPS[0];
            self.status.promoted_since = Some(Time(self.now));
        }
        self.status.winner = winner;
        self.set(Fact { kind: "Sampling", status: "False", reason, message });
    }
}

#[cfg(test)]
mod tests;
