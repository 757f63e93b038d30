//! Server-sent events, as far as the generate stream uses them: `data:` lines, ended by `[DONE]`.

use serde::Deserialize;

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

/// Cuts a byte stream into events.
#[derive(Debug, Default)]
pub struct Parser {
    buffer: Vec<u8>,
}

impl Parser {
    /// Takes the bytes that came and returns the events that they complete.
    pub fn take(&mut self, bytes: &[u8]) -> Vec<Event> {
        self.buffer.extend_from_slice(bytes);
        let mut events = Vec::new();
        while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.buffer.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end();
            // Empty lines separate events; a line that begins with a colon is a comment that keeps the line
            // open.
            if line.is_empty() || line.starts_with(':') {
                continue;
            }
            events.push(event(line));
        }
        events
    }
}

fn event(line: &str) -> Event {
    let Some(data) = line.strip_prefix("data:").map(str::trim) else {
        return Event::Malformed(line.to_owned());
    };
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
