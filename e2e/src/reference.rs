//! The stored outputs of an independent implementation, with which answers are compared.

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::settings::Settings;

/// One prompt and the greedy answer of the reference.
#[derive(Debug, Clone, Deserialize)]
pub struct Case {
    /// The prompt.
    pub prompt: String,
    /// The tokens of the reference, the end token included.
    pub greedy: Vec<u32>,
    /// Top logit minus second, for each of these tokens.
    pub margins: Vec<f64>,
}

#[derive(Deserialize)]
struct Cases {
    cases: Vec<Case>,
}

/// One text and its vector in the reference.
#[derive(Debug, Clone, Deserialize)]
pub struct Embedded {
    /// The text; may be empty.
    pub text: String,
    /// Its vector, not normalised.
    pub embedding: Vec<f64>,
}

#[derive(Deserialize)]
struct AllEmbedded {
    items: Vec<Embedded>,
}

/// The texts of all-MiniLM-L6-v2 with their vectors.
///
/// # Errors
/// When the file is missing or is not of this shape.
pub fn embedded(settings: &Settings) -> Result<Vec<Embedded>> {
    let path = settings.repository.join("runtime/engine/tests/reference/all-minilm-l6-v2.json");
    let text =
        std::fs::read_to_string(&path).with_context(|| format!("could not read {}", path.display()))?;
    let all: AllEmbedded =
        serde_json::from_str(&text).with_context(|| format!("{} has an unexpected shape", path.display()))?;
    Ok(all.items)
}

/// One text and the logits of a classifier.
#[derive(Debug, Clone, Deserialize)]
pub struct TextLogits {
    /// The text; may be empty.
    pub text: String,
    /// One for each label, in the model's order.
    #[serde(rename = "values")]
    pub logits: Vec<f64>,
}

#[derive(Deserialize)]
struct HeadCases {
    cases: Vec<HeadCase>,
}

#[derive(Deserialize)]
struct HeadCase {
    family: String,
    labels: usize,
    #[serde(default)]
    texts: Vec<TextLogits>,
}

/// The texts of the seeded classifier (`e2e/models/seeded.py`) with their logits.
///
/// # Errors
/// When the file is missing or is not of this shape.
pub fn classified(settings: &Settings) -> Result<Vec<TextLogits>> {
    let path = settings.repository.join("runtime/engine/tests/reference/heads.json");
    let text =
        std::fs::read_to_string(&path).with_context(|| format!("could not read {}", path.display()))?;
    let all: HeadCases =
        serde_json::from_str(&text).with_context(|| format!("{} has an unexpected shape", path.display()))?;
    let case = all.cases.into_iter().find(|case| case.family == "bert" && case.labels == 3);
    Ok(case.with_context(|| format!("{} has no classifier", path.display()))?.texts)
}

/// Cosine of the angle between two vectors.
#[must_use]
pub fn cosine(one: &[f64], other: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    dot(one, other) / (dot(one, one) * dot(other, other)).sqrt()
}

/// The case of at least `tokens` tokens that is hardest to get wrong by rounding: its smallest margin is the
/// largest.
///
/// # Errors
/// When the file is missing, is not of this shape, or has no such case.
pub fn clearest(settings: &Settings, tokens: usize) -> Result<Case> {
    let path = settings.repository.join("runtime/engine/tests/reference/smollm2-135m-instruct.json");
    let text =
        std::fs::read_to_string(&path).with_context(|| format!("could not read {}", path.display()))?;
    let Cases { cases } =
        serde_json::from_str(&text).with_context(|| format!("{} has an unexpected shape", path.display()))?;
    let long = cases.into_iter().filter(|case| case.greedy.len() >= tokens && case.margins.len() >= tokens);
    let smallest = |case: &Case| case.margins[..tokens].iter().copied().fold(f64::INFINITY, f64::min);
    let clearest = long.max_by(|a, b| smallest(a).total_cmp(&smallest(b)));
    clearest.with_context(|| format!("{} has no case of {tokens} tokens", path.display()))
}
