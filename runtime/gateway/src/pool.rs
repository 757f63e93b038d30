//! HTTP/2 connections to one port of one pod.
//!
//! Requests share a connection as streams; another connection is opened only while all are full, so that no
//! request waits in a hidden queue. The pool never closes a connection that carries a stream: it drops its
//! handle, and the connection ends by itself after its last stream. An endpoint that left the table is
//! drained in the same way.

use std::error::Error as _;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::time::Instant;

/// Pods are in the same network, where a connection takes milliseconds.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Streams on one connection before another is opened. RFC 9113 asks servers to allow no fewer than 100.
const STREAMS_PER_CONNECTION: usize = 100;
/// A further connection that carried no stream for this long is dropped.
const IDLE_LIMIT: Duration = Duration::from_secs(60);
/// A pod that answers no ping for this long is gone, for instance because its node lost power: its streams
/// end with an error instead of waiting for ever.
const PING_TIMEOUT: Duration = Duration::from_secs(5);
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// Bytes of one answer that wait here for a slow caller; `limits` has the sum. Inside a cluster, with round
/// trips of 0.5 ms, a stream still reaches 32 MiB/s.
pub(crate) const STREAM_WINDOW_BYTES: u32 = 16 * 1024;
/// The longest frame of an answer; it is the default of HTTP/2.
pub(crate) const FRAME_BYTES: u32 = 16 * 1024;
/// So large that the streams of slow callers do not delay the others on their connection.
const CONNECTION_WINDOW_BYTES: u32 = (1 << 31) - 1;

/// What is sent: a request whose body is buffered in full, so that it can be sent again.
pub(crate) type Outgoing = Request<Full<Bytes>>;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// The pod's node or process refused, or nothing answers there.
    #[error("{address}: {cause}")]
    Refused { address: SocketAddr, cause: std::io::Error },
    /// The connection was not made in time.
    #[error("{address}: no connection within {} ms", CONNECT_TIMEOUT.as_millis())]
    Timeout { address: SocketAddr },
    /// The other side does not speak HTTP/2.
    #[error("{address}: HTTP/2 could not be started: {cause}")]
    Handshake { address: SocketAddr, cause: hyper::Error },
    /// Another request dialed while this one waited, and failed.
    #[error("{address}: connecting has just failed")]
    JustFailed { address: SocketAddr },
}

/// Why no head of an answer arrived.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    /// There is no connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The connection or the stream ended first.
    #[error("the connection ended before an answer: {0}")]
    Reset(hyper::Error),
}

#[derive(Debug, Default)]
struct Usage {
    streams: AtomicUsize,
    /// Set when the pod accepts no further streams.
    exhausted: AtomicBool,
}

/// One stream of a connection, counted until the answer's body has ended.
#[derive(Debug)]
pub(crate) struct StreamPermit(Arc<Usage>);

impl Drop for StreamPermit {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::AcqRel);
    }
}

#[derive(Debug)]
struct Connection {
    sender: SendRequest<Full<Bytes>>,
    usage: Arc<Usage>,
    used_at: Instant,
}

#[derive(Debug)]
struct Lease {
    sender: SendRequest<Full<Bytes>>,
    permit: StreamPermit,
}

/// The connections to one address.
#[derive(Debug)]
pub(crate) struct Pool {
    address: SocketAddr,
    connections: Mutex<Vec<Connection>>,
    /// One request dials, the others wait for the result.
    dialing: tokio::sync::Mutex<()>,
    failed_dials: AtomicU64,
}

impl Pool {
    /// Opens nothing yet.
    pub(crate) fn new(address: SocketAddr) -> Self {
        Self {
            address,
            connections: Mutex::default(),
            dialing: tokio::sync::Mutex::default(),
            failed_dials: AtomicU64::new(0),
        }
    }

    /// Sends a request and waits for the head of the answer. A request that an ending connection certainly
    /// did not process is sent once more on a new one; the pod has seen no attempt of it.
    pub(crate) async fn send(
        &self,
        make: impl Fn() -> Outgoing,
    ) -> Result<(Response<Incoming>, StreamPermit), SendError> {
        let mut lease = self.lease().await?;
        match lease.sender.try_send_request(make()).await {
            Ok(response) => return Ok((response, lease.permit)),
            Err(mut error) => {
                let returned = error.take_message().is_some();
                let error = error.into_error();
                if !(returned || was_not_processed(&error)) {
                    return Err(SendError::Reset(error));
                }
                lease.permit.0.exhausted.store(true, Ordering::Release);
            }
        }
        let mut lease = self.lease().await?;
        match lease.sender.send_request(make()).await {
            Ok(response) => Ok((response, lease.permit)),
            Err(error) => Err(SendError::Reset(error)),
        }
    }

    async fn lease(&self) -> Result<Lease, ConnectError> {
        if let Some(lease) = self.open_lease() {
            return Ok(lease);
        }
        let failed_before = self.failed_dials.load(Ordering::Acquire);
        let _dialing = self.dialing.lock().await;
        if let Some(lease) = self.open_lease() {
            return Ok(lease);
        }
        if self.failed_dials.load(Ordering::Acquire) != failed_before {
            // If every waiter dialed again, the last one would wait for all timeouts in a row.
            return Err(ConnectError::JustFailed { address: self.address });
        }
        match self.dial().await {
            Ok(connection) => Ok(self.add(connection)),
            Err(error) => {
                self.failed_dials.fetch_add(1, Ordering::AcqRel);
                Err(error)
            }
        }
    }

    /// A stream on an open connection. The first with room is used, so that the further ones become idle.
    fn open_lease(&self) -> Option<Lease> {
        let now = Instant::now();
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        let mut first = true;
        connections.retain(|connection| {
            let closed = connection.sender.is_closed() || connection.usage.exhausted.load(Ordering::Acquire);
            let idle = connection.usage.streams.load(Ordering::Acquire) == 0;
            let keep = !closed && (first || !idle || now - connection.used_at < IDLE_LIMIT);
            first &= !keep;
            keep
        });
        let connection = connections
            .iter_mut()
            .find(|connection| connection.usage.streams.load(Ordering::Acquire) < STREAMS_PER_CONNECTION)?;
        connection.used_at = now;
        Some(connection.lease())
    }

    fn add(&self, connection: Connection) -> Lease {
        let lease = connection.lease();
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        lease
    }

    async fn dial(&self) -> Result<Connection, ConnectError> {
        let address = self.address;
        let stream = match tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(cause)) => return Err(ConnectError::Refused { address, cause }),
            Err(_elapsed) => return Err(ConnectError::Timeout { address }),
        };
        // A token is a small write that must not wait for the next one.
        stream.set_nodelay(true).map_err(|cause| ConnectError::Refused { address, cause })?;
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|cause| ConnectError::Handshake { address, cause })?;
        // Ends by itself once the pool has dropped the sender and the last stream has ended, or the pod has
        // closed it.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%address, %error, "a connection to a pod ended");
            }
        });
        Ok(Connection { sender, usage: Arc::default(), used_at: Instant::now() })
    }
}

impl Connection {
    fn lease(&self) -> Lease {
        self.usage.streams.fetch_add(1, Ordering::AcqRel);
        Lease { sender: self.sender.clone(), permit: StreamPermit(Arc::clone(&self.usage)) }
    }
}

/// Whether the pod has declared that it did not process this stream: it refused the stream, or its GOAWAY
/// names an earlier stream as the last.
fn was_not_processed(error: &hyper::Error) -> bool {
    if error.is_canceled() {
        return true;
    }
    let Some(cause) = error.source().and_then(|cause| cause.downcast_ref::<h2::Error>()) else {
        return false;
    };
    let reason = cause.reason();
    reason == Some(h2::Reason::REFUSED_STREAM)
        || (cause.is_go_away() && cause.is_remote() && reason == Some(h2::Reason::NO_ERROR))
}
