//! `POST /v1/messages` and `POST /v1/messages/count_tokens`: Anthropic's messages.
//!
//! | module | what it holds |
//! |---|---|
//! | `request.rs` | the body, and what is refused |
//! | `messages.rs` | the messages and their blocks |
//! | `answer.rs` | the message and the events of a stream |

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use futures::{StreamExt, stream};
use serde_json::json;

use crate::chat_answer::{ChatAnswer, ask, ask_whole};
use crate::error::{ApiError, ErrorShape};
use crate::field_names::{FieldName, in_protocol};
use crate::fields::{Defaults, Generation};
use crate::inference::CountRequest;
use crate::sse_frames::{Frame, SseBody};
use crate::{Api, request_body};

mod answer;
mod messages;
pub(crate) mod request;
#[cfg(test)]
mod tests;

use answer::MessageWriter;
use request::{MessagesRequest, Purpose, parse};

/// Anthropic's defaults. Every request for an answer gives its own `max_tokens`.
const DEFAULTS: Defaults = Defaults { max_tokens: u32::MAX, temperature: 1.0, top_p: 1.0 };

/// Fields that the server of models knows by other names.
const FIELD_NAMES: &[FieldName] = &[
    FieldName { own: "stop", protocol: "stop_sequences" },
    FieldName { own: "response_format", protocol: "output_config.format" },
];

/// The routes.
pub(crate) fn router() -> Router<Api> {
    Router::new().route("/v1/messages", post(create)).route("/v1/messages/count_tokens", post(count_tokens))
}

async fn create(State(api): State<Api>, request: Request) -> Result<Response, ApiError> {
    let (head, body) = request.into_parts();
    let bytes = request_body::read(&head, body).await?;
    let parsed = api.parse(bytes, |bytes| parse(bytes, Purpose::Answer)).await?;
    let MessagesRequest { asked, stream, hide_thinking } = parsed;
    let generation = asked.with_headers(&head.headers)?.check(&DEFAULTS)?;
    let answered = async {
        if stream {
            Ok(in_stream(ask(&api, vec![generation]).await?, hide_thinking))
        } else {
            whole(ask_whole(&api, vec![generation]).await?, hide_thinking).await
        }
    };
    answered.await.map_err(|error| in_protocol(error, FIELD_NAMES))
}

async fn whole(mut answer: ChatAnswer, hide_thinking: bool) -> Result<Response, ApiError> {
    let mut writer = MessageWriter::new(&answer.head, hide_thinking);
    while let Some(event) = answer.events.next().await {
        writer.write(event?.kind);
    }
    Ok((answer.head.headers, Json(writer.into_message())).into_response())
}

fn in_stream(answer: ChatAnswer, hide_thinking: bool) -> Response {
    let ChatAnswer { head, events, .. } = answer;
    let mut writer = MessageWriter::new(&head, hide_thinking);
    let start = writer.start();
    let frames = events.flat_map(move |event| {
        stream::iter(match event {
            Ok(event) => writer.write(event.kind),
            Err(error) => vec![Frame::named("error", &error.to_json_in(ErrorShape::Anthropic))],
        })
    });
    (head.headers, SseBody::new(stream::iter(start).chain(frames))).into_response()
}

async fn count_tokens(State(api): State<Api>, request: Request) -> Result<Response, ApiError> {
    let (head, body) = request.into_parts();
    let bytes = request_body::read(&head, body).await?;
    let parsed = api.parse(bytes, |bytes| parse(bytes, Purpose::Count)).await?;
    let generation = parsed.asked.with_headers(&head.headers)?.check(&DEFAULTS)?;
    let Generation { model, revision, prompt, .. } = generation;
    let counted = CountRequest { model, revision, prompt };
    let input_tokens = api.inference.count_tokens(counted).await?;
    Ok(Json(json!({"input_tokens": input_tokens})).into_response())
}
