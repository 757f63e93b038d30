//! The requests within a session, as far as the pod's messages show them.
//!
//! A WebSocket and a gRPC `Session` carry any number of requests over one connection. The connection is one
//! attempt; here each request within it is an attempt of its own too, from the pod's first message about it
//! to the last. So an error inside a session is counted at its revision. When a request came is not known
//! here, so that it has no latencies.

use std::collections::HashMap;
use std::sync::Arc;

use prost::Message;
use serde::Deserialize;
use trustformers_proto::control::v1::Outcome;
use trustformers_proto::v1::session_response::Event;
use trustformers_proto::v1::{FinishReason, SessionResponse};

use crate::answer_end::EndUsage;
use crate::attempt::Attempt;
use crate::metrics::RevisionMetrics;
use crate::outcome;

/// Requests of one session that run at a time. Pods allow 128; what is beyond is counted when it ends.
const MAX_RUNNING: usize = 128;
/// The longest message that is looked into. That of a token has some hundred bytes, the last of a request
/// some more.
pub(crate) const MAX_MESSAGE_BYTES: usize = 8 << 10;

/// What a message says of its request.
#[derive(Debug, PartialEq)]
enum SessionEvent {
    /// It runs.
    Token,
    /// It is answered, or its caller has cancelled it.
    Finished { outcome: Outcome, usage: Option<EndUsage> },
    /// It failed.
    Failed(Outcome),
}

/// The requests of one session.
#[derive(Debug)]
pub(crate) struct SessionAttempts {
    metrics: Arc<RevisionMetrics>,
    /// By the id that their caller gave them.
    running: HashMap<String, Attempt>,
}

impl SessionAttempts {
    /// A session with a pod of this revision.
    pub(crate) fn new(metrics: &Arc<RevisionMetrics>) -> Self {
        Self { metrics: Arc::clone(metrics), running: HashMap::new() }
    }

    /// The pod sent this text over a WebSocket.
    pub(crate) fn json_message(&mut self, text: &[u8]) {
        if let Some((id, event)) = read_json(text) {
            self.count(id, &event);
        }
    }

    fn count(&mut self, id: String, event: &SessionEvent) {
        let (outcome, usage) = match event {
            SessionEvent::Token => {
                if self.running.len() < MAX_RUNNING {
                    self.running.entry(id).or_insert_with(|| Attempt::begin(&self.metrics));
                }
                return;
            }
            SessionEvent::Finished { outcome, usage } => (*outcome, *usage),
            SessionEvent::Failed(outcome) => (*outcome, None),
        };
        let attempt = self.running.remove(&id).unwrap_or_else(|| Attempt::begin(&self.metrics));
        attempt.end(outcome, usage);
    }

    /// The pod broke off. Without this call what runs was given up by the caller.
    pub(crate) fn reset(self) {
        for attempt in self.running.into_values() {
            attempt.end(Outcome::ResetInStream, None);
        }
    }
}

/// A message of a WebSocket, as far as it is read.
#[derive(Deserialize)]
struct JsonMessage {
    id: String,
    #[serde(rename = "type")]
    kind: String,
    finish_reason: Option<String>,
    usage: Option<JsonUsage>,
    error: Option<JsonError>,
}

#[derive(Deserialize)]
struct JsonUsage {
    prompt_tokens: u32,
    completion_tokens: u32,
}

#[derive(Deserialize)]
struct JsonError {
    #[serde(rename = "type")]
    kind: String,
}

/// None of a message that belongs to no request, or that is none of ours.
fn read_json(text: &[u8]) -> Option<(String, SessionEvent)> {
    let message: JsonMessage = serde_json::from_slice(text).ok()?;
    let event = match message.kind.as_str() {
        "token" => SessionEvent::Token,
        "finished" => {
            let cancelled = message.finish_reason.as_deref() == Some("cancelled");
            let usage = message.usage.map(|usage| EndUsage {
                prompt_tokens: usage.prompt_tokens,
                completion_tokens: usage.completion_tokens,
            });
            SessionEvent::Finished { outcome: finished(cancelled), usage }
        }
        "error" => SessionEvent::Failed(outcome::of_kind(&message.error?.kind)),
        _ => return None,
    };
    Some((message.id, event))
}

fn read_protobuf(bytes: &[u8]) -> Option<(String, SessionEvent)> {
    let message = SessionResponse::decode(bytes).ok()?;
    let event = match message.event? {
        Event::Answer(answer) => match answer.finish_reason() {
            FinishReason::Unspecified => SessionEvent::Token,
            reason => {
                let usage = answer.usage.map(|usage| EndUsage {
                    prompt_tokens: usage.prompt_tokens,
                    completion_tokens: usage.completion_tokens,
                });
                SessionEvent::Finished { outcome: finished(reason == FinishReason::Cancelled), usage }
            }
        },
        Event::Error(error) => SessionEvent::Failed(outcome::of_kind(&error.kind)),
    };
    Some((message.request_id, event))
}

fn finished(cancelled: bool) -> Outcome {
    if cancelled { Outcome::Cancelled } else { Outcome::Ok }
}

/// The head of a message of gRPC: a flag and a length.
const HEAD_BYTES: usize = 5;

/// Reads a gRPC `Session` as it passes.
#[derive(Debug)]
pub(crate) struct GrpcSession {
    attempts: SessionAttempts,
    head: Vec<u8>,
    /// Bytes that are left of the message.
    left: usize,
    /// What came of it, where it is looked into.
    message: Vec<u8>,
    is_read: bool,
}

impl GrpcSession {
    /// A session with a pod of this revision.
    pub(crate) fn new(metrics: &Arc<RevisionMetrics>) -> Self {
        let attempts = SessionAttempts::new(metrics);
        Self { attempts, head: Vec::new(), left: 0, message: Vec::new(), is_read: false }
    }

    /// The pod sent these bytes.
    pub(crate) fn data(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let is_head = self.head.len() < HEAD_BYTES;
            let wanted = if is_head { HEAD_BYTES - self.head.len() } else { self.left };
            let (now, rest) = bytes.split_at(wanted.min(bytes.len()));
            bytes = rest;
            if is_head {
                self.head.extend_from_slice(now);
                if let [flag, length @ ..] = &self.head[..]
                    && let Ok(length) = <[u8; 4]>::try_from(length)
                {
                    self.left = u32::from_be_bytes(length) as usize;
                    // A compressed message is not looked into.
                    self.is_read = *flag == 0 && self.left <= MAX_MESSAGE_BYTES;
                }
            } else {
                if self.is_read {
                    self.message.extend_from_slice(now);
                }
                self.left -= now.len();
            }
            if self.head.len() == HEAD_BYTES && self.left == 0 {
                if self.is_read
                    && let Some((id, event)) = read_protobuf(&self.message)
                {
                    self.attempts.count(id, &event);
                }
                self.head.clear();
                self.message.clear();
            }
        }
    }

    /// The pod broke off.
    pub(crate) fn reset(self) {
        self.attempts.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;
    use crate::table::Version;
    use prometheus::Registry;
    use trustformers_proto::v1::{GenerateStreamResponse, SessionError, Usage};

    struct Counted {
        metrics: Metrics,
        revision: Arc<RevisionMetrics>,
    }

    impl Counted {
        fn new() -> Self {
            let metrics = Metrics::new(Registry::new()).unwrap();
            let version = Version { term: 1, counter: 1 };
            let series = metrics.in_force(version, [("d/a", "r1")].into_iter());
            let revision = Arc::clone(&series[&("d/a".to_owned(), "r1".to_owned())]);
            Self { metrics, revision }
        }

        /// Attempts, and how those that ended did.
        fn all(&self) -> (u64, Vec<(Outcome, u64)>) {
            self.metrics.report_all();
            let counts = self.metrics.changed_counts(usize::MAX).counts.remove(0);
            let outcomes = counts.outcomes.iter().map(|counted| (counted.outcome(), counted.count));
            (counts.attempts, outcomes.collect())
        }
    }

    fn message(id: &str, event: Event) -> Vec<u8> {
        let message = SessionResponse { request_id: id.to_owned(), event: Some(event) }.encode_to_vec();
        [&[0][..], &u32::try_from(message.len()).unwrap().to_be_bytes(), &message].concat()
    }

    fn answer(reason: FinishReason) -> Event {
        let usage = (reason != FinishReason::Unspecified).then_some(Usage {
            prompt_tokens: 3,
            completion_tokens: 2,
            total_tokens: 5,
        });
        Event::Answer(GenerateStreamResponse {
            finish_reason: reason.into(),
            usage,
            ..GenerateStreamResponse::default()
        })
    }

    #[test]
    fn each_request_of_a_grpc_session_is_counted_however_its_messages_are_cut() {
        let failed = Event::Error(SessionError { kind: "internal".to_owned(), ..SessionError::default() });
        let refused =
            Event::Error(SessionError { kind: "invalid_request".to_owned(), ..SessionError::default() });
        let mut compressed = message("z", answer(FinishReason::Stop));
        compressed[0] = 1;
        let all = [
            message("a", answer(FinishReason::Unspecified)),
            message("b", answer(FinishReason::Unspecified)),
            compressed,
            message("a", answer(FinishReason::Stop)),
            message("b", failed),
            message("c", answer(FinishReason::Cancelled)),
            message("d", refused),
            message("a", answer(FinishReason::Unspecified)),
        ]
        .concat();
        for piece in [1, 4, 7, all.len()] {
            let counted = Counted::new();
            let mut session = GrpcSession::new(&counted.revision);
            for piece in all.chunks(piece) {
                session.data(piece);
            }
            let ended = [
                (Outcome::Ok, 1),
                (Outcome::PodError, 1),
                (Outcome::Cancelled, 1),
                (Outcome::CallerError, 1),
            ];
            assert_eq!(counted.all(), (5, ended.to_vec()), "{piece}");
            session.reset();
            assert!(counted.all().1.contains(&(Outcome::ResetInStream, 1)), "{piece}");
        }
    }

    #[test]
    fn each_request_of_a_websocket_is_counted_and_those_that_run_end_with_it() {
        let counted = Counted::new();
        let mut session = SessionAttempts::new(&counted.revision);
        for text in [
            r#"{"id": "a", "type": "token", "text": "x", "token": 1}"#,
            r#"{"id": "a", "type": "finished", "finish_reason": "stop", "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}"#,
            r#"{"id": "b", "type": "error", "error": {"type": "unavailable", "message": "m"}}"#,
            r#"{"id": null, "type": "error", "error": {"type": "invalid_request", "message": "m"}}"#,
            r#"{"id": "c", "type": "token", "chunk": {}}"#,
            "no message of ours",
        ] {
            session.json_message(text.as_bytes());
        }
        assert_eq!(counted.all(), (3, vec![(Outcome::Ok, 1), (Outcome::Unavailable, 1)]));
        drop(session);
        let ended = vec![(Outcome::Ok, 1), (Outcome::Unavailable, 1), (Outcome::Cancelled, 1)];
        assert_eq!(counted.all(), (3, ended));
    }
}
