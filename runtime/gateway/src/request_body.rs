//! Reads a request's body within bounds and finds the model's name in it.
//!
//! The body is buffered in full because a retry has to send it again. The bounds are the length of one body,
//! the bytes of all bodies and of one caller's bodies (`limits`), the time that a body may take, and a
//! minimum rate: without the last, stalled uploads could occupy a caller's whole share.

use std::borrow::Cow;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http::HeaderMap;
use http::header::CONTENT_ENCODING;
use http_body_util::BodyExt;
use prost::Message;
use serde::Deserialize;
use tokio::time::{Instant, timeout_at};
use trustformers_api::budget::Share;

use crate::error::{Echo, GatewayError};
use crate::limits::Resource;
use crate::metrics::Protocol;

/// A caller has this long to send a body.
pub(crate) const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// In each such interval a body has to end or to progress by [`PROGRESS_BYTES`].
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);
/// One TCP window of a slow connection. The longest body (4 MiB) needs 140 KiB/s to end in [`BODY_TIMEOUT`],
/// so this rate (3.2 KiB/s) refuses nothing that could still end in time.
const PROGRESS_BYTES: usize = 16 << 10;
/// After a refusal, this much of the body is read and discarded. Clients that send the whole body before they
/// look for an answer would see a broken connection instead. 16 of the longest accepted bodies (4 MiB each).
const DISCARD_BYTES: usize = 64 << 20;
/// Discarding ends after this time at the latest.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(10);
/// A gRPC message begins with a flag for compression and a length.
const FRAME_HEAD_BYTES: usize = 5;

/// A body in memory and its share of the bytes that bodies may take.
#[derive(Debug)]
pub(crate) struct BufferedBody {
    /// The body as the caller sent it.
    pub(crate) bytes: Bytes,
    /// Released when the body is no longer needed.
    pub(crate) _share: Share,
}

/// Reads a body to its end.
pub(crate) async fn read<B>(
    body: &mut B,
    limit_bytes: usize,
    share: Share,
) -> Result<BufferedBody, GatewayError>
where
    B: http_body::Body<Data = Bytes, Error = hyper::Error> + Unpin,
{
    // A length that is announced is refused before a byte of it is read.
    if body.size_hint().lower() > limit_bytes as u64 {
        return Err(GatewayError::TooLarge { limit_bytes });
    }
    let started = Instant::now();
    let mut buffer = Buffer { first: Bytes::new(), joined: BytesMut::new(), length: 0, share };
    let mut interval = Interval { ends: started + PROGRESS_INTERVAL, length_before: 0 };
    loop {
        let deadline = interval.ends.min(started + BODY_TIMEOUT);
        let frame = match timeout_at(deadline, body.frame()).await {
            Ok(frame) => frame,
            Err(_elapsed) if Instant::now() >= started + BODY_TIMEOUT => {
                return Err(GatewayError::BodyTimeout { limit: BODY_TIMEOUT });
            }
            Err(_elapsed) => {
                if buffer.length - interval.length_before < PROGRESS_BYTES {
                    return Err(GatewayError::BodyStalled);
                }
                interval = Interval { ends: interval.ends + PROGRESS_INTERVAL, length_before: buffer.length };
                continue;
            }
        };
        let Some(frame) = frame else { return Ok(buffer.finish()) };
        let Ok(data) = frame.map_err(GatewayError::BodyLost)?.into_data() else { continue };
        buffer.push(data, limit_bytes)?;
    }
}

/// One interval of the minimum rate.
struct Interval {
    ends: Instant,
    /// Length of the body when the interval began.
    length_before: usize,
}

/// Collects a body. Most bodies come in one piece, which is kept without copying.
struct Buffer {
    first: Bytes,
    joined: BytesMut,
    length: usize,
    share: Share,
}

impl Buffer {
    fn push(&mut self, data: Bytes, limit_bytes: usize) -> Result<(), GatewayError> {
        self.length += data.len();
        if self.length > limit_bytes {
            return Err(GatewayError::TooLarge { limit_bytes });
        }
        if !self.share.try_grow(data.len()) {
            return Err(GatewayError::Overloaded(Resource::BodyBytes));
        }
        if self.first.is_empty() && self.joined.is_empty() {
            self.first = data;
        } else {
            self.joined.extend_from_slice(&std::mem::take(&mut self.first));
            self.joined.extend_from_slice(&data);
        }
        Ok(())
    }

    fn finish(self) -> BufferedBody {
        let bytes = if self.joined.is_empty() { self.first } else { self.joined.freeze() };
        BufferedBody { bytes, _share: self.share }
    }
}

/// Reads and discards what a refused caller still sends, up to [`DISCARD_BYTES`] and [`DISCARD_TIMEOUT`].
pub(crate) async fn discard<B>(mut body: B)
where
    B: http_body::Body<Data = Bytes, Error = hyper::Error> + Unpin,
{
    let deadline = Instant::now() + DISCARD_TIMEOUT;
    let mut left_bytes = DISCARD_BYTES;
    while let Ok(Some(Ok(frame))) = timeout_at(deadline, body.frame()).await {
        let length = frame.data_ref().map_or(0, Bytes::len);
        match left_bytes.checked_sub(length) {
            Some(left) => left_bytes = left,
            None => return,
        }
    }
}

/// Refuses a body whose bytes are encoded, since the model's name can't be read in it.
pub(crate) fn check_encoding(headers: &HeaderMap) -> Result<(), GatewayError> {
    let encoded = |value: &&http::HeaderValue| !value.as_bytes().eq_ignore_ascii_case(b"identity");
    match headers.get_all(CONTENT_ENCODING).iter().find(encoded) {
        Some(value) => Err(GatewayError::Encoded(Echo::of_bytes(value.as_bytes()))),
        None => Ok(()),
    }
}

/// The model that a body names; empty where it names none.
pub(crate) fn model_name(
    protocol: Protocol,
    headers: &HeaderMap,
    body: &Bytes,
) -> Result<String, GatewayError> {
    match protocol {
        Protocol::Http => name_in_json(body),
        Protocol::Grpc => name_in_message(headers, body),
    }
}

/// Only the one field; the rest is checked for being JSON and skipped without being stored.
#[derive(Deserialize)]
struct NamedInJson<'a> {
    #[serde(default, borrow)]
    model: Option<Cow<'a, str>>,
}

fn name_in_json(body: &Bytes) -> Result<String, GatewayError> {
    // serde would read an array as the fields in their order, and quote a string in full in its error.
    if body.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b'{') {
        return Err(malformed("expected a JSON object"));
    }
    let named: NamedInJson<'_> =
        serde_json::from_slice(body).map_err(|error| malformed(&format!("as JSON: {error}")))?;
    Ok(named.model.unwrap_or_default().into_owned())
}

fn malformed(text: &str) -> GatewayError {
    GatewayError::Malformed(Echo::new(text))
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
        return Err(malformed("it holds no gRPC message"));
    }
    let flag = rest.get_u8();
    let length = rest.get_u32() as usize;
    match (flag, headers.get("grpc-encoding")) {
        (0, _) => {}
        (1, Some(encoding)) if encoding != "identity" => {
            return Err(GatewayError::Encoded(Echo::of_bytes(encoding.as_bytes())));
        }
        (1, _) => {
            return Err(malformed("its gRPC message is compressed, but grpc-encoding names no encoding"));
        }
        (flag, _) => {
            return Err(malformed(&format!("it begins with byte {flag}; a gRPC message begins with 0 or 1")));
        }
    }
    if rest.len() < length {
        let text = format!("its first gRPC message ends after {} of {length} bytes", rest.len());
        return Err(malformed(&text));
    }
    let named = NamedInMessage::decode(rest.slice(..length))
        .map_err(|error| malformed(&format!("as a gRPC message: {error}")))?;
    Ok(named.model)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use crate::limits::{Bounds, Limits};
    use bytes::BufMut;
    use futures::{StreamExt, stream};
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

    fn limits(body_bytes: usize) -> Arc<Limits> {
        Limits::new(Bounds { body_bytes, ..Bounds::default() })
    }

    fn share(limits: &Arc<Limits>, address: &str) -> Share {
        limits.of_caller(address.parse().unwrap()).reserve(Resource::BodyBytes, 0).unwrap()
    }

    #[test]
    fn the_name_is_found_in_json() {
        let named =
            Bytes::from_static(br#" {"prompt": "a \"model\": \"no\"", "model": "de\u0066", "n": [1]}"#);
        assert_eq!(name(Protocol::Http, &named).unwrap(), "def");
        for none in [r#"{"prompt": "x"}"#, r#"{"model": null}"#] {
            assert_eq!(name(Protocol::Http, &Bytes::from_static(none.as_bytes())).unwrap(), "");
        }
        for bad in ["", "{", "[\"a\"]", "\"a\"", r#"{"model": 3}"#, r#"{"model": "a", "model": "b"}"#] {
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
    }

    #[test]
    fn a_malformed_grpc_body_is_the_callers_mistake() {
        let message = framed(&GenerateRequest::default().encode_to_vec(), 0);
        let cut_off = framed(&[0; 100], 0).slice(..20);
        let not_utf8 = framed(&[0x2a, 2, 0xff, 0xfe], 0);
        for bad in [
            Bytes::new(),
            message.slice(..3),
            cut_off,
            not_utf8,
            framed(&[0xff, 0xff], 0),
            framed(b"", 1),
            framed(b"", 0x50),
            Bytes::from_static(b"POST / HTTP/1.1\r\n\r\n"),
        ] {
            let error = name(Protocol::Grpc, &bad).unwrap_err();
            assert_eq!((error.kind(), error.code()), ("invalid_request", tonic::Code::InvalidArgument));
        }
        let mut headers = HeaderMap::new();
        headers.insert("grpc-encoding", "zstd".parse().unwrap());
        let error = model_name(Protocol::Grpc, &headers, &framed(b"zip", 1)).unwrap_err();
        assert_eq!(error.kind(), "unsupported_encoding");
        assert!(error.to_string().contains("zstd"), "{error}");
    }

    #[test]
    fn the_field_is_where_the_wire_type_has_it() {
        let request = GenerateRequest { model: "x".to_owned(), ..Default::default() };
        let expected = NamedInMessage { model: "x".to_owned() }.encode_to_vec();
        assert_eq!(expected, request.encode_to_vec());
        let request = EmbedRequest { model: "x".to_owned(), ..Default::default() };
        assert_eq!(expected, request.encode_to_vec());
    }

    #[test]
    fn an_encoded_body_is_refused_by_name() {
        let mut headers = HeaderMap::new();
        headers.append(CONTENT_ENCODING, "Identity".parse().unwrap());
        check_encoding(&headers).unwrap();
        headers.append(CONTENT_ENCODING, "br".parse().unwrap());
        let error = check_encoding(&headers).unwrap_err();
        assert_eq!(error.kind(), "unsupported_encoding");
        assert!(error.to_string().contains("br"), "{error}");
    }

    #[tokio::test]
    async fn pieces_are_joined_up_to_the_limit() {
        let limits = limits(100);
        let body = read(&mut pieces(vec!["abc", "def", "g"]), 7, share(&limits, "192.0.2.1")).await.unwrap();
        assert_eq!(body.bytes, "abcdefg");
        assert_eq!(limits.used(Resource::BodyBytes), 7);
        drop(body);
        assert_eq!(limits.used(Resource::BodyBytes), 0);
        let mut long = pieces(vec!["abc", "def", "gh"]);
        let error = read(&mut long, 7, share(&limits, "192.0.2.1")).await.unwrap_err();
        assert_eq!(error.kind(), "too_long");
        assert_eq!(limits.used(Resource::BodyBytes), 0);
    }

    #[tokio::test]
    async fn bodies_of_one_caller_leave_room_for_others() {
        let limits = limits(12);
        let first = read(&mut pieces(vec!["abcdef"]), 10, share(&limits, "192.0.2.1")).await.unwrap();
        let error = read(&mut pieces(vec!["a"]), 10, share(&limits, "192.0.2.1")).await.unwrap_err();
        assert_eq!(error.kind(), "overloaded");
        assert!(read(&mut pieces(vec!["abc"]), 10, share(&limits, "192.0.2.2")).await.is_ok());
        drop(first);
        assert!(read(&mut pieces(vec!["a"]), 10, share(&limits, "192.0.2.1")).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_stalled_upload_ends_after_one_interval() {
        let limits = limits(1 << 20);
        let first = stream::iter([Ok(Frame::data(Bytes::from_static(b"{")))]);
        let mut body = StreamBody::new(first.chain(stream::pending::<Result<Frame<Bytes>, hyper::Error>>()));
        let started = Instant::now();
        let error = read(&mut body, 10, share(&limits, "192.0.2.1")).await.unwrap_err();
        assert_eq!((error.kind(), started.elapsed()), ("request_timeout", PROGRESS_INTERVAL));
    }

    #[tokio::test(start_paused = true)]
    async fn an_upload_that_progresses_ends_at_the_body_timeout() {
        let limits = limits(1 << 20);
        let endless = stream::unfold((), |()| async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            Some((Ok::<_, hyper::Error>(Frame::data(Bytes::from(vec![b' '; PROGRESS_BYTES]))), ()))
        });
        let mut body = StreamBody::new(Box::pin(endless));
        let started = Instant::now();
        let error = read(&mut body, 1 << 20, share(&limits, "192.0.2.1")).await.unwrap_err();
        assert_eq!((error.kind(), started.elapsed()), ("request_timeout", BODY_TIMEOUT));
    }

    #[tokio::test(start_paused = true)]
    async fn discarding_ends_at_its_bounds() {
        let piece = || Ok::<_, hyper::Error>(Frame::data(Bytes::from(vec![0; 1 << 20])));
        let mut sent = 0;
        let endless = stream::repeat_with(|| {
            sent += 1;
            piece()
        });
        discard(StreamBody::new(endless)).await;
        assert_eq!(sent, (DISCARD_BYTES >> 20) + 1);
        let started = Instant::now();
        discard(StreamBody::new(stream::pending::<Result<Frame<Bytes>, hyper::Error>>())).await;
        assert_eq!(started.elapsed(), DISCARD_TIMEOUT);
    }
}
