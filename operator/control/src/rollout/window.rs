//! What was counted of a rollout's requests since its step and its attempt started.
//!
//! It is a part of the state, so that a step goes on where it was under another operator. A new leader gets
//! the sums of the gateway processes that run, and none of those that ended before. So the state has both
//! what was counted so far, and what each process had counted when that was written. What came since is the
//! difference of each process's own sums, and all of a process that started since. A process that ended takes
//! with it what nobody wrote down; no difference is ever negative.

use std::collections::BTreeMap;

use trustformers_crds::{CountedProcess, RolloutSample};
use trustformers_proto::control::v1::LatencyHistogram;

use super::RolloutPolicy;
use super::analysis::{RequestSample, SampleKey, StepSample};
use super::state::{Member, RolloutPhase, RolloutState};
use crate::counts::{Counts, Histogram};

/// Gateway processes that are remembered, with at most some 2 KB each: 64 × 2 KB = 128 KB of the 1.5 MB that
/// the API server stores of an object. Of more, those that have ended are forgotten first.
const MAX_PROCESSES: usize = 64;

/// What gateways have counted of one revision of the model, by the id of their process.
pub type CountsOf<'a> = &'a dyn Fn(&str) -> BTreeMap<String, Counts>;

/// The counts that decide about a revision.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tally {
    /// Requests that were answered or that the revision failed.
    pub requests: u64,
    /// Those that it failed.
    pub errors: u64,
    /// Latency of complete answers, from the attempt to their end.
    pub latency: Histogram,
}

impl Tally {
    /// The part of a revision's counts that decides.
    #[must_use]
    pub fn of(counts: &Counts) -> Self {
        let answer = LatencyHistogram::of_buckets(counts.answer.bucket_counts(), 0);
        Self {
            requests: counts.outcomes.judged(),
            errors: counts.failures(),
            latency: Histogram::from(&answer),
        }
    }

    fn add(&mut self, other: &Self) {
        self.requests = self.requests.saturating_add(other.requests);
        self.errors = self.errors.saturating_add(other.errors);
        self.latency.merge(&other.latency);
    }

    fn since(&self, earlier: &Self) -> Self {
        Self {
            requests: self.requests.saturating_sub(earlier.requests),
            errors: self.errors.saturating_sub(earlier.errors),
            latency: self.latency.since(&earlier.latency),
        }
    }

    fn sample(&self) -> RequestSample {
        RequestSample {
            requests: self.requests,
            errors: self.errors,
            latency: self.latency.buckets().collect(),
        }
    }

    /// `requests errors distance:count distance:count …`; the distance of a bucket is that to the one before.
    fn to_text(&self) -> String {
        let wire = LatencyHistogram::of_buckets(self.latency.bucket_counts(), 0);
        let mut words = vec![self.requests.to_string(), self.errors.to_string()];
        let buckets = wire.buckets.iter().zip(&wire.counts);
        words.extend(buckets.map(|(distance, count)| format!("{distance}:{count}")));
        words.join(" ")
    }

    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let requests = words.next()?.parse().ok()?;
        let errors = words.next()?.parse().ok()?;
        let mut wire = LatencyHistogram::default();
        for word in words {
            let (distance, count) = word.split_once(':')?;
            wire.buckets.push(distance.parse().ok()?);
            wire.counts.push(count.parse().ok()?);
        }
        Some(Self { requests, errors, latency: Histogram::from(&wire) })
    }
}

/// The sums of one gateway process since it started.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ProcessTally {
    /// Of the candidate.
    pub candidate: Tally,
    /// Of the stable revision.
    pub stable: Tally,
}

/// What was counted so far, and what that was computed from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SampleWindow {
    /// The step that the candidate's counts are about.
    pub key: SampleKey,
    /// The revision that the candidate is compared with.
    pub stable_revision: String,
    /// The candidate since the step started.
    pub candidate: Tally,
    /// The stable revision since the attempt started.
    pub stable: Tally,
    /// What each process had counted then.
    pub processes: BTreeMap<String, ProcessTally>,
}

impl SampleWindow {
    /// The window of a state, with all that was counted until now; none if nothing is compared in this state.
    #[must_use]
    pub fn next(
        before: Option<&Self>,
        state: &RolloutState,
        policy: &RolloutPolicy,
        counts: CountsOf<'_>,
    ) -> Option<Self> {
        policy.analysis?;
        let (key, stable) = (state.sample_key()?, compared_with(state)?.revision.clone());
        let same_pair = |one: &&Self| one.key.revision == key.revision && one.stable_revision == stable;
        let before = before.filter(same_pair);
        let continues = before.filter(|one| one.key.attempt == key.attempt);
        // While the candidate gets no request, nothing needs to be written again and again.
        let sums = sums(&key.revision, &stable, counts);
        if let Some(waits) = continues.filter(|_| !is_compared(state.phase)) {
            let mut waits = waits.clone();
            // What a process had counted that is new to this leader is not of this attempt either: a leader
            // that begins has had no report of any.
            for (process, counted) in sums.into_iter().take(MAX_PROCESSES) {
                if waits.processes.len() < MAX_PROCESSES {
                    waits.processes.entry(process).or_insert(counted);
                }
            }
            return Some(waits);
        }
        let mut window = match continues {
            Some(window) => window.with(&sums),
            None => Self {
                key: key.clone(),
                stable_revision: stable,
                candidate: Tally::default(),
                stable: Tally::default(),
                processes: before.map(|one| one.processes.clone()).unwrap_or_default(),
            },
        };
        if window.key != key {
            window.candidate = Tally::default();
            window.key = key;
        }
        window.remember(sums);
        Some(window)
    }

    /// With what processes have counted since this was written.
    fn with(&self, sums: &BTreeMap<String, ProcessTally>) -> Self {
        let mut window = self.clone();
        for (process, now) in sums {
            let earlier = self.processes.get(process).cloned().unwrap_or_default();
            window.candidate.add(&now.candidate.since(&earlier.candidate));
            window.stable.add(&now.stable.since(&earlier.stable));
        }
        window
    }

    fn remember(&mut self, sums: BTreeMap<String, ProcessTally>) {
        let running: Vec<String> = sums.keys().cloned().collect();
        self.processes.extend(sums);
        if self.processes.len() > MAX_PROCESSES {
            self.processes.retain(|process, _| running.contains(process));
        }
        while self.processes.len() > MAX_PROCESSES {
            self.processes.pop_last();
        }
    }

    /// What it says.
    #[must_use]
    pub fn sample(&self) -> StepSample {
        StepSample { key: self.key.clone(), candidate: self.candidate.sample(), stable: self.stable.sample() }
    }

    /// As the status stores it.
    #[must_use]
    pub fn stored(&self) -> RolloutSample {
        let process = |(process, sums): (&String, &ProcessTally)| CountedProcess {
            process: process.clone(),
            candidate: sums.candidate.to_text(),
            stable: sums.stable.to_text(),
        };
        RolloutSample {
            candidate: self.key.revision.clone(),
            stable: self.stable_revision.clone(),
            step: self.key.step,
            attempt: self.key.attempt,
            candidate_counts: self.candidate.to_text(),
            stable_counts: self.stable.to_text(),
            processes: self.processes.iter().map(process).collect(),
        }
    }

    /// Reads what a status stores; none if somebody edited it so that it cannot be read: it starts anew.
    #[must_use]
    pub fn of(stored: &RolloutSample) -> Option<Self> {
        let process = |one: &CountedProcess| {
            let (candidate, stable) = (Tally::parse(&one.candidate)?, Tally::parse(&one.stable)?);
            Some((one.process.clone(), ProcessTally { candidate, stable }))
        };
        Some(Self {
            key: SampleKey { revision: stored.candidate.clone(), step: stored.step, attempt: stored.attempt },
            stable_revision: stored.stable.clone(),
            candidate: Tally::parse(&stored.candidate_counts)?,
            stable: Tally::parse(&stored.stable_counts)?,
            processes: stored.processes.iter().map(process).collect::<Option<_>>()?,
        })
    }
}

/// Whether counts decide something in this phase.
fn is_compared(phase: RolloutPhase) -> bool {
    matches!(phase, RolloutPhase::Shifting | RolloutPhase::Verifying | RolloutPhase::Promoted)
}

/// The revision that serves beside the one that is compared. While `Promoted` it is the previous one, whose
/// figures are those of the attempt.
fn compared_with(state: &RolloutState) -> Option<&Member> {
    match state.phase {
        RolloutPhase::Done | RolloutPhase::RolledBack | RolloutPhase::RollingBack => None,
        RolloutPhase::Promoted => state.previous.as_ref(),
        _ => state.stable.as_ref(),
    }
}

fn sums(candidate: &str, stable: &str, counts: CountsOf<'_>) -> BTreeMap<String, ProcessTally> {
    let mut sums: BTreeMap<String, ProcessTally> = BTreeMap::new();
    for (process, counted) in counts(candidate) {
        sums.entry(process).or_default().candidate = Tally::of(&counted);
    }
    for (process, counted) in counts(stable) {
        sums.entry(process).or_default().stable = Tally::of(&counted);
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use trustformers_proto::control::v1::Outcome;

    use super::super::analysis::AnalysisLimits;
    use super::super::state::own_pool;

    /// Sums of gateway processes, by process and revision.
    #[derive(Default)]
    struct Gateways(BTreeMap<(&'static str, &'static str), Counts>);

    impl Gateways {
        fn count(&mut self, process: &'static str, revision: &'static str, outcomes: [u64; 2]) {
            let counts = self.0.entry((process, revision)).or_default();
            for (outcome, count) in [(Outcome::Ok, outcomes[0]), (Outcome::PodError, outcomes[1])] {
                counts.attempts += count;
                counts.outcomes.add(outcome, count);
            }
            for _ in 0..outcomes[0] {
                counts.answer.observe(Duration::from_millis(100));
            }
        }

        /// The process ends, and the leader that asks has never had a report of it.
        fn end(&mut self, process: &str) {
            self.0.retain(|(of, _), _| *of != process);
        }

        fn next(&self, before: Option<&SampleWindow>, state: &RolloutState) -> Option<SampleWindow> {
            let policy =
                RolloutPolicy { analysis: Some(AnalysisLimits::default()), ..RolloutPolicy::default() };
            let counts = |revision: &str| -> BTreeMap<String, Counts> {
                let of = self.0.iter().filter(|((_, counted), _)| *counted == revision);
                of.map(|((process, _), counts)| ((*process).to_owned(), counts.clone())).collect()
            };
            SampleWindow::next(before, state, &policy, &counts)
        }
    }

    fn state(phase: RolloutPhase, step: u32, attempt: u32) -> RolloutState {
        let (stable, candidate) = (Some(own_pool("r1")), Some(own_pool("r2")));
        RolloutState { phase, step, attempt, stable, candidate, ..RolloutState::default() }
    }

    /// As another operator reads it.
    fn read_back(window: &SampleWindow) -> SampleWindow {
        SampleWindow::of(&window.stored()).unwrap()
    }

    fn requests(window: &SampleWindow) -> [u64; 3] {
        [window.candidate.requests, window.candidate.errors, window.stable.requests]
    }

    #[test]
    fn a_step_counts_from_its_start_and_the_stable_revision_from_the_start_of_the_attempt() {
        let mut gateways = Gateways::default();
        gateways.count("a", "r1", [1000, 0]);
        gateways.count("a", "r2", [7, 7]);
        let started = gateways.next(None, &state(RolloutPhase::Pending, 0, 1)).unwrap();
        assert_eq!(requests(&started), [0, 0, 0], "an earlier attempt does not count");
        gateways.count("a", "r1", [50, 0]);
        gateways.count("a", "r2", [10, 2]);
        let first = gateways.next(Some(&started), &state(RolloutPhase::Shifting, 0, 1)).unwrap();
        assert_eq!(requests(&first), [12, 2, 50]);
        assert_eq!(first.sample().stable.latency[0].requests, 50);
        let second = gateways.next(Some(&first), &state(RolloutPhase::Shifting, 1, 1)).unwrap();
        assert_eq!(requests(&second), [0, 0, 50]);
        gateways.count("a", "r2", [5, 0]);
        let second = gateways.next(Some(&second), &state(RolloutPhase::Shifting, 1, 1)).unwrap();
        assert_eq!(requests(&second), [5, 0, 50]);
        let again = gateways.next(Some(&second), &state(RolloutPhase::Placing, 1, 2)).unwrap();
        assert_eq!(requests(&again), [0, 0, 0], "another attempt starts from nothing");
    }

    #[test]
    fn a_new_leader_and_restarted_gateways_lose_nothing_that_was_written() {
        let mut gateways = Gateways::default();
        let shifting = state(RolloutPhase::Shifting, 0, 1);
        gateways.count("a", "r2", [100, 0]);
        gateways.count("b", "r2", [100, 0]);
        let window = gateways.next(None, &state(RolloutPhase::Admitted, 0, 1)).unwrap();
        gateways.count("a", "r2", [10, 1]);
        gateways.count("b", "r2", [20, 0]);
        let window = read_back(&gateways.next(Some(&window), &shifting).unwrap());
        assert_eq!(requests(&window), [31, 1, 0]);
        // The leader changes and the new one has no report yet.
        let window = read_back(&Gateways::default().next(Some(&window), &shifting).unwrap());
        assert_eq!(requests(&window), [31, 1, 0]);
        // One gateway restarted meanwhile; the other one reports its sums since it started.
        gateways.end("a");
        gateways.count("c", "r2", [5, 1]);
        gateways.count("b", "r2", [1, 0]);
        let window = gateways.next(Some(&window), &shifting).unwrap();
        assert_eq!(requests(&window), [38, 2, 0]);
        assert_eq!(gateways.next(Some(&window), &shifting).unwrap(), window, "the same sums count once");
    }

    #[test]
    fn while_the_previous_revision_is_ready_its_figures_of_the_attempt_stay() {
        let mut gateways = Gateways::default();
        let window = gateways.next(None, &state(RolloutPhase::Admitted, 0, 1)).unwrap();
        gateways.count("a", "r1", [300, 0]);
        gateways.count("a", "r2", [300, 0]);
        let last = gateways.next(Some(&window), &state(RolloutPhase::Verifying, 2, 1)).unwrap();
        let promoted = RolloutState {
            stable: Some(own_pool("r2")),
            previous: Some(own_pool("r1")),
            candidate: None,
            ..state(RolloutPhase::Promoted, 0, 1)
        };
        gateways.count("a", "r2", [4, 4]);
        let baked = gateways.next(Some(&last), &promoted).unwrap();
        assert_eq!((baked.stable.requests, baked.key.revision.as_str()), (300, "r2"));
        gateways.count("a", "r2", [4, 4]);
        assert_eq!(requests(&gateways.next(Some(&baked), &promoted).unwrap()), [8, 4, 300]);
        let done = RolloutState { phase: RolloutPhase::Done, ..promoted };
        assert_eq!(gateways.next(Some(&baked), &done), None);
    }

    #[test]
    fn before_the_first_request_the_window_gets_nothing_but_processes_that_are_new_to_the_leader() {
        let mut gateways = Gateways::default();
        let started = gateways.next(None, &state(RolloutPhase::Pending, 0, 1)).unwrap();
        gateways.count("a", "r1", [10, 0]);
        // The leader had no report of it when the attempt started.
        let loading = gateways.next(Some(&started), &state(RolloutPhase::Loading, 0, 1)).unwrap();
        assert_eq!((requests(&loading), loading.processes.len()), ([0, 0, 0], 1));
        gateways.count("a", "r1", [5, 0]);
        assert_eq!(gateways.next(Some(&loading), &state(RolloutPhase::Warming, 0, 1)).unwrap(), loading);
        let shifting = gateways.next(Some(&loading), &state(RolloutPhase::Shifting, 0, 1)).unwrap();
        assert_eq!(requests(&shifting), [0, 0, 5]);
    }

    #[test]
    fn processes_are_bounded_and_edited_text_starts_anew() {
        let mut window = Gateways::default().next(None, &state(RolloutPhase::Pending, 0, 1)).unwrap();
        let sums = |from: usize, to: usize| {
            (from..to).map(|id| (format!("p{id}"), ProcessTally::default())).collect::<BTreeMap<_, _>>()
        };
        window.remember(sums(0, MAX_PROCESSES));
        window.remember(sums(MAX_PROCESSES, MAX_PROCESSES + 2));
        assert_eq!(window.processes.len(), 2, "those that ended go first");
        window.remember(sums(0, 2 * MAX_PROCESSES));
        assert_eq!(window.processes.len(), MAX_PROCESSES);
        let stored = RolloutSample { candidate_counts: "many".to_owned(), ..window.stored() };
        assert_eq!(SampleWindow::of(&stored), None);
    }
}
