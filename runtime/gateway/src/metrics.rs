//! What the gateway counts.
//!
//! The series of a revision are looked up once, when a table that names it comes into force, and then only
//! incremented: a request costs no lookup. When a revision leaves the table, its series are removed, so that
//! `/metrics` stays as small as the table, no matter how many rollouts a gateway sees.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

use strum::IntoStaticStr;

use crate::table::Version;

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

    /// The class of an HTTP status.
    #[must_use]
    pub fn of_http(status: http::StatusCode) -> Self {
        if status.is_server_error() {
            Self::Server
        } else if status.is_client_error() {
            Self::Caller
        } else {
            Self::Success
        }
    }

    /// The class of a gRPC status code: that of HTTP's status for the same cause.
    #[must_use]
    pub fn of_grpc(code: tonic::Code) -> Self {
        use tonic::Code;
        match code {
            Code::Ok => Self::Success,
            Code::Cancelled => Self::Cancelled,
            Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::ResourceExhausted
            | Code::FailedPrecondition
            | Code::Aborted
            | Code::OutOfRange
            | Code::Unauthenticated => Self::Caller,
            Code::Unknown | Code::DeadlineExceeded | Code::Unimplemented | Code::Internal => Self::Server,
            Code::Unavailable | Code::DataLoss => Self::Server,
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
}

impl RetryReason {
    const ALL: [Self; 4] = [Self::Connect, Self::Reset, Self::Unavailable, Self::Overloaded];
}

/// The series of one revision of one route.
#[derive(Debug)]
pub struct RevisionMetrics {
    /// The route's name.
    pub route: String,
    /// The revision.
    pub revision: String,
    requests: [[IntCounter; 5]; 2],
    retries: [IntCounter; 4],
    in_flight: IntGauge,
    connect_errors: IntCounter,
    duration: Histogram,
    first_byte: Histogram,
}

impl RevisionMetrics {
    /// A request of this revision ended.
    pub fn ended(&self, protocol: Protocol, code: CodeClass, duration: Duration) {
        self.requests[protocol as usize][code as usize].inc();
        self.duration.observe(duration.as_secs_f64());
    }

    /// The head of an answer came this long behind its request.
    pub fn first_byte(&self, duration: Duration) {
        self.first_byte.observe(duration.as_secs_f64());
    }

    /// A request of this revision is retried on another endpoint.
    pub fn retried(&self, reason: RetryReason) {
        self.retries[reason as usize].inc();
    }

    /// An endpoint of this revision could not be connected to.
    pub fn connect_failed(&self) {
        self.connect_errors.inc();
    }

    /// The gauge of requests in flight.
    #[must_use]
    pub fn in_flight(&self) -> &IntGauge {
        &self.in_flight
    }
}

/// Every metric of the gateway.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    retries: IntCounterVec,
    in_flight: IntGaugeVec,
    connect_errors: IntCounterVec,
    duration: HistogramVec,
    first_byte: HistogramVec,
    refused: IntCounterVec,
    table_term: IntGauge,
    table_counter: IntGauge,
    table_age: IntGauge,
    tables_refused: IntCounterVec,
    feed_connected: IntGauge,
    /// The series of the table in force, by route and revision.
    series: Mutex<HashMap<(String, String), Arc<RevisionMetrics>>>,
}

impl Metrics {
    /// Registers all metrics.
    ///
    /// # Errors
    /// When the registry has a collector of one of these names already.
    pub fn new(registry: Registry) -> Result<Self, prometheus::Error> {
        let of_revision = &["route", "revision"][..];
        let metrics = Self {
            requests: IntCounterVec::new(
                Opts::new("trustformers_gateway_requests_total", "Requests that ended, by outcome."),
                &["route", "revision", "protocol", "code"],
            )?,
            retries: IntCounterVec::new(
                Opts::new("trustformers_gateway_retries_total", "Retries on another endpoint, by cause."),
                &["route", "revision", "reason"],
            )?,
            in_flight: IntGaugeVec::new(
                Opts::new("trustformers_gateway_in_flight", "Requests sent to a pod that have not ended."),
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
            refused: IntCounterVec::new(
                Opts::new(
                    "trustformers_gateway_refused_total",
                    "Requests refused before any attempt, by cause.",
                ),
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
            tables_refused: IntCounterVec::new(
                Opts::new(
                    "trustformers_gateway_tables_refused_total",
                    "Routing tables that did not come into force, by cause.",
                ),
                &["reason"],
            )?,
            feed_connected: IntGauge::new(
                "trustformers_gateway_feed_connected",
                "1 while the operator's feed is open.",
            )?,
            series: Mutex::default(),
            registry,
        };
        metrics.register()?;
        Ok(metrics)
    }

    fn register(&self) -> Result<(), prometheus::Error> {
        let Self {
            registry,
            requests,
            retries,
            in_flight,
            connect_errors,
            duration,
            first_byte,
            refused,
            table_term,
            table_counter,
            table_age,
            tables_refused,
            feed_connected,
            series: _,
        } = self;
        for counters in [requests, retries, connect_errors, refused, tables_refused] {
            registry.register(Box::new(counters.clone()))?;
        }
        for histograms in [duration, first_byte] {
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
    /// those of every other.
    pub fn in_force<'a>(
        &self,
        version: Version,
        revisions: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> HashMap<(String, String), Arc<RevisionMetrics>> {
        self.table_term.set(i64::try_from(version.term).unwrap_or(i64::MAX));
        self.table_counter.set(i64::try_from(version.counter).unwrap_or(i64::MAX));
        let mut registered = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        let mut named = HashMap::new();
        for (route, revision) in revisions {
            let key = (route.to_owned(), revision.to_owned());
            let series =
                registered.remove(&key).unwrap_or_else(|| Arc::new(self.new_series(route, revision)));
            // Two backends of one route may share a revision; both then use the one entry.
            named.entry(key).or_insert(series);
        }
        for (route, revision) in registered.keys() {
            self.remove_series(route, revision);
        }
        registered.clone_from(&named);
        named
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

    fn new_series(&self, route: &str, revision: &str) -> RevisionMetrics {
        let of_revision = &[route, revision];
        RevisionMetrics {
            route: route.to_owned(),
            revision: revision.to_owned(),
            requests: Protocol::ALL.map(|protocol| {
                CodeClass::ALL.map(|code| {
                    self.requests.with_label_values(&[route, revision, protocol.into(), code.into()])
                })
            }),
            retries: RetryReason::ALL
                .map(|reason| self.retries.with_label_values(&[route, revision, reason.into()])),
            in_flight: self.in_flight.with_label_values(of_revision),
            connect_errors: self.connect_errors.with_label_values(of_revision),
            duration: self.duration.with_label_values(of_revision),
            first_byte: self.first_byte.with_label_values(of_revision),
        }
    }

    /// A series that does not exist is not an error, since the result is the same.
    fn remove_series(&self, route: &str, revision: &str) {
        let of_revision = &[route, revision];
        for protocol in Protocol::ALL {
            for code in CodeClass::ALL {
                let labels = &[route, revision, protocol.into(), code.into()];
                let _removed = self.requests.remove_label_values(labels);
            }
        }
        for reason in RetryReason::ALL {
            let _removed = self.retries.remove_label_values(&[route, revision, reason.into()]);
        }
        let _removed = self.in_flight.remove_label_values(of_revision);
        let _removed = self.connect_errors.remove_label_values(of_revision);
        let _removed = self.duration.remove_label_values(of_revision);
        let _removed = self.first_byte.remove_label_values(of_revision);
    }
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
        series.ended(Protocol::Grpc, CodeClass::Server, Duration::from_millis(3));
        series.retried(RetryReason::Connect);
        let text = metrics.encode(Some(Duration::from_secs(9))).unwrap();
        for line in [
            r#"trustformers_gateway_requests_total{code="5xx",protocol="grpc",revision="r1",route="default/a"} 1"#,
            r#"trustformers_gateway_retries_total{reason="connect",revision="r1",route="default/a"} 1"#,
            r#"trustformers_gateway_duration_seconds_count{revision="r1",route="default/a"} 1"#,
            "trustformers_gateway_table_counter 7",
            "trustformers_gateway_table_age_seconds 9",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
    }

    #[test]
    fn only_the_series_of_removed_revisions_disappear() {
        let metrics = Metrics::new(Registry::new()).unwrap();
        let both = [("default/a", "r1"), ("default/a", "r2")];
        let first = metrics.in_force(version(1), both.into_iter());
        for series in first.values() {
            series.ended(Protocol::Http, CodeClass::Success, Duration::from_millis(1));
        }
        let second = metrics.in_force(version(2), both[1..].iter().copied());
        second[&("default/a".to_owned(), "r2".to_owned())].ended(
            Protocol::Http,
            CodeClass::Success,
            Duration::from_millis(1),
        );
        let text = metrics.encode(None).unwrap();
        assert!(!text.contains("\"r1\""), "{text}");
        assert!(text.contains(r#"code="2xx",protocol="http",revision="r2",route="default/a"} 2"#), "{text}");
    }

    #[test]
    fn every_label_has_its_own_counter() {
        for (index, code) in CodeClass::ALL.into_iter().enumerate() {
            assert_eq!(code as usize, index);
        }
        for (index, reason) in RetryReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, index);
        }
        assert_eq!(CodeClass::of_http(http::StatusCode::TOO_MANY_REQUESTS), CodeClass::Caller);
        assert_eq!(CodeClass::of_grpc(tonic::Code::ResourceExhausted), CodeClass::Caller);
    }
}
