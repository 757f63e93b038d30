//! HTTP/2 connections to one port of one pod.
//!
//! Requests share a connection as streams. There is one connection for each thread of the runtime as soon as
//! that many requests run, so that the threads do not queue for the lock of one connection, and a further one
//! only while all are full, so that no request waits in a hidden queue. Each request takes the connection
//! with the fewest streams.
//!
//! A request looks at the connections without a lock: they are a snapshot, which is replaced when one is
//! added or dropped. The pool never closes a connection that carries a stream: it drops its handle, and the
//! connection ends by itself after its last stream. An endpoint that left the table is drained in the same
//! way.

use std::error::Error as _;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use http::Response;
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::call::{Outgoing, OutgoingBody};

/// Pods are in the same network, where a connection takes milliseconds.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Streams on one connection before another is opened. RFC 9113 asks servers to allow no fewer than 100.
const STREAMS_PER_CONNECTION: usize = 100;
/// The most connections that are opened for the sake of threads. Each costs the pod some 20 KiB, and there
/// may be several gateways.
const MOST_FOR_THREADS: usize = 16;
/// A further connection that carried no stream for this long is dropped.
const IDLE_LIMIT: Duration = Duration::from_secs(60);
/// Connections are looked through for idle and closed ones this often at most.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);
/// A pod that answers no ping for this long is gone, for instance because its node lost power: its streams
/// end with an error instead of waiting for ever.
const PING_TIMEOUT: Duration = Duration::from_secs(5);
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// Bytes of one answer that wait here for a slow caller; `limits` has the sum. Inside a cluster, with round
/// trips of 0.5 ms, a stream still reaches 16 MiB/s.
pub(crate) const STREAM_WINDOW_BYTES: u32 = 8 * 1024;
/// The longest frame; it is the default of HTTP/2. The window above keeps the frames of answers shorter.
const FRAME_BYTES: u32 = 16 * 1024;
/// Bytes of one upload that wait here for a slow pod, beside the body itself.
const UPLOAD_BUFFER_BYTES: usize = 64 * 1024;
/// So large that the streams of slow callers do not delay the others on their connection.
const CONNECTION_WINDOW_BYTES: u32 = (1 << 31) - 1;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// The pod's node or process refused, or nothing answers there.
    #[error("{address}: {cause}")]
    Refused { address: SocketAddr, cause: std::io::Error },
    /// The connection was not made in time.
    #[error("{address}: no connection within {} ms", CONNECT_TIMEOUT.as_millis())]
    Timeout { address: SocketAddr },
    /// The other side does not speak HTTP as it should.
    #[error("{address}: HTTP could not be started: {cause}")]
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
    /// The stream ended first; its connection is there, so the pod lives.
    #[error("the pod reset the request: {0}")]
    Reset(hyper::Error),
    /// The connection ended first, perhaps because the request ended the pod.
    #[error("the connection ended before an answer: {0}")]
    Lost(hyper::Error),
    /// The rest of a live body was taken by an earlier attempt.
    #[error("what the caller uploads was sent to another pod")]
    BodyUsed,
}

/// The head of an answer, and its stream.
#[derive(Debug)]
pub(crate) struct PodResponse {
    /// The answer.
    pub(crate) response: Response<Incoming>,
    /// The stream that it comes on.
    pub(crate) permit: StreamPermit,
}

#[derive(Debug, Default)]
struct Usage {
    streams: AtomicUsize,
    /// Set when the pod accepts no further streams.
    exhausted: AtomicBool,
    /// When the last stream began, in milliseconds since the pool was made.
    used_at_ms: AtomicU64,
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
    sender: SendRequest<OutgoingBody>,
    usage: Arc<Usage>,
}

#[derive(Debug)]
struct Lease {
    sender: SendRequest<OutgoingBody>,
    permit: StreamPermit,
}

/// The connections to one address.
#[derive(Debug)]
pub(crate) struct Pool(Arc<PoolState>);

#[derive(Debug)]
struct PoolState {
    address: SocketAddr,
    created: Instant,
    /// Read by every request; replaced under `changing`.
    connections: ArcSwap<Vec<Arc<Connection>>>,
    changing: Mutex<()>,
    /// When connections were looked through last, in milliseconds since the pool was made.
    swept_at_ms: AtomicU64,
    /// One request dials, the others wait for the result.
    dialing: Arc<tokio::sync::Mutex<()>>,
    failed_dials: AtomicU64,
}

/// What a look at the connections gives.
struct Found {
    /// The connection with the fewest streams.
    lease: Option<Lease>,
    /// Whether one more would serve the next requests better.
    wants_more: bool,
}

impl Pool {
    /// Opens nothing yet.
    pub(crate) fn new(address: SocketAddr) -> Self {
        Self(Arc::new(PoolState {
            address,
            created: Instant::now(),
            connections: ArcSwap::default(),
            changing: Mutex::default(),
            swept_at_ms: AtomicU64::new(0),
            dialing: Arc::default(),
            failed_dials: AtomicU64::new(0),
        }))
    }

    /// Sends a request and waits for the head of the answer. A request that an ending connection certainly
    /// did not process is sent once more on a new one; the pod has seen no attempt of it.
    pub(crate) async fn send(&self, make: impl Fn() -> Option<Outgoing>) -> Result<PodResponse, SendError> {
        let mut lease = self.0.lease().await?;
        let unsent = match lease.sender.try_send_request(make().ok_or(SendError::BodyUsed)?).await {
            Ok(response) => return Ok(PodResponse { response, permit: lease.permit }),
            Err(mut error) => {
                let unsent = error.take_message();
                let error = error.into_error();
                if unsent.is_none() && !was_not_processed(&error) {
                    return Err(broken_off(error));
                }
                lease.permit.0.exhausted.store(true, Ordering::Release);
                unsent
            }
        };
        self.0.sweep();
        let mut lease = self.0.lease().await?;
        let request = unsent.or_else(make).ok_or(SendError::BodyUsed)?;
        match lease.sender.send_request(request).await {
            Ok(response) => Ok(PodResponse { response, permit: lease.permit }),
            Err(error) => Err(broken_off(error)),
        }
    }
}

/// How many connections serve the threads of the runtime.
fn wanted_connections() -> usize {
    tokio::runtime::Handle::current().metrics().num_workers().clamp(1, MOST_FOR_THREADS)
}

impl PoolState {
    fn now_ms(&self) -> u64 {
        u64::try_from(self.created.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    async fn lease(self: &Arc<Self>) -> Result<Lease, ConnectError> {
        let found = self.find();
        if let Some(lease) = found.lease {
            if found.wants_more {
                self.grow();
            }
            return Ok(lease);
        }
        let failed_before = self.failed_dials.load(Ordering::Acquire);
        let _dialing = self.dialing.lock().await;
        if let Some(lease) = self.find().lease {
            return Ok(lease);
        }
        if self.failed_dials.load(Ordering::Acquire) != failed_before {
            // If every waiter dialed again, the last one would wait for all timeouts in a row.
            return Err(ConnectError::JustFailed { address: self.address });
        }
        let connection = self.dial().await?;
        let lease = connection.lease(self.now_ms());
        self.add(connection);
        Ok(lease)
    }

    /// Opens one more connection in the background. The present request does not wait for it.
    fn grow(self: &Arc<Self>) {
        // Whoever dials already makes this unnecessary.
        let Ok(dialing) = Arc::clone(&self.dialing).try_lock_owned() else { return };
        let pool = Arc::clone(self);
        tokio::spawn(async move {
            let _dialing = dialing;
            if !pool.find_room().wants_more {
                return;
            }
            match pool.dial().await {
                Ok(connection) => pool.add(connection),
                Err(error) => tracing::debug!(%error, "no further connection to a pod"),
            }
        });
    }

    /// A stream on the open connection with the fewest.
    fn find(&self) -> Found {
        let now_ms = self.now_ms();
        let swept_at_ms = self.swept_at_ms.load(Ordering::Relaxed);
        if now_ms - swept_at_ms.min(now_ms) >= u64::try_from(SWEEP_INTERVAL.as_millis()).unwrap_or(u64::MAX) {
            self.sweep();
        }
        let Room { least, wants_more, .. } = self.find_room();
        Found { lease: least.map(|connection| connection.lease(now_ms)), wants_more }
    }

    fn find_room(&self) -> Room {
        let connections = self.connections.load();
        let mut room = Room { least: None, streams: usize::MAX, wants_more: false };
        let mut open = 0;
        for connection in connections.iter().filter(|connection| connection.is_open()) {
            open += 1;
            let streams = connection.usage.streams.load(Ordering::Acquire);
            if streams < room.streams {
                room.streams = streams;
                room.least = Some(Arc::clone(connection));
            }
        }
        if room.streams >= STREAMS_PER_CONNECTION {
            room.least = None;
        }
        room.wants_more = open < wanted_connections() && room.streams > 0;
        room
    }

    /// Drops connections that are closed, and further ones that are idle.
    fn sweep(&self) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let now_ms = self.now_ms();
        self.swept_at_ms.store(now_ms, Ordering::Relaxed);
        let idle_ms = u64::try_from(IDLE_LIMIT.as_millis()).unwrap_or(u64::MAX);
        let before = self.connections.load();
        let mut kept: Vec<Arc<Connection>> = Vec::with_capacity(before.len());
        for connection in before.iter().filter(|connection| connection.is_open()) {
            let usage = &connection.usage;
            let idle = usage.streams.load(Ordering::Acquire) == 0
                && now_ms.saturating_sub(usage.used_at_ms.load(Ordering::Relaxed)) >= idle_ms;
            if kept.is_empty() || !idle {
                kept.push(Arc::clone(connection));
            }
        }
        if kept.len() < before.len() {
            self.connections.store(Arc::new(kept));
        }
    }

    fn add(&self, connection: Connection) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.connections.load();
        let open = before.iter().filter(|connection| connection.is_open()).cloned();
        let connections: Vec<_> = open.chain([Arc::new(connection)]).collect();
        self.connections.store(Arc::new(connections));
    }

    async fn dial(&self) -> Result<Connection, ConnectError> {
        let dialed = self.handshake().await;
        if dialed.is_err() {
            self.failed_dials.fetch_add(1, Ordering::AcqRel);
        }
        dialed
    }

    async fn handshake(&self) -> Result<Connection, ConnectError> {
        let address = self.address;
        let stream = connect(address).await?;
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES)
            .max_send_buf_size(UPLOAD_BUFFER_BYTES)
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
        Ok(Connection { sender, usage: Arc::default() })
    }
}

/// What the connections have room for.
struct Room {
    /// The one with the fewest streams, where it has room.
    least: Option<Arc<Connection>>,
    /// Streams of that one.
    streams: usize,
    /// Whether there are fewer connections than threads, and all of them are used.
    wants_more: bool,
}

/// Connects to a pod.
///
/// # Errors
/// It refuses, or does not answer in time.
pub(crate) async fn connect(address: SocketAddr) -> Result<TcpStream, ConnectError> {
    let stream = match tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(cause)) => return Err(ConnectError::Refused { address, cause }),
        Err(_elapsed) => return Err(ConnectError::Timeout { address }),
    };
    // A token is a small write that must not wait for the next one.
    stream.set_nodelay(true).map_err(|cause| ConnectError::Refused { address, cause })?;
    Ok(stream)
}

impl Connection {
    fn is_open(&self) -> bool {
        !self.sender.is_closed() && !self.usage.exhausted.load(Ordering::Acquire)
    }

    fn lease(&self, now_ms: u64) -> Lease {
        self.usage.streams.fetch_add(1, Ordering::AcqRel);
        self.usage.used_at_ms.store(now_ms, Ordering::Relaxed);
        Lease { sender: self.sender.clone(), permit: StreamPermit(Arc::clone(&self.usage)) }
    }
}

/// What a request without an answer says of its pod.
fn broken_off(error: hyper::Error) -> SendError {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<h2::Error>());
    let pod_lives = cause.is_some_and(h2::Error::is_reset) || was_not_processed(&error);
    if pod_lives { SendError::Reset(error) } else { SendError::Lost(error) }
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
