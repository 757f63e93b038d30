//! How a pod's answer ended, as the pod itself says.
//!
//! | answer | where its end is told |
//! |---|---|
//! | any, of our pods | HTTP trailers (`trustformers_api::answer_end`), which are taken out |
//! | gRPC | the trailers, or the head where there is nothing else |
//! | gRPC-Web | the last frame of the body |
//! | server-sent events of other servers | an event that is an error |
//!
//! A head of success says little: a stream that failed has one too.

use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue};
use memchr::memchr;
use tonic::Code;
use trustformers_api::answer_end::{COMPLETION_TOKENS_TRAILER, END_OK, END_TRAILER, PROMPT_TOKENS_TRAILER};

use crate::base64_stream::Base64Stream;
use crate::body::grpc_code;
use crate::wire::Wire;

/// The end of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AnswerEnd {
    /// How it ended.
    pub(crate) outcome: EndOutcome,
    /// What was counted, where the pod says it.
    pub(crate) usage: Option<EndUsage>,
}

/// How an answer ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum EndOutcome {
    /// It is complete, as far as its head did not say otherwise.
    Complete,
    /// It failed behind its head, with an error of this kind.
    Failed {
        /// The kind, as our pods name it.
        kind: String,
    },
    /// A gRPC answer with this status.
    Grpc(Code),
    /// A gRPC answer without a status: it was cut.
    NoStatus,
    /// The pod broke off.
    Reset,
}

/// The tokens of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EndUsage {
    /// Tokens of the prompts.
    pub(crate) prompt_tokens: u32,
    /// Tokens that were produced.
    pub(crate) completion_tokens: u32,
}

/// Looks for the end of an answer in what passes by.
#[derive(Debug)]
pub(crate) struct EndScan {
    place: EndPlace,
    /// What our pods' trailers say.
    told: Option<EndOutcome>,
    usage: Option<EndUsage>,
}

#[derive(Debug)]
enum EndPlace {
    /// Nothing in the answer tells its end.
    Nowhere,
    /// The head or the trailers.
    Trailers(Option<Code>),
    /// The last frame.
    WebFrame(WebFrames),
    /// An event.
    Events(EventLines),
}

impl EndScan {
    /// For an answer with this head.
    pub(crate) fn new(wire: Wire, headers: &HeaderMap) -> Self {
        let kind = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
        let place = match (wire, grpc_code(headers)) {
            (Wire::Http, _) if kind.starts_with(b"text/event-stream") => {
                EndPlace::Events(EventLines::default())
            }
            (Wire::Http, _) => EndPlace::Nowhere,
            (Wire::Grpc, code) | (_, code @ Some(_)) => EndPlace::Trailers(code),
            (Wire::GrpcWeb, None) => EndPlace::WebFrame(WebFrames::default()),
            (Wire::GrpcWebText, None) => {
                EndPlace::WebFrame(WebFrames { text: Some(Base64Stream::default()), ..WebFrames::default() })
            }
        };
        Self { place, told: None, usage: None }
    }

    /// Looks at the next bytes of the body.
    pub(crate) fn data(&mut self, bytes: &[u8]) {
        match &mut self.place {
            EndPlace::Nowhere | EndPlace::Trailers(_) => {}
            EndPlace::WebFrame(frames) => frames.push(bytes),
            EndPlace::Events(lines) => lines.push(bytes),
        }
    }

    /// Looks at the trailers, and takes out what is meant for the gateway alone.
    pub(crate) fn trailers(&mut self, trailers: &mut HeaderMap) {
        let number = |value: HeaderValue| value.to_str().ok()?.parse::<u32>().ok();
        let prompt = trailers.remove(PROMPT_TOKENS_TRAILER).and_then(number);
        let completion = trailers.remove(COMPLETION_TOKENS_TRAILER).and_then(number);
        if let (Some(prompt_tokens), Some(completion_tokens)) = (prompt, completion) {
            self.usage = Some(EndUsage { prompt_tokens, completion_tokens });
        }
        if let Some(end) = trailers.remove(END_TRAILER) {
            let kind = end.to_str().unwrap_or("unknown");
            self.told = Some(match kind {
                END_OK => EndOutcome::Complete,
                kind => EndOutcome::Failed { kind: kind.to_owned() },
            });
        }
        if let EndPlace::Trailers(code) = &mut self.place
            && let Some(told) = grpc_code(trailers)
        {
            *code = Some(told);
        }
    }

    /// The body has ended.
    pub(crate) fn end(self) -> AnswerEnd {
        let found = match self.place {
            EndPlace::Nowhere => None,
            // gRPC's own status says more than the kind of an error.
            EndPlace::Trailers(code) => {
                return AnswerEnd {
                    outcome: code.map_or(EndOutcome::NoStatus, EndOutcome::Grpc),
                    usage: self.usage,
                };
            }
            EndPlace::WebFrame(frames) => Some(frames.code().map_or(EndOutcome::NoStatus, EndOutcome::Grpc)),
            EndPlace::Events(lines) => {
                lines.failed.then(|| EndOutcome::Failed { kind: "error_event".to_owned() })
            }
        };
        let outcome = match (found, self.told) {
            (Some(found @ (EndOutcome::Grpc(_) | EndOutcome::NoStatus)), _) => found,
            (found, told) => told.or(found).unwrap_or(EndOutcome::Complete),
        };
        AnswerEnd { outcome, usage: self.usage }
    }

    /// Whether the caller still waits for a status of gRPC, which trailers can tell it.
    pub(crate) fn awaits_status(&self) -> bool {
        matches!(self.place, EndPlace::Trailers(None))
    }

    /// The pod broke off.
    pub(crate) fn reset(self) -> AnswerEnd {
        AnswerEnd { outcome: EndOutcome::Reset, usage: self.usage }
    }
}

/// A frame of gRPC-Web begins with a flag and a length.
const FRAME_HEAD_BYTES: usize = 5;
/// The flag of a frame that holds trailers.
const TRAILERS_FLAG: u8 = 0x80;
/// Bytes of trailers that are kept to find the status in; ours have a few hundred.
const MAX_TRAILERS_BYTES: usize = 8 << 10;

/// The frames of an answer of gRPC-Web.
#[derive(Debug, Default)]
struct WebFrames {
    text: Option<Base64Stream>,
    head: [u8; FRAME_HEAD_BYTES],
    head_bytes: usize,
    /// Bytes that are left of the frame.
    left: usize,
    /// What the frame of trailers holds.
    trailers: Vec<u8>,
}

impl WebFrames {
    fn push(&mut self, bytes: &[u8]) {
        match self.text.take() {
            Some(mut text) => {
                let mut decoded = Vec::with_capacity(bytes.len());
                // What is no base64 tells no end.
                let _decoded = text.decode(bytes, &mut decoded);
                self.frames(&decoded);
                self.text = Some(text);
            }
            None => self.frames(bytes),
        }
    }

    fn frames(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.left == 0 && self.head_bytes < FRAME_HEAD_BYTES {
                let length = bytes.len().min(FRAME_HEAD_BYTES - self.head_bytes);
                self.head[self.head_bytes..self.head_bytes + length].copy_from_slice(&bytes[..length]);
                self.head_bytes += length;
                bytes = &bytes[length..];
                if self.head_bytes == FRAME_HEAD_BYTES {
                    let [_, length @ ..] = self.head;
                    self.left = u32::from_be_bytes(length) as usize;
                }
            } else {
                let length = bytes.len().min(self.left);
                if self.head[0] & TRAILERS_FLAG != 0 {
                    let room = MAX_TRAILERS_BYTES.saturating_sub(self.trailers.len());
                    self.trailers.extend_from_slice(&bytes[..length.min(room)]);
                }
                self.left -= length;
                bytes = &bytes[length..];
            }
            if self.head_bytes == FRAME_HEAD_BYTES && self.left == 0 {
                self.head_bytes = 0;
            }
        }
    }

    fn code(&self) -> Option<Code> {
        let lines = self.trailers.split(|byte| *byte == b'\n');
        let mut status = lines.filter_map(|line| {
            let colon = memchr(b':', line)?;
            let (name, value) = (line[..colon].trim_ascii(), line[colon + 1..].trim_ascii());
            name.eq_ignore_ascii_case(b"grpc-status").then(|| Code::from_bytes(value))
        });
        status.next()
    }
}

/// How a line begins that tells an error, in each protocol's stream.
const ERROR_LINES: [&[u8]; 4] =
    [b"event: error", b"event: response.failed", b"data: {\"error\":", b"data: {\"type\":\"error\""];
/// The longest of them.
const MAX_ERROR_LINE_BYTES: usize = 22;

/// The lines of server-sent events, as far as they could tell an error.
#[derive(Debug, Default)]
struct EventLines {
    /// The beginning of the present line.
    line: Vec<u8>,
    failed: bool,
}

impl EventLines {
    fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && !self.failed {
            let end = memchr(b'\n', bytes);
            let line = &bytes[..end.unwrap_or(bytes.len())];
            let room = MAX_ERROR_LINE_BYTES.saturating_sub(self.line.len());
            if room > 0 {
                self.line.extend_from_slice(&line[..line.len().min(room)]);
                self.failed = ERROR_LINES.iter().any(|beginning| self.line.starts_with(beginning));
            }
            match end {
                Some(end) => {
                    self.line.clear();
                    bytes = &bytes[end + 1..];
                }
                None => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderName;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect()
    }

    fn end(wire: Wire, head: &[(&'static str, &'static str)], body: &[u8], piece: usize) -> EndOutcome {
        let mut scan = EndScan::new(wire, &headers(head));
        for piece in body.chunks(piece.max(1)) {
            scan.data(piece);
        }
        scan.end().outcome
    }

    #[test]
    fn an_error_event_is_found_in_each_protocol_however_it_is_cut() {
        let sse = [("content-type", "text/event-stream")];
        let failed = EndOutcome::Failed { kind: "error_event".to_owned() };
        for (text, outcome) in [
            ("data: {\"text\": \"a\"}\n\ndata: {\"error\":{\"type\":\"internal\"}}\n\n", &failed),
            ("event: error\ndata: {\"type\":\"error\",\"error\":{}}\n\n", &failed),
            ("data: {\"type\":\"error\"}\n\n", &failed),
            ("event: response.failed\ndata: {}\n\n", &failed),
            ("data: {\"text\": \"event: error\"}\n\n: ping\ndata: [DONE]\n\n", &EndOutcome::Complete),
            ("data: {\"errors\": 1}\n\n", &EndOutcome::Complete),
        ] {
            for piece in [1, 3, 1000] {
                assert_eq!(&end(Wire::Http, &sse, text.as_bytes(), piece), outcome, "{text}");
            }
        }
        let json = [("content-type", "application/json")];
        assert_eq!(end(Wire::Http, &json, b"data: {\"error\":1}", 100), EndOutcome::Complete);
    }

    #[test]
    fn the_longest_beginning_fits() {
        assert_eq!(ERROR_LINES.iter().map(|line| line.len()).max(), Some(MAX_ERROR_LINE_BYTES));
    }

    #[test]
    fn a_grpc_answer_tells_its_status_in_head_or_trailers() {
        assert_eq!(end(Wire::Grpc, &[], b"x", 1), EndOutcome::NoStatus);
        assert_eq!(end(Wire::Grpc, &[("grpc-status", "12")], b"", 1), EndOutcome::Grpc(Code::Unimplemented));
        let mut scan = EndScan::new(Wire::Grpc, &HeaderMap::new());
        let mut trailers = headers(&[
            ("grpc-status", "14"),
            ("x-trustformers-end", "unavailable"),
            ("x-trustformers-prompt-tokens", "7"),
            ("x-trustformers-completion-tokens", "2"),
        ]);
        scan.trailers(&mut trailers);
        assert_eq!(trailers, headers(&[("grpc-status", "14")]));
        let found = scan.end();
        assert_eq!(found.outcome, EndOutcome::Grpc(Code::Unavailable));
        assert_eq!(found.usage, Some(EndUsage { prompt_tokens: 7, completion_tokens: 2 }));
    }

    #[test]
    fn a_grpc_web_answer_tells_its_status_in_its_last_frame() {
        let trailers = b"grpc-status:8\r\ngrpc-message:full\r\n";
        let frame = |flag: u8, bytes: &[u8]| {
            [&[flag][..], &u32::try_from(bytes.len()).unwrap().to_be_bytes(), bytes].concat()
        };
        let body = [frame(0, b"grpc-status: 0 in a message"), frame(0, b""), frame(0x80, trailers)].concat();
        for piece in [1, 4, 1000] {
            let found = end(Wire::GrpcWeb, &[], &body, piece);
            assert_eq!(found, EndOutcome::Grpc(Code::ResourceExhausted));
        }
        assert_eq!(end(Wire::GrpcWeb, &[], &body[..20], 7), EndOutcome::NoStatus);
        // 80 00 00 00 0d and grpc-status:0.
        let text = b"gAAAAA1ncnBjLXN0YXR1czow";
        assert_eq!(end(Wire::GrpcWebText, &[], text, 5), EndOutcome::Grpc(Code::Ok));
    }

    #[test]
    fn the_trailers_of_our_pods_count_for_http() {
        let mut scan = EndScan::new(Wire::Http, &headers(&[("content-type", "text/event-stream")]));
        scan.trailers(&mut headers(&[("x-trustformers-end", "internal")]));
        assert_eq!(scan.end().outcome, EndOutcome::Failed { kind: "internal".to_owned() });
        let mut scan = EndScan::new(Wire::Http, &HeaderMap::new());
        scan.trailers(&mut headers(&[("x-trustformers-end", "ok")]));
        assert_eq!(scan.end(), AnswerEnd { outcome: EndOutcome::Complete, usage: None });
    }
}
