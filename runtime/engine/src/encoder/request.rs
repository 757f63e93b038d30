//! What callers ask of an encoder and what they are told.

use crate::priority::Priority;
use crate::request::Prompt;
use std::time::Duration;
use thiserror::Error;

/// Most texts of one request: what OpenAI's clients send at most.
pub const MAX_TEXTS: usize = 2048;

/// Texts to be encoded together. They may be computed in one step or in several, and beside others' texts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodeParams {
    /// 1 to [`MAX_TEXTS`] texts, empty ones included. Token ids are taken as they are, special tokens and all; each list
    /// needs at least one.
    pub texts: Vec<Prompt>,
    /// Whether a text that is too long is cut as the model's files say; otherwise it is refused.
    pub truncate: bool,
    /// Who goes first, where the engine goes by classes.
    pub priority: Priority,
    /// On whose behalf: whoever was served least is next. At most [`MAX_TENANT_BYTES`](crate::MAX_TENANT_BYTES); empty:
    /// nobody in particular, together with all who say so.
    pub tenant: String,
}

impl EncodeParams {
    /// These texts, cut where they are too long.
    pub fn texts<T: Into<String>>(texts: impl IntoIterator<Item = T>) -> Self {
        let texts = texts.into_iter().map(|text| Prompt::Text(text.into())).collect();
        Self { texts, truncate: true, priority: Priority::Normal, tenant: String::new() }
    }
}

/// What became of a request's texts.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoded {
    /// One row for each text, in order, each `width` long.
    pub values: Vec<f32>,
    /// Values of a row.
    pub width: usize,
    /// Tokens that were computed, of all texts together, special tokens included.
    pub tokens: usize,
    /// Which texts were cut, ascending.
    pub truncated: Vec<usize>,
    /// Where the time went.
    pub timings: EncodeTimings,
}

impl Encoded {
    /// The row of each text.
    pub fn rows(&self) -> std::slice::ChunksExact<'_, f32> {
        self.values.chunks_exact(self.width.max(1))
    }
}

/// Where the time of a request went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EncodeTimings {
    /// From submission until the first step with one of its texts.
    pub queue: Duration,
    /// From there until the end of the last one.
    pub compute: Duration,
}

/// Why texts were not encoded.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum EncodeError {
    /// As many texts as allowed wait. Retry after a moment or elsewhere.
    #[error("{waiting} texts are already waiting for this model; retry in {} s", retry_after.as_secs())]
    Overloaded {
        /// Texts that wait at this moment.
        waiting: usize,
        /// The time in which those will probably have been served, in whole seconds from 1 to 60.
        retry_after: Duration,
    },
    /// A text is longer than the model takes, and was not to be cut.
    #[error(
        "text {index} has more than the {limit} tokens that this model takes; shorten it, or let it be cut with truncate"
    )]
    TooLong {
        /// Place of the text in the request.
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
    /// The backend failed in a step that one of the texts was part of.
    #[error("the backend failed: {message}")]
    Backend {
        /// The backend's own words.
        message: String,
    },
    /// The model produced values that are not numbers: broken weights or a broken device.
    #[error("the model produced a value that is not a finite number; the weights or the device are broken")]
    NotFinite,
    /// The engine is draining, was stopped or died.
    #[error("the engine of this model is stopping or stopped")]
    Stopped,
}
