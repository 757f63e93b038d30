//! Start and end of a gateway.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Endpoint;
use trustformers_telemetry::traces::{TraceError, Traces};

use crate::config::Settings;
use crate::connection::ConnectionContext;
use crate::disk::{TableFile, TableFileError};
use crate::feed::{FeedSettings, follow};
use crate::gateway::{EncodedTable, Gateway, GatewayParts, Source, TableOutcome};
use crate::health;
use crate::hold::Hold;
use crate::listener::{Acceptor, Reserve};
use crate::metrics::Metrics;
use crate::services::Services;
use crate::shadow::{self, Shadows};
use crate::stack::Stack;
use crate::table::TableError;

/// At the end, connections have at least this long to close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Why a gateway could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A port can't be used.
    #[error("{setting} {address}: {cause}")]
    Listen {
        /// The flag or the key with the address.
        setting: &'static str,
        /// The address.
        address: SocketAddr,
        /// The error of the system.
        cause: io::Error,
    },
    /// The state folder can't be used.
    #[error("--state-dir: {0}")]
    StateDir(#[from] TableFileError),
    /// The feed's address can't be used.
    #[error("--feed: {0}")]
    Feed(#[from] tonic::transport::Error),
    /// Two metrics have one name, which the tests rule out.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The registry could not be created.
    #[error(transparent)]
    Registry(#[from] trustformers_telemetry::metrics::MetricsError),
    /// Nothing can be traced.
    #[error(transparent)]
    Traces(#[from] TraceError),
    /// The first table of a gateway inside another program can't be used.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The embedded descriptors can't be read.
    #[error(transparent)]
    Reflection(#[from] trustformers_api::grpc::ReflectionError),
}

/// A gateway that is running.
#[derive(Debug)]
pub struct Running {
    gateway: Arc<Gateway>,
    http_address: SocketAddr,
    grpc_address: SocketAddr,
    ending: Ending,
    /// Ends accepting and watches.
    stop: CancellationToken,
    /// Ends the feed, with a last report.
    stop_feed: CancellationToken,
    connections: TaskTracker,
    background: TaskTracker,
}

/// Starts a gateway: loads the saved table, listens, follows the feed. It serves until [`Running::finish`].
///
/// # Errors
/// Names the flag that can't be used.
pub async fn start(settings: Settings) -> Result<Running, StartError> {
    let file = TableFile::in_folder(&settings.state_dir)?;
    let endpoint = Endpoint::new(settings.feed.clone())?;
    let registry =
        trustformers_telemetry::metrics::new_registry("trustformers-gateway", env!("CARGO_PKG_VERSION"))?;
    let gateway = Gateway::with(GatewayParts {
        hold: Hold::new(&registry)?,
        shadows: Shadows::new(&registry)?,
        metrics: Metrics::new(registry)?,
        body_limit_bytes: settings.body_limit_bytes,
        trusted: settings.trusted_headers(),
        traces: Traces::start_where(settings.traces.options("trustformers-gateway")?.as_ref())?,
        embedded: false,
    });
    if let Some(fault) = settings.fault {
        tracing::warn!(%fault, "this gateway divides users WRONGLY, as --fault says: A/B tests through it are invalid");
        gateway.metrics.variants.skew_split(fault);
    }
    // Before the listeners, so that the table is there for the first request.
    resume(&gateway, &file);

    let listen = Listen {
        http: ListenAddress { setting: "--http-address", address: settings.http_address },
        grpc: ListenAddress { setting: "--grpc-address", address: settings.grpc_address },
    };
    let ending = Ending { drain_timeout: settings.drain_timeout, waits_for_quiet: true };
    let running = serve(gateway, listen, ending).await?;
    let Running { gateway, stop, stop_feed, background, .. } = &running;
    let instance = settings.instance.unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
    let feed = FeedSettings { endpoint, token_file: settings.feed_token_file, instance };
    background.spawn(follow(feed, Arc::clone(gateway), stop_feed.clone()));
    background.spawn(save_tables(gateway.watch_tables_to_save(), file, stop.clone()));
    Ok(running)
}

/// Where a gateway listens.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Listen {
    /// HTTP.
    pub(crate) http: ListenAddress,
    /// gRPC.
    pub(crate) grpc: ListenAddress,
}

/// An address, and the flag or key that it comes from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ListenAddress {
    /// The name of the setting, for errors.
    pub(crate) setting: &'static str,
    /// The address.
    pub(crate) address: SocketAddr,
}

/// How a gateway ends.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ending {
    /// The longest drain.
    pub(crate) drain_timeout: Duration,
    /// Whether requests are accepted until none has come for a while, as those of a load balancer that has
    /// not learned of the end yet.
    pub(crate) waits_for_quiet: bool,
}

/// Listens and serves with a gateway whose tables come from elsewhere.
///
/// # Errors
/// Names the setting that can't be used.
pub(crate) async fn serve(
    gateway: Arc<Gateway>,
    listen: Listen,
    ending: Ending,
) -> Result<Running, StartError> {
    let (http, grpc) = (bind(listen.http).await?, bind(listen.grpc).await?);
    let stop = CancellationToken::new();
    let stack = Stack::new(Arc::clone(&gateway), Services::new(&gateway, &stop)?);
    let running = Running {
        http_address: http.address,
        grpc_address: grpc.address,
        ending,
        gateway,
        stop,
        stop_feed: CancellationToken::new(),
        connections: TaskTracker::new(),
        background: TaskTracker::new(),
    };
    let Running { gateway, stop, connections, background, .. } = &running;
    background.spawn(health::run(Arc::clone(gateway), stop.clone()));
    background.spawn(shadow::run(Arc::clone(gateway), stop.clone()));
    let acceptor = Acceptor {
        context: ConnectionContext { stack, drain: Arc::clone(&gateway.drain), stop: stop.clone() },
        limits: Arc::clone(&gateway.limits),
        reserve: Arc::new(Reserve::default()),
        connections: connections.clone(),
    };
    for bound in [http, grpc] {
        background.spawn(acceptor.clone().run(bound.listener));
    }
    let bound_mib = crate::limits::WORST_BYTES >> 20;
    tracing::info!(
        http = %running.http_address,
        grpc = %running.grpc_address,
        bound_mib,
        "listening"
    );
    Ok(running)
}

impl Running {
    /// The address for HTTP, with the port that the system chose where the flag has port 0.
    #[must_use]
    pub fn http_address(&self) -> SocketAddr {
        self.http_address
    }

    /// The address for gRPC.
    #[must_use]
    pub fn grpc_address(&self) -> SocketAddr {
        self.grpc_address
    }

    /// The state that all requests share.
    pub(crate) fn gateway(&self) -> &Arc<Gateway> {
        &self.gateway
    }

    /// Begins the drain: readiness and reports change, requests are still answered.
    pub fn start_drain(&self) {
        self.gateway.start_drain();
    }

    /// Drains and ends: accepts until no request has come for five seconds, waits for those in flight,
    /// closes. Returns the number of requests that were cut because the drain timeout had passed.
    pub async fn finish(self) -> usize {
        self.start_drain();
        let now = Instant::now();
        let Ending { drain_timeout, waits_for_quiet } = self.ending;
        let deadline = now + drain_timeout;
        if waits_for_quiet {
            // Where requests never stop coming, half of the time is left for the last ones to get their
            // answers.
            self.gateway.drain.quiet(now + drain_timeout / 2).await;
        }
        self.gateway.drain.close();
        self.stop.cancel();
        self.gateway.drain.idle(deadline).await;
        let cut = self.gateway.drain.in_flight();
        if cut > 0 {
            tracing::warn!(cut, "the drain timeout has passed; requests are cut");
        }
        self.connections.close();
        // A request has left the count when its last frame is in a send buffer. The connection ends once a
        // slow caller has read it, so the rest of the drain timeout is for that.
        let close_by = deadline.max(Instant::now() + CLOSE_TIMEOUT);
        let _late = timeout_at(close_by, self.connections.wait()).await;
        // The last report has what the last requests counted.
        self.stop_feed.cancel();
        self.background.close();
        let _late = timeout(CLOSE_TIMEOUT, self.background.wait()).await;
        self.gateway.traces.shutdown().await;
        cut
    }
}

/// Applies the saved table, which serves until the operator sends a newer one.
fn resume(gateway: &Gateway, file: &TableFile) {
    let path = file.path().display();
    match file.load() {
        Ok(Some(saved)) => match gateway.apply(saved.table, Source::Disk(saved.written_at)) {
            Ok(TableOutcome::InForce(version)) => {
                tracing::info!(%version, file = %path, "the saved routing table is in force");
            }
            Ok(TableOutcome::Same(version) | TableOutcome::Stale { offered: version, .. }) => {
                tracing::warn!(%version, file = %path, "the saved routing table is not newer and is ignored");
            }
            Err(error) => {
                tracing::error!(%error, file = %path, "the saved routing table can't be used and is ignored");
            }
        },
        Ok(None) => tracing::info!(file = %path, "there is no saved routing table yet"),
        Err(error) => tracing::error!(%error, "the saved routing table is ignored"),
    }
}

/// Writes tables to disk. If they come faster than the disk writes, only the newest is written.
async fn save_tables(
    mut tables: tokio::sync::watch::Receiver<EncodedTable>,
    file: TableFile,
    stop: CancellationToken,
) {
    loop {
        tokio::select! {
            // A table that came just before the end is still written.
            biased;
            changed = tables.changed() => if changed.is_err() { return },
            () = stop.cancelled() => return,
        }
        let Some(encoded) = tables.borrow_and_update().clone() else { continue };
        let file = file.clone();
        let saved = tokio::task::spawn_blocking(move || file.save(&encoded)).await;
        match saved {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "the routing table could not be saved"),
            Err(error) => tracing::error!(%error, "writing the routing table was interrupted"),
        }
    }
}

/// A listener and its address.
struct Bound {
    listener: TcpListener,
    address: SocketAddr,
}

async fn bind(listen: ListenAddress) -> Result<Bound, StartError> {
    let ListenAddress { setting, address } = listen;
    let wrong = |cause| StartError::Listen { setting, address, cause };
    let listener = trustformers_api::server::bind(address).await.map_err(wrong)?;
    let address = listener.local_addr().map_err(wrong)?;
    Ok(Bound { listener, address })
}
