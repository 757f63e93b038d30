//! A listener that speaks HTTP/1.1 and HTTP/2 (prior knowledge) on one port and ends gracefully.
//!
//! Written over hyper instead of taken from axum because three settings matter here and are not reachable there:
//! how many HTTP/2 streams one connection may carry (a gateway sends everything over one, and a low bound would hide
//! overload in its send queue), pings that notice a peer which vanished (its requests must be cancelled), and no
//! delay for small writes (a token is one).

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// HTTP/2 streams on one connection: the longest queue of the engine (65,536 would be absurd on one connection;
/// 512 by default) plus its largest batch (256), twice, so that the engine's own bound is met first and answered 429.
const MAX_STREAMS_PER_CONNECTION: u32 = 2048;
const PING_INTERVAL: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// The time in which an HTTP/1.1 head must have come; it also bounds idle connections.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// How long to wait after the system refused a connection for lack of a resource (file descriptors, memory).
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Listens on `address`. The unspecified address, of either family, means every address of both families, or of
/// IPv4 alone where the machine has no IPv6.
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

/// Serves `router` on `listener` until `stop` is cancelled; then takes no new connection, tells the open ones to end
/// (`Connection: close`, GOAWAY), and returns once their requests have been answered. Dropping the future closes all
/// connections at once.
pub async fn serve(listener: TcpListener, router: Router, stop: CancellationToken) {
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((socket, _)) => {
                    connections.spawn(connection(socket, router.clone(), graceful.watcher()));
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

async fn connection(socket: TcpStream, router: Router, watcher: hyper_util::server::graceful::Watcher) {
    if let Err(error) = socket.set_nodelay(true) {
        tracing::debug!(%error, "small writes to this connection may be delayed");
    }
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT);
    let served =
        builder.serve_connection(TokioIo::new(socket), TowerToHyperService::new(router)).into_owned();
    if let Err(error) = watcher.watch(served).await {
        tracing::debug!(%error, "a connection ended early");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn start(router: Router) -> (SocketAddr, CancellationToken, tokio::task::JoinHandle<()>) {
        let listener = bind((Ipv4Addr::LOCALHOST, 0).into()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let task = tokio::spawn(serve(listener, router, stop.clone()));
        (address, stop, task)
    }

    #[tokio::test]
    async fn a_request_in_flight_is_answered_after_stop_and_the_connection_closes() {
        let (entered, mut has_entered) = tokio::sync::mpsc::channel(1);
        let release = std::sync::Arc::new(tokio::sync::Notify::new());
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
}
