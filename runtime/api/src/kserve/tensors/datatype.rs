//! The data types of the Open Inference Protocol.

use std::fmt;

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Datatype {
    Bool,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Int8,
    Int16,
    Int32,
    Int64,
    Fp16,
    Bf16,
    Fp32,
    Fp64,
    /// Texts here: the bytes of each element are UTF-8.
    Bytes,
}

impl Datatype {
    /// Every data type, in the order in which errors list them.
    pub(crate) const ALL: &'static [Self] = &[
        Self::Bool,
        Self::Uint8,
        Self::Uint16,
        Self::Uint32,
        Self::Uint64,
        Self::Int8,
        Self::Int16,
        Self::Int32,
        Self::Int64,
        Self::Fp16,
        Self::Bf16,
        Self::Fp32,
        Self::Fp64,
        Self::Bytes,
    ];

    /// The word of the protocol.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::Uint8 => "UINT8",
            Self::Uint16 => "UINT16",
            Self::Uint32 => "UINT32",
            Self::Uint64 => "UINT64",
            Self::Int8 => "INT8",
            Self::Int16 => "INT16",
            Self::Int32 => "INT32",
            Self::Int64 => "INT64",
            Self::Fp16 => "FP16",
            Self::Bf16 => "BF16",
            Self::Fp32 => "FP32",
            Self::Fp64 => "FP64",
            Self::Bytes => "BYTES",
        }
    }

    /// The data type of a word, in upper case as the protocol spells it.
    pub(crate) fn from_word(word: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|datatype| datatype.as_str() == word)
    }

    fn is_whole(self) -> bool {
        matches!(
            self,
            Self::Uint8
                | Self::Uint16
                | Self::Uint32
                | Self::Uint64
                | Self::Int8
                | Self::Int16
                | Self::Int32
                | Self::Int64
        )
    }

    fn is_float(self) -> bool {
        matches!(self, Self::Fp16 | Self::Bf16 | Self::Fp32 | Self::Fp64)
    }

    /// Whether a tensor of this type is accepted where `wanted` is asked for: any whole number for a whole
    /// number, any number for a float. Clients choose the width by their language and not by the model.
    pub(crate) fn serves_as(self, wanted: Self) -> bool {
        self == wanted
            || (self.is_whole() && wanted.is_whole())
            || ((self.is_whole() || self.is_float()) && wanted.is_float())
    }

    /// Bytes of an element; none for texts, which have a length each.
    pub(super) fn element_bytes(self) -> Option<usize> {
        match self {
            Self::Bool | Self::Uint8 | Self::Int8 => Some(1),
            Self::Uint16 | Self::Int16 | Self::Fp16 | Self::Bf16 => Some(2),
            Self::Uint32 | Self::Int32 | Self::Fp32 => Some(4),
            Self::Uint64 | Self::Int64 | Self::Fp64 => Some(8),
            Self::Bytes => None,
        }
    }

    /// The largest value of an unsigned type.
    pub(super) fn unsigned_max(self) -> u64 {
        match self {
            Self::Uint8 => u64::from(u8::MAX),
            Self::Uint16 => u64::from(u16::MAX),
            Self::Uint32 => u64::from(u32::MAX),
            _ => u64::MAX,
        }
    }

    /// Whether a signed type holds this value.
    pub(super) fn holds_signed(self, value: i64) -> bool {
        match self {
            Self::Int8 => i8::try_from(value).is_ok(),
            Self::Int16 => i16::try_from(value).is_ok(),
            Self::Int32 => i32::try_from(value).is_ok(),
            _ => true,
        }
    }
}

impl fmt::Display for Datatype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
