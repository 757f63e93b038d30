//! A client for the codecs' own tests: it sends one request to the routes over the fake server of models and
//! reads the answer.

use axum::body::Body;
use axum::http::request::Builder;
use axum::http::{HeaderMap, StatusCode};
use http_body_util::BodyExt;
use serde_json::Value;
use tower::ServiceExt;

use crate::fake::Fake;

/// What came back.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

/// Sends a request with a body, without a content type, as some clients do.
pub(crate) async fn send(fake: &Fake, request: Builder, body: impl Into<Body>) -> Reply {
    let request = request.body(body.into()).unwrap();
    let response = crate::http::router(fake.api()).oneshot(request).await.unwrap();
    let (head, body) = response.into_parts();
    let bytes = body.collect().await.unwrap().to_bytes();
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    Reply { status: head.status, headers: head.headers, text }
}

impl Reply {
    #[track_caller]
    pub(crate) fn status_and_json(&self) -> (StatusCode, Value) {
        (self.status, self.json())
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// The frames of a stream, without the empty lines between them.
    #[track_caller]
    fn frames(&self) -> Vec<&str> {
        assert_eq!(self.status, StatusCode::OK, "{}", self.text);
        assert!(self.headers["content-type"].to_str().unwrap().starts_with("text/event-stream"));
        self.text.split_terminator("\n\n").collect()
    }

    /// The data of a stream whose events have no names.
    #[track_caller]
    pub(crate) fn data(&self) -> Vec<&str> {
        self.frames().into_iter().map(|frame| frame.strip_prefix("data: ").unwrap()).collect()
    }

    /// The chunks of a stream that ends as OpenAI's do.
    #[track_caller]
    pub(crate) fn chunks(&self) -> Vec<Value> {
        let mut data = self.data();
        assert_eq!(data.pop(), Some("[DONE]"), "{}", self.text);
        data.into_iter().map(|data| serde_json::from_str(data).unwrap()).collect()
    }

    /// The data of each event that has a name, which they repeat as their type.
    #[track_caller]
    pub(crate) fn events(&self) -> Vec<Value> {
        let named = self.frames().into_iter().filter_map(|frame| frame.strip_prefix("event: "));
        let data = |frame: &str| {
            let (name, data) = frame.split_once("\ndata: ").unwrap();
            let data: Value = serde_json::from_str(data).unwrap();
            assert_eq!(data["type"], name);
            data
        };
        named.map(data).collect()
    }

    /// Whether the last frame of a stream is `[DONE]`.
    #[track_caller]
    pub(crate) fn is_done(&self) -> bool {
        self.frames().last() == Some(&"data: [DONE]")
    }
}
