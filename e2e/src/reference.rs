//! The stored outputs of an independent implementation, against which real answers are held.

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::settings::Settings;

/// One prompt and what the reference answers greedily.
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

/// The case of at least `tokens` tokens that is hardest to get wrong by rounding: its smallest margin is the largest.
///
/// # Errors
/// When the file is missing, is not of this shape, or has no such case.
pub fn clearest(settings: &Settings, tokens: usize) -> Result<Case> {
    let path = settings.repository.join("runtime/engine/tests/reference/smollm2-135m-instruct.json");
    let text =
        std::fs::read_to_string(&path).with_context(|| format!("could not read {}", path.display()))?;
    let Cases { cases } =
        serde_json::from_str(&text).with_context(|| format!("{} is odd", path.display()))?;
    let long = cases.into_iter().filter(|case| case.greedy.len() >= tokens && case.margins.len() >= tokens);
    let smallest = |case: &Case| case.margins[..tokens].iter().copied().fold(f64::INFINITY, f64::min);
    let clearest = long.max_by(|a, b| smallest(a).total_cmp(&smallest(b)));
    clearest.with_context(|| format!("{} has no case of {tokens} tokens", path.display()))
}
