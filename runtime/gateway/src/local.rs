//! Answers that the gateway gives from its own state: health, the list of models, metrics.

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Response, StatusCode};
use serde_json::{Value, json};
use trustformers_api::health::{Health, Verdict};

use crate::body::Body;
use crate::error::GatewayError;
use crate::gateway::Gateway;
use crate::limits::{CallerLimits, Resource};
use crate::table::Route;

/// A path that the gateway answers itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LocalEndpoint {
    /// 200 while the process runs.
    Live,
    /// 200 once a table has arrived.
    Startup,
    /// 200 while requests may be sent here.
    Ready,
    /// Models and their revisions.
    Models,
    /// Prometheus.
    Metrics,
}

impl LocalEndpoint {
    /// The endpoint at a path.
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

    /// Whether it is answered on a connection beyond the bound too: the answer is short, or monitoring needs
    /// it.
    pub(crate) fn is_probe(self) -> bool {
        self != Self::Models
    }
}

/// Answers a request for an endpoint.
///
/// # Errors
/// There is no table, or too many lists are being read.
pub(crate) fn answer(
    gateway: &Gateway,
    endpoint: LocalEndpoint,
    limits: &CallerLimits,
) -> Result<Response<Body>, GatewayError> {
    // The long answers have a bound, since slow readers keep them in memory.
    let share = || limits.reserve(Resource::Listings, 1).map_err(GatewayError::Overloaded);
    Ok(match endpoint {
        LocalEndpoint::Live => health(&gateway.liveness()),
        LocalEndpoint::Startup => health(&gateway.startup()),
        LocalEndpoint::Ready => health(&gateway.readiness().borrow()),
        LocalEndpoint::Models => {
            let share = share()?;
            models(gateway)?.map(|body| body.with_share(share))
        }
        LocalEndpoint::Metrics => {
            let share = share()?;
            metrics(gateway).map(|body| body.with_share(share))
        }
    })
}

fn health(verdict: &Verdict) -> Response<Body> {
    let (status, word) =
        if verdict.ok { (StatusCode::OK, "ok") } else { (StatusCode::SERVICE_UNAVAILABLE, "unavailable") };
    let body = json!({"status": word, "message": verdict.message}).to_string();
    with_content_type(status, "application/json", body.into())
}

/// OpenAI's list shape, with the revisions behind each name. Without a table the list is unknown, which is an
/// error and not an empty list.
fn models(gateway: &Gateway) -> Result<Response<Body>, GatewayError> {
    let routing = gateway.routing().ok_or(GatewayError::NoTable)?;
    let list = routing.models_json.get_or_init(|| {
        let data: Vec<Value> = routing.table.routes.iter().map(model).collect();
        json!({"object": "list", "data": data}).to_string().into()
    });
    Ok(with_content_type(StatusCode::OK, "application/json", list.clone()))
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
        "task": route.task,
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
    with_content_type(status, prometheus::TEXT_FORMAT, text.into())
}

fn with_content_type(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<Body> {
    let mut response = Response::new(Body::local(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
