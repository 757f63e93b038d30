//! One connection of a caller: which protocol it speaks, and the times that it may take.
//!
//! | timeout | what it ends |
//! |---|---|
//! | [`HEAD_TIMEOUT`] | a connection whose HTTP/2 preface or HTTP/1.1 head does not arrive completely |
//! | [`IDLE_TIMEOUT`] | a connection without a request |
//! | [`WRITE_TIMEOUT`] | a caller that takes no byte of an answer |
//! | [`PING_TIMEOUT`] | an HTTP/2 caller that answers no ping, for instance in the middle of a head |
//!
//! hyper's own header timeout is not used: it also runs while a connection is idle, so one value would have
//! to serve both.

use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http::Request;
use hyper::body::Incoming;
use hyper::rt::{Read, Write};
use hyper::server::conn::{http1, http2};
use hyper::service::{HttpService, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use trustformers_api::budget::Share;

use crate::body::{Body, BoxError};
use crate::drain::Drain;
use crate::limits::CallerLimits;
use crate::stack::Stack;
use crate::websocket::AfterUpgrade;

/// Requests that one caller may have open on one connection. A proxy sends the requests of many callers over
/// one;
/// `limits` bounds what all of them hold.
const STREAMS_PER_CONNECTION: u32 = 2048;
const PING_INTERVAL: Duration = Duration::from_secs(20);
/// A caller that answers no ping for this long is gone, and its requests are cancelled.
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// From the first byte of a head, or from the accepted connection, to the end of the head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection without a request is closed after this time. It is longer than the idle times of load
/// balancers (60 s for nginx and AWS, 600 s for Google Cloud): the side that closes an idle connection must
/// be the one that sends requests on it, or a request can meet the close.
const IDLE_TIMEOUT: Duration = Duration::from_secs(620);
/// A caller that takes no byte for this long is cut; common servers use the same value.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);
/// A timeout is noticed at most this much later. 10,240 connections are 2048 checks per second.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// Longest head of a request, in both protocols.
pub(crate) const HEAD_BYTES: usize = 16 << 10;
/// Bytes of one answer that wait for the caller in hyper's buffers. `limits` has the sum.
pub(crate) const SEND_BUFFER_BYTES: usize = 16 << 10;
/// What an HTTP/2 connection begins with (RFC 9113, section 3.4).
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What all connections share.
#[derive(Clone, Debug)]
pub(crate) struct ConnectionContext {
    /// Handles the requests.
    pub(crate) stack: Stack,
    /// Whether the gateway drains.
    pub(crate) drain: Arc<Drain>,
    /// Cancelled when connections have to end.
    pub(crate) stop: CancellationToken,
}

/// The other side of a connection.
#[derive(Debug)]
pub(crate) struct Peer {
    /// Its address.
    pub(crate) ip: IpAddr,
    /// The limits that apply to it.
    pub(crate) limits: CallerLimits,
    /// Its share of the connections; `None` on a reserved connection, which serves probes only.
    pub(crate) share: Option<Share>,
    /// The connection's timeouts.
    pub(crate) monitor: Arc<Monitor>,
}

/// The protocol of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HttpVersion {
    Http1,
    Http2,
}

/// Serves one connection until it ends.
pub(crate) async fn serve(mut stream: TcpStream, peer: Peer, context: ConnectionContext) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(caller = %peer.ip, %error, "the connection is closed already");
        return;
    }
    let preface = tokio::select! {
        preface = timeout(HEAD_TIMEOUT, read_preface(&mut stream)) => preface,
        () = context.stop.cancelled() => return,
    };
    let (prefix, version) = match preface {
        Ok(Ok(read)) => read,
        Ok(Err(error)) => {
            tracing::debug!(caller = %peer.ip, %error, "a connection ended before a request");
            return;
        }
        Err(_elapsed) => {
            tracing::debug!(caller = %peer.ip, "a connection brought no request in time");
            return;
        }
    };
    let monitor = Arc::clone(&peer.monitor);
    monitor.begin(version);
    let io =
        TokioIo::new(MonitoredStream { prefix, stream, monitor: Arc::clone(&monitor), write_blocked: false });
    let stack = context.stack.clone();
    let peer = Arc::new(peer);
    let upgrade = AfterUpgrade::default();
    let service = service_fn({
        let peer = Arc::clone(&peer);
        let upgrade = upgrade.clone();
        move |request: Request<Incoming>| {
            let (stack, peer, upgrade) = (stack.clone(), Arc::clone(&peer), upgrade.clone());
            async move {
                let mut response = stack.handle(peer, request).await;
                upgrade.take_from(&mut response);
                Ok::<_, Infallible>(response)
            }
        }
    });
    match version {
        HttpVersion::Http1 => {
            let mut builder = http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(None).max_buf_size(HEAD_BYTES);
            run(builder.serve_connection(io, service).with_upgrades(), version, &peer, &context).await;
            if let Some(work) = upgrade.take() {
                let _active = peer.monitor.request();
                tokio::select! {
                    () = work => {}
                    // A caller that takes no byte is cut; a WebSocket has no other of these timeouts.
                    _expired = peer.monitor.expired() => {}
                }
            }
        }
        HttpVersion::Http2 => {
            let mut builder = http2::Builder::new(TokioExecutor::new());
            builder
                .timer(TokioTimer::new())
                .max_concurrent_streams(STREAMS_PER_CONNECTION)
                .max_header_list_size(HEAD_BYTES as u32)
                .max_send_buf_size(SEND_BUFFER_BYTES)
                .keep_alive_interval(PING_INTERVAL)
                .keep_alive_timeout(PING_TIMEOUT);
            run(builder.serve_connection(io, service), version, &peer, &context).await;
        }
    }
}

/// A connection that is being served.
trait Served: Future<Output = hyper::Result<()>> {
    /// Ends it after the requests that it has.
    fn end(self: Pin<&mut Self>);
}

impl<I, S> Served for http1::UpgradeableConnection<I, S>
where
    S: HttpService<Incoming, ResBody = Body>,
    S::Error: Into<BoxError>,
    I: Read + Write + Unpin + Send + 'static,
{
    fn end(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

impl<I, S> Served for http2::Connection<I, S, TokioExecutor>
where
    S: HttpService<Incoming, ResBody = Body>,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
    I: Read + Write + Unpin,
{
    fn end(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

async fn run(connection: impl Served, version: HttpVersion, peer: &Peer, context: &ConnectionContext) {
    tokio::pin!(connection);
    let outcome = tokio::select! {
        outcome = connection.as_mut() => outcome,
        expired = peer.monitor.expired() => match expired {
            Expired::Idle => {
                connection.as_mut().end();
                connection.await
            }
            Expired::Head | Expired::Write => {
                tracing::debug!(caller = %peer.ip, timeout = ?expired, "a connection is cut");
                return;
            }
        },
        () = closing(context, version) => {
            connection.as_mut().end();
            tokio::select! {
                outcome = connection.as_mut() => outcome,
                _expired = peer.monitor.expired() => return,
            }
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(caller = %peer.ip, %error, "a connection ended with an error");
    }
}

/// Returns when a connection has to end. HTTP/2 callers get GOAWAY when those that connect again reach
/// another gateway. HTTP/1.1 callers learn it from `Connection: close` on their next answer, so idle HTTP/1.1
/// connections stay open until the very end: closing one could meet a request.
async fn closing(context: &ConnectionContext, version: HttpVersion) {
    let goaway = async {
        if version == HttpVersion::Http1 {
            std::future::pending::<()>().await;
        }
        context.drain.unlisted().await;
    };
    tokio::select! {
        () = context.stop.cancelled() => {}
        () = goaway => {}
    }
}

/// Reads until the protocol is certain and returns the bytes read.
async fn read_preface(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<(Bytes, HttpVersion)> {
    let mut read = BytesMut::with_capacity(HTTP2_PREFACE.len());
    loop {
        let mut rest = (&mut *stream).take((HTTP2_PREFACE.len() - read.len()) as u64);
        if rest.read_buf(&mut read).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if !HTTP2_PREFACE.starts_with(&read) {
            return Ok((read.freeze(), HttpVersion::Http1));
        }
        if read.len() == HTTP2_PREFACE.len() {
            return Ok((read.freeze(), HttpVersion::Http2));
        }
    }
}

/// Which timeout has passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expired {
    Head,
    Idle,
    Write,
}

/// The timeouts of one connection.
#[derive(Debug)]
pub(crate) struct Monitor(Mutex<Timing>);

#[derive(Debug)]
struct Timing {
    version: HttpVersion,
    /// Requests that are handled, answered or discarded.
    requests: usize,
    idle_since: Instant,
    /// When the first byte of an incomplete HTTP/1.1 head came.
    head_since: Option<Instant>,
    /// Since when the socket takes no byte.
    write_blocked_since: Option<Instant>,
}

/// A request of a connection that has not ended.
#[derive(Debug)]
pub(crate) struct ActiveRequest(Arc<Monitor>);

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        let mut timing = self.0.timing();
        timing.requests -= 1;
        timing.idle_since = Instant::now();
    }
}

impl Monitor {
    /// The connection was just accepted.
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Timing {
            version: HttpVersion::Http1,
            requests: 0,
            idle_since: Instant::now(),
            head_since: None,
            write_blocked_since: None,
        })))
    }

    /// A request's head has arrived. The connection is not idle until the guard is dropped.
    pub(crate) fn request(self: &Arc<Self>) -> ActiveRequest {
        let mut timing = self.timing();
        timing.requests += 1;
        timing.head_since = None;
        ActiveRequest(Arc::clone(self))
    }

    /// The protocol is known, and the first bytes have been read.
    fn begin(&self, version: HttpVersion) {
        let mut timing = self.timing();
        timing.version = version;
        timing.note_read();
    }

    fn set_write_blocked(&self, blocked: bool) {
        self.timing().write_blocked_since = blocked.then(Instant::now);
    }

    fn timing(&self) -> MutexGuard<'_, Timing> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when a timeout has passed.
    async fn expired(&self) -> Expired {
        loop {
            let now = Instant::now();
            let deadline = self.timing().deadline();
            match deadline {
                Some((at, expired)) if at <= now => return expired,
                Some((at, _)) => sleep_until(at.min(now + CHECK_INTERVAL)).await,
                None => sleep(CHECK_INTERVAL).await,
            }
        }
    }
}

impl Timing {
    fn note_read(&mut self) {
        // While a request is active, what is read is its body. HTTP/2 has pings against incomplete heads.
        if self.requests == 0 && self.version == HttpVersion::Http1 && self.head_since.is_none() {
            self.head_since = Some(Instant::now());
        }
    }

    fn deadline(&self) -> Option<(Instant, Expired)> {
        if let Some(since) = self.write_blocked_since {
            return Some((since + WRITE_TIMEOUT, Expired::Write));
        }
        if self.requests > 0 {
            return None;
        }
        Some(match self.head_since {
            Some(since) => (since + HEAD_TIMEOUT, Expired::Head),
            None => (self.idle_since + IDLE_TIMEOUT, Expired::Idle),
        })
    }
}

/// A stream that begins with bytes that were read already, and tells the monitor what happens on it.
struct MonitoredStream<S> {
    prefix: Bytes,
    stream: S,
    monitor: Arc<Monitor>,
    write_blocked: bool,
}

impl<S> MonitoredStream<S> {
    /// Notes whether the socket takes bytes. The monitor is locked on changes only.
    fn note_write<T>(&mut self, outcome: Poll<T>) -> Poll<T> {
        if self.write_blocked != outcome.is_pending() {
            self.write_blocked = outcome.is_pending();
            self.monitor.set_write_blocked(self.write_blocked);
        }
        outcome
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for MonitoredStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.prefix.has_remaining() {
            let length = self.prefix.len().min(buffer.remaining());
            buffer.put_slice(&self.prefix.split_to(length));
            return Poll::Ready(Ok(()));
        }
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        self.monitor.timing().note_read();
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for MonitoredStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.note_write(outcome)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write_vectored(context, pieces);
        self.note_write(outcome)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;
    use tokio::time::advance;

    #[tokio::test]
    async fn the_first_bytes_decide_on_the_protocol() {
        for (text, version) in [
            (&b"GET / HTTP/1.1\r\n\r\n"[..], HttpVersion::Http1),
            (b"POST / HTTP/1.1\r\nhost: a\r\n\r\n", HttpVersion::Http1),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nrest", HttpVersion::Http2),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\rX", HttpVersion::Http1),
        ] {
            // In pieces of every length.
            for split in 1..text.len() {
                let (mut near, mut far) = tokio::io::duplex(1024);
                let (one, two) = text.split_at(split);
                far.write_all(one).await.unwrap();
                far.write_all(two).await.unwrap();
                drop(far);
                let (prefix, found) = read_preface(&mut near).await.unwrap();
                assert_eq!(found, version);
                let mut rest = Vec::new();
                near.read_to_end(&mut rest).await.unwrap();
                assert_eq!([&prefix[..], &rest].concat(), text);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_head_ends_long_before_an_idle_connection() {
        let monitor = Monitor::new();
        let started = Instant::now();
        assert_eq!(monitor.expired().await, Expired::Idle);
        assert_eq!(started.elapsed(), IDLE_TIMEOUT);
        // Longer than load balancers keep an idle connection.
        assert!(IDLE_TIMEOUT > Duration::from_secs(600));

        let monitor = Monitor::new();
        drop(monitor.request());
        advance(Duration::from_secs(100)).await;
        monitor.timing().note_read();
        let started = Instant::now();
        advance(Duration::from_secs(8)).await;
        monitor.timing().note_read();
        assert_eq!(monitor.expired().await, Expired::Head);
        assert_eq!(started.elapsed(), HEAD_TIMEOUT);
    }

    #[tokio::test(start_paused = true)]
    async fn an_active_request_has_no_idle_or_head_timeout() {
        let monitor = Monitor::new();
        let request = monitor.request();
        monitor.timing().note_read();
        assert!(timeout(IDLE_TIMEOUT * 2, monitor.expired()).await.is_err());
        drop(request);
        let started = Instant::now();
        assert_eq!(monitor.expired().await, Expired::Idle);
        assert_eq!(started.elapsed(), IDLE_TIMEOUT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_takes_no_byte_is_cut() {
        let (near, far) = tokio::io::duplex(16);
        let monitor = Monitor::new();
        let _request = monitor.request();
        let mut stream = MonitoredStream {
            prefix: Bytes::new(),
            stream: near,
            monitor: Arc::clone(&monitor),
            write_blocked: false,
        };
        let started = Instant::now();
        tokio::select! {
            _written = stream.write_all(&[0; 100]) => panic!("the caller took the bytes"),
            expired = monitor.expired() => assert_eq!(expired, Expired::Write),
        }
        assert_eq!(started.elapsed(), WRITE_TIMEOUT);
        drop(far);
    }
}
