//! Measurements of an engine that embeds: texts a second, so many at once.

use std::time::Instant;

use serde_json::{Map, Value, json};
use trustformers_engine::encoder::{EncodeInput, EncodeParams, Encoder};

use crate::bench::{BenchFailure, prompts};

/// Requests of one measurement take at least this long together; a single one of some milliseconds says
/// little.
const AT_LEAST_S: f64 = 1.0;

/// Texts that are embedded in one request, and the tokens of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EncodeMeasurement {
    pub(super) texts: usize,
    pub(super) tokens: usize,
}

impl EncodeMeasurement {
    /// For people.
    pub(super) fn label(self) -> String {
        format!("embed {} x {}", self.texts, self.tokens)
    }

    /// For programs.
    pub(super) fn to_json(self) -> Map<String, Value> {
        let fields =
            [("what", json!("embed")), ("texts", json!(self.texts)), ("text_tokens", json!(self.tokens))];
        fields.map(|(name, value)| (name.to_owned(), value)).into_iter().collect()
    }
}

/// Texts per second of one caller that waits for each answer. `fresh` numbers texts, so that none comes
/// twice.
pub(super) async fn measure(
    encoder: &Encoder,
    what: EncodeMeasurement,
    fresh: &mut usize,
) -> Result<f64, BenchFailure> {
    let vocabulary = encoder.model().facts().vocabulary;
    let (began, mut requests) = (Instant::now(), 0);
    while began.elapsed().as_secs_f64() < AT_LEAST_S {
        let texts = (0..what.texts).map(|_| {
            *fresh += 1;
            EncodeInput::Tokens(prompts::ids(*fresh, what.tokens, vocabulary))
        });
        let params = EncodeParams { texts: texts.collect(), ..EncodeParams::texts([""; 0]) };
        encoder.submit(&params)?.await?;
        requests += 1;
    }
    Ok((requests * what.texts) as f64 / began.elapsed().as_secs_f64())
}
