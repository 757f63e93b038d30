//! A codec for messages whose repeated fields are few: a message with too many fields is refused before it is
//! decoded.
//!
//! An empty message within a list takes two bytes on the wire and some hundred in memory, so that 4 MiB of
//! them would take half a GiB. The limit on a message's bytes does not help there, and the handler comes too
//! late.

use std::marker::PhantomData;

use prost::Message;
use prost::bytes::Buf;
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder};
use tonic_prost::{ProstDecoder, ProstEncoder};

/// Fields of a message itself, those within its fields not counted, each element of a list for one. The
/// largest message that is of use has the 13 inputs of a model twice (tensors and their bytes), 4 outputs and
/// 20 parameters; a list of models has one for each. At some 300 bytes an element 1,024 take 300 KiB.
const MAX_FIELDS: usize = 1024;

/// As [`tonic_prost::ProstCodec`], with the limit.
#[derive(Debug, Clone)]
pub struct BoundedCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for BoundedCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T: Message + 'static, U: Message + Default + 'static> Codec for BoundedCodec<T, U> {
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = BoundedDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::default()
    }

    fn decoder(&mut self) -> Self::Decoder {
        BoundedDecoder(ProstDecoder::default())
    }
}

/// Decodes a message that has few fields.
#[derive(Debug, Clone)]
pub struct BoundedDecoder<U>(ProstDecoder<U>);

impl<U: Message + Default> Decoder for BoundedDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        match count_fields(buffer.chunk()) {
            Some(fields) if fields <= MAX_FIELDS => self.0.decode(buffer),
            Some(_) => {
                let message = format!("the message has more than {MAX_FIELDS} fields, list elements counted");
                Err(Status::invalid_argument(message))
            }
            None => Err(Status::invalid_argument("the message is not in the format of Protocol Buffers")),
        }
    }
}

/// The fields of a message, at most one more than [`MAX_FIELDS`]. None for bytes that are no message, or that
/// hold a group, which no message of version 3 has.
fn count_fields(bytes: &[u8]) -> Option<usize> {
    let (mut rest, mut fields) = (bytes, 0);
    while !rest.is_empty() && fields <= MAX_FIELDS {
        rest = skip_field(rest)?;
        fields += 1;
    }
    Some(fields)
}

/// What follows the first field.
fn skip_field(bytes: &[u8]) -> Option<&[u8]> {
    let key = split_varint(bytes)?;
    match key.value & 7 {
        0 => Some(split_varint(key.rest)?.rest),
        1 => key.rest.get(8..),
        2 => {
            let length = split_varint(key.rest)?;
            length.rest.get(usize::try_from(length.value).ok()?..)
        }
        5 => key.rest.get(4..),
        _ => None,
    }
}

/// A number of variable length, and what follows it.
struct Varint<'a> {
    value: u64,
    rest: &'a [u8],
}

fn split_varint(bytes: &[u8]) -> Option<Varint<'_>> {
    let mut value = 0;
    // Seven bits a byte: ten bytes hold 64 bits.
    for (index, byte) in bytes.iter().enumerate().take(10) {
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Some(Varint { value, rest: &bytes[index + 1..] });
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::ModelInferRequest;
    use crate::inference::model_infer_request::InferInputTensor;

    fn with_inputs(count: usize) -> Vec<u8> {
        let inputs = vec![InferInputTensor::default(); count];
        ModelInferRequest { model_name: "m".into(), inputs, ..Default::default() }.encode_to_vec()
    }

    #[test]
    fn fields_of_every_kind_are_counted_up_to_the_limit() {
        assert_eq!(count_fields(&[]), Some(0));
        // A number, eight bytes, text, four bytes.
        let all = [8, 0x80, 1, 17, 1, 2, 3, 4, 5, 6, 7, 8, 26, 2, 1, 1, 37, 1, 2, 3, 4];
        assert_eq!(count_fields(&all), Some(4));
        assert_eq!(count_fields(&with_inputs(3)), Some(4));
        assert_eq!(count_fields(&with_inputs(MAX_FIELDS - 1)), Some(MAX_FIELDS));
        assert_eq!(count_fields(&with_inputs(1 << 20)), Some(MAX_FIELDS + 1));
    }

    #[test]
    fn bytes_that_are_no_message_are_not_counted() {
        for bytes in [&[8][..], &[10, 2, 1], &[0x80; 12], &[11, 12], &[9, 1], &[13, 1], &[10, 0xff, 0xff, 1]]
        {
            assert_eq!(count_fields(bytes), None, "{bytes:?}");
        }
    }
}
