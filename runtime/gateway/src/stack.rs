//! The order in which a request is handled; no other file decides it.
//!
//! | step | why it is at this position |
//! |---|---|
//! | 1 the protocol | decides the shape of every error that follows |
//! | 2 the request's id | every later step may log it |
//! | 3 the gateway's own answers | need no table and no body, and are given during the drain too |
//! | 4 the drain's count, the caller's share | from here on the request is work; probes do not count |
//! | 5 whether there is a table | without one no body is worth reading |
//! | 6 the body, within bounds | the model's name is in it, and a retry needs it again |
//! | 7 the newest table, the route | a table that is acknowledged during the upload has to hold for it |
//! | 8 headers | after the route, so that refused requests cost no copying |
//! | 9 split, balance, attempts | within the route's time to the first byte, counted from the arrival |
//! | 10 the rest of a refused body | discarded, so that the caller sees the error and no broken connection |
//! | 11 the answer's headers | the pod's connection headers are removed by then; the gateway adds its own |

use std::net::IpAddr;
use std::sync::Arc;

use http::header::{CONNECTION, CONTENT_TYPE, EXPECT, HOST};
use http::request::Parts;
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Method, Request, Response, Version};
use hyper::body::{Body as _, Incoming};
use tokio::time::Instant;
use trustformers_api::surfaces::{INFERENCE_SERVICE, task_of_path};

use crate::body::{Body, RequestContext};
use crate::connection::Peer;
use crate::error::{Echo, GatewayError};
use crate::forward::{Call, Target, forward};
use crate::gateway::Gateway;
use crate::grpc::Services;
use crate::headers::{REQUEST_ID, forwarded, request_id};
use crate::limits::Resource;
use crate::local::{self, LocalEndpoint};
use crate::metrics::Protocol;
use crate::request_body;
use crate::routing::Routing;
use crate::table::{NameRequired, Unknown};

/// HTTP POST requests below this path go to pods.
const HTTP_ROUTES: &str = "/v1/";

/// Handles requests; cloned for each connection.
#[derive(Debug, Clone)]
pub(crate) struct Stack {
    gateway: Arc<Gateway>,
    services: Services,
}

/// Where a request is handled.
enum RequestHandler {
    /// In the gateway, from its own state.
    Local(LocalEndpoint),
    /// In one of the gateway's own gRPC services.
    Services,
    /// In a pod.
    Pod,
}

/// What is known of a request before its body is read.
struct Arrival {
    protocol: Protocol,
    arrived: Instant,
    id: HeaderValue,
    caller: IpAddr,
}

impl Stack {
    pub(crate) fn new(gateway: Arc<Gateway>, services: Services) -> Self {
        Self { gateway, services }
    }

    /// Answers one request.
    pub(crate) async fn handle(self, peer: &Peer, request: Request<Incoming>) -> Response<Body> {
        let active = peer.monitor.request();
        let arrived = Instant::now();
        // 1
        let protocol = protocol_of(request.headers());
        let version = request.version();
        // 2
        let id = request_id(request.headers());
        // 3
        let handler = handler(&request, protocol).and_then(|handler| admitted(handler, peer));
        let outcome = match handler {
            Ok(RequestHandler::Services) => self.services.answer(request, &peer.limits).await,
            handler => {
                let (parts, mut body) = request.into_parts();
                let expects_continue = parts.headers.contains_key(EXPECT);
                let outcome = match handler {
                    Ok(RequestHandler::Local(endpoint)) => {
                        local::answer(&self.gateway, endpoint, &peer.limits)
                    }
                    Ok(RequestHandler::Services | RequestHandler::Pod) => {
                        let arrival = Arrival { protocol, arrived, id: id.clone(), caller: peer.ip };
                        self.proxied(peer, arrival, parts, &mut body).await
                    }
                    Err(error) => Err(error),
                };
                // 10: a caller that expects `100 Continue` has not sent its body yet.
                let discards = outcome.as_ref().err().is_none_or(GatewayError::discards_body);
                if discards && !expects_continue && !body.is_end_stream() {
                    let active = peer.monitor.request();
                    tokio::spawn(async move {
                        request_body::discard(body).await;
                        drop(active);
                    });
                }
                outcome
            }
        };
        let mut response = outcome.unwrap_or_else(|error| {
            tracing::debug!(request_id = ?id, %error, "request refused");
            error.response(protocol)
        });
        // 11
        let headers = response.headers_mut();
        headers.entry(REQUEST_ID).or_insert(id);
        // HTTP/2 has GOAWAY instead, which the connection sends.
        let closing = self.gateway.drain.is_draining() || peer.share.is_none();
        if closing && version < Version::HTTP_2 {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response.map(|body| body.with_active(active))
    }

    async fn proxied(
        &self,
        peer: &Peer,
        arrival: Arrival,
        parts: Parts,
        body: &mut Incoming,
    ) -> Result<Response<Body>, GatewayError> {
        let (gateway, protocol) = (&*self.gateway, arrival.protocol);
        let refused = |error: GatewayError| {
            gateway.metrics.refused(error.kind(), protocol);
            error
        };
        // 4
        let drain = gateway.drain.enter();
        let reserve = |resource, amount| {
            peer.limits
                .reserve(resource, amount)
                .map_err(|exhausted| refused(GatewayError::Overloaded(exhausted)))
        };
        let share = reserve(Resource::Requests, 1)?;
        let context = RequestContext {
            protocol,
            arrived: arrival.arrived,
            request_id: arrival.id.to_str().unwrap_or_default().to_owned(),
            share,
            drain,
        };
        // 5
        if gateway.version().is_none() {
            return Err(refused(GatewayError::NoTable));
        }
        // 6
        request_body::check_encoding(&parts.headers).map_err(refused)?;
        let body_share = reserve(Resource::BodyBytes, 0)?;
        let body = request_body::read(body, gateway.body_limit_bytes, body_share).await.map_err(refused)?;
        let model = request_body::model_name(protocol, &parts.headers, &body.bytes).map_err(refused)?;
        // 7
        let routing = gateway.routing().ok_or_else(|| refused(GatewayError::NoTable))?;
        let route = find_route(gateway, &routing, &model, parts.uri.path()).map_err(refused)?;
        // 8
        let path = parts.uri.path_and_query().cloned();
        let call = Call {
            protocol,
            method: parts.method,
            path: path.unwrap_or_else(|| http::uri::PathAndQuery::from_static("/")),
            authority: authority(&parts.uri, &parts.headers),
            headers: forwarded(parts.headers, arrival.caller, arrival.id),
            body: body.bytes.clone(),
            arrived: arrival.arrived,
        };
        // 9
        let target = Target { routing: &routing, route };
        forward(gateway, target, &call, context).await.inspect_err(|error| {
            // With this error no attempt was made; every other failure counts in its revision's series.
            if matches!(error, GatewayError::NoEndpoint { .. }) {
                gateway.metrics.refused(error.kind(), protocol);
            }
        })
    }
}

fn find_route(gateway: &Gateway, routing: &Routing, model: &str, path: &str) -> Result<usize, GatewayError> {
    if model.is_empty() {
        let unnamed = routing.table.find_unnamed(task_of_path(path));
        return unnamed.map_err(|NameRequired { choices }| GatewayError::NameRequired { choices });
    }
    routing.table.find(model).map_err(|Unknown| {
        let model = Echo::new(model);
        if gateway.is_current() {
            GatewayError::UnknownModel { model, choices: routing.table.choices() }
        } else {
            GatewayError::UnknownWhileDisconnected { model }
        }
    })
}

fn protocol_of(headers: &HeaderMap) -> Protocol {
    let grpc =
        headers.get(CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
    if grpc { Protocol::Grpc } else { Protocol::Http }
}

/// A reserved connection, which is open beyond the bound, serves probes only.
fn admitted(handler: RequestHandler, peer: &Peer) -> Result<RequestHandler, GatewayError> {
    let probe = matches!(handler, RequestHandler::Local(endpoint) if endpoint.is_probe());
    if peer.share.is_some() || probe {
        return Ok(handler);
    }
    Err(GatewayError::Overloaded(Resource::Connections))
}

fn handler(request: &Request<Incoming>, protocol: Protocol) -> Result<RequestHandler, GatewayError> {
    let path = request.uri().path();
    if protocol == Protocol::Grpc {
        return Ok(if path.starts_with(INFERENCE_SERVICE) {
            RequestHandler::Pod
        } else {
            RequestHandler::Services
        });
    }
    let get = matches!(*request.method(), Method::GET | Method::HEAD);
    if let Some(endpoint) = LocalEndpoint::at(path) {
        return if get {
            Ok(RequestHandler::Local(endpoint))
        } else {
            Err(GatewayError::Method { path: Echo::new(path), allowed: "GET, HEAD" })
        };
    }
    match path {
        "/v1/models/load" | "/v1/models/unload" => Err(GatewayError::Operated),
        // The pods decide which routes exist below it, because they may be newer than this gateway.
        _ if path.starts_with(HTTP_ROUTES) && *request.method() == Method::POST => Ok(RequestHandler::Pod),
        _ if path.starts_with(HTTP_ROUTES) => {
            Err(GatewayError::Method { path: Echo::new(path), allowed: "POST" })
        }
        _ => Err(GatewayError::UnknownPath { path: Echo::new(path) }),
    }
}

/// HTTP/2 callers send the host in the URI, HTTP/1 callers in a header.
fn authority(uri: &http::Uri, headers: &HeaderMap) -> Option<Authority> {
    let in_header = || headers.get(HOST)?.to_str().ok()?.parse().ok();
    uri.authority().cloned().or_else(in_header)
}
