//! The `Inference` trait and the thin HTTP and gRPC codecs over it.
//!
//! A server of models is one value that implements [`Inference`]; everything a caller can see of it over HTTP
//! or gRPC is made here, once, so that both protocols agree on defaults, limits, errors and on when the head
//! of an answer may be sent: only when the first token exists or the request has failed. Until then a gateway
//! may still try elsewhere, and an overload is a real 429 instead of a broken stream.
//!
//! | module | what it holds |
//! |---|---|
//! | [`inference`] | the trait, its requests and its answers |
//! | [`error`] | every way a request fails, with its HTTP status and gRPC code |
//! | [`fields`] | defaults and limits of a request's fields, shared by both protocols |
//! | [`options`] | the fields about sampling, stops and format |
//! | [`embed`] | what is asked of a model that embeds, and `POST /v1/embeddings` |
//! | [`priority`], [`tenant`] | the priority class and the tenant of a request |
//! | [`http`], [`grpc`] | the codecs; `http/` and `embed.rs` hold the routes |
//! | `json_body.rs`, `request_body.rs` | the fields of a JSON body; bounded bodies |
//! | [`budget`], [`contain`], [`echo`] | shared budgets, contained work, bounds on what errors repeat |
//! | [`sse`] | a reader of server-sent events for clients |
//! | [`health`] | liveness, readiness and start-up, over both |
//! | [`server`] | a listener for HTTP/1.1 and HTTP/2 that ends gracefully |
//! | [`surfaces`] | the routes and methods that ask a model, with the task of each |
//! | [`nearest`] | "did you mean" for field names |

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

pub mod budget;
pub mod contain;
pub mod echo;
pub mod embed;
pub mod error;
pub mod fields;
pub mod grpc;
pub mod health;
pub mod http;
pub mod inference;
mod json_body;
pub mod nearest;
pub mod options;
pub mod priority;
mod request_body;
pub mod server;
pub mod sse;
pub mod surfaces;
pub mod tenant;

#[cfg(test)]
mod fake;

pub use contain::BlockingWork;
pub use embed::{EmbedInput, EmbedRequest, Embedded, PoolingMode};
pub use error::ApiError;
pub use fields::{Asked, Defaults, Generation};
pub use health::{Health, Verdict};
pub use inference::{Answer, Event, FinishReason, Inference, Logprobs, StoppedBy, Usage};
pub use options::{Format, Options};
pub use priority::Priority;

/// Longest request body or message that is read, in bytes. A prompt of 128 Ki tokens at the customary 4 bytes
/// a token is half a MiB, so this leaves room for escapes and for longer contexts while a handful of callers
/// cannot fill the memory. gRPC's usual bound is the same.
pub const MAX_BODY_BYTES: usize = 4 * 1024 * 1024;

/// What the codecs serve from.
#[derive(Clone)]
pub struct Api {
    /// The server of models.
    pub inference: Arc<dyn Inference>,
    /// Ends the streams that would otherwise never end by themselves (watches of models and of health). It is
    /// cancelled when the server's connections must close, so that they do not hold them open.
    pub closing: CancellationToken,
    /// Parses large bodies.
    large_bodies: BlockingWork,
}

/// Large bodies that are parsed at a time. A body of 4 MiB in the smallest JSON values takes 20 times its
/// length, so that two take 160 MiB.
const LARGE_BODIES: usize = 2;

impl Api {
    /// Serves from `inference` until `closing` is cancelled.
    pub fn new(inference: Arc<dyn Inference>, closing: CancellationToken) -> Self {
        Self { inference, closing, large_bodies: BlockingWork::new(LARGE_BODIES) }
    }
}
