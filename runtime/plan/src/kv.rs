//! The element types of a key/value cache.

use half::{bf16, f16};

use crate::{Hyper, KV_BLOCK_TOKENS};

/// The type in which keys and values are cached. They are rounded to it when they are written; attention
/// reads the rounded numbers and computes in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum KvType {
    /// As they are computed.
    #[default]
    F32,
    /// IEEE half precision: eleven bits. Numbers beyond 65504 become 65504.
    F16,
    /// The upper half of an f32: eight bits, and the range of an f32.
    Bf16,
}

impl KvType {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// The word in settings and messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// Bytes of an element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Bytes of one cache block (all layers, keys and values, [`KV_BLOCK_TOKENS`] tokens) for a model.
    #[must_use]
    pub const fn block_bytes(self, hyper: &Hyper) -> u64 {
        (hyper.layers * 2 * KV_BLOCK_TOKENS * hyper.kv_heads * hyper.head_dim * self.bytes()) as u64
    }

    /// The number that the cache keeps of `v`: the nearest, halves to even.
    #[must_use]
    pub fn rounded(self, v: f32) -> f32 {
        match self {
            Self::F32 => v,
            Self::F16 => f16::from_f32_const(v.clamp(-F16_MAX, F16_MAX)).to_f32_const(),
            Self::Bf16 => bf16::from_f32_const(v).to_f32_const(),
        }
    }
}

/// The largest finite number of an f16.
const F16_MAX: f32 = 65_504.0;

impl std::fmt::Display for KvType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for KvType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|kv_type| kv_type.name() == text);
        found.ok_or_else(|| format!("{text:?} is no type of a cache; use \"f32\", \"f16\" or \"bf16\""))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_rounded_to_the_nearest() {
        assert_eq!(KvType::F32.rounded(0.1), 0.1);
        // 2^-4 · 1.6: eleven and eight bits of it.
        assert_eq!(KvType::F16.rounded(0.1), 0.099_975_586);
        assert_eq!(KvType::Bf16.rounded(0.1), 0.100_097_656);
        // A tie goes to the even neighbour.
        assert_eq!(KvType::Bf16.rounded(1.0 + 1.0 / 256.0), 1.0);
        assert_eq!(KvType::Bf16.rounded(1.0 + 3.0 / 256.0), 1.0 + 4.0 / 256.0);
    }

    #[test]
    fn large_numbers_stay_finite_and_nan_stays_nan() {
        assert_eq!(KvType::F16.rounded(-1e9), -65_504.0);
        assert!(KvType::Bf16.rounded(1e38).is_finite());
        for kv_type in KvType::ALL {
            assert!(kv_type.rounded(f32::NAN).is_nan(), "{kv_type}");
        }
    }

    #[test]
    fn the_word_of_a_type_is_its_name() {
        for kv_type in KvType::ALL {
            assert_eq!(kv_type.to_string().parse(), Ok(kv_type));
        }
        assert!("int8".parse::<KvType>().unwrap_err().contains("bf16"));
    }

    #[test]
    fn a_block_holds_keys_and_values_of_all_layers() {
        let hyper = Hyper { width: 8, layers: 3, heads: 4, kv_heads: 2, head_dim: 8, vocab: 8, context: 32 };
        assert_eq!(KvType::F32.block_bytes(&hyper), 3 * 2 * 16 * 2 * 8 * 4);
        assert_eq!(KvType::Bf16.block_bytes(&hyper), KvType::F32.block_bytes(&hyper) / 2);
    }
}
