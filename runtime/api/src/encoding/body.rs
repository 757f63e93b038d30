//! Compressed bodies of requests.

use std::io::{self, Read};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::HeaderValue;
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH};
use axum::middleware::Next;
use axum::response::Response;
use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};

use super::ContentEncoding;
use crate::budget::Share;
use crate::error::ApiError;
use crate::limits::{CallerLimits, too_many_request_bytes};
use crate::request_body::{read_encoded, too_long};
use crate::{Api, MAX_BODY_BYTES};

/// Bytes that are decoded before the budget is asked for them.
const PIECE_BYTES: usize = 32 * 1024;
/// The largest window of zstd, as a power of two: 8 MiB, the one that every decoder has by its standard. Its
/// own limit is 128 MiB.
const ZSTD_WINDOW_LOG: u32 = 23;

/// Decodes the body of a request where it is compressed, so that no route has to. The decoded bytes count
/// against the budget for bodies until the head of the answer.
///
/// # Errors
/// An encoding that is not supported; a body that is not what its encoding says, that is longer than
/// [`MAX_BODY_BYTES`] before or after it is decoded, or that finds no room.
pub(crate) async fn decode_body(
    State(api): State<Api>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let Some(encoding) = ContentEncoding::of_body(request.headers())? else {
        return Ok(next.run(request).await);
    };
    let limits = request.extensions().get::<CallerLimits>().cloned().unwrap_or_default();
    let (mut head, body) = request.into_parts();
    let compressed = read_encoded(&head, body).await?;
    let share = limits.request_bytes(0)?;
    // The share counts until the answer's head.
    let Decoded { bytes, share: _share } =
        api.large_bodies.run(move || decode(encoding, &compressed, share)).await??;
    head.headers.remove(CONTENT_ENCODING);
    head.headers.insert(CONTENT_LENGTH, HeaderValue::from(bytes.len()));
    Ok(next.run(Request::from_parts(head, Body::from(bytes))).await)
}

/// A decoded body and the bytes that it counts for.
struct Decoded {
    bytes: Vec<u8>,
    share: Share,
}

fn decode(encoding: ContentEncoding, compressed: &[u8], mut share: Share) -> Result<Decoded, ApiError> {
    let mut reader = reader(encoding, compressed).map_err(|error| broken(encoding, &error))?;
    let (mut bytes, mut piece) = (Vec::new(), vec![0; PIECE_BYTES]);
    loop {
        let length = reader.read(&mut piece).map_err(|error| broken(encoding, &error))?;
        if length == 0 {
            return Ok(Decoded { bytes, share });
        }
        if bytes.len() + length > MAX_BODY_BYTES {
            return Err(too_long());
        }
        if !share.try_grow(length) {
            return Err(too_many_request_bytes());
        }
        bytes.extend_from_slice(&piece[..length]);
    }
}

pub(super) fn reader(encoding: ContentEncoding, compressed: &[u8]) -> io::Result<Box<dyn Read + '_>> {
    if compressed.is_empty() {
        return Ok(Box::new(io::empty()));
    }
    Ok(match encoding {
        ContentEncoding::Gzip => Box::new(MultiGzDecoder::new(compressed)),
        ContentEncoding::Deflate if has_zlib_frame(compressed) => Box::new(ZlibDecoder::new(compressed)),
        ContentEncoding::Deflate => Box::new(DeflateDecoder::new(compressed)),
        ContentEncoding::Brotli => Box::new(brotli::Decompressor::new(compressed, PIECE_BYTES)),
        ContentEncoding::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::new(compressed)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG)?;
            Box::new(decoder)
        }
    })
}

/// Whether bytes begin as RFC 1950 says: method 8, and a check of the two bytes.
fn has_zlib_frame(bytes: &[u8]) -> bool {
    matches!(bytes, [first, second, ..]
        if first & 0x0f == 8 && u16::from_be_bytes([*first, *second]).is_multiple_of(31))
}

pub(super) fn broken(encoding: ContentEncoding, error: &io::Error) -> ApiError {
    let name = encoding.as_str();
    let message = format!("the body is not what content-encoding: {name} says ({error})");
    ApiError::InvalidRequest { field: None, message }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::{Caller, FairBudget};
    use crate::fake::{Fake, Script};
    use axum::http::StatusCode;
    use flate2::Compression;
    use http_body_util::BodyExt;
    use std::io::Write;
    use tower::ServiceExt;

    const ALL: [(ContentEncoding, &str); 5] = [
        (ContentEncoding::Gzip, "gzip"),
        (ContentEncoding::Gzip, "x-gzip"),
        (ContentEncoding::Deflate, "deflate"),
        (ContentEncoding::Brotli, "br"),
        (ContentEncoding::Zstd, "zstd"),
    ];

    fn encoded(encoding: ContentEncoding, bytes: &[u8]) -> Vec<u8> {
        match encoding {
            ContentEncoding::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Compression::best());
                encoder.write_all(bytes).unwrap();
                encoder.finish().unwrap()
            }
            ContentEncoding::Deflate => {
                let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), Compression::best());
                encoder.write_all(bytes).unwrap();
                encoder.finish().unwrap()
            }
            ContentEncoding::Brotli => {
                let mut encoded = Vec::new();
                brotli::CompressorWriter::new(&mut encoded, 4096, 9, 22).write_all(bytes).unwrap();
                encoded
            }
            ContentEncoding::Zstd => zstd::encode_all(bytes, 3).unwrap(),
        }
    }

    fn share(budget: usize) -> Share {
        FairBudget::new(budget).try_acquire(Caller::at([127, 0, 0, 1].into()), 0).unwrap()
    }

    async fn post(encoding: &str, body: Vec<u8>) -> (StatusCode, String, Fake) {
        let fake = Fake::with(Script::tokens(&["a"]));
        let request = Request::post("/v1/generate").header(CONTENT_ENCODING, encoding).body(Body::from(body));
        let response = crate::http::router(fake.api()).oneshot(request.unwrap()).await.unwrap();
        let status = response.status();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(bytes.to_vec()).unwrap(), fake)
    }

    #[tokio::test]
    async fn a_body_is_read_in_each_encoding() {
        for (encoding, name) in ALL {
            let body = encoded(encoding, br#"{"prompt": "Hi", "seed": 7}"#);
            let (status, answer, fake) = post(name, body).await;
            assert_eq!(status, StatusCode::OK, "{name}: {answer}");
            assert_eq!(fake.last_request().seed, Some(7), "{name}");
        }
        let mut raw = flate2::write::DeflateEncoder::new(Vec::new(), Compression::best());
        raw.write_all(br#"{"prompt": "Hi"}"#).unwrap();
        assert_eq!(post("deflate", raw.finish().unwrap()).await.0, StatusCode::OK);
    }

    #[tokio::test]
    async fn bodies_that_are_not_what_their_encoding_says_are_refused() {
        for (encoding, name) in ALL {
            let whole = encoded(encoding, br#"{"prompt": "Hi", "seed": 7}"#);
            for body in [b"{\"prompt\":\"Hi\"}".to_vec(), whole[..whole.len() / 2].to_vec(), Vec::new()] {
                let (status, answer, _) = post(name, body).await;
                assert_eq!(status, StatusCode::BAD_REQUEST, "{name}: {answer}");
            }
        }
        let (status, answer, _) = post("compress", b"x".to_vec()).await;
        assert_eq!(status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
        assert!(answer.contains("\\\"compress\\\"") && answer.contains("zstd"), "{answer}");
    }

    #[tokio::test]
    async fn the_bound_and_the_budget_apply_to_decoded_bytes() {
        let long = vec![b' '; MAX_BODY_BYTES + 1];
        for (encoding, name) in ALL {
            let bomb = encoded(encoding, &long);
            assert!(bomb.len() < MAX_BODY_BYTES / 100, "{name}: {} bytes", bomb.len());
            assert_eq!(post(name, bomb.clone()).await.0, StatusCode::PAYLOAD_TOO_LARGE, "{name}");
            let refused = decode(encoding, &bomb, share(1 << 20)).err().unwrap();
            assert!(matches!(refused, ApiError::Overloaded { .. }), "{name}: {refused:?}");
            let fits =
                decode(encoding, &encoded(encoding, &long[1..]), share(4 * MAX_BODY_BYTES)).ok().unwrap();
            assert_eq!(fits.bytes.len(), MAX_BODY_BYTES);
        }
    }

    #[test]
    fn a_window_beyond_the_standard_is_refused() {
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 3).unwrap();
        encoder.long_distance_matching(true).unwrap();
        encoder.window_log(27).unwrap();
        encoder.write_all(&vec![b'a'; 1 << 20]).unwrap();
        let error = decode(ContentEncoding::Zstd, &encoder.finish().unwrap(), share(1 << 30)).err().unwrap();
        assert_eq!(error.status(), 400, "{error}");
    }
}
