//! The frames of WebSocket (RFC 6455, section 5), as far as a proxy has to know them.

use crate::session::MAX_MESSAGE_BYTES;

/// A message goes on in the next frame of this kind.
pub(crate) const CONTINUATION: u8 = 0x0;
/// Text.
pub(crate) const TEXT: u8 = 0x1;
/// Bytes.
pub(crate) const BINARY: u8 = 0x2;
/// The end of the connection.
pub(crate) const CLOSE: u8 = 0x8;
/// A question whether the other side is there.
pub(crate) const PING: u8 = 0x9;
/// Its answer.
pub(crate) const PONG: u8 = 0xa;
/// The longest payload of a frame that is no part of a message.
const MAX_CONTROL_BYTES: usize = 125;
/// The longest head of a frame: two bytes, a length of eight, a mask of four.
const MAX_HEAD_BYTES: usize = 14;

/// Bytes that are no frame of WebSocket, or none that its side may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ProtocolViolation;

/// The head of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FrameHead {
    /// Whether its message ends with it.
    pub(crate) is_last: bool,
    /// What kind it is.
    pub(crate) opcode: u8,
    /// What its payload is masked with.
    pub(crate) mask: Option<[u8; 4]>,
    /// Bytes of its payload.
    pub(crate) payload_bytes: u64,
    /// Bytes of the head.
    pub(crate) head_bytes: usize,
}

impl FrameHead {
    /// The head at the beginning of these bytes; none where they end within it.
    ///
    /// # Errors
    /// No extension was agreed on, and these bytes need one; a frame apart from messages that is in parts or
    /// too long.
    pub(crate) fn read(bytes: &[u8]) -> Result<Option<Self>, ProtocolViolation> {
        let [first, second, rest @ ..] = bytes else { return Ok(None) };
        let (opcode, is_last) = (first & 0x0f, first & 0x80 != 0);
        let known = matches!(opcode, CONTINUATION | TEXT | BINARY | CLOSE | PING | PONG);
        if first & 0x70 != 0 || !known {
            return Err(ProtocolViolation);
        }
        let (payload_bytes, rest) = match second & 0x7f {
            126 => {
                let Some((length, rest)) = rest.split_first_chunk() else { return Ok(None) };
                (u64::from(u16::from_be_bytes(*length)), rest)
            }
            127 => {
                let Some((length, rest)) = rest.split_first_chunk() else { return Ok(None) };
                (u64::from_be_bytes(*length), rest)
            }
            short => (u64::from(short), rest),
        };
        let is_control = opcode >= CLOSE;
        if is_control && (!is_last || payload_bytes > MAX_CONTROL_BYTES as u64) {
            return Err(ProtocolViolation);
        }
        let (mask, rest) = if second & 0x80 == 0 {
            (None, rest)
        } else {
            let Some((mask, rest)) = rest.split_first_chunk() else { return Ok(None) };
            (Some(*mask), rest)
        };
        Ok(Some(Self { is_last, opcode, mask, payload_bytes, head_bytes: bytes.len() - rest.len() }))
    }
}

/// Takes the mask off a payload, or puts it on. `at` is where in the payload the bytes stand.
pub(crate) fn unmask(mask: [u8; 4], at: usize, bytes: &mut [u8]) {
    for (offset, byte) in bytes.iter_mut().enumerate() {
        *byte ^= mask[(at + offset) % mask.len()];
    }
}

/// A frame that a server sends. It holds a whole message.
pub(crate) fn server_frame(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(payload.len() + MAX_HEAD_BYTES);
    frame.push(0x80 | opcode);
    match payload.len() {
        short @ 0..=125 => frame.push(short as u8),
        middle @ 126..=0xffff => {
            frame.push(126);
            frame.extend_from_slice(&(middle as u16).to_be_bytes());
        }
        long => {
            frame.push(127);
            frame.extend_from_slice(&(long as u64).to_be_bytes());
        }
    }
    frame.extend_from_slice(payload);
    frame
}

/// The frame with which a server ends a connection.
pub(crate) fn close_frame(code: u16, reason: &str) -> Vec<u8> {
    let mut payload = code.to_be_bytes().to_vec();
    let room = MAX_CONTROL_BYTES - payload.len();
    // Reasons are our own words, in ASCII.
    payload.extend_from_slice(&reason.as_bytes()[..reason.len().min(room)]);
    server_frame(CLOSE, &payload)
}

/// Follows the frames that a server sends, to know its messages, where a frame ends, and whether the
/// connection was closed.
#[derive(Debug, Default)]
pub(crate) struct ServerFrames {
    /// The beginning of a head that is not complete.
    head: Vec<u8>,
    /// Bytes that are left of the payload.
    left: u64,
    /// Whether the frame belongs to a message, and is its last.
    of_message: bool,
    is_last: bool,
    /// What came of the message.
    message: Vec<u8>,
    /// Whether it is longer than what is looked into.
    is_long: bool,
    closed: bool,
    violated: bool,
}

impl ServerFrames {
    /// Takes the next bytes that the server sends. Gives each message that ends in them and that is not too
    /// long.
    pub(crate) fn push(&mut self, mut bytes: &[u8], mut found: impl FnMut(&[u8])) {
        while !bytes.is_empty() && !self.violated {
            if self.left > 0 {
                let length = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
                let (payload, rest) = bytes.split_at(length);
                self.left -= length as u64;
                bytes = rest;
                self.payload(payload, &mut found);
                continue;
            }
            let before = self.head.len();
            let room = (MAX_HEAD_BYTES - before).min(bytes.len());
            self.head.extend_from_slice(&bytes[..room]);
            match FrameHead::read(&self.head) {
                Ok(None) => bytes = &bytes[room..],
                Ok(Some(head)) => {
                    bytes = &bytes[head.head_bytes - before..];
                    self.head.clear();
                    self.closed |= head.opcode == CLOSE;
                    self.left = head.payload_bytes;
                    (self.of_message, self.is_last) = (head.opcode < CLOSE, head.is_last);
                    self.payload(b"", &mut found);
                }
                Err(ProtocolViolation) => self.violated = true,
            }
        }
    }

    fn payload(&mut self, payload: &[u8], found: &mut impl FnMut(&[u8])) {
        if !self.of_message {
            return;
        }
        self.is_long |= self.message.len() + payload.len() > MAX_MESSAGE_BYTES;
        if !self.is_long {
            self.message.extend_from_slice(payload);
        }
        if self.left == 0 && self.is_last {
            if !self.is_long {
                found(&self.message);
            }
            self.message.clear();
            self.is_long = false;
        }
    }

    /// Whether the server has said that it ends the connection.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether another frame may begin here.
    pub(crate) fn is_between_frames(&self) -> bool {
        self.left == 0 && self.head.is_empty() && !self.violated
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_of_every_length_are_read() {
        for (length, head_bytes) in [(0, 2), (125, 2), (126, 4), (0xffff, 4), (0x1_0000, 10)] {
            let frame = server_frame(TEXT, &vec![b'x'; length]);
            let head = FrameHead::read(&frame).unwrap().unwrap();
            let expected = FrameHead {
                is_last: true,
                opcode: TEXT,
                mask: None,
                payload_bytes: length as u64,
                head_bytes,
            };
            assert_eq!(head, expected);
            for cut in 0..head_bytes {
                assert_eq!(FrameHead::read(&frame[..cut]), Ok(None));
            }
        }
        // The example of RFC 6455, section 5.7: a masked "Hello".
        let mut hello = [0x81, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58];
        let head = FrameHead::read(&hello).unwrap().unwrap();
        assert_eq!((head.head_bytes, head.payload_bytes), (6, 5));
        unmask(head.mask.unwrap(), 0, &mut hello[6..8]);
        unmask(head.mask.unwrap(), 2, &mut hello[8..]);
        assert_eq!(&hello[6..], b"Hello");
    }

    #[test]
    fn what_no_side_may_send_is_refused() {
        for bad in [&[0xc1, 0][..], &[0x83, 0], &[0x09, 0], &[0x89, 126, 0, 126]] {
            assert_eq!(FrameHead::read(bad), Err(ProtocolViolation), "{bad:?}");
        }
    }

    #[test]
    fn the_frames_of_a_server_are_followed_however_they_are_cut() {
        let text = server_frame(TEXT, &[b'x'; 300]);
        let mut begin = server_frame(TEXT, b"be");
        begin[0] &= 0x7f;
        let long = server_frame(TEXT, &[b'y'; MAX_MESSAGE_BYTES + 1]);
        let open = [
            text.clone(),
            begin,
            server_frame(PING, b"p"),
            server_frame(CONTINUATION, b"gin"),
            long,
            server_frame(TEXT, b""),
        ]
        .concat();
        let all = [open.clone(), close_frame(1001, "the server ends")].concat();
        for piece in [1, 3, 100, all.len()] {
            let (mut frames, mut messages) = (ServerFrames::default(), Vec::new());
            assert!(frames.is_between_frames());
            for piece in open.chunks(piece) {
                frames.push(piece, |message| messages.push(message.to_vec()));
            }
            assert!(!frames.is_closed() && frames.is_between_frames(), "{piece}");
            for piece in all[open.len()..].chunks(piece) {
                frames.push(piece, |message| messages.push(message.to_vec()));
            }
            assert!(frames.is_closed() && frames.is_between_frames(), "{piece}");
            assert_eq!(messages, [vec![b'x'; 300], b"begin".to_vec(), Vec::new()], "{piece}");
        }
        let mut cut = ServerFrames::default();
        cut.push(&text[..50], |_| {});
        assert!(!cut.is_between_frames());
    }
}
