//! What browsers need from a listener: cross-origin requests (CORS), and gRPC-Web beside HTTP.
//!
//! A page of any origin may call this server, without credentials of the browser (cookies, client
//! certificates): the server has none that a page could misuse, and a key that a page sends in a header is
//! the page's own. A server may be told to allow some origins only ([`AllowedOrigins`]). Browsers enforce
//! that for what a page may read, but send simple requests and open WebSockets all the same; so every request
//! of another origin is refused here, before any work.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_TYPE, ORIGIN, RETRY_AFTER};
use axum::http::uri::Authority;
use axum::http::{HeaderName, HeaderValue, Method};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use tower::ServiceExt;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use crate::echo::echo;
use crate::error::{ApiError, ErrorShape, GRPC_KIND_KEY};
use crate::http::REQUEST_ID;
use crate::revision::{DIGEST_HEADER, REVISION_HEADER};
use crate::surfaces::error_shape;

/// How long a browser may remember that it may call.
const MAX_AGE: Duration = Duration::from_secs(3600);

/// The origins whose pages may call a server.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum AllowedOrigins {
    /// Every one.
    #[default]
    Any,
    /// Those of this list, as browsers write them.
    Only(Vec<HeaderValue>),
}

/// A text that no browser sends as its origin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not an origin: give scheme, host and, where it is not the usual one, port, as https://a.example"
)]
pub struct InvalidOrigin(
    /// The text.
    pub String,
);

impl AllowedOrigins {
    /// Those of a list; an empty one allows every origin.
    ///
    /// # Errors
    /// [`InvalidOrigin`]: the first text that is none.
    pub fn listed(origins: &[String]) -> Result<Self, InvalidOrigin> {
        if origins.is_empty() {
            return Ok(Self::Any);
        }
        let value = |origin: &String| is_origin(origin).then(|| HeaderValue::from_str(origin).ok()).flatten();
        let values = origins.iter().map(|origin| value(origin).ok_or_else(|| InvalidOrigin(origin.clone())));
        values.collect::<Result<_, _>>().map(Self::Only)
    }

    fn allows(&self, origin: &HeaderValue) -> bool {
        match self {
            Self::Any => true,
            Self::Only(origins) => origins.contains(origin),
        }
    }

    fn for_cors(&self) -> AllowOrigin {
        match self {
            Self::Any => AllowOrigin::any(),
            Self::Only(origins) => AllowOrigin::list(origins.iter().cloned()),
        }
    }
}

/// Whether a text is a scheme with a host and no more, in lower case.
fn is_origin(text: &str) -> bool {
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    host.is_some_and(|host| host.parse::<Authority>().is_ok() && !host.contains('@'))
        && !text.contains(|c: char| c.is_ascii_uppercase())
}

/// The headers of answers that a page may read beyond the usual ones.
fn exposed() -> Vec<HeaderName> {
    let named = [
        "grpc-status",
        "grpc-message",
        "request-id",
        "retry-after-ms",
        "x-should-retry",
        GRPC_KIND_KEY,
        REVISION_HEADER,
        DIGEST_HEADER,
    ];
    let named = named.into_iter().map(HeaderName::from_static);
    named.chain([REQUEST_ID, RETRY_AFTER]).collect()
}

/// The routes of the HTTP listener: those of [`crate::http::router`], and with them the gRPC services of
/// [`crate::grpc::router`], for gRPC-Web and for clients that know one address only.
pub fn http_listener(http: Router, grpc: Router, origins: &AllowedOrigins) -> Router {
    crossing_origins(http.layer(from_fn_with_state(grpc, by_content_type)), origins)
}

/// The routes of the gRPC listener.
pub fn grpc_listener(grpc: Router, origins: &AllowedOrigins) -> Router {
    crossing_origins(grpc, origins)
}

async fn by_content_type(State(grpc): State<Router>, request: Request, next: Next) -> Response {
    let kind = request.headers().get(CONTENT_TYPE);
    if kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc")) {
        answer(grpc, request).await
    } else {
        next.run(request).await
    }
}

async fn answer(router: Router, request: Request) -> Response {
    match router.oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}

/// What the requests of pages go through.
#[derive(Clone)]
struct Crossing {
    router: Router,
    origins: Arc<AllowedOrigins>,
}

/// Answers preflight requests, and names to a page what it may read. Requests without an origin, as every
/// client but a browser sends, pass by.
fn crossing_origins(router: Router, origins: &AllowedOrigins) -> Router {
    let cors = CorsLayer::new()
        .allow_origin(origins.for_cors())
        .allow_methods([Method::GET, Method::POST])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(exposed())
        .max_age(MAX_AGE);
    let crossing = Crossing { router: router.clone().layer(cors), origins: Arc::new(origins.clone()) };
    router.layer(from_fn_with_state(crossing, by_origin))
}

async fn by_origin(State(crossing): State<Crossing>, request: Request, next: Next) -> Response {
    let Some(origin) = request.headers().get(ORIGIN) else { return next.run(request).await };
    // A preflight request causes no work, and its answer tells the browser that it is not allowed.
    if request.method() != Method::OPTIONS && !crossing.origins.allows(origin) {
        return not_allowed(origin).render(shape_of(&request));
    }
    answer(crossing.router, request).await
}

fn not_allowed(origin: &HeaderValue) -> ApiError {
    let origin = String::from_utf8_lossy(origin.as_bytes());
    let message = format!(
        "pages of {:?} may not call this server; whoever runs it can add the origin to those that it allows",
        echo(&origin)
    );
    ApiError::Forbidden { message }
}

/// The words of the protocol that is asked.
fn shape_of(request: &Request) -> ErrorShape {
    let kind = request.headers().get(CONTENT_TYPE);
    if kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc")) {
        ErrorShape::Grpc
    } else {
        error_shape(request.uri().path())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Fake, Script};
    use crate::grpc;
    use crate::server::{Limits, bind, serve};
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use prost::Message;
    use std::net::SocketAddr;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio_util::sync::CancellationToken;
    use trustformers_proto::v1;

    /// Both listeners on free ports of the loopback.
    async fn start(script: Script) -> [SocketAddr; 2] {
        start_for(script, &AllowedOrigins::Any).await
    }

    async fn start_for(script: Script, origins: &AllowedOrigins) -> [SocketAddr; 2] {
        let fake = Fake::with(script);
        let services = grpc::router(fake.api()).unwrap();
        let routers = [
            http_listener(crate::http::router(fake.api()), services.clone(), origins),
            grpc_listener(services, origins),
        ];
        let mut addresses = Vec::new();
        for router in routers {
            let listener = bind(([127, 0, 0, 1], 0).into()).await.unwrap();
            addresses.push(listener.local_addr().unwrap());
            tokio::spawn(serve(listener, router, Limits::default(), CancellationToken::new()));
        }
        addresses.try_into().unwrap()
    }

    /// One exchange over HTTP/1.1: the head of the answer in lower case, and its body without chunks.
    async fn exchange(address: SocketAddr, head: &str, body: &[u8]) -> (String, Vec<u8>) {
        let mut client = TcpStream::connect(address).await.unwrap();
        let head =
            format!("{head}\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
        client.write_all(&[head.as_bytes(), body].concat()).await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        let end = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap() + 4;
        let head = String::from_utf8(answer[..end].to_vec()).unwrap().to_lowercase();
        let mut rest = &answer[end..];
        if !head.contains("transfer-encoding: chunked") {
            return (head, rest.to_vec());
        }
        let mut body = Vec::new();
        loop {
            let line = rest.windows(2).position(|two| two == b"\r\n").unwrap();
            let length = usize::from_str_radix(std::str::from_utf8(&rest[..line]).unwrap(), 16).unwrap();
            body.extend_from_slice(&rest[line + 2..line + 2 + length]);
            if length == 0 {
                return (head, body);
            }
            rest = &rest[line + 4 + length..];
        }
    }

    fn framed(flag: u8, bytes: &[u8]) -> Vec<u8> {
        [&[flag][..], &u32::try_from(bytes.len()).unwrap().to_be_bytes(), bytes].concat()
    }

    /// The messages of an answer of gRPC-Web, and its trailers.
    fn unframed(mut body: &[u8]) -> (Vec<Vec<u8>>, String) {
        let mut messages = Vec::new();
        loop {
            let length = u32::from_be_bytes(body[1..5].try_into().unwrap()) as usize;
            let bytes = body[5..5 + length].to_vec();
            if body[0] & 0x80 != 0 {
                return (messages, String::from_utf8(bytes).unwrap());
            }
            messages.push(bytes);
            body = &body[5 + length..];
        }
    }

    fn call(method: &str, kind: &str) -> String {
        let path = format!("/trustformers.v1.InferenceService/{method}");
        format!("POST {path} HTTP/1.1\r\norigin: https://page.example\r\ncontent-type: application/{kind}")
    }

    fn hello() -> Vec<u8> {
        framed(0, &v1::GenerateRequest { prompt: "Hi".into(), ..Default::default() }.encode_to_vec())
    }

    #[tokio::test]
    async fn grpc_web_is_answered_on_both_listeners_in_both_forms() {
        for address in start(Script::tokens(&["a", "b"])).await {
            let (head, body) = exchange(address, &call("Generate", "grpc-web+proto"), &hello()).await;
            assert!(head.contains("content-type: application/grpc-web+proto"), "{head}");
            let (messages, trailers) = unframed(&body);
            assert_eq!(v1::GenerateResponse::decode(&messages[0][..]).unwrap().text, "ab");
            assert!(trailers.contains("grpc-status:0"), "{trailers}");

            let text =
                format!("{}\r\naccept: application/grpc-web-text", call("GenerateStream", "grpc-web-text"));
            let (head, body) = exchange(address, &text, STANDARD.encode(hello()).as_bytes()).await;
            assert!(head.contains("content-type: application/grpc-web-text"), "{head}");
            // Each piece is encoded by itself, and ends with its padding.
            let pieces = String::from_utf8(body).unwrap();
            let mut decoded = Vec::new();
            for four in pieces.as_bytes().chunks(4) {
                decoded.extend(STANDARD.decode(four).unwrap());
            }
            let (messages, trailers) = unframed(&decoded);
            let texts: Vec<String> = (messages.iter())
                .map(|message| v1::GenerateStreamResponse::decode(&message[..]).unwrap().text)
                .collect();
            assert_eq!(texts, ["a", "b", ""]);
            assert!(trailers.contains("grpc-status:0"), "{trailers}");
        }
    }

    #[tokio::test]
    async fn errors_of_grpc_web_have_their_status_and_kind() {
        let refused = ApiError::Overloaded { message: "full".into(), retry_after_s: 3 };
        for address in start(Script::refused(refused)).await {
            let (head, _) = exchange(address, &call("Generate", "grpc-web"), &hello()).await;
            for line in ["grpc-status: 8", "trustformers-error: overloaded", "retry-after: 3"] {
                assert!(head.contains(line), "{head}");
            }
        }
    }

    #[tokio::test]
    async fn a_page_of_any_origin_may_call_and_read_what_it_needs() {
        for address in start(Script::tokens(&["a"])).await {
            let asks = "OPTIONS /trustformers.v1.InferenceService/Generate HTTP/1.1\r\norigin: https://page.example\
                \r\naccess-control-request-method: POST\r\naccess-control-request-headers: authorization,x-grpc-web";
            let (head, _) = exchange(address, asks, b"").await;
            assert!(head.starts_with("http/1.1 200"), "{head}");
            assert!(head.contains("access-control-allow-origin: *"), "{head}");
            assert!(head.contains("access-control-allow-headers: authorization,x-grpc-web"), "{head}");
            assert!(head.contains("access-control-allow-methods: get,post"), "{head}");
            assert!(!head.contains("credentials"), "{head}");

            let (head, _) = exchange(address, &call("Generate", "grpc-web"), &hello()).await;
            for name in
                ["grpc-status", "grpc-message", "x-request-id", "retry-after", "x-trustformers-revision"]
            {
                let exposed = head.lines().find(|line| line.starts_with("access-control-expose-headers"));
                assert!(exposed.unwrap().contains(name), "{head}");
            }
        }
    }

    #[tokio::test]
    async fn requests_without_an_origin_are_as_before() {
        let [http, _] = start(Script::tokens(&["a"])).await;
        let body = br#"{"prompt":"a"}"#;
        let (plain, _) = exchange(http, "POST /v1/generate HTTP/1.1", body).await;
        assert!(plain.starts_with("http/1.1 200") && !plain.contains("access-control"), "{plain}");
        let page = "POST /v1/generate HTTP/1.1\r\norigin: https://page.example";
        let (crossing, _) = exchange(http, page, body).await;
        assert!(crossing.contains("access-control-allow-origin: *"), "{crossing}");
    }

    #[tokio::test]
    async fn other_origins_than_those_of_a_list_are_kept_out() {
        let origins = AllowedOrigins::listed(&["https://page.example".to_owned()]).unwrap();
        let [http, _] = start_for(Script::tokens(&["a"]), &origins).await;
        for (origin, allowed) in [("https://page.example", true), ("https://other.example", false)] {
            let asks = format!(
                "OPTIONS /v1/generate HTTP/1.1\r\norigin: {origin}\r\naccess-control-request-method: POST"
            );
            let (head, _) = exchange(http, &asks, b"").await;
            assert_eq!(head.contains(&format!("access-control-allow-origin: {origin}")), allowed, "{head}");
            // The socket of an allowed page is refused for its incomplete handshake.
            let plain = "content-type: text/plain";
            for asks in [
                format!("GET /v1/stream HTTP/1.1\r\norigin: {origin}\r\nupgrade: websocket"),
                format!("POST /v1/generate HTTP/1.1\r\norigin: {origin}\r\n{plain}"),
                format!("POST /v1/chat/completions HTTP/1.1\r\norigin: {origin}\r\n{plain}"),
                format!("GET /v1/models HTTP/1.1\r\norigin: {origin}"),
            ] {
                let (head, body) = exchange(http, &asks, br#"{"prompt":"a"}"#).await;
                let body = String::from_utf8(body).unwrap();
                let refused = head.starts_with("http/1.1 403") && body.contains("may not call this server");
                assert_eq!(refused, !allowed, "{asks}\n{head}{body}");
            }
        }
        let (head, _) = exchange(http, &call("Generate", "grpc-web"), &hello()).await;
        assert!(head.contains("grpc-status:0") || head.starts_with("http/1.1 200"), "{head}");
        let other = call("Generate", "grpc-web").replace("page.example", "other.example");
        let (head, _) = exchange(http, &other, &hello()).await;
        assert!(head.contains("grpc-status: 7"), "{head}");
    }

    #[test]
    fn texts_that_are_no_origin_are_refused() {
        assert_eq!(AllowedOrigins::listed(&[]), Ok(AllowedOrigins::Any));
        for origin in ["https://a.example", "http://localhost:3000", "https://[::1]:8443"] {
            assert!(AllowedOrigins::listed(&[origin.to_owned()]).is_ok(), "{origin}");
        }
        for origin in
            ["*", "a.example", "https://a.example/", "https://", "HTTPS://a.example", "https://me@a", "null"]
        {
            let refused = AllowedOrigins::listed(&["https://b".to_owned(), origin.to_owned()]);
            assert_eq!(refused, Err(InvalidOrigin(origin.to_owned())));
        }
    }
}
