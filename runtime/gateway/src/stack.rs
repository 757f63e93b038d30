//! The order in which a request is handled; no other file decides it.
//!
//! | step | why it is at this position |
//! |---|---|
//! | 1 the protocol, the row of the table of surfaces | decide the shape of every error that follows |
//! | 2 the request's id | every later step may log it |
//! | 3 the gateway's own answers | need no table and no body, and are given during the drain too |
//! | 4 the drain's count, the caller's share | from here on the request is work; probes do not count |
//! | 5 whether there is a table | without one no body is worth reading |
//! | 6 the body, within bounds, until the model is known | the model's name may be in it |
//! | 7 the newest table, the route, holding | a table acknowledged during the upload holds for it |
//! | 8 the caller, headers | after the route, which says what of the caller's own words counts |
//! | 9 split, balance, attempts | within the route's time to the first byte, counted from here |
//! | 10 the rest of a refused body | discarded, so that the caller sees the error and no broken connection |
//! | 11 the answer's headers | the pod's connection headers are removed by then; the gateway adds its own |

use std::net::IpAddr;
use std::sync::Arc;

use http::header::{ACCESS_CONTROL_ALLOW_ORIGIN, CONNECTION, EXPECT, HOST, HeaderName, ORIGIN};
use http::request::Parts;
use http::uri::{Authority, PathAndQuery};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version};
use hyper::body::{Body as _, Incoming};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use trustformers_api::surfaces::{
    HttpMethod, Kind, LiteralRows, ModelPlace, Surface, grpc_surface, method_of_path,
};
use trustformers_telemetry::traces::Trace;

use crate::body::Body;
use crate::call::Call;
use crate::connection::Peer;
use crate::error::{Echo, GatewayError};
use crate::error_shape::FailedRequest;
use crate::feedback;
use crate::forward::{Target, forward};
use crate::gateway::Gateway;
use crate::headers::{Forwarding, REQUEST_ID, forwarded, request_id};
use crate::hold::{RoutePlace, Waiting, find_served};
use crate::late;
use crate::limits::Resource;
use crate::local::{self, LocalEndpoint};
use crate::model_name::{NamePlace, name_in_path, or_in_header};
use crate::record::RequestContext;
use crate::request_body::{self, NamedBody, Reading};
use crate::routing::Routing;
use crate::services::Services;
use crate::table::{NameRequired, Unknown};
use crate::trace;
use crate::websocket::{self, SocketRequest};
use crate::wire::Wire;

/// Where callers score answers. It is no surface of a model, and pods do not have it.
const FEEDBACK_PATH: &str = "/v1/feedback";

/// A model that there is not is not ready: an answer and no error, as a pod has it.
const MODEL_READY: &str = "kserve_grpc_model_ready";

/// Handles requests; cloned for each connection.
#[derive(Debug, Clone)]
pub(crate) struct Stack {
    gateway: Arc<Gateway>,
    services: Services,
    rows: Arc<LiteralRows>,
}

/// Where a request is handled.
enum RequestHandler {
    /// In the gateway, from its own state.
    Local(LocalEndpoint),
    /// In the gateway, which counts a score.
    Feedback,
    /// In one of the services of the gateway; none: a preflight request.
    Services(Option<&'static str>),
    /// In a pod.
    Pod(&'static Surface),
    /// In a pod, after the connection has become a WebSocket.
    Upgrade(&'static Surface),
}

/// What is known of a request before its body is read.
struct Arrival {
    surface: &'static Surface,
    wire: Wire,
    arrived: Instant,
    id: HeaderValue,
    caller: IpAddr,
    /// Told once the model is known.
    named: Arc<Notify>,
    /// The span of the request.
    trace: Trace,
}

impl Stack {
    pub(crate) fn new(gateway: Arc<Gateway>, services: Services) -> Self {
        Self { gateway, services, rows: Arc::default() }
    }

    /// Answers one request.
    pub(crate) async fn handle(self, peer: Arc<Peer>, request: Request<Incoming>) -> Response<Body> {
        let active = peer.monitor.request();
        // 1
        let wire = Wire::of(request.headers());
        let path = request.uri().path().to_owned();
        let version = request.version();
        let from_browser = request.headers().contains_key(ORIGIN);
        // 2
        let id = request_id(request.headers());
        // 3
        let gateway = Arc::clone(&self.gateway);
        let handler = handler(&self.rows, &request, wire).and_then(|handler| admitted(handler, &peer));
        let handler = handler.map_err(|error| match error {
            GatewayError::Operated if gateway.embedded => GatewayError::Configured,
            other => other,
        });
        let reserved = peer.share.is_none();
        let span = trace::request_span(&gateway.traces, traced_surface(&handler), &request);
        let outcome = match handler {
            Ok(RequestHandler::Services(surface)) => {
                self.services.answer(request, surface, &peer.limits).await
            }
            Ok(RequestHandler::Feedback) => {
                feedback::answer(&gateway, request).await.map(|told| local::json_answer(&told))
            }
            Ok(RequestHandler::Local(endpoint)) => {
                let answer = local::answer(&gateway, &endpoint, &peer.limits);
                discard_rest(request.into_body(), &peer, false);
                answer
            }
            Ok(RequestHandler::Upgrade(surface)) => self.upgraded(peer, surface, request, &id),
            Ok(RequestHandler::Pod(surface)) => {
                let arrived = Instant::now();
                let named = Arc::new(Notify::new());
                let caller = peer.ip;
                let trace = (*span).clone();
                let arrival = Arrival { surface, wire, arrived, id: id.clone(), caller, named, trace };
                self.piped(peer, arrival, request).await
            }
            Err(error) => {
                let expects_continue = request.headers().contains_key(EXPECT);
                discard_rest(request.into_body(), &peer, expects_continue);
                Err(error)
            }
        };
        let mut response = outcome.unwrap_or_else(|error| {
            // Messages may repeat what the caller sent.
            tracing::debug!(request_id = ?id, kind = error.kind(), "request refused");
            error.response(FailedRequest { wire, path: &path, id: &id })
        });
        // 11
        let upgrades = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.entry(REQUEST_ID).or_insert(id);
        if from_browser && !headers.contains_key(ACCESS_CONTROL_ALLOW_ORIGIN) {
            show_to_pages(headers);
        }
        // HTTP/2 has GOAWAY instead, which the connection sends. A WebSocket that begins needs its own word
        // there, and is told later.
        let closing = gateway.drain.is_draining() || reserved;
        if closing && version < Version::HTTP_2 && !upgrades {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        trace::note_status(&span, response.status());
        response.map(|body| body.with_active(active, span))
    }

    /// Answers the handshake of a WebSocket.
    fn upgraded(
        &self,
        peer: Arc<Peer>,
        surface: &'static Surface,
        mut request: Request<Incoming>,
        id: &HeaderValue,
    ) -> Result<Response<Body>, GatewayError> {
        let routing = self.gateway.routing().ok_or(GatewayError::NoTable)?;
        let query = request.uri().query().unwrap_or_default();
        let model = websocket::model_in_query(query);
        if let Some(model) = &model {
            // An error of HTTP says more than one inside of the WebSocket.
            find_route(&self.gateway, &routing, model, surface)?;
        }
        let upgrade = request.extensions_mut().remove::<hyper::upgrade::OnUpgrade>();
        let (parts, _) = request.into_parts();
        let path = parts.uri.path_and_query().cloned();
        let session = SocketRequest {
            gateway: Arc::clone(&self.gateway),
            peer,
            headers: parts.headers,
            path: path.unwrap_or_else(|| PathAndQuery::from_static("/")),
            request_id: id.clone(),
            model,
            surface,
        };
        websocket::accept(session, upgrade)
    }

    /// Forwards a request. A stream of messages whose first one does not come gets its head meanwhile, in
    /// case the caller waits for it.
    async fn piped(
        self,
        peer: Arc<Peer>,
        arrival: Arrival,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, GatewayError> {
        let waits_for_head = arrival.wire == Wire::Grpc && arrival.surface.kind == Kind::Bidirectional;
        let (named, id) = (Arc::clone(&arrival.named), arrival.id.clone());
        let (parts, body) = request.into_parts();
        let path = parts.uri.path().to_owned();
        let mut coming = Box::pin(async move { self.proxied(&peer, arrival, parts, body).await });
        if !waits_for_head {
            return coming.await;
        }
        let patience = async {
            tokio::select! {
                () = named.notified() => std::future::pending().await,
                () = sleep(late::PATIENCE) => {}
            }
        };
        tokio::select! {
            biased;
            outcome = &mut coming => return outcome,
            () = patience => {}
        }
        Ok(late::head(Box::pin(async move {
            coming.await.unwrap_or_else(|error| {
                error.response(FailedRequest { wire: Wire::Grpc, path: &path, id: &id })
            })
        })))
    }

    async fn proxied(
        self,
        peer: &Peer,
        arrival: Arrival,
        parts: Parts,
        body: Incoming,
    ) -> Result<Response<Body>, GatewayError> {
        let protocol = arrival.wire.protocol();
        let expects_continue = parts.headers.contains_key(EXPECT);
        let mut body = Some(body);
        let outcome = self.attempted(peer, arrival, parts, &mut body).await;
        // 10: what no pod reads
        if let Some(body) = body
            && outcome.as_ref().err().is_none_or(Failed::discards_body)
        {
            discard_rest(body, peer, expects_continue);
        }
        outcome.map_err(|failed| {
            if failed.before_attempts {
                self.gateway.metrics.refused(failed.error.kind(), protocol);
            }
            failed.error
        })
    }

    async fn attempted(
        &self,
        peer: &Peer,
        arrival: Arrival,
        parts: Parts,
        body: &mut Option<Incoming>,
    ) -> Result<Response<Body>, Failed> {
        let gateway = &*self.gateway;
        // 4
        let drain = gateway.drain.enter();
        let reserve =
            |resource, amount| peer.limits.reserve(resource, amount).map_err(GatewayError::Overloaded);
        let context = RequestContext {
            protocol: arrival.wire.protocol(),
            arrived: arrival.arrived,
            request_id: arrival.id.to_str().unwrap_or_default().to_owned(),
            share: reserve(Resource::Requests, 1)?,
            drain,
            feedback: Arc::clone(&gateway.feedback),
        };
        // 5
        if gateway.version().is_none() {
            return Err(GatewayError::NoTable.into());
        }
        // 6
        let Arrival { surface, wire, trace, .. } = arrival;
        let path = parts.uri.path();
        let reading = Reading {
            place: NamePlace { surface, wire, path, headers: &parts.headers },
            limit_bytes: gateway.body_limit_bytes,
            share: reserve(Resource::BodyBytes, 0)?,
            decoding: &gateway.decoding,
            discards_rest: parts.version < Version::HTTP_2,
        };
        let NamedBody { body, model, share } = request_body::read(body, reading).await?;
        arrival.named.notify_one();
        // 7
        let waiting = Waiting { limits: &peer.limits, body_bytes: share.units(), headers: &parts.headers };
        let model = or_in_header(&model, &parts.headers);
        let find = |routing: &Routing| find_route(gateway, routing, model, surface);
        let RoutePlace { routing, route, key } = match find_served(gateway, waiting, find).await {
            Err(GatewayError::UnknownModel { .. }) if surface.name == MODEL_READY && body.is_whole() => {
                return Ok(self.services.answer_whole(parts, body.prefix(usize::MAX)).await);
            }
            found => found?,
        };
        // 8
        let rules = routing.caller_rules(route);
        let caller = gateway.trusted.caller(&parts.headers, arrival.caller, rules);
        let forwarding =
            Forwarding { caller: &caller, trusted: &gateway.trusted, rules, request_id: arrival.id };
        let path = parts.uri.path_and_query().cloned();
        let authority = authority(&parts.uri, &parts.headers);
        let call = Call {
            surface,
            protocol: wire.protocol(),
            wire,
            method: parts.method,
            path: path.unwrap_or_else(|| PathAndQuery::from_static("/")),
            authority,
            headers: forwarded(parts.headers, forwarding),
            body,
            ready_at: Instant::now(),
            trace,
        };
        // 9
        let target = Target { routing: &routing, route, key };
        let forwarding = forward(gateway, target, &call, context).await;
        drop(share);
        forwarding.map_err(|error| {
            // With this error no attempt was made; every other failure counts in its revision's series.
            let before_attempts = matches!(error, GatewayError::NoEndpoint { .. });
            Failed { error, before_attempts }
        })
    }
}

/// Why a request got no answer of a pod.
struct Failed {
    error: GatewayError,
    /// Whether no pod was asked.
    before_attempts: bool,
}

impl Failed {
    fn discards_body(&self) -> bool {
        self.error.discards_body()
    }
}

impl From<GatewayError> for Failed {
    fn from(error: GatewayError) -> Self {
        Self { error, before_attempts: true }
    }
}

/// Reads what is left of a body that nobody wants. A caller that expects `100 Continue` has not sent it yet.
fn discard_rest(body: Incoming, peer: &Peer, expects_continue: bool) {
    if expects_continue || body.is_end_stream() {
        return;
    }
    let active = peer.monitor.request();
    tokio::spawn(async move {
        request_body::discard(body).await;
        drop(active);
    });
}

/// The route that a request goes to.
///
/// # Errors
/// No route has the model's name, or one is needed.
pub(crate) fn find_route(
    gateway: &Gateway,
    routing: &Routing,
    model: &str,
    surface: &Surface,
) -> Result<usize, GatewayError> {
    if model.is_empty() {
        let unnamed = routing.table.find_unnamed(surface.task);
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

/// A reserved connection, which is open beyond the bound, serves probes only.
fn admitted(handler: RequestHandler, peer: &Peer) -> Result<RequestHandler, GatewayError> {
    let probe = matches!(&handler, RequestHandler::Local(endpoint) if endpoint.is_probe());
    if peer.share.is_some() || probe {
        return Ok(handler);
    }
    Err(GatewayError::Overloaded(Resource::Connections))
}

fn handler(
    rows: &LiteralRows,
    request: &Request<Incoming>,
    wire: Wire,
) -> Result<RequestHandler, GatewayError> {
    let path = request.uri().path();
    if *request.method() == Method::OPTIONS && request.headers().contains_key(ORIGIN) {
        return Ok(RequestHandler::Services(None));
    }
    if wire != Wire::Http {
        let surface =
            grpc_surface(path).ok_or_else(|| GatewayError::Unimplemented { path: Echo::new(path) })?;
        return of_surface(surface, path);
    }
    let (get, post) =
        (matches!(*request.method(), Method::GET | Method::HEAD), *request.method() == Method::POST);
    match path {
        "/metrics" if get => return Ok(RequestHandler::Local(LocalEndpoint::Metrics)),
        "/metrics" => return Err(GatewayError::Method { path: Echo::new(path), allowed: "GET, HEAD" }),
        FEEDBACK_PATH if post => return Ok(RequestHandler::Feedback),
        FEEDBACK_PATH => return Err(GatewayError::Method { path: Echo::new(path), allowed: "POST" }),
        _ => {}
    }
    match rows.http_surface(request.method().as_str(), path) {
        Some(surface) => of_surface(surface, path),
        None => Err(match method_of_path(path) {
            Some(HttpMethod::Get) => GatewayError::Method { path: Echo::new(path), allowed: "GET, HEAD" },
            Some(HttpMethod::Post) => GatewayError::Method { path: Echo::new(path), allowed: "POST" },
            None => GatewayError::UnknownPath { path: Echo::new(path) },
        }),
    }
}

/// The surface of a request that a pod answers.
fn traced_surface(handler: &Result<RequestHandler, GatewayError>) -> Option<&'static Surface> {
    match handler {
        Ok(RequestHandler::Pod(surface) | RequestHandler::Upgrade(surface)) => Some(surface),
        _ => None,
    }
}

/// Who answers for a row of the table of surfaces.
fn of_surface(surface: &'static Surface, path: &str) -> Result<RequestHandler, GatewayError> {
    if let Some(endpoint) = LocalEndpoint::of_surface(surface.name) {
        return Ok(RequestHandler::Local(endpoint));
    }
    match surface.name {
        "get_model" => {
            name_in_path(surface, path).map(|name| RequestHandler::Local(LocalEndpoint::Model(name)))
        }
        "load_model" | "unload_model" | "swap_model" | "rollback_model" => Err(GatewayError::Operated),
        "grpc_load_model" | "grpc_unload_model" | "grpc_swap_model" | "grpc_rollback_model" => {
            Err(GatewayError::Operated)
        }
        "kserve_all_statistics" => {
            let instead = "ask for the statistics of one model: /v2/models/{model}/stats";
            Err(GatewayError::NotHere { path: Echo::new(path), instead })
        }
        _ if surface.kind == Kind::Upgrade => Ok(RequestHandler::Upgrade(surface)),
        _ if surface.model == ModelPlace::Nowhere => Ok(RequestHandler::Services(Some(surface.name))),
        _ => Ok(RequestHandler::Pod(surface)),
    }
}

/// Lets a page read an answer that the gateway made itself, as pods let it read theirs.
fn show_to_pages(headers: &mut HeaderMap) {
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    let exposed = HeaderName::from_static("access-control-expose-headers");
    headers.insert(
        exposed,
        HeaderValue::from_static("grpc-status, grpc-message, trustformers-error, retry-after, x-request-id"),
    );
}

/// HTTP/2 callers send the host in the URI, HTTP/1 callers in a header.
fn authority(uri: &http::Uri, headers: &HeaderMap) -> Option<Authority> {
    let in_header = || headers.get(HOST)?.to_str().ok()?.parse().ok();
    uri.authority().cloned().or_else(in_header)
}
