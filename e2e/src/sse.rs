//! Server-sent events, as far as the generate stream uses them: `data:` lines, ended by `[DONE]`.

use serde::Deserialize;
use trustformers_api::sse::SseReader;

/// One event of `/v1/generate/stream`.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A piece of text with its token; the last one has a finish reason and no token.
    Piece(Piece),
    /// The end marker.
    Done,
    /// Something that is no event of this stream.
    Malformed(String),
}

/// The JSON of one event.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Piece {
    /// Text that became final.
    #[serde(default)]
    pub text: String,
    /// The token's id.
    #[serde(default)]
    pub token: Option<u32>,
    /// Set in the last event alone.
    #[serde(default)]
    pub finish_reason: Option<String>,
}

/// A longer event is no event of this stream.
const MAX_EVENT_BYTES: usize = 1 << 20;

/// Reads a byte stream as events of the generate stream.
#[derive(Debug)]
pub struct Parser(SseReader);

impl Default for Parser {
    fn default() -> Self {
        Self(SseReader::new(MAX_EVENT_BYTES))
    }
}

impl Parser {
    /// Takes bytes and returns the events that they complete.
    pub fn take(&mut self, bytes: &[u8]) -> Vec<Event> {
        match self.0.push(bytes) {
            Ok(events) => events.iter().map(|data| event(data)).collect(),
            Err(error) => vec![Event::Malformed(error.to_string())],
        }
    }
}

fn event(data: &str) -> Event {
    if data == "[DONE]" {
        return Event::Done;
    }
    match serde_json::from_str::<Piece>(data) {
        Ok(piece) if piece.token.is_some() || piece.finish_reason.is_some() => Event::Piece(piece),
        _ => Event::Malformed(data.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_any_cut() {
        let text = "data: {\"text\":\"é\",\"token\":7}\n\n: ping\n\ndata: {\"finish_reason\":\"length\"}\n\ndata: [DONE]\n\n";
        let piece = |text: &str, token, reason: Option<&str>| {
            Event::Piece(Piece { text: text.to_owned(), token, finish_reason: reason.map(str::to_owned) })
        };
        let expected = [piece("é", Some(7), None), piece("", None, Some("length")), Event::Done];
        for cut in 0..text.len() {
            let mut parser = Parser::default();
            let mut events = parser.take(&text.as_bytes()[..cut]);
            events.extend(parser.take(&text.as_bytes()[cut..]));
            assert_eq!(events, expected, "cut at {cut}");
        }
    }

    #[test]
    fn an_error_inside_the_stream_is_no_piece() {
        let events = Parser::default().take(b"data: {\"error\":{\"message\":\"gone\"}}\n\n");
        assert!(matches!(&events[..], [Event::Malformed(text)] if text.contains("gone")), "{events:?}");
    }
}
