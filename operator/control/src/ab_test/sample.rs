//! What gateways have counted of the variants of tests: sums over processes, which outlive gateways and
//! operators.
//!
//! A gateway reports the sums since its process began, bucket by bucket. [`SampleStore`] keeps the largest
//! that each process reported, so that a report counts once, however often it comes and in which order. A
//! checkpoint has the sums of each process apart: what a process reports behind a restart of the operator
//! replaces its part of the checkpoint. What two processes have counted of one answer counts once (`scored`).

use std::collections::{BTreeMap, BTreeSet};

use trustformers_crds::Cost;
use trustformers_proto::ab_test::{LATENCY_CELLS, USER_BUCKETS, UserSet};
use trustformers_proto::control::v1::{
    LatencyHistogram, ShadowCounts, TestCheckpoint, UserBucketCounts, VariantCounts, VariantScores,
};

use super::scored::{MAX_ANSWERS_OF_TEST, MAX_STORED_ANSWERS, ScoredAnswers};
use crate::counts::Histogram;

/// Users of one variant and epoch that are distinguished, as in a gateway: 32,768 × 8 bytes, which a hash
/// table makes 0.6 MB. With more users the set is a sample of at least half as many.
const MAX_USERS: usize = 32_768;
/// Processes of gateways whose sums of one test are kept apart. Of more, the sums of those that reported
/// longest ago are added up; what such a process would report later is not taken.
const MAX_PROCESSES: usize = 32;
/// A process that reports nothing while others report this often has ended: three gateways with requests
/// report that often in 6 minutes.
const SILENT_REPORTS: u64 = 1000;
/// The name of the sums of processes that are not kept apart.
const ENDED: &str = "ended";
/// The epoch under which the users of forgotten epochs are stored. Epochs of tests are times, far above.
const EARLIER_EPOCH: u64 = 0;

/// The sums of one bucket of users.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct UserBucket {
    /// Requests that were answered or failed.
    pub requests: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Tokens that were read.
    pub prompt_tokens: u64,
    /// Tokens that were produced.
    pub completion_tokens: u64,
    /// Time of the answers that told their tokens.
    pub token_us: u64,
    /// Scores.
    pub scores: u64,
    /// Their sum.
    pub score_sum: f64,
    /// Answers by the cell of their latency.
    pub answers_within: [u64; LATENCY_CELLS],
    /// First tokens by the cell of theirs.
    pub first_tokens_within: [u64; LATENCY_CELLS],
}

/// What became of requests that a variant answered as the shadow of its test.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ShadowSums {
    /// It gave the answer that the caller got.
    pub same: u64,
    /// It gave another one.
    pub different: u64,
    /// The answers cannot be compared.
    pub incomparable: u64,
    /// It gave an answer, and nothing is compared.
    pub answered: u64,
    /// It gave no answer of success in time.
    pub failed: u64,
    /// The gateway had no room for the copy.
    pub dropped: u64,
}

impl ShadowSums {
    /// Joins each count with that of `other`.
    fn joined(self, other: Self, join: fn(u64, u64) -> u64) -> Self {
        Self {
            same: join(self.same, other.same),
            different: join(self.different, other.different),
            incomparable: join(self.incomparable, other.incomparable),
            answered: join(self.answered, other.answered),
            failed: join(self.failed, other.failed),
            dropped: join(self.dropped, other.dropped),
        }
    }

    fn of_wire(wire: &ShadowCounts) -> Self {
        Self {
            same: wire.same,
            different: wire.different,
            incomparable: wire.incomparable,
            answered: wire.answered,
            failed: wire.failed,
            dropped: wire.dropped,
        }
    }

    /// None where nothing was counted, so that a checkpoint has no place for it.
    fn to_wire(self) -> Option<ShadowCounts> {
        let Self { same, different, incomparable, answered, failed, dropped } = self;
        let wire = ShadowCounts { same, different, incomparable, answered, failed, dropped };
        (self != Self::default()).then_some(wire)
    }
}

/// What was counted of one variant in one epoch.
#[derive(Debug, Clone, PartialEq)]
pub struct VariantSums {
    /// By bucket of users.
    pub buckets: Vec<UserBucket>,
    /// Requests without a user, where users are split.
    pub unidentified: u64,
    /// Requests of forced users.
    pub forced: u64,
    /// Requests that another variant answered.
    pub fallbacks: u64,
    /// From a request to the end of its answer.
    pub answer: Histogram,
    /// From a request to the first bytes of its stream.
    pub first_token: Histogram,
    /// Users that were seen.
    pub users: UserSet,
    /// Requests that it answered as a shadow. They count nowhere else.
    pub shadow: ShadowSums,
    /// The answers of the newest scores, of one process.
    scored: ScoredAnswers,
    /// What its requests cost; it is not counted but configured.
    pub cost: Cost,
}

impl Default for VariantSums {
    fn default() -> Self {
        Self {
            buckets: vec![UserBucket::default(); USER_BUCKETS],
            unidentified: 0,
            forced: 0,
            fallbacks: 0,
            answer: Histogram::default(),
            first_token: Histogram::default(),
            users: UserSet::new(MAX_USERS),
            shadow: ShadowSums::default(),
            scored: ScoredAnswers::default(),
            cost: Cost::default(),
        }
    }
}

impl UserBucket {
    /// What the requests of the bucket cost.
    #[must_use]
    pub fn cost(&self, cost: &Cost) -> f64 {
        let millions = |tokens: u64| tokens as f64 / 1e6;
        cost.per_request * self.requests as f64
            + cost.per_million_prompt_tokens * millions(self.prompt_tokens)
            + cost.per_million_completion_tokens * millions(self.completion_tokens)
    }

    fn merge(&mut self, other: &Self) {
        self.requests += other.requests;
        self.errors += other.errors;
        self.prompt_tokens += other.prompt_tokens;
        self.completion_tokens += other.completion_tokens;
        self.token_us += other.token_us;
        self.scores += other.scores;
        self.score_sum += other.score_sum;
        let cells = self.answers_within.iter_mut().zip(&other.answers_within);
        cells.for_each(|(sum, more)| *sum += more);
        let cells = self.first_tokens_within.iter_mut().zip(&other.first_tokens_within);
        cells.for_each(|(sum, more)| *sum += more);
    }

    /// Takes what a process reports, unless it is older than what is here.
    fn raise(&mut self, wire: &UserBucketCounts) {
        if wire.requests < self.requests || wire.scores < self.scores {
            return;
        }
        *self = Self {
            requests: wire.requests,
            errors: wire.errors,
            prompt_tokens: wire.prompt_tokens,
            completion_tokens: wire.completion_tokens,
            token_us: wire.token_us,
            scores: wire.scores,
            score_sum: wire.score_sum,
            answers_within: cells(&wire.answers_within),
            first_tokens_within: cells(&wire.first_tokens_within),
        };
    }

    fn to_wire(self, bucket: u32) -> UserBucketCounts {
        UserBucketCounts {
            bucket,
            requests: self.requests,
            errors: self.errors,
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.completion_tokens,
            token_us: self.token_us,
            scores: self.scores,
            score_sum: self.score_sum,
            answers_within: without_zeros(&self.answers_within),
            first_tokens_within: without_zeros(&self.first_tokens_within),
        }
    }
}

fn cells(counts: &[u64]) -> [u64; LATENCY_CELLS] {
    let mut cells = [0; LATENCY_CELLS];
    cells.iter_mut().zip(counts).for_each(|(cell, count)| *cell = *count);
    cells
}

fn without_zeros(counts: &[u64]) -> Vec<u64> {
    let used = counts.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1);
    counts[..used].to_vec()
}

impl VariantSums {
    /// Adds what was counted elsewhere. Users that both saw count once.
    pub fn merge(&mut self, other: &Self) {
        self.buckets.iter_mut().zip(&other.buckets).for_each(|(sum, more)| sum.merge(more));
        self.unidentified += other.unidentified;
        self.forced += other.forced;
        self.fallbacks += other.fallbacks;
        self.answer.merge(&other.answer);
        self.first_token.merge(&other.first_token);
        self.users.merge(&other.users);
        self.shadow = self.shadow.joined(other.shadow, u64::saturating_add);
        self.cost = other.cost;
    }

    /// All requests.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.requests).sum()
    }

    /// All failures.
    #[must_use]
    pub fn errors(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.errors).sum()
    }

    /// Adds what a process counted that is not kept apart any more.
    fn fold(&mut self, other: &Self) {
        self.merge(other);
        self.scored.fold(&other.scored);
    }

    /// All scores, also those that another process has counted as well.
    fn scores(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.scores).sum()
    }

    /// Takes what a process reports, as far as it is newer, without its scored answers.
    fn raise(&mut self, wire: &VariantCounts) {
        self.unidentified = self.unidentified.max(wire.unidentified);
        self.forced = self.forced.max(wire.forced);
        self.fallbacks = self.fallbacks.max(wire.fallbacks);
        raise_histogram(&mut self.answer, wire.answer.as_ref());
        raise_histogram(&mut self.first_token, wire.first_token.as_ref());
        for bucket in &wire.buckets {
            if let Some(own) = self.buckets.get_mut(bucket.bucket as usize) {
                own.raise(bucket);
            }
        }
        let shadow = wire.shadow.as_ref().map(ShadowSums::of_wire).unwrap_or_default();
        self.shadow = self.shadow.joined(shadow, u64::max);
        self.users.raise_to(wire.users_level);
        for user in &wire.users {
            self.users.insert(*user);
        }
    }

    /// As a process would report it.
    pub(super) fn to_wire(&self, id: &VariantId, users_level: u32) -> VariantCounts {
        let buckets = (0..).zip(&self.buckets).filter(|(_, bucket)| **bucket != UserBucket::default());
        let mut users = self.users.clone();
        users.raise_to(users_level);
        let mut fingerprints: Vec<u64> = users.iter().collect();
        fingerprints.sort_unstable();
        VariantCounts {
            test: id.test.clone(),
            epoch: id.epoch,
            variant: id.variant.clone(),
            unidentified: self.unidentified,
            forced: self.forced,
            fallbacks: self.fallbacks,
            answer: Some(LatencyHistogram::from(&self.answer)),
            first_token: Some(LatencyHistogram::from(&self.first_token)),
            buckets: buckets.map(|(number, bucket)| bucket.to_wire(number)).collect(),
            users: fingerprints,
            users_level: users.level(),
            shadow: self.shadow.to_wire(),
            // A checkpoint has fingerprints of them, in a part of their own.
            scored: Vec::new(),
        }
    }
}

fn raise_histogram(own: &mut Histogram, wire: Option<&LatencyHistogram>) {
    let Some(reported) = wire.map(Histogram::from) else { return };
    if reported.count() >= own.count() {
        *own = reported;
    }
}

/// One variant in one epoch of a test.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct VariantId {
    /// UID of the test.
    pub test: String,
    /// The epoch.
    pub epoch: u64,
    /// Name of the variant.
    pub variant: String,
}

impl VariantId {
    fn of(wire: &VariantCounts) -> Self {
        Self { test: wire.test.clone(), epoch: wire.epoch, variant: wire.variant.clone() }
    }

    fn of_scores(wire: &VariantScores) -> Self {
        Self { test: wire.test.clone(), epoch: wire.epoch, variant: wire.variant.clone() }
    }

    /// The users of a test's forgotten epochs.
    #[must_use]
    pub fn earlier(test: &str) -> Self {
        Self { test: test.to_owned(), epoch: EARLIER_EPOCH, variant: String::new() }
    }
}

/// What a checkpoint has of that of which it may have less.
#[derive(Debug, Clone, Copy)]
struct StoredDetail {
    /// Users whose fingerprints end with at least so many zero bits.
    users_level: u32,
    /// Scored answers of each variant and process.
    answers: usize,
}

/// The sums of one process.
#[derive(Debug, Default)]
struct ProcessSums {
    variants: BTreeMap<VariantId, VariantSums>,
    /// Number of its last report.
    reported: u64,
}

/// A test as it is stored: by process the encoded [`TestCheckpoint`].
pub type StoredSums = BTreeMap<String, Vec<u8>>;

/// The sums of a test do not fit into one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the sums of all gateways have {bytes} bytes and one object takes {limit_bytes}: run fewer gateways or variants"
)]
pub struct CheckpointTooLarge {
    /// Bytes of the sums without users.
    pub bytes: usize,
    /// The limit.
    pub limit_bytes: usize,
}

/// The sums of all gateways and all tests.
#[derive(Debug, Default)]
pub struct SampleStore {
    processes: BTreeMap<String, ProcessSums>,
    /// Processes that are not kept apart any more.
    folded: BTreeSet<String>,
    reports: u64,
}

impl SampleStore {
    /// Records what a process reports.
    pub fn report(&mut self, process: &str, variants: &[VariantCounts]) {
        if variants.is_empty() || self.folded.contains(process) || process == ENDED {
            return;
        }
        self.raise(process, variants);
        while self.processes.len() > MAX_PROCESSES + 1 {
            self.fold_oldest();
        }
    }

    fn raise(&mut self, process: &str, variants: &[VariantCounts]) {
        self.reports += 1;
        let sums = self.processes.entry(process.to_owned()).or_default();
        sums.reported = self.reports;
        for wire in variants {
            sums.variants.entry(VariantId::of(wire)).or_default().raise(wire);
        }
        for wire in variants.iter().filter(|wire| !wire.scored.is_empty()) {
            let id = VariantId::of(wire);
            let counted = self.sums_of(process, &id).map_or(0, |sums| sums.scores());
            self.beside_others(process, &id, |own, others| own.report(&wire.scored, counted, others));
        }
    }

    fn sums_of(&mut self, process: &str, id: &VariantId) -> Option<&mut VariantSums> {
        self.processes.get_mut(process)?.variants.get_mut(id)
    }

    /// Changes the scored answers of a process, beside those of the others.
    fn beside_others(
        &mut self,
        process: &str,
        id: &VariantId,
        change: impl FnOnce(&mut ScoredAnswers, &[&ScoredAnswers]),
    ) {
        let Some(sums) = self.sums_of(process, id) else { return };
        let mut own = std::mem::take(&mut sums.scored);
        let others = self.processes.values().filter_map(|process| process.variants.get(id));
        // Its own ones are not among them meanwhile: there are none in their stead.
        let others: Vec<&ScoredAnswers> = others.map(|sums| &sums.scored).collect();
        change(&mut own, &others);
        if let Some(sums) = self.sums_of(process, id) {
            sums.scored = own;
        }
    }

    /// Adds up the sums of a process that has ended; false where none has.
    fn fold_silent(&mut self) -> bool {
        let apart = self.processes.iter().filter(|(process, _)| *process != ENDED);
        let oldest = apart.map(|(_, sums)| sums.reported).min();
        let is_silent = oldest.is_some_and(|reported| self.reports - reported >= SILENT_REPORTS);
        if is_silent {
            self.fold_oldest();
        }
        is_silent
    }

    fn fold_oldest(&mut self) {
        let apart = self.processes.iter().filter(|(process, _)| *process != ENDED);
        let Some(oldest) = apart.min_by_key(|(_, sums)| sums.reported).map(|(process, _)| process.clone())
        else {
            return;
        };
        let Some(sums) = self.processes.remove(&oldest) else { return };
        let ended = self.processes.entry(ENDED.to_owned()).or_default();
        for (id, sums) in &sums.variants {
            ended.variants.entry(id.clone()).or_default().fold(sums);
        }
        self.folded.insert(oldest);
    }

    /// What all gateways have counted of a variant in an epoch. Of an answer that was scored at two of them
    /// one score counts.
    #[must_use]
    pub fn of(&self, id: &VariantId) -> VariantSums {
        let mut sum = VariantSums::default();
        for sums in self.processes.values().filter_map(|process| process.variants.get(id)) {
            sum.merge(sums);
            sums.scored.subtract_from(&mut sum.buckets);
        }
        sum
    }

    /// Forgets epochs of a test that are not in `epochs`, except which users they had; all of it where
    /// `epochs` is empty.
    pub fn retain_epochs(&mut self, test: &str, epochs: &BTreeSet<u64>) {
        let mut users = UserSet::new(MAX_USERS);
        for process in self.processes.values_mut() {
            process.variants.retain(|id, sums| {
                let is_earlier = id.epoch == EARLIER_EPOCH && !epochs.is_empty();
                let stays = id.test != test || is_earlier || epochs.contains(&id.epoch);
                if !stays {
                    users.merge(&sums.users);
                }
                stays
            });
        }
        if !epochs.is_empty() && (users.level() > 0 || !users.is_empty()) {
            let ended = self.processes.entry(ENDED.to_owned()).or_default();
            ended.variants.entry(VariantId::earlier(test)).or_default().users.merge(&users);
        }
        self.processes.retain(|_, process| !process.variants.is_empty());
    }

    /// Users that were seen in epochs that are forgotten: they are not new in a later one.
    #[must_use]
    pub fn earlier_users(&self, test: &str) -> UserSet {
        self.of(&VariantId::earlier(test)).users
    }

    /// Forgets tests that do not exist any more.
    pub fn retain_tests(&mut self, tests: &BTreeSet<String>) {
        for process in self.processes.values_mut() {
            process.variants.retain(|id, _| tests.contains(&id.test));
        }
        self.processes.retain(|_, process| !process.variants.is_empty());
    }

    /// The sums of a test, to be stored in at most `limit_bytes`. Where they do not fit, those of processes
    /// that have ended are added up, fewer scored answers are stored, and fewer users: a sample that merges
    /// with what gateways still have.
    ///
    /// # Errors
    /// The sums do not fit without any user.
    pub fn checkpoint(&mut self, test: &str, limit_bytes: usize) -> Result<StoredSums, CheckpointTooLarge> {
        let sums_alone = loop {
            let stored = self.stored(test, StoredDetail { users_level: u64::BITS, answers: 0 });
            let bytes = bytes_of(&stored);
            if bytes <= limit_bytes {
                break stored;
            }
            if !self.fold_silent() {
                return Err(CheckpointTooLarge { bytes, limit_bytes });
            }
        };
        let answers = self.answers_that_fit(test, limit_bytes);
        let levels = (0..=u64::BITS).map(|users_level| StoredDetail { users_level, answers });
        let mut stored = levels.map(|detail| self.stored(test, detail));
        Ok(stored.find(|stored| bytes_of(stored) <= limit_bytes).unwrap_or(sums_alone))
    }

    /// Scored answers of each variant and process that a checkpoint of this size has room for.
    fn answers_that_fit(&self, test: &str, limit_bytes: usize) -> usize {
        let mut halves = std::iter::successors(Some(MAX_STORED_ANSWERS), |answers| Some(answers / 2));
        let fits = |answers: &usize| {
            let variants = self.processes.values().flat_map(|process| &process.variants);
            let of_test = variants.filter(|(id, _)| id.test == test);
            let all: usize = of_test.map(|(_, sums)| sums.scored.stored_answers(*answers)).sum();
            let detail = StoredDetail { users_level: u64::BITS, answers: *answers };
            all <= MAX_ANSWERS_OF_TEST && bytes_of(&self.stored(test, detail)) <= limit_bytes
        };
        halves.find(|answers| *answers == 0 || fits(answers)).unwrap_or(0)
    }

    fn stored(&self, test: &str, detail: StoredDetail) -> StoredSums {
        let processes = self.processes.iter();
        let parts = processes.map(|(process, sums)| (process.clone(), encoded(sums, test, detail)));
        parts.filter(|(_, encoded)| !encoded.is_empty()).collect()
    }

    /// Takes what was stored of these variants. Gateways that reported meanwhile have newer sums, which stay.
    /// Others than the operator may write the object: what is none of the test is left out. A part that can't
    /// be decoded is left out too, and its process is named.
    pub fn restore(&mut self, stored: &StoredSums, known: &BTreeSet<VariantId>) -> Vec<String> {
        let mut unreadable = Vec::new();
        let mut scored: BTreeMap<VariantId, BTreeMap<String, ScoredAnswers>> = BTreeMap::new();
        // Before the next report there may be those of a restart besides.
        for (process, bytes) in stored.iter().take(2 * MAX_PROCESSES) {
            // What it has reported meanwhile was added up with others, and has what was stored.
            if self.folded.contains(process) {
                continue;
            }
            match <TestCheckpoint as prost::Message>::decode(bytes.as_slice()) {
                Ok(TestCheckpoint { mut counts, scores }) => {
                    counts.retain(|wire| known.contains(&VariantId::of(wire)));
                    if !counts.is_empty() {
                        self.raise(process, &counts);
                    }
                    for wire in &scores {
                        let id = VariantId::of_scores(wire);
                        if known.contains(&id) {
                            let stored = ScoredAnswers::of_wire(wire);
                            scored.entry(id).or_default().insert(process.clone(), stored);
                        }
                    }
                }
                Err(_) => unreadable.push(process.clone()),
            }
        }
        for (id, stored) in scored {
            self.restore_scored(&id, stored);
        }
        unreadable
    }

    /// Takes the scored answers of a variant as they were stored, by process. What gateways have reported is
    /// compared with these.
    fn restore_scored(&mut self, id: &VariantId, mut stored: BTreeMap<String, ScoredAnswers>) {
        let mut reported: BTreeMap<String, ScoredAnswers> = BTreeMap::new();
        for (process, sums) in &mut self.processes {
            let Some(sums) = sums.variants.get_mut(id) else { continue };
            let stored = stored.remove(process).unwrap_or_default();
            reported.insert(process.clone(), std::mem::replace(&mut sums.scored, stored));
        }
        for (process, before) in reported {
            self.beside_others(&process, id, |own, others| own.report_again(&before, others));
        }
    }
}

fn bytes_of(stored: &StoredSums) -> usize {
    stored.iter().map(|(process, encoded)| process.len() + encoded.len()).sum()
}

fn encoded(process: &ProcessSums, test: &str, detail: StoredDetail) -> Vec<u8> {
    let StoredDetail { users_level, answers } = detail;
    let of_test = process.variants.iter().filter(|(id, _)| id.test == test);
    let scores = of_test.clone().filter_map(|(id, sums)| sums.scored.to_wire(id, sums.scores(), answers));
    let scores = scores.collect();
    let counts = of_test.map(|(id, sums)| sums.to_wire(id, users_level)).collect();
    prost::Message::encode_to_vec(&TestCheckpoint { counts, scores })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn counts(variant: &str, buckets: &[(u32, u64)], users: &[u64]) -> VariantCounts {
        let bucket = |&(bucket, requests): &(u32, u64)| UserBucketCounts {
            bucket,
            requests,
            errors: requests / 10,
            answers_within: vec![0, requests],
            ..UserBucketCounts::default()
        };
        VariantCounts {
            test: "t".to_owned(),
            epoch: 1,
            variant: variant.to_owned(),
            buckets: buckets.iter().map(bucket).collect(),
            users: users.to_vec(),
            ..VariantCounts::default()
        }
    }

    fn id(variant: &str) -> VariantId {
        VariantId { test: "t".to_owned(), epoch: 1, variant: variant.to_owned() }
    }

    #[test]
    fn reports_add_over_processes_and_count_once() {
        let mut store = SampleStore::default();
        store.report("p1", &[counts("a", &[(3, 10)], &[1, 2])]);
        store.report("p1", &[counts("a", &[(3, 10)], &[1, 2])]);
        // An old report that comes late.
        store.report("p1", &[counts("a", &[(3, 9)], &[])]);
        store.report("p1", &[counts("a", &[(4, 1)], &[])]);
        store.report("p2", &[counts("a", &[(3, 7)], &[2, 3])]);
        let sums = store.of(&id("a"));
        assert_eq!((sums.buckets[3].requests, sums.buckets[4].requests), (17, 1));
        assert_eq!((sums.requests(), sums.errors(), sums.users.len()), (18, 1, 3));
        assert_eq!(sums.buckets[3].answers_within[1], 17);
    }

    #[test]
    fn answers_of_a_shadow_add_over_processes_and_outlive_a_checkpoint() {
        let shadow = |same, different| VariantCounts {
            shadow: Some(ShadowCounts { same, different, ..ShadowCounts::default() }),
            ..counts("a", &[], &[])
        };
        let mut store = SampleStore::default();
        for (process, same, different) in [("p1", 9, 1), ("p1", 8, 1), ("p2", 4, 2)] {
            store.report(process, &[shadow(same, different)]);
        }
        let expected = ShadowSums { same: 13, different: 3, ..ShadowSums::default() };
        assert_eq!(store.of(&id("a")).shadow, expected);
        let stored = store.checkpoint("t", 900_000).unwrap();
        let mut restored = SampleStore::default();
        assert!(restored.restore(&stored, &BTreeSet::from([id("a")])).is_empty());
        assert_eq!(restored.of(&id("a")).shadow, expected);
    }

    #[test]
    fn a_checkpoint_and_later_reports_lose_nothing_and_count_nothing_twice() {
        let mut before = SampleStore::default();
        before.report("gone", &[counts("a", &[(1, 5)], &[1])]);
        before.report("lives", &[counts("a", &[(1, 20)], &[2])]);
        let stored = before.checkpoint("t", 900_000).unwrap();
        // Another operator: the gateway that lives reports everything, before or behind the restore.
        for reported_first in [true, false] {
            let mut store = SampleStore::default();
            let report = counts("a", &[(1, 30)], &[2, 3]);
            if reported_first {
                store.report("lives", std::slice::from_ref(&report));
            }
            assert!(store.restore(&stored, &BTreeSet::from([id("a")])).is_empty());
            store.report("lives", &[report]);
            let sums = store.of(&id("a"));
            assert_eq!((sums.requests(), sums.users.len()), (35, 3));
        }
    }

    #[test]
    fn a_checkpoint_that_is_too_large_has_fewer_users_but_every_sum() {
        let mut store = SampleStore::default();
        let users: Vec<u64> = (0..20_000).map(|user: u64| user.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
        store.report("p", &[counts("a", &[(1, 5)], &users)]);
        let whole = store.checkpoint("t", 900_000).unwrap();
        let small = store.checkpoint("t", 60_000).unwrap();
        assert!(small["p"].len() <= 60_000 && whole["p"].len() > 160_000);
        let mut restored = SampleStore::default();
        restored.restore(&small, &BTreeSet::from([id("a")]));
        let sums = restored.of(&id("a"));
        assert_eq!(sums.requests(), 5);
        assert!(sums.users.level() > 0 && sums.users.estimate().abs_diff(20_000) < 2_000);
        assert!(matches!(store.checkpoint("t", 5), Err(CheckpointTooLarge { .. })));
        let broken = StoredSums::from([("x".to_owned(), vec![255])]);
        assert_eq!(SampleStore::default().restore(&broken, &BTreeSet::new()), ["x"]);
    }

    #[test]
    fn what_is_none_of_the_test_is_not_restored() {
        let mut before = SampleStore::default();
        before.report("p", &[counts("a", &[(1, 5)], &[1]), counts("b", &[(1, 7)], &[2])]);
        let stored = before.checkpoint("t", 900_000).unwrap();
        let mut store = SampleStore::default();
        store.restore(&stored, &BTreeSet::from([id("a")]));
        assert_eq!((store.of(&id("a")).requests(), store.of(&id("b")).requests()), (5, 0));
    }

    #[test]
    fn the_oldest_processes_are_added_up() {
        let mut store = SampleStore::default();
        for process in 0..40_u64 {
            store.report(&format!("p{process:02}"), &[counts("a", &[(1, 1)], &[process])]);
        }
        assert_eq!(store.processes.len(), MAX_PROCESSES + 1);
        assert_eq!(store.of(&id("a")).requests(), 40);
        store.report("p00", &[counts("a", &[(1, 2)], &[])]);
        assert_eq!(store.of(&id("a")).requests(), 40, "its sums can't be told apart");
    }

    #[test]
    fn where_a_checkpoint_has_no_room_processes_that_have_ended_are_added_up() {
        let mut store = SampleStore::default();
        let buckets: Vec<(u32, u64)> = (0..256).map(|bucket| (bucket, 100)).collect();
        for process in 0..10 {
            store.report(&format!("p{process}"), &[counts("a", &buckets, &[])]);
        }
        assert!(store.checkpoint("t", 10_000).is_err(), "each of them may live");
        for requests in 1..=SILENT_REPORTS {
            store.report("lives", &[counts("a", &[(0, requests)], &[])]);
        }
        let stored = store.checkpoint("t", 10_000).unwrap();
        assert!(stored.contains_key("lives") && stored.contains_key(ENDED));
        assert_eq!(store.of(&id("a")).requests(), 256_000 + SILENT_REPORTS);
    }

    #[test]
    fn users_of_forgotten_epochs_are_known_also_to_another_operator() {
        let mut store = SampleStore::default();
        store.report(
            "p",
            &[counts("a", &[(1, 1)], &[1, 2]), VariantCounts { epoch: 2, ..counts("a", &[], &[3]) }],
        );
        store.retain_epochs("t", &BTreeSet::from([2]));
        let earlier = |store: &SampleStore| store.earlier_users("t").len();
        assert_eq!((earlier(&store), store.of(&id("a")).requests()), (2, 0));
        // The gateway reports the old epoch again.
        store.report("p", &[counts("a", &[(1, 1)], &[1, 2])]);
        store.retain_epochs("t", &BTreeSet::from([2]));
        assert_eq!(earlier(&store), 2);
        let stored = store.checkpoint("t", 900_000).unwrap();
        let mut restored = SampleStore::default();
        restored.restore(&stored, &BTreeSet::from([VariantId::earlier("t")]));
        assert_eq!(earlier(&restored), 2);
        restored.retain_tests(&BTreeSet::new());
        assert_eq!(earlier(&restored), 0);
    }

    #[test]
    fn epochs_and_tests_that_are_over_are_forgotten() {
        let mut store = SampleStore::default();
        store.report("p", &[counts("a", &[(1, 1)], &[])]);
        store.retain_epochs("t", &BTreeSet::from([1]));
        assert_eq!(store.of(&id("a")).requests(), 1);
        store.retain_epochs("t", &BTreeSet::from([2]));
        assert_eq!(store.of(&id("a")).requests(), 0);
        store.report("p", &[counts("a", &[(1, 1)], &[])]);
        store.retain_tests(&BTreeSet::new());
        assert!(store.processes.is_empty());
    }

    /// What one gateway process counted, with what the callers of its requests counted.
    #[derive(Debug, Clone, Default)]
    struct CountingGateway {
        name: String,
        requests: BTreeMap<u32, u64>,
        users: BTreeSet<u64>,
    }

    impl CountingGateway {
        fn named(name: String) -> Self {
            Self { name, ..Self::default() }
        }

        /// The first report of a stream.
        fn report(&self, store: &mut SampleStore) {
            let requests: Vec<(u32, u64)> =
                self.requests.iter().map(|(bucket, one)| (*bucket, *one)).collect();
            let users: Vec<u64> = self.users.iter().copied().collect();
            store.report(&self.name, &[counts("a", &requests, &users)]);
        }
    }

    proptest! {
        /// Three gateways answer users. Between, the operator is killed or another one leads, which some
        /// gateways reach before it has read the checkpoint, and gateways are restarted.
        #[test]
        fn counts_are_those_of_callers_whoever_is_restarted(
            steps in proptest::collection::vec((0_usize..12, 0_usize..3, 0_u64..40), 1..60),
        ) {
            let mut store = SampleStore::default();
            let mut stored = StoredSums::new();
            let mut gateways: Vec<CountingGateway> =
                (0..3).map(|number| CountingGateway::named(format!("first-{number}"))).collect();
            let (mut requests, mut users) = (BTreeMap::<u32, u64>::new(), BTreeSet::new());
            for (number, (action, gateway, user)) in steps.into_iter().enumerate() {
                match action {
                    0 => {
                        store = SampleStore::default();
                        gateways[..gateway].iter().for_each(|one| one.report(&mut store));
                        store.restore(&stored, &BTreeSet::from([id("a")]));
                        gateways[gateway..].iter().for_each(|one| one.report(&mut store));
                    }
                    1 => stored = store.checkpoint("t", 900_000).unwrap(),
                    2 => {
                        // It has sent its last report, and a checkpoint came before the next operator.
                        stored = store.checkpoint("t", 900_000).unwrap();
                        gateways[gateway] = CountingGateway::named(format!("later-{number}"));
                    }
                    _ => {
                        let bucket = u32::try_from(user % 7).unwrap();
                        *requests.entry(bucket).or_default() += 1;
                        users.insert(user);
                        *gateways[gateway].requests.entry(bucket).or_default() += 1;
                        gateways[gateway].users.insert(user);
                        gateways[gateway].report(&mut store);
                    }
                }
                let sums = store.of(&id("a"));
                prop_assert_eq!(sums.requests(), requests.values().sum::<u64>());
                prop_assert_eq!(sums.users.len(), users.len());
                for (bucket, count) in &requests {
                    prop_assert_eq!(sums.buckets[*bucket as usize].requests, *count);
                }
            }
        }

        #[test]
        fn sums_of_any_division_among_gateways_are_the_whole(
            requests in proptest::collection::vec((0_u32..256, 0_usize..4), 1..300),
        ) {
            let mut whole: BTreeMap<u32, u64> = BTreeMap::new();
            let mut of_process: BTreeMap<usize, BTreeMap<u32, u64>> = BTreeMap::new();
            let mut store = SampleStore::default();
            for (bucket, process) in requests {
                *whole.entry(bucket).or_default() += 1;
                let own = of_process.entry(process).or_default().entry(bucket).or_default();
                *own += 1;
                store.report(&format!("p{process}"), &[counts("a", &[(bucket, *own)], &[u64::from(bucket)])]);
            }
            let sums = store.of(&id("a"));
            for (bucket, count) in &whole {
                prop_assert_eq!(sums.buckets[*bucket as usize].requests, *count);
            }
            prop_assert_eq!(sums.requests(), whole.values().sum::<u64>());
            prop_assert_eq!(sums.users.len(), whole.len());
        }
    }
}
