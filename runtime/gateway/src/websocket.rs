//! `GET /v1/stream`: a WebSocket whose first message says which model's pod answers.
//!
//! The gateway answers the handshake, reads the first message, opens a WebSocket of its own to a pod, and
//! from then on passes bytes both ways without looking into messages. `?model=NAME` names the model before
//! the first message. A message whose model cannot be asked is answered with an error, and the next one is
//! the first.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use http::header::{
    CONNECTION, HOST, HeaderName, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_EXTENSIONS, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use trustformers_api::budget::Share;
use trustformers_api::surfaces::Surface;
use trustformers_proto::control::v1::Outcome;

use crate::attempt::{AnswerShape, Attempt};
use crate::body::Body;
use crate::connection::Peer;
use crate::endpoint::{Endpoint, InFlight};
use crate::error::{Echo, GatewayError};
use crate::gateway::Gateway;
use crate::headers::{Forwarding, forwarded, name_revision, name_routed};
use crate::hold::{RoutePlace, Waiting, find_served};
use crate::limits::Resource;
use crate::model_name::{NameFinder, or_in_header};
use crate::outcome;
use crate::pool::{self, ConnectError};
use crate::record::{AnswerGuard, RequestContext, RequestRecord};
use crate::routing::{Choice, Criteria, Routing};
use crate::session::SessionAttempts;
use crate::stack::find_route;
use crate::websocket_frames::{
    BINARY, CLOSE, FrameHead, PING, PONG, ProtocolViolation, TEXT, close_frame, server_frame, unmask,
};
use crate::websocket_relay::{PASS_BYTES, PodSocket, pass_both_ways};

/// A pod has this long to accept a connection and the handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// After this silence of a caller whose first message has not come, a ping is sent. Later the pod does that.
const PING_INTERVAL: Duration = Duration::from_secs(20);
/// The time in which something must come after a ping.
const PONG_TIMEOUT: Duration = Duration::from_secs(10);
/// The length of a key: 16 bytes in base64.
const KEY_CHARS: usize = 24;

/// The work of a connection after its upgrade. It travels in the extensions of the answer to the handshake,
/// and the connection runs it, so that the connection's share lasts as long.
#[derive(Clone, Default)]
pub(crate) struct AfterUpgrade(Arc<Mutex<Option<BoxFuture<'static, ()>>>>);

impl AfterUpgrade {
    /// Moves the work of an answer, where it has any, to the connection that waits in `self`.
    pub(crate) fn take_from(&self, response: &mut Response<Body>) {
        if let Some(answered) = response.extensions_mut().remove::<Self>() {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = answered.take();
        }
    }

    /// The work, once.
    pub(crate) fn take(&self) -> Option<BoxFuture<'static, ()>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A WebSocket before its pod is known.
pub(crate) struct SocketRequest {
    /// The gateway.
    pub(crate) gateway: Arc<Gateway>,
    /// The caller's connection.
    pub(crate) peer: Arc<Peer>,
    /// The headers of the handshake.
    pub(crate) headers: HeaderMap,
    /// Its path and query.
    pub(crate) path: PathAndQuery,
    /// Its id.
    pub(crate) request_id: HeaderValue,
    /// The model that the query names.
    pub(crate) model: Option<String>,
    /// The row of the table of surfaces.
    pub(crate) surface: &'static Surface,
}

/// The model that the query of a handshake names.
pub(crate) fn model_in_query(query: &str) -> Option<String> {
    let written = query.split('&').find_map(|part| part.strip_prefix("model="))?;
    let decoded = percent_encoding::percent_decode_str(written).decode_utf8().ok()?;
    Some(decoded.into_owned()).filter(|name| !name.is_empty())
}

/// Answers a handshake.
///
/// # Errors
/// It is none, with the header at fault.
pub(crate) fn accept(
    session: SocketRequest,
    upgrade: Option<OnUpgrade>,
) -> Result<Response<Body>, GatewayError> {
    let key = key(&session.headers)?;
    let upgrade = upgrade.ok_or_else(|| {
        let message =
            "this connection cannot change to WebSocket: use HTTP/1.1, without a proxy that ends it";
        GatewayError::NoUpgrade(message.to_owned())
    })?;
    let accept = HeaderValue::from_str(&derive_accept_key(key.as_bytes()))
        .map_err(|error| GatewayError::Internal { message: error.to_string() })?;
    let work = async move {
        match upgrade.await {
            Ok(upgraded) => session.run(TokioIo::new(upgraded)).await,
            Err(error) => tracing::debug!(%error, "a connection did not become a WebSocket"),
        }
    };
    let mut response = Response::new(Body::default());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
    response.extensions_mut().insert(AfterUpgrade(Arc::new(Mutex::new(Some(Box::pin(work))))));
    Ok(response)
}

/// The key of a handshake.
fn key(headers: &HeaderMap) -> Result<String, GatewayError> {
    let has = |name: HeaderName, word: &str| {
        let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|value| value.trim().eq_ignore_ascii_case(word))
    };
    let wrong = |name: HeaderName, expected: &str| {
        GatewayError::NoUpgrade(format!(
            "{name}: expected {expected}: this route speaks WebSocket, connect to it with ws://"
        ))
    };
    for (name, word) in [(CONNECTION, "upgrade"), (UPGRADE, "websocket"), (SEC_WEBSOCKET_VERSION, "13")] {
        if !has(name.clone(), word) {
            return Err(wrong(name, word));
        }
    }
    let key = headers.get(SEC_WEBSOCKET_KEY).and_then(|key| key.to_str().ok());
    let key = key.filter(|key| key.len() == KEY_CHARS && key.ends_with("=="));
    key.map(str::to_owned).ok_or_else(|| wrong(SEC_WEBSOCKET_KEY, "16 bytes in base64"))
}

/// What the first message is.
struct FirstMessage {
    /// Its frames, as they came.
    frames: Bytes,
    /// The model that it names.
    model: String,
}

/// Why there is no first message.
enum NoMessage {
    /// The caller has gone.
    Gone,
    /// The connection ends, with this code and reason.
    Close { code: u16, reason: &'static str },
    /// The message cannot be followed; another one may come.
    Refused { id: Option<String>, error: GatewayError },
}

/// What a caller sends before its pod is known.
struct Incoming<S> {
    socket: S,
    /// What was read and is not used.
    buffer: BytesMut,
    share: Share,
    limit_bytes: usize,
}

impl SocketRequest {
    async fn run<S: AsyncRead + AsyncWrite + Unpin + Send>(self, socket: S) {
        // A share of no bytes is never refused.
        let Ok(share) = self.peer.limits.reserve(Resource::BodyBytes, 0) else { return };
        let limit_bytes = self.gateway.body_limit_bytes;
        let mut incoming = Incoming { socket, buffer: BytesMut::new(), share, limit_bytes };
        let mut named = self.model.clone();
        loop {
            let first = match named.take() {
                Some(model) => Ok(FirstMessage { frames: Bytes::new(), model }),
                None => tokio::select! {
                    first = incoming.first_message() => first,
                    () = self.gateway.drain.unlisted() => {
                        Err(NoMessage::Close { code: 1001, reason: "the gateway ends; connect again" })
                    }
                },
            };
            let outcome = match first {
                Ok(first) => match self.open(&first.model).await {
                    Ok(pod) => {
                        let Incoming { socket, mut buffer, share, .. } = incoming;
                        drop(share);
                        let sent = [&first.frames[..], &buffer.split()].concat();
                        return pass_both_ways(socket, pod, sent).await;
                    }
                    Err(error) => NoMessage::Refused { id: id_of(&first.frames), error },
                },
                Err(outcome) => outcome,
            };
            let (frame, goes_on) = match outcome {
                NoMessage::Gone => return,
                NoMessage::Close { code, reason } => (close_frame(code, reason), false),
                NoMessage::Refused { id, error } => (error_frame(id.as_deref(), &error), true),
            };
            if incoming.socket.write_all(&frame).await.is_err() || !goes_on {
                let _closed = incoming.socket.shutdown().await;
                return;
            }
        }
    }

    /// Opens a WebSocket to a pod of a model.
    async fn open(&self, model: &str) -> Result<PodSocket, GatewayError> {
        let gateway = &*self.gateway;
        let share = self.peer.limits.reserve(Resource::Requests, 1).map_err(GatewayError::Overloaded)?;
        let context = RequestContext {
            protocol: crate::metrics::Protocol::Http,
            arrived: tokio::time::Instant::now(),
            request_id: self.request_id.to_str().unwrap_or_default().to_owned(),
            share,
            drain: gateway.drain.enter(),
            feedback: Arc::clone(&gateway.feedback),
        };
        let waiting = Waiting { limits: &self.peer.limits, body_bytes: 0, headers: &self.headers };
        let model = or_in_header(model, &self.headers);
        let find = |routing: &Routing| find_route(gateway, routing, model, self.surface);
        let RoutePlace { routing, route, key } = find_served(gateway, waiting, find).await?;
        let name = routing.route(route).name.clone();
        let rules = routing.caller_rules(route);
        let caller = gateway.trusted.caller(&self.headers, self.peer.ip, rules);
        let forwarding = Forwarding {
            caller: &caller,
            trusted: &gateway.trusted,
            rules,
            request_id: self.request_id.clone(),
        };
        let headers = self.handshake_headers(forwarded(self.headers.clone(), forwarding));
        let mut tried: Vec<Arc<Endpoint>> = Vec::new();
        let mut context = Some(context);
        let mut record: Option<RequestRecord> = None;
        let mut failure = None;
        for _ in 0..=routing.route(route).policy.retries {
            let hash = routing.route(route).policy.balance.hash_of(&self.headers, None);
            let criteria = Criteria { key: &key, hash, revision: None, tried: &tried };
            let Some(choice) = routing.choose(route, &criteria) else { break };
            if let Some(context) = context.take() {
                record = Some(RequestRecord::new(context, Arc::clone(&choice.metrics)));
            }
            if let Some(record) = &mut record {
                record.attempt(&choice);
            }
            match self.attempted(&choice, &headers).await {
                Ok(opened) => {
                    let Some(mut record) = record.take() else { break };
                    record.head(StatusCode::SWITCHING_PROTOCOLS, AnswerShape::Session);
                    let guard = AnswerGuard {
                        record,
                        attempt: Some(opened.attempt),
                        mirrored: None,
                        session: None,
                        in_flight: opened.in_flight,
                        _permit: None,
                    };
                    let attempts = SessionAttempts::new(&choice.metrics);
                    return Ok(PodSocket { socket: opened.socket, guard, attempts });
                }
                Err(failed) => failure = Some(failed),
            }
            tried.push(choice.endpoint);
        }
        match (record, failure) {
            (Some(mut record), Some(FailedHandshake { outcome, cause })) => {
                record.failed(outcome);
                let attempts = record.attempts;
                Err(GatewayError::Unreachable { route: name, attempts, cause })
            }
            _ => Err(GatewayError::NoEndpoint { route: name }),
        }
    }

    /// One attempt on one pod.
    async fn attempted(&self, choice: &Choice, headers: &HeaderMap) -> Result<Opened, FailedHandshake> {
        let attempt = Attempt::begin(&choice.metrics);
        let mut in_flight = choice.enter();
        let mut headers = headers.clone();
        name_revision(&mut headers, choice.revision());
        name_routed(&mut headers, choice.routed());
        let connecting = connect(&choice.endpoint, &self.path, &headers);
        let failed = match timeout(HANDSHAKE_TIMEOUT, connecting).await {
            Ok(Ok(socket)) => {
                choice.endpoint.connected();
                in_flight.answered(true);
                return Ok(Opened { socket, attempt, in_flight });
            }
            Ok(Err(error)) => {
                if matches!(error, HandshakeError::Connect(_)) {
                    choice.endpoint.connect_failed();
                    choice.metrics.connect_failed();
                }
                FailedHandshake { outcome: error.outcome(), cause: error.to_string() }
            }
            Err(_elapsed) => {
                let cause = "no answer to the handshake in time".to_owned();
                FailedHandshake { outcome: Outcome::Timeout, cause }
            }
        };
        // A full pod works.
        in_flight.ended(failed.outcome.is_failure());
        attempt.end(failed.outcome, None);
        Err(failed)
    }

    /// The headers of the handshake with a pod.
    fn handshake_headers(&self, mut headers: HeaderMap) -> HeaderMap {
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        // The gateway has agreed on none with the caller.
        headers.remove(SEC_WEBSOCKET_EXTENSIONS);
        headers.remove(SEC_WEBSOCKET_PROTOCOL);
        if let Some(host) = self.headers.get(HOST) {
            headers.insert(HOST, host.clone());
        }
        headers
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Incoming<S> {
    /// Reads the first message that is left.
    async fn first_message(&mut self) -> Result<FirstMessage, NoMessage> {
        // Up to where the frames of the message have arrived.
        let mut complete = 0;
        loop {
            let head = FrameHead::read(&self.buffer[complete..]);
            let broken =
                |_: ProtocolViolation| NoMessage::Close { code: 1002, reason: "not a frame of WebSocket" };
            let Some(head) = head.map_err(broken)? else {
                self.more().await?;
                continue;
            };
            let Some(mask) = head.mask else {
                return Err(NoMessage::Close { code: 1002, reason: "frames of callers are masked" });
            };
            if head.payload_bytes > (self.limit_bytes.saturating_sub(complete)) as u64 {
                return Err(NoMessage::Close { code: 1009, reason: "the message is too long" });
            }
            let payload_bytes = usize::try_from(head.payload_bytes).unwrap_or(usize::MAX);
            let end = complete + head.head_bytes + payload_bytes;
            if self.buffer.len() < end {
                self.more().await?;
                continue;
            }
            if head.opcode < CLOSE {
                complete = end;
                if head.is_last {
                    return self.message(complete);
                }
                continue;
            }
            let rest = self.buffer.split_off(end);
            let mut payload = self.buffer.split_off(complete + head.head_bytes);
            self.buffer.truncate(complete);
            self.buffer.unsplit(rest);
            unmask(mask, 0, &mut payload);
            let answer = match head.opcode {
                PING => server_frame(PONG, &payload),
                CLOSE => server_frame(CLOSE, &payload),
                _ => continue,
            };
            if self.socket.write_all(&answer).await.is_err() || head.opcode == CLOSE {
                let _closed = self.socket.shutdown().await;
                return Err(NoMessage::Gone);
            }
        }
    }

    /// Takes the message whose frames end at `end`.
    fn message(&mut self, end: usize) -> Result<FirstMessage, NoMessage> {
        let frames = self.buffer.split_to(end).freeze();
        self.share.shrink_to(self.buffer.len() + frames.len());
        let refused = |error| NoMessage::Refused { id: id_of(&frames), error };
        if matches!(FrameHead::read(&frames), Ok(Some(head)) if head.opcode == BINARY) {
            let text = "a message is binary: send its JSON as text";
            return Err(refused(GatewayError::Malformed(Echo::new(text))));
        }
        let mut finder = NameFinder::Json(Default::default());
        let found = finder.push(&text_of(&frames)).and_then(|()| finder.finish());
        found.map_err(refused).map(|model| FirstMessage { frames: frames.clone(), model })
    }

    /// Reads more, and asks a silent caller whether it is there.
    async fn more(&mut self) -> Result<(), NoMessage> {
        let before = self.buffer.len();
        let read = match timeout(PING_INTERVAL, self.socket.read_buf(&mut self.buffer)).await {
            Ok(read) => read,
            Err(_elapsed) => {
                if self.socket.write_all(&server_frame(PING, b"")).await.is_err() {
                    return Err(NoMessage::Gone);
                }
                let answered = timeout(PONG_TIMEOUT, self.socket.read_buf(&mut self.buffer)).await;
                answered.map_err(|_elapsed| NoMessage::Gone)?
            }
        };
        if !matches!(read, Ok(1..)) {
            return Err(NoMessage::Gone);
        }
        if !self.share.try_grow(self.buffer.len() - before) {
            return Err(NoMessage::Close { code: 1013, reason: "the memory for requests is in use" });
        }
        Ok(())
    }
}

/// The payloads of the frames of one message, without their masks.
fn text_of(frames: &[u8]) -> Vec<u8> {
    let (mut text, mut rest) = (Vec::with_capacity(frames.len()), frames);
    while let Ok(Some(head)) = FrameHead::read(rest) {
        let payload_bytes = usize::try_from(head.payload_bytes).unwrap_or(usize::MAX);
        let end = head.head_bytes.saturating_add(payload_bytes).min(rest.len());
        let from = text.len();
        text.extend_from_slice(&rest[head.head_bytes..end]);
        unmask(head.mask.unwrap_or_default(), 0, &mut text[from..]);
        rest = &rest[end..];
    }
    text
}

/// The id of a message that cannot be followed.
fn id_of(frames: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Identified {
        id: Option<String>,
    }
    serde_json::from_slice::<Identified>(&text_of(frames)).ok()?.id
}

/// The message that tells of an error, in the words of the pods' own.
fn error_frame(id: Option<&str>, error: &GatewayError) -> Vec<u8> {
    let mut native = error.native_json();
    let id = id.map(|id| Echo::new(id).to_string());
    let message = serde_json::json!({"id": id, "type": "error", "error": native["error"].take()});
    server_frame(TEXT, message.to_string().as_bytes())
}

/// Why a pod did not become the other side of a WebSocket.
#[derive(Debug, thiserror::Error)]
enum HandshakeError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the handshake failed: {0}")]
    Broken(#[from] hyper::Error),
    #[error("the handshake was answered with {0}")]
    Declined(StatusCode),
}

impl HandshakeError {
    fn outcome(&self) -> Outcome {
        match self {
            Self::Connect(_) => Outcome::ConnectFailed,
            Self::Broken(_) => Outcome::ResetBefore,
            Self::Declined(status) => match outcome::of_status(*status) {
                // It is no handshake, and no error either.
                Outcome::Ok => Outcome::PodError,
                outcome => outcome,
            },
        }
    }
}

/// A WebSocket to a pod, as it was opened.
struct Opened {
    socket: Upgraded,
    attempt: Attempt,
    in_flight: InFlight,
}

/// Why the last pod that was tried did not become the other side.
struct FailedHandshake {
    outcome: Outcome,
    cause: String,
}

async fn connect(
    endpoint: &Endpoint,
    path: &PathAndQuery,
    headers: &HeaderMap,
) -> Result<Upgraded, HandshakeError> {
    let address = endpoint.spec.id.http;
    let stream = pool::connect(address).await?;
    let (mut sender, connection) =
        http1::Builder::new().max_buf_size(2 * PASS_BYTES).handshake(TokioIo::new(stream)).await?;
    // Ends once the connection is handed over, or with the request.
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%address, %error, "a connection to a pod ended");
        }
    });
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.uri_mut() = path.clone().into();
    *request.headers_mut() = headers.clone();
    if !headers.contains_key(HOST)
        && let Ok(host) = HeaderValue::from_str(&address.to_string())
    {
        request.headers_mut().insert(HOST, host);
    }
    let response = sender.send_request(request).await?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(HandshakeError::Declined(response.status()));
    }
    Ok(hyper::upgrade::on(response).await?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{Bounds, Limits};
    use crate::websocket_frames::CONTINUATION;

    fn masked(opcode: u8, is_last: bool, payload: &[u8]) -> Vec<u8> {
        let mut frame = server_frame(opcode, payload);
        let head = FrameHead::read(&frame).unwrap().unwrap();
        if !is_last {
            frame[0] &= 0x7f;
        }
        frame[1] |= 0x80;
        let mask = [1, 2, 3, 4];
        let mut payload = frame.split_off(head.head_bytes);
        unmask(mask, 0, &mut payload);
        [frame, mask.to_vec(), payload].concat()
    }

    fn incoming<S>(socket: S, limit_bytes: usize) -> Incoming<S> {
        let limits = Limits::new(Bounds::default()).of_caller([192, 0, 2, 1].into());
        let share = limits.reserve(Resource::BodyBytes, 0).unwrap();
        Incoming { socket, buffer: BytesMut::new(), share, limit_bytes }
    }

    #[tokio::test]
    async fn the_first_message_is_read_however_it_is_cut_and_pings_are_answered() {
        let (before, after) =
            (masked(TEXT, false, br#"{"id": "a", "mod"#), masked(CONTINUATION, true, br#"el": "m"}"#));
        let message = [before.clone(), after.clone()].concat();
        let sent = [before, masked(PING, true, b"p"), after, masked(TEXT, true, b"next")].concat();
        for piece in [1, 7, sent.len()] {
            let (near, mut far) = tokio::io::duplex(1 << 16);
            let mut incoming = incoming(near, 1000);
            let sent = sent.clone();
            let sending = tokio::spawn(async move {
                for piece in sent.chunks(piece) {
                    far.write_all(piece).await.unwrap();
                    tokio::task::yield_now().await;
                }
                let mut pong = [0; 3];
                far.read_exact(&mut pong).await.unwrap();
                pong
            });
            let Ok(first) = incoming.first_message().await else { panic!("{piece}: no message") };
            assert_eq!((first.model.as_str(), &first.frames[..]), ("m", &message[..]), "{piece}");
            assert_eq!(sending.await.unwrap(), *server_frame(PONG, b"p"));
        }
    }

    #[tokio::test]
    async fn messages_that_cannot_be_followed_are_refused_with_their_id() {
        let (near, mut far) = tokio::io::duplex(1 << 16);
        let mut incoming = incoming(near, 1000);
        for (frame, id) in [
            (masked(TEXT, true, br#"{"id": "a", "model": 3}"#), Some("a")),
            (masked(TEXT, true, b"[]"), None),
            (masked(BINARY, true, br#"{"id": "b"}"#), Some("b")),
        ] {
            far.write_all(&frame).await.unwrap();
            let Err(NoMessage::Refused { id: found, error }) = incoming.first_message().await else {
                panic!("{id:?}")
            };
            assert_eq!((found.as_deref(), error.kind()), (id, "invalid_request"));
        }
        far.write_all(&server_frame(TEXT, b"{}")).await.unwrap();
        assert!(matches!(incoming.first_message().await, Err(NoMessage::Close { code: 1002, .. })));
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_message_and_a_silent_caller_end_the_connection() {
        let (near, mut far) = tokio::io::duplex(1 << 16);
        let mut long = incoming(near, 100);
        far.write_all(&masked(TEXT, true, &[b' '; 101])).await.unwrap();
        assert!(matches!(long.first_message().await, Err(NoMessage::Close { code: 1009, .. })));
        let (near, _far) = tokio::io::duplex(1 << 16);
        let began = tokio::time::Instant::now();
        assert!(matches!(incoming(near, 100).first_message().await, Err(NoMessage::Gone)));
        assert_eq!(began.elapsed(), PING_INTERVAL + PONG_TIMEOUT);
    }
}
