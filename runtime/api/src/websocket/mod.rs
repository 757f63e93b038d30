//! `GET /v1/stream`: several requests at once over one WebSocket, each answered as it is made.
//!
//! Every message is one JSON object as text. The caller chooses an `id` of 1 to 128 bytes for each request;
//! every message about it repeats the id. It may be used again after the last message of its request.
//!
//! | the caller sends | with |
//! |---|---|
//! | `{"id", "type": "generate", ...}` | the fields of `POST /v1/generate` |
//! | `{"id", "type": "chat", ...}` | the fields of `POST /v1/chat/completions` |
//! | `{"id", "type": "cancel"}` | ends the request with this id, if it still runs |
//!
//! | the server sends | when |
//! |---|---|
//! | `{"id", "type": "token", "text", "token", "logprobs"?}` | a token of `generate` |
//! | `{"id", "type": "token", "chunk"}` | a chunk of `chat`, as its route streams it |
//! | `{"id", "type": "finished", ...}` | the last message of a request |
//! | `{"id", "type": "error", "error": {"type", "message", ...}}` | the last message of one that failed |
//!
//! `finished` has, for `generate`, what the last event of `POST /v1/generate/stream` has, with the server's
//! id of the answer in `answer_id`; after `cancel` it has `"finish_reason": "cancelled"`. The `id` of an
//! error is `null` where the message has none that can be repeated.
//!
//! The headers of the handshake (priority, tenant, revision) apply to each request. Up to 128 requests run at
//! a time; another one is refused as `overloaded`. A message has at most 4 MiB. A caller that goes away
//! cancels its requests. The server sends a ping after 20 s of silence and closes the connection when 10 s
//! more pass without a byte; pings of the caller are answered.
//!
//! | close code | why |
//! |---|---|
//! | 1001 | the server ends: what ran is answered, and nothing new is taken |
//! | 1002, 1007 | the frames break the protocol; the text is not UTF-8 |
//! | 1009 | a message of more than 4 MiB |
//! | 1013 | the memory for requests is in use; connect again later |

mod answer;
mod connection;
mod protocol;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{
    ACCEPT_ENCODING, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_VERSION, UPGRADE,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::Response;
use axum::routing::get;
use futures::FutureExt;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use self::connection::Connection;
use crate::limits::CallerLimits;
use crate::upgrade::AfterUpgrade;
use crate::{Api, ApiError};

/// The length of a key: 16 bytes in base64.
const KEY_CHARS: usize = 24;
/// The version of RFC 6455.
const VERSION: &str = "13";

pub(crate) fn router() -> Router<Api> {
    Router::new().route("/v1/stream", get(connect))
}

async fn connect(State(api): State<Api>, mut request: Request) -> Result<Response, ApiError> {
    let key = key(request.headers())?;
    let accept = HeaderValue::from_str(&derive_accept_key(key.as_bytes()))
        .map_err(|error| ApiError::Internal { message: format!("the handshake failed: {error}") })?;
    let upgrade = request.extensions_mut().remove::<OnUpgrade>().ok_or_else(|| {
        let message =
            "this connection cannot change to WebSocket: use HTTP/1.1, without a proxy that ends it";
        ApiError::InvalidRequest { field: None, message: message.to_owned() }
    })?;
    let limits = request.extensions().get::<CallerLimits>().cloned().unwrap_or_default();
    let connection = Connection::new(api, headers_of_requests(request.headers()), limits);
    let work = async move {
        match upgrade.await {
            Ok(upgraded) => connection.run(TokioIo::new(upgraded)).await,
            Err(error) => tracing::debug!(%error, "a connection did not become a WebSocket"),
        }
    };
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    response.headers_mut().insert(UPGRADE, HeaderValue::from_static("websocket"));
    response.headers_mut().insert(SEC_WEBSOCKET_ACCEPT, accept);
    response.extensions_mut().insert(AfterUpgrade::new(work.boxed()));
    Ok(response)
}

/// The key of a handshake.
///
/// # Errors
/// A request that is no handshake, with the header that is missing or wrong.
fn key(headers: &HeaderMap) -> Result<String, ApiError> {
    let has = |name: HeaderName, word: &str| {
        let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|value| value.trim().eq_ignore_ascii_case(word))
    };
    let wrong = |name: HeaderName, expected: &str| {
        let message = format!("expected {expected}: this route speaks WebSocket, connect to it with ws://");
        ApiError::field(name.as_str(), message)
    };
    if !has(CONNECTION, "upgrade") {
        return Err(wrong(CONNECTION, "\"Upgrade\""));
    }
    if !has(UPGRADE, "websocket") {
        return Err(wrong(UPGRADE, "\"websocket\""));
    }
    if !has(SEC_WEBSOCKET_VERSION, VERSION) {
        return Err(wrong(SEC_WEBSOCKET_VERSION, VERSION));
    }
    let key = headers.get(SEC_WEBSOCKET_KEY).and_then(|key| key.to_str().ok());
    let key = key.filter(|key| key.len() == KEY_CHARS && key.ends_with("=="));
    key.map(str::to_owned).ok_or_else(|| wrong(SEC_WEBSOCKET_KEY, "16 bytes in base64"))
}

/// What of a handshake's headers applies to the requests of the connection.
fn headers_of_requests(headers: &HeaderMap) -> HeaderMap {
    let mut kept = headers.clone();
    for name in [CONNECTION, UPGRADE, ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH] {
        kept.remove(name);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Fake, Script};
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    async fn refusal(change: &[(HeaderName, &'static str)]) -> String {
        let mut request = Request::get("/v1/stream").body(Body::empty()).unwrap();
        let headers = request.headers_mut();
        headers.insert(CONNECTION, HeaderValue::from_static("keep-alive, Upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("WebSocket"));
        headers.insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        headers.insert(SEC_WEBSOCKET_KEY, HeaderValue::from_static("dGhlIHNhbXBsZSBub25jZQ=="));
        for (name, value) in change {
            headers.insert(name, HeaderValue::from_static(value));
        }
        let api = Fake::with(Script::tokens(&["a"])).api();
        let response = crate::http::router(api).oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::BAD_REQUEST);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["error"]["type"], "invalid_request");
        body["error"]["message"].as_str().unwrap().to_owned()
    }

    #[tokio::test]
    async fn what_is_no_handshake_is_refused_with_the_header_at_fault() {
        for (name, value) in [
            (CONNECTION, "close"),
            (UPGRADE, "h2c"),
            (SEC_WEBSOCKET_VERSION, "8"),
            (SEC_WEBSOCKET_KEY, "short"),
        ] {
            let message = refusal(&[(name.clone(), value)]).await;
            assert!(message.starts_with(name.as_str()) && message.contains("ws://"), "{message}");
        }
        assert!(refusal(&[]).await.contains("HTTP/1.1"), "no listener offers an upgrade here");
    }
}
