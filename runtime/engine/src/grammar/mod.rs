//! Structured output: what the grammar of a request allows next.
//!
//! llguidance does the work: it walks a trie of the vocabulary's bytes along the grammar's parser and gives one bit per
//! token. The trie is built once per model, at the first request that needs it, on that caller's thread. Compiled
//! grammars are kept, a bounded number of them, and every request works on a copy of its own: what one request makes
//! its grammar remember never slows or breaks another's.
//!
//! Where a grammar leaves one way to write what comes next, the mask leaves the one token that the model's own
//! tokenizer would take.

mod vocabulary;

use crate::request::{GenerateError, Grammar, SubmitError};
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{InferenceCapabilities, SimpleVob, TokEnv};
use llguidance::{Matcher, ParserFactory};
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use trustformers_model::Model;
use vocabulary::Vocabulary;

/// Compiled grammars that are kept. One takes from some KiB to a few MiB, so together at most some 100 MiB where every
/// caller has a large one of their own.
const KEPT_GRAMMARS: usize = 32;

/// States that the lexer of one running request may have, at 1 to 2 KiB each.
const MAX_LEXER_STATES: usize = 50_000;

/// Stack of the thread that compiles: a grammar nests as deep as its text allows, and running out of stack would end
/// the process. Only what is used becomes memory.
const COMPILE_STACK_BYTES: usize = 256 * 1024 * 1024;

/// White space between the parts of JSON: one space at most. Given more room small models fill it, line after line,
/// until their tokens are used up.
const JSON_SPACE: &str = " ";

/// Compiles grammars for one model.
pub(crate) struct Grammars {
    model: Arc<Model>,
    factory: OnceLock<Result<ParserFactory, String>>,
    /// Most recently used last.
    compiled: Mutex<Vec<(Grammar, Arc<Matcher>)>>,
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars").finish_non_exhaustive()
    }
}

impl Grammars {
    pub(crate) fn new(model: Arc<Model>) -> Self {
        Self { model, factory: OnceLock::new(), compiled: Mutex::default() }
    }

    /// The beginning of what `grammar` describes. Takes milliseconds where it has to be compiled, and some hundred
    /// the first time.
    pub(crate) fn start(&self, grammar: &Grammar) -> Result<Constraint, SubmitError> {
        let known = self.known(grammar);
        let matcher = match known {
            Some(matcher) => matcher,
            None => {
                let matcher = Arc::new(self.compile(grammar)?);
                self.keep(grammar, &matcher);
                matcher
            }
        };
        Ok(Constraint { matcher: matcher.deep_clone(), mask: None })
    }

    fn known(&self, grammar: &Grammar) -> Option<Arc<Matcher>> {
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        let at = compiled.iter().position(|(known, _)| known == grammar)?;
        let entry = compiled.remove(at);
        let matcher = Arc::clone(&entry.1);
        compiled.push(entry);
        Some(matcher)
    }

    fn keep(&self, grammar: &Grammar, matcher: &Arc<Matcher>) {
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if compiled.len() >= KEPT_GRAMMARS {
            compiled.remove(0);
        }
        compiled.push((grammar.clone(), Arc::clone(matcher)));
    }

    fn compile(&self, grammar: &Grammar) -> Result<Matcher, SubmitError> {
        let invalid = |why: String| SubmitError::Invalid { field: "response_format", why };
        let described = described(grammar).map_err(invalid)?;
        let factory = self.factory.get_or_init(|| factory(&self.model));
        let factory = factory.as_ref().map_err(|why| invalid(why.clone()))?;
        let compiled = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("grammar".to_owned())
                .stack_size(COMPILE_STACK_BYTES)
                .spawn_scoped(scope, || {
                    factory.create_parser(described).map_err(|e| plain(&format!("{e:#}")))
                });
            match thread.map(std::thread::ScopedJoinHandle::join) {
                Ok(Ok(compiled)) => compiled,
                Ok(Err(_)) => Err("compiling it panicked; see the log".to_owned()),
                Err(error) => Err(format!("no thread to compile it: {error}")),
            }
        });
        let parser =
            compiled.map_err(|why| invalid(format!("the {} cannot be compiled: {why}", grammar.kind())))?;
        Ok(Matcher::new(Ok(parser)))
    }
}

/// The grammar in llguidance's words.
fn described(grammar: &Grammar) -> Result<TopLevelGrammar, String> {
    let schema = |text: &str| -> Result<TopLevelGrammar, String> {
        let mut schema: serde_json::Value =
            serde_json::from_str(text).map_err(|error| format!("the JSON schema is not JSON: {error}"))?;
        if let Some(object) = schema.as_object_mut() {
            // llguidance's own key for how JSON is laid out; who gives it decides.
            object
                .entry("x-guidance")
                .or_insert_with(|| serde_json::json!({ "whitespace_pattern": JSON_SPACE }));
        }
        Ok(TopLevelGrammar::from_json_schema(schema))
    };
    match grammar {
        Grammar::JsonObject => schema(r#"{"type": "object"}"#),
        Grammar::JsonSchema(text) => schema(text),
        Grammar::Regex(text) => Ok(TopLevelGrammar::from_regex(text)),
        Grammar::Lark(text) => Ok(TopLevelGrammar::from_lark(text.clone())),
    }
}

fn factory(model: &Arc<Model>) -> Result<ParserFactory, String> {
    let began = std::time::Instant::now();
    let vocabulary: TokEnv = Arc::new(Vocabulary::new(model)?);
    let mut factory = ParserFactory::new(
        &vocabulary,
        InferenceCapabilities::default(),
        &SlicedBiasComputer::general_slices(),
    )
    .map_err(|error| plain(&format!("{error:#}")))?;
    factory.quiet();
    *factory.limits_mut() =
        ParserLimits { max_lexer_states: MAX_LEXER_STATES, verbose_errors: false, ..ParserLimits::default() };
    tracing::debug!(
        tokens = model.tokenizer().len(),
        ms = began.elapsed().as_millis(),
        "the vocabulary is ready for structured output"
    );
    Ok(factory)
}

/// A message of llguidance without the marks and traces that it adds for its own developers.
fn plain(message: &str) -> String {
    let end =
        ["\n<non-verbose/>", "\n<backtrace>", "\n<state>"].iter().filter_map(|mark| message.find(mark)).min();
    message[..end.unwrap_or(message.len())].trim().to_owned()
}

/// Which tokens may come next: one bit per id.
#[derive(Debug)]
pub(crate) struct Mask(SimpleVob);

impl Mask {
    /// Makes everything impossible that is not allowed; rows may be longer than the vocabulary.
    pub(crate) fn apply(&self, row: &mut [f32]) {
        let words = self.0.as_slice();
        let covered = row.len().min(words.len() * 32);
        for (bits, logits) in words.iter().zip(row[..covered].chunks_mut(32)) {
            if *bits == 0 {
                logits.fill(f32::NEG_INFINITY);
            } else if *bits != u32::MAX {
                for (logit, bit) in logits.iter_mut().zip(0..) {
                    *logit = if bits >> bit & 1 == 1 { *logit } else { f32::NEG_INFINITY };
                }
            }
        }
        row[covered..].fill(f32::NEG_INFINITY);
    }
}

/// One sequence's place in its grammar.
pub(crate) struct Constraint {
    matcher: Matcher,
    /// Of the next token, where it is known already.
    mask: Option<Result<Mask, GenerateError>>,
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Constraint").field("stopped", &self.matcher.is_stopped()).finish_non_exhaustive()
    }
}

impl Constraint {
    /// Works out the next mask.
    pub(crate) fn prepare(&mut self) {
        if self.mask.is_none() {
            self.mask =
                Some(self.matcher.compute_mask().map(Mask).map_err(|error| broken(&error.to_string())));
        }
    }

    /// What may come next; at least one token.
    pub(crate) fn mask(&mut self) -> Result<&Mask, GenerateError> {
        self.prepare();
        match &self.mask {
            Some(Ok(mask)) => Ok(mask),
            Some(Err(error)) => Err(error.clone()),
            None => Err(broken("")),
        }
    }

    /// Goes on with a token that the mask allowed. True where nothing can follow.
    pub(crate) fn accept(&mut self, id: u32) -> Result<bool, GenerateError> {
        self.mask = None;
        self.matcher.consume_token(id).map_err(|error| broken(&error.to_string()))?;
        Ok(self.matcher.is_stopped())
    }
}

fn broken(message: &str) -> GenerateError {
    let message = match plain(message) {
        empty if empty.is_empty() || empty == "NoExtensionBias" => {
            "no token of the model can continue it".to_owned()
        }
        message => message,
    };
    GenerateError::Grammar { message }
}

#[cfg(test)]
mod tests;
