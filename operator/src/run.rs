//! `trustformers-operator run`: opens the ports, takes part in the leader election, leads when elected, and
//! shuts down.

use std::collections::BTreeSet;
use std::io;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::{Client, Config};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use trustformers_control::build::{GatewayService, Platform};
use trustformers_control::names;
use trustformers_proto::control::v1::route_service_server::RouteServiceServer;
use trustformers_telemetry::metrics::{MetricsError, new_registry};

use crate::args::{FeedAuth, PodAuth, RunArgs};
use crate::context::{Context, Settings};
use crate::election::Candidate;
use crate::feed::identity::FeedAuthenticator;
use crate::feed::service::{Feed, Leadership};
use crate::leader;
use crate::metrics::Metrics;
use crate::pod_admin::Identity;
use crate::requests::{self, Clients};
use crate::server::{Readiness, router};

/// Why the operator could not start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// No cluster is configured.
    #[error("no cluster: {0}; run it in a pod, or name a kubeconfig with KUBECONFIG")]
    Cluster(String),
    /// A port could not be opened.
    #[error("{flag} {address}: {cause}")]
    Listen {
        /// The flag that names the address.
        flag: &'static str,
        /// The address.
        address: String,
        /// The error of the operating system.
        cause: io::Error,
    },
    /// The metrics could not be registered.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The signal handlers could not be installed.
    #[error("signal handlers could not be installed: {0}")]
    Signals(io::Error),
}

impl From<prometheus::Error> for RunError {
    fn from(error: prometheus::Error) -> Self {
        Self::Metrics(error.into())
    }
}

/// Longest wait for open requests of the operator's own servers at the end.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(5);

/// Runs the operator until SIGTERM or SIGINT.
///
/// # Errors
/// When it could not start. Later failures are logged, and the operation is tried again.
pub async fn run(args: RunArgs) -> Result<(), RunError> {
    let config = Config::infer().await.map_err(|error| RunError::Cluster(error.to_string()))?;
    let clients = requests::clients(config).map_err(|error| RunError::Cluster(error.to_string()))?;
    let registry = new_registry("trustformers-operator", env!("CARGO_PKG_VERSION"))?;
    let metrics = Metrics::new(&registry)?;
    let readiness = Readiness::default();
    let (leaderships, leadership) = watch::channel(None);
    let ending = CancellationToken::new();

    let http = listen("--http-address", args.http_address).await?;
    let http_ended = ending.clone();
    let routes = router(registry, readiness.clone());
    let http = tokio::spawn(async move {
        axum::serve(http, routes).with_graceful_shutdown(http_ended.cancelled_owned()).await
    });

    let feed = listen("--feed-address", args.feed_address).await?;
    let service = RouteServiceServer::new(Feed::new(leadership, authenticator(&args, &clients.objects)));
    let feed_ended = ending.clone();
    let feed = tokio::spawn(
        tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(Duration::from_secs(5)))
            .http2_keepalive_timeout(Some(Duration::from_secs(5)))
            .tcp_nodelay(true)
            .add_service(service)
            .serve_with_incoming_shutdown(TcpListenerStream::new(feed), feed_ended.cancelled_owned()),
    );

    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Signals)?;
    let stop = CancellationToken::new();
    let on_signal = stop.clone();
    tokio::spawn(async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        on_signal.cancel();
    });

    let election = Participation { args: &args, clients, metrics, readiness: &readiness, leaderships, stop };
    election.run().await;
    readiness.set(false);
    ending.cancel();
    for timed_out in
        [timeout(SHUTDOWN_LIMIT, http).await.is_err(), timeout(SHUTDOWN_LIMIT, feed).await.is_err()]
    {
        if timed_out {
            tracing::warn!("a server of the operator did not shut down in time");
        }
    }
    tracing::info!("shut down");
    Ok(())
}

async fn listen(flag: &'static str, address: std::net::SocketAddr) -> Result<TcpListener, RunError> {
    let error = |cause| RunError::Listen { flag, address: address.to_string(), cause };
    TcpListener::bind(address).await.map_err(error)
}

fn authenticator(args: &RunArgs, client: &Client) -> FeedAuthenticator {
    match args.feed_auth {
        FeedAuth::None => FeedAuthenticator::Open,
        FeedAuth::Token => {
            FeedAuthenticator::for_account(client.clone(), &args.namespace, &args.gateway_service_account)
        }
    }
}

fn settings(args: &RunArgs) -> Settings {
    Settings {
        namespace: args.namespace.clone(),
        pod_name: args.pod_name.clone(),
        gateway_url: args.gateway_url.clone(),
        platform: Platform {
            runtime_image: args.runtime_image.clone(),
            namespace: args.namespace.clone(),
            gateway: GatewayService {
                name: args.gateway_service.clone(),
                http_port: args.gateway_http_port,
                grpc_port: args.gateway_grpc_port,
            },
            // Not known before the definitions are listed.
            optional_kinds: BTreeSet::new(),
            pull_policy: args.image_pull_policy.as_str().to_owned(),
            // The keys are not known before the API server is asked.
            admin: None,
        },
        concurrency: args.concurrency,
        identity: (args.pod_auth == PodAuth::Token)
            .then(|| Identity { namespace: args.namespace.clone(), account: args.service_account.clone() }),
        admin_port: names::ADMIN_PORT,
        grpc_port: names::GRPC_PORT,
    }
}

/// Participation in the leader election, until the process is stopped.
struct Participation<'a> {
    args: &'a RunArgs,
    clients: Clients,
    metrics: Metrics,
    readiness: &'a Readiness,
    leaderships: watch::Sender<Option<Leadership>>,
    stop: CancellationToken,
}

impl Participation<'_> {
    async fn run(self) {
        let pod = self.args.pod_name.as_deref().unwrap_or("process");
        // Each process has its own identity: a restarted container is another candidate, and its lead another
        // term.
        let identity = format!("{pod}_{}_{}", std::process::id(), Timestamp::now().as_nanosecond());
        let mut candidate = Candidate::new(self.clients.lease.clone(), &self.args.namespace, identity);
        loop {
            let term = tokio::select! {
                term = candidate.lead(|| self.readiness.set(true)) => term,
                () = self.stop.cancelled() => return,
            };
            tracing::info!(term, "elected");
            let new =
                Context::create(self.clients.objects.clone(), settings(self.args), self.metrics.clone());
            let context = std::sync::Arc::clone(&new.context);
            tokio::select! {
                reason = candidate.keep() => tracing::warn!(term, reason, "no longer leading"),
                () = leader::lead(term, new, self.leaderships.clone()) => candidate.release().await,
                () = self.stop.cancelled() => {
                    tracing::info!(term, "shutting down");
                    // The next leader may start before the label is removed: it removes the label by itself.
                    candidate.release().await;
                    leader::unlabel(&context).await;
                    return;
                }
            }
            leader::unlabel(&context).await;
        }
    }
}
