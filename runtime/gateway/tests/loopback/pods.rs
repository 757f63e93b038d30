//! Pods: HTTP/2 servers that a test controls step by step.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::request::Parts;
use http::{Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

type PodError = Box<dyn std::error::Error + Send + Sync>;
pub(crate) type Answer = Response<UnsyncBoxBody<Bytes, PodError>>;
type Handler =
    dyn Fn(Parts, Bytes) -> Pin<Box<dyn Future<Output = Result<Answer, PodError>> + Send>> + Send + Sync;

/// The most heads of requests that a pod remembers.
const MOST_HEADS: usize = 4096;

/// A running pod.
pub(crate) struct Pod {
    pub(crate) address: SocketAddr,
    requests: Arc<AtomicUsize>,
    connections: Arc<AtomicUsize>,
    heads: Arc<Mutex<Vec<Parts>>>,
    /// Sends GOAWAY on every connection that is open at that moment.
    goaway: watch::Sender<()>,
    /// Cuts every connection.
    cut: CancellationToken,
    tasks: TaskTracker,
}

impl Pod {
    /// A pod that answers each request with the result of `handler`; an error resets the stream.
    pub(crate) async fn start<F, R>(handler: F) -> Self
    where
        F: Fn(Parts, Bytes) -> R + Send + Sync + 'static,
        R: Future<Output = Result<Answer, PodError>> + Send + 'static,
    {
        Self::start_at("127.0.0.1:0".parse().unwrap(), handler).await
    }

    pub(crate) async fn start_at<F, R>(address: SocketAddr, handler: F) -> Self
    where
        F: Fn(Parts, Bytes) -> R + Send + Sync + 'static,
        R: Future<Output = Result<Answer, PodError>> + Send + 'static,
    {
        let handler: Arc<Handler> = Arc::new(move |parts, body| Box::pin(handler(parts, body)));
        let listener = TcpListener::bind(address).await.unwrap();
        let pod = Self {
            address: listener.local_addr().unwrap(),
            requests: Arc::default(),
            connections: Arc::default(),
            heads: Arc::default(),
            goaway: watch::Sender::new(()),
            cut: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        pod.tasks.spawn(accept(listener, Serving::of(&pod, handler)));
        pod
    }

    /// A pod that answers every request with its own name.
    pub(crate) async fn named(name: &'static str) -> Self {
        Self::start(move |_, _| async move { Ok(full(StatusCode::OK, name)) }).await
    }

    /// A pod that answers every request with this status.
    pub(crate) async fn declining(status: StatusCode) -> Self {
        Self::start(move |_, _| async move {
            let mut answer = full(status, "declined by the pod");
            answer.headers_mut().insert("retry-after", "7".parse().unwrap());
            Ok(answer)
        })
        .await
    }

    /// An address without a listener.
    pub(crate) async fn absent() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
    }

    pub(crate) fn requests(&self) -> usize {
        self.requests.load(Ordering::Acquire)
    }

    /// Connections that were ever made.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::Acquire)
    }

    /// Head of the last request.
    pub(crate) fn last_head(&self) -> Parts {
        self.heads.lock().unwrap().last().unwrap().clone()
    }

    /// Paths of the requests, of the last few thousand at least.
    pub(crate) fn paths(&self) -> Vec<String> {
        self.heads.lock().unwrap().iter().map(|head| head.uri.path().to_owned()).collect()
    }

    pub(crate) fn send_goaway(&self) {
        self.goaway.send_replace(());
    }

    /// Ends at once.
    pub(crate) async fn kill(&self) {
        self.cut.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Waits until the other side has closed every connection; then the listener ends too.
    pub(crate) async fn disconnected(self) {
        self.tasks.close();
        crate::until("all connections to the pod to end", || async { self.tasks.len() == 1 }).await;
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.cut.cancel();
    }
}

#[derive(Clone)]
struct Serving {
    handler: Arc<Handler>,
    requests: Arc<AtomicUsize>,
    connections: Arc<AtomicUsize>,
    heads: Arc<Mutex<Vec<Parts>>>,
    goaway: watch::Sender<()>,
    cut: CancellationToken,
    tasks: TaskTracker,
}

impl Serving {
    fn of(pod: &Pod, handler: Arc<Handler>) -> Self {
        Self {
            handler,
            requests: Arc::clone(&pod.requests),
            connections: Arc::clone(&pod.connections),
            heads: Arc::clone(&pod.heads),
            goaway: pod.goaway.clone(),
            cut: pod.cut.clone(),
            tasks: pod.tasks.clone(),
        }
    }

    async fn handle(self, request: Request<Incoming>) -> Result<Answer, PodError> {
        let (parts, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        {
            let mut heads = self.heads.lock().unwrap();
            // A test that sends more looks at the last ones.
            if heads.len() == MOST_HEADS {
                heads.drain(..MOST_HEADS / 2);
            }
            heads.push(parts.clone());
        }
        self.requests.fetch_add(1, Ordering::AcqRel);
        (self.handler)(parts, body).await
    }
}

async fn accept(listener: TcpListener, serving: Serving) {
    loop {
        let stream = tokio::select! {
            () = serving.cut.cancelled() => return,
            accepted = listener.accept() => accepted.unwrap().0,
        };
        serving.connections.fetch_add(1, Ordering::AcqRel);
        stream.set_nodelay(true).unwrap();
        let serving = serving.clone();
        serving.tasks.clone().spawn(async move {
            let (mut goaway, cut) = (serving.goaway.subscribe(), serving.cut.clone());
            let service = service_fn(move |request| serving.clone().handle(request));
            let mut builder = auto::Builder::new(TokioExecutor::new());
            // Small, so that a test sees how much the gateway buffers.
            builder.http2().max_send_buf_size(16 << 10);
            let connection = builder.serve_connection(TokioIo::new(stream), service);
            tokio::pin!(connection);
            let mut sent = false;
            loop {
                tokio::select! {
                    _ended = connection.as_mut() => return,
                    () = cut.cancelled() => return,
                    _changed = goaway.changed(), if !sent => {
                        sent = true;
                        connection.as_mut().graceful_shutdown();
                    }
                }
            }
        });
    }
}

/// A complete answer.
pub(crate) fn full(status: StatusCode, text: impl Into<Bytes>) -> Answer {
    let body = Full::new(text.into()).map_err(|never: Infallible| match never {});
    let mut answer = Response::new(body.boxed_unsync());
    *answer.status_mut() = status;
    answer
}

/// The pod's end of an answer that a test writes piece by piece.
pub(crate) type Writer = mpsc::Sender<Result<Frame<Bytes>, PodError>>;

/// An answer whose pieces come from a writer; dropping the writer ends it.
pub(crate) fn written() -> (Answer, Writer) {
    // One piece at a time, as a test writes them.
    let (writer, pieces) = mpsc::channel(1);
    let body = StreamBody::new(ReceiverStream::new(pieces).map(|piece| piece));
    (Response::new(BodyExt::boxed_unsync(body)), writer)
}

pub(crate) fn piece(text: &'static str) -> Result<Frame<Bytes>, PodError> {
    Ok(Frame::data(Bytes::from_static(text.as_bytes())))
}
