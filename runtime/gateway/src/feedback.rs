//! `POST /v1/feedback {"request_id", "score", "metric"?, "token"?}`: what a caller thinks of an answer.
//!
//! A score belongs to the route and the revision that answered, so the gateway remembers the ids of the last
//! answers. The id is the `x-request-id` of the answer: 122 random bits, unless its caller chose one. A score
//! counts once for each answer and metric: sending it again changes nothing. An answer that counts in an A/B
//! test is scored by its own user alone, or at any gateway by whoever has the token that the answer carried.
//! What two gateways count of one answer of a test, the operator counts once (`ab_test::series`).

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use http::{HeaderMap, Request};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::ab_test::{ScoredBucket, VariantRegistry};
use crate::error::{Echo, GatewayError};
use crate::gateway::Gateway;
use crate::metrics::RevisionMetrics;
use crate::request_body::BODY_TIMEOUT;
use crate::routing::Routing;

/// Answers that are remembered: at 100 requests per second, those of eleven minutes. Each takes some 340
/// bytes with an id of the longest length (128 bytes), 21 MiB together.
const REMEMBERED_ANSWERS: usize = 65_536;
/// Metrics that one answer may be scored in.
const METRICS_OF_ANSWER: usize = 4;
/// Metrics that callers may name, besides the default one and those of tests. Each makes two series for each
/// revision.
const METRIC_NAMES: usize = 16;
/// The longest name of a metric.
const MAX_METRIC_BYTES: usize = 64;
/// The metric of a score without one.
const DEFAULT_METRIC: &str = "score";
/// The largest score, and the smallest with its sign: sums of them keep six digits behind the point.
const MAX_SCORE: f64 = 1e6;
/// The longest body: an id, a number and a name.
const BODY_BYTES: usize = 4 << 10;

/// A score as a caller sends it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Score {
    request_id: String,
    score: f64,
    #[serde(default)]
    metric: Option<String>,
    /// What the answer carried, if another gateway may have given it.
    #[serde(default)]
    token: Option<String>,
}

impl Score {
    /// Where it counts by its token.
    fn place(&self, routing: &Routing, registry: &VariantRegistry) -> Option<ScoredBucket> {
        routing.scored_elsewhere(self.token.as_ref()?, &self.request_id, registry)
    }
}

/// The answers that are remembered.
#[derive(Debug, Default)]
pub(crate) struct Feedback {
    answers: Mutex<Answers>,
}

#[derive(Debug, Default)]
struct Answers {
    by_id: HashMap<Arc<str>, RememberedAnswer>,
    /// The oldest first. An id that came again stands here twice; its entry has the number of the last time.
    order: VecDeque<Remembering>,
    next_number: u64,
    /// Every name of a metric that a score had.
    metrics: Vec<Arc<str>>,
}

#[derive(Debug)]
struct Remembering {
    number: u64,
    id: Arc<str>,
}

#[derive(Debug)]
struct RememberedAnswer {
    number: u64,
    /// A score comes too late once the series of the revision are over. None where another gateway answered.
    revision: Option<Weak<RevisionMetrics>>,
    /// Where scores count in the A/B test of the route.
    bucket: Option<ScoredBucket>,
    /// The metrics that it was scored in.
    scored: Vec<Arc<str>>,
}

impl Answers {
    fn insert(
        &mut self,
        request_id: &str,
        revision: Option<Weak<RevisionMetrics>>,
        bucket: Option<ScoredBucket>,
    ) {
        let id: Arc<str> = request_id.into();
        let number = self.next_number;
        self.next_number += 1;
        self.order.push_back(Remembering { number, id: Arc::clone(&id) });
        // A caller may have the whole answer, and score it with its token, before it counts as ended here.
        let by_token = self.by_id.remove(&*id).filter(|known| known.revision.is_none());
        let scored = by_token.map(|known| known.scored).unwrap_or_default();
        self.by_id.insert(id, RememberedAnswer { number, revision, bucket, scored });
        if self.order.len() > REMEMBERED_ANSWERS
            && let Some(oldest) = self.order.pop_front()
            && self.by_id.get(&oldest.id).is_some_and(|answer| answer.number == oldest.number)
        {
            self.by_id.remove(&oldest.id);
        }
    }
}

impl Feedback {
    fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An answer of this revision has ended well.
    pub(crate) fn remember(
        &self,
        request_id: &str,
        revision: &Arc<RevisionMetrics>,
        bucket: Option<ScoredBucket>,
    ) {
        self.answers().insert(request_id, Some(Arc::downgrade(revision)), bucket);
    }

    /// Counts a score that came with these headers. Gives what the caller is told. `elsewhere` finds where a
    /// score of another gateway's answer counts.
    ///
    /// # Errors
    /// The score or the metric is out of bounds, or no answer with this id to this user is remembered.
    fn count(
        &self,
        score: &Score,
        headers: &HeaderMap,
        elsewhere: impl FnOnce(&Score) -> Option<ScoredBucket>,
    ) -> Result<Value, GatewayError> {
        let by_token = score;
        let Score { request_id, score, metric, token: _ } = score;
        let malformed = |text: &str| GatewayError::Malformed(Echo::new(text));
        if !score.is_finite() || score.abs() > MAX_SCORE {
            return Err(malformed(&format!("score: expected a number from -{MAX_SCORE} to {MAX_SCORE}")));
        }
        let metric = metric.as_deref().unwrap_or(DEFAULT_METRIC);
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        if !(1..=MAX_METRIC_BYTES).contains(&metric.len()) || !metric.bytes().all(is_name) {
            let expected = format!("metric: expected 1 to {MAX_METRIC_BYTES} letters, digits and _");
            return Err(malformed(&expected));
        }
        let mut guard = self.answers();
        let answers = &mut *guard;
        let unknown = || GatewayError::UnknownRequest { id: Echo::new(request_id) };
        if !answers.by_id.contains_key(request_id.as_str())
            && let Some(bucket) = elsewhere(by_token)
        {
            answers.insert(request_id, None, Some(bucket));
        }
        let answer = answers.by_id.get_mut(request_id.as_str()).ok_or_else(unknown)?;
        // Another user is not told whether the id exists.
        if answer.bucket.as_ref().is_some_and(|bucket| !bucket.is_of_its_user(headers)) {
            return Err(unknown());
        }
        let revision = answer.revision.as_ref().map(|revision| revision.upgrade().ok_or_else(unknown));
        let revision = revision.transpose()?;
        let counted = !answer.scored.iter().any(|scored| &**scored == metric);
        if counted {
            if answer.scored.len() == METRICS_OF_ANSWER {
                let text = format!("metric: an answer is scored in at most {METRICS_OF_ANSWER} metrics");
                return Err(malformed(&text));
            }
            let known = answers.metrics.iter().find(|known| &***known == metric).cloned();
            // No caller can use up the names that count.
            let is_reserved = metric == DEFAULT_METRIC
                || answer.bucket.as_ref().is_some_and(|bucket| bucket.counts(metric));
            let name = match known {
                Some(name) => name,
                None if is_reserved || answers.metrics.len() < METRIC_NAMES => {
                    let name: Arc<str> = metric.into();
                    answers.metrics.push(Arc::clone(&name));
                    name
                }
                None => {
                    let known: Vec<&str> = answers.metrics.iter().map(|known| &**known).collect();
                    let text = format!("metric: use one of {}", known.join(", "));
                    return Err(malformed(&text));
                }
            };
            if let Some(revision) = &revision {
                revision.scored(&name, *score);
            }
            if let Some(bucket) = &answer.bucket {
                bucket.scored(&name, request_id, *score);
            }
            answer.scored.push(name);
        }
        let revision = revision.map(|revision| revision.revision.clone());
        Ok(json!({"request_id": request_id, "revision": revision, "counted": counted}))
    }
}

/// Counts the score of a request. Gives what the caller is told.
///
/// # Errors
/// As [`Feedback::count`], and a body that is too long, too slow, or no score.
pub(crate) async fn answer(gateway: &Gateway, request: Request<Incoming>) -> Result<Value, GatewayError> {
    let (head, body) = request.into_parts();
    let score = read(body).await?;
    let routing = gateway.routing();
    let elsewhere = |score: &Score| score.place(routing.as_deref()?, &gateway.metrics.variants);
    gateway.feedback.count(&score, &head.headers, elsewhere)
}

async fn read(body: Incoming) -> Result<Score, GatewayError> {
    let reading = Limited::new(body, BODY_BYTES).collect();
    let Ok(read) = timeout(BODY_TIMEOUT, reading).await else {
        return Err(GatewayError::BodyTimeout { limit: BODY_TIMEOUT });
    };
    let body = read.map_err(|error| {
        let too_long = error.downcast_ref::<http_body_util::LengthLimitError>().is_some();
        if too_long {
            GatewayError::TooLarge { limit_bytes: BODY_BYTES }
        } else {
            GatewayError::Malformed(Echo::new(&format!("it broke off: {error}")))
        }
    })?;
    serde_json::from_slice(&body.to_bytes()).map_err(|error| {
        let text = format!("expected {{\"request_id\", \"score\", \"metric\"?, \"token\"?}}: {error}");
        GatewayError::Malformed(Echo::new(&text))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;
    use crate::table::Version;
    use prometheus::Registry;
    use trustformers_proto::control::v1::FeedbackSum;

    fn metrics() -> (Metrics, Arc<RevisionMetrics>) {
        let metrics = Metrics::new(Registry::new()).unwrap();
        let version = Version { term: 1, counter: 1 };
        let series = metrics.in_force(version, [("d/a", "r1")].into_iter());
        (metrics, Arc::clone(&series[&("d/a".to_owned(), "r1".to_owned())]))
    }

    fn revision() -> (Feedback, Arc<RevisionMetrics>) {
        (Feedback::default(), metrics().1)
    }

    /// Counts a score without headers.
    fn count_score(feedback: &Feedback, score: &Score) -> Result<Value, GatewayError> {
        feedback.count(score, &HeaderMap::new(), |_| None)
    }

    fn score(id: &str, score: f64, metric: Option<&str>) -> Score {
        Score { request_id: id.to_owned(), score, metric: metric.map(str::to_owned), token: None }
    }

    #[test]
    fn a_score_counts_once_for_its_answer_and_metric() {
        let (feedback, (metrics, revision)) = (Feedback::default(), metrics());
        feedback.remember("id-1", &revision, None);
        for (metric, counted) in [(None, true), (None, false), (Some("tone"), true), (Some("score"), false)] {
            let told = count_score(&feedback, &score("id-1", 0.5, metric)).unwrap();
            assert_eq!((&told["counted"], &told["revision"]), (&counted.into(), &"r1".into()), "{metric:?}");
        }
        let reported = metrics.changed_counts(usize::MAX).counts.remove(0).feedback;
        let sum = |metric: &str| FeedbackSum { metric: metric.to_owned(), count: 1, sum: 0.5 };
        assert_eq!(reported, [sum("score"), sum("tone")]);
        let text = metrics.encode(None).unwrap();
        let line = r#"trustformers_gateway_feedback_total{metric="tone",revision="r1",route="d/a"} 1"#;
        assert!(text.contains(line), "{text}");
        assert_eq!(count_score(&feedback, &score("id-2", 1.0, None)).unwrap_err().kind(), "unknown_request");
        drop((metrics, revision));
        assert_eq!(
            count_score(&feedback, &score("id-1", 1.0, Some("late"))).unwrap_err().kind(),
            "unknown_request"
        );
    }

    #[test]
    fn a_score_by_token_that_overtakes_the_end_of_its_answer_counts_once() {
        let (feedback, revision) = revision();
        feedback.answers().insert("id-1", None, None);
        let told = |expected: bool| {
            let told = count_score(&feedback, &score("id-1", 0.5, None)).unwrap();
            assert_eq!(told["counted"], expected);
        };
        told(true);
        feedback.remember("id-1", &revision, None);
        told(false);
        // The same id at another request, whose caller chose it.
        feedback.remember("id-1", &revision, None);
        told(true);
    }

    #[test]
    fn scores_and_metrics_have_bounds() {
        let (feedback, revision) = revision();
        feedback.remember("id-1", &revision, None);
        for bad in [
            score("id-1", f64::NAN, None),
            score("id-1", 2e6, None),
            score("id-1", 1.0, Some("")),
            score("id-1", 1.0, Some("a b")),
            score("id-1", 1.0, Some(&"a".repeat(65))),
        ] {
            assert_eq!(count_score(&feedback, &bad).unwrap_err().kind(), "invalid_request", "{bad:?}");
        }
        for index in 0..METRIC_NAMES {
            let id = format!("id-{}", index / METRICS_OF_ANSWER);
            if index % METRICS_OF_ANSWER == 0 {
                feedback.remember(&id, &revision, None);
            }
            count_score(&feedback, &score(&id, 1.0, Some(&format!("m{index}")))).unwrap();
        }
        assert!(
            count_score(&feedback, &score("id-0", 1.0, Some("m9"))).is_err(),
            "an answer in more metrics"
        );
        feedback.remember("more", &revision, None);
        let error = count_score(&feedback, &score("more", 1.0, Some("new"))).unwrap_err();
        assert!(error.to_string().contains("m15"), "{error}");
        assert!(count_score(&feedback, &score("more", 1.0, Some("m3"))).is_ok());
        assert!(count_score(&feedback, &score("more", 1.0, None)).is_ok(), "the default has its place");
    }

    #[test]
    fn the_oldest_answers_are_forgotten_and_an_id_that_came_again_is_not() {
        let (feedback, revision) = revision();
        feedback.remember("twice", &revision, None);
        feedback.remember("once", &revision, None);
        for index in 0..REMEMBERED_ANSWERS - 2 {
            feedback.remember(&format!("id-{index}"), &revision, None);
        }
        feedback.remember("twice", &revision, None);
        assert!(count_score(&feedback, &score("twice", 1.0, None)).is_ok());
        assert!(count_score(&feedback, &score("once", 1.0, None)).is_ok());
        feedback.remember("new", &revision, None);
        assert!(count_score(&feedback, &score("once", 1.0, None)).is_err());
        assert!(count_score(&feedback, &score("twice", 1.0, None)).is_ok());
        assert_eq!(feedback.answers().by_id.len(), REMEMBERED_ANSWERS);
    }
}
