//! The instruction sets of the kernels, selected at run time.
//!
//! One binary contains every tier; `cfg` only excludes x86 code from other architectures. A tier can be
//! forced, so that a machine with the best tier can test all.

use trustformers_plan::KvType;

/// A set of instructions, from the simplest to the fastest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// Instructions that every processor of the architecture has.
    Scalar,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with VNNI: four 8-bit products per lane and instruction.
    Avx512Vnni,
    /// VNNI and BF16: two products of bf16 per lane and instruction.
    Avx512Bf16,
    /// AVX-512 with VNNI and tile registers (AMX), which multiply 8-bit integers and bf16.
    Amx,
}

impl Tier {
    /// Every tier, simplest first.
    pub const ALL: [Self; 6] =
        [Self::Scalar, Self::Avx2, Self::Avx512, Self::Avx512Vnni, Self::Avx512Bf16, Self::Amx];

    /// Whether this processor has the instructions, and the system lets this process use them.
    #[must_use]
    #[cfg(target_arch = "x86_64")]
    pub fn is_available(self) -> bool {
        let avx2 = || {
            is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
        };
        let avx512 = || {
            avx2()
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
        };
        let vnni = || avx512() && is_x86_feature_detected!("avx512vnni");
        let bf16 = || vnni() && is_x86_feature_detected!("avx512bf16");
        match self {
            Self::Scalar => true,
            Self::Avx2 => avx2(),
            Self::Avx512 => avx512(),
            Self::Avx512Vnni => vnni(),
            Self::Avx512Bf16 => bf16(),
            // Every processor with AMX also has the BF16 extension of AVX-512; this tier does not need it.
            Self::Amx => vnni() && crate::amx::is_available(),
        }
    }

    /// Whether this processor has the instructions.
    #[must_use]
    #[cfg(not(target_arch = "x86_64"))]
    pub fn is_available(self) -> bool {
        self == Self::Scalar
    }

    /// The fastest tier of this processor.
    #[must_use]
    pub fn best() -> Self {
        Self::ALL.into_iter().rev().find(|tier| tier.is_available()).unwrap_or(Self::Scalar)
    }

    /// The type of the key/value cache with which long contexts are fastest: half the bytes to read, where
    /// vector instructions convert them.
    #[must_use]
    pub const fn fast_kv_type(self) -> KvType {
        match self {
            Self::Scalar => KvType::F32,
            Self::Avx2 | Self::Avx512 | Self::Avx512Vnni | Self::Avx512Bf16 | Self::Amx => KvType::Bf16,
        }
    }

    /// The name in descriptions and messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512-vnni",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Amx => "amx",
        }
    }
}

impl std::fmt::Display for Tier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
