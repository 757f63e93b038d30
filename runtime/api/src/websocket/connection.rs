//! One WebSocket from its handshake to its end.
//!
//! A single task reads and writes. It goes on reading while a write waits for the caller, so that a
//! cancellation is followed at once, and it takes the next message of an answer only when the one before has
//! been accepted for sending. What it holds for a caller that does not read is the write buffer below, the
//! replies that were made at once, and for each running request what the budget of its answer allows.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::http::HeaderMap;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::{Instant, Sleep};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Message as Frame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error as SocketError, Utf8Bytes};

use super::answer::{RouteRequest, messages};
use super::protocol::{Command, Message, Received, Unreadable};
use crate::budget::Share;
use crate::limits::{CallerLimits, too_many_request_bytes};
use crate::multiplex::{Identified, Multiplexer, RequestReply, server_is_ending};
use crate::{Api, ApiError, MAX_BODY_BYTES};

/// Bytes that are read at a time. It is allocated for each connection: 2,048 connections take 16 MiB.
const READ_BUFFER_BYTES: usize = 8 * 1024;
/// Bytes that gather before they are written without being flushed: some hundred tokens.
const WRITE_BUFFER_BYTES: usize = 16 * 1024;
/// Replies that are made at once (refusals, cancellations) and wait to be sent. Nothing more is read while
/// they are as many: at most 6 KiB each, 96 KiB.
const MAX_WAITING_REPLIES: usize = 16;
/// After this silence of the caller a ping is sent.
const PING_INTERVAL: Duration = Duration::from_secs(20);
/// The time in which something must come after a ping.
const PONG_TIMEOUT: Duration = Duration::from_secs(10);
/// The time in which the caller must take the close frame and answer it.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// The most bytes that are discarded after the close frame: 16 messages of the longest length.
const MAX_DISCARDED_BYTES: u64 = 16 * MAX_BODY_BYTES as u64;
/// Bytes of a caller's control frame (ping, pong, close) beside its payload: two, and a mask of four.
const CONTROL_HEAD_BYTES: usize = 6;

/// What a connection answers with.
pub(super) struct Connection {
    api: Api,
    routes: Router,
    /// The headers of each request.
    headers: HeaderMap,
    limits: CallerLimits,
    running: Multiplexer<Message>,
    /// Texts that wait to be sent.
    waiting: VecDeque<String>,
}

/// Why a connection ends.
enum End {
    /// The caller has gone, or has closed it.
    Gone,
    /// This side closes it.
    Close(CloseFrame),
}

impl End {
    fn close(code: CloseCode, reason: &'static str) -> Self {
        Self::Close(CloseFrame { code, reason: Utf8Bytes::from_static(reason) })
    }
}

impl Connection {
    pub(super) fn new(api: Api, headers: HeaderMap, limits: CallerLimits) -> Self {
        Self {
            routes: crate::http::routes().with_state(api.clone()),
            running: Multiplexer::new("id", limits.clone()),
            waiting: VecDeque::new(),
            api,
            headers,
            limits,
        }
    }

    /// Answers until the caller goes or the server ends.
    pub(super) async fn run<S: AsyncRead + AsyncWrite + Unpin>(mut self, socket: S) {
        // A share of no bytes is never refused.
        let Ok(share) = self.limits.request_bytes(0) else { return };
        let arriving = Arc::new(Mutex::new(share));
        let socket = MeteredReads { socket, arriving: Arc::clone(&arriving) };
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER_BYTES)
            .write_buffer_size(WRITE_BUFFER_BYTES)
            .max_message_size(Some(MAX_BODY_BYTES))
            .max_frame_size(Some(MAX_BODY_BYTES));
        let socket = WebSocketStream::from_raw_socket(socket, Role::Server, Some(config)).await;
        let (writer, reader) = socket.split();
        let mut halves = Halves { writer, reader, unflushed: false, silence: Silence::new() };
        let end = self.serve(&mut halves, &arriving).await;
        // Nothing runs on while the close frame is on its way.
        drop(self);
        if let End::Close(frame) = end
            && tokio::time::timeout(CLOSE_TIMEOUT, halves.close(frame)).await.is_err()
        {
            tracing::debug!("a WebSocket was cut off: its close frame was not answered");
        }
    }

    async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        halves: &mut Halves<S>,
        arriving: &Mutex<Share>,
    ) -> End {
        loop {
            let closing = self.api.closing.is_cancelled();
            if closing && self.running.is_idle() && self.waiting.is_empty() && !halves.unflushed {
                return End::close(CloseCode::Away, "the server ends");
            }
            let Halves { writer, reader, unflushed, silence } = halves;
            let writes = !self.waiting.is_empty();
            let may_read = self.waiting.len() < MAX_WAITING_REPLIES;
            let may_write = writes || *unflushed;
            tokio::select! {
                frame = reader.next(), if may_read => {
                    silence.broken();
                    if let Some(end) = self.receive(frame, arriving).await {
                        return end;
                    }
                }
                written = poll_fn(|context| poll_written(writer, context, writes)), if may_write => {
                    let sent = written.and_then(|()| match self.waiting.pop_front() {
                        Some(text) => writer.start_send_unpin(Frame::text(text)),
                        None => Ok(()),
                    });
                    if sent.is_err() {
                        return End::Gone;
                    }
                    *unflushed = writes;
                }
                Identified { id, reply } = self.running.next(), if !writes => {
                    self.waiting.push_back(reply.write(Some(&id)));
                }
                () = &mut silence.until => match silence.next(*unflushed) {
                    Quiet::Ping => {
                        if writer.start_send_unpin(Frame::Ping(Bytes::new())).is_err() {
                            return End::Gone;
                        }
                        *unflushed = true;
                    }
                    Quiet::Wait => {}
                    Quiet::Gone => return End::Gone,
                },
                () = self.api.closing.cancelled(), if !closing => {}
            }
        }
    }

    /// Takes what was read.
    async fn receive(
        &mut self,
        frame: Option<Result<Frame, SocketError>>,
        arriving: &Mutex<Share>,
    ) -> Option<End> {
        let text = match frame {
            Some(Ok(Frame::Text(text))) => text,
            Some(Ok(Frame::Binary(_))) => {
                let message = "a message is binary: send its JSON as text".to_owned();
                self.reply(None, Message::failed(ApiError::InvalidRequest { field: None, message }));
                return None;
            }
            // The library answers pings and closes by itself.
            Some(Ok(control)) => {
                let mut share = arriving.lock().unwrap_or_else(PoisonError::into_inner);
                let rest = share.units().saturating_sub(CONTROL_HEAD_BYTES + control.len());
                share.shrink_to(rest);
                return None;
            }
            Some(Err(error)) => return Some(end_after(&error)),
            None => return Some(End::Gone),
        };
        // The message is complete: from here on its request counts for it.
        arriving.lock().unwrap_or_else(PoisonError::into_inner).shrink_to(0);
        let bytes = Bytes::from(text);
        let length = bytes.len();
        let read = self.api.parse(bytes, |bytes| Ok(Received::read(bytes))).await;
        match read.unwrap_or_else(|error| Err(Unreadable { id: None, error })) {
            Err(Unreadable { id, error }) => self.reply(id.as_deref(), Message::failed(error)),
            Ok(Received { id, command: Command::Cancel }) => {
                // A request may end while its cancellation is on the way.
                if self.running.cancel(&id) {
                    self.reply(Some(&id), Message::cancelled());
                }
            }
            Ok(Received { id, command: Command::Start { route, body } }) => {
                let request = RouteRequest { route, headers: self.headers.clone(), body };
                let started = if self.api.closing.is_cancelled() {
                    Err(server_is_ending())
                } else {
                    self.running.start(&id, length, messages(self.routes.clone(), request))
                };
                if let Err(error) = started {
                    self.reply(Some(&id), Message::failed(error));
                }
            }
        }
        None
    }

    fn reply(&mut self, id: Option<&str>, message: Message) {
        self.waiting.push_back(message.write(id));
    }
}

/// The two directions of a connection.
struct Halves<S> {
    writer: Writer<S>,
    reader: SplitStream<WebSocketStream<MeteredReads<S>>>,
    /// Whether something was accepted for sending and may not have been written yet.
    unflushed: bool,
    silence: Silence,
}

type Writer<S> = SplitSink<WebSocketStream<MeteredReads<S>>, Frame>;

/// Ends when the next frame can be accepted for sending, or, where none waits, when all have been written.
fn poll_written<S: AsyncRead + AsyncWrite + Unpin>(
    writer: &mut Writer<S>,
    context: &mut Context<'_>,
    writes: bool,
) -> Poll<Result<(), SocketError>> {
    if writes { writer.poll_ready_unpin(context) } else { writer.poll_flush_unpin(context) }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Halves<S> {
    /// Sends a close frame, and discards what the caller still sends: a socket that is closed with unread
    /// bytes takes back what it has sent.
    async fn close(mut self, frame: CloseFrame) {
        if self.writer.send(Frame::Close(Some(frame))).await.is_err() {
            return;
        }
        let Ok(socket) = self.writer.reunite(self.reader) else { return };
        let mut socket = socket.into_inner().socket;
        if socket.shutdown().await.is_ok() {
            // What ends the copy, an error included, ends the connection.
            let _ = tokio::io::copy(&mut socket.take(MAX_DISCARDED_BYTES), &mut tokio::io::sink()).await;
        }
    }
}

/// How long nothing has come from the caller.
struct Silence {
    until: Pin<Box<Sleep>>,
    pinged: bool,
}

/// What to do about a silence.
enum Quiet {
    Ping,
    Wait,
    Gone,
}

impl Silence {
    fn new() -> Self {
        Self { until: Box::pin(tokio::time::sleep(PING_INTERVAL)), pinged: false }
    }

    /// Something came.
    fn broken(&mut self) {
        self.pinged = false;
        self.until.as_mut().reset(Instant::now() + PING_INTERVAL);
    }

    /// The time is over. While the caller does not take what is sent, a ping would not reach it either, and
    /// the system ends a connection whose other side has gone.
    fn next(&mut self, unflushed: bool) -> Quiet {
        let (next, wait) = match (unflushed, self.pinged) {
            (true, _) => (Quiet::Wait, PING_INTERVAL),
            (false, false) => (Quiet::Ping, PONG_TIMEOUT),
            (false, true) => return Quiet::Gone,
        };
        self.pinged |= matches!(next, Quiet::Ping);
        self.until.as_mut().reset(Instant::now() + wait);
        next
    }
}

/// How a connection ends whose frames cannot be read.
fn end_after(error: &SocketError) -> End {
    match error {
        SocketError::Capacity(_) => End::close(CloseCode::Size, "a message is longer than 4 MiB"),
        SocketError::Protocol(_) => End::close(CloseCode::Protocol, "the frames break the protocol"),
        SocketError::Utf8(_) => End::close(CloseCode::Invalid, "a message is not UTF-8"),
        SocketError::Io(error) if error.kind() == io::ErrorKind::QuotaExceeded => {
            End::close(CloseCode::Again, "the memory for requests is in use; connect again later")
        }
        _ => End::Gone,
    }
}

/// A socket whose bytes count against the budget for requests until the message that they belong to is
/// complete.
struct MeteredReads<S> {
    socket: S,
    arriving: Arc<Mutex<Share>>,
}

impl<S: AsyncRead + Unpin> AsyncRead for MeteredReads<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        std::task::ready!(Pin::new(&mut self.socket).poll_read(context, buffer))?;
        let bytes = buffer.filled().len() - before;
        if self.arriving.lock().unwrap_or_else(PoisonError::into_inner).try_grow(bytes) {
            Poll::Ready(Ok(()))
        } else {
            let error = too_many_request_bytes().to_string();
            Poll::Ready(Err(io::Error::new(io::ErrorKind::QuotaExceeded, error)))
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for MeteredReads<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::FairBudget;
    use crate::fake::{Fake, Script};
    use crate::server::{Limits, bind, serve};
    use futures::FutureExt;
    use serde_json::{Value, json};
    use tokio::net::TcpStream;
    use tokio::task::JoinHandle;
    use tokio_tungstenite::client_async;
    use tokio_tungstenite::tungstenite::client::IntoClientRequest;
    use tokio_util::sync::CancellationToken;

    struct Server {
        fake: Fake,
        address: std::net::SocketAddr,
        stop: CancellationToken,
        task: JoinHandle<()>,
    }

    /// A real server on a free port of the loopback.
    async fn start(script: Script, limits: Limits) -> Server {
        let fake = Fake::with(script);
        let listener = bind(([127, 0, 0, 1], 0).into()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let task = tokio::spawn(serve(listener, crate::http::router(fake.api()), limits, stop.clone()));
        Server { fake, address, stop, task }
    }

    struct Client(WebSocketStream<TcpStream>);

    impl Client {
        async fn to(server: &Server) -> Self {
            let mut request = format!("ws://{}/v1/stream", server.address).into_client_request().unwrap();
            request.headers_mut().insert("x-trustformers-priority", "low".parse().unwrap());
            let socket = TcpStream::connect(server.address).await.unwrap();
            Self(client_async(request, socket).await.unwrap().0)
        }

        async fn send(&mut self, message: Value) {
            self.0.send(Frame::text(message.to_string())).await.unwrap();
        }

        async fn generate(&mut self, id: &str) {
            self.send(json!({"id": id, "type": "generate", "prompt": "x"})).await;
        }

        /// The next message as JSON.
        async fn next(&mut self) -> Value {
            loop {
                match self.0.next().await.unwrap().unwrap() {
                    Frame::Text(text) => return serde_json::from_str(&text).unwrap(),
                    Frame::Ping(_) | Frame::Pong(_) => {}
                    other => panic!("{other:?}"),
                }
            }
        }

        /// The code with which the server closes.
        async fn close_code(&mut self) -> u16 {
            loop {
                if let Frame::Close(frame) = self.0.next().await.unwrap().unwrap() {
                    return frame.unwrap().code.into();
                }
            }
        }
    }

    #[tokio::test]
    async fn several_requests_are_answered_over_one_connection() {
        let server = start(Script::tokens(&["a", "b"]), Limits::default()).await;
        let mut client = Client::to(&server).await;
        client.generate("1").await;
        client.generate("2").await;
        let mut texts = std::collections::BTreeMap::<String, String>::new();
        let mut ended = 0;
        while ended < 2 {
            let message = client.next().await;
            let text = texts.entry(message["id"].as_str().unwrap().to_owned()).or_default();
            if message["type"] == "finished" {
                assert_eq!(
                    (&message["finish_reason"], &message["answer_id"]),
                    (&json!("stop"), &json!("gen-1"))
                );
                assert_eq!(
                    (&message["usage"]["total_tokens"], &message["revision"]),
                    (&json!(5), &json!("r1"))
                );
                ended += 1;
            } else {
                assert_eq!(message["type"], "token");
                text.push_str(message["text"].as_str().unwrap());
            }
        }
        assert_eq!(texts, [("1".to_owned(), "ab".to_owned()), ("2".to_owned(), "ab".to_owned())].into());
        assert_eq!(
            server.fake.last_request().priority,
            crate::Priority::Low,
            "headers of the handshake apply"
        );
    }

    #[tokio::test]
    async fn a_request_is_cancelled_alone_and_all_with_their_connection() {
        let server = start(Script::tokens(&["a"]).then_hangs(), Limits::default()).await;
        let mut client = Client::to(&server).await;
        for id in ["1", "2", "3"] {
            client.generate(id).await;
            assert_eq!(client.next().await["id"], id);
        }
        client.send(json!({"id": "2", "type": "cancel"})).await;
        let expected = json!({"id": "2", "type": "finished", "finish_reason": "cancelled"});
        assert_eq!(client.next().await, expected);
        server.fake.until_running(2).await;
        client.send(json!({"id": "unknown", "type": "cancel"})).await;
        client.generate("2").await;
        assert_eq!(client.next().await["text"], "a", "a cancellation of nothing has no answer");
        drop(client);
        server.fake.until_running(0).await;
    }

    #[tokio::test]
    async fn errors_name_their_request_and_the_connection_goes_on() {
        let full = ApiError::Overloaded { message: "full".into(), retry_after_s: 3 };
        let server = start(Script::refused(full), Limits::default()).await;
        let mut client = Client::to(&server).await;
        client.generate("1").await;
        let error = json!({"type": "overloaded", "message": "full", "retry_after_s": 3});
        assert_eq!(client.next().await, json!({"id": "1", "type": "error", "error": error}));
        for (message, id, begins) in [
            (json!({"id": "2", "type": "generate", "prompt": 7}), json!("2"), "prompt: "),
            (json!({"id": "2", "type": "generate", "promt": "x"}), json!("2"), "promt: "),
            (json!({"id": "3", "type": "subscribe"}), json!("3"), "type: there is no \"subscribe\""),
            (json!({"id": "", "type": "generate", "prompt": "x"}), json!(""), "id: has 0 bytes"),
            (json!([]), Value::Null, "the message is not a JSON object"),
        ] {
            client.send(message).await;
            let answer = client.next().await;
            assert_eq!((&answer["id"], &answer["type"]), (&id, &json!("error")));
            let message = answer["error"]["message"].as_str().unwrap();
            assert!(message.starts_with(begins), "{message}");
        }
        client.0.send(Frame::binary(vec![1, 2])).await.unwrap();
        assert_eq!(client.next().await["error"]["message"], "a message is binary: send its JSON as text");
    }

    #[tokio::test]
    async fn a_chat_comes_in_the_chunks_of_its_route() {
        let server = start(Script::tokens(&["a", "b"]), Limits::default()).await;
        let mut client = Client::to(&server).await;
        let messages = json!([{"role": "user", "content": "Hi"}]);
        client.send(json!({"id": "1", "type": "chat", "messages": messages})).await;
        let mut text = String::new();
        loop {
            let message = client.next().await;
            assert_eq!(message["id"], "1", "{message}");
            if message["type"] == "finished" {
                break;
            }
            assert_eq!(
                (&message["type"], &message["chunk"]["object"]),
                (&json!("token"), &json!("chat.completion.chunk"))
            );
            text.push_str(message["chunk"]["choices"][0]["delta"]["content"].as_str().unwrap_or_default());
        }
        assert_eq!(text, "ab");
        client.send(json!({"id": "2", "type": "chat", "messages": 7})).await;
        let answer = client.next().await;
        assert_eq!(
            (&answer["error"]["type"], &answer["error"]["field"]),
            (&json!("invalid_request"), &json!("messages"))
        );
    }

    #[tokio::test]
    async fn an_error_in_the_middle_of_an_answer_is_its_last_message() {
        let broken = ApiError::Internal { message: "the device failed".into() };
        let server = start(Script::tokens(&["a"]).then_fails(broken), Limits::default()).await;
        let mut client = Client::to(&server).await;
        client.generate("1").await;
        assert_eq!(client.next().await["text"], "a");
        assert_eq!(client.next().await["error"]["type"], "internal");
        client.generate("1").await;
        assert_eq!(client.next().await["text"], "a", "the id is free again");
    }

    #[tokio::test]
    async fn pings_are_answered_and_a_silent_caller_is_pinged_then_closed() {
        let server = start(Script::tokens(&["a"]), Limits::default()).await;
        let mut client = Client::to(&server).await;
        client.0.send(Frame::Ping(Bytes::from_static(b"here"))).await.unwrap();
        assert_eq!(client.0.next().await.unwrap().unwrap(), Frame::Pong(Bytes::from_static(b"here")));
        tokio::time::pause();
        // The client's library answers a ping when it is read.
        for _ in 0..3 {
            assert_eq!(client.0.next().await.unwrap().unwrap(), Frame::Ping(Bytes::new()));
        }
        let mut socket = client.0.into_inner();
        let began = Instant::now();
        let mut rest = Vec::new();
        socket.read_to_end(&mut rest).await.unwrap();
        assert!(began.elapsed() <= PING_INTERVAL + PONG_TIMEOUT, "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn the_end_of_the_server_lets_requests_finish_and_closes_with_1001() {
        let server = start(Script::tokens(&["a"]).then_hangs(), Limits::default()).await;
        let mut client = Client::to(&server).await;
        client.generate("1").await;
        client.next().await;
        server.fake.api().closing.cancel();
        server.stop.cancel();
        client.generate("2").await;
        assert_eq!(client.next().await["error"]["type"], "unavailable");
        let mut task = server.task;
        assert!((&mut task).now_or_never().is_none(), "a request still runs");
        client.send(json!({"id": "1", "type": "cancel"})).await;
        assert_eq!(client.next().await["finish_reason"], "cancelled");
        assert_eq!(client.close_code().await, 1001);
        drop(client);
        task.await.unwrap();
    }

    #[tokio::test]
    async fn dropping_the_server_cuts_connections_off() {
        let server = start(Script::tokens(&["a"]).then_hangs(), Limits::default()).await;
        let mut client = Client::to(&server).await;
        client.generate("1").await;
        client.next().await;
        server.task.abort();
        server.fake.until_running(0).await;
        assert!(client.0.next().await.is_none_or(|read| read.is_err()));
    }

    #[tokio::test]
    async fn a_message_beyond_the_bound_closes_the_connection() {
        let server = start(Script::tokens(&["a"]), Limits::default()).await;
        let mut client = Client::to(&server).await;
        let long = "x".repeat(MAX_BODY_BYTES + 1);
        // The server may close before all of it is sent.
        let _ = client.0.send(Frame::text(long)).await;
        assert_eq!(client.close_code().await, 1009);
    }

    #[tokio::test]
    async fn messages_and_answers_count_against_the_budgets() {
        let limits = Limits {
            request_bytes: FairBudget::new(4096),
            answer_bytes: FairBudget::new(6 * crate::limits::SEND_BUFFER_BYTES),
            ..Limits::default()
        };
        let server = start(Script::tokens(&["a"]).then_hangs(), limits.clone()).await;
        let mut client = Client::to(&server).await;
        for id in ["1", "2", "3"] {
            client.generate(id).await;
            assert_eq!(client.next().await["text"], "a");
        }
        client.generate("4").await;
        assert_eq!(client.next().await["error"]["type"], "overloaded");
        assert_eq!(limits.answer_bytes.used(), 3 * crate::limits::SEND_BUFFER_BYTES);
        assert_eq!(limits.request_bytes.used(), 0, "a request counts until its answer begins");
        client.send(json!({"id": "5", "type": "generate", "prompt": "x".repeat(5000)})).await;
        assert_eq!(client.close_code().await, 1013);
        server.fake.until_running(0).await;
        assert_eq!(limits.answer_bytes.used(), 0);
    }
}
