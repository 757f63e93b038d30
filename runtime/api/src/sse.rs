//! A reader of server-sent events, for clients: the bench, and the tests of servers.

/// Cuts a stream of bytes, however it arrives, into the data of its events.
#[derive(Debug)]
pub struct SseReader {
    buffer: Vec<u8>,
    /// Bytes of `buffer` in which no line end was found.
    searched: usize,
    /// The data lines of the event that is not complete yet.
    data: Option<String>,
    max_event_bytes: usize,
}

/// An event is longer than the reader accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an event is longer than {0} bytes")]
pub struct EventTooLong(
    /// The limit.
    pub usize,
);

impl SseReader {
    /// A reader that refuses events of more than `max_event_bytes`.
    #[must_use]
    pub fn new(max_event_bytes: usize) -> Self {
        Self { buffer: Vec::new(), searched: 0, data: None, max_event_bytes }
    }

    /// Takes bytes and gives the data of each event that they complete, in order. Comments and fields other
    /// than
    /// `data` are skipped, as the standard asks.
    ///
    /// # Errors
    /// [`EventTooLong`]; the reader is of no use afterwards.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<String>, EventTooLong> {
        self.buffer.extend_from_slice(bytes);
        let mut events = Vec::new();
        while let Some(line) = self.take_line() {
            if line.is_empty() {
                events.extend(self.data.take());
            } else if let Some(value) = field(&line, "data") {
                match &mut self.data {
                    None => self.data = Some(value.to_owned()),
                    Some(data) => {
                        data.push('\n');
                        data.push_str(value);
                    }
                }
            }
        }
        let pending = self.buffer.len() + self.data.as_ref().map_or(0, String::len);
        if pending > self.max_event_bytes { Err(EventTooLong(self.max_event_bytes)) } else { Ok(events) }
    }

    fn take_line(&mut self) -> Option<String> {
        let found = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n');
        let Some(end) = found.map(|at| at + self.searched) else {
            self.searched = self.buffer.len();
            return None;
        };
        self.searched = 0;
        let line: Vec<u8> = self.buffer.drain(..=end).collect();
        Some(String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned())
    }
}

/// The value of a line of this field, without the one blank that may follow the colon.
fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let value = line.strip_prefix(name)?.strip_prefix(':')?;
    Some(value.strip_prefix(' ').unwrap_or(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_any_cut() {
        let text = "data: \u{e9}\r\n\r\n: comment\nevent: x\n\ndata:b\ndata: c\n\ndata: rest";
        for cut in 0..text.len() {
            let mut reader = SseReader::new(100);
            let mut found = reader.push(&text.as_bytes()[..cut]).unwrap();
            found.extend(reader.push(&text.as_bytes()[cut..]).unwrap());
            assert_eq!(found, ["\u{e9}", "b\nc"], "cut at {cut}");
        }
    }

    #[test]
    fn an_event_without_end_is_refused() {
        assert_eq!(SseReader::new(10).push(b"data: 1234567890"), Err(EventTooLong(10)));
        let mut reader = SseReader::new(10);
        assert_eq!(reader.push(b"data: 12345\n"), Ok(Vec::new()));
        assert_eq!(reader.push(b"data: 678901\n"), Err(EventTooLong(10)));
    }
}
