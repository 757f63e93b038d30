//! Decodes base64 that arrives in pieces, as gRPC-Web sends it in its form as text.
//!
//! Such a body is several runs of base64 one behind the other, each with padding of its own, so padding may
//! stand anywhere between groups of four characters.

/// A character is not base64.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NotBase64;

/// A decoder between two pieces.
#[derive(Debug, Default)]
pub(crate) struct Base64Stream {
    /// The values of the characters of a group that is not complete.
    group: [u8; 4],
    characters: usize,
    /// How many of them are padding.
    padding: usize,
}

impl Base64Stream {
    /// Appends what the next characters mean.
    ///
    /// # Errors
    /// They are not base64. What was appended before is right.
    pub(crate) fn decode(&mut self, text: &[u8], decoded: &mut Vec<u8>) -> Result<(), NotBase64> {
        for &character in text {
            let value = match character {
                b'=' if self.characters >= 2 => {
                    self.padding += 1;
                    0
                }
                // Padding ends a group.
                _ if self.padding > 0 => return Err(NotBase64),
                _ => value_of(character).ok_or(NotBase64)?,
            };
            self.group[self.characters] = value;
            self.characters += 1;
            if self.characters == self.group.len() {
                let [a, b, c, d] = self.group;
                let bytes = [a << 2 | b >> 4, b << 4 | c >> 2, c << 6 | d];
                decoded.extend_from_slice(&bytes[..bytes.len() - self.padding]);
                *self = Self::default();
            }
        }
        Ok(())
    }
}

/// The six bits of a character.
fn value_of(character: u8) -> Option<u8> {
    Some(match character {
        b'A'..=b'Z' => character - b'A',
        b'a'..=b'z' => character - b'a' + 26,
        b'0'..=b'9' => character - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(text: &str, piece: usize) -> Result<Vec<u8>, NotBase64> {
        let (mut stream, mut decoded) = (Base64Stream::default(), Vec::new());
        for piece in text.as_bytes().chunks(piece) {
            stream.decode(piece, &mut decoded)?;
        }
        Ok(decoded)
    }

    #[test]
    fn runs_with_padding_between_them_are_decoded_however_they_are_cut() {
        for (text, bytes) in [
            ("", &b""[..]),
            ("Zm9vYmFy", b"foobar"),
            ("Zm9vYg==Zm8=YQ==", b"foobfoa"),
            ("+/+/AP8Q", &[0xfb, 0xff, 0xbf, 0x00, 0xff, 0x10]),
            // What is not complete waits.
            ("Zm9vYm", b"foo"),
        ] {
            for piece in [1, 3, 4, 100] {
                assert_eq!(decode(text, piece).unwrap(), bytes, "{text} {piece}");
            }
        }
        for bad in ["Zm9v\n", "Z===", "=", "Zm=v", "Zm9-", "Zg==="] {
            assert!(decode(bad, 1).is_err(), "{bad}");
        }
    }
}
