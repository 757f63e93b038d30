//! An HTTP server on loopback that answers as a test says, and can cut or stall an answer in its middle.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Collected};
use hyper::body::{Body, Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// Bytes of one frame.
const FRAME_BYTES: usize = 16 << 10;

#[derive(Debug, Clone)]
pub(crate) struct Received {
    pub(crate) method: Method,
    /// Path and query.
    pub(crate) target: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Received {
    pub(crate) fn path(&self) -> &str {
        self.target.split('?').next().unwrap()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// The range that is asked for, its end outside of it.
    pub(crate) fn range(&self) -> Option<std::ops::Range<usize>> {
        let (start, last) = self.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some(start.parse().unwrap()..last.parse::<usize>().unwrap() + 1)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// The connection ends after so many bytes of this answer.
    Cut(u64),
    /// Nothing comes any more after so many bytes of this answer.
    Stall(u64),
    /// Nothing comes any more once all answers together have this many bytes.
    StallAll(u64),
}

pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: Bytes,
    pub(crate) fault: Fault,
}

impl Reply {
    pub(crate) fn new(status: u16, body: impl Into<Bytes>) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), fault: Fault::None }
    }

    /// A file, or the range of it that is asked for.
    pub(crate) fn file(received: &Received, file: &[u8]) -> Self {
        let total = file.len();
        match received.range() {
            Some(range) if range.start < total => {
                let end = range.end.min(total);
                let content_range = format!("bytes {}-{}/{total}", range.start, end - 1);
                Self::new(206, file[range.start..end].to_vec()).header("content-range", content_range)
            }
            Some(_) => Self::new(416, "").header("content-range", format!("bytes */{total}")),
            None => Self::new(200, file.to_vec()),
        }
    }

    pub(crate) fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub(crate) fn fault(mut self, fault: Fault) -> Self {
        self.fault = fault;
        self
    }
}

type Handler = Box<dyn Fn(&Received) -> Reply + Send + Sync>;

struct Shared {
    handler: Handler,
    log: Mutex<Vec<Received>>,
    /// Bytes of bodies of successes so far.
    sent_bytes: AtomicU64,
}

pub(crate) struct TestServer {
    pub(crate) host: String,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl TestServer {
    pub(crate) async fn start(handler: impl Fn(&Received) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let shared = Arc::new(Shared {
            handler: Box::new(handler),
            log: Mutex::default(),
            sent_bytes: AtomicU64::new(0),
        });
        let task = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Self { host, shared, task }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.host)
    }

    pub(crate) fn log(&self) -> Vec<Received> {
        self.shared.log.lock().unwrap().clone()
    }

    pub(crate) fn sent_bytes(&self) -> u64 {
        self.shared.sent_bytes.load(Ordering::SeqCst)
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((stream, _)) = listener.accept().await {
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let service = service_fn(|request| answer(Arc::clone(&shared), request));
            // A connection that is cut ends with an error.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn answer(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<FaultyBody>, Infallible> {
    let (head, body) = request.into_parts();
    let received = Received {
        method: head.method,
        target: head.uri.to_string(),
        headers: head.headers,
        body: body.collect().await.map(Collected::to_bytes).unwrap_or_default(),
    };
    let is_head = received.method == Method::HEAD;
    let reply = (shared.handler)(&received);
    shared.log.lock().unwrap().push(received);
    let mut response = Response::builder().status(StatusCode::from_u16(reply.status).unwrap());
    if !reply.headers.iter().any(|(name, _)| *name == "content-length") {
        response = response.header("content-length", reply.body.len());
    }
    for (name, value) in &reply.headers {
        response = response.header(*name, value);
    }
    let counts = reply.status < 300 && !is_head;
    let body = if is_head { Bytes::new() } else { reply.body };
    let body = FaultyBody { rest: body, sent: 0, fault: reply.fault, counts, is_flushed: false, shared };
    Ok(response.body(body).unwrap())
}

struct FaultyBody {
    rest: Bytes,
    sent: u64,
    fault: Fault,
    counts: bool,
    is_flushed: bool,
    shared: Arc<Shared>,
}

impl Body for FaultyBody {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        if self.rest.is_empty() {
            return Poll::Ready(None);
        }
        let mut count = self.rest.len().min(FRAME_BYTES);
        match self.fault {
            Fault::Cut(after) if self.sent >= after => {
                // What is buffered goes out before the connection ends.
                if !std::mem::replace(&mut self.is_flushed, true) {
                    context.waker().wake_by_ref();
                    return Poll::Pending;
                }
                return Poll::Ready(Some(Err(std::io::Error::other("cut by the test"))));
            }
            // Nobody wakes this: it stays so until the other side closes the connection.
            Fault::Stall(after) if self.sent >= after => return Poll::Pending,
            Fault::Cut(after) | Fault::Stall(after) => count = count.min((after - self.sent) as usize),
            Fault::StallAll(after) if self.shared.sent_bytes.load(Ordering::SeqCst) >= after => {
                return Poll::Pending;
            }
            Fault::StallAll(_) | Fault::None => {}
        }
        self.sent += count as u64;
        if self.counts {
            self.shared.sent_bytes.fetch_add(count as u64, Ordering::SeqCst);
        }
        let frame = Frame::data(self.rest.split_to(count));
        Poll::Ready(Some(Ok(frame)))
    }
}
