//! The key-value pairs of a GGUF file, with access by the type that is needed.

use super::GgufProblem;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

/// The type of a value, numbered as in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueType {
    /// An unsigned byte.
    U8,
    /// A signed byte.
    I8,
    /// An unsigned 16-bit integer.
    U16,
    /// A signed 16-bit integer.
    I16,
    /// An unsigned 32-bit integer.
    U32,
    /// A signed 32-bit integer.
    I32,
    /// A single-precision float.
    F32,
    /// A truth value.
    Bool,
    /// A UTF-8 text.
    String,
    /// A list of values of one type.
    Array,
    /// An unsigned 64-bit integer.
    U64,
    /// A signed 64-bit integer.
    I64,
    /// A double-precision float.
    F64,
}

impl ValueType {
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    /// The type with this number.
    pub(super) fn from_code(code: u32) -> Option<Self> {
        Self::ALL.get(code as usize).copied()
    }

    /// This type's number.
    pub(super) fn code(self) -> u32 {
        self as u32
    }

    /// Bytes of a value, or the fewest where they vary.
    pub(super) fn min_bytes(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::String => 8,
            Self::Array => 12,
        }
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::U8 | Self::I8 | Self::U16 | Self::I16 | Self::U32 | Self::I32 | Self::U64 | Self::I64 => {
                "an integer"
            }
            Self::F32 | Self::F64 => "a number",
            Self::Bool => "a truth value",
            Self::String => "a string",
            Self::Array => "an array",
        };
        f.write_str(name)
    }
}

/// One value as it was read. Integers and floats are widened; arrays stay in the file.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Unsigned(ValueType, u64),
    Signed(ValueType, i64),
    Float(ValueType, f64),
    Bool(bool),
    String(String),
    Array(ArrayPlace),
}

impl Value {
    fn kind(&self) -> ValueType {
        match self {
            Self::Unsigned(kind, _) | Self::Signed(kind, _) | Self::Float(kind, _) => *kind,
            Self::Bool(_) => ValueType::Bool,
            Self::String(_) => ValueType::String,
            Self::Array(_) => ValueType::Array,
        }
    }
}

/// Where a checked array lies in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ArrayPlace {
    pub(super) element: ValueType,
    pub(super) len: usize,
    pub(super) range: Range<usize>,
}

/// An array of a file, read in place. Its strings were checked when the file was opened.
#[derive(Debug, Clone, Copy)]
pub struct Array<'a> {
    element: ValueType,
    len: usize,
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// How many elements it has.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements as strings, or `None` when they are something else.
    pub fn strings(&self) -> Option<impl Iterator<Item = &'a str> + use<'a>> {
        if self.element != ValueType::String {
            return None;
        }
        let mut rest = self.bytes;
        Some((0..self.len).map_while(move |_| {
            let (head, tail) = rest.split_first_chunk::<8>()?;
            let (text, tail) = tail.split_at_checked(usize::try_from(u64::from_le_bytes(*head)).ok()?)?;
            rest = tail;
            std::str::from_utf8(text).ok()
        }))
    }

    /// The elements as 32-bit integers, or `None` when they are something else.
    pub fn integers(&self) -> Option<impl Iterator<Item = i64> + use<'a>> {
        let signed = match self.element {
            ValueType::I32 => true,
            ValueType::U32 => false,
            _ => return None,
        };
        Some(self.bytes.chunks_exact(4).map(move |b| {
            let raw = u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            if signed { i64::from(raw.cast_signed()) } else { i64::from(raw) }
        }))
    }
}

impl Array<'_> {
    /// The elements as bytes, or `None` when they are something else.
    pub fn bytes(&self) -> Option<&[u8]> {
        matches!(self.element, ValueType::U8 | ValueType::I8).then_some(self.bytes)
    }

    /// The elements as single-precision numbers, or `None` when they are something else.
    pub fn floats(&self) -> Option<Vec<f32>> {
        let number = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        (self.element == ValueType::F32).then(|| self.bytes.chunks_exact(4).map(number).collect())
    }
}

/// All key-value pairs of a file. Keys are borrowed from `file` when arrays are read, so it must be the file
/// that was parsed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata {
    pub(super) values: BTreeMap<String, Value>,
}

impl Metadata {
    /// Sets a count, where another format is brought into these keys.
    pub(crate) fn set_size(&mut self, key: String, size: u64) {
        self.values.insert(key, Value::Unsigned(ValueType::U64, size));
    }

    /// Sets a number, where another format is brought into these keys.
    pub(crate) fn set_number(&mut self, key: String, number: f64) {
        self.values.insert(key, Value::Float(ValueType::F64, number));
    }

    /// Whether the key is there.
    pub fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// All keys in alphabetical order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// A string that must be there.
    ///
    /// # Errors
    /// It is missing or not a string.
    pub fn string(&self, key: &str) -> Result<&str, GgufProblem> {
        self.opt_string(key)?.ok_or_else(|| missing(key))
    }

    /// A string that may be left out.
    ///
    /// # Errors
    /// It is not a string.
    pub fn opt_string(&self, key: &str) -> Result<Option<&str>, GgufProblem> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(GgufProblem::wrong_type(key, "a string", other.kind())),
        }
    }

    /// A count or id that must be there, in any of the integer types.
    ///
    /// # Errors
    /// It is missing, not an integer, or negative.
    pub fn unsigned(&self, key: &str) -> Result<u64, GgufProblem> {
        self.opt_unsigned(key)?.ok_or_else(|| missing(key))
    }

    /// A count or id that may be left out, in any of the integer types.
    ///
    /// # Errors
    /// It is not an integer, or negative.
    pub fn opt_unsigned(&self, key: &str) -> Result<Option<u64>, GgufProblem> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Unsigned(_, number)) => Ok(Some(*number)),
            Some(Value::Signed(_, number)) => u64::try_from(*number).map(Some).map_err(|_| {
                GgufProblem::BadValue { key: key.to_owned(), why: format!("{number} is negative") }
            }),
            Some(other) => Err(GgufProblem::wrong_type(key, "an integer", other.kind())),
        }
    }

    /// A count that fits in memory's address space and is at least 1.
    ///
    /// # Errors
    /// It is missing, not an integer, nought or too large.
    pub fn size(&self, key: &str) -> Result<usize, GgufProblem> {
        let number = self.unsigned(key)?;
        // No count of a model comes near 2³¹, and products of two such counts still fit 64 bits.
        usize::try_from(number).ok().filter(|n| (1..1 << 31).contains(n)).ok_or_else(|| {
            let why = format!("{number} is not between 1 and {}", (1_u32 << 31) - 1);
            GgufProblem::BadValue { key: key.to_owned(), why }
        })
    }

    /// A finite number that may be left out.
    ///
    /// # Errors
    /// It is not a float, or not finite.
    pub fn opt_float(&self, key: &str) -> Result<Option<f32>, GgufProblem> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Float(_, number)) if number.is_finite() => Ok(Some(*number as f32)),
            Some(Value::Float(_, number)) => {
                Err(GgufProblem::BadValue { key: key.to_owned(), why: format!("{number} is not finite") })
            }
            Some(other) => Err(GgufProblem::wrong_type(key, "a number", other.kind())),
        }
    }

    /// A finite number that must be there.
    ///
    /// # Errors
    /// It is missing, not a float, or not finite.
    pub fn float(&self, key: &str) -> Result<f32, GgufProblem> {
        self.opt_float(key)?.ok_or_else(|| missing(key))
    }

    /// A truth value that may be left out.
    ///
    /// # Errors
    /// It is not a truth value.
    pub fn opt_bool(&self, key: &str) -> Result<Option<bool>, GgufProblem> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(GgufProblem::wrong_type(key, "a truth value", other.kind())),
        }
    }

    /// An array that may be left out; `file` is the bytes that were parsed.
    ///
    /// # Errors
    /// It is not an array.
    pub fn opt_array<'a>(&self, key: &str, file: &'a [u8]) -> Result<Option<Array<'a>>, GgufProblem> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Array(place)) => {
                let bytes = file.get(place.range.clone()).ok_or_else(|| GgufProblem::Truncated {
                    what: format!("key {key}"),
                    at: place.range.start,
                })?;
                Ok(Some(Array { element: place.element, len: place.len, bytes }))
            }
            Some(other) => Err(GgufProblem::wrong_type(key, "an array", other.kind())),
        }
    }

    /// An array that must be there; `file` is the bytes that were parsed.
    ///
    /// # Errors
    /// It is missing or not an array.
    pub fn array<'a>(&self, key: &str, file: &'a [u8]) -> Result<Array<'a>, GgufProblem> {
        self.opt_array(key, file)?.ok_or_else(|| missing(key))
    }
}

fn missing(key: &str) -> GgufProblem {
    GgufProblem::MissingKey { key: key.to_owned() }
}
