//! Answers that the gateway gives from what it knows: health, the list of models, figures.

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Response, StatusCode};
use serde_json::{Value, json};
use trustformers_api::health::{Health, Verdict};

use crate::body::Body;
use crate::error::GatewayError;
use crate::gateway::Gateway;
use crate::metrics::Protocol;
use crate::table::Route;

/// A page of the gateway's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Page {
    /// 200 while the process runs.
    Live,
    /// 200 once a table has come.
    Startup,
    /// 200 while requests may be sent here.
    Ready,
    /// Models and their revisions.
    Models,
    /// Prometheus.
    Metrics,
}

impl Page {
    /// The page at a path.
    pub(crate) fn at(path: &str) -> Option<Self> {
        Some(match path {
            "/health/live" => Self::Live,
            "/health" | "/health/ready" => Self::Ready,
            "/health/startup" => Self::Startup,
            "/v1/models" => Self::Models,
            "/metrics" => Self::Metrics,
            _ => return None,
        })
    }
}

/// Answers a request for a page.
pub(crate) fn answer(gateway: &Gateway, page: Page) -> Response<Body> {
    match page {
        Page::Live => health(&gateway.liveness()),
        Page::Startup => health(&gateway.startup()),
        Page::Ready => health(&gateway.readiness().borrow()),
        Page::Models => models(gateway),
        Page::Metrics => metrics(gateway),
    }
}

fn health(verdict: &Verdict) -> Response<Body> {
    let (status, word) =
        if verdict.ok { (StatusCode::OK, "ok") } else { (StatusCode::SERVICE_UNAVAILABLE, "unavailable") };
    json_answer(status, &json!({"status": word, "message": verdict.message}))
}

/// OpenAI's list shape, with the revisions behind each name. Without a table nothing is known, which is not an empty list.
fn models(gateway: &Gateway) -> Response<Body> {
    let Some(routing) = gateway.routing() else { return GatewayError::NoTable.answer(Protocol::Http) };
    let data: Vec<Value> = routing.table.routes.iter().map(model).collect();
    json_answer(StatusCode::OK, &json!({"object": "list", "data": data}))
}

fn model(route: &Route) -> Value {
    let revisions: Vec<Value> = route
        .backends
        .iter()
        .map(|backend| {
            json!({
                "revision": backend.revision,
                "digest": backend.digest,
                "weight": backend.weight,
                "ready_endpoints": backend.endpoints.len(),
            })
        })
        .collect();
    json!({
        "id": route.name,
        "object": "model",
        "task": (!route.task.is_empty()).then_some(&route.task),
        "aliases": route.aliases,
        "ready_endpoints": route.endpoint_count(),
        "revisions": revisions,
    })
}

fn metrics(gateway: &Gateway) -> Response<Body> {
    let (status, text) = match gateway.metrics.encode(gateway.table_age()) {
        Ok(text) => (StatusCode::OK, text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    };
    of_kind(status, prometheus::TEXT_FORMAT, text)
}

fn json_answer(status: StatusCode, body: &Value) -> Response<Body> {
    of_kind(status, "application/json", body.to_string())
}

fn of_kind(status: StatusCode, kind: &'static str, text: String) -> Response<Body> {
    let mut response = Response::new(Body::local(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
