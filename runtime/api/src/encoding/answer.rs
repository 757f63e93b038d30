//! Compresses whole answers in the encoding that their caller prefers.

use std::io::{self, Write};

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::HeaderValue;
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, VARY};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body::Body as HttpBody;
use http_body_util::BodyExt;

use super::ContentEncoding;
use crate::Api;
use crate::error::ApiError;

/// The shortest answer that is compressed, in bytes: what fits into one packet of Ethernet arrives no sooner
/// when it is shorter.
const MIN_ANSWER_BYTES: u64 = 1460;
/// A longer answer is compressed away from the threads that serve connections: at 100 MB/s, which all three
/// reach at the levels below, this takes less than a millisecond.
const LARGE_ANSWER_BYTES: usize = 64 * 1024;
/// zstd's level: 300 MB/s and more.
const ZSTD_LEVEL: i32 = 1;
/// Brotli's quality, of 0 to 11.
const BROTLI_QUALITY: u32 = 2;
/// Brotli's window as a power of two: 256 KiB.
const BROTLI_WINDOW_LOG: u32 = 18;
const BROTLI_BUFFER_BYTES: usize = 4096;

/// Compresses the answer to a request that accepts one of our encodings, where the answer is complete JSON
/// above a length. A stream has no length and is passed on as it is.
pub(crate) async fn compress_answer(State(api): State<Api>, request: Request, next: Next) -> Response {
    let accepted = ContentEncoding::of_answer(request.headers());
    let mut response = next.run(request).await;
    if !is_long_json(&response) {
        return response;
    }
    response.headers_mut().append(VARY, HeaderValue::from_static("accept-encoding"));
    let Some(encoding) = accepted else { return response };
    let (mut head, body) = response.into_parts();
    let compressed = match body.collect().await {
        Ok(whole) => compressed(&api, encoding, whole.to_bytes()).await,
        Err(error) => Err(failed(&error)),
    };
    match compressed {
        Ok(bytes) => {
            head.headers.insert(CONTENT_ENCODING, encoding.header());
            head.headers.insert(CONTENT_LENGTH, HeaderValue::from(bytes.len()));
            Response::from_parts(head, Body::from(bytes))
        }
        Err(error) => error.into_response(),
    }
}

fn is_long_json(response: &Response) -> bool {
    let headers = response.headers();
    let json = headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
    let long = response.body().size_hint().exact().is_some_and(|bytes| bytes >= MIN_ANSWER_BYTES);
    json && long && !headers.contains_key(CONTENT_ENCODING)
}

async fn compressed(api: &Api, encoding: ContentEncoding, bytes: Bytes) -> Result<Vec<u8>, ApiError> {
    let compressed = if bytes.len() <= LARGE_ANSWER_BYTES {
        compress(encoding, &bytes)
    } else {
        api.large_bodies.run(move || compress(encoding, &bytes)).await?
    };
    compressed.map_err(|error| failed(&error))
}

fn failed(error: &dyn std::error::Error) -> ApiError {
    ApiError::Internal { message: format!("the answer could not be compressed: {error}") }
}

fn compress(encoding: ContentEncoding, bytes: &[u8]) -> io::Result<Vec<u8>> {
    match encoding {
        ContentEncoding::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes)?;
            encoder.finish()
        }
        ContentEncoding::Deflate => {
            let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes)?;
            encoder.finish()
        }
        ContentEncoding::Brotli => {
            let mut encoder = brotli::CompressorWriter::new(
                Vec::new(),
                BROTLI_BUFFER_BYTES,
                BROTLI_QUALITY,
                BROTLI_WINDOW_LOG,
            );
            encoder.write_all(bytes)?;
            Ok(encoder.into_inner())
        }
        ContentEncoding::Zstd => zstd::bulk::compress(bytes, ZSTD_LEVEL),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Fake, Script};
    use axum::http::header::ACCEPT_ENCODING;
    use std::io::Read;
    use tower::ServiceExt;

    fn decompressed(encoding: &str, bytes: &[u8]) -> String {
        let mut text = String::new();
        match encoding {
            "gzip" => flate2::read::GzDecoder::new(bytes).read_to_string(&mut text).unwrap(),
            "br" => brotli::Decompressor::new(bytes, 4096).read_to_string(&mut text).unwrap(),
            _ => zstd::stream::read::Decoder::new(bytes).unwrap().read_to_string(&mut text).unwrap(),
        };
        text
    }

    /// The answer to a request about a model with this text.
    async fn answer(path: &str, piece: &str, accepts: Option<&str>) -> (axum::http::HeaderMap, Bytes) {
        let fake = Fake::with(Script::tokens(&[piece]));
        let mut request = Request::post(path);
        if let Some(accepts) = accepts {
            request = request.header(ACCEPT_ENCODING, accepts);
        }
        let request = request.body(Body::from(r#"{"prompt":"a"}"#)).unwrap();
        let response = crate::http::router(fake.api()).oneshot(request).await.unwrap();
        let headers = response.headers().clone();
        (headers, response.into_body().collect().await.unwrap().to_bytes())
    }

    #[tokio::test]
    async fn a_long_answer_is_compressed_as_the_client_asks() {
        // The second one is compressed as a job.
        for length in [4000, 4 * LARGE_ANSWER_BYTES] {
            let long = "word ".repeat(length / 5);
            let (headers, plain) = answer("/v1/generate", &long, None).await;
            assert!(!headers.contains_key(CONTENT_ENCODING) && headers[VARY] == "accept-encoding");
            for encoding in ["gzip", "br", "zstd"] {
                let (headers, bytes) = answer("/v1/generate", &long, Some(encoding)).await;
                assert_eq!(headers[CONTENT_ENCODING], encoding);
                assert_eq!(headers[CONTENT_LENGTH], bytes.len().to_string().as_str());
                assert!(bytes.len() < plain.len() / 4, "{encoding}: {} bytes", bytes.len());
                let text: serde_json::Value = serde_json::from_str(&decompressed(encoding, &bytes)).unwrap();
                assert_eq!(text["text"], long, "{encoding}");
            }
        }
    }

    #[tokio::test]
    async fn short_answers_and_streams_are_not_compressed() {
        let long = "word ".repeat(1000);
        for (path, piece) in [("/v1/generate", "short"), ("/v1/generate/stream", long.as_str())] {
            let (headers, bytes) = answer(path, piece, Some("gzip, br, zstd")).await;
            assert!(!headers.contains_key(CONTENT_ENCODING), "{path}");
            assert!(String::from_utf8(bytes.to_vec()).unwrap().contains(piece), "{path}");
        }
    }
}
