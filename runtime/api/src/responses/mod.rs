//! `POST /v1/responses`: OpenAI's responses, without a store. A request carries the whole conversation, and
//! its answer is kept nowhere.
//!
//! | module | what it holds |
//! |---|---|
//! | `request.rs` | the body, and what is refused |
//! | `input.rs`, `tools.rs`, `text.rs` | its larger fields |
//! | `answer.rs` | the response object and the events of a stream |

use axum::Router;
use axum::extract::{Request, State};
use axum::http::HeaderValue;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use futures::{StreamExt, stream};

use crate::budget::Share;
use crate::chat_answer::{ChatAnswer, ask, ask_whole};
use crate::error::ApiError;
use crate::field_names::{FieldName, in_protocol};
use crate::fields::Defaults;
use crate::limits::CallerLimits;
use crate::sse_frames::{Frame, SseBody};
use crate::{Api, request_body};

mod answer;
mod input;
pub(crate) mod request;
#[cfg(test)]
mod tests;
mod text;
mod tools;

use answer::{ResponseEvent, ResponseWriter};
use request::{CreateRequest, parse};

/// OpenAI's defaults: an answer may take the rest of the context, and is sampled without a cut.
const DEFAULTS: Defaults = Defaults { max_tokens: u32::MAX, temperature: 1.0, top_p: 1.0 };

/// Fields that the server of models knows by other names.
const FIELD_NAMES: &[FieldName] = &[
    FieldName { own: "messages", protocol: "input" },
    FieldName { own: "max_tokens", protocol: "max_output_tokens" },
    FieldName { own: "logprobs", protocol: "top_logprobs" },
    FieldName { own: "response_format", protocol: "text.format" },
];

/// Events with the settings that are written before the first token, and wait until the caller reads them.
const EVENTS_AT_THE_START: usize = 2;

/// What a stream repeats of its request, and its share of the budget of unread answers.
struct RepeatedSettings {
    text: String,
    share: Share,
}

/// The routes.
pub(crate) fn router() -> Router<Api> {
    Router::new().route("/v1/responses", post(create)).route("/openai/v1/responses", post(create))
}

async fn create(State(api): State<Api>, request: Request) -> Result<Response, ApiError> {
    let (head, body) = request.into_parts();
    let bytes = request_body::read(&head, body).await?;
    let CreateRequest { asked, stream, settings } = api.parse(bytes, parse).await?;
    let generation = asked.with_headers(&head.headers)?.check(&DEFAULTS)?;
    let limits = head.extensions.get::<CallerLimits>().cloned().unwrap_or_default();
    let copies = if stream { 1 + EVENTS_AT_THE_START } else { 1 };
    let share = limits.answer_bytes(copies * settings.len())?;
    let answered = async {
        if stream {
            Ok(in_stream(ask(&api, vec![generation]).await?, RepeatedSettings { text: settings, share }))
        } else {
            let _share = share;
            whole(ask_whole(&api, vec![generation]).await?, settings).await
        }
    };
    answered.await.map_err(|error| in_protocol(error, FIELD_NAMES))
}

async fn whole(mut answer: ChatAnswer, settings: String) -> Result<Response, ApiError> {
    let mut writer = ResponseWriter::new(settings, &answer.head);
    while let Some(event) = answer.events.next().await {
        writer.write(event?.kind);
    }
    let json = [(CONTENT_TYPE, HeaderValue::from_static("application/json"))];
    Ok((answer.head.headers, json, writer.response_text()).into_response())
}

/// The events, then `[DONE]`, which OpenAI leaves out and the Open Responses specification requires. After a
/// failure it does not follow, so that a client which waits for it knows that the answer is not complete.
fn in_stream(answer: ChatAnswer, settings: RepeatedSettings) -> Response {
    let ChatAnswer { head, events, .. } = answer;
    let RepeatedSettings { text, share } = settings;
    let mut writer = ResponseWriter::new(text, &head);
    let start = writer.start();
    let events = events.flat_map(move |event| {
        let _held_with_the_stream = &share;
        stream::iter(match event {
            Ok(event) => writer.write(event.kind),
            Err(error) => writer.fail(&error),
        })
    });
    let frames = stream::iter(start).chain(events).flat_map(|event| stream::iter(to_frames(event)));
    (head.headers, SseBody::new(frames)).into_response()
}

fn to_frames(event: ResponseEvent) -> Vec<Frame> {
    let ResponseEvent { name, data } = event;
    let mut frames = vec![Frame { event: Some(name), data }];
    if matches!(name, "response.completed" | "response.incomplete") {
        frames.push(Frame::done());
    }
    frames
}

/// The text of an object with the members of two objects, neither of which is empty.
fn join_objects(first: &str, second: &str) -> String {
    let (first, second) =
        (first.strip_suffix('}').unwrap_or(first), second.strip_prefix('{').unwrap_or(second));
    format!("{first},{second}")
}
