//! The requests, results and errors of an encoder.

use crate::faults::{DeviceFault, ModelFault, RequestFault};
use crate::request::Prompt;
use crate::scheduling::priority::Priority;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;

/// Most texts of one request: the limit of OpenAI's API.
pub const MAX_TEXTS: usize = 2048;

/// What one row is computed from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EncodeInput {
    /// A text; may be empty. The model's special tokens are put around it.
    Text(String),
    /// Token ids, used as they are, without added special tokens; at least one.
    Tokens(Vec<u32>),
    /// Two texts that the model reads together. Where both are too long, the longer one is cut first.
    Pair {
        /// The first text, such as the query that many documents are compared with.
        first: Arc<str>,
        /// The second one.
        second: String,
    },
}

impl From<Prompt> for EncodeInput {
    fn from(prompt: Prompt) -> Self {
        match prompt {
            Prompt::Text(text) => Self::Text(text),
            Prompt::Tokens(ids) => Self::Tokens(ids),
        }
    }
}

/// Texts of one request. They may be computed in one step or in several, together with the texts of other
/// requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodeParams {
    /// 1 to [`MAX_TEXTS`] of them.
    pub texts: Vec<EncodeInput>,
    /// Whether a text that is too long is truncated as the model's files say; otherwise it is refused.
    pub truncate: bool,
    /// The priority class, where classes count.
    pub priority: Priority,
    /// The tenant that the request is accounted to: the least served tenant is next. At most
    /// [`MAX_TENANT_BYTES`](crate::MAX_TENANT_BYTES) bytes; all requests with an empty name count as one
    /// tenant.
    pub tenant: String,
}

impl EncodeParams {
    /// These texts, truncated where they are too long.
    pub fn texts<T: Into<String>>(texts: impl IntoIterator<Item = T>) -> Self {
        Self::inputs(texts.into_iter().map(|text| EncodeInput::Text(text.into())).collect())
    }

    /// These, truncated where they are too long.
    pub fn inputs(texts: Vec<EncodeInput>) -> Self {
        Self { texts, truncate: true, priority: Priority::Normal, tenant: String::new() }
    }
}

/// The result of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoded {
    /// One row for each text, in order, or of a model that labels tokens one for each token; each `width`
    /// long.
    pub values: Vec<f32>,
    /// Values of a row.
    pub width: usize,
    /// The first row of each text, and behind them the number of all rows.
    pub first_rows: Vec<usize>,
    /// Tokens that were computed, of all texts together, special tokens included.
    pub tokens: usize,
    /// The indices of the texts that were truncated, ascending.
    pub truncated: Vec<usize>,
    /// The time it took, by phase.
    pub timings: EncodeTimings,
}

impl Encoded {
    /// All rows.
    pub fn rows(&self) -> std::slice::ChunksExact<'_, f32> {
        self.values.chunks_exact(self.width.max(1))
    }

    /// The rows of each text, one after the other.
    pub fn rows_of_texts(&self) -> impl Iterator<Item = std::slice::ChunksExact<'_, f32>> {
        let width = self.width.max(1);
        self.first_rows.windows(2).map(move |pair| {
            let values = self.values.get(pair[0] * width..pair[1] * width).unwrap_or_default();
            values.chunks_exact(width)
        })
    }
}

/// The time that a request took, by phase.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EncodeTimings {
    /// From submission until the first step with one of its texts.
    pub queue: Duration,
    /// From there until the end of the last one.
    pub compute: Duration,
}

/// Why texts were not encoded.
#[derive(Debug, Clone, PartialEq, Eq, Error, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum EncodeError {
    /// As many texts as allowed wait. Retry after a moment or elsewhere.
    #[error("{waiting} texts are already waiting for this model; retry in {} s", retry_after.as_secs())]
    Overloaded {
        /// Texts that wait at this moment.
        waiting: usize,
        /// The estimated time until those have been served, in whole seconds from 1 to 60.
        retry_after: Duration,
    },
    /// A text is longer than the model allows, and truncation was not requested.
    #[error(
        "text {index} has more than the {limit} tokens that this model takes; shorten it, or let it be cut with truncate"
    )]
    TooLong {
        /// Index of the text in the request.
        index: usize,
        /// Most tokens of a text.
        limit: usize,
    },
    /// A field of the request is wrong.
    #[error("{field}: {why}")]
    Invalid {
        /// The field's name in requests.
        field: &'static str,
        /// What is wrong and what is allowed.
        why: String,
    },
    /// The request cannot be completed; others are not affected.
    #[error(transparent)]
    Request(#[from] RequestFault),
    /// The model's files are wrong.
    #[error(transparent)]
    Model(#[from] ModelFault),
    /// The device failed in a step with one of the texts.
    #[error(transparent)]
    Device(#[from] DeviceFault),
    /// The engine is draining, was stopped or died.
    #[error("the engine of this model is stopping or stopped")]
    Stopped,
}
