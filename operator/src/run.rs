//! `trustformers-operator run`: opens the ports, stands for election, leads when elected, and ends in order.

use std::io;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::Client;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use trustformers_control::build::Platform;
use trustformers_proto::control::v1::route_service_server::RouteServiceServer;
use trustformers_telemetry::metrics::{MetricsError, new_registry};

use crate::args::{FeedAuth, RunArgs};
use crate::election::Candidate;
use crate::feed::identity::Doorkeeper;
use crate::feed::service::{Feed, Lead};
use crate::leader;
use crate::metrics::Metrics;
use crate::server::{Readiness, router};
use crate::world::{Settings, World};

/// Why the operator could not start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// No cluster to talk to.
    #[error("no cluster: {0}; run it in a pod, or name a kubeconfig with KUBECONFIG")]
    Cluster(Box<kube::Error>),
    /// A port could not be opened.
    #[error("{flag} {address}: {cause}")]
    Listen {
        /// The flag that names the address.
        flag: &'static str,
        /// The address.
        address: String,
        /// What the system said.
        cause: io::Error,
    },
    /// The metrics could not be registered.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The operating system takes no signal handlers.
    #[error("signals: {0}")]
    Signals(io::Error),
}

impl From<prometheus::Error> for RunError {
    fn from(error: prometheus::Error) -> Self {
        Self::Metrics(error.into())
    }
}

/// Longest wait for open requests of our own servers at the end.
const END_LIMIT: Duration = Duration::from_secs(5);

/// Runs the operator until SIGTERM or SIGINT.
///
/// # Errors
/// When it could not start. Later trouble is logged and tried again.
pub async fn run(args: RunArgs) -> Result<(), RunError> {
    let client = Client::try_default().await.map_err(|error| RunError::Cluster(Box::new(error)))?;
    let registry = new_registry("trustformers-operator", env!("CARGO_PKG_VERSION"))?;
    let metrics = Metrics::new(&registry)?;
    let readiness = Readiness::default();
    let (leads, lead) = watch::channel(None);
    let ending = CancellationToken::new();

    let http = listen("--http-address", args.http_address).await?;
    let http_ended = ending.clone();
    let pages = router(registry, readiness.clone());
    let http = tokio::spawn(async move {
        axum::serve(http, pages).with_graceful_shutdown(http_ended.cancelled_owned()).await
    });

    let feed = listen("--feed-address", args.feed_address).await?;
    let service = RouteServiceServer::new(Feed::new(lead, doorkeeper(&args, &client)));
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
    let asked = stop.clone();
    tokio::spawn(async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        asked.cancel();
    });

    stand(&args, client, metrics, (&readiness, leads, stop)).await;
    readiness.set(false);
    ending.cancel();
    for server in [timeout(END_LIMIT, http).await.is_err(), timeout(END_LIMIT, feed).await.is_err()] {
        if server {
            tracing::warn!("a server of the operator did not end in time");
        }
    }
    tracing::info!("ended");
    Ok(())
}

async fn listen(flag: &'static str, address: std::net::SocketAddr) -> Result<TcpListener, RunError> {
    let refused = |cause| RunError::Listen { flag, address: address.to_string(), cause };
    TcpListener::bind(address).await.map_err(refused)
}

fn doorkeeper(args: &RunArgs, client: &Client) -> Doorkeeper {
    match args.feed_auth {
        FeedAuth::None => Doorkeeper::Open,
        FeedAuth::Token => {
            Doorkeeper::for_account(client.clone(), &args.namespace, &args.gateway_service_account)
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
            pull_policy: args.image_pull_policy.as_str().to_owned(),
        },
        concurrency: args.concurrency,
    }
}

/// Stands for election again and again until it is asked to stop.
async fn stand(
    args: &RunArgs,
    client: Client,
    metrics: Metrics,
    (readiness, leads, stop): (&Readiness, watch::Sender<Option<Lead>>, CancellationToken),
) {
    let place = args.pod_name.as_deref().unwrap_or("process");
    // Of this process alone: a restarted container is a new candidate, and its lead a new term.
    let identity = format!("{place}_{}_{}", std::process::id(), Timestamp::now().as_nanosecond());
    let mut candidate = Candidate::new(client.clone(), &args.namespace, identity);
    loop {
        let term = tokio::select! {
            term = candidate.lead(|| readiness.set(true)) => term,
            () = stop.cancelled() => return,
        };
        tracing::info!(term, "elected");
        let new = World::create(client.clone(), settings(args), metrics.clone());
        let world = std::sync::Arc::clone(&new.world);
        tokio::select! {
            why = candidate.keep() => tracing::warn!(term, why, "no longer leading"),
            () = leader::lead(term, new, leads.clone()) => {
                candidate.release().await;
            }
            () = stop.cancelled() => {
                tracing::info!(term, "asked to end");
                // The next leader may begin while the label is on its way off: it takes it from here by itself.
                candidate.release().await;
                leader::unlabel(&world).await;
                return;
            }
        }
        leader::unlabel(&world).await;
    }
}
