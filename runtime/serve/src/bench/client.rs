//! One request over HTTP, timed: until its first token, between tokens, until its end.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio::time::Instant;
use trustformers_api::sse::{EventTooLong, SseReader};

use super::protocol::{Api, Piece};

/// A longer event is no answer of a model: the event of a token has some hundred bytes, the last one with its
/// counts some thousand.
const MAX_EVENT_BYTES: usize = 1 << 20;

/// A whole answer longer than this is refused: 256 embeddings of 4096 numbers of at most 24 characters are 25
/// MB.
const MAX_BODY_BYTES: usize = 32 << 20;

/// How a request failed, as a word for tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Failed {
    /// Its time came while too many others were in flight, and it was not sent.
    NotSent,
    /// No connection, or it broke before there was a head.
    Connection,
    /// It took longer than `--timeout-s`.
    Timeout,
    /// Status 429: the server is full.
    Overloaded,
    /// Another status of 400 to 499.
    Refused,
    /// Status of 500 or above.
    ServerError,
    /// The answer broke off, or an error came in the stream.
    Broken,
    /// A 2xx that is no answer in this protocol.
    NotUnderstood,
}

impl Failed {
    /// The word.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::NotSent => "not_sent",
            Self::Connection => "connection",
            Self::Timeout => "timeout",
            Self::Overloaded => "overloaded",
            Self::Refused => "refused",
            Self::ServerError => "server_error",
            Self::Broken => "broken",
            Self::NotUnderstood => "not_understood",
        }
    }
}

/// A complete answer; times count from the moment at which the request was due.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct TimedAnswer {
    /// Until the first token; none for embeddings.
    pub(super) first_token: Option<Duration>,
    /// From the first token to the last, divided by the tokens after the first; none below two tokens.
    pub(super) per_token: Option<Duration>,
    /// The longest wait between two tokens.
    pub(super) longest_gap: Option<Duration>,
    /// Until the end.
    pub(super) total: Duration,
    /// Tokens of the prompt or of all texts, as the server counts them; 0 where it does not.
    pub(super) prompt_tokens: u64,
    /// Tokens of the answer, as the server counts them, else the events that carried one.
    pub(super) output_tokens: u64,
}

/// A connection pool to one server.
#[derive(Debug, Clone)]
pub(super) struct Client {
    inner: HyperClient<HttpConnector, Full<Bytes>>,
    uri: Uri,
    api: Api,
    timeout: Duration,
}

impl Client {
    /// A client of the protocol's route at `uri`. Connections are kept for the next request unless each gets
    /// a fresh one.
    pub(super) fn new(uri: Uri, api: Api, timeout: Duration, fresh_connections: bool) -> Self {
        let kept = if fresh_connections { 0 } else { usize::MAX };
        let inner = HyperClient::builder(TokioExecutor::new()).pool_max_idle_per_host(kept).build_http();
        Self { inner, uri, api, timeout }
    }

    /// Asks for `texts` texts with this body and reads the answer to its end.
    pub(super) async fn ask(&self, body: Bytes, texts: usize, due: Instant) -> Result<TimedAnswer, Failed> {
        let asked = async {
            let response = self.send(body).await?;
            if self.api.streams() {
                self.stream(response, due).await
            } else {
                self.whole(response, texts, due).await
            }
        };
        tokio::time::timeout(self.timeout, asked).await.unwrap_or(Err(Failed::Timeout))
    }

    async fn send(&self, body: Bytes) -> Result<Response<Incoming>, Failed> {
        let request = Request::builder()
            .method(Method::POST)
            .uri(self.uri.clone())
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|_| Failed::Connection)?;
        let response = self.inner.request(request).await.map_err(|_| Failed::Connection)?;
        match response.status() {
            status if status.is_success() => Ok(response),
            StatusCode::TOO_MANY_REQUESTS => Err(Failed::Overloaded),
            status if status.is_server_error() => Err(Failed::ServerError),
            _ => Err(Failed::Refused),
        }
    }

    async fn stream(&self, response: Response<Incoming>, due: Instant) -> Result<TimedAnswer, Failed> {
        let mut body = response.into_body();
        let mut events = SseReader::new(MAX_EVENT_BYTES);
        let mut reading = Reading::default();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| Failed::Broken)?;
            let Some(bytes) = frame.data_ref() else { continue };
            let now = Instant::now();
            for data in events.push(bytes).map_err(|EventTooLong(_)| Failed::NotUnderstood)? {
                reading.note(self.api.piece(data.trim()).ok_or(reading.failure())?, now);
            }
        }
        reading.answer(due)
    }

    async fn whole(
        &self,
        response: Response<Incoming>,
        texts: usize,
        due: Instant,
    ) -> Result<TimedAnswer, Failed> {
        let body = http_body_util::Limited::new(response.into_body(), MAX_BODY_BYTES);
        let bytes = body.collect().await.map_err(|_| Failed::Broken)?.to_bytes();
        let total = due.elapsed();
        let prompt_tokens = self.api.whole(&bytes, texts).ok_or(Failed::NotUnderstood)?;
        Ok(TimedAnswer { total, prompt_tokens, ..TimedAnswer::default() })
    }
}

/// A stream as far as it was read.
#[derive(Debug, Default)]
struct Reading {
    first: Option<Instant>,
    last: Option<Instant>,
    longest_gap: Duration,
    tokens: u64,
    prompt_tokens: Option<u64>,
    output_tokens: Option<u64>,
    ended: bool,
}

impl Reading {
    fn note(&mut self, piece: Piece, now: Instant) {
        if piece.token {
            self.tokens += 1;
            self.first.get_or_insert(now);
            if let Some(last) = self.last.replace(now) {
                self.longest_gap = self.longest_gap.max(now - last);
            }
        }
        self.prompt_tokens = piece.prompt_tokens.or(self.prompt_tokens);
        self.output_tokens = piece.output_tokens.or(self.output_tokens);
        self.ended |= piece.end;
    }

    /// What an event that is none means: at the beginning another protocol, later an error on the way.
    fn failure(&self) -> Failed {
        if self.tokens == 0 { Failed::NotUnderstood } else { Failed::Broken }
    }

    fn answer(self, due: Instant) -> Result<TimedAnswer, Failed> {
        let (Some(first), Some(last), true) = (self.first, self.last, self.ended) else {
            return Err(self.failure());
        };
        let after_first = u32::try_from(self.tokens - 1).unwrap_or(u32::MAX);
        let several = after_first > 0;
        Ok(TimedAnswer {
            first_token: Some(first - due),
            per_token: several.then(|| (last - first) / after_first),
            longest_gap: several.then_some(self.longest_gap),
            total: due.elapsed(),
            prompt_tokens: self.prompt_tokens.unwrap_or(0),
            output_tokens: self.output_tokens.unwrap_or(self.tokens),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: Piece = Piece { token: true, end: false, prompt_tokens: None, output_tokens: None };

    #[tokio::test(start_paused = true)]
    async fn times_are_of_the_first_token_the_mean_gap_and_the_longest() {
        let due = Instant::now();
        let mut reading = Reading::default();
        for wait_ms in [50, 10, 30, 20] {
            tokio::time::advance(Duration::from_millis(wait_ms)).await;
            reading.note(TOKEN, Instant::now());
        }
        reading.note(Piece { end: true, output_tokens: Some(5), ..Piece::default() }, Instant::now());
        let ms = Duration::from_millis;
        let answer = reading.answer(due).unwrap();
        assert_eq!((answer.first_token, answer.per_token), (Some(ms(50)), Some(ms(20))));
        assert_eq!((answer.longest_gap, answer.total), (Some(ms(30)), ms(110)));
        assert_eq!((answer.prompt_tokens, answer.output_tokens), (0, 5), "the server's count wins");
    }

    #[test]
    fn a_stream_that_breaks_off_is_classified_by_its_tokens() {
        let mut reading = Reading::default();
        assert_eq!(reading.failure(), Failed::NotUnderstood);
        reading.note(TOKEN, Instant::now());
        assert_eq!(reading.answer(Instant::now()), Err(Failed::Broken));
    }
}
