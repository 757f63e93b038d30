//! From bytes to checked metadata and tensor places.

use super::metadata::{ArrayPlace, Value};
use super::tensor::{DataRegion, RawTensor, check_apart};
use super::{GgufProblem, Metadata, TensorInfo, ValueType};
use crate::foreign::ForeignFile;
use std::collections::BTreeMap;

/// Most key-value pairs and most tensors of a file. Real models have tens of keys and at most some ten
/// thousand tensors. A description takes some hundred bytes in memory, so the bound keeps them below some
/// tens of MiB.
const MAX_ENTRIES: u64 = 100_000;

/// Longest key and tensor name in bytes; the format allows 65,535 for keys.
const MAX_NAME_BYTES: u64 = 65_535;

/// Fewest bytes of a key-value pair: key length, type, one byte.
const MIN_PAIR_BYTES: usize = 8 + 4 + 1;

/// Fewest bytes of a tensor description: name length, dimension count, one dimension, type, offset.
const MIN_TENSOR_BYTES: usize = 8 + 4 + 8 + 4 + 8;

/// A parsed file: its keys and the places of its tensors.
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
    /// The first problem of the file.
    pub fn parse(file: &[u8]) -> Result<Self, GgufProblem> {
        let mut cursor = Cursor { file, at: 0 };
        let version = cursor.header()?;
        let tensor_count = cursor.u64("the number of tensors")?;
        let pair_count = cursor.u64("the number of keys")?;
        let pair_count = cursor.plausible("the number of keys", pair_count, MIN_PAIR_BYTES)?;
        let mut values = BTreeMap::new();
        for _ in 0..pair_count {
            let (key, value) = cursor.pair()?;
            if values.insert(key.clone(), value).is_some() {
                return Err(GgufProblem::Duplicate { what: format!("key {key}") });
            }
        }
        let metadata = Metadata { values };
        let tensor_count = cursor.plausible("the number of tensors", tensor_count, MIN_TENSOR_BYTES)?;
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
            return Err(match ForeignFile::of(self.file) {
                Some(foreign) => GgufProblem::Foreign(foreign),
                None => GgufProblem::NotGguf { found: magic.to_vec() },
            });
        }
        self.at = 4;
        match self.u32("the version")? {
            version @ (2 | 3) => Ok(version),
            version if matches!(version.swap_bytes(), 1..=3) => Err(GgufProblem::BigEndian),
            version => Err(GgufProblem::Version { version }),
        }
    }

    /// A count of items that take at least `fewest` bytes each, checked against the rest of the file.
    fn plausible(&self, what: &str, count: u64, fewest: usize) -> Result<usize, GgufProblem> {
        let most = ((self.remaining() / fewest) as u64).min(MAX_ENTRIES);
        if count > most {
            return Err(GgufProblem::Absurd { what: what.to_owned(), count, most });
        }
        // At most MAX_ENTRIES, which fits any usize.
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
        let key = self.text("a key", MAX_NAME_BYTES)?;
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
        let name = self.text("a tensor's name", MAX_NAME_BYTES)?.to_owned();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{GgufValue, GgufWriter};
    use crate::seeded::SeededModel;
    use proptest::prelude::*;
    use trustformers_plan::DType;

    fn text(value: &str) -> GgufValue {
        GgufValue::String(value.to_owned())
    }

    fn floats(count: usize) -> Vec<u8> {
        vec![0; count * 4]
    }

    fn small() -> GgufWriter {
        let mut file = GgufWriter::new();
        file.pair("general.architecture", &text("llama"))
            .pair("a.count", &GgufValue::U32(7))
            .pair("a.list", &GgufValue::Strings(vec!["x".into(), "žluť".into()]))
            .pair("a.types", &GgufValue::Integers(vec![-1, 3]))
            .pair("a.truth", &GgufValue::Bool(true))
            .pair("a.number", &GgufValue::F32(0.5))
            .tensor("one", &[4], DType::F32, &floats(4))
            .tensor("two", &[2, 3], DType::F32, &floats(6));
        file
    }

    /// Bytes of a header with these counts and no content.
    fn header(version: u32, tensors: u64, pairs: u64) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(version.to_le_bytes());
        file.extend(tensors.to_le_bytes());
        file.extend(pairs.to_le_bytes());
        file
    }

    fn put(file: &mut Vec<u8>, text: &str) {
        file.extend((text.len() as u64).to_le_bytes());
        file.extend(text.as_bytes());
    }

    /// A file with one pair whose value has this type and these bytes.
    fn one_pair(code: u32, value: &[u8]) -> Vec<u8> {
        let mut file = header(3, 0, 1);
        put(&mut file, "k");
        file.extend(code.to_le_bytes());
        file.extend(value);
        file
    }

    /// A file with one tensor of this description and 4096 bytes of data.
    fn one_tensor(dims: &[u64], code: u32, offset: u64) -> Vec<u8> {
        let mut file = header(3, 1, 0);
        put(&mut file, "t");
        file.extend((dims.len() as u32).to_le_bytes());
        file.extend(dims.iter().flat_map(|d| d.to_le_bytes()));
        file.extend(code.to_le_bytes());
        file.extend(offset.to_le_bytes());
        file.resize(file.len().next_multiple_of(32) + 4096, 0);
        file
    }

    fn refusal(file: &[u8]) -> String {
        Gguf::parse(file).unwrap_err().to_string()
    }

    #[test]
    fn written_files_are_read() {
        let bytes = small().finish();
        let file = Gguf::parse(&bytes).unwrap();
        let meta = &file.metadata;
        assert_eq!(meta.string("general.architecture"), Ok("llama"));
        assert_eq!((meta.unsigned("a.count"), meta.size("a.count")), (Ok(7), Ok(7)));
        assert_eq!((meta.opt_bool("a.truth"), meta.float("a.number")), (Ok(Some(true)), Ok(0.5)));
        let list: Vec<&str> = meta.array("a.list", &bytes).unwrap().strings().unwrap().collect();
        assert_eq!(list, ["x", "žluť"]);
        assert!(meta.array("a.list", &bytes).unwrap().integers().is_none());
        let types: Vec<i64> = meta.array("a.types", &bytes).unwrap().integers().unwrap().collect();
        assert_eq!(types, [-1, 3]);
        let two = file.tensor("two").unwrap();
        assert_eq!((two.matrix(), two.range.len()), ((3, 2), 24));
        assert_eq!(file.tensor("one").unwrap().matrix(), (1, 4));
        let mut second = bytes.clone();
        second[4] = 2;
        assert_eq!(Gguf::parse(&second).unwrap().metadata, file.metadata);
    }

    #[test]
    fn wrong_access_names_the_key() {
        let bytes = small().finish();
        let meta = Gguf::parse(&bytes).unwrap().metadata;
        assert_eq!(meta.opt_unsigned("absent"), Ok(None));
        let messages = [
            meta.string("absent").unwrap_err().to_string(),
            meta.string("a.count").unwrap_err().to_string(),
            meta.unsigned("a.list").unwrap_err().to_string(),
            meta.float("a.count").unwrap_err().to_string(),
        ];
        let expected = [
            "key absent is missing; convert the model again with a current converter",
            "key a.count is an integer, a string was expected; convert the model again",
            "key a.list is an array, an integer was expected; convert the model again",
            "key a.count is an integer, a number was expected; convert the model again",
        ];
        assert_eq!(messages, expected);
    }

    #[test]
    fn foreign_files_are_told_apart() {
        assert!(refusal(b"").contains("not a GGUF file"));
        assert!(refusal(b"PK\x03\x04zip").contains("not a GGUF file but an archive (zip)"));
        assert!(refusal(b"GGML\x01\0\0\0").contains("[47, 47, 4d, 4c]"));
        assert!(refusal(&header(1, 0, 0)).contains("version 1 is not supported"));
        assert!(refusal(&header(4, 0, 0)).contains("version 4 is not supported"));
        assert!(refusal(&header(3_u32.swap_bytes(), 0, 0)).contains("big-endian"));
    }

    #[test]
    fn claimed_counts_are_checked_against_the_file() {
        assert!(refusal(&header(3, 0, u64::MAX)).contains("the number of keys is 18446744073709551615"));
        assert!(refusal(&header(3, 1 << 40, 0)).contains("the number of tensors is"));
        let mut long_key = header(3, 0, 1);
        long_key.extend(u64::MAX.to_le_bytes());
        long_key.extend([0; 40]);
        assert!(refusal(&long_key).contains("the length of a key is 18446744073709551615"));
        let array = |count: u64| {
            let mut value = 4_u32.to_le_bytes().to_vec();
            value.extend(count.to_le_bytes());
            value.extend([0; 8]);
            one_pair(9, &value)
        };
        assert!(refusal(&array(u64::MAX)).contains("the length of the array of key k"));
        assert!(refusal(&array(3)).contains("is 3, more than 2"));
        assert!(Gguf::parse(&array(2)).is_ok());
    }

    #[test]
    fn invalid_values_are_refused() {
        assert!(refusal(&one_pair(13, &[0; 16])).contains("value type 13 does not exist"));
        assert!(refusal(&one_pair(7, &[2; 16])).contains("2 is neither false (0) nor true (1)"));
        let text = [&2_u64.to_le_bytes()[..], &[0xff, 0xfe]].concat();
        assert!(refusal(&one_pair(8, &text)).contains("key k is not valid UTF-8"));
        let nested = [&9_u32.to_le_bytes()[..], &[0; 16]].concat();
        assert!(refusal(&one_pair(9, &nested)).contains("arrays of arrays"));
        let mut twice = GgufWriter::new();
        twice.pair("k", &GgufValue::U32(1)).pair("k", &GgufValue::U32(2));
        assert_eq!(
            refusal(&twice.finish()),
            "key k occurs twice; the file is corrupt: convert the model again"
        );
        for alignment in [0, 4, 33, 1 << 20] {
            let mut file = GgufWriter::new();
            file.pair("general.alignment", &GgufValue::U32(alignment));
            assert!(refusal(&file.finish()).contains("general.alignment"), "{alignment}");
        }
    }

    #[test]
    fn invalid_tensors_are_refused() {
        assert!(Gguf::parse(&one_tensor(&[32, 2], 0, 0)).is_ok());
        let cases = [
            (one_tensor(&[], 0, 0), "0 dimensions"),
            (one_tensor(&[1; 5], 0, 0), "5 dimensions"),
            (one_tensor(&[0, 3], 0, 0), "has a zero"),
            (one_tensor(&[u64::MAX], 0, 0), "tensor t"),
            (one_tensor(&[1 << 32, 1 << 32, 1 << 32], 0, 0), "larger than memory"),
            (one_tensor(&[33], 8, 0), "cannot be stored as Q8_0"),
            (one_tensor(&[32], 0, 1), "not a multiple of the file's alignment 32"),
            (one_tensor(&[32], 0, 4096), "the file is truncated"),
            (one_tensor(&[32], 0, u64::MAX - 31), "the file is truncated"),
            (one_tensor(&[32], 16, 0), "stored as IQ2_XXS, which is not supported"),
            (one_tensor(&[128], 10, 0), "cannot be stored as Q2_K"),
            (one_tensor(&[32], 4, 0), "stored as type 4"),
            (one_tensor(&[32], u32::MAX, 0), "stored as type 4294967295"),
        ];
        for (file, expected) in cases {
            let refusal = refusal(&file);
            assert!(refusal.contains("tensor t") && refusal.contains(expected), "{refusal}");
        }
        let mut twice = GgufWriter::new();
        twice.tensor("t", &[4], DType::F32, &floats(4)).tensor("t", &[4], DType::F32, &floats(4));
        assert!(refusal(&twice.finish()).contains("tensor t occurs twice"));
    }

    #[test]
    fn tensors_that_share_bytes_are_refused() {
        let mut file = header(3, 2, 0);
        for (name, offset) in [("a", 0_u64), ("b", 32)] {
            put(&mut file, name);
            file.extend(1_u32.to_le_bytes());
            file.extend(16_u64.to_le_bytes());
            file.extend(0_u32.to_le_bytes());
            file.extend(offset.to_le_bytes());
        }
        file.resize(file.len().next_multiple_of(32) + 4096, 0);
        assert!(refusal(&file).contains("tensor b: it shares bytes with tensor a"));
    }

    #[test]
    fn every_truncation_is_refused() {
        let file = small().finish();
        // The last tensor's padding may go; every byte before it is needed.
        let needed = Gguf::parse(&file).unwrap().tensors.iter().map(|t| t.range.end).max().unwrap();
        for end in 0..needed {
            assert!(Gguf::parse(&file[..end]).is_err(), "{end} of {needed} bytes");
        }
        assert!(Gguf::parse(&file[..needed]).is_ok());
    }

    proptest! {
        #[test]
        fn damaged_models_never_panic(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            end in any::<prop::sample::Index>(),
            cut in any::<bool>(),
        ) {
            let mut file = SeededModel { layers: 1, ..SeededModel::default() }.gguf();
            // Damage the descriptions, not the numbers of a tensor.
            let descriptions = Gguf::parse(&file).unwrap().tensors[0].range.start;
            for (at, byte) in changes {
                file[at.index(descriptions)] = byte;
            }
            if cut {
                file.truncate(end.index(file.len()));
            }
            let _read_or_refused = crate::Model::from_bytes(
                std::path::Path::new("damaged.gguf"),
                std::sync::Arc::new(file),
            );
        }

        #[test]
        fn any_bytes_behind_a_header_never_panic(
            tensors in 0_u64..4, pairs in 0_u64..4, body in prop::collection::vec(any::<u8>(), 0..400),
        ) {
            let mut file = header(3, tensors, pairs);
            file.extend(body);
            let _read_or_refused = Gguf::parse(&file);
        }
    }
}
