//! Accepts connections within a bound, and keeps a reserve of connections for probes.
//!
//! A connection beyond the bound, or beyond its caller's share, is accepted into the reserve: it may ask for
//! health and metrics and is closed soon, and every other request is refused with 429. So callers that occupy
//! all connections cannot make the kubelet restart the gateway.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::connection::{ConnectionContext, Monitor, Peer, serve};
use crate::limits::{Limits, Resource};

/// When the system has no file descriptors left, accepting pauses instead of spinning.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections in the reserve; the oldest is closed for a new one. A probe takes a few milliseconds, so a
/// flood would have to open some ten thousand connections per second to displace it.
const RESERVED_CONNECTIONS: usize = 64;
/// A reserved connection is closed after this time.
const RESERVED_TIMEOUT: Duration = Duration::from_secs(5);

/// Accepts the connections of one or more listeners.
#[derive(Clone)]
pub(crate) struct Acceptor {
    /// What connections need.
    pub(crate) context: ConnectionContext,
    /// The bounds.
    pub(crate) limits: Arc<Limits>,
    /// Connections for probes.
    pub(crate) reserve: Arc<Reserve>,
    /// The tasks of all connections.
    pub(crate) connections: TaskTracker,
}

/// The connections that are open beyond the bound, the oldest first.
#[derive(Debug, Default)]
pub(crate) struct Reserve(Mutex<VecDeque<CancellationToken>>);

impl Reserve {
    /// Adds a connection and closes the oldest if there are too many. The token is cancelled to close this
    /// one.
    fn add(&self) -> CancellationToken {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if open.len() == RESERVED_CONNECTIONS
            && let Some(oldest) = open.pop_front()
        {
            oldest.cancel();
        }
        let token = CancellationToken::new();
        open.push_back(token.clone());
        token
    }
}

impl Acceptor {
    /// Accepts connections until `stop` of the context is cancelled.
    pub(crate) async fn run(self, listener: TcpListener) {
        loop {
            let accepted = tokio::select! {
                () = self.context.stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, address)) => self.accept(stream, address),
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn accept(&self, stream: TcpStream, address: SocketAddr) {
        self.context.drain.connected();
        let limits = self.limits.of_caller(address.ip());
        let share = limits.reserve(Resource::Connections, 1).ok();
        let reserved = share.is_none();
        let peer = Peer { ip: address.ip(), limits, share, monitor: Monitor::new() };
        let serving = serve(stream, peer, self.context.clone());
        if !reserved {
            self.connections.spawn(serving);
            return;
        }
        tracing::debug!(caller = %address, "too many connections; this one serves probes only");
        let displaced = self.reserve.add();
        self.connections.spawn(async move {
            tokio::select! {
                () = serving => {}
                () = displaced.cancelled() => {}
                () = sleep(RESERVED_TIMEOUT) => {}
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::gateway::Gateway;
    use crate::limits::Bounds;
    use crate::metrics::Metrics;
    use crate::services::Services;
    use crate::stack::Stack;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn exchange(stream: &mut TcpStream, request: &str) -> String {
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = vec![0; 4096];
        let length = stream.read(&mut answer).await.unwrap();
        String::from_utf8(answer[..length].to_vec()).unwrap()
    }

    #[tokio::test]
    async fn a_caller_with_all_its_connections_can_still_be_probed() {
        let gateway = Gateway::new(Metrics::new(prometheus::Registry::new()).unwrap(), 1000);
        let stop = CancellationToken::new();
        let stack = Stack::new(Arc::clone(&gateway), Services::new(&gateway, &stop).unwrap());
        let acceptor = Acceptor {
            context: ConnectionContext { stack, drain: Arc::clone(&gateway.drain), stop: stop.clone() },
            limits: Limits::new(Bounds { connections: 4, ..Bounds::default() }),
            reserve: Arc::default(),
            connections: TaskTracker::new(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let accepting = tokio::spawn(acceptor.run(listener));
        let mut open = Vec::new();
        for _ in 0..2 {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let answer = exchange(&mut stream, "POST /v1/generate HTTP/1.1\r\nhost: a\r\n\r\n").await;
            assert!(answer.contains(" 503 ") && answer.contains("no_table"), "{answer}");
            open.push(stream);
        }
        for (request, status) in [("GET /health/live", " 200 "), ("POST /v1/generate", " 429 ")] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let answer = exchange(&mut stream, &format!("{request} HTTP/1.1\r\nhost: a\r\n\r\n")).await;
            assert!(answer.contains(status) && answer.contains("connection: close"), "{answer}");
        }
        stop.cancel();
        accepting.await.unwrap();
    }

    #[test]
    fn the_oldest_reserved_connection_makes_room() {
        let reserve = Reserve::default();
        let first = reserve.add();
        let rest: Vec<_> = (1..RESERVED_CONNECTIONS).map(|_| reserve.add()).collect();
        assert!(!first.is_cancelled());
        let newest = reserve.add();
        assert!(first.is_cancelled() && !newest.is_cancelled());
        assert!(rest.iter().all(|token| !token.is_cancelled()));
    }
}
