//! The kernels, and the table that holds one tier's.
//!
//! Each kernel is generic over its lanes and inlined into one entry point per tier, which enables the tier's
//! instructions. A model holds a [`Kernels`], chosen once at load.

pub(crate) mod attention;
pub(crate) mod encoder;
pub(crate) mod matmul;
pub(crate) mod quantise;
pub(crate) mod rows;
pub(crate) mod simd;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
mod tests;

use attention::Attend;
use encoder::{EncoderAttend, LayerNorm};
use matmul::MatMul;
use quantise::QuantBuffer;

use crate::Tier;

/// One tier's kernels; their contracts are those of the generic functions they instantiate.
#[derive(Clone, Copy)]
pub(crate) struct Kernels {
    /// [`matmul::run`]
    pub(crate) matmul: unsafe fn(&MatMul<'_>),
    /// [`QuantBuffer::fill`]
    pub(crate) quantise: unsafe fn(&QuantBuffer, usize, *const f32),
    /// [`rows::rms_norm`]
    pub(crate) rms_norm: unsafe fn(*const f32, &[f32], f32, *mut f32),
    /// [`rows::silu_mul`]
    pub(crate) silu_mul: unsafe fn(*const f32, *const f32, *mut f32, usize),
    /// [`rows::add`]
    pub(crate) add: unsafe fn(*const f32, *const f32, *mut f32, usize),
    /// [`attention::chunk`]
    pub(crate) attend: unsafe fn(&Attend<'_>, usize, usize, *mut f32),
    /// [`attention::merge`]
    pub(crate) merge: unsafe fn(*const f32, usize, usize, (*mut f32, usize)),
    /// [`encoder::layer_norm`]
    pub(crate) layer_norm: unsafe fn(*const f32, &LayerNorm<'_>, *mut f32),
    /// [`encoder::gelu`]
    pub(crate) gelu: unsafe fn(*const f32, *mut f32, usize),
    /// [`encoder::attend`]
    pub(crate) encoder_attend: unsafe fn(&EncoderAttend),
}

/// Entry points of one tier: every kernel with the tier's lanes, under the tier's instructions.
macro_rules! tier {
    ($table:ident, $lanes:ty $(, $features:literal)?) => {
        mod $table {
            use super::{
                Attend, EncoderAttend, Kernels, LayerNorm, MatMul, QuantBuffer, attention, encoder, matmul, rows,
            };

            $(#[target_feature(enable = $features)])?
            unsafe fn matmul(job: &MatMul<'_>) {
                // SAFETY: the caller's contract is the same.
                unsafe { matmul::run::<$lanes>(job) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn quantise(buffer: &QuantBuffer, row: usize, input: *const f32) {
                // SAFETY: the caller's contract is the same.
                unsafe { buffer.fill(row, input) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn rms_norm(input: *const f32, weight: &[f32], eps: f32, out: *mut f32) {
                // SAFETY: the caller's contract is the same.
                unsafe { rows::rms_norm(input, weight, eps, out) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn silu_mul(gate: *const f32, up: *const f32, out: *mut f32, len: usize) {
                // SAFETY: the caller's contract is the same.
                unsafe { rows::silu_mul::<$lanes>(gate, up, out, len) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn add(a: *const f32, b: *const f32, out: *mut f32, len: usize) {
                // SAFETY: the caller's contract is the same.
                unsafe { rows::add(a, b, out, len) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn attend(a: &Attend<'_>, kv_head: usize, chunk: usize, out: *mut f32) {
                // SAFETY: the caller's contract is the same.
                unsafe { attention::chunk::<$lanes>(a, kv_head, chunk, out) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn merge(partials: *const f32, stride: usize, chunks: usize, out: (*mut f32, usize)) {
                // SAFETY: the caller's contract is the same.
                unsafe { attention::merge(partials, stride, chunks, out) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn layer_norm(input: *const f32, norm: &LayerNorm<'_>, out: *mut f32) {
                // SAFETY: the caller's contract is the same.
                unsafe { encoder::layer_norm(input, norm, out) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn gelu(input: *const f32, out: *mut f32, len: usize) {
                // SAFETY: the caller's contract is the same.
                unsafe { encoder::gelu::<$lanes>(input, out, len) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn encoder_attend(a: &EncoderAttend) {
                // SAFETY: the caller's contract is the same.
                unsafe { encoder::attend::<$lanes>(a) }
            }

            pub(super) const TABLE: Kernels = Kernels {
                matmul, quantise, rms_norm, silu_mul, add, attend, merge, layer_norm, gelu, encoder_attend,
            };
        }
    };
}

tier!(scalar, super::simd::Scalar);
#[cfg(target_arch = "x86_64")]
tier!(avx2, super::x86::Avx2, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
tier!(avx512, super::x86::Avx512<false>, "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl");
#[cfg(target_arch = "x86_64")]
tier!(avx512_vnni, super::x86::Avx512<true>, "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni");

impl Kernels {
    /// The kernels of an available tier.
    ///
    /// # Panics
    /// When the processor lacks the tier's instructions: [`crate::CpuBackend::new`] has refused it before.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn of(tier: Tier) -> Self {
        assert!(tier.is_available(), "this processor has no {tier}");
        match tier {
            Tier::Scalar => scalar::TABLE,
            Tier::Avx2 => avx2::TABLE,
            Tier::Avx512 => avx512::TABLE,
            Tier::Avx512Vnni => avx512_vnni::TABLE,
        }
    }

    /// The kernels of an available tier.
    ///
    /// # Panics
    /// When the processor lacks the tier's instructions: [`crate::CpuBackend::new`] has refused it before.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn of(tier: Tier) -> Self {
        assert!(tier.is_available(), "this processor has no {tier}");
        scalar::TABLE
    }
}
