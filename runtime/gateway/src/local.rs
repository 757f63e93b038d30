//! Answers that the gateway gives from its own state: health, the models, metrics.

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Response, StatusCode};
use serde_json::{Value, json};
use trustformers_api::health::{Health, Verdict};

use crate::body::Body;
use crate::error::{Echo, GatewayError};
use crate::gateway::Gateway;
use crate::limits::{CallerLimits, Resource};
use crate::models;
use crate::table::Unknown;

/// What the gateway answers itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum LocalEndpoint {
    /// 200 while the process runs.
    Live,
    /// 200 once a table has arrived.
    Startup,
    /// 200 while requests may be sent here.
    Ready,
    /// Models and their revisions.
    Models,
    /// One of them, by any of its names.
    Model(String),
    /// Prometheus.
    Metrics,
}

impl LocalEndpoint {
    /// What the gateway answers for a row of the table of surfaces.
    pub(crate) fn of_surface(name: &str) -> Option<Self> {
        Some(match name {
            "health_live" => Self::Live,
            "health" | "health_ready" => Self::Ready,
            "health_startup" => Self::Startup,
            "list_models" => Self::Models,
            _ => return None,
        })
    }

    /// Whether it is answered on a connection beyond the bound too: the answer is short, or monitoring needs
    /// it.
    pub(crate) fn is_probe(&self) -> bool {
        !matches!(self, Self::Models | Self::Model(_))
    }
}

/// Answers a request for an endpoint.
///
/// # Errors
/// There is no table, no such model, or too many lists are being read.
pub(crate) fn answer(
    gateway: &Gateway,
    endpoint: &LocalEndpoint,
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
            list(gateway)?.map(|body| body.with_share(share))
        }
        LocalEndpoint::Model(name) => json_answer(&model(gateway, name)?),
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

/// Without a table the list is unknown, which is an error and not an empty list.
fn list(gateway: &Gateway) -> Result<Response<Body>, GatewayError> {
    let routing = gateway.routing().ok_or(GatewayError::NoTable)?;
    let list = routing.models_json.get_or_init(|| {
        models::json_of_table(&routing.table, &gateway.watch_models().borrow()).to_string().into()
    });
    Ok(with_content_type(StatusCode::OK, "application/json", list.clone()))
}

fn model(gateway: &Gateway, name: &str) -> Result<Value, GatewayError> {
    let routing = gateway.routing().ok_or(GatewayError::NoTable)?;
    let found = routing.table.find(name).map_err(|Unknown| {
        let model = Echo::new(name);
        if gateway.is_current() {
            GatewayError::UnknownModel { model, choices: routing.table.choices() }
        } else {
            GatewayError::UnknownWhileDisconnected { model }
        }
    });
    let statuses = gateway.watch_models().borrow().clone();
    let route = routing.route(found?);
    Ok(match routing.table.adapter(name) {
        Some((route, adapter)) => models::json_of_adapter(route, adapter, &statuses),
        None => models::json_of_route(route, &statuses),
    })
}

fn metrics(gateway: &Gateway) -> Response<Body> {
    let (status, text) = match gateway.metrics.encode(gateway.table_age()) {
        Ok(text) => (StatusCode::OK, text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    };
    with_content_type(status, prometheus::TEXT_FORMAT, text.into())
}

/// An answer of JSON.
pub(crate) fn json_answer(value: &Value) -> Response<Body> {
    with_content_type(StatusCode::OK, "application/json", value.to_string().into())
}

fn with_content_type(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<Body> {
    let mut response = Response::new(Body::local(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
