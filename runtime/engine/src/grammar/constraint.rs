//! One sequence's position in its grammar, and which tokens it leaves.

use super::compile::Compiled;
use super::digits::{DigitTokens, NumberPosition};
use super::memory::Charge;
use super::plain;
use crate::faults::RequestFault;
use crate::request::GenerateError;
use llguidance::TokenParser;
use llguidance::panic_utils::catch_unwind;
use llguidance::toktrie::SimpleVob;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use trustformers_model::Model;

/// Bytes of one item of a parsed row.
const ITEM_BYTES: u64 = 16;

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

/// One sequence's position in its grammar.
pub(crate) struct Constraint {
    model: Arc<Model>,
    parser: TokenParser,
    digits: Option<Arc<DigitTokens>>,
    position: NumberPosition,
    /// Bytes of this sequence's rows and of its lexer.
    charge: Charge,
    items: u64,
    /// Of the next token, where it was worked out already.
    mask: Option<Result<Mask, GenerateError>>,
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Constraint").field("stopped", &self.parser.stopped()).finish_non_exhaustive()
    }
}

impl Constraint {
    /// A copy of its own of a compiled grammar, for whose bytes `charge` stands.
    pub(super) fn new(model: Arc<Model>, compiled: &Compiled, charge: Charge) -> Self {
        Self {
            model,
            parser: compiled.parser.deep_clone(),
            digits: compiled.digits.clone(),
            position: NumberPosition::default(),
            charge,
            items: 0,
            mask: None,
        }
    }

    /// Works out the next mask.
    pub(crate) fn prepare(&mut self) {
        if self.mask.is_none() {
            self.mask = Some(self.next_mask());
        }
    }

    fn next_mask(&mut self) -> Result<Mask, GenerateError> {
        let parser = &mut self.parser;
        let worked = catch_unwind(AssertUnwindSafe(|| {
            let mask = parser.compute_mask()?;
            Ok((mask, bytes(parser)))
        }));
        let (mut mask, lexer_bytes) = worked.map_err(|error| broken(&error.to_string()))?;
        if !self.charge.resize(lexer_bytes.saturating_add(self.items.saturating_mul(ITEM_BYTES))) {
            let message =
                "the memory for structured output is used up; retry, or simplify the format".to_owned();
            return Err(RequestFault::Grammar { message }.into());
        }
        if let Some(digits) = &self.digits {
            self.position.limit(&mut mask, digits);
        }
        Ok(Mask(mask))
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
        let parser = &mut self.parser;
        let before = parser.parser_stats().all_items;
        let stopped = catch_unwind(AssertUnwindSafe(|| {
            parser.consume_token(id)?;
            parser.check_stop()
        }));
        let stopped = stopped.map_err(|error| broken(&error.to_string()))?;
        let items = self.parser.parser_stats().all_items.saturating_sub(before);
        self.items = self.items.saturating_add(items as u64);
        self.position.advance(self.model.tokenizer().token_bytes(id));
        Ok(stopped || self.parser.stopped())
    }
}

#[cfg(test)]
impl Constraint {
    /// Whether the grammar takes a token, also where the mask has only the tokenizer's own one.
    pub(super) fn validates(&mut self, id: u32) -> bool {
        self.parser.validate_token(id).unwrap_or(false)
    }
}

/// Bytes of a parser's lexer, which grows with every new state.
pub(super) fn bytes(parser: &TokenParser) -> u64 {
    parser.parser.lexer_stats().num_bytes as u64
}

fn broken(message: &str) -> GenerateError {
    if message.contains("panic: ") {
        tracing::error!(message, "the grammar of a request panicked");
        return RequestFault::Grammar { message: "the grammar failed; simplify it".to_owned() }.into();
    }
    let message = match plain(message) {
        empty if empty.is_empty() || empty == "NoExtensionBias" => {
            "no token of the model can continue it".to_owned()
        }
        message => super::shortened(&message, 200),
    };
    RequestFault::Grammar { message }.into()
}
