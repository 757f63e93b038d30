//! Bounds the digits of numbers in JSON, which the grammar of JSON does not: small models fill them like
//! blank space.
//!
//! Where a number has its most digits, tokens that begin with further ones are left out of the mask, unless
//! nothing else may follow. So what comes is always in the grammar, and a number ends.

use llguidance::toktrie::SimpleVob;
use trustformers_model::Model;

/// Digits before the point, and after it: those of 2^64, and more than a 64-bit float keeps.
const MAX_DIGITS: usize = 20;

/// Digits of an exponent. Three of them leave the range of a 64-bit float.
const MAX_EXPONENT_DIGITS: usize = 2;

/// The tokens of a vocabulary by the digits that they begin with.
#[derive(Debug)]
pub(super) struct DigitTokens {
    /// At `n`: one bit for each token that begins with more than `n` digits.
    more_than: Vec<SimpleVob>,
}

impl DigitTokens {
    pub(super) fn new(model: &Model) -> Self {
        let tokenizer = model.tokenizer();
        let tokens = tokenizer.len();
        let mut more_than: Vec<SimpleVob> = Vec::new();
        for id in 0..u32::try_from(tokens).unwrap_or(0) {
            let digits = tokenizer.token_bytes(id).iter().take_while(|b| b.is_ascii_digit()).count();
            for count in 0..digits.min(MAX_DIGITS) {
                if more_than.len() <= count {
                    more_than.push(SimpleVob::alloc(tokens));
                }
                more_than[count].allow_token(id);
            }
        }
        Self { more_than }
    }

    /// Takes tokens with more than `left` leading digits out of a mask, unless no other is in it.
    fn limit(&self, mask: &mut SimpleVob, left: usize) {
        let Some(longer) = self.more_than.get(left) else { return };
        let others =
            mask.as_slice().iter().zip(longer.as_slice()).any(|(allowed, longer)| allowed & !longer != 0);
        if others {
            mask.sub(longer);
        }
    }
}

/// Where an answer in JSON is in its numbers.
#[derive(Debug, Clone, Default)]
pub(super) struct NumberPosition {
    in_string: bool,
    escaped: bool,
    in_exponent: bool,
    digits: usize,
}

impl NumberPosition {
    pub(super) fn advance(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if self.in_string {
                match byte {
                    _ if self.escaped => self.escaped = false,
                    b'\\' => self.escaped = true,
                    b'"' => self.in_string = false,
                    _ => {}
                }
                continue;
            }
            match byte {
                b'0'..=b'9' => self.digits += 1,
                b'e' | b'E' => *self = Self { in_exponent: self.digits > 0, ..Self::default() },
                b'+' | b'-' if self.in_exponent && self.digits == 0 => {}
                byte => *self = Self { in_string: byte == b'"', ..Self::default() },
            }
        }
    }

    /// Leaves out of a mask what would make the number at this position too long.
    pub(super) fn limit(&self, mask: &mut SimpleVob, tokens: &DigitTokens) {
        if self.in_string || (self.digits == 0 && !self.in_exponent) {
            return;
        }
        let most = if self.in_exponent { MAX_EXPONENT_DIGITS } else { MAX_DIGITS };
        tokens.limit(mask, most.saturating_sub(self.digits));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_counted_outside_of_strings_only() {
        for (text, digits, in_exponent) in [
            ("12", 2, false),
            ("\"12", 0, false),
            ("\"a\\\"12\"3", 1, false),
            ("-12.345", 3, false),
            ("1.5e-3", 1, true),
            ("[1, 2", 1, false),
            ("true", 0, false),
            ("1e5,7", 1, false),
        ] {
            let mut position = NumberPosition::default();
            position.advance(text.as_bytes());
            assert_eq!((position.digits, position.in_exponent), (digits, in_exponent), "{text}");
        }
    }
}
