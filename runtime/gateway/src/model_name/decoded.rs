//! Looks for the model's name inside of what is compressed.
//!
//! Decoding runs as a job of its own, so that it takes no time of the threads that serve connections. It
//! stops at the name. What would decode to more than a body may have is refused before that is held anywhere.

use std::io::Read;

use bytes::Bytes;
use http::HeaderMap;

use super::json_scan::JsonScan;
use super::message_scan::FieldScan;
use super::{CompressedMessage, malformed};
use crate::error::{Echo, GatewayError};

/// Bytes that are decoded at a time.
const PIECE_BYTES: usize = 16 << 10;

/// The name in a JSON object whose encoding stands in the headers.
///
/// # Errors
/// The bytes are not what the headers say, or no name can be found in the first `limit_bytes` of what they
/// mean.
pub(crate) fn name_in_encoded_json(
    headers: &HeaderMap,
    encoded: &Bytes,
    limit_bytes: usize,
) -> Result<String, GatewayError> {
    let decoder = trustformers_api::encoding::decoder(headers, encoded);
    let Some(decoder) = decoder.map_err(|error| malformed(&error.to_string()))? else {
        let mut scan = JsonScan::default();
        scan.push(encoded)?;
        return scan.finish();
    };
    let mut scan = JsonScan::default();
    read_until(decoder, limit_bytes, |piece| {
        scan.push(piece)?;
        Ok(scan.is_found())
    })?;
    scan.finish()
}

/// The name in a message of gRPC.
///
/// # Errors
/// The encoding is not known, the bytes are not what it says, or no name can be found in the first
/// `limit_bytes` of what they mean.
pub(crate) fn name_in_encoded_message(
    message: &CompressedMessage,
    fields: &'static [u32],
    limit_bytes: usize,
) -> Result<String, GatewayError> {
    let CompressedMessage { bytes, encoding } = message;
    let decoder =
        trustformers_api::encoding::message_decoder(encoding, bytes).map_err(|error| broken(&error))?;
    let Some(decoder) = decoder else { return Err(GatewayError::Encoded(Echo::new(encoding))) };
    let mut scan = FieldScan::new(fields, None);
    read_until(decoder, limit_bytes, |piece| {
        scan.push(piece)?;
        Ok(scan.is_found())
    })?;
    scan.finish()
}

/// Reads piece by piece until `found` says so or nothing is left.
fn read_until(
    mut decoder: Box<dyn Read + '_>,
    limit_bytes: usize,
    mut found: impl FnMut(&[u8]) -> Result<bool, GatewayError>,
) -> Result<(), GatewayError> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut decoded_bytes = 0;
    loop {
        let length = decoder.read(&mut piece).map_err(|error| broken(&error))?;
        if length == 0 {
            return Ok(());
        }
        decoded_bytes += length;
        if decoded_bytes > limit_bytes {
            return Err(GatewayError::TooLarge { limit_bytes });
        }
        if found(&piece[..length])? {
            return Ok(());
        }
    }
}

fn broken(error: &std::io::Error) -> GatewayError {
    malformed(&format!("it is not what its encoding says ({error})"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use http::header::CONTENT_ENCODING;
    use prost::Message as _;
    use std::io::Write;
    use trustformers_proto::v1::GenerateRequest;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn encoded(name: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(CONTENT_ENCODING, http::HeaderValue::from_static(name))])
    }

    #[test]
    fn decoding_stops_at_the_name() {
        let text = format!(r#"{{"model": "m", "prompt": "{}"}}"#, "x".repeat(200_000));
        let whole = Bytes::from(gzip(text.as_bytes()));
        // Half of it is enough, and the limit is not reached.
        for bytes in [whole.clone(), whole.slice(..whole.len() / 2)] {
            assert_eq!(name_in_encoded_json(&encoded("gzip"), &bytes, 50_000).unwrap(), "m");
        }
        let late = format!(r#"{{"prompt": "{}", "model": "m"}}"#, "x".repeat(200_000));
        let whole = Bytes::from(gzip(late.as_bytes()));
        assert_eq!(name_in_encoded_json(&encoded("gzip"), &whole, 1 << 20).unwrap(), "m");
        let error = name_in_encoded_json(&encoded("gzip"), &whole, 50_000).unwrap_err();
        assert_eq!(error.kind(), "too_long");
    }

    #[test]
    fn what_is_not_what_its_encoding_says_is_refused() {
        for name in ["gzip", "deflate", "br", "zstd"] {
            let plain = Bytes::from_static(br#"{"prompt": "x"}"#);
            let error = name_in_encoded_json(&encoded(name), &plain, 1000).unwrap_err();
            assert_eq!(error.kind(), "invalid_request", "{name}");
        }
    }

    #[test]
    fn a_compressed_message_gives_its_name() {
        let request = GenerateRequest { prompt: "p".repeat(1000), model: "m".into(), ..Default::default() };
        let message = |encoding: &str| CompressedMessage {
            bytes: gzip(&request.encode_to_vec()),
            encoding: encoding.to_owned(),
        };
        assert_eq!(name_in_encoded_message(&message("gzip"), &[5], 1 << 20).unwrap(), "m");
        let error = name_in_encoded_message(&message("snappy"), &[5], 1 << 20).unwrap_err();
        assert_eq!(error.kind(), "unsupported_encoding");
        assert_eq!(name_in_encoded_message(&message("gzip"), &[5], 100).unwrap_err().kind(), "too_long");
        let none = CompressedMessage { bytes: gzip(&[]), encoding: "gzip".into() };
        assert_eq!(name_in_encoded_message(&none, &[5], 100).unwrap(), "");
    }
}
