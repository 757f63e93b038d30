//! Content encodings over HTTP: compressed request bodies, and compressed answers for clients that ask.
//!
//! | encoding | request bodies | answers |
//! |---|---|---|
//! | `gzip` (`x-gzip`) | yes | yes |
//! | `deflate` (zlib's format, or without its frame) | yes | yes, in the format of zlib |
//! | `br` | yes | yes |
//! | `zstd` | yes | yes |
//!
//! Any other encoding of a body, and several at once, are refused with 415 and the list of those above. A
//! body is read whole before it is decoded, and decoded as a job that counts against the jobs for large
//! bodies: a decoder's memory is up to 16 MiB, so that two at a time take 32 MiB whatever the callers do. An
//! answer is compressed whole too, because the budget of unread answers counts its bytes. Only JSON that is
//! complete is compressed: never a stream of tokens.

use std::io::{self, Read};

use axum::http::header::{ACCEPT_ENCODING, CONTENT_ENCODING};
use axum::http::{HeaderMap, HeaderValue};

use crate::echo::echo;
use crate::error::ApiError;

mod answer;
mod body;

pub(crate) use answer::compress_answer;
pub(crate) use body::decode_body;

/// What bodies of requests may be encoded with, as `Accept-Encoding` of a refusal lists it.
pub(crate) const ACCEPTED_ENCODINGS: &str = "gzip, deflate, br, zstd";

/// Decodes what `content-encoding` says of bytes, piece by piece, for a server that passes the body on and
/// has to look into it. None where they are not encoded.
///
/// # Errors
/// An encoding that is not supported; bytes that cannot be what it says.
pub fn decoder<'a>(headers: &HeaderMap, bytes: &'a [u8]) -> Result<Option<Box<dyn Read + 'a>>, ApiError> {
    let Some(encoding) = ContentEncoding::of_body(headers)? else { return Ok(None) };
    body::reader(encoding, bytes).map(Some).map_err(|error| body::broken(encoding, &error))
}

/// Whether the headers say that a body is encoded, in a way that is supported.
///
/// # Errors
/// An encoding that is not supported.
pub fn is_encoded(headers: &HeaderMap) -> Result<bool, ApiError> {
    ContentEncoding::of_body(headers).map(|encoding| encoding.is_some())
}

/// Decodes one message of gRPC whose encoding has this name. None where the name is not known.
///
/// # Errors
/// The decoder could not be made.
pub fn message_decoder<'a>(name: &str, bytes: &'a [u8]) -> io::Result<Option<Box<dyn Read + 'a>>> {
    match ContentEncoding::named(name) {
        Some(encoding) => body::reader(encoding, bytes).map(Some),
        None => Ok(None),
    }
}

/// A way to compress a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ContentEncoding {
    Gzip,
    Deflate,
    Brotli,
    Zstd,
}

impl ContentEncoding {
    /// Those of answers, the one that costs least for its result first.
    const OF_ANSWERS: [Self; 4] = [Self::Zstd, Self::Brotli, Self::Gzip, Self::Deflate];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Deflate => "deflate",
            Self::Brotli => "br",
            Self::Zstd => "zstd",
        }
    }

    fn named(name: &str) -> Option<Self> {
        if name.eq_ignore_ascii_case("x-gzip") {
            return Some(Self::Gzip);
        }
        [Self::Gzip, Self::Deflate, Self::Brotli, Self::Zstd]
            .into_iter()
            .find(|encoding| encoding.as_str().eq_ignore_ascii_case(name))
    }

    /// How the body of a request is encoded; none where it is as it is.
    fn of_body(headers: &HeaderMap) -> Result<Option<Self>, ApiError> {
        let values = headers.get_all(CONTENT_ENCODING).iter();
        let values: Vec<String> =
            values.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).collect();
        let all = values.join(", ");
        let mut encoded = all
            .split(',')
            .map(str::trim)
            .filter(|name| !name.is_empty() && !name.eq_ignore_ascii_case("identity"));
        match (encoded.next(), encoded.next()) {
            (None, _) => Ok(None),
            (Some(name), None) if Self::named(name).is_some() => Ok(Self::named(name)),
            _ => Err(ApiError::UnsupportedEncoding { encoding: echo(all.trim()).into_owned() }),
        }
    }

    /// The encoding that the client prefers for its answer; none where it asks for none of ours.
    fn of_answer(headers: &HeaderMap) -> Option<Self> {
        let values = headers.get_all(ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok());
        let accepted: Vec<Weighted<'_>> = values.flat_map(|value| value.split(',')).map(weighted).collect();
        let weight = |encoding: Self| {
            let named = accepted.iter().find(|one| Self::named(one.name) == Some(encoding));
            let weight = named.or_else(|| accepted.iter().find(|one| one.name == "*"))?.thousandths;
            (weight > 0).then_some(weight)
        };
        let ranked = Self::OF_ANSWERS.into_iter().rev().filter_map(|one| Some((weight(one)?, one)));
        // Of equal weights the last one counts: the first of the list above.
        ranked.max_by_key(|(weight, _)| *weight).map(|(_, encoding)| encoding)
    }

    fn header(self) -> HeaderValue {
        HeaderValue::from_static(self.as_str())
    }
}

/// One entry of `Accept-Encoding`.
struct Weighted<'a> {
    name: &'a str,
    /// Its weight, `q`, in thousandths.
    thousandths: u32,
}

fn weighted(entry: &str) -> Weighted<'_> {
    let (name, parameters) = entry.split_once(';').unwrap_or((entry, ""));
    let weight = parameters.split(';').find_map(|parameter| {
        let (key, value) = parameter.split_once('=')?;
        key.trim().eq_ignore_ascii_case("q").then(|| value.trim().parse::<f32>().ok())?
    });
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and 1000")]
    let thousandths = (weight.unwrap_or(1.0).clamp(0.0, 1.0) * 1000.0) as u32;
    Weighted { name: name.trim(), thousandths }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &axum::http::HeaderName, values: &[&'static str]) -> HeaderMap {
        values.iter().map(|value| (name.clone(), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn the_preferred_encoding_of_an_answer_is_chosen() {
        for (asked, chosen) in [
            ("", None),
            ("identity", None),
            ("deflate", Some(ContentEncoding::Deflate)),
            ("gzip", Some(ContentEncoding::Gzip)),
            ("GZIP, Deflate", Some(ContentEncoding::Gzip)),
            ("gzip, deflate, br, zstd", Some(ContentEncoding::Zstd)),
            ("gzip, deflate, br", Some(ContentEncoding::Brotli)),
            ("zstd;q=0.5, gzip;q=0.8", Some(ContentEncoding::Gzip)),
            ("zstd;q=0, br; q=0, *", Some(ContentEncoding::Gzip)),
            ("*;q=0", None),
            ("gzip;q=nonsense", Some(ContentEncoding::Gzip)),
            ("gzip;q=NaN", None),
        ] {
            let found = ContentEncoding::of_answer(&headers(&ACCEPT_ENCODING, &[asked]));
            assert_eq!(found, chosen, "{asked}");
        }
    }

    #[test]
    fn one_encoding_of_a_body_is_taken_and_others_are_named() {
        let of = |values: &[&'static str]| ContentEncoding::of_body(&headers(&CONTENT_ENCODING, values));
        assert_eq!(of(&[]), Ok(None));
        assert_eq!(of(&["Identity"]), Ok(None));
        assert_eq!(of(&["identity, X-Gzip"]), Ok(Some(ContentEncoding::Gzip)));
        assert_eq!(of(&["deflate"]), Ok(Some(ContentEncoding::Deflate)));
        for values in [&["compress"][..], &["gzip, br"], &["gzip", "br"], &["aws-chunked"]] {
            let error = of(values).unwrap_err();
            assert_eq!(error.status(), 415);
            assert!(error.to_string().contains(values[0]), "{error}");
        }
    }
}
