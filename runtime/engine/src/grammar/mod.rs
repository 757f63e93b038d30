//! Structured output: which tokens the grammar of a request allows next.
//!
//! Every caller's text is checked and rewritten first ([`schema`], [`pattern`], [`lark`]), so that the
//! compiler sees only what it honours exactly. llguidance then walks a trie of the vocabulary's bytes along
//! the grammar's parser and gives one bit per token. The trie is built once per model, by the warm-up.
//! Compiled grammars are cached, a bounded number of them, and every request works on a copy of its own: what
//! one request makes its grammar remember never slows or breaks another's.
//!
//! Where a grammar leaves one way to write what comes next, the mask leaves the one token that the model's
//! own tokenizer would take.

mod compile;
mod constraint;
mod decimal;
mod digits;
mod json;
mod lark;
mod memory;
mod pattern;
mod schema;
mod thread_time;
mod vocabulary;

pub(crate) use constraint::Constraint;
pub use memory::max_grammar_bytes;

use crate::request::{Grammar, SubmitError};
use compile::{Compiled, Compiler};
use memory::{Charge, MemoryBudget};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use trustformers_model::Model;

/// Memory for compiled grammars and for those of running requests where none is configured. An ordinary
/// schema takes 0.1 MiB in a running request, a large one some MiB, so this holds a full batch of 256 and the
/// cache.
pub const DEFAULT_GRAMMAR_MEMORY_BYTES: u64 = 256 * 1024 * 1024;

/// Compiled grammars that are cached. They are dropped earlier where running requests need the memory.
const MAX_CACHED: usize = 32;

/// White space between the parts of JSON: one space at most. Given more room small models fill it, line after
/// line, until their tokens are used up.
const JSON_SPACE: &str = " ";

/// Grammars of one model.
pub(crate) struct Grammars {
    model: Arc<Model>,
    compiler: Compiler,
    budget: Arc<MemoryBudget>,
    /// Most recently used last.
    cached: Mutex<Vec<Cached>>,
}

struct Cached {
    grammar: Grammar,
    compiled: Arc<Compiled>,
    _charge: Charge,
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars").finish_non_exhaustive()
    }
}

impl Grammars {
    pub(crate) fn new(model: Arc<Model>, memory_bytes: u64) -> Self {
        let compiler = Compiler::new(Arc::clone(&model));
        Self { model, compiler, budget: MemoryBudget::new(memory_bytes), cached: Mutex::default() }
    }

    /// Builds what all formats of the model share. Takes some hundred milliseconds the first time.
    ///
    /// # Errors
    /// Why the model has no structured output.
    pub(crate) fn prepare(&self) -> Result<(), String> {
        self.compiler.prepare()
    }

    /// The beginning of what `grammar` describes. Takes milliseconds where it has to be compiled, and some
    /// hundred more without [`Self::prepare`].
    pub(crate) fn start(&self, grammar: &Grammar) -> Result<Constraint, SubmitError> {
        let compiled = match self.cached(grammar) {
            Some(compiled) => compiled,
            None => {
                let compiled = Arc::new(self.compiler.compile(grammar)?);
                self.cache(grammar, &compiled);
                compiled
            }
        };
        let charge = self.charge(constraint::bytes(&compiled.parser))?;
        Ok(Constraint::new(Arc::clone(&self.model), &compiled, charge))
    }

    fn cached(&self, grammar: &Grammar) -> Option<Arc<Compiled>> {
        let mut cached = self.cached.lock().unwrap_or_else(PoisonError::into_inner);
        let at = cached.iter().position(|entry| entry.grammar == *grammar)?;
        let entry = cached.remove(at);
        let compiled = Arc::clone(&entry.compiled);
        cached.push(entry);
        Some(compiled)
    }

    /// Caches a compiled grammar where there is memory for it.
    fn cache(&self, grammar: &Grammar, compiled: &Arc<Compiled>) {
        let Ok(charge) = self.charge(constraint::bytes(&compiled.parser)) else { return };
        let mut cached = self.cached.lock().unwrap_or_else(PoisonError::into_inner);
        if cached.len() >= MAX_CACHED {
            cached.remove(0);
        }
        cached.push(Cached { grammar: grammar.clone(), compiled: Arc::clone(compiled), _charge: charge });
    }

    /// Counts bytes, which may drop cached grammars.
    fn charge(&self, bytes: u64) -> Result<Charge, SubmitError> {
        loop {
            if let Some(charge) = self.budget.charge(bytes) {
                return Ok(charge);
            }
            let mut cached = self.cached.lock().unwrap_or_else(PoisonError::into_inner);
            if !cached.is_empty() {
                cached.remove(0);
            } else if bytes > self.budget.limit() {
                let why = format!(
                    "the format takes {bytes} bytes, and {} are there for structured output; simplify it",
                    self.budget.limit()
                );
                return Err(SubmitError::Invalid { field: "response_format", why });
            } else {
                let what = "the memory for structured output of this model";
                return Err(SubmitError::Busy { what, retry_after: Duration::from_secs(1) });
            }
        }
    }
}

/// A message of llguidance without the marks and traces that it adds for its own developers.
fn plain(message: &str) -> String {
    let end =
        ["\n<non-verbose/>", "\n<backtrace>", "\n<state>"].iter().filter_map(|mark| message.find(mark)).min();
    message[..end.unwrap_or(message.len())].trim().to_owned()
}

/// A text, or the beginning of one that is longer than `chars`.
fn shortened(text: &str, chars: usize) -> String {
    match text.char_indices().nth(chars) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}

#[cfg(test)]
mod maskbench;
#[cfg(test)]
mod tests;
