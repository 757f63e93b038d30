//! Reads a request's body within bounds until its model is known.
//!
//! A short body is read to its end, so that it can be sent again if a pod fails. Of a longer one no more is
//! read than it takes to find the model; its rest then flows from the caller to the pod. So does every stream
//! of messages.
//!
//! The bounds are the length of one body, the bytes of all bodies and of one caller's bodies (`limits`), the
//! time that a body may take, and a minimum rate: without the last, stalled uploads could occupy a caller's
//! whole share. A stream of messages has none of them but the first three, and those for its first message
//! only: it goes on for as long as both sides like, and the pod bounds its messages.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::stream;
use http::HeaderMap;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use tokio::time::{Instant, timeout_at};
use trustformers_api::BlockingWork;
use trustformers_api::budget::Share;
use trustformers_api::surfaces::Kind;

use crate::call::{CallBody, LiveSource};
use crate::error::GatewayError;
use crate::limits::Resource;
use crate::model_name::{NameFinder, NamePlace, name_in_encoded_json, name_in_encoded_message};

/// A caller has this long to send a body.
pub(crate) const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// In each such interval a body has to end or to progress by [`PROGRESS_BYTES`].
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);
/// One TCP window of a slow connection. The longest body (4 MiB) needs 140 KiB/s to end in [`BODY_TIMEOUT`],
/// so this rate (3.2 KiB/s) refuses nothing that could still end in time.
const PROGRESS_BYTES: usize = 16 << 10;
/// A longer body is not read to its end here: it is a prompt of some 64 Ki tokens, and of those that are
/// longer a pod that ends costs the caller another attempt, while each would hold megabytes here.
const WHOLE_BODY_BYTES: usize = 256 << 10;
/// After a refusal, this much of the body is read and discarded. Clients that send the whole body before they
/// look for an answer would see a broken connection instead. 16 of the longest accepted bodies (4 MiB each).
const DISCARD_BYTES: usize = 64 << 20;
/// Discarding ends after this time at the latest.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(10);

/// How a body is read.
#[derive(Debug)]
pub(crate) struct Reading<'a> {
    /// Where it names its model.
    pub(crate) place: NamePlace<'a>,
    /// The longest body.
    pub(crate) limit_bytes: usize,
    /// The share of the bytes that bodies may take.
    pub(crate) share: Share,
    /// Runs what decodes compressed bodies.
    pub(crate) decoding: &'a BlockingWork,
    /// Whether a rest that no pod reads is read and discarded, as callers over HTTP/1.1 need it.
    pub(crate) discards_rest: bool,
}

/// A body whose model is known.
#[derive(Debug)]
pub(crate) struct NamedBody {
    /// The body.
    pub(crate) body: CallBody,
    /// The model that it names; empty where it names none.
    pub(crate) model: String,
    /// What is held of it. Released when it is no longer needed.
    pub(crate) share: Share,
}

/// Reads a body until its model is known, and to its end if it is short. `body` is empty afterwards where its
/// rest flows on; where the reading fails, it holds what has not been read.
///
/// # Errors
/// A bound is reached, the body broke off, or no name can be found in it.
pub(crate) async fn read<B>(body: &mut Option<B>, reading: Reading<'_>) -> Result<NamedBody, GatewayError>
where
    B: http_body::Body<Data = Bytes, Error = hyper::Error> + Send + Unpin + 'static,
{
    let Reading { place, limit_bytes, share, decoding, discards_rest } = reading;
    let mut finder = NameFinder::new(place)?;
    let endless = place.surface.kind == Kind::Bidirectional;
    let mut buffer = Buffer { first: Bytes::new(), joined: BytesMut::new(), length: 0, share };
    let mut pace = Pace::new(limit_bytes);
    while let Some(incoming) = body.as_mut() {
        // A length that is announced is refused before a byte of it is read.
        if buffer.length as u64 + incoming.size_hint().lower() > limit_bytes as u64 {
            return Err(GatewayError::TooLarge { limit_bytes });
        }
        if finder.is_found() && flows(endless, &buffer, incoming) {
            let model = finder.found().unwrap_or_default();
            let Some(source) = body.take() else { break };
            let pace = (!endless).then_some(pace);
            let rest =
                UnreadBody { source: Discarded::new(source, discards_rest), pace, finder: finder.watching() };
            let NamedBytes { bytes, share } = buffer.finish();
            return Ok(NamedBody { body: CallBody::live(bytes, rest.into_source()), model, share });
        }
        let next = if endless && buffer.length == 0 {
            // A stream may be opened long before its first message.
            let data = next_data(incoming).await?;
            pace = Pace::new(limit_bytes);
            data
        } else {
            pace.next(incoming).await?
        };
        let Some(data) = next else { break };
        finder.push(&data)?;
        buffer.push(data)?;
        if let Some(message) = finder.take_compressed()? {
            let fields = finder.fields();
            let work = move || name_in_encoded_message(&message, fields, limit_bytes);
            finder.decompressed(decoding.run(work).await.map_err(|error| not_decoded(&error))??);
        }
    }
    let NamedBytes { bytes, share } = buffer.finish();
    let model = if finder.finds_early() {
        finder.finish()?
    } else {
        let (headers, bytes) = (encoding_of(place.headers), bytes.clone());
        let work = move || name_in_encoded_json(&headers, &bytes, limit_bytes);
        decoding.run(work).await.map_err(|error| not_decoded(&error))??
    };
    Ok(NamedBody { body: CallBody::Whole(bytes), model, share })
}

/// Whether the rest of a body whose name is found is left to flow.
fn flows<B: http_body::Body>(endless: bool, buffer: &Buffer, incoming: &B) -> bool {
    let known_bytes = buffer.length as u64 + incoming.size_hint().lower();
    (endless || known_bytes > WHOLE_BODY_BYTES as u64) && !incoming.is_end_stream()
}

/// The header that says how a body is encoded, for a job of its own.
fn encoding_of(headers: &HeaderMap) -> HeaderMap {
    let encodings = headers.get_all(http::header::CONTENT_ENCODING).iter();
    encodings.map(|value| (http::header::CONTENT_ENCODING, value.clone())).collect()
}

fn not_decoded(error: &trustformers_api::ApiError) -> GatewayError {
    GatewayError::Internal { message: error.message() }
}

/// The time and the rate of one body.
#[derive(Debug)]
struct Pace {
    started: Instant,
    /// When the present interval of the minimum rate ends.
    ends: Instant,
    /// Length of the body when the interval began.
    length_before: usize,
    length: usize,
    limit_bytes: usize,
}

impl Pace {
    fn new(limit_bytes: usize) -> Self {
        let started = Instant::now();
        Self { started, ends: started + PROGRESS_INTERVAL, length_before: 0, length: 0, limit_bytes }
    }

    /// The next bytes of a body; none at its end.
    async fn next<B>(&mut self, body: &mut B) -> Result<Option<Bytes>, GatewayError>
    where
        B: http_body::Body<Data = Bytes, Error = hyper::Error> + Unpin,
    {
        loop {
            let frame = match timeout_at(self.ends.min(self.started + BODY_TIMEOUT), body.frame()).await {
                Ok(frame) => frame,
                Err(_elapsed) if Instant::now() >= self.started + BODY_TIMEOUT => {
                    return Err(GatewayError::BodyTimeout { limit: BODY_TIMEOUT });
                }
                Err(_elapsed) => {
                    if self.length - self.length_before < PROGRESS_BYTES {
                        return Err(GatewayError::BodyStalled);
                    }
                    self.ends += PROGRESS_INTERVAL;
                    self.length_before = self.length;
                    continue;
                }
            };
            let Some(frame) = frame else { return Ok(None) };
            let Ok(data) = frame.map_err(GatewayError::BodyLost)?.into_data() else { continue };
            self.length += data.len();
            if self.length > self.limit_bytes {
                return Err(GatewayError::TooLarge { limit_bytes: self.limit_bytes });
            }
            return Ok(Some(data));
        }
    }
}

/// The rest of a body that flows.
struct UnreadBody<B: http_body::Body<Data = Bytes, Error = hyper::Error> + Send + Unpin + 'static> {
    source: Discarded<B>,
    /// None for a stream of messages.
    pace: Option<Pace>,
    finder: NameFinder,
}

impl<B> UnreadBody<B>
where
    B: http_body::Body<Data = Bytes, Error = hyper::Error> + Send + Unpin + 'static,
{
    async fn next(&mut self) -> Option<Result<Frame<Bytes>, GatewayError>> {
        let body = self.source.body.as_mut()?;
        let next = match &mut self.pace {
            Some(pace) => pace.next(body).await,
            None => next_data(body).await,
        };
        let data = match next {
            Ok(Some(data)) => data,
            Ok(None) => {
                self.source.body = None;
                return None;
            }
            Err(error) => {
                if !error.discards_body() {
                    self.source.body = None;
                }
                return Some(Err(error));
            }
        };
        Some(self.finder.push(&data).map(|()| Frame::data(data)))
    }

    fn into_source(self) -> LiveSource {
        let frames = stream::unfold(self, |mut rest| async move {
            let next = rest.next().await?;
            Some((next, rest))
        });
        Box::pin(StreamBody::new(frames))
    }
}

async fn next_data<B>(body: &mut B) -> Result<Option<Bytes>, GatewayError>
where
    B: http_body::Body<Data = Bytes, Error = hyper::Error> + Unpin,
{
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame.map_err(GatewayError::BodyLost)?.into_data() {
            return Ok(Some(data));
        }
    }
    Ok(None)
}

/// A body whose rest is discarded when nobody reads it any more, so that a caller over HTTP/1.1 sees the
/// answer and no broken connection. HTTP/2 resets the one stream, which callers understand.
struct Discarded<B: http_body::Body<Data = Bytes, Error = hyper::Error> + Send + Unpin + 'static> {
    /// None once it has ended.
    body: Option<B>,
    discards: bool,
}

impl<B> Discarded<B>
where
    B: http_body::Body<Data = Bytes, Error = hyper::Error> + Send + Unpin + 'static,
{
    fn new(body: B, discards: bool) -> Self {
        Self { body: Some(body), discards }
    }
}

impl<B> Drop for Discarded<B>
where
    B: http_body::Body<Data = Bytes, Error = hyper::Error> + Send + Unpin + 'static,
{
    fn drop(&mut self) {
        if let Some(body) = self.body.take()
            && self.discards
            && !body.is_end_stream()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(discard(body));
        }
    }
}

/// Collects a body. Most bodies come in one piece, which is kept without copying.
struct Buffer {
    first: Bytes,
    joined: BytesMut,
    length: usize,
    share: Share,
}

/// Bytes and their share.
struct NamedBytes {
    bytes: Bytes,
    share: Share,
}

impl Buffer {
    fn push(&mut self, data: Bytes) -> Result<(), GatewayError> {
        self.length += data.len();
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

    fn finish(self) -> NamedBytes {
        let bytes = if self.joined.is_empty() { self.first } else { self.joined.freeze() };
        NamedBytes { bytes, share: self.share }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use crate::limits::{Bounds, Limits};
    use crate::wire::Wire;
    use futures::StreamExt;
    use proptest::prelude::*;
    use trustformers_api::surfaces::{grpc_surface, http_surface};

    type Frames = stream::BoxStream<'static, Result<Frame<Bytes>, hyper::Error>>;
    type TestBody = StreamBody<Frames>;

    fn pieces(pieces: Vec<Bytes>) -> Option<TestBody> {
        let frames = pieces.into_iter().map(|piece| Ok(Frame::data(piece)));
        Some(StreamBody::new(stream::iter(frames.collect::<Vec<_>>()).boxed()))
    }

    fn texts(texts: &[&'static str]) -> Option<TestBody> {
        pieces(texts.iter().map(|text| Bytes::from_static(text.as_bytes())).collect())
    }

    fn limits(body_bytes: usize) -> Arc<Limits> {
        Limits::new(Bounds { body_bytes, ..Bounds::default() })
    }

    fn share(limits: &Arc<Limits>, address: &str) -> Share {
        limits.of_caller(address.parse().unwrap()).reserve(Resource::BodyBytes, 0).unwrap()
    }

    /// Reads a body of `path` as one caller.
    async fn read_as(
        path: &str,
        body: &mut Option<TestBody>,
        limit_bytes: usize,
        share: Share,
    ) -> Result<NamedBody, GatewayError> {
        let decoding = BlockingWork::new(1);
        let headers = HeaderMap::new();
        let (surface, wire) = match http_surface("POST", path) {
            Some(surface) => (surface, Wire::Http),
            None => (grpc_surface(path).unwrap(), Wire::Grpc),
        };
        let place = NamePlace { surface, wire, path, headers: &headers };
        let reading = Reading { place, limit_bytes, share, decoding: &decoding, discards_rest: false };
        read(body, reading).await
    }

    async fn read_json(body: &mut Option<TestBody>, limit: usize) -> Result<NamedBody, GatewayError> {
        read_as("/v1/generate", body, limit, share(&limits(1 << 30), "192.0.2.1")).await
    }

    async fn sent(body: &CallBody) -> Bytes {
        body.attempt().unwrap().collect().await.unwrap().to_bytes()
    }

    #[tokio::test]
    async fn a_short_body_is_read_whole_up_to_the_limit() {
        let limits = limits(100);
        let share = || share(&limits, "192.0.2.1");
        let mut body = texts(&[r#"{"mod"#, r#"el":"#, r#""a"}"#]);
        let read = read_as("/v1/generate", &mut body, 13, share()).await.unwrap();
        assert!(matches!(read.body, CallBody::Whole(_)) && read.model == "a");
        assert_eq!(sent(&read.body).await, r#"{"model":"a"}"#);
        assert_eq!(limits.used(Resource::BodyBytes), 13);
        drop(read);
        assert_eq!(limits.used(Resource::BodyBytes), 0);
        let mut long = texts(&[r#"{"model":"#, r#""a"  }"#]);
        let error = read_as("/v1/generate", &mut long, 13, share()).await.unwrap_err();
        assert_eq!(error.kind(), "too_long");
        assert_eq!(limits.used(Resource::BodyBytes), 0);
    }

    #[tokio::test]
    async fn a_long_body_flows_once_its_model_is_known() {
        let long = Bytes::from(vec![b'x'; WHOLE_BODY_BYTES]);
        let text = Bytes::from_static;
        let rest = vec![long.clone(), text(b"\"}")];
        let all = [vec![text(br#"{"model": "a", "prompt": ""#)], rest].concat();
        let mut body = pieces(all.clone());
        let read = read_json(&mut body, 1 << 20).await.unwrap();
        assert!(body.is_none() && read.model == "a");
        let CallBody::Live { first, .. } = &read.body else { panic!("{read:?}") };
        assert_eq!(first.len(), all[0].len() + long.len());
        assert_eq!(sent(&read.body).await, all.concat());
        // Where the name comes last, all of it has to be read.
        let all = vec![text(br#"{"prompt": ""#), long, text(br#"", "model": "b"}"#)];
        let mut body = pieces(all.clone());
        let read = read_json(&mut body, 1 << 20).await.unwrap();
        assert_eq!(read.model, "b");
        assert_eq!(sent(&read.body).await, all.concat());
    }

    #[tokio::test]
    async fn a_second_name_breaks_off_a_body_that_flows() {
        let long = Bytes::from(vec![b' '; WHOLE_BODY_BYTES]);
        let text = Bytes::from_static;
        let mut body = pieces(vec![text(br#"{"model": "a""#), long, text(br#", "model": "b"}"#)]);
        let read = read_json(&mut body, 1 << 20).await.unwrap();
        assert!(read.body.attempt().unwrap().collect().await.is_err());
        assert_eq!(read.body.take_failure().unwrap().kind(), "invalid_request");
    }

    #[tokio::test]
    async fn the_limit_holds_for_a_body_that_flows() {
        let long = || Bytes::from(vec![b' '; WHOLE_BODY_BYTES]);
        let mut body = pieces(vec![Bytes::from_static(br#"{"model": "a""#), long(), long()]);
        let read = read_json(&mut body, WHOLE_BODY_BYTES + 100).await.unwrap();
        assert!(read.body.attempt().unwrap().collect().await.is_err());
        assert_eq!(read.body.take_failure().unwrap().kind(), "too_long");
    }

    #[tokio::test]
    async fn a_stream_of_messages_flows_from_its_first_message_on() {
        // Field 2 holds a message whose field 5 is "m".
        let first = Bytes::from_static(&[0, 0, 0, 0, 5, 0x12, 3, 0x2a, 1, b'm']);
        let frames = stream::iter([Ok(Frame::data(first.clone()))]).chain(stream::pending()).boxed();
        let mut body = Some(StreamBody::new(frames));
        let path = "/trustformers.v1.InferenceService/Session";
        let read = read_as(path, &mut body, 100, share(&limits(100), "192.0.2.1")).await.unwrap();
        assert_eq!(read.model, "m");
        let mut attempt = read.body.attempt().unwrap();
        assert_eq!(attempt.frame().await.unwrap().unwrap().into_data().unwrap(), first);
    }

    #[tokio::test]
    async fn a_body_without_a_name_to_find_is_not_looked_into() {
        let mut body = texts(&["not JSON"]);
        let path = "/v2/models/ns/m/infer";
        let read = read_as(path, &mut body, 100, share(&limits(100), "192.0.2.1")).await.unwrap();
        assert_eq!((read.model.as_str(), &sent(&read.body).await[..]), ("ns/m", &b"not JSON"[..]));
    }

    #[tokio::test]
    async fn bodies_of_one_caller_leave_room_for_others() {
        let limits = limits(12);
        let read = async |text: &'static str, address: &str| {
            read_as("/v2/models/m/infer", &mut texts(&[text]), 10, share(&limits, address)).await
        };
        let first = read("abcdef", "192.0.2.1").await.unwrap();
        assert_eq!(read("a", "192.0.2.1").await.unwrap_err().kind(), "overloaded");
        assert!(read("abc", "192.0.2.2").await.is_ok());
        drop(first);
        assert!(read("a", "192.0.2.1").await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_stalled_upload_ends_after_one_interval() {
        let first = stream::iter([Ok(Frame::data(Bytes::from_static(b"{")))]);
        let mut body = Some(StreamBody::new(first.chain(stream::pending()).boxed()));
        let started = Instant::now();
        let error = read_json(&mut body, 10).await.unwrap_err();
        assert_eq!((error.kind(), started.elapsed()), ("request_timeout", PROGRESS_INTERVAL));
        assert!(body.is_some(), "what was not read is left to be discarded");
    }

    #[tokio::test(start_paused = true)]
    async fn an_upload_that_progresses_ends_at_the_body_timeout() {
        let endless = stream::unfold((), |()| async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            Some((Ok(Frame::data(Bytes::from(vec![b' '; PROGRESS_BYTES]))), ()))
        });
        let mut body = Some(StreamBody::new(endless.boxed()));
        let started = Instant::now();
        let error = read_json(&mut body, 1 << 20).await.unwrap_err();
        assert_eq!((error.kind(), started.elapsed()), ("request_timeout", BODY_TIMEOUT));
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_flows_has_the_same_times() {
        let first = Bytes::from(
            [&br#"{"model": "a", "prompt": ""#[..], vec![b'x'; WHOLE_BODY_BYTES].as_slice()].concat(),
        );
        let frames = stream::iter([Ok(Frame::data(first))]).chain(stream::pending());
        let mut body = Some(StreamBody::new(frames.boxed()));
        let read = read_json(&mut body, 1 << 20).await.unwrap();
        let started = Instant::now();
        assert!(read.body.attempt().unwrap().collect().await.is_err());
        assert_eq!(read.body.take_failure().unwrap().kind(), "request_timeout");
        // The first interval had progress.
        assert_eq!(started.elapsed(), 2 * PROGRESS_INTERVAL);
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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn what_is_sent_is_what_came_however_it_was_cut(
            length in 0_usize..(WHOLE_BODY_BYTES + (64 << 10)),
            at_the_end in any::<bool>(),
            cuts in prop::collection::vec(1_usize..100_000, 1..12),
        ) {
            let prompt = "x".repeat(length);
            let text = if at_the_end {
                format!(r#"{{"prompt": "{prompt}", "model": "m"}}"#)
            } else {
                format!(r#"{{"model": "m", "prompt": "{prompt}"}}"#)
            };
            let mut left = Bytes::from(text.clone());
            let mut cut = Vec::new();
            for length in cuts.into_iter().cycle() {
                if left.is_empty() {
                    break;
                }
                cut.push(left.split_to(length.min(left.len())));
            }
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let found = runtime.block_on(async {
                let read = read_json(&mut pieces(cut), 1 << 20).await.unwrap();
                (sent(&read.body).await, read.model)
            });
            prop_assert_eq!(found, (Bytes::from(text), "m".to_owned()));
        }
    }
}
