//! Tensors of the Open Inference Protocol: data types, shapes, and the forms in which values travel.
//!
//! Values arrive as JSON, as little-endian bytes (the binary extension of HTTP, raw contents of gRPC) or in
//! the typed lists of gRPC, and leave in the same forms. Everything here is pure. The number of elements that
//! a shape promises is bounded before memory is taken for it, and a tensor that does not fit its shape or its
//! data type is refused with its name.

use std::fmt;

use axum::body::Bytes;
use half::{bf16, f16};
use serde::{Serialize, Serializer};
use serde_json::Value;
use trustformers_proto::inference::InferTensorContents;

use crate::error::ApiError;
use crate::json_body::found;

/// Dimensions of a shape that an error writes.
const MAX_WRITTEN_DIMENSIONS: usize = 8;

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Datatype {
    Bool,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Int8,
    Int16,
    Int32,
    Int64,
    Fp16,
    Bf16,
    Fp32,
    Fp64,
    /// Texts here: the bytes of each element are UTF-8.
    Bytes,
}

impl Datatype {
    /// Every data type, in the order in which errors list them.
    pub(crate) const ALL: &'static [Self] = &[
        Self::Bool,
        Self::Uint8,
        Self::Uint16,
        Self::Uint32,
        Self::Uint64,
        Self::Int8,
        Self::Int16,
        Self::Int32,
        Self::Int64,
        Self::Fp16,
        Self::Bf16,
        Self::Fp32,
        Self::Fp64,
        Self::Bytes,
    ];

    /// The word of the protocol.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::Uint8 => "UINT8",
            Self::Uint16 => "UINT16",
            Self::Uint32 => "UINT32",
            Self::Uint64 => "UINT64",
            Self::Int8 => "INT8",
            Self::Int16 => "INT16",
            Self::Int32 => "INT32",
            Self::Int64 => "INT64",
            Self::Fp16 => "FP16",
            Self::Bf16 => "BF16",
            Self::Fp32 => "FP32",
            Self::Fp64 => "FP64",
            Self::Bytes => "BYTES",
        }
    }

    /// The data type of a word, in upper case as the protocol spells it.
    pub(crate) fn from_word(word: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|datatype| datatype.as_str() == word)
    }

    fn is_whole(self) -> bool {
        matches!(
            self,
            Self::Uint8
                | Self::Uint16
                | Self::Uint32
                | Self::Uint64
                | Self::Int8
                | Self::Int16
                | Self::Int32
                | Self::Int64
        )
    }

    fn is_float(self) -> bool {
        matches!(self, Self::Fp16 | Self::Bf16 | Self::Fp32 | Self::Fp64)
    }

    /// Whether a tensor of this type is accepted where `wanted` is asked for: any whole number for a whole
    /// number, any number for a float. Clients choose the width by their language and not by the model.
    pub(crate) fn serves_as(self, wanted: Self) -> bool {
        self == wanted
            || (self.is_whole() && wanted.is_whole())
            || ((self.is_whole() || self.is_float()) && wanted.is_float())
    }

    /// Bytes of an element; none for texts, which have a length each.
    fn element_bytes(self) -> Option<usize> {
        match self {
            Self::Bool | Self::Uint8 | Self::Int8 => Some(1),
            Self::Uint16 | Self::Int16 | Self::Fp16 | Self::Bf16 => Some(2),
            Self::Uint32 | Self::Int32 | Self::Fp32 => Some(4),
            Self::Uint64 | Self::Int64 | Self::Fp64 => Some(8),
            Self::Bytes => None,
        }
    }

    /// The largest value of an unsigned type.
    fn unsigned_max(self) -> u64 {
        match self {
            Self::Uint8 => u64::from(u8::MAX),
            Self::Uint16 => u64::from(u16::MAX),
            Self::Uint32 => u64::from(u32::MAX),
            _ => u64::MAX,
        }
    }

    /// Whether a signed type holds this value.
    fn holds_signed(self, value: i64) -> bool {
        match self {
            Self::Int8 => i8::try_from(value).is_ok(),
            Self::Int16 => i16::try_from(value).is_ok(),
            Self::Int32 => i32::try_from(value).is_ok(),
            _ => true,
        }
    }
}

impl fmt::Display for Datatype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A tensor as it arrived. Its values are read by [`InputTensor::values`], once it is known that the model
/// takes it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct InputTensor {
    pub(crate) name: String,
    pub(crate) datatype: Datatype,
    /// Lengths of the dimensions, the slowest first; empty for a single value.
    pub(crate) shape: Vec<u64>,
    pub(crate) data: TensorData,
}

/// The values of a tensor in the form in which they travelled.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum TensorData {
    /// A list in JSON, flat or nested like the shape.
    Json(Vec<Value>),
    /// Little-endian bytes, row by row; a text has its length before it, as four bytes.
    Raw(Bytes),
    /// The typed lists of gRPC.
    Typed(Box<InferTensorContents>),
}

/// The values of a tensor, row by row, widened to one type of each kind.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum TensorValues {
    Flags(Vec<bool>),
    Signed(Vec<i64>),
    Unsigned(Vec<u64>),
    Floats(Vec<f64>),
    Texts(Vec<String>),
}

impl TensorValues {
    /// Their number.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Flags(all) => all.len(),
            Self::Signed(all) => all.len(),
            Self::Unsigned(all) => all.len(),
            Self::Floats(all) => all.len(),
            Self::Texts(all) => all.len(),
        }
    }

    /// The value at `index` as JSON. None past the end, and for a float that is not finite.
    pub(crate) fn json(&self, index: usize) -> Option<Value> {
        match self {
            Self::Flags(all) => all.get(index).map(|flag| Value::from(*flag)),
            Self::Signed(all) => all.get(index).map(|number| Value::from(*number)),
            Self::Unsigned(all) => all.get(index).map(|number| Value::from(*number)),
            Self::Floats(all) => {
                let number = all.get(index).and_then(|number| serde_json::Number::from_f64(*number));
                number.map(Value::Number)
            }
            Self::Texts(all) => all.get(index).map(|text| Value::from(text.as_str())),
        }
    }
}

/// A shape as errors write it.
pub(crate) fn shape_text(shape: &[u64]) -> String {
    let written: Vec<String> = shape.iter().take(MAX_WRITTEN_DIMENSIONS).map(u64::to_string).collect();
    let more = if shape.len() > MAX_WRITTEN_DIMENSIONS { ", ..." } else { "" };
    format!("[{}{more}]", written.join(", "))
}

impl InputTensor {
    /// A refusal that names this tensor.
    pub(crate) fn error(&self, message: impl fmt::Display) -> ApiError {
        ApiError::field(&self.name, message)
    }

    /// The number of elements that the shape promises.
    ///
    /// # Errors
    /// More elements than a machine can count.
    pub(crate) fn count(&self) -> Result<usize, ApiError> {
        // Without any element the other lengths say nothing, however large they are.
        if self.shape.contains(&0) {
            return Ok(0);
        }
        let product = self.shape.iter().try_fold(1u64, |product, length| product.checked_mul(*length));
        product.and_then(|product| usize::try_from(product).ok()).ok_or_else(|| {
            self.error(format!("shape {} has more elements than can be counted", shape_text(&self.shape)))
        })
    }

    /// The values, of which at most `max` are read.
    ///
    /// # Errors
    /// [`ApiError::InvalidRequest`] that names the tensor: more elements than `max`, values that do not fit
    /// the shape, or a value that is not of the data type.
    pub(crate) fn values(&self, max: usize) -> Result<TensorValues, ApiError> {
        let count = self.count()?;
        if count > max {
            let shape = shape_text(&self.shape);
            return Err(self.error(format!("shape {shape} has {count} elements; at most {max} are accepted")));
        }
        match &self.data {
            TensorData::Json(list) => self.decode_json(list, count),
            TensorData::Raw(bytes) => self.decode_raw(bytes, count),
            TensorData::Typed(contents) => self.decode_typed(contents, count),
        }
    }

    fn wrong_count(&self, given: impl fmt::Display, count: usize) -> ApiError {
        let shape = shape_text(&self.shape);
        self.error(format!("its data holds {given} values, but shape {shape} has {count}"))
    }

    fn text(&self, index: usize, bytes: &[u8]) -> Result<String, ApiError> {
        let text = std::str::from_utf8(bytes).map_err(|error| {
            self.error(format!("element {index} is not UTF-8 ({error}); BYTES hold texts here"))
        })?;
        Ok(text.to_owned())
    }

    fn decode_json(&self, list: &[Value], count: usize) -> Result<TensorValues, ApiError> {
        let mut flat = Vec::with_capacity(count.min(list.len()));
        if !flatten(list, count, &mut flat) {
            return Err(self.wrong_count(format!("more than {count}"), count));
        }
        if flat.len() != count {
            return Err(self.wrong_count(flat.len(), count));
        }
        let datatype = self.datatype;
        Ok(match datatype {
            Datatype::Bool => TensorValues::Flags(self.each(&flat, Value::as_bool)?),
            Datatype::Uint8 | Datatype::Uint16 | Datatype::Uint32 | Datatype::Uint64 => {
                let max = datatype.unsigned_max();
                TensorValues::Unsigned(self.each(&flat, |value| value.as_u64().filter(|one| *one <= max))?)
            }
            Datatype::Int8 | Datatype::Int16 | Datatype::Int32 | Datatype::Int64 => {
                let holds = |value: &Value| value.as_i64().filter(|one| datatype.holds_signed(*one));
                TensorValues::Signed(self.each(&flat, holds)?)
            }
            Datatype::Fp32 | Datatype::Fp64 => TensorValues::Floats(self.each(&flat, Value::as_f64)?),
            Datatype::Fp16 | Datatype::Bf16 => {
                return Err(self.error(format!("{datatype} has no form in JSON: send it as binary data")));
            }
            Datatype::Bytes => {
                TensorValues::Texts(self.each(&flat, |value| value.as_str().map(str::to_owned))?)
            }
        })
    }

    /// Converts each value of a list, and names the first that is not of the data type.
    fn each<T>(&self, flat: &[&Value], convert: impl Fn(&Value) -> Option<T>) -> Result<Vec<T>, ApiError> {
        let one = |(index, value): (usize, &Value)| {
            convert(value).ok_or_else(|| {
                let (datatype, found) = (self.datatype, found(value));
                self.error(format!("value {index} of its data is no {datatype}: found {found}"))
            })
        };
        flat.iter().copied().enumerate().map(one).collect()
    }

    fn decode_raw(&self, bytes: &[u8], count: usize) -> Result<TensorValues, ApiError> {
        let Some(width) = self.datatype.element_bytes() else { return self.decode_texts(bytes, count) };
        if count.checked_mul(width) != Some(bytes.len()) {
            let (datatype, given, shape) = (self.datatype, bytes.len(), shape_text(&self.shape));
            return Err(self.error(format!(
                "its binary data has {given} bytes, but shape {shape} of {datatype} has {count} times {width}"
            )));
        }
        Ok(match self.datatype {
            Datatype::Bool => {
                let flag = |(index, byte): (usize, &u8)| match byte {
                    0 => Ok(false),
                    1 => Ok(true),
                    other => {
                        Err(self.error(format!("byte {index} of its binary data is {other}, not 0 or 1")))
                    }
                };
                TensorValues::Flags(bytes.iter().enumerate().map(flag).collect::<Result<_, _>>()?)
            }
            Datatype::Uint8 => TensorValues::Unsigned(bytes.iter().map(|byte| u64::from(*byte)).collect()),
            Datatype::Uint16 => TensorValues::Unsigned(chunks(bytes, |raw| u16::from_le_bytes(raw).into())),
            Datatype::Uint32 => TensorValues::Unsigned(chunks(bytes, |raw| u32::from_le_bytes(raw).into())),
            Datatype::Uint64 => TensorValues::Unsigned(chunks(bytes, u64::from_le_bytes)),
            Datatype::Int8 => TensorValues::Signed(chunks(bytes, |raw| i8::from_le_bytes(raw).into())),
            Datatype::Int16 => TensorValues::Signed(chunks(bytes, |raw| i16::from_le_bytes(raw).into())),
            Datatype::Int32 => TensorValues::Signed(chunks(bytes, |raw| i32::from_le_bytes(raw).into())),
            Datatype::Int64 => TensorValues::Signed(chunks(bytes, i64::from_le_bytes)),
            Datatype::Fp16 => TensorValues::Floats(chunks(bytes, |raw| f16::from_le_bytes(raw).to_f64())),
            Datatype::Bf16 => TensorValues::Floats(chunks(bytes, |raw| bf16::from_le_bytes(raw).to_f64())),
            Datatype::Fp32 => TensorValues::Floats(chunks(bytes, |raw| f32::from_le_bytes(raw).into())),
            Datatype::Fp64 => TensorValues::Floats(chunks(bytes, f64::from_le_bytes)),
            Datatype::Bytes => TensorValues::Texts(Vec::new()),
        })
    }

    fn decode_texts(&self, bytes: &[u8], count: usize) -> Result<TensorValues, ApiError> {
        // An element takes at least the four bytes of its length.
        let mut texts = Vec::with_capacity(count.min(bytes.len() / 4));
        let mut rest = bytes;
        while let Some((length, after)) = rest.split_first_chunk::<4>() {
            let index = texts.len();
            if index == count {
                return Err(self.wrong_count(format!("more than {count}"), count));
            }
            let length = u32::from_le_bytes(*length);
            let text = usize::try_from(length).ok().and_then(|length| after.split_at_checked(length));
            let Some((text, after)) = text else {
                let left = after.len();
                return Err(self.error(format!(
                    "element {index} of its binary data is {length} bytes long, but {left} are left"
                )));
            };
            texts.push(self.text(index, text)?);
            rest = after;
        }
        if !rest.is_empty() {
            let left = rest.len();
            return Err(self.error(format!(
                "its binary data ends with {left} bytes, but the length of an element takes 4"
            )));
        }
        if texts.len() != count {
            return Err(self.wrong_count(texts.len(), count));
        }
        Ok(TensorValues::Texts(texts))
    }

    fn decode_typed(&self, contents: &InferTensorContents, count: usize) -> Result<TensorValues, ApiError> {
        let fits = |list: &str, given: usize| {
            if given == count {
                return Ok(());
            }
            let (datatype, shape) = (self.datatype, shape_text(&self.shape));
            let why = format!("its {list} hold {given} values, but shape {shape} of {datatype} has {count}");
            Err(self.error(why))
        };
        let outside = |value: &dyn fmt::Display| self.error(format!("{value} is no {}", self.datatype));
        Ok(match self.datatype {
            Datatype::Bool => {
                fits("bool_contents", contents.bool_contents.len())?;
                TensorValues::Flags(contents.bool_contents.clone())
            }
            Datatype::Uint8 | Datatype::Uint16 | Datatype::Uint32 => {
                fits("uint_contents", contents.uint_contents.len())?;
                let all: Vec<u64> = contents.uint_contents.iter().map(|value| u64::from(*value)).collect();
                let max = self.datatype.unsigned_max();
                all.iter().find(|value| **value > max).map_or(Ok(()), |value| Err(outside(value)))?;
                TensorValues::Unsigned(all)
            }
            Datatype::Uint64 => {
                fits("uint64_contents", contents.uint64_contents.len())?;
                TensorValues::Unsigned(contents.uint64_contents.clone())
            }
            Datatype::Int8 | Datatype::Int16 | Datatype::Int32 => {
                fits("int_contents", contents.int_contents.len())?;
                let all: Vec<i64> = contents.int_contents.iter().map(|value| i64::from(*value)).collect();
                let does_not_fit = |value: &&i64| !self.datatype.holds_signed(**value);
                all.iter().find(does_not_fit).map_or(Ok(()), |value| Err(outside(value)))?;
                TensorValues::Signed(all)
            }
            Datatype::Int64 => {
                fits("int64_contents", contents.int64_contents.len())?;
                TensorValues::Signed(contents.int64_contents.clone())
            }
            Datatype::Fp32 => {
                fits("fp32_contents", contents.fp32_contents.len())?;
                TensorValues::Floats(contents.fp32_contents.iter().map(|value| f64::from(*value)).collect())
            }
            Datatype::Fp64 => {
                fits("fp64_contents", contents.fp64_contents.len())?;
                TensorValues::Floats(contents.fp64_contents.clone())
            }
            Datatype::Fp16 | Datatype::Bf16 => {
                let datatype = self.datatype;
                return Err(self.error(format!("{datatype} has no typed contents: send raw_input_contents")));
            }
            Datatype::Bytes => {
                fits("bytes_contents", contents.bytes_contents.len())?;
                let texts = contents.bytes_contents.iter().enumerate();
                let texts = texts.map(|(index, bytes)| self.text(index, bytes));
                TensorValues::Texts(texts.collect::<Result<_, _>>()?)
            }
        })
    }
}

/// Appends the values of a list that may be nested. False where they are more than `max`. The depth is
/// bounded by the parser of JSON, which refuses more than 128 levels.
fn flatten<'a>(list: &'a [Value], max: usize, flat: &mut Vec<&'a Value>) -> bool {
    list.iter().all(|value| match value {
        Value::Array(inner) => flatten(inner, max, flat),
        value => {
            flat.push(value);
            flat.len() <= max
        }
    })
}

/// Converts each `N` bytes.
fn chunks<const N: usize, T>(bytes: &[u8], convert: impl Fn([u8; N]) -> T) -> Vec<T> {
    let (chunks, _) = bytes.as_chunks::<N>();
    chunks.iter().map(|raw| convert(*raw)).collect()
}

/// A tensor of an answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct OutputTensor {
    pub(crate) name: &'static str,
    pub(crate) shape: Vec<u64>,
    pub(crate) data: OutputData,
}

/// The values of an answer's tensor, row by row.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum OutputData {
    Flags(Vec<bool>),
    Counts(Vec<u32>),
    Floats(Vec<f32>),
    Texts(Vec<String>),
}

/// As a list in JSON, each float with as many digits as it needs.
impl Serialize for OutputData {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Flags(all) => all.serialize(serializer),
            Self::Counts(all) => all.serialize(serializer),
            Self::Floats(all) => all.serialize(serializer),
            Self::Texts(all) => all.serialize(serializer),
        }
    }
}

impl OutputData {
    /// The type of the elements.
    pub(crate) fn datatype(&self) -> Datatype {
        match self {
            Self::Flags(_) => Datatype::Bool,
            Self::Counts(_) => Datatype::Uint32,
            Self::Floats(_) => Datatype::Fp32,
            Self::Texts(_) => Datatype::Bytes,
        }
    }

    /// Their number.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Flags(all) => all.len(),
            Self::Counts(all) => all.len(),
            Self::Floats(all) => all.len(),
            Self::Texts(all) => all.len(),
        }
    }

    /// The values as little-endian bytes.
    pub(crate) fn to_raw(&self) -> Vec<u8> {
        match self {
            Self::Flags(all) => all.iter().map(|flag| u8::from(*flag)).collect(),
            Self::Counts(all) => all.iter().flat_map(|count| count.to_le_bytes()).collect(),
            Self::Floats(all) => all.iter().flat_map(|float| float.to_le_bytes()).collect(),
            Self::Texts(all) => {
                let mut raw = Vec::with_capacity(all.iter().map(|text| text.len() + 4).sum());
                for text in all {
                    // An answer is bounded by the context of its model, which is far below 4 GiB.
                    let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
                    raw.extend_from_slice(&length.to_le_bytes());
                    raw.extend_from_slice(text.as_bytes());
                }
                raw
            }
        }
    }

    /// The values in the typed list of gRPC.
    pub(crate) fn into_typed(self) -> InferTensorContents {
        let mut contents = InferTensorContents::default();
        match self {
            Self::Flags(all) => contents.bool_contents = all,
            Self::Counts(all) => contents.uint_contents = all,
            Self::Floats(all) => contents.fp32_contents = all,
            Self::Texts(all) => contents.bytes_contents = all.into_iter().map(String::into_bytes).collect(),
        }
        contents
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn tensor(datatype: Datatype, shape: &[u64], data: TensorData) -> InputTensor {
        InputTensor { name: "t".into(), datatype, shape: shape.to_vec(), data }
    }

    fn raw(bytes: &[u8]) -> TensorData {
        TensorData::Raw(Bytes::copy_from_slice(bytes))
    }

    fn listed(value: Value) -> TensorData {
        let Value::Array(list) = value else { panic!("{value}") };
        TensorData::Json(list)
    }

    /// What an output becomes when it is read as an input.
    fn widened(data: &OutputData) -> TensorValues {
        match data.clone() {
            OutputData::Flags(all) => TensorValues::Flags(all),
            OutputData::Counts(all) => TensorValues::Unsigned(all.into_iter().map(u64::from).collect()),
            OutputData::Floats(all) => TensorValues::Floats(all.into_iter().map(f64::from).collect()),
            OutputData::Texts(all) => TensorValues::Texts(all),
        }
    }

    fn outputs() -> impl Strategy<Value = OutputData> {
        prop_oneof![
            prop::collection::vec(any::<bool>(), 0..9).prop_map(OutputData::Flags),
            prop::collection::vec(any::<u32>(), 0..9).prop_map(OutputData::Counts),
            prop::collection::vec(-1e6f32..1e6, 0..9).prop_map(OutputData::Floats),
            prop::collection::vec(any::<String>(), 0..9).prop_map(OutputData::Texts),
        ]
    }

    proptest! {
        #[test]
        fn what_is_written_in_any_form_is_read_again(data in outputs()) {
            let (datatype, count) = (data.datatype(), data.len());
            let shape = [count as u64];
            let expected = widened(&data);
            let json = listed(serde_json::from_str(&serde_json::to_string(&data).unwrap()).unwrap());
            // A float in JSON is the shortest decimal of an f32, which is read as an f64.
            let as_f32 = |values: TensorValues| match values {
                TensorValues::Floats(all) => TensorValues::Floats(all.iter().map(|one| {
                    let text = Value::from(*one);
                    f64::from(crate::json_body::float(&text).unwrap())
                }).collect()),
                other => other,
            };
            prop_assert_eq!(as_f32(tensor(datatype, &shape, json).values(count).unwrap()), expected.clone());
            let bytes = raw(&data.to_raw());
            prop_assert_eq!(tensor(datatype, &shape, bytes).values(count).unwrap(), expected.clone());
            let typed = TensorData::Typed(Box::new(data.into_typed()));
            prop_assert_eq!(tensor(datatype, &shape, typed).values(count).unwrap(), expected);
        }

        #[test]
        fn no_bytes_and_no_shape_make_the_reader_panic(
            datatype in prop::sample::select(Datatype::ALL),
            shape in prop::collection::vec(prop_oneof![0u64..5, any::<u64>()], 0..5),
            bytes in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            let values = tensor(datatype, &shape, raw(&bytes)).values(16);
            if let Ok(values) = values {
                // Without any element the other lengths may be larger than can be multiplied.
                let count = if shape.contains(&0) { 0 } else { shape.iter().product::<u64>() };
                prop_assert_eq!(values.len() as u64, count);
            }
        }
    }

    #[test]
    fn numbers_of_every_width_are_read_from_bytes() {
        let cases: [(Datatype, &[u8], TensorValues); 13] = [
            (Datatype::Bool, &[1, 0], TensorValues::Flags(vec![true, false])),
            (Datatype::Uint8, &[255, 1], TensorValues::Unsigned(vec![255, 1])),
            (Datatype::Uint16, &[1, 2, 0, 255], TensorValues::Unsigned(vec![0x0201, 0xff00])),
            (Datatype::Uint32, &[1, 0, 0, 0, 0, 0, 0, 128], TensorValues::Unsigned(vec![1, 1 << 31])),
            (
                Datatype::Uint64,
                &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 128],
                TensorValues::Unsigned(vec![1, 1 << 63]),
            ),
            (Datatype::Int8, &[255, 1], TensorValues::Signed(vec![-1, 1])),
            (Datatype::Int16, &[255, 255, 1, 0], TensorValues::Signed(vec![-1, 1])),
            (Datatype::Int32, &[255, 255, 255, 255, 1, 0, 0, 0], TensorValues::Signed(vec![-1, 1])),
            (
                Datatype::Int64,
                &[255, 255, 255, 255, 255, 255, 255, 255, 1, 0, 0, 0, 0, 0, 0, 0],
                TensorValues::Signed(vec![-1, 1]),
            ),
            (Datatype::Fp16, &[0x00, 0x3e, 0x00, 0xc0], TensorValues::Floats(vec![1.5, -2.0])),
            (Datatype::Bf16, &[0xc0, 0x3f, 0x00, 0xc0], TensorValues::Floats(vec![1.5, -2.0])),
            (Datatype::Fp32, &[0, 0, 192, 63, 0, 0, 0, 192], TensorValues::Floats(vec![1.5, -2.0])),
            (
                Datatype::Fp64,
                &[0, 0, 0, 0, 0, 0, 248, 63, 0, 0, 0, 0, 0, 0, 0, 192],
                TensorValues::Floats(vec![1.5, -2.0]),
            ),
        ];
        for (datatype, bytes, expected) in cases {
            assert_eq!(tensor(datatype, &[2], raw(bytes)).values(2), Ok(expected), "{datatype}");
        }
    }

    #[test]
    fn values_in_json_may_be_nested_and_shapes_may_be_empty() {
        let flat = TensorValues::Signed(vec![1, -2, 3, 4]);
        for data in [json!([1, -2, 3, 4]), json!([[1, -2], [3, 4]]), json!([[[1], [-2]], [[3], [4]]])] {
            assert_eq!(tensor(Datatype::Int8, &[2, 2], listed(data)).values(4), Ok(flat.clone()));
        }
        let one = tensor(Datatype::Bytes, &[], listed(json!(["a"])));
        assert_eq!(one.values(1), Ok(TensorValues::Texts(vec!["a".into()])));
        for shape in [&[0, 7][..], &[0, u64::MAX], &[u64::MAX, 0, u64::MAX], &[0]] {
            for data in [raw(b""), listed(json!([])), TensorData::Typed(Box::default())] {
                let found = tensor(Datatype::Fp32, shape, data).values(1);
                assert_eq!(found, Ok(TensorValues::Floats(vec![])), "{shape:?}");
            }
            let error = tensor(Datatype::Fp32, shape, listed(json!([1.0]))).values(1).unwrap_err();
            assert!(error.to_string().contains("has 0"), "{error}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_name_of_the_tensor() {
        let typed = |contents: InferTensorContents| TensorData::Typed(Box::new(contents));
        let ints =
            |all: &[i32]| typed(InferTensorContents { int_contents: all.to_vec(), ..Default::default() });
        let cases = [
            (Datatype::Int32, vec![5], raw(&[0; 20]), "shape [5] has 5 elements; at most 4 are accepted"),
            (Datatype::Int32, vec![u64::MAX, 2], raw(&[]), "more elements than can be counted"),
            (Datatype::Int32, vec![2], raw(&[0; 7]), "has 7 bytes, but shape [2] of INT32 has 2 times 4"),
            (Datatype::Bool, vec![2], raw(&[1, 2]), "byte 1 of its binary data is 2, not 0 or 1"),
            (
                Datatype::Bytes,
                vec![1],
                raw(&[9, 0, 0, 0, b'a']),
                "element 0 of its binary data is 9 bytes long",
            ),
            (Datatype::Bytes, vec![1], raw(&[1, 0, 0]), "ends with 3 bytes"),
            (Datatype::Bytes, vec![1], raw(&[0; 8]), "holds more than 1 values, but shape [1] has 1"),
            (Datatype::Bytes, vec![2], raw(&[0; 4]), "holds 1 values, but shape [2] has 2"),
            (Datatype::Bytes, vec![1], raw(&[1, 0, 0, 0, 0xff]), "element 0 is not UTF-8"),
            (Datatype::Int32, vec![1], listed(json!([1, 2])), "holds more than 1 values"),
            (Datatype::Int32, vec![3], listed(json!([[1], 2])), "holds 2 values, but shape [3] has 3"),
            (Datatype::Int8, vec![1], listed(json!([128])), "value 0 of its data is no INT8: found 128"),
            (Datatype::Uint16, vec![1], listed(json!([-1])), "value 0 of its data is no UINT16: found -1"),
            (Datatype::Bool, vec![1], listed(json!(["true"])), "is no BOOL: found \"true\""),
            (Datatype::Fp16, vec![1], listed(json!([1.5])), "FP16 has no form in JSON"),
            (Datatype::Bf16, vec![1], typed(InferTensorContents::default()), "send raw_input_contents"),
            (
                Datatype::Int64,
                vec![1],
                ints(&[1]),
                "its int64_contents hold 0 values, but shape [1] of INT64",
            ),
            (Datatype::Int8, vec![1], ints(&[-129]), "-129 is no INT8"),
        ];
        for (datatype, shape, data, text) in cases {
            let error = tensor(datatype, &shape, data).values(4).unwrap_err().to_string();
            assert!(error.starts_with("t: ") && error.contains(text), "{datatype} {shape:?}: {error}");
        }
    }

    #[test]
    fn a_value_becomes_json_unless_it_is_not_finite() {
        assert_eq!(TensorValues::Floats(vec![0.5, f64::NAN]).json(0), Some(json!(0.5)));
        assert_eq!(TensorValues::Floats(vec![0.5, f64::NAN]).json(1), None);
        assert_eq!(TensorValues::Unsigned(vec![u64::MAX]).json(0), Some(json!(u64::MAX)));
        assert_eq!(TensorValues::Texts(vec![]).json(0), None);
    }
}
