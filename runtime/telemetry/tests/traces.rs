//! Spans as a collector gets them: over each protocol, sampled or not, across services, and from a router.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod collector;

use axum::Router;
use axum::body::Body;
use axum::routing::{get, post};
use collector::Collector;
use http::{HeaderMap, HeaderValue, Request, StatusCode};
use http_body_util::BodyExt;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use tokio_stream::StreamExt;
use tower::ServiceExt;
use trustformers_telemetry::traces::{Destination, Trace, TraceOptions, Traces};

/// A caller's trace; its last digits say whether it is sampled.
const CALLER: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const UNSAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319d-b7ad6b7169203331-00";

fn traces(destination: Destination) -> Traces {
    Traces::start(&TraceOptions::new("tested", destination)).unwrap()
}

fn grpc(collector: &Collector) -> Destination {
    Destination::OtlpGrpc(format!("http://{}", collector.address))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test]
async fn spans_arrive_by_both_kinds_of_otlp_with_their_parents() {
    let collector = Collector::start().await;
    let http = Destination::OtlpHttp(format!("http://{}/v1/traces", collector.address));
    for (destination, name) in [(grpc(&collector), "by grpc"), (http, "by http")] {
        let traces = traces(destination);
        let span = traces.root(name);
        let part = span.child("part");
        part.event("step", [("rows", 3)]);
        part.fail("broken");
        drop((part, span));
        traces.shutdown().await;
        let arrived =
            collector.until(|arrived| arrived.spans.iter().any(|each| each.span.name == name)).await;
        let whole = arrived.named(name);
        let part = arrived.spans.iter().find(|each| each.is_child_of(whole)).unwrap();
        assert_eq!((whole.service.as_str(), part.span.name.as_str()), ("tested", "part"));
        assert!(whole.span.parent_span_id.is_empty());
        assert_eq!(part.span.events[0].name, "step");
        assert_eq!(part.attribute("error.type").as_deref(), Some("broken"));
    }
}

#[tokio::test]
async fn zipkin_gets_its_own_json() {
    let collector = Collector::start().await;
    let traces = traces(Destination::Zipkin(format!("http://{}/api/v2/spans", collector.address)));
    let span = traces.root("whole");
    let call = span.call("call");
    call.set("answer", 42_i64);
    drop((call, span));
    traces.shutdown().await;
    let spans = collector.until(|arrived| arrived.zipkin.len() == 2).await.zipkin;
    let named = |name: &str| spans.iter().find(|span| span["name"] == name).unwrap();
    let (whole, call) = (named("whole"), named("call"));
    assert_eq!((&call["parentId"], &call["traceId"]), (&whole["id"], &whole["traceId"]));
    assert_eq!((&call["kind"], &call["tags"]["answer"]), (&"CLIENT".into(), &"42".into()));
    assert_eq!(whole["localEndpoint"]["serviceName"], "tested");
    assert!(whole.get("parentId").is_none() && whole["duration"].as_u64().unwrap() > 0);
}

fn headers(traceparent: &'static str) -> HeaderMap {
    let mut headers = HeaderMap::from_iter([(
        http::HeaderName::from_static("traceparent"),
        HeaderValue::from_static(traceparent),
    )]);
    headers.insert("baggage", HeaderValue::from_static("team=red,secret=1"));
    headers
}

#[tokio::test]
async fn a_request_is_a_part_of_its_callers_trace_and_follows_its_decision() {
    let collector = Collector::start().await;
    let options = TraceOptions {
        // Callers that have decided are followed all the same.
        sampling_ratio: 0.0,
        baggage_keys: vec!["team".to_owned()],
        ..TraceOptions::new("tested", grpc(&collector))
    };
    let traces = Traces::start(&options).unwrap();
    let span = traces.request(&headers(CALLER), "sampled");
    assert!(span.is_recorded());
    let call = span.call("call");
    let mut onward = headers(CALLER);
    call.inject(&mut onward);
    let unsampled = traces.request(&headers(UNSAMPLED), "unsampled");
    assert!(!unsampled.is_recorded() && !unsampled.child("part").is_recorded());
    let mut as_decided = HeaderMap::new();
    unsampled.inject(&mut as_decided);
    // A state that is longer than anybody has to keep is not kept.
    for (state, kept) in [("vendor=1".to_owned(), true), (format!("vendor={}", "1".repeat(600)), false)] {
        let mut caller = headers(UNSAMPLED);
        caller.insert("tracestate", state.parse().unwrap());
        let mut onward = HeaderMap::new();
        traces.request(&caller, "stated").inject(&mut onward);
        assert_eq!(onward.get("tracestate").is_some_and(|value| value == state.as_str()), kept, "{onward:?}");
    }
    let undecided = traces.request(&HeaderMap::new(), "undecided");
    assert!(!undecided.is_recorded());
    drop((call, span, unsampled, undecided));
    traces.shutdown().await;
    let arrived = collector.until(|arrived| arrived.spans.len() == 2).await;
    let (sampled, call) = (arrived.named("sampled"), arrived.named("call"));
    assert_eq!(hex(&sampled.span.trace_id), "0af7651916cd43dd8448eb211c80319c");
    assert_eq!(hex(&sampled.span.parent_span_id), "b7ad6b7169203331");
    assert_eq!((sampled.span.kind(), call.span.kind()), (SpanKind::Server, SpanKind::Client));
    assert_eq!(sampled.attribute("baggage.team").as_deref(), Some("red"));
    assert_eq!(sampled.attribute("baggage.secret"), None);
    let expected = format!("00-0af7651916cd43dd8448eb211c80319c-{}-01", hex(&call.span.span_id));
    assert_eq!(onward["traceparent"], expected);
    assert_eq!(onward["baggage"], "team=red,secret=1");
    let as_decided = as_decided["traceparent"].to_str().unwrap();
    assert!(as_decided.starts_with("00-0af7651916cd43dd8448eb211c80319d-") && as_decided.ends_with("-00"));
}

/// A body that is made after the head, and still belongs to the request.
async fn frames() -> Body {
    Body::from_stream(tokio_stream::iter(0..2).map(|number: i32| {
        let _frame = Trace::current().child("frame");
        Ok::<_, std::io::Error>(number.to_string())
    }))
}

#[tokio::test]
async fn a_router_makes_one_span_of_each_request_and_none_of_probes() {
    let collector = Collector::start().await;
    let traces = traces(grpc(&collector));
    let router = Router::new()
        .route(
            "/v1/models/{model}",
            get(async || Trace::current().child("handled").is_recorded().to_string()),
        )
        .route("/stream", post(frames))
        .route("/broken", get(async || StatusCode::INTERNAL_SERVER_ERROR))
        .route("/health/live", get(async || "ok"));
    let router = traces.router(router);
    for (method, path) in [
        ("GET", "/v1/models/a"),
        ("POST", "/stream"),
        ("GET", "/broken"),
        ("GET", "/health/live"),
        ("GET", "/no"),
    ] {
        let request = Request::builder().method(method).uri(path).body(Body::empty()).unwrap();
        router.clone().oneshot(request).await.unwrap().into_body().collect().await.unwrap();
    }
    traces.shutdown().await;
    let arrived = collector.until(|arrived| arrived.spans.len() == 7).await;
    let models = arrived.named("GET /v1/models/{model}");
    assert_eq!(models.attribute("http.response.status_code").as_deref(), Some("200"));
    assert!(arrived.named("handled").is_child_of(models));
    let stream = arrived.named("POST /stream");
    let frames = arrived.spans.iter().filter(|each| each.span.name == "frame");
    assert_eq!(frames.filter(|frame| frame.is_child_of(stream)).count(), 2);
    assert_eq!(arrived.named("GET /broken").attribute("error.type").as_deref(), Some("500"));
    let unknown = arrived.named("GET (unknown)");
    assert_eq!(unknown.attribute("http.response.status_code").as_deref(), Some("404"));
}

#[tokio::test]
async fn where_traces_are_off_nothing_is_made_and_no_header_is_touched() {
    let span = Traces::off().request(&headers(CALLER), "a");
    let part = span.child("b");
    let mut onward = headers(CALLER);
    part.inject(&mut onward);
    assert_eq!((onward, span.is_recorded()), (headers(CALLER), false));
    assert!(!Trace::current().is_recorded());
    Traces::off().shutdown().await;
    let wrong =
        TraceOptions { sampling_ratio: 1.5, ..TraceOptions::new("a", Destination::otlp("c").unwrap()) };
    assert!(Traces::start(&wrong).unwrap_err().to_string().contains("1.5"));
}

#[tokio::test]
async fn a_collector_that_is_away_delays_nothing() {
    // A port on which nothing listens.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let traces = traces(Destination::OtlpGrpc(format!("http://{address}")));
    for _ in 0..10_000 {
        drop(traces.root("lost"));
    }
    traces.shutdown().await;
}
