//! Compressed bodies of HTTP requests: the first line of an input is the encoding, the rest is the body.

use crate::scripted::api;
use crate::{KIB, MIB, TIME, fuzz_made, split_line};
use axum::body::Body;
use axum::http::Request;
use http_body_util::BodyExt;
use std::io::Write;
use tower::ServiceExt;
use trustformers_fuzz::Bounds;

/// A body is at most 4 MiB once it is decoded, in a buffer that doubles: 12 MiB. A window of brotli has up to
/// 16 MiB, and a copy while it grows: 32 MiB. Parsed JSON takes up to 100 bytes for two of the body, twice:
/// 420 MiB.
const BOUNDS: Bounds = Bounds { input_bytes: 64 * KIB, heap_bytes: 464 * MIB, time: TIME };

const WORDS: [&str; 8] =
    ["gzip\n", "deflate\n", "br\n", "zstd\n", "x-gzip\n", "gzip, br\n", "identity\n", "\u{1f}\u{8b}\u{8}"];

/// One request in each encoding, and a body that decodes to more than is allowed.
fn seeds() -> Vec<Vec<u8>> {
    let request = br#"{"prompt": "hi", "max_tokens": 4, "stop": ["a"]}"#;
    let long = vec![b' '; 5 * MIB];
    let mut seeds = Vec::new();
    for body in [&request[..], &long] {
        let level = flate2::Compression::best();
        let mut gzip = flate2::write::GzEncoder::new(b"gzip\n".to_vec(), level);
        gzip.write_all(body).unwrap();
        seeds.push(gzip.finish().unwrap());
        let mut deflate = flate2::write::ZlibEncoder::new(b"deflate\n".to_vec(), level);
        deflate.write_all(body).unwrap();
        seeds.push(deflate.finish().unwrap());
        let mut brotli = b"br\n".to_vec();
        brotli::CompressorWriter::new(&mut brotli, 4096, 5, 22).write_all(body).unwrap();
        seeds.push(brotli);
        seeds.push([b"zstd\n", zstd::encode_all(body, 3).unwrap().as_slice()].concat());
    }
    seeds
}

#[test]
fn encoded() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let router = trustformers_api::http::router(api());
    fuzz_made("encoded", &seeds(), &WORDS, BOUNDS, |input| {
        let (encoding, body) = split_line(input);
        let request = Request::post("/v1/generate").header("content-encoding", encoding);
        let Ok(request) = request.body(Body::from(body.to_vec())) else { return "not a request".to_owned() };
        runtime.block_on(async {
            let response = router.clone().oneshot(request).await.unwrap();
            let status = response.status();
            let body = response.into_body().collect().await.unwrap().to_bytes();
            assert_ne!(status.as_u16(), 500, "{}", String::from_utf8_lossy(&body));
            format!("{} {}", status.canonical_reason().unwrap_or_default(), String::from_utf8_lossy(&body))
        })
    });
}
