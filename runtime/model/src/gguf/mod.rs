//! GGUF files, versions 2 and 3, read from untrusted bytes.
//!
//! A model file comes from outside, so every count, length, offset and string is checked against the file
//! before it is used, and no allocation depends on a number that was not checked. Arrays stay where they are
//! in the file and are read in place; tensors are byte ranges. A refusal names the key or the tensor and says
//! what to do.
//!
//! Layout: magic, version, counts, key-value pairs, tensor descriptions, padding, tensor data; all
//! little-endian.

mod error;
mod metadata;
mod parse;
mod tensor;
mod unpack;
mod whole;
mod write;

pub use error::{GgufError, GgufProblem};
pub use metadata::{Array, Metadata, ValueType};
pub use parse::Gguf;
pub use tensor::TensorInfo;
pub use unpack::Packing;
pub use write::{GgufValue, GgufWriter};
