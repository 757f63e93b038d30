//! Answers whose scores were counted, and the scores that two gateways counted of one answer.
//!
//! A caller may send the score of one answer to two gateways, and neither knows of the other. Each reports
//! which answers its newest scores are of. A score of an answer that another process has counted is a
//! duplicate: it is booked at the process that counted it second, and subtracted from its sums.
//!
//! A booking stays, also when its answer is forgotten, when a process ends, and in the checkpoint. Behind a
//! restart of the operator, gateways report again what was compared before. Such a score is recognised by its
//! number: scores of a process are numbered in the order in which it counted them, and the checkpoint says up
//! to which number they were compared. So no answer is subtracted twice, whichever answers the checkpoint had
//! room for, and in whichever order gateways report and the checkpoint is read.

use std::collections::{BTreeMap, VecDeque};

use trustformers_proto::ab_test::USER_BUCKETS;
use trustformers_proto::control::v1::{DuplicateScores, ScoredAnswer, VariantScores};

use super::sample::{UserBucket, VariantId};

/// Scored answers of one variant, epoch and process that are known: four times those that a gateway knows.
/// Each takes some 70 bytes: 1.1 MB.
const MAX_SCORED: usize = 16_384;
/// Of these, the answers that a checkpoint has at most: those that a gateway knows. 4,096 × 8 bytes are 33
/// KB.
pub(super) const MAX_STORED_ANSWERS: usize = 4096;
/// Answers that the checkpoint of a test has in all: 16,384 × 8 bytes are 131 KB of its 900 KB. Where
/// processes have more, each stores fewer.
pub(super) const MAX_ANSWERS_OF_TEST: usize = 16_384;

/// A score as a gateway counted it.
#[derive(Debug, Clone, Copy, PartialEq)]
struct CountedScore {
    /// Which one of its process and variant it is, from 1.
    number: u64,
    bucket: u32,
    score: f64,
}

/// What was counted twice in one bucket of users.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Duplicates {
    scores: u64,
    score_sum: f64,
}

/// The answers of the newest scores of one process, the oldest of which are forgotten. A report that comes
/// again changes nothing.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct ScoredAnswers {
    /// None of a score that was compared before a checkpoint was read, or whose process is not kept apart.
    by_answer: BTreeMap<u64, Option<CountedScore>>,
    /// The answers, the oldest first.
    order: VecDeque<u64>,
    /// Scores up to this number were compared before a checkpoint was read.
    settled: u64,
    /// By bucket, what the sums of the process have too much.
    duplicates: BTreeMap<u32, Duplicates>,
}

impl ScoredAnswers {
    /// Takes the newest scores that the process reports, which has counted so many in all. `others` are the
    /// answers of the other processes.
    pub(super) fn report(&mut self, wire: &[ScoredAnswer], counted: u64, others: &[&Self]) {
        let first = counted.saturating_add(1).saturating_sub(wire.len() as u64).max(1);
        for (number, ScoredAnswer { answer, bucket, score }) in (first..).zip(wire) {
            let score = CountedScore { number, bucket: *bucket, score: *score };
            self.count(*answer, score, others);
        }
    }

    /// Takes what the process had reported before its part of the checkpoint was read.
    pub(super) fn report_again(&mut self, before: &Self, others: &[&Self]) {
        for answer in &before.order {
            match before.by_answer.get(answer) {
                Some(Some(score)) => self.count(*answer, *score, others),
                Some(None) => self.insert(*answer, None),
                None => {}
            }
        }
    }

    /// Of n processes that know an answer, n - 1 bookings are made. Those among the ones that had compared it
    /// before the checkpoint are in the checkpoint.
    fn count(&mut self, answer: u64, score: CountedScore, others: &[&Self]) {
        if self.by_answer.contains_key(&answer) {
            return;
        }
        let mut elsewhere = others.iter().filter_map(|other| other.is_settled(answer)).peekable();
        let is_known = elsewhere.peek().is_some();
        // The first settled one completes the bookings of those that are new, each of which found none yet.
        let is_duplicate =
            is_known && (score.number > self.settled || !elsewhere.any(|is_settled| is_settled));
        if is_duplicate && (score.bucket as usize) < USER_BUCKETS {
            self.book(score.bucket, Duplicates { scores: 1, score_sum: score.score });
        }
        self.insert(answer, Some(score));
    }

    /// Whether a score was compared before the checkpoint was read; none of an answer that is not known.
    fn is_settled(&self, answer: u64) -> Option<bool> {
        let known = self.by_answer.get(&answer)?;
        Some(known.is_none_or(|score| score.number <= self.settled))
    }

    fn insert(&mut self, answer: u64, score: Option<CountedScore>) {
        if self.by_answer.contains_key(&answer) {
            return;
        }
        self.by_answer.insert(answer, score);
        self.order.push_back(answer);
        if self.order.len() > MAX_SCORED
            && let Some(oldest) = self.order.pop_front()
        {
            self.by_answer.remove(&oldest);
        }
    }

    fn book(&mut self, bucket: u32, more: Duplicates) {
        let booked = self.duplicates.entry(bucket).or_default();
        booked.scores = booked.scores.saturating_add(more.scores);
        booked.score_sum += more.score_sum;
    }

    /// Takes those of a process that is not kept apart any more. Its duplicates are booked already.
    pub(super) fn fold(&mut self, other: &Self) {
        for (bucket, duplicates) in &other.duplicates {
            self.book(*bucket, *duplicates);
        }
        for answer in &other.order {
            self.insert(*answer, None);
        }
    }

    /// Subtracts what was counted twice from sums that have those of the process.
    pub(super) fn subtract_from(&self, buckets: &mut [UserBucket]) {
        for (bucket, duplicates) in &self.duplicates {
            let bucket = buckets.get_mut(*bucket as usize);
            // A checkpoint that somebody else wrote may say more than was counted.
            if let Some(bucket) = bucket.filter(|bucket| bucket.scores >= duplicates.scores) {
                bucket.scores -= duplicates.scores;
                bucket.score_sum -= duplicates.score_sum;
            }
        }
    }

    /// How many answers are stored where each process and variant may store `answers`.
    pub(super) fn stored_answers(&self, answers: usize) -> usize {
        self.order.len().min(answers)
    }

    /// What a checkpoint has of a process with `counted` scores, and at most so many answers; none without
    /// scores. Duplicates are in at most 256 buckets of 20 bytes.
    pub(super) fn to_wire(&self, id: &VariantId, counted: u64, answers: usize) -> Option<VariantScores> {
        let duplicates = self.duplicates.iter().map(|(bucket, one)| DuplicateScores {
            bucket: *bucket,
            scores: one.scores,
            score_sum: one.score_sum,
        });
        let newest = self.order.iter().skip(self.order.len() - self.stored_answers(answers));
        (counted > 0).then(|| VariantScores {
            test: id.test.clone(),
            epoch: id.epoch,
            variant: id.variant.clone(),
            compared: counted,
            answers: newest.copied().collect(),
            duplicates: duplicates.collect(),
        })
    }

    /// As a checkpoint has them.
    pub(super) fn of_wire(wire: &VariantScores) -> Self {
        let mut stored = Self { settled: wire.compared, ..Self::default() };
        for answer in wire.answers.iter().take(MAX_STORED_ANSWERS) {
            stored.insert(*answer, None);
        }
        for DuplicateScores { bucket, scores, score_sum } in &wire.duplicates {
            if (*bucket as usize) < USER_BUCKETS && score_sum.is_finite() {
                stored.book(*bucket, Duplicates { scores: *scores, score_sum: *score_sum });
            }
        }
        stored
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use trustformers_proto::control::v1::{TestCheckpoint, UserBucketCounts, VariantCounts};

    use super::super::sample::{SampleStore, StoredSums};
    use super::*;

    const LIMIT_BYTES: usize = 900_000;

    fn id() -> VariantId {
        VariantId { test: "t".to_owned(), epoch: 1, variant: "a".to_owned() }
    }

    /// A process with so many scores of the sum in bucket 3, of which it tells the answers.
    fn scores(scores: u64, score_sum: f64, answers: &[(u64, f64)]) -> VariantCounts {
        let sums = UserBucketCounts { bucket: 3, scores, score_sum, ..UserBucketCounts::default() };
        let scored = answers.iter().map(|&(answer, score)| ScoredAnswer { answer, bucket: 3, score });
        let VariantId { test, epoch, variant } = id();
        let (buckets, scored) = (vec![sums], scored.collect());
        VariantCounts { test, epoch, variant, buckets, scored, ..VariantCounts::default() }
    }

    /// Scores and their sum, as the analysis has them.
    fn counted(store: &SampleStore) -> (u64, f64) {
        let sums = store.of(&id());
        (sums.buckets[3].scores, sums.buckets[3].score_sum)
    }

    /// Another operator with this checkpoint, which these processes have reported to before, and those report
    /// to behind it.
    fn restarted(stored: &StoredSums, before: &[GatewayProcess], behind: &[GatewayProcess]) -> SampleStore {
        let mut store = SampleStore::default();
        before.iter().for_each(|one| store.report(&one.name, &[one.newest(usize::MAX)]));
        assert!(store.restore(stored, &BTreeSet::from([id()])).is_empty());
        behind.iter().for_each(|one| store.report(&one.name, &[one.newest(usize::MAX)]));
        store
    }

    /// A gateway process, which counts one score of an answer, as gateways do. The score of answer n is n/4.
    #[derive(Debug, Clone)]
    struct GatewayProcess {
        name: String,
        answers: Vec<u64>,
    }

    impl GatewayProcess {
        fn with(name: &str, answers: impl IntoIterator<Item = u64>) -> Self {
            Self { name: name.to_owned(), answers: answers.into_iter().collect() }
        }

        /// A report that tells so many of its answers, at most those that a gateway knows.
        fn newest(&self, answers: usize) -> VariantCounts {
            let score = |answer: u64| answer as f64 / 4.0;
            let sum = self.answers.iter().map(|answer| score(*answer)).sum();
            let told = self.answers.len().min(answers).min(MAX_STORED_ANSWERS);
            let told = &self.answers[self.answers.len() - told..];
            let told: Vec<(u64, f64)> = told.iter().map(|answer| (*answer, score(*answer))).collect();
            scores(self.answers.len() as u64, sum, &told)
        }
    }

    #[test]
    fn an_answer_that_was_scored_at_two_gateways_counts_once() {
        let mut store = SampleStore::default();
        // The first score is older than what the gateway knows of; one answer is scored at both.
        store.report("p1", &[scores(3, 1.75, &[(7, 1.0), (8, 0.5)])]);
        let other = scores(2, 1.25, &[(8, 0.5), (9, 0.75)]);
        // The report comes again, as in a new stream.
        store.report("p2", std::slice::from_ref(&other));
        store.report("p2", &[other]);
        assert_eq!(counted(&store), (4, 2.5));
        // Also where the processes are not kept apart any more.
        for process in 0..40 {
            store.report(&format!("without-{process}"), &[scores(0, 0.0, &[])]);
            assert_eq!(counted(&store), (4, 2.5));
        }
        store.report("p1", &[scores(9, 9.0, &[])]);
        assert_eq!(counted(&store), (4, 2.5), "it is added up with others, and not apart");
        // A third gateway counts two answers of those.
        store.report("p3", &[scores(3, 2.5, &[(7, 1.0), (8, 0.5), (10, 1.0)])]);
        assert_eq!(counted(&store), (5, 3.5));
    }

    #[test]
    fn an_answer_counts_once_also_behind_a_restart_of_the_operator() {
        let [ended, lives] = [GatewayProcess::with("p1", [4, 8]), GatewayProcess::with("p2", [8, 12])];
        let mut store = SampleStore::default();
        for process in [&ended, &lives] {
            store.report(&process.name, &[process.newest(2)]);
        }
        assert_eq!(counted(&store), (3, 6.0));
        let stored = store.checkpoint("t", LIMIT_BYTES).unwrap();
        // Behind the checkpoint, the gateway that lives gets a score that the other one has counted.
        let more = GatewayProcess::with("p2", [8, 12, 4]);
        let orders = [
            restarted(&stored, std::slice::from_ref(&more), &[]),
            restarted(&stored, &[], std::slice::from_ref(&more)),
            // That one lives, too, and reports first or last.
            restarted(&stored, &[ended.clone(), more.clone()], &[]),
            restarted(&stored, &[], &[ended.clone(), more.clone()]),
            restarted(&stored, std::slice::from_ref(&more), std::slice::from_ref(&ended)),
        ];
        for (number, mut store) in orders.into_iter().enumerate() {
            assert_eq!(counted(&store), (3, 6.0), "order {number}");
            // A new gateway gets a score of each, and the operator is restarted once more.
            let third = GatewayProcess::with("p3", [12, 16, 4, 8]);
            store.report("p3", &[third.newest(4)]);
            assert_eq!(counted(&store), (4, 10.0), "order {number}");
            let stored = store.checkpoint("t", LIMIT_BYTES).unwrap();
            let again = restarted(&stored, &[third], std::slice::from_ref(&more));
            assert_eq!(counted(&again), (4, 10.0), "order {number}");
        }
    }

    #[test]
    fn a_checkpoint_without_compared_scores_compares_them_anew() {
        // As operators wrote it before: the sums alone.
        let mut store = SampleStore::default();
        let both = [GatewayProcess::with("p1", [4, 8]), GatewayProcess::with("p2", [8, 12])];
        for process in &both {
            store.report(&process.name, &[process.newest(0)]);
        }
        let mut stored = store.checkpoint("t", LIMIT_BYTES).unwrap();
        for bytes in stored.values_mut() {
            let mut part = <TestCheckpoint as prost::Message>::decode(bytes.as_slice()).unwrap();
            assert_eq!(part.scores.len(), 1);
            part.scores.clear();
            *bytes = prost::Message::encode_to_vec(&part);
        }
        assert_eq!(counted(&restarted(&stored, &[], &both)), (3, 6.0));
    }

    #[test]
    fn where_answers_have_no_room_none_is_subtracted_twice_and_the_newest_are_recognised() {
        // Six gateways with as many answers as they know, of which the first two share a thousand.
        let firsts = [0_u64, 3096, 8192, 12_288, 16_384, 20_480];
        let names = ["p1", "p2", "p3", "p4", "p5", "p6"];
        let all = names.into_iter().zip(firsts);
        let all: Vec<GatewayProcess> =
            all.map(|(name, first)| GatewayProcess::with(name, first..first + 4096)).collect();
        let mut store = SampleStore::default();
        for process in &all {
            store.report(&process.name, &[process.newest(4096)]);
        }
        let distinct = 6 * 4096 - 1000;
        assert_eq!(counted(&store).0, distinct);
        let stored = store.checkpoint("t", LIMIT_BYTES).unwrap();
        let bytes: usize = stored.values().map(Vec::len).sum();
        // Of each the newest 2,048 answers.
        assert!((98_304..100_000).contains(&bytes), "{bytes} bytes");
        let small = store.checkpoint("t", 10_000).unwrap();
        assert!(small.values().map(Vec::len).sum::<usize>() <= 10_000);
        for stored in [&stored, &small] {
            assert_eq!(counted(&restarted(stored, &[], &[])).0, distinct, "all have ended");
            assert_eq!(counted(&restarted(stored, &all, &[])).0, distinct);
            let mut store = restarted(stored, &[], &all[..2]);
            assert_eq!(counted(&store).0, distinct);
            // The newest score of one that has ended comes again, and one of a gateway that lives.
            let again = GatewayProcess::with("p7", [24_575, 0]);
            store.report("p7", &[again.newest(2)]);
            assert_eq!(counted(&store).0, distinct);
        }
    }

    #[test]
    fn a_checkpoint_of_somebody_else_subtracts_no_more_than_was_counted() {
        let process = GatewayProcess::with("p1", [4]);
        let mut store = SampleStore::default();
        store.report("p1", &[process.newest(1)]);
        let mut stored = store.checkpoint("t", LIMIT_BYTES).unwrap();
        let duplicate = |bucket, scores| DuplicateScores { bucket, scores, score_sum: 1.0 };
        let bytes = stored.get_mut("p1").unwrap();
        let mut part = <TestCheckpoint as prost::Message>::decode(bytes.as_slice()).unwrap();
        part.scores[0].duplicates = vec![duplicate(3, 9), duplicate(999, 1), duplicate(4, 1)];
        *bytes = prost::Message::encode_to_vec(&part);
        assert_eq!(counted(&restarted(&stored, &[], &[])), (1, 1.0));
    }

    proptest! {
        /// Three gateways count scores in any order. Between, the operator stores its sums, is restarted,
        /// or a gateway ends and another one takes its place.
        #[test]
        fn each_answer_counts_once_whoever_is_restarted(
            steps in proptest::collection::vec((0_usize..20, 0_usize..3, 1_u64..15), 1..60),
        ) {
            let mut store = SampleStore::default();
            let mut stored = StoredSums::new();
            let mut gateways: Vec<GatewayProcess> =
                (0..3).map(|number| GatewayProcess::with(&format!("first-{number}"), [])).collect();
            let mut answers: BTreeSet<u64> = BTreeSet::new();
            for (number, (action, gateway, answer)) in steps.into_iter().enumerate() {
                match action {
                    // Some of the gateways report before the checkpoint is read.
                    0 => store = restarted(&stored, &gateways[..gateway], &gateways[gateway..]),
                    1 => stored = store.checkpoint("t", LIMIT_BYTES).unwrap(),
                    2 => {
                        // What it counted behind the last checkpoint would be lost with the next operator.
                        stored = store.checkpoint("t", LIMIT_BYTES).unwrap();
                        gateways[gateway] = GatewayProcess::with(&format!("later-{number}"), []);
                    }
                    _ if gateways[gateway].answers.contains(&answer) => {}
                    _ => {
                        gateways[gateway].answers.push(answer);
                        answers.insert(answer);
                        store.report(&gateways[gateway].name, &[gateways[gateway].newest(1)]);
                    }
                }
                let sum = answers.iter().sum::<u64>() as f64 / 4.0;
                prop_assert_eq!(counted(&store), (answers.len() as u64, sum));
            }
        }
    }
}
