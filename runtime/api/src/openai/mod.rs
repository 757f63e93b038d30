//! OpenAI's chat completions and completions over HTTP.
//!
//! | module | what it holds |
//! |---|---|
//! | [`chat`] | `POST /v1/chat/completions`: its fields, and its handler |
//! | [`completions`] | `POST /v1/completions`: its fields, its handler and its answers |
//! | [`request`] | the fields of both |
//! | [`messages`] | messages, from OpenAI's shape to that of chat templates |
//! | [`whole`], [`stream`] | the answers of a chat in one piece and in chunks |
//! | [`wire`] | the JSON that all answers share |
//!
//! A field that cannot be honoured is refused by name; the few that are accepted without an effect are in
//! [`request`], each with its reason.

use axum::Router;
use axum::routing::post;

use crate::Api;

pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod messages;
pub(crate) mod request;
mod stream;
mod whole;
mod wire;

#[cfg(test)]
mod tests;

/// The routes of this module, each with its alias under `/openai`.
pub(crate) fn router() -> Router<Api> {
    Router::new()
        .route("/v1/chat/completions", post(chat::chat_completions))
        .route("/openai/v1/chat/completions", post(chat::chat_completions))
        .route("/v1/completions", post(completions::completions))
        .route("/openai/v1/completions", post(completions::completions))
}
