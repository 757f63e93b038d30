//! The order in which a request is handled; no other file decides it.
//!
//! | step | why it stands there |
//! |---|---|
//! | 1 the protocol | decides the shape of every refusal that follows |
//! | 2 the request's id | every later step may log |
//! | 3 probes, lists, figures | answer without a table, while leaving and while bodies are refused: they tell of just that |
//! | 4 the drain's count | from here on the request counts as work; the probes before it never end |
//! | 5 the table | without one no body is worth reading; one table serves all further steps |
//! | 6 the body, within bounds | the model's name is in it, and a second attempt needs it again |
//! | 7 the model's name or the task, the route | a caller's mistake is answered before any pod is bothered |
//! | 8 headers | after the route, so that refused requests cost no copying |
//! | 9 split, balance, attempts | within the route's time to the first byte, counted from the request's arrival |
//! | 10 the answer's headers | the last word: what the pod said about its connection is gone, ours may be added |

use std::net::IpAddr;
use std::sync::Arc;

use http::header::{CONNECTION, CONTENT_TYPE, HOST};
use http::uri::Authority;
use http::{HeaderValue, Method, Request, Response, Version};
use hyper::body::Incoming;
use tokio::time::Instant;

use crate::body::{Begun, Body};
use crate::error::GatewayError;
use crate::forward::{Call, forward};
use crate::gateway::Gateway;
use crate::grpc::Services;
use crate::headers::{REQUEST_ID, forwarded, request_id};
use crate::metrics::Protocol;
use crate::table::{NameRequired, Unknown};
use crate::{intake, local};

/// gRPC calls below this path go to pods.
const INFERENCE_SERVICE: &str = "/trustformers.v1.InferenceService/";
/// HTTP POST requests below this path go to pods.
const HTTP_ROUTES: &str = "/v1/";

/// Handles requests; cloned per connection.
#[derive(Debug, Clone)]
pub(crate) struct Stack {
    gateway: Arc<Gateway>,
    services: Services,
}

/// Who handles a request.
enum Target {
    /// The gateway, from what it knows.
    Local(local::Page),
    /// One of the gateway's own gRPC services.
    Services,
    /// A pod.
    Pod,
}

impl Stack {
    pub(crate) fn new(gateway: Arc<Gateway>, services: Services) -> Self {
        Self { gateway, services }
    }

    /// Answers one request of a caller.
    pub(crate) async fn handle(self, caller: IpAddr, request: Request<Incoming>) -> Response<Body> {
        let arrived = Instant::now();
        // 1
        let protocol = protocol_of(&request);
        let version = request.version();
        // 2
        let id = request_id(request.headers(), &self.gateway.dice);
        let outcome = match target(&request, protocol) {
            // 3
            Ok(Target::Local(page)) => Ok(local::answer(&self.gateway, page)),
            Ok(Target::Services) => Ok(self.services.answer(request).await),
            // 4 to 9
            Ok(Target::Pod) => {
                let begun = Begun {
                    protocol,
                    arrived,
                    request_id: id.to_str().unwrap_or_default().to_owned(),
                    busy: self.gateway.drain.enter(),
                };
                proxied(&self.gateway, begun, caller, (request, id.clone())).await
            }
            Err(error) => Err(error),
        };
        let mut response = outcome.unwrap_or_else(|error| {
            tracing::debug!(request_id = ?id, %error, "request refused");
            error.answer(protocol)
        });
        // 10
        let headers = response.headers_mut();
        headers.entry(REQUEST_ID).or_insert(id);
        // HTTP/2 has GOAWAY for this, which the server sends.
        if self.gateway.drain.is_leaving() && version < Version::HTTP_2 {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

async fn proxied(
    gateway: &Gateway,
    begun: Begun,
    caller: IpAddr,
    (request, id): (Request<Incoming>, HeaderValue),
) -> Result<Response<Body>, GatewayError> {
    let protocol = begun.protocol;
    let refused = |error: GatewayError| {
        gateway.metrics.refused(error.kind(), protocol);
        error
    };
    // 5
    let routing = gateway.routing().ok_or_else(|| refused(GatewayError::NoTable))?;
    let (parts, body) = request.into_parts();
    // 6
    let taken = intake::read(body, gateway.body_limit_bytes, &gateway.bodies).await.map_err(refused)?;
    // 7
    let model = intake::model_name(protocol, &parts.headers, &taken.bytes).map_err(refused)?;
    let found = if model.is_empty() {
        let unnamed = routing.table.find_unnamed(task(parts.uri.path()));
        unnamed.map_err(|NameRequired { choices }| GatewayError::NameRequired { choices })
    } else {
        routing.table.find(&model).map_err(|Unknown| {
            if gateway.is_current() {
                GatewayError::UnknownModel { choices: routing.table.choices(), model }
            } else {
                GatewayError::UnknownYet { model }
            }
        })
    };
    let index = found.map_err(refused)?;
    // 8
    let path = parts.uri.path_and_query().cloned();
    let call = Call {
        protocol,
        method: parts.method,
        path: path.unwrap_or_else(|| http::uri::PathAndQuery::from_static("/")),
        authority: authority(&parts.uri, &parts.headers),
        headers: forwarded(parts.headers, caller, id),
        body: taken.bytes.clone(),
        arrived: begun.arrived,
    };
    // 9
    forward(gateway, &routing, index, (&call, begun)).await.inspect_err(|error| {
        // Only here was no pod asked; every other failure counts in its revision's series.
        if matches!(error, GatewayError::NoEndpoint { .. }) {
            gateway.metrics.refused(error.kind(), protocol);
        }
    })
}

fn protocol_of(request: &Request<Incoming>) -> Protocol {
    let grpc = request
        .headers()
        .get(CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
    if grpc { Protocol::Grpc } else { Protocol::Http }
}

fn target(request: &Request<Incoming>, protocol: Protocol) -> Result<Target, GatewayError> {
    let path = request.uri().path();
    if protocol == Protocol::Grpc {
        return Ok(if path.starts_with(INFERENCE_SERVICE) { Target::Pod } else { Target::Services });
    }
    let get = matches!(*request.method(), Method::GET | Method::HEAD);
    if let Some(page) = local::Page::at(path) {
        return if get {
            Ok(Target::Local(page))
        } else {
            Err(GatewayError::Method { path: path.to_owned(), allowed: "GET, HEAD" })
        };
    }
    match path {
        "/v1/models/load" | "/v1/models/unload" => Err(GatewayError::Operated),
        // Which routes there are below it is for the pods to say: they may be newer than this gateway.
        _ if path.starts_with(HTTP_ROUTES) && *request.method() == Method::POST => Ok(Target::Pod),
        _ if path.starts_with(HTTP_ROUTES) => {
            Err(GatewayError::Method { path: path.to_owned(), allowed: "POST" })
        }
        _ => Err(GatewayError::NoSuchPath { path: path.to_owned() }),
    }
}

/// The task of a path, as routes are called by it; none of a path that is newer than this gateway.
fn task(path: &str) -> Option<&'static str> {
    match path.strip_prefix(INFERENCE_SERVICE).unwrap_or(path) {
        "/v1/generate" | "/v1/generate/stream" | "Generate" | "GenerateStream" => Some("generate"),
        "/v1/embeddings" | "Embed" => Some("embed"),
        _ => None,
    }
}

/// HTTP/2 callers say the host in the URI, HTTP/1 callers in a header.
fn authority(uri: &http::Uri, headers: &http::HeaderMap) -> Option<Authority> {
    let in_header = || headers.get(HOST)?.to_str().ok()?.parse().ok();
    uri.authority().cloned().or_else(in_header)
}
