//! What can be wrong with a GGUF file. Each message names the place and the next step.

use super::ValueType;
use crate::arch::TensorProblem;
use crate::foreign::ForeignFile;
use std::path::PathBuf;
use thiserror::Error;

/// A problem together with the file that has it.
#[derive(Debug, Error)]
#[error("{}: {problem}", path.display())]
pub struct GgufError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    #[source]
    pub problem: GgufProblem,
}

/// What is wrong with a GGUF file.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum GgufProblem {
    /// The first four bytes are not `GGUF`.
    #[error("it is not a GGUF file (it begins with {found:02x?}); convert the model to GGUF")]
    NotGguf {
        /// Its first bytes, at most four.
        found: Vec<u8>,
    },
    /// Other content that is often saved in place of a model.
    #[error("it is not a GGUF file but {0}")]
    Foreign(ForeignFile),
    /// A GGUF file of another kind.
    #[error(
        "it is {found}, not a model; give the model's own file, and merge an adapter into the model before it is \
         converted"
    )]
    NotModel {
        /// What it is.
        found: String,
    },
    /// One of several files of a model.
    #[error(
        "it is part {number} of {count} of a model that is split over several files; give the folder that holds all of \
         them, NAME-00001-of-{count:05}.gguf and the others, and nothing else that ends in .gguf"
    )]
    Part {
        /// Which part, counted from 1.
        number: u64,
        /// How many there are.
        count: u64,
    },
    /// A key that may change what the model computes and is not read.
    #[error(
        "key {key} is not part of {group} as supported here; without it the model could answer wrongly, so the file \
         is refused"
    )]
    UnreadKey {
        /// The key.
        key: String,
        /// What the key belongs to, such as `the llama architecture`.
        group: String,
    },
    /// The file is for big-endian machines.
    #[error("it is a big-endian GGUF file; convert the model to little-endian")]
    BigEndian,
    /// A version that is not read.
    #[error("GGUF version {version} is not supported (2 and 3 are); convert the model again")]
    Version {
        /// The version it says.
        version: u32,
    },
    /// The file ends too early.
    #[error("it ends while {what} is read at byte {at}; it is truncated or corrupt: download it again")]
    Truncated {
        /// What was being read.
        what: String,
        /// Where.
        at: usize,
    },
    /// A count or length beyond the rest of the file, or beyond every model.
    #[error("{what} is {count}, more than {most}; the file is corrupt: download it again")]
    Absurd {
        /// What is counted.
        what: String,
        /// The count in the file.
        count: u64,
        /// The most that is possible.
        most: u64,
    },
    /// Text that is not UTF-8.
    #[error("{what} is not valid UTF-8; the file is corrupt: download it again")]
    Utf8 {
        /// Which text.
        what: String,
    },
    /// A value type that does not exist.
    #[error("key {key}: value type {code} does not exist; the file is corrupt or newer than this program")]
    ValueType {
        /// The key.
        key: String,
        /// The type's number.
        code: u32,
    },
    /// An array of arrays; no model needs one.
    #[error("key {key}: arrays of arrays are not supported; convert the model again")]
    NestedArray {
        /// The key.
        key: String,
    },
    /// A truth value that is neither 0 nor 1.
    #[error("key {key}: {byte} is neither false (0) nor true (1); the file is corrupt: download it again")]
    Bool {
        /// The key.
        key: String,
        /// The byte.
        byte: u8,
    },
    /// A key or tensor that occurs twice.
    #[error("{what} occurs twice; the file is corrupt: convert the model again")]
    Duplicate {
        /// Which.
        what: String,
    },
    /// A required key is absent.
    #[error("key {key} is missing; convert the model again with a current converter")]
    MissingKey {
        /// The key.
        key: String,
    },
    /// A key with a value of the wrong type.
    #[error("key {key} is {found}, {expected} was expected; convert the model again")]
    WrongType {
        /// The key.
        key: String,
        /// The type that was expected.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// A key with a value that cannot be served.
    #[error("key {key}: {why}")]
    BadValue {
        /// The key.
        key: String,
        /// What is wrong and what is supported.
        why: String,
    },
    /// An alignment that the format does not allow.
    #[error("key general.alignment is {alignment}; a power of two from 8 to 65536 was expected")]
    Alignment {
        /// What the file says.
        alignment: u64,
    },
    /// A tensor with an invalid description.
    #[error("tensor {name}: {why}")]
    Tensor {
        /// The tensor.
        name: String,
        /// What is wrong.
        why: String,
    },
    /// A tensor stored in a way that is not supported.
    #[error(
        "tensor {name} is stored as {dtype}, which is not supported; use a file with F32, F16, BF16, Q8_0, Q4_0, \
         Q4_1, Q5_0, Q4_K, Q5_K or Q6_K tensors"
    )]
    UnsupportedType {
        /// The tensor.
        name: String,
        /// The type's name, or its number where it has none.
        dtype: String,
    },
}

impl From<TensorProblem> for GgufProblem {
    fn from(TensorProblem { name, why }: TensorProblem) -> Self {
        Self::Tensor { name, why }
    }
}

impl GgufProblem {
    /// Whether the file may be sound and needs a feature that this version does not have.
    pub fn is_unsupported(&self) -> bool {
        matches!(
            self,
            Self::BigEndian
                | Self::Version { .. }
                | Self::UnsupportedType { .. }
                | Self::NotModel { .. }
                | Self::Part { .. }
                | Self::UnreadKey { .. }
        )
    }

    /// A key whose value has another type than was expected.
    pub(super) fn wrong_type(key: &str, expected: &'static str, found: ValueType) -> Self {
        Self::WrongType { key: key.to_owned(), expected, found: found.to_string() }
    }
}
