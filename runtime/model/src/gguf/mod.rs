//! GGUF files, versions 2 and 3, read from bytes that nobody has to trust.
//!
//! A model file comes from outside, so every count, length, offset and string is checked against the file before it is
//! used, and nothing is allocated by a number that the file merely claims. Arrays stay where they are in the file and
//! are read in place; tensors are byte ranges. What is refused is refused with the key or tensor it is about and what
//! to do.
//!
//! Layout: magic, version, counts, key-value pairs, tensor descriptions, padding, tensor data; all little-endian.

mod error;
mod metadata;
mod parse;
mod tensor;
mod write;

pub use error::{GgufError, GgufProblem};
pub use metadata::{Array, Metadata, ValueType};
pub use parse::Gguf;
pub use tensor::TensorInfo;
pub use write::{GgufValue, GgufWriter};
