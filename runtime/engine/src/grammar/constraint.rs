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
    /// One bit for each id, 32 in a word; ids beyond the last word are not allowed.
    pub(crate) fn words(&self) -> &[u32] {
        self.0.as_slice()
    }

    fn allows(&self, id: u32) -> bool {
        self.words().get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1)
    }
}

/// One sequence's position in its grammar.
pub(crate) struct Constraint {
    model: Arc<Model>,
    position: GrammarPosition,
    digits: Option<Arc<DigitTokens>>,
    /// Bytes of this sequence's rows and of its lexer.
    charge: Charge,
    items: u64,
    /// Of the next token, where it was worked out already.
    mask: Option<Result<Mask, GenerateError>>,
}

/// What a produced token changes.
struct GrammarPosition {
    parser: TokenParser,
    number: NumberPosition,
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stopped = self.position.parser.stopped();
        f.debug_struct("Constraint").field("stopped", &stopped).finish_non_exhaustive()
    }
}

impl GrammarPosition {
    /// What may come next, and the bytes of the lexer.
    fn mask(&mut self, digits: Option<&DigitTokens>) -> Result<(Mask, u64), GenerateError> {
        let parser = &mut self.parser;
        let worked = catch_unwind(AssertUnwindSafe(|| {
            let mask = parser.compute_mask()?;
            Ok((mask, bytes(parser)))
        }));
        let (mut mask, lexer_bytes) = worked.map_err(|error| broken(&error.to_string()))?;
        if let Some(digits) = digits {
            self.number.limit(&mut mask, digits);
        }
        Ok((Mask(mask), lexer_bytes))
    }

    /// Goes on with a token that the mask allowed. True where nothing can follow.
    fn accept(&mut self, id: u32, model: &Model) -> Result<bool, GenerateError> {
        let parser = &mut self.parser;
        let stopped = catch_unwind(AssertUnwindSafe(|| {
            parser.consume_token(id)?;
            parser.check_stop()
        }));
        let stopped = stopped.map_err(|error| broken(&error.to_string()))?;
        self.number.advance(model.tokenizer().token_bytes(id));
        Ok(stopped || self.parser.stopped())
    }

    fn copied(&self) -> Self {
        Self { parser: self.parser.deep_clone(), number: self.number.clone() }
    }
}

impl Constraint {
    /// A copy of its own of a compiled grammar, for whose bytes `charge` stands.
    pub(super) fn new(model: Arc<Model>, compiled: &Compiled, charge: Charge) -> Self {
        Self {
            model,
            position: GrammarPosition {
                parser: compiled.parser.deep_clone(),
                number: NumberPosition::default(),
            },
            digits: compiled.digits.clone(),
            charge,
            items: 0,
            mask: None,
        }
    }

    fn next_mask(&mut self) -> Result<Mask, GenerateError> {
        let (mask, lexer_bytes) = self.position.mask(self.digits.as_deref())?;
        if !self.charge.resize(lexer_bytes.saturating_add(self.items.saturating_mul(ITEM_BYTES))) {
            let message =
                "the memory for structured output is used up; retry, or simplify the format".to_owned();
            return Err(RequestFault::Grammar { message }.into());
        }
        Ok(mask)
    }

    /// What may come next; at least one token.
    pub(crate) fn mask(&mut self) -> Result<&Mask, GenerateError> {
        if self.mask.is_none() {
            self.mask = Some(self.next_mask());
        }
        match &self.mask {
            Some(Ok(mask)) => Ok(mask),
            Some(Err(error)) => Err(error.clone()),
            None => Err(broken("")),
        }
    }

    /// Calls `each` with what may come next, and with what may come after each of the draft tokens, up to the
    /// first one that the grammar forbids or after which nothing follows. The position stays: the draft is
    /// walked on a copy, which is dropped at once and so not charged.
    ///
    /// # Errors
    /// Nothing may come next, or the memory for grammars is used up.
    pub(crate) fn each_mask(
        &mut self,
        draft: &[u32],
        mut each: impl FnMut(Option<&[u32]>),
    ) -> Result<(), GenerateError> {
        let mask = self.mask()?;
        each(Some(mask.words()));
        if !draft.first().is_some_and(|id| mask.allows(*id)) {
            return Ok(());
        }
        let mut ahead = self.position.copied();
        for (index, id) in draft.iter().enumerate() {
            // An error shows again when the sequence comes to this token, if it does.
            if !matches!(ahead.accept(*id, &self.model), Ok(false)) {
                break;
            }
            let Ok((mask, _)) = ahead.mask(self.digits.as_deref()) else { break };
            each(Some(mask.words()));
            if !draft.get(index + 1).is_some_and(|id| mask.allows(*id)) {
                break;
            }
        }
        Ok(())
    }

    /// Goes on with a token that the mask allowed. True where nothing can follow.
    pub(crate) fn accept(&mut self, id: u32) -> Result<bool, GenerateError> {
        self.mask = None;
        let before = self.position.parser.parser_stats().all_items;
        let stopped = self.position.accept(id, &self.model)?;
        let items = self.position.parser.parser_stats().all_items.saturating_sub(before);
        self.items = self.items.saturating_add(items as u64);
        Ok(stopped)
    }
}

#[cfg(test)]
impl Constraint {
    /// Whether the grammar takes a token, also where the mask has only the tokenizer's own one.
    pub(super) fn validates(&mut self, id: u32) -> bool {
        self.position.parser.validate_token(id).unwrap_or(false)
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
