//! A listener that speaks HTTP/1.1 and HTTP/2 (prior knowledge) on one port and ends gracefully.
//!
//! It is built on hyper and not on axum's own server, because the settings below are not reachable there.
//! What it does for every request, whatever the protocol:
//!
//! | bound | why |
//! |---|---|
//! | connections, for each caller and in all | an idle connection costs memory; probes need a free one |
//! | time until a connection has sent a preface or a request head | a slow sender would hold the connection |
//! | bytes of request bodies, and the time in which they must arrive | `request_body.rs` |
//! | bytes of answers that the client does not read | each open answer may fill a send buffer |
//! | a panic while a request is handled | it becomes an answer with an id, and the connection lives |
//! | work for a request that finds the models full | `overload.rs` |

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::header::{CONTENT_TYPE, EXPECT};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Request, Response};
use axum::response::IntoResponse;
use futures::FutureExt;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tower::ServiceExt;

use crate::budget::{Caller, Share};
use crate::contain::panicked;
use crate::error::ApiError;
use crate::limits::{SEND_BUFFER_BYTES, too_many_answers};
use crate::overload::Admission;
use crate::request_body;
use crate::surfaces::{Kind, grpc_surface};
use crate::upgrade::AfterUpgrade;

pub use crate::limits::Limits;

/// HTTP/2 streams on one connection: the default queue of the engine (512) plus its largest batch (256),
/// twice and rounded up, so that the engine's own bound is reached first and answered with 429.
const MAX_STREAMS_PER_CONNECTION: u32 = 2048;
const PING_INTERVAL: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// The time in which an HTTP/1.1 head must have arrived; it also bounds idle connections.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// The time in which a new connection must have sent [`PREFACE_BYTES`].
const PREFACE_TIMEOUT: Duration = Duration::from_secs(10);
/// How the content types of gRPC-Web begin.
const GRPC_WEB: &[u8] = b"application/grpc-web";
/// The length of HTTP/2's preface. A head of HTTP/1.1 is longer.
const PREFACE_BYTES: usize = 24;
/// How long to wait after the system refused a connection for lack of a resource (file descriptors, memory).
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);
/// An answer is handed to its connection in pieces of this length, so that a long one waits here, where it
/// counts.
const PIECE_BYTES: usize = 32 * 1024;

/// Listens on `address`. The unspecified address, of either family, means every address of both families, or
/// of IPv4 alone where the machine has no IPv6.
///
/// # Errors
/// What the system says: the port is taken, or the address is not of this machine.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    if !address.ip().is_unspecified() {
        return TcpListener::bind(address).await;
    }
    match TcpListener::bind((Ipv6Addr::UNSPECIFIED, address.port())).await {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        outcome => outcome,
    }
}

/// Serves `router` on `listener` until `stop` is cancelled; then takes no new connection, asks the open ones
/// to end (`Connection: close`, GOAWAY), and returns once their requests have been answered and read.
/// Dropping the future closes all connections at once.
pub async fn serve(listener: TcpListener, router: Router, limits: Limits, stop: CancellationToken) {
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((socket, peer)) => {
                    let caller = Caller::at(peer.ip());
                    let Some(share) = limits.connections.try_acquire(caller, 1) else {
                        tracing::debug!(%peer, "a connection was closed at once: this caller has too many");
                        continue;
                    };
                    let requests = Requests {
                        router: router.clone(),
                        limits: limits.clone(),
                        caller,
                        upgrade: AfterUpgrade::default(),
                    };
                    connections.spawn(connection(socket, requests, graceful.watcher(), share));
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    }
    drop(listener);
    graceful.shutdown().await;
    while connections.join_next().await.is_some() {}
}

async fn connection(socket: TcpStream, requests: Requests, watcher: Watcher, _share: Share) {
    if let Err(error) = socket.set_nodelay(true) {
        tracing::debug!(%error, "small writes to this connection may be delayed");
    }
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(SEND_BUFFER_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
        .max_send_buf_size(SEND_BUFFER_BYTES)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT);
    let received = Arc::new(AtomicUsize::new(0));
    let io = TokioIo::new(CountedSocket { socket, received: Arc::clone(&received) });
    let upgrade = requests.upgrade.clone();
    let service = service_fn(move |request| requests.clone().answer(request));
    let served = builder.serve_connection_with_upgrades(io, service).into_owned();
    tokio::select! {
        served = watcher.watch(served) => if let Err(error) = served {
            tracing::debug!(%error, "a connection ended early");
            return;
        },
        () = no_preface(&received) => {
            tracing::debug!("a connection was closed: it sent no request");
            return;
        }
    }
    if let Some(upgraded) = upgrade.take() {
        upgraded.await;
    }
}

/// Ends when a connection has sent too little in its first seconds, and never otherwise.
async fn no_preface(received: &AtomicUsize) {
    tokio::time::sleep(PREFACE_TIMEOUT).await;
    if received.load(Ordering::Relaxed) >= PREFACE_BYTES {
        std::future::pending::<()>().await;
    }
}

/// A socket that counts the bytes that it has received.
struct CountedSocket {
    socket: TcpStream,
    received: Arc<AtomicUsize>,
}

impl AsyncRead for CountedSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.socket).poll_read(context, buffer);
        self.received.fetch_add(buffer.filled().len() - before, Ordering::Relaxed);
        read
    }
}

impl AsyncWrite for CountedSocket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}

/// How the requests of one caller are answered.
#[derive(Clone)]
struct Requests {
    router: Router,
    limits: Limits,
    caller: Caller,
    /// What the connection does after an upgrade.
    upgrade: AfterUpgrade,
}

impl Requests {
    async fn answer(self, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
        let grpc = is_grpc(request.headers());
        // Probes and figures must come through however busy the server is; their answers are small and whole.
        let exempt = request.uri().path().starts_with("/health") || request.uri().path() == "/metrics";
        let buffer = if exempt { 0 } else { SEND_BUFFER_BYTES };
        let acquired = (
            self.limits.answer_bytes.try_acquire(self.caller, buffer),
            self.limits.request_bytes.try_acquire(self.caller, 0),
        );
        let (Some(mut unsent), Some(body_share)) = acquired else {
            return Ok(refused(&too_many_answers(), grpc));
        };
        let expects_continue = request.headers().contains_key(EXPECT);
        let (mut head, body) = request.into_parts();
        let (body, meter) = request_body::metered(body, body_share, is_stream_of_messages(&head));
        let body = match &self.limits.overload {
            None => body,
            Some(gate) => match gate.look(&head, body).await {
                Admission::Refused(response) => return Ok(response),
                Admission::Passed(body) => body,
            },
        };
        head.extensions.insert(self.limits.of(self.caller));
        let handled = AssertUnwindSafe(self.router.oneshot(Request::from_parts(head, body))).catch_unwind();
        let mut response = match handled.await {
            Ok(Ok(response)) => response,
            Ok(Err(never)) => match never {},
            Err(payload) => refused(&panicked(payload.as_ref()), grpc),
        };
        self.upgrade.take_from(&mut response);
        if grpc || response.status().is_client_error() || response.status().is_server_error() {
            meter.discard(expects_continue).await;
        }
        let length = response.body().size_hint().exact().and_then(|bytes| usize::try_from(bytes).ok());
        if !unsent.try_grow(length.unwrap_or(0).saturating_sub(SEND_BUFFER_BYTES)) {
            return Ok(refused(&too_many_answers(), grpc));
        }
        Ok(response.map(|inner| Body::new(MeteredAnswer { inner, waiting: Bytes::new(), _unsent: unsent })))
    }
}

/// Whether a request speaks gRPC, and its refusal must too.
fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// Whether a request is a stream of gRPC messages that goes on for as long as the caller likes.
fn is_stream_of_messages(head: &Parts) -> bool {
    let plain = head.headers.get(CONTENT_TYPE).is_some_and(|kind| !kind.as_bytes().starts_with(GRPC_WEB));
    plain
        && is_grpc(&head.headers)
        && grpc_surface(head.uri.path()).is_some_and(|surface| surface.kind == Kind::Bidirectional)
}

fn refused(error: &ApiError, grpc: bool) -> Response<Body> {
    if grpc { Status::from(error.clone()).into_http() } else { error.clone().into_response() }
}

/// An answer that counts against the budget of unsent bytes until its last byte is handed to the connection.
struct MeteredAnswer {
    inner: Body,
    /// The rest of a frame that is handed over in pieces.
    waiting: Bytes,
    _unsent: Share,
}

impl HttpBody for MeteredAnswer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.waiting.is_empty() {
            match std::task::ready!(Pin::new(&mut self.inner).poll_frame(context)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(bytes) => self.waiting = bytes,
                    Err(frame) => return Poll::Ready(Some(Ok(frame))),
                },
                end => return Poll::Ready(end),
            }
        }
        let length = self.waiting.len().min(PIECE_BYTES);
        Poll::Ready(Some(Ok(Frame::data(self.waiting.split_to(length)))))
    }

    fn is_end_stream(&self) -> bool {
        self.waiting.is_empty() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let waiting = self.waiting.len() as u64;
        let inner = self.inner.size_hint();
        let mut hint = SizeHint::new();
        hint.set_lower(inner.lower() + waiting);
        if let Some(upper) = inner.upper() {
            hint.set_upper(upper + waiting);
        }
        hint
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::FairBudget;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn start(router: Router) -> (SocketAddr, CancellationToken, tokio::task::JoinHandle<()>) {
        start_with(router, Limits::default()).await
    }

    async fn start_with(
        router: Router,
        limits: Limits,
    ) -> (SocketAddr, CancellationToken, tokio::task::JoinHandle<()>) {
        let listener = bind((Ipv4Addr::LOCALHOST, 0).into()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let task = tokio::spawn(serve(listener, router, limits, stop.clone()));
        (address, stop, task)
    }

    #[tokio::test]
    async fn a_request_in_flight_is_answered_after_stop() {
        let (entered, mut has_entered) = tokio::sync::mpsc::channel(1);
        let release = Arc::new(tokio::sync::Notify::new());
        let gate = release.clone();
        let router = Router::new().route(
            "/slow",
            get(move || async move {
                entered.send(()).await.unwrap();
                gate.notified().await;
                "done"
            }),
        );
        let (address, stop, task) = start(router).await;
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        has_entered.recv().await.unwrap();
        stop.cancel();
        release.notify_one();
        let mut text = String::new();
        client.read_to_string(&mut text).await.unwrap();
        assert!(text.contains("done") && text.to_lowercase().contains("connection: close"), "{text}");
        task.await.unwrap();
        assert!(TcpStream::connect(address).await.is_err());
    }

    #[tokio::test]
    async fn an_idle_connection_does_not_hold_up_the_end() {
        let (address, stop, task) = start(Router::new()).await;
        let _idle = TcpStream::connect(address).await.unwrap();
        stop.cancel();
        task.await.unwrap();
    }

    #[tokio::test]
    async fn the_unspecified_address_listens_on_ipv4_too() {
        let listener = bind((Ipv4Addr::UNSPECIFIED, 0).into()).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.is_ok());
    }

    /// The whole text of a connection that is closed by the server.
    async fn exchange(address: SocketAddr, sent: &[u8]) -> String {
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(sent).await.unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test]
    async fn a_panic_is_answered_and_the_connection_lives() {
        let router = Router::new()
            .route("/panic", get(async || -> &'static str { panic!("a library gave up") }))
            .route("/fine", get(async || "fine"));
        let (address, ..) = start(router).await;
        let both = b"GET /panic HTTP/1.1\r\nhost: x\r\n\r\nGET /fine HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        let text = exchange(address, both).await;
        assert!(
            text.starts_with("HTTP/1.1 500") && text.contains("under ") && text.ends_with("fine"),
            "{text}"
        );
        assert!(!text.contains("gave up"), "{text}");
    }

    #[tokio::test]
    async fn a_refusal_reaches_a_client_that_sends_its_whole_body_first() {
        let (address, ..) = start(Router::new()).await;
        let body = vec![b'x'; 8 << 20];
        let head = format!("POST /none HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
        let text = tokio::time::timeout(Duration::from_secs(30), async {
            let mut client = TcpStream::connect(address).await.unwrap();
            client.write_all(head.as_bytes()).await.unwrap();
            client.write_all(&body).await.unwrap();
            let mut start = [0; 12];
            client.read_exact(&mut start).await.unwrap();
            String::from_utf8(start.to_vec()).unwrap()
        });
        assert_eq!(text.await.unwrap(), "HTTP/1.1 404");
    }

    #[tokio::test]
    async fn one_caller_cannot_take_every_connection() {
        let limits = Limits { connections: FairBudget::new(4), ..Limits::default() };
        let (address, ..) = start_with(Router::new().route("/", get(async || "ok")), limits.clone()).await;
        let probe = limits.connections.try_acquire(Caller::at([10, 0, 0, 1].into()), 0);
        let _idle = [TcpStream::connect(address).await.unwrap(), TcpStream::connect(address).await.unwrap()];
        let mut third = TcpStream::connect(address).await.unwrap();
        let mut bytes = [0; 1];
        assert_eq!(third.read(&mut bytes).await.unwrap_or(0), 0, "closed at once");
        assert_eq!(limits.connections.used(), 2);
        assert!(probe.unwrap().try_grow(1), "another caller still gets one");
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_sends_no_request_is_closed() {
        for sent in [&b""[..], b"PRI * HTTP/2", b"GET"] {
            let (address, ..) = start(Router::new()).await;
            assert_eq!(exchange(address, sent).await, "");
        }
    }

    #[tokio::test]
    async fn unread_answers_are_refused_beyond_their_budget() {
        let limits = Limits { answer_bytes: FairBudget::new(4 * SEND_BUFFER_BYTES), ..Limits::default() };
        let long = "x".repeat(3 * SEND_BUFFER_BYTES);
        let router = Router::new()
            .route("/long", get(move || async move { long }))
            .route("/health/live", get(async || "live"));
        let (address, ..) = start_with(router, limits.clone()).await;
        let get = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        assert!(exchange(address, get("/long").as_bytes()).await.starts_with("HTTP/1.1 429"));
        let _others =
            limits.answer_bytes.try_acquire(Caller::at([10, 0, 0, 1].into()), 2 * SEND_BUFFER_BYTES);
        let _more = limits.answer_bytes.try_acquire(Caller::at([10, 0, 0, 2].into()), SEND_BUFFER_BYTES);
        let refused = exchange(address, get("/long").as_bytes()).await;
        assert!(refused.starts_with("HTTP/1.1 429") && refused.contains("retry-after: 1"), "{refused}");
        assert!(exchange(address, get("/health/live").as_bytes()).await.ends_with("live"));
    }

    #[tokio::test]
    async fn a_slow_reader_gets_its_whole_answer_after_stop() {
        let long = "x".repeat(16 << 20);
        let router = Router::new().route("/long", get(move || async move { long }));
        let (address, stop, task) = start(router).await;
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET /long HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut start = [0; 12];
        client.read_exact(&mut start).await.unwrap();
        stop.cancel();
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).await.unwrap();
        assert!(rest.len() > 16 << 20, "{}", rest.len());
        task.await.unwrap();
    }
}
