//! Refuses requests to generate while the models are full, before they are parsed.
//!
//! Where more requests come than can be answered, each refusal takes processor time from the answers. So the
//! listener itself refuses what finds the models full: no route, layer or codec is asked, nothing is
//! traced, and the answer is made once for many requests. The body is read all the same, because a client
//! that is still sending sees a broken connection instead of an answer, and so that the connection can be
//! used again.
//!
//! The answer is the one of the routes, with two differences: a request that is wrong as well learns that
//! when it is sent again, and it has no span. What may precede others is left to the routes: the tenant and
//! the class of a request are in its head, but a body that names a class overrides that. In JSON the word
//! is searched; a message of gRPC is decoded, which takes less.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::{Body, Bytes};
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, EXPECT, ORIGIN};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::response::Response;
use futures::{StreamExt, stream};
use http_body_util::BodyExt;
use prost::Message;
use tokio::time::{Instant, timeout_at};
use trustformers_proto::{Task, v1};

use crate::answer_end::{GatewayLoad, LOAD_HEADER, REPORT_HEADER};
use crate::error::{ApiError, ErrorShape};
use crate::http::{log_refusal, name_request, request_id};
use crate::inference::Inference;
use crate::priority::{self, Priority};
use crate::request_body::BODY_TIMEOUT;
use crate::revision::REVISION_HEADER;
use crate::surfaces::{Endpoint, HttpMethod, Kind, ModelPlace, SURFACES, Surface};
use crate::{Api, tenant};

/// The longest body that is read here. It is searched in less than 20 microseconds.
const MAX_SEARCHED_BYTES: usize = 16 * 1024;
/// Metadata key of a call whose messages are compressed.
const GRPC_ENCODING: &str = "grpc-encoding";

/// What is known of a request before it is parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival<'a> {
    /// Its class.
    pub priority: Priority,
    /// The tenant that it belongs to; empty: none.
    pub tenant: &'a str,
}

/// What becomes of a request.
pub(crate) enum Admission {
    /// This is its answer.
    Refused(Response),
    /// The routes answer it; this is its body.
    Passed(Body),
}

/// Refuses requests in front of the routes of one [`Api`].
pub(crate) struct OverloadGate {
    inference: Arc<dyn Inference>,
    load: GatewayLoad,
    /// The shape of errors of each path that generates.
    shapes: HashMap<String, ErrorShape>,
    /// The last refusal in each shape: at most as many as there are shapes.
    prepared: Mutex<HashMap<ErrorShape, PreparedRefusal>>,
}

/// An answer but for the id of its request.
struct PreparedRefusal {
    error: ApiError,
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl fmt::Debug for OverloadGate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OverloadGate").finish_non_exhaustive()
    }
}

/// The path of a surface that generates and takes the model's name and the class from a body. What only
/// counts tokens never waits for a model.
fn generating_path(surface: &Surface) -> Option<String> {
    let path = match (surface.endpoint, surface.model) {
        (Endpoint::Http { method: HttpMethod::Post, path }, ModelPlace::JsonField) => path.to_owned(),
        (Endpoint::Grpc { service, method }, ModelPlace::ProtoField(_)) => format!("/{service}/{method}"),
        _ => return None,
    };
    let answers_one = !matches!(surface.kind, Kind::Bidirectional | Kind::Upgrade);
    (surface.task == Some(Task::Generate) && answers_one && !surface.cacheable).then_some(path)
}

/// Whether a call has messages as they are, and answers that are no gRPC-Web.
fn is_plain_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).map_or(&[][..], HeaderValue::as_bytes);
    let is_web = kind.starts_with(b"application/grpc-web");
    kind.starts_with(b"application/grpc") && !is_web && !headers.contains_key(GRPC_ENCODING)
}

/// A body of at most [`MAX_SEARCHED_BYTES`].
///
/// # Errors
/// The body, with what was read of it, where it is longer, breaks off or takes longer than bodies may.
async fn read_short(mut body: Body) -> Result<Bytes, Body> {
    let (mut read, mut left_bytes) = (Vec::new(), MAX_SEARCHED_BYTES);
    let deadline = Instant::now() + BODY_TIMEOUT;
    loop {
        let Ok(frame) = timeout_at(deadline, body.frame()).await else {
            return Err(unread(read, None, body));
        };
        let failure = match frame {
            None => return Ok(joined(read)),
            Some(Ok(frame)) => {
                // Nobody reads trailers of a request.
                let Ok(data) = frame.into_data() else { continue };
                let left = left_bytes.checked_sub(data.len());
                read.push(data);
                if let Some(left) = left {
                    left_bytes = left;
                    continue;
                }
                None
            }
            Some(Err(error)) => Some(error),
        };
        return Err(unread(read, failure, body));
    }
}

/// A body that begins with these pieces, and then fails or goes on.
fn unread(read: Vec<Bytes>, failure: Option<axum::Error>, rest: Body) -> Body {
    let read = stream::iter(read.into_iter().map(Ok::<Bytes, axum::Error>));
    let failure = stream::iter(failure.map(Err::<Bytes, axum::Error>));
    Body::from_stream(read.chain(failure).chain(rest.into_data_stream()))
}

fn joined(mut pieces: Vec<Bytes>) -> Bytes {
    if pieces.len() == 1 {
        return pieces.swap_remove(0);
    }
    let mut all = Vec::new();
    for piece in &pieces {
        all.extend_from_slice(piece);
    }
    all.into()
}

/// The class that the only message of a call names, if any; none where it has to be looked at.
fn class_of_message(body: &[u8]) -> Option<Option<Priority>> {
    let ([compressed, length @ ..], message) = body.split_first_chunk::<5>()?;
    if *compressed != 0 || u32::from_be_bytes(*length) as usize != message.len() {
        return None;
    }
    let request = v1::GenerateRequest::decode(message).ok()?;
    priority::of_proto(request.priority).ok()
}

/// Whether a body may name a class: in its field, or in a name that is escaped.
fn may_name_class(body: &[u8]) -> bool {
    // Words of a length that the compiler knows are compared as numbers.
    body.windows(8).any(|bytes| bytes == b"priority") || body.windows(2).any(|bytes| bytes == b"\\u")
}

impl OverloadGate {
    pub(crate) fn new(api: &Api) -> Self {
        let shapes = SURFACES.iter().filter_map(|surface| Some((generating_path(surface)?, surface.errors)));
        Self {
            inference: Arc::clone(&api.inference),
            load: api.gateway_load.clone(),
            shapes: shapes.collect(),
            prepared: Mutex::default(),
        }
    }

    /// Refuses a request, or passes it on with its body.
    pub(crate) async fn look(&self, head: &Parts, body: Body) -> Admission {
        let Some(shape) = self.shape_of(head).filter(|_| self.inference.is_full()) else {
            return Admission::Passed(body);
        };
        let bytes = match read_short(body).await {
            Ok(bytes) => bytes,
            Err(body) => return Admission::Passed(body),
        };
        match self.refusal(head, shape, &bytes) {
            Some(error) => Admission::Refused(self.answer(head, shape, &error)),
            None => Admission::Passed(Body::from(bytes)),
        }
    }

    /// The shape of errors of a request that may be refused here: it generates, its body is short, and its
    /// head asks for nothing that a layer or a route has to see.
    fn shape_of(&self, head: &Parts) -> Option<ErrorShape> {
        let shape = *self.shapes.get(head.uri.path()).filter(|_| head.method == Method::POST)?;
        let headers = &head.headers;
        let is_plain = ![EXPECT, CONTENT_ENCODING, ORIGIN].iter().any(|name| headers.contains_key(name))
            && !headers.contains_key(REVISION_HEADER);
        let is_short = match headers.get(CONTENT_LENGTH) {
            Some(length) => length.to_str().ok()?.parse::<usize>().ok()? <= MAX_SEARCHED_BYTES,
            // Clients of gRPC give none.
            None => shape == ErrorShape::Grpc,
        };
        let is_readable = shape != ErrorShape::Grpc || is_plain_grpc(headers);
        (is_plain && is_short && is_readable).then_some(shape)
    }

    /// Why a request is refused; none where it has to be looked at.
    fn refusal(&self, head: &Parts, shape: ErrorShape, body: &[u8]) -> Option<ApiError> {
        let named = match shape {
            ErrorShape::Grpc => class_of_message(body)?,
            _ if may_name_class(body) => return None,
            _ => None,
        };
        // What is wrong about these headers is for the routes to say.
        let priority = named.or(priority::of_headers(&head.headers).ok()?).unwrap_or_default();
        let tenant = tenant::of_headers(&head.headers).ok()?.unwrap_or_default();
        self.inference.refuse(&Arrival { priority, tenant: &tenant })
    }

    fn answer(&self, head: &Parts, shape: ErrorShape, error: &ApiError) -> Response {
        let mut response = match shape {
            ErrorShape::Grpc => error.render_for(shape, None),
            _ => self.answer_http(head, shape, error),
        };
        if head.headers.contains_key(REPORT_HEADER) {
            let count = HeaderValue::from(self.load.with_refused());
            response.headers_mut().insert(HeaderName::from_static(LOAD_HEADER), count);
        }
        response
    }

    /// The answer with the id of its request.
    fn answer_http(&self, head: &Parts, shape: ErrorShape, error: &ApiError) -> Response {
        let id = request_id(&head.headers);
        log_refusal(&id, error);
        let mut response = match shape {
            // Its body repeats the id.
            ErrorShape::Anthropic => error.render_for(shape, Some(&id)),
            _ => self.prepared(shape, error),
        };
        name_request(response.headers_mut(), shape, id);
        response
    }

    /// The answer of the request before, where it was refused for the same reason.
    fn prepared(&self, shape: ErrorShape, error: &ApiError) -> Response {
        let mut all = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        let prepared = match all.remove(&shape) {
            Some(prepared) if prepared.error == *error => prepared,
            _ => PreparedRefusal::new(shape, error),
        };
        let response = prepared.response();
        all.insert(shape, prepared);
        response
    }
}

impl PreparedRefusal {
    fn new(shape: ErrorShape, error: &ApiError) -> Self {
        let (head, _) = error.render_for(shape, None).into_parts();
        let body = error.to_json_in(shape).to_string().into();
        Self { error: error.clone(), status: head.status, headers: head.headers, body }
    }

    fn response(&self) -> Response {
        let mut response = Response::new(Body::from(self.body.clone()));
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers.clone();
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Fake, Script};
    use crate::server::{self, Limits};
    use axum::http::Request;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    const BODY: &str = r#"{"model":"fake","max_tokens":1,"prompt":"a"}"#;

    fn full() -> ApiError {
        ApiError::Overloaded { message: "9 requests wait".into(), retry_after_s: 3 }
    }

    /// What a server says to requests on one connection, which it closes behind the last one.
    async fn exchange(api: Api, limits: Limits, sent: &str) -> String {
        let listener = server::bind(([127, 0, 0, 1], 0).into()).await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let stop = tokio_util::sync::CancellationToken::new();
        let serving = server::serve(listener, crate::http::router(api), limits, stop.clone());
        let serving = tokio::spawn(serving);
        client.write_all(sent.as_bytes()).await.unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).await.unwrap();
        stop.cancel();
        serving.await.unwrap();
        text
    }

    /// The answer of a server whose models are full, to these requests.
    async fn early(fake: &Fake, sent: &str) -> String {
        let api = fake.api();
        let limits = Limits::default().refusing_early(&api);
        exchange(api, limits, sent).await
    }

    fn post(path: &str, more: &str, body: &str) -> String {
        let length = body.len();
        format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\nx-request-id: mine\r\n{more}content-length: {length}\r\n\r\n{body}"
        )
    }

    /// The lines of an answer in any order, without its time.
    fn lines(answer: &str) -> Vec<&str> {
        let mut lines: Vec<&str> = answer.lines().filter(|line| !line.starts_with("date: ")).collect();
        lines.sort_unstable();
        lines
    }

    #[tokio::test]
    async fn a_refusal_is_the_one_of_the_route() {
        let chat = r#"{"model":"fake","max_tokens":1,"messages":[{"role":"user","content":"a"}]}"#;
        let responses = r#"{"model":"fake","input":"a"}"#;
        let close = "connection: close\r\n";
        for (path, body) in [
            ("/v1/generate", r#"{"prompt":"a"}"#),
            ("/v1/generate/stream", r#"{"prompt":"a"}"#),
            ("/v1/completions", BODY),
            ("/openai/v1/chat/completions", chat),
            ("/v1/responses", responses),
            ("/v1/messages", chat),
        ] {
            for more in [close.to_owned(), format!("{close}{REPORT_HEADER}: 1\r\n")] {
                let sent = post(path, &more, body);
                let looked_at = Fake::with(Script::refused(full()));
                let by_route = exchange(looked_at.api(), Limits::default(), &sent).await;
                let fake = Fake::with(Script::tokens(&["a"]).full(full()));
                let answer = early(&fake, &sent).await;
                assert_eq!(lines(&answer), lines(&by_route), "{path}");
                assert!(answer.contains("retry-after: 3"), "{answer}");
                assert!(!fake.was_asked(), "{path}");
            }
        }
    }

    #[tokio::test]
    async fn a_connection_goes_on_after_a_refusal_and_a_new_reason_is_told() {
        let fake = Fake::with(Script::tokens(&["a"]).full(full()));
        let api = fake.api();
        let gate = OverloadGate::new(&api);
        let one = gate.prepared(ErrorShape::Native, &full());
        assert_eq!(one.headers()["retry-after"], "3");
        let later = ApiError::Overloaded { message: "7 requests wait".into(), retry_after_s: 2 };
        assert_eq!(gate.prepared(ErrorShape::Native, &later).headers()["retry-after"], "2");
        let two = post("/v1/generate", "", BODY)
            + "GET /health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        let answers = early(&fake, &two).await;
        assert!(answers.starts_with("HTTP/1.1 429") && answers.contains("HTTP/1.1 200"), "{answers}");
    }

    #[tokio::test]
    async fn what_may_precede_others_or_needs_a_route_is_looked_at() {
        let long = format!(r#"{{"prompt":"{}"}}"#, "a".repeat(20_000));
        for (more, body) in [
            ("", r#"{"prompt":"a","priority":"high"}"#),
            ("", r#"{"prompt":"a","\u0070riority":"high"}"#),
            ("x-trustformers-priority: high\r\n", r#"{"prompt":"a"}"#),
            ("x-trustformers-revision: r1\r\n", r#"{"prompt":"a"}"#),
            ("origin: https://a.example\r\n", r#"{"prompt":"a"}"#),
            ("", long.as_str()),
        ] {
            let fake = Fake::with(Script::tokens(&["a"]).full(full()));
            let sent = post("/v1/generate", &format!("connection: close\r\n{more}"), body);
            let answer = early(&fake, &sent).await;
            assert!(answer.starts_with("HTTP/1.1 200") && fake.was_asked(), "{more}{answer}");
        }
        // The routes say what is wrong about a class.
        let fake = Fake::with(Script::tokens(&["a"]).full(full()));
        let wrong = post("/v1/generate", "connection: close\r\nx-trustformers-priority: urgent\r\n", BODY);
        assert!(early(&fake, &wrong).await.starts_with("HTTP/1.1 400"));
    }

    #[tokio::test]
    async fn other_routes_and_servers_with_room_are_asked_as_ever() {
        let fake = Fake::with(Script::tokens(&["a"]).full(full()));
        let answer = early(&fake, &post("/v1/embeddings", "connection: close\r\n", r#"{"input":"a"}"#)).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let fake = Fake::with(Script::tokens(&["a"]));
        let answer = early(&fake, &post("/v1/generate", "connection: close\r\n", r#"{"prompt":"a"}"#)).await;
        assert!(answer.starts_with("HTTP/1.1 200") && fake.was_asked(), "{answer}");
    }

    fn message(priority: v1::Priority) -> Vec<u8> {
        let priority = priority as i32;
        let request = v1::GenerateRequest { prompt: "a".into(), priority, ..Default::default() };
        let mut framed = vec![0; 5];
        request.encode(&mut framed).unwrap();
        let length = u32::try_from(framed.len() - 5).unwrap();
        framed[1..5].copy_from_slice(&length.to_be_bytes());
        framed
    }

    fn call(path: &str, kind: &str) -> Parts {
        let request = Request::post(path).header(CONTENT_TYPE, kind).header(REPORT_HEADER, "1");
        request.body(()).unwrap().into_parts().0
    }

    #[tokio::test]
    async fn calls_over_grpc_are_refused_by_the_class_in_their_message() {
        const GENERATE: &str = "/trustformers.v1.InferenceService/Generate";
        let gate = OverloadGate::new(&Fake::with(Script::default().full(full())).api());
        let plain = || message(v1::Priority::Unspecified);
        for path in [GENERATE, "/trustformers.v1.InferenceService/GenerateStream"] {
            let looked = gate.look(&call(path, "application/grpc"), Body::from(plain())).await;
            let Admission::Refused(refused) = looked else { panic!("{path} was passed on") };
            for (name, value) in [("grpc-status", "8"), ("retry-after", "3"), (LOAD_HEADER, "1")] {
                assert_eq!(refused.headers()[name], value, "{path}");
            }
        }
        for (path, kind, body) in [
            (GENERATE, "application/grpc", message(v1::Priority::High)),
            (GENERATE, "application/grpc", [plain(), plain()].concat()),
            (GENERATE, "application/grpc", plain()[..6].to_vec()),
            (GENERATE, "application/grpc", vec![0; 2 * MAX_SEARCHED_BYTES]),
            (GENERATE, "application/grpc-web", plain()),
            ("/trustformers.v1.InferenceService/Embed", "application/grpc", plain()),
        ] {
            let looked = gate.look(&call(path, kind), Body::from(body.clone())).await;
            let Admission::Passed(passed) = looked else { panic!("{path} {kind} was refused") };
            assert_eq!(passed.collect().await.unwrap().to_bytes(), body, "{path} {kind}");
        }
    }

    #[tokio::test]
    async fn a_body_that_is_longer_or_breaks_off_is_passed_on_as_it_is() {
        let piece = || Ok::<_, ApiError>(Bytes::from(vec![7; MAX_SEARCHED_BYTES / 2]));
        let short = Body::from_stream(stream::iter([piece(), piece()]));
        assert_eq!(read_short(short).await.unwrap().len(), MAX_SEARCHED_BYTES);
        let pieces = |last: Result<Bytes, ApiError>| {
            Body::from_stream(stream::iter([piece(), piece(), piece(), last]))
        };
        let long = read_short(pieces(piece())).await.unwrap_err();
        assert_eq!(long.collect().await.unwrap().to_bytes().len(), 2 * MAX_SEARCHED_BYTES);
        let broken = Body::from_stream(stream::iter([piece(), Err(full())]));
        let mut broken = read_short(broken).await.unwrap_err();
        assert_eq!(broken.frame().await.unwrap().unwrap().into_data().unwrap().len(), MAX_SEARCHED_BYTES / 2);
        assert!(broken.frame().await.unwrap().is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_comes_too_slowly_is_left_to_the_routes() {
        let first = stream::iter([Ok::<_, ApiError>(Bytes::from_static(b"{"))]);
        let slow = read_short(Body::from_stream(first.chain(stream::pending()))).await;
        let mut body = slow.unwrap_err();
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "{");
    }

    #[test]
    fn the_routes_that_generate_are_refused_in_their_own_shape() {
        let gate = OverloadGate::new(&Fake::with(Script::default()).api());
        let shape = |path: &str| gate.shapes.get(path).copied();
        assert_eq!(shape("/v1/generate"), Some(ErrorShape::Native));
        assert_eq!(shape("/v1/chat/completions"), Some(ErrorShape::OpenAi));
        assert_eq!(shape("/v1/messages"), Some(ErrorShape::Anthropic));
        assert_eq!(shape("/trustformers.v1.InferenceService/Generate"), Some(ErrorShape::Grpc));
        for other in [
            "/v1/messages/count_tokens",
            "/v1/embeddings",
            "/v1/stream",
            "/v1/models/load",
            "/trustformers.v1.InferenceService/Session",
        ] {
            assert_eq!(shape(other), None, "{other}");
        }
    }
}
