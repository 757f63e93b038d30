//! What the gateway counts.
//!
//! The series of a revision are looked up once, when a table that names it comes into force, and then only
//! incremented: a request costs no lookup. They outlive the table: a revision that left it keeps its series
//! for [`SERIES_KEPT`], and until its last request has ended and was reported. So nothing that was counted is
//! lost, and `/metrics` is as long as the table and the rollouts of an hour.

mod series;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};
use prost::Message;
use strum::IntoStaticStr;
use tokio::time::Instant;
use trustformers_proto::control::v1::{Outcome, RevisionCounts};

use crate::ab_test::VariantRegistry;
use crate::table::Version;

pub use series::RevisionMetrics;
use series::ScoreFamilies;

/// The series of a revision that no table names are kept for this long: longer than Prometheus needs to read
/// them once more, and than a rollout is likely to come back to its revision.
const SERIES_KEPT: Duration = Duration::from_secs(3600);

/// Upper ends of the latency buckets in seconds: from a cached classification to a long generation.
const BUCKETS_SECONDS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// The protocol of a caller. Its text is the label's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Protocol {
    /// JSON and server-sent events.
    Http,
    /// gRPC.
    Grpc,
}

impl Protocol {
    const ALL: [Self; 2] = [Self::Http, Self::Grpc];
}

/// How a request ended, as HTTP's status classes; gRPC's codes are mapped to them. Its text is the label's
/// value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr)]
pub enum CodeClass {
    /// Answered.
    #[strum(serialize = "2xx")]
    Success,
    /// The caller's mistake, or the model's queue was full.
    #[strum(serialize = "4xx")]
    Caller,
    /// A pod or the gateway failed.
    #[strum(serialize = "5xx")]
    Server,
    /// The caller disconnected before the end of the answer.
    #[strum(serialize = "cancelled")]
    Cancelled,
    /// The pod broke off after the answer had begun.
    #[strum(serialize = "broken")]
    Broken,
}

impl CodeClass {
    const ALL: [Self; 5] = [Self::Success, Self::Caller, Self::Server, Self::Cancelled, Self::Broken];

    /// The class of an outcome.
    #[must_use]
    pub fn of(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Ok => Self::Success,
            Outcome::CallerError | Outcome::Overloaded => Self::Caller,
            Outcome::Cancelled => Self::Cancelled,
            Outcome::ResetInStream => Self::Broken,
            Outcome::Unspecified
            | Outcome::PodError
            | Outcome::Unavailable
            | Outcome::ConnectFailed
            | Outcome::ResetBefore
            | Outcome::Timeout => Self::Server,
        }
    }
}

/// Why a request was sent to another endpoint. Its text is the label's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum RetryReason {
    /// The endpoint could not be connected to.
    Connect,
    /// The connection or stream ended before the head of an answer.
    Reset,
    /// The pod answered that it is unavailable.
    Unavailable,
    /// The pod's queue was full.
    Overloaded,
    /// The attempt's time passed without the head of an answer.
    Timeout,
    /// The endpoint had not answered for long, and goes on beside the other one.
    Hedge,
}

impl RetryReason {
    const ALL: [Self; 6] =
        [Self::Connect, Self::Reset, Self::Unavailable, Self::Overloaded, Self::Timeout, Self::Hedge];
}

/// The series of a revision, and whether a table still names it.
#[derive(Debug)]
struct RegisteredSeries {
    metrics: Arc<RevisionMetrics>,
    /// Since when no table names it.
    left: Option<Instant>,
}

impl RegisteredSeries {
    /// Whether nobody can miss it at `now`.
    fn is_over(&self, now: Instant) -> bool {
        self.left.is_some_and(|left| now.duration_since(left) >= SERIES_KEPT)
            // Requests that run hold it.
            && Arc::strong_count(&self.metrics) == 1
            && !self.metrics.sums.is_changed()
    }
}

/// Sums to report, and whether more of them wait.
#[derive(Debug)]
pub(crate) struct ChangedCounts {
    /// Whole series.
    pub(crate) counts: Vec<RevisionCounts>,
    /// Whether further series have changed.
    pub(crate) has_more: bool,
}

/// Every metric of the gateway.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    attempts: IntCounterVec,
    retries: IntCounterVec,
    in_flight: IntGaugeVec,
    connect_errors: IntCounterVec,
    duration: HistogramVec,
    first_byte: HistogramVec,
    first_token: HistogramVec,
    tokens: IntCounterVec,
    scores: ScoreFamilies,
    refused: IntCounterVec,
    table_term: IntGauge,
    table_counter: IntGauge,
    table_age: IntGauge,
    tables_refused: IntCounterVec,
    feed_connected: IntGauge,
    /// By route and revision.
    series: Mutex<SeriesTable>,
    /// What is counted of the variants of tests. It is only reported.
    pub(crate) variants: VariantRegistry,
}

/// All series.
#[derive(Debug, Default)]
struct SeriesTable {
    registered: HashMap<(String, String), RegisteredSeries>,
    /// The number of the next one.
    next_number: u64,
}

impl Metrics {
    /// Registers all metrics.
    ///
    /// # Errors
    /// When the registry has a collector of one of these names already.
    pub fn new(registry: Registry) -> Result<Self, prometheus::Error> {
        let of_revision = &["route", "revision"][..];
        let with = |label| vec!["route", "revision", label];
        let metrics = Self {
            requests: IntCounterVec::new(
                Opts::new("trustformers_gateway_requests_total", "Requests that ended, by outcome."),
                &["route", "revision", "protocol", "code"],
            )?,
            attempts: counters("trustformers_gateway_attempts_total", ATTEMPTS_HELP, &with("outcome"))?,
            retries: counters(
                "trustformers_gateway_retries_total",
                "Retries on another endpoint, by cause.",
                &with("reason"),
            )?,
            in_flight: IntGaugeVec::new(
                Opts::new("trustformers_gateway_in_flight", "Attempts on a pod that have not ended."),
                of_revision,
            )?,
            connect_errors: IntCounterVec::new(
                Opts::new("trustformers_gateway_connect_errors_total", "Failures to connect to a pod."),
                of_revision,
            )?,
            duration: histogram("trustformers_gateway_duration_seconds", "From a request to its end.")?,
            first_byte: histogram(
                "trustformers_gateway_first_byte_seconds",
                "From a request to the head of its answer, which a pod sends with the first token.",
            )?,
            first_token: histogram(
                "trustformers_gateway_first_token_seconds",
                "From an attempt to the first bytes of its stream.",
            )?,
            tokens: counters(
                "trustformers_gateway_tokens_total",
                "Tokens of the answers that tell them, by kind.",
                &with("kind"),
            )?,
            scores: ScoreFamilies::new()?,
            refused: counters(
                "trustformers_gateway_refused_total",
                "Requests refused before any attempt, by cause.",
                &["reason", "protocol"],
            )?,
            table_term: IntGauge::new("trustformers_gateway_table_term", "Term of the table in force.")?,
            table_counter: IntGauge::new(
                "trustformers_gateway_table_counter",
                "Counter of the table in force.",
            )?,
            table_age: IntGauge::new(
                "trustformers_gateway_table_age_seconds",
                "Time since the table in force was received.",
            )?,
            tables_refused: counters(
                "trustformers_gateway_tables_refused_total",
                "Routing tables that did not come into force, by cause.",
                &["reason"],
            )?,
            feed_connected: IntGauge::new(
                "trustformers_gateway_feed_connected",
                "1 while the operator's feed is open.",
            )?,
            series: Mutex::default(),
            variants: VariantRegistry::default(),
            registry,
        };
        metrics.register()?;
        Ok(metrics)
    }

    fn register(&self) -> Result<(), prometheus::Error> {
        let Self {
            registry,
            requests,
            attempts,
            retries,
            in_flight,
            connect_errors,
            duration,
            first_byte,
            first_token,
            tokens,
            scores,
            refused,
            table_term,
            table_counter,
            table_age,
            tables_refused,
            feed_connected,
            series: _,
            variants: _,
        } = self;
        let scored = &scores.count;
        let all = [requests, attempts, retries, connect_errors, tokens, scored, refused, tables_refused];
        for counters in all {
            registry.register(Box::new(counters.clone()))?;
        }
        registry.register(Box::new(scores.sum.clone()))?;
        for histograms in [duration, first_byte, first_token] {
            registry.register(Box::new(histograms.clone()))?;
        }
        for gauge in [table_term, table_counter, table_age, feed_connected] {
            registry.register(Box::new(gauge.clone()))?;
        }
        registry.register(Box::new(in_flight.clone()))
    }

    /// All metrics in Prometheus's text format.
    ///
    /// # Errors
    /// When a collector returns an invalid family.
    pub fn encode(
        &self,
        table_age: Option<Duration>,
    ) -> Result<String, trustformers_telemetry::metrics::MetricsError> {
        let age_seconds = table_age.unwrap_or_default().as_secs();
        self.table_age.set(i64::try_from(age_seconds).unwrap_or(i64::MAX));
        trustformers_telemetry::metrics::encode(&self.registry)
    }

    /// A table came into force that names these routes and revisions. Returns the series of each, and removes
    /// those that no table names for [`SERIES_KEPT`].
    pub fn in_force<'a>(
        &self,
        version: Version,
        revisions: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> HashMap<(String, String), Arc<RevisionMetrics>> {
        self.table_term.set(i64::try_from(version.term).unwrap_or(i64::MAX));
        self.table_counter.set(i64::try_from(version.counter).unwrap_or(i64::MAX));
        let mut table = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        let SeriesTable { registered, next_number } = &mut *table;
        let mut named = HashMap::new();
        for (route, revision) in revisions {
            let key = (route.to_owned(), revision.to_owned());
            let series = registered.entry(key.clone()).or_insert_with(|| {
                *next_number += 1;
                let metrics = Arc::new(RevisionMetrics::new(self, *next_number, route, revision));
                RegisteredSeries { metrics, left: None }
            });
            series.left = None;
            named.insert(key, Arc::clone(&series.metrics));
        }
        let now = Instant::now();
        registered.retain(|key, series| {
            if !named.contains_key(key) {
                series.left.get_or_insert(now);
            }
            let is_over = series.is_over(now);
            if is_over {
                series.metrics.remove_from(self);
            }
            !is_over
        });
        named
    }

    /// Every series is in the next reports.
    pub(crate) fn report_all(&self) {
        let table = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        for series in table.registered.values() {
            series.metrics.sums.set_changed();
        }
        drop(table);
        self.variants.report_all();
    }

    /// The series that have changed since they were reported, up to about `limit_bytes` of them.
    pub(crate) fn changed_counts(&self, limit_bytes: usize) -> ChangedCounts {
        let table = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changed = ChangedCounts { counts: Vec::new(), has_more: false };
        let mut bytes = 0;
        for series in table.registered.values() {
            if bytes >= limit_bytes {
                changed.has_more = true;
                break;
            }
            if let Some(counts) = series.metrics.take_changed() {
                bytes += counts.encoded_len();
                changed.counts.push(counts);
            }
        }
        changed
    }

    /// A request was refused before any attempt.
    pub fn refused(&self, reason: &str, protocol: Protocol) {
        self.refused.with_label_values(&[reason, protocol.into()]).inc();
    }

    /// A table did not come into force.
    pub fn table_refused(&self, reason: &str) {
        self.tables_refused.with_label_values(&[reason]).inc();
    }

    /// Whether the operator's feed is open.
    pub fn feed_connected(&self, connected: bool) {
        self.feed_connected.set(i64::from(connected));
    }
}

const ATTEMPTS_HELP: &str =
    "Attempts on pods that ended, by outcome; a request that was retried has several.";

fn counters(name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, prometheus::Error> {
    IntCounterVec::new(Opts::new(name, help), labels)
}

fn histogram(name: &str, help: &str) -> Result<HistogramVec, prometheus::Error> {
    let opts = HistogramOpts::new(name, help).buckets(BUCKETS_SECONDS.to_vec());
    HistogramVec::new(opts, &["route", "revision"])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(counter: u64) -> Version {
        Version { term: 1, counter }
    }

    #[test]
    fn counts_appear_with_their_labels() {
        let metrics = Metrics::new(Registry::new()).unwrap();
        let series = metrics.in_force(version(7), [("default/a", "r1")].into_iter());
        let series = &series[&("default/a".to_owned(), "r1".to_owned())];
        series.ended(Protocol::Grpc, Outcome::PodError, Duration::from_millis(3));
        series.attempt_began();
        series.attempt_ended(Outcome::ResetBefore);
        series.retried(RetryReason::Connect);
        let text = metrics.encode(Some(Duration::from_secs(9))).unwrap();
        for line in [
            r#"trustformers_gateway_requests_total{code="5xx",protocol="grpc",revision="r1",route="default/a"} 1"#,
            r#"trustformers_gateway_attempts_total{outcome="reset_before",revision="r1",route="default/a"} 1"#,
            r#"trustformers_gateway_retries_total{reason="connect",revision="r1",route="default/a"} 1"#,
            r#"trustformers_gateway_duration_seconds_count{revision="r1",route="default/a"} 1"#,
            "trustformers_gateway_table_counter 7",
            "trustformers_gateway_table_age_seconds 9",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
    }

    fn only_series(metrics: &Metrics, counter: u64, revisions: &[&str]) -> Arc<RevisionMetrics> {
        let named = revisions.iter().map(|revision| ("default/a", *revision));
        let mut series = metrics.in_force(version(counter), named);
        series.remove(&("default/a".to_owned(), revisions[0].to_owned())).unwrap()
    }

    fn reported(metrics: &Metrics) -> Vec<(String, u64, u64)> {
        let counts = metrics.changed_counts(usize::MAX).counts.into_iter();
        let mut reported: Vec<_> =
            counts.map(|counts| (counts.revision, counts.series, counts.attempts)).collect();
        reported.sort();
        reported
    }

    #[tokio::test(start_paused = true)]
    async fn series_outlive_their_table_until_nobody_can_miss_them() {
        let metrics = Metrics::new(Registry::new()).unwrap();
        let has = |revision: &str| metrics.encode(None).unwrap().contains(&format!("\"{revision}\""));
        let r1 = only_series(&metrics, 1, &["r1", "r2"]);
        r1.attempt_began();
        // It leaves the table while a request runs, and comes back with its counts.
        let r2 = only_series(&metrics, 2, &["r2"]);
        let again = only_series(&metrics, 3, &["r1", "r2"]);
        assert!(Arc::ptr_eq(&r1, &again));
        again.attempt_ended(Outcome::Ok);
        assert_eq!(reported(&metrics), [("r1".to_owned(), 1, 1)]);
        drop(again);
        only_series(&metrics, 4, &["r2"]);
        tokio::time::advance(SERIES_KEPT).await;
        r1.attempt_began();
        r1.attempt_ended(Outcome::Ok);
        only_series(&metrics, 5, &["r2"]);
        assert!(has("r1"), "a request holds it");
        drop(r1);
        only_series(&metrics, 6, &["r2"]);
        assert!(has("r1"), "it is not reported");
        assert_eq!(reported(&metrics), [("r1".to_owned(), 1, 2)]);
        drop(r2);
        only_series(&metrics, 7, &["r2"]);
        assert!(!has("r1") && has("r2"));
        // What begins anew has another number.
        only_series(&metrics, 8, &["r1"]).attempt_began();
        assert_eq!(reported(&metrics), [("r1".to_owned(), 3, 1)]);
    }

    #[test]
    fn reports_are_cut_and_lose_nothing() {
        let metrics = Metrics::new(Registry::new()).unwrap();
        let names: Vec<String> = (0..50).map(|index| format!("r{index:02}")).collect();
        let revisions = names.iter().map(|name| ("default/a", name.as_str()));
        let series = metrics.in_force(version(1), revisions);
        assert!(reported(&metrics).is_empty());
        metrics.report_all();
        let (mut found, mut reports) = (Vec::new(), 0);
        loop {
            let changed = metrics.changed_counts(100);
            reports += 1;
            found.extend(changed.counts.into_iter().map(|counts| counts.revision));
            if !changed.has_more {
                break;
            }
        }
        found.sort();
        assert_eq!(found, names);
        assert!(reports > 5, "{reports}");
        series[&("default/a".to_owned(), "r07".to_owned())].scored(&"tone".into(), 0.5);
        let changed = metrics.changed_counts(100).counts;
        assert_eq!(
            (changed.len(), changed[0].revision.as_str(), changed[0].feedback[0].count),
            (1, "r07", 1)
        );
    }

    #[test]
    fn every_label_has_its_own_counter() {
        for (index, code) in CodeClass::ALL.into_iter().enumerate() {
            assert_eq!(code as usize, index);
        }
        for (index, reason) in RetryReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, index);
        }
    }
}
