//! The mock pod and the callers.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, FuturesUnordered};
use http::{Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::{MissedTickBehavior, interval, timeout};

/// Tokens of a stream, one each millisecond: each is a write of its own, as those of a model.
pub(crate) const TOKENS_PER_STREAM: usize = 256;
const TOKEN_INTERVAL: Duration = Duration::from_millis(1);
/// Requests in flight while throughput is measured.
const REQUESTS_AT_ONCE: usize = 32;
/// Streams in flight while tokens are measured: 16,000 tokens per second, which one core of callers reads.
const STREAMS_AT_ONCE: usize = 16;
/// The gateway shares its bounds fairly between addresses of callers, and one may have half of each.
const CALLER_ADDRESSES: usize = 8;
/// The clock of tasks has ticks of a millisecond: a request that is sent this late was on time.
const TICK: Duration = Duration::from_millis(1);
/// A request that takes longer has failed, and its target with it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);
const BODY: &str = r#"{"model": "a", "prompt": "What is the capital of France?", "max_tokens": 16}"#;
/// What the mock pod does, in a header that every proxy passes on.
const MODE: &str = "x-mock";
const TOKEN: &str = "data: {\"text\":\" Paris\",\"token\":7042}\n\n";

/// Why a target could not be measured.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct LoadError(pub(crate) String);

impl LoadError {
    fn of(what: &str) -> impl Fn(&dyn std::fmt::Display) -> Self + '_ {
        move |error| Self(format!("{what}: {error}"))
    }
}

pub(crate) type CallerClient = Client<HttpConnector, Full<Bytes>>;
type AnswerBody = UnsyncBoxBody<Bytes, Infallible>;

/// The mock pod: answers at once, or streams tokens, or opens a stream that never ends.
pub(crate) async fn serve_pod(listener: TcpListener) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let _set = stream.set_nodelay(true);
        tokio::spawn(async move {
            let service = service_fn(async |request: Request<Incoming>| {
                let mode = request.headers().get(MODE).map(|mode| mode.as_bytes().to_vec());
                let _read = request.into_body().collect().await;
                Ok::<_, Infallible>(pod_answer(mode.as_deref()))
            });
            let builder = auto::Builder::new(TokioExecutor::new());
            let _ended = builder.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

fn pod_answer(mode: Option<&[u8]>) -> Response<AnswerBody> {
    let token = || Ok::<_, Infallible>(Frame::data(Bytes::from_static(TOKEN.as_bytes())));
    let (kind, body) = match mode {
        Some(b"stream") => {
            let tokens = stream::unfold((interval(TOKEN_INTERVAL), 0), move |(mut ticks, sent)| async move {
                if sent == TOKENS_PER_STREAM {
                    return None;
                }
                ticks.tick().await;
                Some((token(), (ticks, sent + 1)))
            });
            ("text/event-stream", BodyExt::boxed_unsync(StreamBody::new(tokens)))
        }
        Some(_) => {
            let endless = stream::once(std::future::ready(token())).chain(stream::pending());
            ("text/event-stream", BodyExt::boxed_unsync(StreamBody::new(endless)))
        }
        None => {
            let answer = Full::new(Bytes::from_static(b"{\"text\": \"Paris\"}"));
            ("application/json", answer.boxed_unsync())
        }
    };
    let mut response = Response::new(body);
    response.headers_mut().insert("content-type", http::HeaderValue::from_static(kind));
    response
}

/// A client with connections of its own.
pub(crate) fn client() -> CallerClient {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    Client::builder(TokioExecutor::new()).build(connector)
}

fn request(address: SocketAddr, mode: Option<&'static str>) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::new(Bytes::from_static(BODY.as_bytes())));
    *request.method_mut() = http::Method::POST;
    *request.uri_mut() = format!("http://{address}/v1/generate").parse().unwrap_or_default();
    let headers = request.headers_mut();
    headers.insert("content-type", http::HeaderValue::from_static("application/json"));
    if let Some(mode) = mode {
        headers.insert(MODE, http::HeaderValue::from_static(mode));
    }
    request
}

/// Sends one request and reads its answer, whose length it gives.
pub(crate) async fn send(
    caller: &CallerClient,
    address: SocketAddr,
    mode: Option<&'static str>,
) -> Result<usize, LoadError> {
    let sent = async {
        let response = caller.request(request(address, mode)).await;
        let response = response.map_err(|error| LoadError::of("no answer")(&error))?;
        if response.status() != StatusCode::OK {
            return Err(LoadError(format!("the answer is {}", response.status())));
        }
        let body = response.into_body().collect().await;
        Ok(body.map_err(|error| LoadError::of("an answer broke off")(&error))?.to_bytes().len())
    };
    let late = || LoadError(format!("a request took longer than {} s", REQUEST_TIMEOUT.as_secs()));
    timeout(REQUEST_TIMEOUT, sent).await.unwrap_or_else(|_elapsed| Err(late()))
}

/// Sends requests at fixed times and gives the duration of each, from the time at which it was to be sent.
pub(crate) async fn paced(address: SocketAddr, rate: u64, count: usize) -> Result<Vec<Duration>, LoadError> {
    let caller = client();
    let mut ticks = interval(Duration::from_nanos(1_000_000_000 / rate));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut sent = FuturesUnordered::new();
    let mut latencies = Vec::with_capacity(count);
    for _ in 0..count {
        let due = ticks.tick().await.into_std();
        // What waits because this program is behind counts, since a caller would have waited as well.
        let began = Instant::now().min(due + TICK);
        let caller = caller.clone();
        sent.push(tokio::spawn(
            async move { send(&caller, address, None).await.map(|_length| began.elapsed()) },
        ));
    }
    while let Some(ended) = sent.next().await {
        latencies.push(ended.map_err(|error| LoadError::of("a caller ended")(&error))??);
    }
    Ok(latencies)
}

/// Sends requests as fast as they are answered.
pub(crate) async fn burst(address: SocketAddr, count: usize) -> Result<(), LoadError> {
    let caller = client();
    let answers = stream::iter(0..count).map(|_| send(&caller, address, None));
    let mut answers = answers.buffer_unordered(REQUESTS_AT_ONCE);
    while let Some(answer) = answers.next().await {
        answer?;
    }
    Ok(())
}

/// Reads streams of tokens.
pub(crate) async fn streams(address: SocketAddr, count: usize) -> Result<(), LoadError> {
    let caller = client();
    let answers = stream::iter(0..count).map(|_| send(&caller, address, Some("stream")));
    let mut answers = answers.buffer_unordered(STREAMS_AT_ONCE);
    while let Some(answer) = answers.next().await {
        let length = answer?;
        if length != TOKENS_PER_STREAM * TOKEN.len() {
            return Err(LoadError(format!("a stream has {length} bytes")));
        }
    }
    Ok(())
}

/// Opens streams, each on a connection of its own as HTTP/1.1 callers have them.
pub(crate) async fn open_streams(address: SocketAddr, count: usize) -> Result<Vec<TcpStream>, LoadError> {
    let opened = stream::iter(0..count).map(|index| open_stream(address, index));
    let mut opened = opened.buffer_unordered(64);
    let mut streams = Vec::with_capacity(count);
    while let Some(stream) = opened.next().await {
        streams.push(stream?);
    }
    Ok(streams)
}

async fn open_stream(address: SocketAddr, index: usize) -> Result<TcpStream, LoadError> {
    match timeout(REQUEST_TIMEOUT, opened_stream(address, index)).await {
        Ok(stream) => stream.map_err(|error| LoadError(format!("stream {index}: {error}"))),
        Err(_elapsed) => Err(LoadError(format!("stream {index} did not begin in time"))),
    }
}

async fn opened_stream(address: SocketAddr, index: usize) -> std::io::Result<TcpStream> {
    let head = format!(
        "POST /v1/generate HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n{MODE}: open\r\n\
         content-length: {}\r\n\r\n{BODY}",
        BODY.len()
    );
    let socket = TcpSocket::new_v4()?;
    // From 127.0.0.2 on, so that no address has more connections than it has ports.
    let last = u8::try_from(2 + index % CALLER_ADDRESSES).unwrap_or(2);
    socket.bind(SocketAddr::from((Ipv4Addr::new(127, 0, 0, last), 0)))?;
    let mut stream = socket.connect(address).await?;
    stream.write_all(head.as_bytes()).await?;
    let mut read = Vec::new();
    while !read.ends_with(b"\n\n") && !read.ends_with(b"\n\n\r\n") {
        if stream.read_buf(&mut read).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
    if !read.starts_with(b"HTTP/1.1 200") {
        let line = String::from_utf8_lossy(&read[..read.len().min(40)]).into_owned();
        return Err(std::io::Error::other(line));
    }
    Ok(stream)
}
