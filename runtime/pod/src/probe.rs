//! Golden probes: prompts whose greedy answer is known, asked before a model may serve.

use std::fmt::Write as _;

use futures::StreamExt;
use sha2::{Digest as _, Sha256};
use trustformers_engine::{Engine, GenerateParams, GenerationEvent};

use crate::failure::Failure;
use crate::spec::SpecError;

/// Tokens of the answer where the probe does not say.
pub const DEFAULT_PROBE_TOKENS: u32 = 16;
/// Most tokens of the answer: the warm-up of a large model on a slow CPU takes a minute then.
pub const MAX_PROBE_TOKENS: u32 = 256;
/// A token has at least one byte of text, so that the bytes of a text are the most tokens that it takes, and
/// these: tokens without text, and the first bytes of a character that is not complete.
const SHORT_TOKENS: usize = 4;
/// Longest prompt and text.
const MAX_PROBE_BYTES: usize = 16 * 1024;

/// What a model must answer before it may serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GoldenProbe {
    /// The prompt, used as it is.
    pub prompt: String,
    /// Tokens of the answer; it may end earlier.
    pub max_tokens: u32,
    /// The text of the answer.
    pub text: Option<String>,
    /// How the answer begins: no more tokens are generated than are needed to decide.
    pub begins_with: Option<String>,
    /// sha256 of the ids of the answer's tokens in decimal with one space between two, 64 hex digits.
    pub tokens_sha256: Option<String>,
}

/// The most tokens that an answer takes to begin with a text.
#[must_use]
pub fn beginning_tokens(text: &str) -> u32 {
    u32::try_from(text.len() + SHORT_TOKENS).unwrap_or(u32::MAX).min(MAX_PROBE_TOKENS)
}

impl GoldenProbe {
    /// A probe of which only the beginning of the answer is known.
    ///
    /// # Errors
    /// What is out of range.
    pub fn of_beginning(prompt: &str, expect: &str) -> Result<Self, SpecError> {
        if !(1..=MAX_PROBE_TOKENS as usize).contains(&expect.len()) {
            let why = format!("{} bytes are not within 1 to {MAX_PROBE_TOKENS}", expect.len());
            return Err(SpecError::new("expect", why));
        }
        let probe = Self {
            prompt: prompt.to_owned(),
            max_tokens: beginning_tokens(expect),
            text: None,
            begins_with: Some(expect.to_owned()),
            tokens_sha256: None,
        };
        probe.check()
    }

    /// # Errors
    /// What is missing or out of range.
    pub fn check(self) -> Result<Self, SpecError> {
        let wrong = |field: &str, why: String| Err(SpecError::new(format!("probe.{field}"), why));
        if self.prompt.is_empty() || self.prompt.len() > MAX_PROBE_BYTES {
            return wrong("prompt", format!("give 1 to {MAX_PROBE_BYTES} bytes"));
        }
        if !(1..=MAX_PROBE_TOKENS).contains(&self.max_tokens) {
            return wrong("max_tokens", format!("{} is not within 1 to {MAX_PROBE_TOKENS}", self.max_tokens));
        }
        let digest = self.tokens_sha256.as_deref();
        if digest.is_some_and(|text| text.len() != 64 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()))
        {
            return wrong("tokens_sha256", "give 64 hex digits".to_owned());
        }
        if self.text.as_ref().is_some_and(|text| text.len() > MAX_PROBE_BYTES) {
            return wrong("text", format!("give at most {MAX_PROBE_BYTES} bytes"));
        }
        let beginning_bytes = self.begins_with.as_ref().map(String::len);
        if beginning_bytes.is_some_and(|bytes| !(1..=MAX_PROBE_TOKENS as usize).contains(&bytes)) {
            return wrong("begins_with", format!("give 1 to {MAX_PROBE_TOKENS} bytes"));
        }
        if self.text.is_none() && self.begins_with.is_none() && digest.is_none() {
            return wrong("text", "give the text of the answer, or begins_with, or tokens_sha256".to_owned());
        }
        Ok(self)
    }

    /// Whether more of the answer changes nothing: only its beginning is compared, and it is there or
    /// differs.
    fn is_decided(&self, text: &str) -> bool {
        let only_beginning = self.text.is_none() && self.tokens_sha256.is_none();
        self.begins_with.as_ref().is_some_and(|expected| {
            only_beginning && (text.starts_with(expected) || !expected.starts_with(text))
        })
    }
}

/// Asks for the answer and compares it.
///
/// # Errors
/// `WrongAnswer` with both answers, or whatever stood in the way of one.
pub(crate) async fn check(engine: &Engine, golden: &GoldenProbe) -> Result<(), Failure> {
    let Answer { text, ids } = greedy_answer(engine, golden).await?;
    if let Some(expected) = golden.text.as_ref().filter(|expected| **expected != text) {
        return Err(wrong_answer(golden, &format!("{text:?} and not {expected:?}")));
    }
    if let Some(expected) = golden.begins_with.as_ref().filter(|expected| !text.starts_with(*expected)) {
        return Err(wrong_answer(golden, &format!("{text:?}, which does not begin with {expected:?}")));
    }
    let found = tokens_sha256(&ids);
    match &golden.tokens_sha256 {
        Some(expected) if !expected.eq_ignore_ascii_case(&found) => {
            let why = format!("{text:?}, whose tokens have the sha256 {found} and not {expected}");
            Err(wrong_answer(golden, &why))
        }
        _ => Ok(()),
    }
}

/// What a model answered.
struct Answer {
    text: String,
    ids: Vec<u32>,
}

/// The answer, as far as the probe needs it. Its end is dropped, which cancels the rest.
async fn greedy_answer(engine: &Engine, golden: &GoldenProbe) -> Result<Answer, Failure> {
    let params = GenerateParams::greedy(golden.prompt.as_str(), golden.max_tokens as usize);
    let refused =
        |error| Failure::permanent("WarmUpFailed", format!("the golden probe was refused: {error}"));
    let mut events = engine.submit(&params).map_err(refused)?;
    let (mut text, mut ids) = (String::new(), Vec::new());
    while let Some(event) = events.next().await {
        match event? {
            GenerationEvent::Token { id, text: piece, .. } => {
                text.push_str(&piece);
                ids.push(id);
            }
            GenerationEvent::Finished { .. } => break,
        }
        if golden.is_decided(&text) {
            break;
        }
    }
    Ok(Answer { text, ids })
}

fn wrong_answer(golden: &GoldenProbe, why: &str) -> Failure {
    let message = format!(
        "the golden prompt {:?} was answered with {why}; the weights are others than those that the probe was \
         made with, or are broken",
        golden.prompt
    );
    Failure::permanent("WrongAnswer", message)
}

/// sha256 of ids in decimal with one space between two.
#[must_use]
pub fn tokens_sha256(ids: &[u32]) -> String {
    let text = ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
    let mut digits = String::with_capacity(64);
    for byte in Sha256::digest(text) {
        // Writing to a String cannot fail.
        let _ = write!(digits, "{byte:02x}");
    }
    digits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_needs_a_prompt_and_an_answer() {
        let probe = |prompt: &str, max_tokens, text: Option<&str>, digest: Option<&str>| GoldenProbe {
            prompt: prompt.into(),
            max_tokens,
            text: text.map(str::to_owned),
            begins_with: None,
            tokens_sha256: digest.map(str::to_owned),
        };
        for (wrong, field) in [
            (probe("", 1, Some("a"), None), "probe.prompt"),
            (probe("a", 0, Some("a"), None), "probe.max_tokens"),
            (probe("a", 257, Some("a"), None), "probe.max_tokens"),
            (probe("a", 1, None, None), "probe.text"),
            (probe("a", 1, None, Some("12")), "probe.tokens_sha256"),
        ] {
            assert_eq!(wrong.check().unwrap_err().field, field);
        }
        assert!(probe("a", 1, Some(""), None).check().is_ok(), "an answer may be empty");
    }

    #[test]
    fn a_beginning_is_decided_as_soon_as_it_is_there_or_differs() {
        let probe = GoldenProbe::of_beginning("2 + 2 =", " 4").unwrap();
        assert_eq!((probe.max_tokens, probe.begins_with.as_deref()), (6, Some(" 4")));
        assert!(!probe.is_decided("") && !probe.is_decided(" "));
        assert!(probe.is_decided(" 4") && probe.is_decided(" 42") && probe.is_decided(" 5"));
        for (prompt, expect, field) in [("a", "", "expect"), ("a", &"b".repeat(257), "expect")] {
            assert_eq!(GoldenProbe::of_beginning(prompt, expect).unwrap_err().field, field);
        }
        assert_eq!(GoldenProbe::of_beginning("", "b").unwrap_err().field, "probe.prompt");
    }

    #[test]
    fn the_digest_of_tokens_is_that_of_their_decimal_text() {
        // printf '1 22 333' | sha256sum
        assert_eq!(
            tokens_sha256(&[1, 22, 333]),
            "dd42855f03ee838e8ac7b0a10fb2f1efb7bb17a51eb4041f67f4be84bc4c5bfd"
        );
    }
}
