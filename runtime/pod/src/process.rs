//! The life of the process: listen, load, serve, drain.
//!
//! The order is the point. Listeners open before loading begins, so that status can be seen from the first
//! moment. On a signal readiness falls at once, but requests are still served until a short quiet shows that
//! routers have heard of it; only then are connections closed, and the process ends when the last answer has
//! been given.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use futures::future::BoxFuture;
use prometheus::Registry;
use prometheus::proto::MetricFamily;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use trustformers_api::browser::{self, AllowedOrigins};
use trustformers_api::server::{self, Limits};
use trustformers_api::{Api, grpc, http};
use trustformers_telemetry::metrics::{self, Derive};
use trustformers_telemetry::traces::{TraceError, TraceOptions, Traces};

use crate::admin::{AdminPort, AdminSettings, KeysError};
use crate::control::ModelControl;
use crate::device;
use crate::faults::{Faults, with_faults};
use crate::liveness::ENGINE_STALL;
use crate::load::Loader;
use crate::metrics_compat::MetricsCompat;
use crate::models::ModelServer;
use crate::spec::{ModelSpec, SpecError};

/// Longest time that requests are waited for to become quiet, as a share of the whole drain: the rest belongs
/// to those in flight.
const QUIET_SHARE: u32 = 4;
/// After the drain's timeout, the time in which requests that are cut off may still get an error.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// HTTP API, health and metrics.
    pub http: SocketAddr,
    /// gRPC.
    pub grpc: SocketAddr,
    /// `GET /metrics` once more; may be the same as `grpc`.
    pub metrics: Option<SocketAddr>,
    /// The origins whose pages may call, in browsers.
    pub allowed_origins: AllowedOrigins,
}

/// How the process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drain {
    /// After the signal, new requests are served until none has come for this long.
    pub quiet: Duration,
    /// From the signal until the answers that are still being given are cut off.
    pub timeout: Duration,
}

/// What a process shows of itself beside its API and its figures.
#[derive(Debug, Clone)]
pub struct Sight {
    /// What is traced; nothing where there are no options.
    pub traces: Option<TraceOptions>,
    /// Whether `/metrics` has the figures under the names of another server, too.
    pub metrics_compat: Option<MetricsCompat>,
    /// Liveness fails when an engine with work has made no step for so long.
    pub engine_stall: Duration,
}

impl Default for Sight {
    fn default() -> Self {
        Self { traces: None, metrics_compat: None, engine_stall: ENGINE_STALL }
    }
}

/// What a process serves and how.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The models, loaded in this order.
    pub models: Vec<ModelSpec>,
    /// Where to listen.
    pub listen: Listen,
    /// How to end.
    pub drain: Drain,
    /// Who may load and unload models on the serving ports.
    pub model_control: ModelControl,
    /// The port on which whoever has the token may.
    pub admin: Option<AdminSettings>,
    /// What can be seen of it.
    pub sight: Sight,
    /// What a test lets go wrong.
    pub faults: Faults,
}

/// Why a process could not start serving. What goes wrong later is a model's state, not an error.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The models' settings contradict each other.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// An address cannot be listened on.
    #[error(
        "cannot listen on {address} for {purpose}: {cause}; is another server running, or the address taken?"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What it is for.
        purpose: &'static str,
        /// What the system said; the message holds it, so it is no source.
        cause: std::io::Error,
    },
    /// The keys of the admin port cannot be used.
    #[error("the admin port: {0}")]
    AdminKeys(#[from] KeysError),
    /// The metrics do not fit together.
    #[error(transparent)]
    Metrics(#[from] metrics::MetricsError),
    /// gRPC reflection could not be set up.
    #[error(transparent)]
    Reflection(#[from] grpc::ReflectionError),
    /// Nothing can be traced.
    #[error(transparent)]
    Traces(#[from] TraceError),
    /// Signals cannot be received.
    #[error("signals cannot be received: {0}")]
    Signals(std::io::Error),
}

impl From<prometheus::Error> for StartError {
    fn from(error: prometheus::Error) -> Self {
        Self::Metrics(error.into())
    }
}

/// A process that listens and loads.
pub struct Process {
    models: Arc<ModelServer>,
    servers: JoinSet<()>,
    /// Ends the streams that never end by themselves.
    closing: CancellationToken,
    /// Ends the listeners.
    stop: CancellationToken,
    drain: Drain,
    traces: Traces,
    http: SocketAddr,
    grpc: SocketAddr,
    admin: Option<SocketAddr>,
}

impl Process {
    /// Opens the listeners, then begins to load. Returns at once; the states of the models show the progress.
    ///
    /// # Errors
    /// [`StartError`], before anything was loaded.
    ///
    /// The future is boxed, as that of [`run`]: it is compiled here, and not again in each program and test.
    pub fn start(
        settings: Settings,
        registry: Registry,
        open: device::OpenDevice,
    ) -> BoxFuture<'static, Result<Self, StartError>> {
        Box::pin(Self::listen_and_load(settings, registry, open))
    }

    async fn listen_and_load(
        settings: Settings,
        registry: Registry,
        open: device::OpenDevice,
    ) -> Result<Self, StartError> {
        let Settings { models, listen, drain, model_control, admin, sight, faults } = settings;
        let loader = Arc::new(Loader::new(open, &registry)?);
        let models = ModelServer::new(models)?.with_control(model_control, drain.timeout);
        let models = Arc::new(models.with_engine_stall(sight.engine_stall));
        let (closing, stop) = (CancellationToken::new(), CancellationToken::new());
        let api = Api::new(with_faults(models.clone(), faults), closing.clone());
        let derived = sight
            .metrics_compat
            .map(|compat| -> Derive { Arc::new(move |own: &[MetricFamily]| compat.families(own)) });
        let figures = metrics::router_with(registry, derived);
        let traces = Traces::start_where(sight.traces.as_ref())?;

        let http_listener = open_listener(listen.http, "HTTP").await?;
        let grpc_listener = open_listener(listen.grpc, "gRPC").await?;
        let own_metrics = match listen.metrics {
            Some(address) if address != listen.grpc && address != listen.http => {
                Some(open_listener(address, "metrics").await?)
            }
            _ => None,
        };
        let admin_listener = match admin {
            Some(admin) => {
                let address = admin.address;
                Some((open_listener(address, "admin").await?, address, AdminPort::new(admin)?))
            }
            None => None,
        };
        let (http, grpc) = (address_of(&http_listener, listen.http), address_of(&grpc_listener, listen.grpc));
        let services = grpc::router(api.clone())?;
        let mut grpc_routes = services.clone();
        if listen.metrics == Some(listen.grpc) {
            grpc_routes = grpc_routes.merge(figures.clone());
        }
        let mut servers = JoinSet::new();
        let admin = admin_listener.map(|(listener, asked, port)| {
            let address = address_of(&listener, asked);
            servers.spawn(port.follow_keys(stop.clone()));
            let router = port.router(Arc::clone(&models), closing.clone());
            servers.spawn(server::serve(listener, router, Limits::default(), stop.clone()));
            tracing::info!(admin = %address, "models are changed there by whoever has the token");
            address
        });
        let limits = Limits::default().refusing_early(&api);
        let mut spawn = |listener: TcpListener, router: Router| {
            servers.spawn(server::serve(listener, traces.router(router), limits.clone(), stop.clone()));
        };
        let routes = http::router(api).merge(figures.clone());
        spawn(http_listener, browser::http_listener(routes, services, &listen.allowed_origins));
        spawn(grpc_listener, browser::grpc_listener(grpc_routes, &listen.allowed_origins));
        if let Some(listener) = own_metrics {
            spawn(listener, figures);
        }
        tracing::info!(http = %http, grpc = %grpc, "listening");
        models.start_loading(&loader);
        Ok(Self { models, servers, closing, stop, drain, traces, http, grpc, admin })
    }

    /// The address that HTTP is served on, with the port that was given.
    pub fn http_address(&self) -> SocketAddr {
        self.http
    }

    /// The address that gRPC is served on, with the port that was given.
    pub fn grpc_address(&self) -> SocketAddr {
        self.grpc
    }

    /// The address of the admin port, where there is one.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin
    }

    /// The models.
    pub fn models(&self) -> &Arc<ModelServer> {
        &self.models
    }

    /// Drains and ends. Returns whether every request in flight could be answered.
    pub async fn drain(mut self) -> bool {
        let begin = Instant::now();
        let deadline = begin + self.drain.timeout;
        let statuses = self.models.statuses();
        // No router sends requests to a server that is not ready, so there is no quiet to wait for.
        let quiet = if statuses.watch_readiness().borrow().ok { self.drain.quiet } else { Duration::ZERO };
        statuses.draining();
        let quiet = self.models.inflight().until_quiet(quiet);
        if tokio::time::timeout(self.drain.timeout / QUIET_SHARE, quiet).await.is_err() {
            tracing::warn!("requests keep coming although readiness is down; closing their connections");
        }
        self.closing.cancel();
        self.stop.cancel();
        let in_flight = self.models.inflight().count();
        tracing::info!(in_flight, "no new connections; waiting for those in flight");
        let all_answered = tokio::time::timeout_at(deadline, self.servers_end()).await.is_ok();
        if !all_answered {
            let in_flight = self.models.inflight().count();
            tracing::warn!(in_flight, "the drain's time is over; cutting off what is still in flight");
        }
        // A device that hangs inside a step cannot be stopped; the process ends without it.
        if tokio::time::timeout(LAST_WORDS, self.models.stop()).await.is_err() {
            tracing::warn!("an engine did not end; leaving it");
        }
        if !all_answered {
            let _ = tokio::time::timeout(LAST_WORDS, self.servers_end()).await;
        }
        self.traces.shutdown().await;
        tracing::info!(took_ms = begin.elapsed().as_millis(), "ended");
        all_answered
    }

    async fn servers_end(&mut self) {
        while self.servers.join_next().await.is_some() {}
    }
}

/// The signals that end the process. A second one ends it without draining.
pub struct EndSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl EndSignals {
    /// Receives SIGTERM and SIGINT from now on.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn new() -> Result<Self, StartError> {
        let receive = |kind| signal(kind).map_err(StartError::Signals);
        Ok(Self {
            terminate: receive(SignalKind::terminate())?,
            interrupt: receive(SignalKind::interrupt())?,
        })
    }

    /// Waits for one; gives its name.
    pub async fn received(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }

    /// Waits for a signal, then drains; a second signal ends that at once.
    pub async fn drain_on_the_first(mut self, drain: impl Future<Output = bool>) {
        let name = self.received().await;
        tracing::info!(signal = name, "draining; a second signal ends at once");
        tokio::select! {
            _ = drain => {}
            name = self.received() => tracing::warn!(signal = name, "ended without waiting"),
        }
    }
}

/// Serves until a signal comes, then drains. A second signal ends at once.
///
/// # Errors
/// [`StartError`] when serving could not begin.
pub fn run(
    settings: Settings,
    registry: Registry,
    open: device::OpenDevice,
) -> BoxFuture<'static, Result<(), StartError>> {
    Box::pin(run_until_signal(settings, registry, open))
}

async fn run_until_signal(
    settings: Settings,
    registry: Registry,
    open: device::OpenDevice,
) -> Result<(), StartError> {
    let signals = EndSignals::new()?;
    let process = Process::start(settings, registry, open).await?;
    signals.drain_on_the_first(process.drain()).await;
    Ok(())
}

async fn open_listener(address: SocketAddr, purpose: &'static str) -> Result<TcpListener, StartError> {
    server::bind(address).await.map_err(|cause| StartError::Listen { address, purpose, cause })
}

fn address_of(listener: &TcpListener, asked: SocketAddr) -> SocketAddr {
    listener.local_addr().unwrap_or(asked)
}
