//! Writing GGUF files: what the generator of small seeded models and the tests of the reader need.

use super::ValueType;
use super::tensor::dtype_code;
use trustformers_plan::DType;

/// Alignment of tensor data in the files written here, in bytes; the format's default.
const ALIGNMENT: usize = 32;

/// A value to write.
#[derive(Debug, Clone, PartialEq)]
pub enum GgufValue {
    /// A 32-bit count or id.
    U32(u32),
    /// A number.
    F32(f32),
    /// A truth value.
    Bool(bool),
    /// A text.
    String(String),
    /// A list of texts.
    Strings(Vec<String>),
    /// A list of integers.
    Integers(Vec<i32>),
    /// A list of numbers.
    Floats(Vec<f32>),
    /// A list of bytes.
    Bytes(Vec<u8>),
}

/// Collects key-value pairs and tensors and gives the bytes of a version 3 file.
#[derive(Debug, Default)]
pub struct GgufWriter {
    pairs: Vec<u8>,
    pair_count: u64,
    infos: Vec<u8>,
    tensor_count: u64,
    data: Vec<u8>,
}

impl GgufWriter {
    /// A file without content.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a key-value pair.
    pub fn pair(&mut self, key: &str, value: &GgufValue) -> &mut Self {
        put_text(&mut self.pairs, key);
        let out = &mut self.pairs;
        let mut put_type = |kind: ValueType| out.extend(kind.code().to_le_bytes());
        match value {
            GgufValue::U32(_) => put_type(ValueType::U32),
            GgufValue::F32(_) => put_type(ValueType::F32),
            GgufValue::Bool(_) => put_type(ValueType::Bool),
            GgufValue::String(_) => put_type(ValueType::String),
            GgufValue::Strings(_) => {
                put_type(ValueType::Array);
                put_type(ValueType::String);
            }
            GgufValue::Integers(_) => {
                put_type(ValueType::Array);
                put_type(ValueType::I32);
            }
            GgufValue::Floats(_) => {
                put_type(ValueType::Array);
                put_type(ValueType::F32);
            }
            GgufValue::Bytes(_) => {
                put_type(ValueType::Array);
                put_type(ValueType::U8);
            }
        }
        match value {
            GgufValue::U32(number) => out.extend(number.to_le_bytes()),
            GgufValue::F32(number) => out.extend(number.to_le_bytes()),
            GgufValue::Bool(truth) => out.push(u8::from(*truth)),
            GgufValue::String(text) => put_text(out, text),
            GgufValue::Strings(texts) => {
                out.extend((texts.len() as u64).to_le_bytes());
                texts.iter().for_each(|text| put_text(out, text));
            }
            GgufValue::Integers(numbers) => {
                out.extend((numbers.len() as u64).to_le_bytes());
                out.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
            }
            GgufValue::Floats(numbers) => {
                out.extend((numbers.len() as u64).to_le_bytes());
                out.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
            }
            GgufValue::Bytes(bytes) => {
                out.extend((bytes.len() as u64).to_le_bytes());
                out.extend(bytes);
            }
        }
        self.pair_count += 1;
        self
    }

    /// Adds a tensor. `dims` has the contiguous dimension first; `bytes` are its elements as `dtype` stores
    /// them.
    pub fn tensor(&mut self, name: &str, dims: &[usize], dtype: DType, bytes: &[u8]) -> &mut Self {
        put_text(&mut self.infos, name);
        self.infos.extend((dims.len() as u32).to_le_bytes());
        self.infos.extend(dims.iter().flat_map(|dim| (*dim as u64).to_le_bytes()));
        self.infos.extend(dtype_code(dtype).to_le_bytes());
        self.infos.extend((self.data.len() as u64).to_le_bytes());
        self.data.extend_from_slice(bytes);
        self.data.resize(self.data.len().next_multiple_of(ALIGNMENT), 0);
        self.tensor_count += 1;
        self
    }

    /// The bytes of the file.
    pub fn finish(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(3_u32.to_le_bytes());
        file.extend(self.tensor_count.to_le_bytes());
        file.extend(self.pair_count.to_le_bytes());
        file.extend_from_slice(&self.pairs);
        file.extend_from_slice(&self.infos);
        file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
        file.extend_from_slice(&self.data);
        file
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}
