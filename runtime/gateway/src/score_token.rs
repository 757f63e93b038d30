//! What lets any gateway count the score of an answer that another one gave.
//!
//! A gateway remembers its own answers (`feedback`). The others learn from the token, which the answer of an
//! A/B test carries, where a score of it counts. The token is sealed with the UID of the test: gateways know
//! it from the table and callers never see it, so that nobody can make a token but a gateway.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};

/// The header of an answer with its token.
pub(crate) const TOKEN_HEADER: &str = "x-trustformers-feedback";

/// Bytes of the epoch and the bucket.
const DATA_BYTES: usize = 9;
/// Bytes of the seal: 2^128 guesses.
const SEAL_BYTES: usize = 16;
/// The longest token that is read: 25 bytes have 34 characters.
const MAX_TOKEN_CHARS: usize = 64;

/// Which answer is scored.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sealed<'a> {
    /// UID of the test.
    pub(crate) test: &'a str,
    /// The variant of its user.
    pub(crate) variant: &'a str,
    /// The id of the request.
    pub(crate) request_id: &'a str,
}

/// Where its score counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ScorePlace {
    /// The epoch of the test.
    pub(crate) epoch: u64,
    /// The bucket of the user.
    pub(crate) bucket: u8,
}

impl Sealed<'_> {
    /// The token of an answer.
    pub(crate) fn token(&self, place: ScorePlace) -> String {
        let mut bytes = place.epoch.to_be_bytes().to_vec();
        bytes.push(place.bucket);
        let seal = self.seal(&bytes);
        bytes.extend(seal);
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// What a token says; none where it is not the one of this answer.
    pub(crate) fn place(&self, token: &str) -> Option<ScorePlace> {
        if token.len() > MAX_TOKEN_CHARS {
            return None;
        }
        let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
        let (data, seal) = bytes.split_at_checked(DATA_BYTES)?;
        let (epoch, bucket) = data.split_at_checked(size_of::<u64>())?;
        let place =
            ScorePlace { epoch: u64::from_be_bytes(epoch.try_into().ok()?), bucket: *bucket.first()? };
        (seal == self.seal(data)).then_some(place)
    }

    fn seal(&self, data: &[u8]) -> Vec<u8> {
        let mut hash = Sha256::new();
        hash.update(b"feedback");
        for part in [self.test.as_bytes(), self.variant.as_bytes(), data, self.request_id.as_bytes()] {
            // The length in front keeps the parts apart.
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        hash.finalize().iter().copied().take(SEAL_BYTES).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_of_its_answer_alone() {
        let sealed = Sealed { test: "uid", variant: "control", request_id: "id-1" };
        let place = ScorePlace { epoch: 1_800_000_000, bucket: 255 };
        let token = sealed.token(place);
        assert!(token.len() <= MAX_TOKEN_CHARS && !token.contains("uid"));
        assert_eq!(sealed.place(&token), Some(place));
        for other in [
            Sealed { test: "other", ..sealed },
            Sealed { variant: "treatment", ..sealed },
            Sealed { request_id: "id-2", ..sealed },
        ] {
            assert_eq!(other.place(&token), None, "{other:?}");
        }
        let another_bucket = sealed.token(ScorePlace { bucket: 0, ..place });
        assert_ne!(another_bucket, token);
        for wrong in ["", "AAAA", "not base64", &"A".repeat(100), &token[1..]] {
            assert_eq!(sealed.place(wrong), None, "{wrong}");
        }
    }
}
