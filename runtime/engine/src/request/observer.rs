//! What a generation tells whoever observes it, such as a trace.

use std::fmt;

/// Is told what happens to one generation. It is called on the device thread, between two steps of all
/// generations: it may note things, and must neither block nor wait.
///
/// It is dropped after the end was observed.
pub trait GenerationObserver: Send + fmt::Debug {
    /// Something has happened just now.
    fn observe(&mut self, progress: GenerationProgress);
}

/// What has happened to a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GenerationProgress {
    /// Its first step begins: it does not wait any more.
    Started,
    /// A step with rows of it is computed.
    Step {
        /// Its own rows: tokens of its prompt, or one and its draft tokens.
        rows: usize,
        /// The generations that the step had rows of.
        sequences: usize,
    },
    /// Its prompt is read: the first token is there.
    FirstToken,
    /// It lost its KV blocks and waits again.
    Preempted,
    /// The end; nothing follows.
    Ended(GenerationOutcome),
}

/// How a generation ended. The words are those of the label `outcome` of `trustformers_requests_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub enum GenerationOutcome {
    /// By an end token, a stop text, a stop token, or a grammar that is complete.
    Stop,
    /// By its limit of tokens.
    Length,
    /// Its caller has left.
    Cancelled,
    /// With an error.
    Failed,
    /// Refused in a full queue before its first step.
    Overloaded,
}

impl GenerationOutcome {
    /// The word.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}
