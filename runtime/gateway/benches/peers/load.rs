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
use http_body_util::{BodyExt, Collected, Full, StreamBody};
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
/// The gateway shares its bounds fairly between addresses of callers: `n` of them leave 1/(n + 1) of the
/// 10,240 streams and connections for another one, so that 10,000 need more than 42 addresses.
const CALLER_ADDRESSES: usize = 100;
/// The clock of tasks has ticks of a millisecond: a request that is sent this late was on time.
const TICK: Duration = Duration::from_millis(1);
/// A request that takes longer has failed, and its target with it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);
/// A path that every proxy forwards, SGLang's router included.
const PATH: &str = "/v1/completions";
/// What the mock pod does is in the field `user` of a request, behind these letters. No proxy changes it, and
/// not all of them pass headers on.
const MODE: &[u8] = b"mock-";
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

/// Starts the mock pod, which answers at once, or streams tokens, or opens a stream that never ends. It ends
/// with the runtime.
pub(crate) async fn start_pod() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve_pod(listener));
    address
}

async fn serve_pod(listener: TcpListener) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let _set = stream.set_nodelay(true);
        tokio::spawn(async move {
            let service = service_fn(async |request: Request<Incoming>| {
                let body = request.into_body().collect().await.map(Collected::to_bytes);
                Ok::<_, Infallible>(pod_answer(mode_of(&body.unwrap_or_default())))
            });
            let builder = auto::Builder::new(TokioExecutor::new());
            let _ended = builder.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// The word behind [`MODE`].
fn mode_of(body: &[u8]) -> &[u8] {
    let Some(start) = memchr::memmem::find(body, MODE) else { return b"" };
    let word = &body[start + MODE.len()..];
    let length = word.iter().take_while(|letter| letter.is_ascii_lowercase()).count();
    &word[..length]
}

/// The JSON of a request.
fn body(model: &str, mode: &str) -> String {
    let stream = mode != "answer";
    format!(
        "{{\"model\": \"{model}\", \"prompt\": \"What is the capital of France?\", \"max_tokens\": 16, \
         \"stream\": {stream}, \"user\": \"mock-{mode}\"}}"
    )
}

fn pod_answer(mode: &[u8]) -> Response<AnswerBody> {
    let token = || Ok::<_, Infallible>(Frame::data(Bytes::from_static(TOKEN.as_bytes())));
    let (kind, body) = match mode {
        b"stream" => {
            let tokens = stream::unfold((interval(TOKEN_INTERVAL), 0), move |(mut ticks, sent)| async move {
                if sent == TOKENS_PER_STREAM {
                    return None;
                }
                ticks.tick().await;
                Some((token(), (ticks, sent + 1)))
            });
            ("text/event-stream", BodyExt::boxed_unsync(StreamBody::new(tokens)))
        }
        b"open" => {
            let endless = stream::once(std::future::ready(token())).chain(stream::pending());
            ("text/event-stream", BodyExt::boxed_unsync(StreamBody::new(endless)))
        }
        _ => {
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
    let mut request = Request::new(Full::new(body("a", mode.unwrap_or("answer")).into()));
    *request.method_mut() = http::Method::POST;
    *request.uri_mut() = format!("http://{address}{PATH}").parse().unwrap_or_default();
    request.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
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

/// The text of a page.
pub(crate) async fn get(caller: &CallerClient, address: SocketAddr, path: &str) -> Result<String, LoadError> {
    let uri = format!("http://{address}{path}")
        .parse()
        .map_err(|error: http::uri::InvalidUri| LoadError::of("a path")(&error))?;
    let response = caller.get(uri).await.map_err(|error| LoadError::of("no answer")(&error))?;
    let body = response.into_body().collect().await;
    let body = body.map_err(|error| LoadError::of("an answer broke off")(&error))?.to_bytes();
    Ok(String::from_utf8_lossy(&body).into_owned())
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
    // From 127.0.0.2 on; the other callers have 127.0.0.1.
    let source = |index: usize| {
        let last = u8::try_from(2 + index % CALLER_ADDRESSES).unwrap_or(2);
        Ipv4Addr::new(127, 0, 0, last)
    };
    open_streams_from(address, count, source).await
}

/// The same from given addresses.
pub(crate) async fn open_streams_from(
    address: SocketAddr,
    count: usize,
    source: impl Fn(usize) -> Ipv4Addr,
) -> Result<Vec<TcpStream>, LoadError> {
    let opened = stream::iter(0..count).map(|index| open_stream(address, index, source(index)));
    let mut opened = opened.buffer_unordered(64);
    let mut streams = Vec::with_capacity(count);
    while let Some(stream) = opened.next().await {
        streams.push(stream?);
    }
    Ok(streams)
}

async fn open_stream(address: SocketAddr, index: usize, source: Ipv4Addr) -> Result<TcpStream, LoadError> {
    match timeout(REQUEST_TIMEOUT, opened_stream(address, source)).await {
        Ok(stream) => stream.map_err(|error| LoadError(format!("stream {index}: {error}"))),
        Err(_elapsed) => Err(LoadError(format!("stream {index} did not begin in time"))),
    }
}

/// The text of a request over HTTP/1.1, for a mode of the pod and with further lines of its head.
pub(crate) fn head(model: &str, mode: &str, lines: &str) -> String {
    let body = body(model, mode);
    format!(
        "POST {PATH} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n\
         {lines}content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// A connection from an address of the loopback network.
pub(crate) async fn connect(address: SocketAddr, source: Ipv4Addr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from((source, 0)))?;
    socket.connect(address).await
}

/// A stream that has brought its first token.
pub(crate) async fn opened_stream(address: SocketAddr, source: Ipv4Addr) -> std::io::Result<TcpStream> {
    let mut stream = connect(address, source).await?;
    stream.write_all(head("a", "open", "").as_bytes()).await?;
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
