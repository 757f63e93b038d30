//! Tensors of the Open Inference Protocol: data types, shapes, and the forms in which values travel.
//!
//! Values arrive as JSON, as little-endian bytes (the binary extension of HTTP, raw contents of gRPC) or in
//! the typed lists of gRPC, and leave in the same forms. Everything here is pure. The number of elements that
//! a shape promises is bounded before memory is taken for it, and a tensor that does not fit its shape or its
//! data type is refused with its name.

use std::fmt;

use axum::body::Bytes;
use half::{bf16, f16};
use serde_json::Value;
use trustformers_proto::inference::InferTensorContents;

use crate::error::ApiError;
use crate::json_body::found;

mod datatype;
mod output;

pub(crate) use datatype::Datatype;
pub(crate) use output::{OutputData, OutputTensor};

/// Dimensions of a shape that an error writes.
const MAX_WRITTEN_DIMENSIONS: usize = 8;

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

#[cfg(test)]
mod tests;
