//! From bytes to checked metadata and tensor places.

use super::metadata::{ArrayPlace, Value};
use super::tensor::{DataRegion, RawTensor, check_apart};
use super::{GgufProblem, Metadata, TensorInfo, ValueType};
use std::collections::BTreeMap;

/// Most key-value pairs and most tensors of a file. Real models have tens of keys and at most some ten thousand
/// tensors; the bound keeps a hostile file from making us hold more descriptions than it is worth.
const MOST_ENTRIES: u64 = 100_000;

/// Longest key and tensor name in bytes; the format allows 65,535 for keys.
const MOST_NAME_BYTES: u64 = 65_535;

/// Fewest bytes of a key-value pair: key length, type, one byte.
const FEWEST_PAIR_BYTES: usize = 8 + 4 + 1;

/// Fewest bytes of a tensor description: name length, dimension count, one dimension, type, offset.
const FEWEST_TENSOR_BYTES: usize = 8 + 4 + 8 + 4 + 8;

/// A parsed file: what it says about itself and where its tensors are.
#[derive(Debug, Clone, PartialEq)]
pub struct Gguf {
    /// The format's version, 2 or 3.
    pub version: u32,
    /// The key-value pairs.
    pub metadata: Metadata,
    /// The tensors in the file's order.
    pub tensors: Vec<TensorInfo>,
}

impl Gguf {
    /// Parses and checks a whole file.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn parse(file: &[u8]) -> Result<Self, GgufProblem> {
        let mut cursor = Cursor { file, at: 0 };
        let version = cursor.header()?;
        let tensor_count = cursor.u64("the number of tensors")?;
        let pair_count = cursor.u64("the number of keys")?;
        let pair_count = cursor.plausible("the number of keys", pair_count, FEWEST_PAIR_BYTES)?;
        let mut values = BTreeMap::new();
        for _ in 0..pair_count {
            let (key, value) = cursor.pair()?;
            if values.insert(key.clone(), value).is_some() {
                return Err(GgufProblem::Duplicate { what: format!("key {key}") });
            }
        }
        let metadata = Metadata { values };
        let tensor_count = cursor.plausible("the number of tensors", tensor_count, FEWEST_TENSOR_BYTES)?;
        let raw: Vec<RawTensor> = (0..tensor_count).map(|_| cursor.tensor()).collect::<Result<_, _>>()?;
        let region = data_region(&metadata, &cursor)?;
        let tensors: Vec<TensorInfo> =
            raw.into_iter().map(|tensor| tensor.resolve(region)).collect::<Result<_, _>>()?;
        check_apart(&tensors)?;
        Ok(Self { version, metadata, tensors })
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }
}

fn data_region(metadata: &Metadata, cursor: &Cursor<'_>) -> Result<DataRegion, GgufProblem> {
    let alignment = metadata.opt_unsigned("general.alignment")?.unwrap_or(32);
    if !alignment.is_power_of_two() || !(8..=65_536).contains(&alignment) {
        return Err(GgufProblem::Alignment { alignment });
    }
    // The position is within a file that is in memory and the alignment is small: the sum cannot overflow.
    let start = cursor.at.next_multiple_of(alignment as usize);
    Ok(DataRegion { start, end: cursor.file.len(), alignment })
}

/// A position in the file; every read is checked against its end.
struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn remaining(&self) -> usize {
        self.file.len() - self.at
    }

    fn take(&mut self, count: usize, what: &str) -> Result<&'a [u8], GgufProblem> {
        let truncated = || GgufProblem::Truncated { what: what.to_owned(), at: self.at };
        let end = self.at.checked_add(count).ok_or_else(truncated)?;
        let bytes = self.file.get(self.at..end).ok_or_else(truncated)?;
        self.at = end;
        Ok(bytes)
    }

    fn fixed<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufProblem> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N, what)?);
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32, GgufProblem> {
        self.fixed(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, GgufProblem> {
        self.fixed(what).map(u64::from_le_bytes)
    }

    fn header(&mut self) -> Result<u32, GgufProblem> {
        let magic = &self.file[..self.file.len().min(4)];
        if magic != b"GGUF" {
            return Err(GgufProblem::NotGguf { found: magic.to_vec() });
        }
        self.at = 4;
        match self.u32("the version")? {
            version @ (2 | 3) => Ok(version),
            version if matches!(version.swap_bytes(), 1..=3) => Err(GgufProblem::BigEndian),
            version => Err(GgufProblem::Version { version }),
        }
    }

    /// A count of things that take at least `fewest` bytes each, checked against what is left of the file.
    fn plausible(&self, what: &str, count: u64, fewest: usize) -> Result<usize, GgufProblem> {
        let most = ((self.remaining() / fewest) as u64).min(MOST_ENTRIES);
        if count > most {
            return Err(GgufProblem::Absurd { what: what.to_owned(), count, most });
        }
        // At most MOST_ENTRIES, which fits any usize.
        Ok(count as usize)
    }

    /// A length-prefixed text of at most `most` bytes.
    fn text(&mut self, what: &str, most: u64) -> Result<&'a str, GgufProblem> {
        let count = self.u64(what)?;
        let most = most.min(self.remaining() as u64);
        if count > most {
            return Err(GgufProblem::Absurd { what: format!("the length of {what}"), count, most });
        }
        let bytes = self.take(count as usize, what)?;
        std::str::from_utf8(bytes).map_err(|_| GgufProblem::Utf8 { what: what.to_owned() })
    }

    fn pair(&mut self) -> Result<(String, Value), GgufProblem> {
        let key = self.text("a key", MOST_NAME_BYTES)?;
        let kind = self.value_type(key)?;
        let what = format!("key {key}");
        let value = match kind {
            ValueType::U8 => Value::Unsigned(kind, u64::from(self.fixed::<1>(&what)?[0])),
            ValueType::I8 => Value::Signed(kind, i64::from(self.fixed::<1>(&what)?[0].cast_signed())),
            ValueType::U16 => Value::Unsigned(kind, u64::from(u16::from_le_bytes(self.fixed(&what)?))),
            ValueType::I16 => Value::Signed(kind, i64::from(i16::from_le_bytes(self.fixed(&what)?))),
            ValueType::U32 => Value::Unsigned(kind, u64::from(self.u32(&what)?)),
            ValueType::I32 => Value::Signed(kind, i64::from(i32::from_le_bytes(self.fixed(&what)?))),
            ValueType::U64 => Value::Unsigned(kind, self.u64(&what)?),
            ValueType::I64 => Value::Signed(kind, i64::from_le_bytes(self.fixed(&what)?)),
            ValueType::F32 => Value::Float(kind, f64::from(f32::from_le_bytes(self.fixed(&what)?))),
            ValueType::F64 => Value::Float(kind, f64::from_le_bytes(self.fixed(&what)?)),
            ValueType::Bool => Value::Bool(self.truth(key)?),
            ValueType::String => Value::String(self.text(&what, u64::MAX)?.to_owned()),
            ValueType::Array => Value::Array(self.array(key)?),
        };
        Ok((key.to_owned(), value))
    }

    fn value_type(&mut self, key: &str) -> Result<ValueType, GgufProblem> {
        let code = self.u32(&format!("the type of key {key}"))?;
        ValueType::from_code(code).ok_or_else(|| GgufProblem::ValueType { key: key.to_owned(), code })
    }

    fn truth(&mut self, key: &str) -> Result<bool, GgufProblem> {
        match self.fixed::<1>(key)?[0] {
            0 => Ok(false),
            1 => Ok(true),
            byte => Err(GgufProblem::Bool { key: key.to_owned(), byte }),
        }
    }

    fn array(&mut self, key: &str) -> Result<ArrayPlace, GgufProblem> {
        let element = self.value_type(key)?;
        if element == ValueType::Array {
            return Err(GgufProblem::NestedArray { key: key.to_owned() });
        }
        let what = format!("the array of key {key}");
        let count = self.u64(&what)?;
        let most = (self.remaining() / element.min_bytes()) as u64;
        if count > most {
            return Err(GgufProblem::Absurd { what: format!("the length of {what}"), count, most });
        }
        let len = count as usize;
        let start = self.at;
        if element == ValueType::String {
            for _ in 0..len {
                self.text(&what, u64::MAX)?;
            }
        } else {
            // The product was bounded by the file's length above.
            self.take(len * element.min_bytes(), &what)?;
        }
        Ok(ArrayPlace { element, len, range: start..self.at })
    }

    fn tensor(&mut self) -> Result<RawTensor, GgufProblem> {
        let name = self.text("a tensor's name", MOST_NAME_BYTES)?.to_owned();
        let what = format!("the description of tensor {name}");
        let dim_count = self.u32(&what)?;
        if !(1..=4).contains(&dim_count) {
            let why = format!(
                "{dim_count} dimensions; 1 to 4 are possible, the file is corrupt: download it again"
            );
            return Err(GgufProblem::Tensor { name, why });
        }
        let dims = (0..dim_count).map(|_| self.u64(&what)).collect::<Result<_, _>>()?;
        let type_code = self.u32(&what)?;
        let offset = self.u64(&what)?;
        Ok(RawTensor { name, dims, type_code, offset })
    }
}
