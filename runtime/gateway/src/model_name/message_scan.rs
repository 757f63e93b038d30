//! Finds a text field of the first message of a gRPC body while the message arrives.
//!
//! A field is known by its number, or by the numbers of the messages that it is inside of and its own. The
//! first such field counts. Whether the rest of the message is valid is for the pod to say.

use super::{MAX_NAME_BYTES, malformed};
use crate::error::GatewayError;

/// A gRPC message begins with a flag for compression and a length.
const FRAME_HEAD_BYTES: usize = 5;
/// The most messages that a field is inside of, and its own.
const MAX_DEPTH: usize = 2;
/// A number of 64 bits has at most this many bytes.
const MAX_VARINT_BYTES: u32 = 10;

/// A scan of the first message of a body.
#[derive(Debug)]
pub(crate) struct MessageScan {
    fields: &'static [u32],
    head: [u8; FRAME_HEAD_BYTES],
    head_bytes: usize,
    message: Message,
}

#[derive(Debug)]
enum Message {
    /// Its head has not arrived.
    Head,
    /// It is as it is.
    Plain(FieldScan),
    /// It is compressed, and is gathered until it is complete.
    Compressed { bytes: Vec<u8>, length: usize },
    /// Its name was found after it was decompressed.
    Decompressed(String),
}

impl MessageScan {
    /// A scan for the field that these numbers lead to.
    pub(crate) fn new(fields: &'static [u32]) -> Self {
        Self { fields, head: [0; FRAME_HEAD_BYTES], head_bytes: 0, message: Message::Head }
    }

    /// Takes the next bytes of the body.
    ///
    /// # Errors
    /// This can't be a gRPC message.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<(), GatewayError> {
        let mut rest = bytes;
        if matches!(self.message, Message::Head) {
            let length = rest.len().min(FRAME_HEAD_BYTES - self.head_bytes);
            self.head[self.head_bytes..self.head_bytes + length].copy_from_slice(&rest[..length]);
            self.head_bytes += length;
            rest = &rest[length..];
            if self.head_bytes < FRAME_HEAD_BYTES {
                return Ok(());
            }
            let [flag, length @ ..] = self.head;
            let length = u32::from_be_bytes(length);
            self.message = match flag {
                0 => Message::Plain(FieldScan::new(self.fields, Some(u64::from(length)))),
                1 => Message::Compressed { bytes: Vec::new(), length: length as usize },
                other => {
                    let text = format!("it begins with byte {other}; a gRPC message begins with 0 or 1");
                    return Err(malformed(&text));
                }
            };
        }
        match &mut self.message {
            Message::Plain(scan) => scan.push(rest),
            Message::Compressed { bytes, length } => {
                let room = *length - bytes.len();
                bytes.extend_from_slice(&rest[..rest.len().min(room)]);
                Ok(())
            }
            Message::Head | Message::Decompressed(_) => Ok(()),
        }
    }

    /// Whether the name is known, or is known to be missing.
    pub(crate) fn is_found(&self) -> bool {
        match &self.message {
            Message::Plain(scan) => scan.is_found(),
            Message::Decompressed(_) => true,
            Message::Head | Message::Compressed { .. } => false,
        }
    }

    /// The compressed message, once it is complete. [`Self::decompressed`] has to follow.
    pub(crate) fn take_compressed(&mut self) -> Option<Vec<u8>> {
        match &mut self.message {
            Message::Compressed { bytes, length } if bytes.len() == *length => Some(std::mem::take(bytes)),
            _ => None,
        }
    }

    /// The numbers of the fields that lead to the name.
    pub(crate) fn numbers(&self) -> &'static [u32] {
        self.fields
    }

    /// The name, where it is known.
    pub(crate) fn name(&self) -> Option<&str> {
        match &self.message {
            Message::Plain(scan) => scan.name.as_deref(),
            Message::Decompressed(name) => Some(name),
            Message::Head | Message::Compressed { .. } => None,
        }
    }

    /// The name in the message that was compressed.
    pub(crate) fn decompressed(&mut self, name: String) {
        self.message = Message::Decompressed(name);
    }

    /// The name; empty where the message has none.
    ///
    /// # Errors
    /// The body ended within its first message.
    pub(crate) fn finish(self) -> Result<String, GatewayError> {
        match self.message {
            Message::Head => Err(malformed("it holds no gRPC message")),
            Message::Plain(scan) => scan.finish(),
            Message::Compressed { bytes, length } => {
                let found = bytes.len();
                let text = format!("its first gRPC message ends after {found} of {length} bytes");
                Err(malformed(&text))
            }
            Message::Decompressed(name) => Ok(name),
        }
    }
}

/// A scan of one message.
#[derive(Debug)]
pub(crate) struct FieldScan {
    fields: &'static [u32],
    /// How many messages the scan is inside of, below the outermost one.
    depth: usize,
    /// Bytes that are left of each of them.
    left: [u64; MAX_DEPTH],
    /// Whether the length of the outermost one is known.
    has_length: bool,
    state: FieldState,
    name: Option<String>,
}

#[derive(Debug)]
enum FieldState {
    /// Inside the number and kind of a field.
    Tag(Varint),
    /// Inside a number that is skipped.
    Number(Varint),
    /// Inside the length of a field.
    Length { number: u64, varint: Varint },
    /// Inside bytes that are skipped.
    Skip(u64),
    /// Inside the name.
    Name { text: Vec<u8>, left: u64 },
}

/// A number whose bytes arrive.
#[derive(Debug, Clone, Copy, Default)]
struct Varint {
    value: u64,
    bytes: u32,
}

impl Varint {
    /// Takes a byte; gives the number with its last one.
    fn push(&mut self, byte: u8) -> Result<Option<u64>, GatewayError> {
        if self.bytes == MAX_VARINT_BYTES {
            return Err(malformed("as a gRPC message: a number in it is too long"));
        }
        // The tenth byte has one bit of the 64; what is shifted out is not part of the number.
        self.value |= u64::from(byte & 0x7f).wrapping_shl(7 * self.bytes);
        self.bytes += 1;
        Ok((byte & 0x80 == 0).then_some(self.value))
    }
}

impl FieldScan {
    /// A scan of a message of this length; none: it ends where its bytes end.
    pub(crate) fn new(fields: &'static [u32], length: Option<u64>) -> Self {
        let mut left = [0; MAX_DEPTH];
        left[0] = length.unwrap_or(u64::MAX);
        // An empty message names no model.
        let name = (length == Some(0) || fields.is_empty()).then(String::new);
        let state = FieldState::Tag(Varint::default());
        Self { fields, depth: 0, left, has_length: length.is_some(), state, name }
    }

    /// Whether the name is known, or is known to be missing.
    pub(crate) fn is_found(&self) -> bool {
        self.name.is_some()
    }

    /// Takes the next bytes of the message.
    ///
    /// # Errors
    /// This can't be a message, or its name is no text.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<(), GatewayError> {
        let mut rest = bytes;
        while !rest.is_empty() && self.name.is_none() {
            let consumed = self.step(rest)?;
            rest = &rest[consumed..];
        }
        Ok(())
    }

    /// The name; empty where the message has none.
    ///
    /// # Errors
    /// The bytes ended before the message did.
    pub(crate) fn finish(self) -> Result<String, GatewayError> {
        let between = self.depth == 0 && matches!(self.state, FieldState::Tag(Varint { bytes: 0, .. }));
        match self.name {
            Some(name) => Ok(name),
            None if !self.has_length && between => Ok(String::new()),
            None => Err(malformed("as a gRPC message: it ends in the middle")),
        }
    }

    /// Takes at least one byte.
    fn step(&mut self, bytes: &[u8]) -> Result<usize, GatewayError> {
        match &mut self.state {
            FieldState::Tag(varint) => {
                let tag = varint.push(bytes[0])?;
                self.consume(1)?;
                if let Some(tag) = tag {
                    self.state = self.after_tag(tag)?;
                }
                self.leave();
                Ok(1)
            }
            FieldState::Number(varint) => {
                let ended = varint.push(bytes[0])?.is_some();
                self.consume(1)?;
                if ended {
                    self.field_ended();
                }
                Ok(1)
            }
            FieldState::Length { number, varint } => {
                let (number, length) = (*number, varint.push(bytes[0])?);
                self.consume(1)?;
                if let Some(length) = length {
                    self.after_length(number, length)?;
                }
                Ok(1)
            }
            FieldState::Skip(left) => {
                let length = (*left).min(bytes.len() as u64);
                *left -= length;
                let ended = *left == 0;
                self.consume(length)?;
                if ended {
                    self.field_ended();
                }
                // It is no more than the length of the slice.
                Ok(usize::try_from(length).unwrap_or(bytes.len()))
            }
            FieldState::Name { text, left } => {
                let length = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                let room = MAX_NAME_BYTES + 1 - text.len().min(MAX_NAME_BYTES + 1);
                text.extend_from_slice(&bytes[..length.min(room)]);
                *left -= length as u64;
                if *left == 0 || text.len() > MAX_NAME_BYTES {
                    self.name = Some(name_of(std::mem::take(text))?);
                }
                self.consume(length as u64)?;
                Ok(length)
            }
        }
    }

    /// Counts bytes in every message that they are in.
    fn consume(&mut self, bytes: u64) -> Result<(), GatewayError> {
        for left in &mut self.left[..=self.depth] {
            *left = left
                .checked_sub(bytes)
                .ok_or_else(|| malformed("as a gRPC message: a field is longer than its message"))?;
        }
        Ok(())
    }

    fn after_tag(&self, tag: u64) -> Result<FieldState, GatewayError> {
        let (number, kind) = (tag >> 3, tag & 7);
        if number == 0 {
            return Err(malformed("as a gRPC message: there is no field 0"));
        }
        Ok(match kind {
            0 => FieldState::Number(Varint::default()),
            1 => FieldState::Skip(8),
            2 => FieldState::Length { number, varint: Varint::default() },
            5 => FieldState::Skip(4),
            _ => return Err(malformed("as a gRPC message: a field of an unknown kind")),
        })
    }

    fn after_length(&mut self, number: u64, length: u64) -> Result<(), GatewayError> {
        if length > self.left[self.depth] {
            return Err(malformed("as a gRPC message: a field is longer than its message"));
        }
        let wanted = u64::from(self.fields[self.depth]) == number;
        let is_last = self.depth + 1 == self.fields.len();
        match (wanted, is_last, length) {
            (true, true, 0) => self.name = Some(String::new()),
            (true, true, _) => self.state = FieldState::Name { text: Vec::new(), left: length },
            (true, false, 1..) => {
                self.depth += 1;
                self.left[self.depth] = length;
                self.state = FieldState::Tag(Varint::default());
            }
            (_, _, 0) => self.field_ended(),
            _ => self.state = FieldState::Skip(length),
        }
        Ok(())
    }

    fn field_ended(&mut self) {
        self.state = FieldState::Tag(Varint::default());
        self.leave();
    }

    /// Leaves the messages that have ended. The end of the outermost one says that there is no name.
    fn leave(&mut self) {
        if !matches!(self.state, FieldState::Tag(Varint { bytes: 0, .. })) {
            return;
        }
        while self.left[self.depth] == 0 {
            if self.depth == 0 {
                self.name.get_or_insert_with(String::new);
                return;
            }
            self.depth -= 1;
        }
    }
}

fn name_of(text: Vec<u8>) -> Result<String, GatewayError> {
    if text.len() > MAX_NAME_BYTES {
        // No model has a name that long; its beginning is enough for the error that says so.
        return Ok(String::from_utf8_lossy(&text).into_owned());
    }
    String::from_utf8(text).map_err(|_| malformed("as a gRPC message: the model's name is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::{BufMut, Bytes, BytesMut};
    use proptest::prelude::*;
    use prost::Message as _;
    use trustformers_proto::inference::ModelInferRequest;
    use trustformers_proto::v1::session_request::{Action, Cancel};
    use trustformers_proto::v1::{EmbedRequest, GenerateRequest, SessionRequest};

    const MODEL: &[u32] = &[5];
    const IN_SESSION: &[u32] = &[2, 5];

    fn framed(message: &[u8], flag: u8) -> Bytes {
        let mut bytes = BytesMut::new();
        bytes.put_u8(flag);
        bytes.put_u32(u32::try_from(message.len()).unwrap());
        bytes.put_slice(message);
        bytes.freeze()
    }

    fn scan(fields: &'static [u32], body: &[u8], piece: usize) -> Result<String, GatewayError> {
        let mut scan = MessageScan::new(fields);
        for piece in body.chunks(piece.max(1)) {
            scan.push(piece)?;
        }
        scan.finish()
    }

    fn generate(model: &str) -> GenerateRequest {
        GenerateRequest {
            prompt: "p".repeat(300),
            max_tokens: 3,
            temperature: 0.5,
            model: model.to_owned(),
            seed: Some(u64::MAX),
            ..Default::default()
        }
    }

    #[test]
    fn the_name_is_found_however_the_message_is_cut() {
        let embed = EmbedRequest { input: vec!["x".into(); 40], model: "ns/e".into(), ..Default::default() };
        let session = |action| SessionRequest { request_id: "id-1".into(), action: Some(action) };
        let infer = ModelInferRequest { model_name: "k".into(), id: "7".into(), ..Default::default() };
        let cases: [(&'static [u32], Vec<u8>, &str); 8] = [
            (MODEL, generate("default/a").encode_to_vec(), "default/a"),
            (MODEL, GenerateRequest::default().encode_to_vec(), ""),
            (MODEL, generate("").encode_to_vec(), ""),
            (MODEL, embed.encode_to_vec(), "ns/e"),
            (IN_SESSION, session(Action::Generate(generate("in"))).encode_to_vec(), "in"),
            (IN_SESSION, session(Action::Generate(GenerateRequest::default())).encode_to_vec(), ""),
            (IN_SESSION, session(Action::Cancel(Cancel {})).encode_to_vec(), ""),
            (&[1], infer.encode_to_vec(), "k"),
        ];
        for (fields, message, name) in cases {
            let body = [framed(&message, 0), framed(b"the next message", 0)].concat();
            for piece in [1, 2, 3, 100, body.len()] {
                assert_eq!(scan(fields, &body, piece).unwrap(), name, "{fields:?} {piece}");
            }
        }
    }

    #[test]
    fn what_can_be_no_message_is_refused() {
        let message = framed(&generate("a").encode_to_vec(), 0);
        for bad in [
            Bytes::new(),
            message.slice(..3),
            message.slice(..60),
            // Field 0, text that is no UTF-8, a number without an end, a group, a length beyond the message.
            framed(&[0; 100], 0),
            framed(&[0x2a, 2, 0xff, 0xfe], 0),
            framed(&[0xff, 0xff], 0),
            framed(&[0xff; 20], 0),
            framed(&[0x0b, 1], 0),
            framed(&[0x0a, 0x7f, 1], 0),
            framed(b"zip", 1).slice(..6),
            framed(b"", 0x50),
            Bytes::from_static(b"POST / HTTP/1.1\r\n\r\n"),
        ] {
            for piece in [1, 1000] {
                let error = scan(MODEL, &bad, piece).unwrap_err();
                assert_eq!((error.kind(), error.code()), ("invalid_request", tonic::Code::InvalidArgument));
            }
        }
    }

    #[test]
    fn a_compressed_message_is_given_out_once_it_is_complete() {
        let mut scan = MessageScan::new(MODEL);
        let body = [framed(b"compressed", 1), framed(b"next", 1)].concat();
        for byte in &body[..14] {
            scan.push(&[*byte]).unwrap();
            assert!(scan.take_compressed().is_none());
        }
        scan.push(&body[14..]).unwrap();
        assert_eq!(scan.take_compressed().unwrap(), b"compressed");
        assert!(!scan.is_found());
        let mut fields = FieldScan::new(scan.numbers(), None);
        fields.push(&generate("inside").encode_to_vec()).unwrap();
        scan.decompressed(fields.finish().unwrap());
        assert_eq!(scan.finish().unwrap(), "inside");
    }

    #[test]
    fn a_long_name_is_kept_up_to_a_bound() {
        let body = framed(&generate(&"n".repeat(100_000)).encode_to_vec(), 0);
        for piece in [7, body.len()] {
            assert_eq!(scan(MODEL, &body, piece).unwrap().len(), MAX_NAME_BYTES + 1);
        }
    }

    proptest! {
        #[test]
        fn any_request_gives_the_name_that_a_decoder_finds(
            prompt in ".{0,300}",
            name in ".{0,60}",
            stop in prop::collection::vec(".{0,20}", 0..4),
            bias in prop::collection::hash_map(any::<u32>(), any::<f32>(), 0..4),
            piece in 1_usize..50,
        ) {
            let request = GenerateRequest {
                prompt, model: name.clone(), stop, logit_bias: bias, ..Default::default()
            };
            let body = framed(&request.encode_to_vec(), 0);
            prop_assert_eq!(scan(MODEL, &body, piece).unwrap(), name.clone());
            let request = SessionRequest { request_id: "r".into(), action: Some(Action::Generate(request)) };
            let body = framed(&request.encode_to_vec(), 0);
            prop_assert_eq!(scan(IN_SESSION, &body, piece).unwrap(), name);
        }
    }
}
