//! Tensors of answers, and the forms in which they leave.

use serde::{Serialize, Serializer};
use trustformers_proto::inference::InferTensorContents;

use super::Datatype;

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
