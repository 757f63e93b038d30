//! Checks the table of a `Precompiled` normaliser before the library uses it. The library follows offsets in
//! it without a check: a damaged table would end the process at some text, or take gigabytes when it is read.
//!
//! The table is that of SentencePiece: the size of a double array, the array, and the texts that its values
//! point to, each with a zero byte at its end.

use crate::error::TokenizerProblem;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

/// Most bytes of a table. Those of published models take 0.3 MiB; a check looks at 255 children of each of
/// the array's numbers, so that this many take 270 million steps.
const MAX_BYTES: usize = 4 << 20;

/// Numbers of an array that share their upper bits: the children of one node.
const BLOCK: usize = 256;

/// A number of the array.
#[derive(Clone, Copy)]
struct Unit(usize);

impl Unit {
    fn has_value(self) -> bool {
        self.0 >> 8 & 1 == 1
    }

    fn value(self) -> usize {
        self.0 & ((1 << 31) - 1)
    }

    /// The byte that leads to it; a value has another one than every byte.
    fn label(self) -> usize {
        self.0 & (1 << 31 | 0xff)
    }

    fn offset(self) -> usize {
        (self.0 >> 10) << ((self.0 & 1 << 9) >> 6)
    }
}

/// Refuses a normaliser, or a step of one, whose table is damaged.
pub(super) fn check(normaliser: &Value) -> Result<(), TokenizerProblem> {
    let steps = normaliser["normalizers"].as_array().into_iter().flatten();
    for step in std::iter::once(normaliser).chain(steps).filter(|step| step["type"] == "Precompiled") {
        let wrong = |why: &str| TokenizerProblem::Entry {
            key: "normalizer.precompiled_charsmap",
            why: why.to_owned(),
        };
        let text = step["precompiled_charsmap"].as_str().ok_or_else(|| wrong("it is not a text"))?;
        if text.len() > MAX_BYTES {
            return Err(wrong("it is larger than those of all known models"));
        }
        let table = STANDARD.decode(text).map_err(|_| wrong("it is not base64"))?;
        check_table(&table).map_err(wrong)?;
    }
    Ok(())
}

fn check_table(table: &[u8]) -> Result<(), &'static str> {
    let (size, rest) = table.split_first_chunk::<4>().ok_or("it is shorter than the size of its array")?;
    let size = u32::from_le_bytes(*size) as usize / 4 * 4;
    let (array, texts) = rest.split_at_checked(size).ok_or("its array ends outside of it")?;
    let texts = std::str::from_utf8(texts).map_err(|_| "its texts are not UTF-8")?;
    let units: Vec<Unit> = array
        .chunks_exact(4)
        .map(|bytes| Unit(bytes.iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte))))
        .collect();
    let mut seen = vec![false; units.len()];
    let mut open = vec![0];
    while let Some(at) = open.pop() {
        let unit: Unit = *units.get(at).ok_or("its array is empty")?;
        let base = at ^ unit.offset();
        if (base / BLOCK + 1) * BLOCK > units.len() {
            return Err("its array points outside of itself");
        }
        if at != 0 && unit.has_value() && !texts.is_char_boundary(units[base].value()) {
            return Err("its array points outside of its texts");
        }
        for byte in 1..BLOCK {
            let child = base ^ byte;
            if units[child].label() == byte && !std::mem::replace(&mut seen[child], true) {
                open.push(child);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use tokenizers::NormalizedString;
    use tokenizers::Normalizer as _;
    use tokenizers::normalizers::Precompiled;

    /// A table of 512 numbers that replaces `a` by `b`, with some of them changed.
    fn table(changes: &[(usize, u32)]) -> Vec<u8> {
        let mut units = vec![0_u32; 512];
        // The children of the root begin at 256; that of `a` has a value, which stands beside it.
        units[0] = 256 << 10;
        units[256 ^ 0x61] = 0x61 | 1 << 8 | 1 << 10;
        units[256 ^ 0x60] = 1 << 31;
        for (at, unit) in changes {
            units[*at] = *unit;
        }
        let array = units.iter().flat_map(|unit| unit.to_le_bytes());
        2048_u32.to_le_bytes().into_iter().chain(array).chain(*b"b\0").collect()
    }

    fn refusal(table: &[u8]) -> Option<String> {
        let step = json!({"type": "Precompiled", "precompiled_charsmap": STANDARD.encode(table)});
        check(&json!({"type": "Sequence", "normalizers": [step]})).err().map(|problem| problem.to_string())
    }

    #[test]
    fn a_sound_table_is_used() {
        assert_eq!(refusal(&table(&[])), None);
        let normaliser = Precompiled::from(&table(&[])).unwrap();
        let mut text = NormalizedString::from("abc");
        normaliser.normalize(&mut text).unwrap();
        assert_eq!(text.get(), "bbc");
    }

    #[test]
    fn damaged_tables_are_refused() {
        let cases = [
            (table(&[(256 ^ 0x60, 1 << 31 | 99)]), "points outside of its texts"),
            (table(&[(0, 512 << 10)]), "points outside of itself"),
            (table(&[(256 ^ 0x61, 0x61 | 4096 << 10)]), "points outside of itself"),
            (table(&[])[..300].to_vec(), "its array ends outside of it"),
            ([u32::MAX.to_le_bytes().as_slice(), &[0; 8]].concat(), "its array ends outside of it"),
            (vec![0; 4], "its array is empty"),
            (vec![1], "shorter than the size of its array"),
            ([table(&[]), vec![0xff]].concat(), "not UTF-8"),
        ];
        for (table, expected) in cases {
            let refused = refusal(&table).unwrap_or_default();
            assert!(refused.contains(expected), "{refused:?} instead of {expected:?}");
        }
        let huge = json!({"type": "Precompiled", "precompiled_charsmap": "A".repeat(MAX_BYTES + 4)});
        assert!(check(&huge).is_err());
        assert!(check(&json!({"type": "Precompiled"})).is_err());
        assert!(check(&json!({"type": "BertNormalizer"})).is_ok());
    }
}
