//! The answer to one request of a WebSocket: the stream of the route that answers its type over HTTP, so that
//! both take the same fields and refuse the same mistakes.

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, Method};
use axum::response::Response;
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt};
use serde_json::{Map, Value, json};
use tower::ServiceExt;

use super::protocol::{Message, Route};
use crate::error::{ApiError, Refusal};
use crate::multiplex::RequestReply;
use crate::sse::SseReader;

/// The longest event of a stream, in bytes: a token with 20 alternatives has some KiB, a chunk with the
/// arguments of a tool call may have as many as an answer has text.
const MAX_EVENT_BYTES: usize = 16 * 1024 * 1024;
/// The data of the last event of a stream.
const DONE: &str = "[DONE]";

/// A request to one of the routes.
pub(super) struct RouteRequest {
    pub(super) route: Route,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

/// The messages of an answer. Dropping the stream cancels the work.
pub(super) fn messages(
    routes: Router,
    request: RouteRequest,
) -> impl Stream<Item = Message> + Send + 'static {
    let route = request.route;
    stream::once(async move {
        match routes.oneshot(request.into_http()).await {
            Ok(response) => read(route, response),
            Err(never) => match never {},
        }
    })
    .flatten()
}

impl RouteRequest {
    fn into_http(self) -> Request {
        let mut request = Request::new(Body::from(self.body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = axum::http::Uri::from_static(self.route.path());
        *request.headers_mut() = self.headers;
        request
    }
}

fn read(route: Route, response: Response) -> BoxStream<'static, Message> {
    let failed = |error: ApiError| stream::iter([Message::failed(error)]).boxed();
    if let Some(Refusal(error)) = response.extensions().get() {
        return failed(error.clone());
    }
    let kind = response.headers().get(CONTENT_TYPE);
    if kind.is_none_or(|kind| !kind.as_bytes().starts_with(b"text/event-stream")) {
        let message = format!("{} gave no stream, but {}", route.path(), response.status());
        return failed(ApiError::Internal { message });
    }
    let mut reader = SseReader::new(MAX_EVENT_BYTES);
    let pieces = response.into_body().into_data_stream();
    let messages = pieces.flat_map(move |piece| {
        let broken = |error: String| vec![Message::failed(ApiError::Internal { message: error })];
        let messages = match piece {
            Ok(bytes) => match reader.push(&bytes) {
                Ok(events) => events.iter().map(|data| message(route, data)).collect(),
                Err(error) => broken(error.to_string()),
            },
            Err(error) => broken(error.to_string()),
        };
        stream::iter(messages)
    });
    messages.boxed()
}

/// One event of a route's stream as a message.
fn message(route: Route, data: &str) -> Message {
    if data == DONE {
        // The last event of `generate` before it was the last message already.
        return Message::finished(Map::new());
    }
    let Ok(Value::Object(mut event)) = serde_json::from_str(data) else {
        let message = format!("{} sent an event that is no JSON object", route.path());
        return Message::failed(ApiError::Internal { message });
    };
    if let Some(error) = event.remove("error") {
        return Message::error(native(error));
    }
    match route {
        Route::Chat => Message::token(Map::from_iter([("chunk".to_owned(), Value::Object(event))])),
        Route::Generate if event.contains_key("finish_reason") => {
            // The caller's own id stands in `id`.
            if let Some(id) = event.remove("id") {
                event.insert("answer_id".to_owned(), id);
            }
            event.remove("text");
            Message::finished(event)
        }
        Route::Generate => Message::token(event),
    }
}

/// An error inside a stream in this server's own shape. OpenAI's has the kind in `code` and the field in
/// `param`, and ours beside them.
fn native(mut error: Value) -> Value {
    let Some(fields) = error.as_object_mut() else { return error };
    if let Some(kind) = fields.remove("code").filter(Value::is_string) {
        fields.insert("type".to_owned(), kind);
    }
    fields.remove("param");
    json!(fields)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorShape;

    #[test]
    fn an_error_of_any_shape_becomes_our_own() {
        for error in [
            ApiError::field("top_p", "no"),
            ApiError::Overloaded { message: "full".into(), retry_after_s: 3 },
            ApiError::Internal { message: "broken".into() },
        ] {
            for shape in [ErrorShape::OpenAi, ErrorShape::Native] {
                let data = error.to_json_in(shape).to_string();
                assert_eq!(message(Route::Chat, &data), Message::failed(error.clone()), "{data}");
            }
        }
    }

    #[test]
    fn chunks_and_ends_of_a_chat_are_passed_on() {
        let chunk = json!({"object": "chat.completion.chunk", "choices": []});
        let expected = Message::token(Map::from_iter([("chunk".to_owned(), chunk.clone())]));
        assert_eq!(message(Route::Chat, &chunk.to_string()), expected);
        assert!(message(Route::Chat, DONE).is_last());
        assert!(message(Route::Chat, "no JSON").is_last());
    }
}
