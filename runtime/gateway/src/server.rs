//! Listeners, connections, and the way out.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Endpoint;

use crate::config::Settings;
use crate::dice::Dice;
use crate::disk::{TableFile, TableFileError};
use crate::drain::Drain;
use crate::feed::{FeedSettings, follow};
use crate::gateway::{EncodedTable, Gateway, Source, Taken};
use crate::grpc::Services;
use crate::metrics::Metrics;
use crate::stack::Stack;

/// Requests that one caller may have open on one connection. A caller that is another proxy sends everything over
/// one; memory is bounded by the bodies' budget and not by this.
const STREAMS_PER_CONNECTION: u32 = 2048;
/// A caller that answers no ping is gone, and its work is to be stopped.
const PING_INTERVAL: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// An HTTP/1.1 head must have come in this time, counted from the answer before it.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// When the system has no file descriptors left, accepting pauses instead of spinning.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// HTTP/2 callers are sent away this long after the gateway began to leave, or after they came while it was leaving:
/// by then load balancers have a chance to know, and the caller's first request is on its way.
const GOAWAY_AFTER: Duration = Duration::from_secs(1);
/// After the last answer, connections have this long to say goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

/// Why a gateway could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A port can't be taken.
    #[error("{flag} {address}: {cause}")]
    Listen {
        /// Which flag gave the address.
        flag: &'static str,
        /// The address.
        address: SocketAddr,
        /// What the system said.
        cause: io::Error,
    },
    /// The state folder can't be used.
    #[error("--state-dir: {0}")]
    StateDir(#[from] TableFileError),
    /// The feed's address can't be used.
    #[error("--feed: {0}")]
    Feed(#[from] tonic::transport::Error),
    /// Two figures share a name, which the tests rule out.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The registry could not be made.
    #[error(transparent)]
    Registry(#[from] trustformers_telemetry::metrics::MetricsError),
    /// The descriptors that were compiled in can't be read.
    #[error("gRPC reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// A gateway that is running.
#[derive(Debug)]
pub struct Running {
    gateway: Arc<Gateway>,
    http_address: SocketAddr,
    grpc_address: SocketAddr,
    drain_timeout: Duration,
    /// Stops accepting, the feed and watches.
    stop: CancellationToken,
    connections: TaskTracker,
    background: TaskTracker,
}

/// Starts a gateway: loads the kept table, listens, follows the feed. It serves until [`Running::finish`].
///
/// # Errors
/// Names the flag that can't be honoured.
pub async fn start(settings: Settings) -> Result<Running, StartError> {
    let file = TableFile::in_folder(&settings.state_dir)?;
    let endpoint = Endpoint::new(settings.feed.clone())?;
    let registry =
        trustformers_telemetry::metrics::new_registry("trustformers-gateway", env!("CARGO_PKG_VERSION"))?;
    let gateway = Gateway::new(Metrics::new(registry)?, Dice::random(), settings.body_limit_bytes);
    // Before the listeners, so that the first request finds the table.
    resume(&gateway, &file);

    let http = listen("--http-address", settings.http_address).await?;
    let grpc = listen("--grpc-address", settings.grpc_address).await?;
    let stop = CancellationToken::new();
    let stack = Stack::new(Arc::clone(&gateway), Services::new(&gateway, &stop)?);
    let running = Running {
        http_address: http.1,
        grpc_address: grpc.1,
        drain_timeout: settings.drain_timeout,
        gateway,
        stop,
        connections: TaskTracker::new(),
        background: TaskTracker::new(),
    };
    let Running { gateway, stop, connections, background, .. } = &running;
    let instance = settings.instance.unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
    let feed = FeedSettings { endpoint, token_file: settings.feed_token_file, instance };
    background.spawn(follow(feed, Arc::clone(gateway), stop.clone()));
    background.spawn(keep(gateway.watch_fresh(), file, stop.clone()));
    for listener in [http.0, grpc.0] {
        let door = Door { stack: stack.clone(), drain: Arc::clone(&gateway.drain), stop: stop.clone() };
        background.spawn(accept(listener, door, connections.clone()));
    }
    tracing::info!(http = %running.http_address, grpc = %running.grpc_address, "listening");
    Ok(running)
}

impl Running {
    /// Where HTTP is taken; tells the port where the system chose it.
    #[must_use]
    pub fn http_address(&self) -> SocketAddr {
        self.http_address
    }

    /// Where gRPC is taken.
    #[must_use]
    pub fn grpc_address(&self) -> SocketAddr {
        self.grpc_address
    }

    /// Begins to leave: readiness and reports say so, requests are still answered.
    pub fn leave(&self) {
        self.gateway.leave();
    }

    /// Leaves and ends: goes on until no request has come for five seconds, lets those in flight end, closes. Returns
    /// the number of requests that were cut because the drain timeout had passed.
    pub async fn finish(self) -> usize {
        self.leave();
        let now = Instant::now();
        let deadline = now + self.drain_timeout;
        // Where callers never stop coming, half of the time is left for those who came last to get their answers.
        self.gateway.drain.quiet(now + self.drain_timeout / 2).await;
        self.stop.cancel();
        self.gateway.drain.idle(deadline).await;
        let cut = self.gateway.drain.in_flight();
        if cut > 0 {
            tracing::warn!(cut, "the drain timeout has passed; requests are cut");
        }
        self.connections.close();
        self.background.close();
        let goodbye = Instant::now() + GOODBYE;
        // Whoever has not hung up by then keeps an idle connection only, or is cut.
        let _late = timeout_at(goodbye, self.connections.wait()).await;
        let _late = timeout_at(goodbye, self.background.wait()).await;
        cut
    }
}

/// Serves from the kept table until the operator sends a newer one.
fn resume(gateway: &Gateway, file: &TableFile) {
    match file.load() {
        Ok(Some(kept)) => match gateway.take(kept.table, Source::Disk(kept.written_at)) {
            Ok(Taken::InForce(version)) => {
                tracing::info!(%version, file = %file.path().display(), "the kept routing table is in force");
            }
            Ok(Taken::Same(version) | Taken::Stale { offered: version, .. }) => {
                tracing::warn!(%version, file = %file.path().display(), "the kept routing table is not newer; ignored");
            }
            Err(error) => {
                tracing::error!(%error, file = %file.path().display(), "the kept routing table is ignored");
            }
        },
        Ok(None) => tracing::info!(file = %file.path().display(), "no routing table is kept yet"),
        Err(error) => tracing::error!(%error, "the kept routing table is ignored"),
    }
}

/// Writes tables to disk as they come, the newest alone if they come faster than the disk takes them.
async fn keep(
    mut fresh: tokio::sync::watch::Receiver<EncodedTable>,
    file: TableFile,
    stop: CancellationToken,
) {
    loop {
        tokio::select! {
            // A table that came just before the end is still written.
            biased;
            changed = fresh.changed() => if changed.is_err() { return },
            () = stop.cancelled() => return,
        }
        let Some(encoded) = fresh.borrow_and_update().clone() else { continue };
        let file = file.clone();
        let saved = tokio::task::spawn_blocking(move || file.save(&encoded)).await;
        match saved {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "the routing table could not be kept"),
            Err(error) => tracing::error!(%error, "writing the routing table was interrupted"),
        }
    }
}

async fn listen(flag: &'static str, address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let wrong = |cause| StartError::Listen { flag, address, cause };
    let listener = trustformers_api::server::bind(address).await.map_err(wrong)?;
    let bound = listener.local_addr().map_err(wrong)?;
    Ok((listener, bound))
}

/// What a connection needs.
#[derive(Clone)]
struct Door {
    stack: Stack,
    drain: Arc<Drain>,
    stop: CancellationToken,
}

async fn accept(listener: TcpListener, door: Door, connections: TaskTracker) {
    loop {
        let accepted = tokio::select! {
            () = door.stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, caller)) => {
                connections.spawn(serve(stream, caller, door.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve(stream: TcpStream, caller: SocketAddr, door: Door) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%caller, %error, "the connection is gone already");
        return;
    }
    let speaks_http2 = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&speaks_http2);
    let stack = door.stack.clone();
    let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
        if request.version() == http::Version::HTTP_2 {
            seen.store(true, Ordering::Relaxed);
        }
        let stack = stack.clone();
        async move { Ok::<_, std::convert::Infallible>(stack.handle(caller.ip(), request).await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_PER_CONNECTION)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let outcome = tokio::select! {
        outcome = connection.as_mut() => outcome,
        () = time_to_go(&door, &speaks_http2) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(%caller, %error, "a caller's connection ended");
    }
}

/// Returns when a connection is to be told to end. HTTP/1.1 callers learn it from `Connection: close` on their next
/// answer, so their idle connections are left alone until the very end: closing one would race with a request.
async fn time_to_go(door: &Door, speaks_http2: &AtomicBool) {
    let sent_away = async {
        door.drain.left().await;
        loop {
            sleep(GOAWAY_AFTER).await;
            if speaks_http2.load(Ordering::Relaxed) {
                return;
            }
        }
    };
    tokio::select! {
        () = door.stop.cancelled() => {}
        () = sent_away => {}
    }
}
