//! A share of a route's requests that another revision, or another model, answers as well. Its answers are
//! compared with those that the callers got, and thrown away.
//!
//! Nothing of this slows a caller: the request is sent to the shadow when the caller's answer has ended, by a
//! task of its own with a bounded queue. What finds the queue full is dropped and counted. The counts are
//! apart: a shadow's failures are no attempts, so that no rollout and no breaker is decided by them.
//!
//! Mirrored are short requests that have one answer or a stream; not sessions and WebSockets. At most 128 are
//! being answered and 64 wait, each with 64 KiB of a request and 256 KiB of an answer, and 4 are compared:
//! 62 MiB (`limits`).

mod compare;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use http_body_util::{BodyExt, Limited};
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry};
use strum::IntoStaticStr;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use trustformers_api::BlockingWork;
use trustformers_api::Priority;
use trustformers_api::priority::PRIORITY_HEADER;
use trustformers_api::revision::REVISION_HEADER;
use trustformers_api::surfaces::Kind;
use trustformers_telemetry::traces::Trace;

use crate::ab_test::VariantSeries;
use crate::call::{Call, CallBody};
use crate::gateway::Gateway;
use crate::headers::{ONLY_MODEL, name_routed};
use crate::metrics::{Protocol, RevisionMetrics};
use crate::routing::Routing;
use crate::wire::Wire;
use compare::{AnswerFormat, Comparison, compare};

/// Requests that are mirrored while their callers' answers pass, which may be slow.
const MIRRORED: usize = 128;
/// Requests whose answers wait to be compared.
const QUEUE: usize = 64;
/// Requests that are sent to other revisions at a time, of all routes.
const CONCURRENT: usize = 4;
/// Longer requests are not mirrored.
const MOST_REQUEST_BYTES: usize = 64 << 10;
/// Longer answers are not compared.
const MOST_ANSWER_BYTES: usize = 256 << 10;
/// What is held at worst: an answer for those that are being answered and those that wait, and one of either
/// revision for those that run.
pub(crate) const SHADOW_BYTES: usize = (MIRRORED + QUEUE) * (MOST_REQUEST_BYTES + MOST_ANSWER_BYTES)
    + CONCURRENT * (MOST_REQUEST_BYTES + 2 * MOST_ANSWER_BYTES);
/// A shadow that has not answered by then has failed.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Pairs of route and revision whose series are kept.
const MOST_SERIES: usize = 64;

/// Which requests of a route are mirrored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShadowRule {
    /// The route whose pods answer as well; empty: the route itself.
    pub route: String,
    /// The revision of that route; empty: by its shares.
    pub revision: String,
    /// Share of the requests, 1 to 100.
    pub percent: u32,
    /// Whether the answers are compared.
    pub compare: bool,
    /// The variant of the route's test that answers; empty where it is none.
    pub variant: String,
}

impl ShadowRule {
    /// The route that answers requests of a route.
    fn target<'a>(&'a self, route: &'a str) -> &'a str {
        if self.route.is_empty() { route } else { &self.route }
    }

    /// What answers, as metrics name it: a revision of the route, or another route.
    fn label(&self, route: &str) -> String {
        match (self.target(route) == route, self.revision.is_empty()) {
            (true, _) => self.revision.clone(),
            (false, true) => self.route.clone(),
            (false, false) => format!("{}:{}", self.route, self.revision),
        }
    }
}

/// What became of a mirrored request. Its text is the label's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub(crate) enum ShadowResult {
    /// Both revisions said the same.
    Same,
    /// They did not; how far apart is in the histogram.
    Different,
    /// The answers can't be compared.
    Incomparable,
    /// The shadow gave an answer, and nothing is compared.
    Answered,
    /// The shadow gave no answer of success in time.
    Failed,
    /// The queue was full, or too many were being answered.
    Dropped,
}

/// The queue of mirrored requests, and what is counted of them.
#[derive(Debug)]
pub(crate) struct Shadows {
    jobs: mpsc::Sender<Job>,
    /// Taken by the task that works on them.
    waiting: Mutex<Option<mpsc::Receiver<Job>>>,
    /// One for each request whose caller's answer passes.
    permits: Arc<Semaphore>,
    results: IntCounterVec,
    similarity: HistogramVec,
    /// The series that exist, the oldest first.
    series: Mutex<VecDeque<SeriesLabels>>,
    comparing: BlockingWork,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct SeriesLabels {
    route: String,
    revision: String,
}

/// A request that is mirrored, while its caller's answer passes.
#[derive(Debug)]
pub(crate) struct Mirrored {
    request: MirroredRequest,
    format: AnswerFormat,
    answer: BytesMut,
    /// Whether the shadow gets the request: not where the answers could not be compared.
    is_wanted: bool,
    shadows: Arc<Shadows>,
    _permit: OwnedSemaphorePermit,
}

/// A request as the shadow gets it.
#[derive(Debug)]
struct MirroredRequest {
    call: Call,
    rule: ShadowRule,
    target: ShadowTarget,
}

/// Where it is counted what became of a request.
#[derive(Debug)]
struct ShadowTarget {
    /// The route that was asked.
    route: String,
    /// What answers, as metrics name it.
    revision: String,
    /// The variant of the route's test that answers.
    variant: Option<Arc<VariantSeries>>,
}

/// A request and the answer that its caller got.
#[derive(Debug)]
struct Job {
    request: MirroredRequest,
    format: AnswerFormat,
    answer: Bytes,
}

impl Shadows {
    /// Nothing waits.
    ///
    /// # Errors
    /// When the registry has a collector of one of these names already.
    pub(crate) fn new(registry: &Registry) -> Result<Arc<Self>, prometheus::Error> {
        let results = Opts::new(
            "trustformers_gateway_shadow_total",
            "Requests that another revision or model answered as well, by what became of them.",
        );
        let similarity = HistogramOpts::new(
            "trustformers_gateway_shadow_similarity",
            "How alike differing answers are: texts by edit distance, vectors by cosine; 1 is equal.",
        )
        .buckets(vec![0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0]);
        let (jobs, waiting) = mpsc::channel(QUEUE);
        let shadows = Self {
            jobs,
            waiting: Mutex::new(Some(waiting)),
            permits: Arc::new(Semaphore::new(MIRRORED)),
            results: IntCounterVec::new(results, &["route", "revision", "result"])?,
            similarity: HistogramVec::new(similarity, &["route", "revision", "kind"])?,
            series: Mutex::default(),
            comparing: BlockingWork::new(1),
        };
        registry.register(Box::new(shadows.results.clone()))?;
        registry.register(Box::new(shadows.similarity.clone()))?;
        Ok(Arc::new(shadows))
    }

    /// Prepares a request for another revision, where the route at this index says so and its answer can be
    /// compared.
    pub(crate) fn mirror(self: &Arc<Self>, call: &Call, routing: &Routing, index: usize) -> Option<Mirrored> {
        let rule = routing.route(index).shadow.as_ref()?;
        let format = format_of(call)?;
        let CallBody::Whole(body) = &call.body else { return None };
        if body.len() > MOST_REQUEST_BYTES || call.headers.contains_key(REVISION_HEADER) {
            return None;
        }
        if !routing.takes_shadow(index, rule.percent) {
            return None;
        }
        let route = routing.route(index).name.clone();
        let (revision, variant) = (rule.label(&route), routing.shadow_series(index));
        let target = ShadowTarget { route, revision, variant };
        let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() else {
            self.count(&target, ShadowResult::Dropped);
            return None;
        };
        let call = Call {
            surface: call.surface,
            protocol: call.protocol,
            wire: call.wire,
            method: call.method.clone(),
            path: call.path.clone(),
            authority: call.authority.clone(),
            headers: headers_of_shadow(&call.headers, rule.target(&target.route) != target.route),
            body: CallBody::Whole(body.clone()),
            ready_at: Instant::now(),
            trace: Trace::default(),
        };
        let request = MirroredRequest { call, rule: rule.clone(), target };
        let (answer, shadows) = (BytesMut::new(), Arc::clone(self));
        Some(Mirrored { request, format, answer, is_wanted: true, shadows, _permit: permit })
    }

    fn count(&self, target: &ShadowTarget, result: ShadowResult) {
        let ShadowTarget { route, revision, variant } = target;
        self.keep_series(route, revision);
        self.results.with_label_values(&[route.as_str(), revision.as_str(), result.into()]).inc();
        if let Some(variant) = variant {
            variant.count_shadow(result);
        }
    }

    fn observe(&self, route: &str, revision: &str, comparison: Comparison) {
        let (kind, similarity) = match comparison {
            Comparison::Texts(similarity) => ("text", similarity),
            Comparison::Vectors(cosine) => ("embedding", cosine),
            Comparison::Same | Comparison::Unknown => return,
        };
        self.similarity.with_label_values(&[route, revision, kind]).observe(similarity);
    }

    /// Notes a series, and removes the oldest where there are too many.
    fn keep_series(&self, route: &str, revision: &str) {
        let mut series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        if series.iter().any(|labels| labels.route == route && labels.revision == revision) {
            return;
        }
        series.push_back(SeriesLabels { route: route.to_owned(), revision: revision.to_owned() });
        if series.len() <= MOST_SERIES {
            return;
        }
        let Some(SeriesLabels { route, revision }) = series.pop_front() else { return };
        for result in [
            ShadowResult::Same,
            ShadowResult::Different,
            ShadowResult::Incomparable,
            ShadowResult::Answered,
            ShadowResult::Failed,
            ShadowResult::Dropped,
        ] {
            // One that does not exist is no error.
            let _removed = self.results.remove_label_values(&[route.as_str(), &revision, result.into()]);
        }
        for kind in ["text", "embedding"] {
            let _removed = self.similarity.remove_label_values(&[route.as_str(), &revision, kind]);
        }
    }
}

/// The format of the answer to a request that can be mirrored.
fn format_of(call: &Call) -> Option<AnswerFormat> {
    let surface = call.surface;
    let one_answer = matches!(surface.kind, Kind::Unary | Kind::ServerStream | Kind::BodyDecides);
    match (call.wire, surface.name) {
        _ if !one_answer || !surface.idempotent || call.method != Method::POST => None,
        (Wire::Http, _) => Some(AnswerFormat::Json),
        (Wire::Grpc, "grpc_generate") => Some(AnswerFormat::Generated),
        (Wire::Grpc, "grpc_generate_stream") => Some(AnswerFormat::GeneratedStream),
        (Wire::Grpc, "grpc_embed") => Some(AnswerFormat::Embedded),
        _ => None,
    }
}

/// The pod answers it in plain bytes, and behind every other request. One of another model does not know the
/// name in the request.
fn headers_of_shadow(headers: &HeaderMap, is_other_model: bool) -> HeaderMap {
    let mut headers = headers.clone();
    name_routed(&mut headers, is_other_model.then_some(&ONLY_MODEL));
    headers.remove(ACCEPT_ENCODING);
    headers.remove("grpc-accept-encoding");
    let low = HeaderValue::from_static(Priority::Low.as_str());
    headers.insert(HeaderName::from_static(PRIORITY_HEADER), low);
    headers
}

impl Mirrored {
    /// The caller's answer begins with these headers, at a revision.
    pub(crate) fn head(&mut self, headers: &HeaderMap, metrics: &RevisionMetrics) {
        let kind = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
        let MirroredRequest { rule, target: ShadowTarget { route, .. }, .. } = &self.request;
        let is_plain = !headers.contains_key(CONTENT_ENCODING) || !rule.compare;
        // A revision is no shadow of itself.
        let is_other = rule.target(route) != route || metrics.revision != rule.revision;
        self.is_wanted = is_plain && is_other;
        if kind.starts_with(b"text/event-stream") {
            self.format = AnswerFormat::Events;
        }
    }

    /// These bytes of it have come.
    pub(crate) fn data(&mut self, bytes: &[u8]) {
        if !self.request.rule.compare {
            return;
        }
        if self.answer.len() + bytes.len() > MOST_ANSWER_BYTES {
            self.is_wanted = false;
        }
        if self.is_wanted {
            self.answer.extend_from_slice(bytes);
        } else {
            self.answer = BytesMut::new();
        }
    }

    /// It has ended well.
    pub(crate) fn ended(self) {
        let Self { request, format, answer, is_wanted, shadows, _permit } = self;
        if !is_wanted {
            return;
        }
        let job = Job { request, format, answer: answer.freeze() };
        if let Err(error) = shadows.jobs.try_send(job) {
            let Job { request, .. } = error.into_inner();
            shadows.count(&request.target, ShadowResult::Dropped);
        }
    }
}

/// Sends mirrored requests and compares their answers until `stop`.
pub(crate) async fn run(gateway: Arc<Gateway>, stop: CancellationToken) {
    let shadows = Arc::clone(&gateway.shadows);
    let waiting = shadows.waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(waiting) = waiting else { return };
    let working =
        ReceiverStream::new(waiting).for_each_concurrent(CONCURRENT, |job| work(Arc::clone(&gateway), job));
    let _stopped = stop.run_until_cancelled(working).await;
}

async fn work(gateway: Arc<Gateway>, job: Job) {
    let Job { request, format, answer } = job;
    let MirroredRequest { rule, target, .. } = &request;
    let shadows = &gateway.shadows;
    let Some(other) = timeout(ANSWER_TIMEOUT, answer_of_shadow(&gateway, &request)).await.ok().flatten()
    else {
        shadows.count(target, ShadowResult::Failed);
        return;
    };
    if !rule.compare {
        shadows.count(target, ShadowResult::Answered);
        return;
    }
    let compared = shadows.comparing.run(move || compare(format, &answer, &other)).await;
    let comparison = compared.unwrap_or(Comparison::Unknown);
    let result = match comparison {
        Comparison::Same => ShadowResult::Same,
        Comparison::Unknown => ShadowResult::Incomparable,
        Comparison::Texts(_) | Comparison::Vectors(_) => ShadowResult::Different,
    };
    shadows.observe(&target.route, &target.revision, comparison);
    shadows.count(target, result);
}

/// The answer of the shadow; none where it gives none of success. The attempt has no outcome, so that
/// it says nothing to the circuit breaker of its pod.
async fn answer_of_shadow(gateway: &Gateway, request: &MirroredRequest) -> Option<Bytes> {
    let routing = gateway.routing()?;
    let MirroredRequest { rule, target, .. } = request;
    let index = routing.table.find(rule.target(&target.route)).ok()?;
    let choice = if rule.revision.is_empty() {
        routing.choose_by_share(index, &request.call.headers)?
    } else {
        routing.choose_of(index, &rule.revision)?
    };
    let _in_flight = choice.enter();
    let endpoint = &choice.endpoint;
    let protocol = request.call.protocol;
    let address = match protocol {
        Protocol::Http => endpoint.spec.id.http,
        Protocol::Grpc => endpoint.spec.id.grpc,
    };
    let sent = endpoint
        .pool(protocol)
        .send(|| request.call.outgoing(address, &Trace::default(), &choice))
        .await
        .ok()?;
    let response = sent.response;
    if !response.status().is_success() || response.headers().contains_key("grpc-status") {
        return None;
    }
    let body = Limited::new(response.into_body(), MOST_ANSWER_BYTES).collect().await.ok()?;
    let failed =
        body.trailers().and_then(|trailers| trailers.get("grpc-status")).is_some_and(|code| code != "0");
    (!failed).then(|| body.to_bytes())
}
