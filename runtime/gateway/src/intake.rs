//! Takes a request's body in, within bounds, and finds the model's name in it.
//!
//! The body is held in full because it may have to be sent a second time. Prompts are small beside what a pod does
//! with them; what could hurt is many of them at once, so all bodies together have a bound as well.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http::HeaderMap;
use http::header::CONTENT_ENCODING;
use http_body_util::BodyExt;
use prost::Message;
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::GatewayError;
use crate::metrics::Protocol;

/// A caller has this long to send a body.
pub(crate) const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Bodies of all requests together: 64 of the longest (4 MiB each), or some hundred thousand ordinary prompts.
pub(crate) const ALL_BODIES_BYTES: usize = 256 << 20;
/// A gRPC message begins with a flag for compression and a length.
const FRAME_HEAD_BYTES: usize = 5;

/// A body and its share of the memory set aside for bodies.
#[derive(Debug)]
pub(crate) struct Taken {
    /// The body as it came.
    pub(crate) bytes: Bytes,
    /// Given back when the body is no longer needed.
    pub(crate) _share: OwnedSemaphorePermit,
}

/// Reads a body to its end.
pub(crate) async fn read<B>(
    body: B,
    limit_bytes: usize,
    budget: &Arc<Semaphore>,
) -> Result<Taken, GatewayError>
where
    B: http_body::Body<Data = Bytes, Error = hyper::Error> + Unpin,
{
    // A length that is announced is refused before a byte of it is read.
    if body.size_hint().lower() > limit_bytes as u64 {
        return Err(GatewayError::TooLarge { limit_bytes });
    }
    match tokio::time::timeout(BODY_TIMEOUT, collect(body, limit_bytes, budget)).await {
        Ok(taken) => taken,
        Err(_elapsed) => Err(GatewayError::BodyTimeout { limit: BODY_TIMEOUT }),
    }
}

async fn collect<B>(mut body: B, limit_bytes: usize, budget: &Arc<Semaphore>) -> Result<Taken, GatewayError>
where
    B: http_body::Body<Data = Bytes, Error = hyper::Error> + Unpin,
{
    let mut share = reserve(budget, 0)?;
    let mut first = Bytes::new();
    let mut joined = BytesMut::new();
    let mut length = 0;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(GatewayError::BodyLost)?.into_data() else { continue };
        length += data.len();
        if length > limit_bytes {
            return Err(GatewayError::TooLarge { limit_bytes });
        }
        share.merge(reserve(budget, data.len())?);
        // Most bodies come in one piece, which is then kept without copying.
        if first.is_empty() && joined.is_empty() {
            first = data;
        } else {
            joined.extend_from_slice(&std::mem::take(&mut first));
            joined.extend_from_slice(&data);
        }
    }
    let bytes = if joined.is_empty() { first } else { joined.freeze() };
    Ok(Taken { bytes, _share: share })
}

fn reserve(budget: &Arc<Semaphore>, bytes: usize) -> Result<OwnedSemaphorePermit, GatewayError> {
    let permits = u32::try_from(bytes).map_err(|_| GatewayError::Overloaded)?;
    Arc::clone(budget).try_acquire_many_owned(permits).map_err(|_| GatewayError::Overloaded)
}

/// The model that a body names; empty where it names none.
pub(crate) fn model_name(
    protocol: Protocol,
    headers: &HeaderMap,
    body: &Bytes,
) -> Result<String, GatewayError> {
    match protocol {
        Protocol::Http => name_in_json(headers, body),
        Protocol::Grpc => name_in_message(headers, body),
    }
}

/// Only the one field; the rest is checked for being JSON and skipped without being stored.
#[derive(Deserialize)]
struct NamedInJson<'a> {
    #[serde(default, borrow)]
    model: Option<Cow<'a, str>>,
}

fn name_in_json(headers: &HeaderMap, body: &Bytes) -> Result<String, GatewayError> {
    if let Some(encoding) = headers.get(CONTENT_ENCODING).filter(|encoding| *encoding != "identity") {
        return Err(GatewayError::Encoded(String::from_utf8_lossy(encoding.as_bytes()).into_owned()));
    }
    let named: NamedInJson<'_> =
        serde_json::from_slice(body).map_err(|error| GatewayError::Malformed(format!("as JSON: {error}")))?;
    Ok(named.model.unwrap_or_default().into_owned())
}

/// Field 5 of every request of the inference service; decoding skips the others.
#[derive(Clone, PartialEq, Message)]
struct NamedInMessage {
    #[prost(string, tag = "5")]
    model: String,
}

fn name_in_message(headers: &HeaderMap, body: &Bytes) -> Result<String, GatewayError> {
    let mut rest = body.clone();
    if rest.len() < FRAME_HEAD_BYTES {
        return Err(GatewayError::Malformed("it holds no gRPC message".to_owned()));
    }
    let compressed = rest.get_u8() != 0;
    let length = rest.get_u32() as usize;
    if compressed {
        let encoding = headers.get("grpc-encoding").map_or(&b"gzip"[..], |encoding| encoding.as_bytes());
        return Err(GatewayError::Encoded(String::from_utf8_lossy(encoding).into_owned()));
    }
    if rest.len() < length {
        let text = format!("its first gRPC message is cut off at {} of {length} bytes", rest.len());
        return Err(GatewayError::Malformed(text));
    }
    let named = NamedInMessage::decode(rest.slice(..length))
        .map_err(|error| GatewayError::Malformed(format!("as a gRPC message: {error}")))?;
    Ok(named.model)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BufMut;
    use futures::stream;
    use http_body::Frame;
    use http_body_util::StreamBody;
    use trustformers_proto::v1::{EmbedRequest, GenerateRequest};

    fn framed(message: &[u8], flag: u8) -> Bytes {
        let mut bytes = BytesMut::new();
        bytes.put_u8(flag);
        bytes.put_u32(u32::try_from(message.len()).unwrap());
        bytes.put_slice(message);
        bytes.freeze()
    }

    fn pieces(pieces: Vec<&'static str>) -> impl http_body::Body<Data = Bytes, Error = hyper::Error> + Unpin {
        let frames = pieces.into_iter().map(|piece| Ok(Frame::data(Bytes::from_static(piece.as_bytes()))));
        StreamBody::new(stream::iter(frames.collect::<Vec<_>>()))
    }

    fn name(protocol: Protocol, body: &Bytes) -> Result<String, GatewayError> {
        model_name(protocol, &HeaderMap::new(), body)
    }

    #[test]
    fn the_name_is_found_in_json() {
        let named =
            Bytes::from_static(br#"{"prompt": "a \"model\": \"no\"", "model": "de\u0066", "n": [1]}"#);
        assert_eq!(name(Protocol::Http, &named).unwrap(), "def");
        for none in [r#"{"prompt": "x"}"#, r#"{"model": null}"#] {
            assert_eq!(name(Protocol::Http, &Bytes::from_static(none.as_bytes())).unwrap(), "");
        }
        for bad in ["", "{", r#"{"model": 3}"#, r#"{"model": "a", "model": "b"}"#] {
            let error = name(Protocol::Http, &Bytes::from_static(bad.as_bytes())).unwrap_err();
            assert_eq!(error.kind(), "invalid_request", "{bad}");
        }
    }

    #[test]
    fn the_name_is_found_in_a_message() {
        let request = GenerateRequest {
            prompt: "p".repeat(1000),
            max_tokens: 3,
            temperature: 0.5,
            model: "default/a".to_owned(),
            seed: Some(1),
            ..Default::default()
        };
        let body = framed(&request.encode_to_vec(), 0);
        assert_eq!(name(Protocol::Grpc, &body).unwrap(), "default/a");
        assert_eq!(name(Protocol::Grpc, &framed(&[], 0)).unwrap(), "");
        assert_eq!(name(Protocol::Grpc, &body.slice(..20)).unwrap_err().kind(), "invalid_request");
        assert_eq!(name(Protocol::Grpc, &Bytes::new()).unwrap_err().kind(), "invalid_request");
        assert_eq!(name(Protocol::Grpc, &framed(b"zip", 1)).unwrap_err().kind(), "unsupported_encoding");
        assert_eq!(name(Protocol::Grpc, &framed(&[0xff, 0xff], 0)).unwrap_err().kind(), "invalid_request");
    }

    #[test]
    fn the_field_is_where_the_wire_type_has_it() {
        let request = GenerateRequest { model: "x".to_owned(), ..Default::default() };
        let wanted = NamedInMessage { model: "x".to_owned() }.encode_to_vec();
        assert_eq!(wanted, request.encode_to_vec());
        let request = EmbedRequest { model: "x".to_owned(), ..Default::default() };
        assert_eq!(wanted, request.encode_to_vec());
    }

    #[test]
    fn an_encoded_body_is_refused_by_name() {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_ENCODING, "br".parse().unwrap());
        let error = model_name(Protocol::Http, &headers, &Bytes::from_static(b"{}")).unwrap_err();
        assert!(error.to_string().contains("br"), "{error}");
    }

    #[tokio::test]
    async fn pieces_are_joined_up_to_the_limit() {
        let budget = Arc::new(Semaphore::new(100));
        let taken = read(pieces(vec!["abc", "def", "g"]), 7, &budget).await.unwrap();
        assert_eq!(taken.bytes, "abcdefg");
        assert_eq!(budget.available_permits(), 93);
        drop(taken);
        assert_eq!(budget.available_permits(), 100);
        let error = read(pieces(vec!["abc", "def", "gh"]), 7, &budget).await.unwrap_err();
        assert_eq!(error.kind(), "too_long");
        assert_eq!(budget.available_permits(), 100);
    }

    #[tokio::test]
    async fn all_bodies_together_have_a_bound() {
        let budget = Arc::new(Semaphore::new(10));
        let held = read(pieces(vec!["abcdef"]), 10, &budget).await.unwrap();
        assert_eq!(read(pieces(vec!["abcdef"]), 10, &budget).await.unwrap_err().kind(), "overloaded");
        drop(held);
        assert!(read(pieces(vec!["abcdef"]), 10, &budget).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_never_ends_is_given_up() {
        let budget = Arc::new(Semaphore::new(10));
        let endless = StreamBody::new(stream::pending::<Result<Frame<Bytes>, hyper::Error>>());
        assert_eq!(read(endless, 10, &budget).await.unwrap_err().kind(), "request_timeout");
    }
}
