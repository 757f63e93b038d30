//! The memory of structured output: one budget for compiled grammars and for those of running requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Compilations at once. Each may take [`COMPILE_BYTES`] and a core for a second.
pub(super) const MAX_COMPILATIONS: usize = 2;

/// What one compilation takes at most beside its result: 140 MiB of stack for a chain of definitions, or 8
/// MiB of combined schema at ten bytes for each, and a million nodes of expressions (the compiler's
/// `initial_lexer_fuel`) at some 48.
const COMPILE_BYTES: u64 = 192 * 1024 * 1024;

/// What the vocabulary's trie takes for a token: 7 bytes of text on average, each with a node of 8 bytes, the
/// text itself and its masks.
const VOCABULARY_TOKEN_BYTES: u64 = 96;

/// The most memory that structured output takes with a budget of `grammar_memory_bytes` for a model with this
/// many tokens: the budget, what is being compiled, and the vocabulary.
#[must_use]
pub const fn max_grammar_bytes(grammar_memory_bytes: u64, vocabulary_tokens: u64) -> u64 {
    grammar_memory_bytes
        .saturating_add(COMPILE_BYTES.saturating_mul(MAX_COMPILATIONS as u64))
        .saturating_add(VOCABULARY_TOKEN_BYTES.saturating_mul(vocabulary_tokens))
}

/// Bytes that are in use, and how many may be.
#[derive(Debug)]
pub(super) struct MemoryBudget {
    limit: u64,
    used: AtomicU64,
}

impl MemoryBudget {
    pub(super) fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self { limit, used: AtomicU64::new(0) })
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    #[cfg(test)]
    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Counts `bytes`, or nothing where they exceed the limit.
    pub(super) fn charge(self: &Arc<Self>, bytes: u64) -> Option<Charge> {
        let mut charge = Charge { budget: Arc::clone(self), bytes: 0 };
        charge.resize(bytes).then_some(charge)
    }
}

/// Bytes that are counted until this is dropped.
#[derive(Debug)]
pub(super) struct Charge {
    budget: Arc<MemoryBudget>,
    bytes: u64,
}

impl Charge {
    /// Counts `bytes` instead of what was counted; false, and nothing changed, where they exceed the limit.
    pub(super) fn resize(&mut self, bytes: u64) -> bool {
        let fits = self.budget.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            let others = used.saturating_sub(self.bytes);
            let total = others.saturating_add(bytes);
            (bytes <= self.bytes || total <= self.budget.limit).then_some(total)
        });
        if fits.is_ok() {
            self.bytes = bytes;
        }
        fits.is_ok()
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.resize(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_counted_while_their_charge_lives() {
        let budget = MemoryBudget::new(100);
        let mut first = budget.charge(60).unwrap();
        assert!(budget.charge(41).is_none());
        let second = budget.charge(40).unwrap();
        assert!(!first.resize(61), "beyond the limit");
        assert!(first.resize(20), "less always fits");
        drop(second);
        assert!(first.resize(100));
        drop(first);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn the_most_memory_is_the_sum_of_its_reasons() {
        assert_eq!(max_grammar_bytes(1 << 29, 150_000), (1 << 29) + 2 * 192 * 1024 * 1024 + 96 * 150_000);
    }
}
