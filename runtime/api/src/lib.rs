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
//! | [`answer_end`] | how an answer ended, told to a gateway |
//! | [`error`] | every way a request fails, with its HTTP status and gRPC code |
//! | [`fields`] | defaults and limits of a request's fields, shared by both protocols |
//! | [`options`] | the fields about sampling, stops and format |
//! | [`conversation`] | prompts: text, token ids, conversations |
//! | [`revision`] | the revision and the digest that requests ask for and answers name |
//! | [`tools`] | tool calls and reasoning in the text of an answer |
//! | [`embed`] | what is asked of a model that embeds, and `POST /v1/embeddings` |
//! | [`classify`], [`rerank`] | the same of models that give scores, `POST /v1/classify`, `POST /v1/rerank` |
//! | [`entities`] | what a model that labels tokens found in a text |
//! | [`model_control`] | loading and unloading models while the server runs |
//! | [`priority`], [`tenant`] | the priority class and the tenant of a request |
//! | [`http`], [`grpc`] | the codecs; `http/` and `embed.rs` hold the routes |
//! | `openai/` | OpenAI's chat completions and completions |
//! | `responses/` | OpenAI's responses |
//! | `anthropic/` | Anthropic's messages |
//! | `transcript.rs`, `functions.rs`, `field_names.rs` | what these two share of requests |
//! | `blocks.rs` | answers as sequences of blocks, for these two |
//! | [`chat_answer`] | answers of a chat as all chat protocols need them |
//! | `json_body.rs`, `json_object.rs` | the fields of a JSON body, and of objects inside it |
//! | `request_body.rs` | bounded bodies |
//! | [`encoding`] | compressed bodies of requests and of answers |
//! | `websocket/`, `multiplex.rs` | `GET /v1/stream`; several requests at once over one connection or call |
//! | [`browser`] | cross-origin requests, and gRPC-Web beside HTTP |
//! | `kserve/` | the Open Inference Protocol (KServe v2), over HTTP and gRPC |
//! | [`budget`], [`contain`], [`echo`] | shared budgets, contained work, bounds on what errors repeat |
//! | `limits.rs`, `upgrade.rs` | the budgets of a process; connections that leave HTTP |
//! | [`sse`] | a reader of server-sent events for clients |
//! | `sse_frames.rs` | the writer of server-sent events |
//! | [`health`] | liveness, readiness and start-up, over both |
//! | [`server`] | a listener for HTTP/1.1 and HTTP/2 that ends gracefully |
//! | `overload.rs` | refusals of a full server, before requests are parsed |
//! | [`openapi`] | the OpenAPI document, served and compared with the table |
//! | [`surfaces`] | the table of all routes and methods |
//! | [`nearest`] | "did you mean" for field names |

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

pub mod answer_end;
mod anthropic;
mod blocks;
pub mod browser;
pub mod budget;
pub mod chat_answer;
pub mod classify;
pub mod contain;
pub mod conversation;
pub mod echo;
pub mod embed;
pub mod encoding;
pub mod entities;
pub mod error;
mod field_names;
pub mod fields;
mod functions;
pub mod grpc;
pub mod health;
pub mod http;
pub mod inference;
mod json_body;
mod json_object;
mod kserve;
mod limits;
pub mod model_control;
mod multiplex;
pub mod nearest;
mod openai;
pub mod openapi;
pub mod options;
mod overload;
pub mod priority;
mod request_body;
pub mod rerank;
mod responses;
pub mod revision;
pub mod server;
pub mod sse;
mod sse_frames;
pub mod surfaces;
pub mod tenant;
pub mod tools;
mod transcript;
mod upgrade;
mod websocket;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod test_client;

pub use classify::{Classified, ClassifyInput, ClassifyRequest, LabelScore};
pub use contain::BlockingWork;
pub use conversation::{Conversation, Prompt, ToolChoice};
pub use embed::{EmbedInput, EmbedRequest, Embedded, PoolingMode};
pub use entities::{Aggregation, Entity, EntityBody, UnknownAggregation};
pub use error::{ApiError, ErrorShape};
pub use fields::{Asked, Defaults, Generation, LeftOut};
pub use health::{Health, Verdict};
pub use inference::{
    Answer, CountRequest, Event, FinishReason, Inference, Logprobs, StoppedBy, TokenText, TokenTexts, Usage,
};
pub use options::{Format, Options};
pub use overload::Arrival;
pub use priority::Priority;
pub use rerank::{RankedIndex, RerankRequest, Reranked};
pub use tools::{AnswerSyntax, CallSyntax, ReasoningSyntax};

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
    /// Parses, decodes and compresses large bodies.
    large_bodies: BlockingWork,
    /// Counts the requests of the Open Inference Protocol.
    kserve_counts: Arc<kserve::Statistics>,
    /// Requests of gateways, over HTTP and gRPC.
    gateway_load: answer_end::GatewayLoad,
}

/// Large bodies that are parsed, decoded or compressed at a time. A body of 4 MiB in the smallest JSON values
/// takes 20 times its length, so that two take 160 MiB.
const LARGE_BODIES: usize = 2;

impl Api {
    /// Serves from `inference` until `closing` is cancelled.
    pub fn new(inference: Arc<dyn Inference>, closing: CancellationToken) -> Self {
        let large_bodies = BlockingWork::new(LARGE_BODIES);
        let inference = Arc::new(answer_end::ReportingInference(inference));
        Self {
            inference,
            closing,
            large_bodies,
            kserve_counts: Arc::default(),
            gateway_load: answer_end::GatewayLoad::default(),
        }
    }
}
