//! From token bytes to text, one token at a time, in whole characters.

/// Buffers bytes until they make a whole character. The pieces together are the text of all bytes together,
/// for any boundaries between tokens.
#[derive(Debug, Default, Clone)]
pub struct Detokenizer {
    pending: Vec<u8>,
}

impl Detokenizer {
    /// No bytes pending.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a token's bytes and gives the text that is final now. Bytes that can never become a character
    /// turn into U+FFFD.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, bad) = rest.split_at(error.valid_up_to());
                    // The bytes before the error were just found to be valid.
                    text.push_str(std::str::from_utf8(valid).unwrap_or_default());
                    rest = bad;
                    match error.error_len() {
                        Some(len) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            rest = &rest[len..];
                        }
                        None => break,
                    }
                }
            }
        }
        let kept = rest.len();
        self.pending.drain(..self.pending.len() - kept);
        text
    }

    /// Ends the text: bytes still pending turn into U+FFFD.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_emoji_in_four_tokens_appears_with_the_last() {
        let mut detokenizer = Detokenizer::new();
        let bytes = "🦀".as_bytes();
        for byte in &bytes[..3] {
            assert_eq!(detokenizer.push(&[*byte]), "");
        }
        assert_eq!(detokenizer.push(&bytes[3..]), "🦀");
        assert_eq!(detokenizer.finish(), "");
    }

    #[test]
    fn an_incomplete_character_is_replaced_at_the_end() {
        let mut detokenizer = Detokenizer::new();
        assert_eq!(detokenizer.push(b"a\xf0\x9f"), "a");
        assert_eq!(detokenizer.finish(), "\u{fffd}");
        assert_eq!(detokenizer.finish(), "");
    }

    #[test]
    fn an_invalid_byte_does_not_delay_the_rest() {
        assert_eq!(Detokenizer::new().push(b"a\xffb\xc3(c"), "a\u{fffd}b\u{fffd}(c");
    }

    proptest! {
        #[test]
        fn any_boundaries_give_the_same_text(
            pieces in prop::collection::vec(
                prop_oneof![
                    prop::collection::vec(any::<u8>(), 0..4),
                    any::<char>().prop_map(|c| c.to_string().into_bytes()),
                ],
                0..40,
            ),
            cut in 1usize..5,
        ) {
            let all: Vec<u8> = pieces.concat();
            let mut detokenizer = Detokenizer::new();
            let mut text: String = all.chunks(cut).map(|bytes| detokenizer.push(bytes)).collect();
            text.push_str(&detokenizer.finish());
            prop_assert_eq!(text, String::from_utf8_lossy(&all));
        }
    }
}
