//! The lanes of [`super::simd`] on x86-64: two AVX2 registers, or one AVX-512 register with or without VNNI
//! and BF16.
//!
//! Safety of every function below: the processor has the instructions, which [`crate::Tier::is_available`]
//! checked before the kernels were selected, and the trait's contract covers the pointers.
#![allow(
    unsafe_op_in_unsafe_fn,
    reason = "each body is one intrinsic; the condition for all of them stands in the module's documentation"
)]

use std::arch::x86_64::*;

use super::simd::Simd;

/// `2^n` from `n + ROUND_MAGIC`, half a vector.
#[inline(always)]
unsafe fn pow2_256(v: __m256) -> __m256 {
    let shifted = _mm256_slli_epi32(_mm256_castps_si256(v), 23);
    _mm256_castsi256_ps(_mm256_add_epi32(shifted, _mm256_set1_epi32(127 << 23)))
}

/// An estimate of 12 bits and a step of Newton's method, which doubles them.
#[inline(always)]
unsafe fn reciprocal_256(v: __m256) -> __m256 {
    let estimate = _mm256_rcp_ps(v);
    let error = _mm256_fnmadd_ps(v, estimate, _mm256_set1_ps(1.0));
    _mm256_fmadd_ps(estimate, error, estimate)
}

#[inline(always)]
unsafe fn byte_256(v: __m256i, j: i32) -> __m256 {
    let down = _mm256_srl_epi32(v, _mm_cvtsi32_si128(8 * j));
    _mm256_cvtepi32_ps(_mm256_and_si256(down, _mm256_set1_epi32(255)))
}

/// One of each pair of bf16 as f32: its bits are the upper half.
#[inline(always)]
unsafe fn bf16_256(pairs: __m256i, second: bool) -> __m256 {
    _mm256_castsi256_ps(if second {
        _mm256_and_si256(pairs, _mm256_set1_epi32(-1 << 16))
    } else {
        _mm256_slli_epi32::<16>(pairs)
    })
}

/// Eight bf16 as f32.
#[inline(always)]
unsafe fn upper_256(halves: __m128i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
}

/// Two products of at most 15 * 127 cannot saturate the 16-bit sums.
#[inline(always)]
unsafe fn dot_u4_256(acc: __m256i, w: __m256i, x: i32) -> __m256i {
    let pairs = _mm256_maddubs_epi16(w, _mm256_set1_epi32(x));
    _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
}

/// |w| times x with w's sign: two products of at most 128 * 127 stay below 2^15.
#[inline(always)]
unsafe fn dot_i8_256(acc: __m256i, w: __m256i, x: i32) -> __m256i {
    let w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(_mm256_set1_epi32(x), w));
    _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
}

/// AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

impl Simd for Avx2 {
    type F = [__m256; 2];
    type I = [__m256i; 2];
    const WIDE: bool = false;
    const DOT_IS_OFFSET: bool = false;

    #[inline(always)]
    unsafe fn splat(v: f32) -> Self::F {
        [_mm256_set1_ps(v); 2]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))]
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::F) {
        _mm256_storeu_ps(p, v[0]);
        _mm256_storeu_ps(p.add(8), v[1]);
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn reciprocal(v: Self::F) -> Self::F {
        [reciprocal_256(v[0]), reciprocal_256(v[1])]
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])]
    }
    #[inline(always)]
    unsafe fn load_half(p: *const u16) -> Self::F {
        [_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast()))]
    }
    #[inline(always)]
    unsafe fn load_upper(p: *const u16) -> Self::F {
        [upper_256(_mm_loadu_si128(p.cast())), upper_256(_mm_loadu_si128(p.add(8).cast()))]
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16, second: bool) -> Self::F {
        [
            bf16_256(_mm256_loadu_si256(p.cast()), second),
            bf16_256(_mm256_loadu_si256(p.add(16).cast()), second),
        ]
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self::F {
        let low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
        let high = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(8).cast()));
        [_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)]
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self::F {
        let low = _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()));
        let high = _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.add(8).cast()));
        [_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)]
    }
    #[inline(always)]
    unsafe fn pow2(v: Self::F) -> Self::F {
        [pow2_256(v[0]), pow2_256(v[1])]
    }
    #[inline(always)]
    unsafe fn zero_i() -> Self::I {
        [_mm256_setzero_si256(); 2]
    }
    #[inline(always)]
    unsafe fn load_i(p: *const u8) -> Self::I {
        [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())]
    }
    #[inline(always)]
    unsafe fn store_i(p: *mut u8, v: Self::I) {
        _mm256_storeu_si256(p.cast(), v[0]);
        _mm256_storeu_si256(p.add(32).cast(), v[1]);
    }
    #[inline(always)]
    unsafe fn add_i(a: Self::I, b: Self::I) -> Self::I {
        [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn to_f(v: Self::I) -> Self::F {
        [_mm256_cvtepi32_ps(v[0]), _mm256_cvtepi32_ps(v[1])]
    }
    #[inline(always)]
    unsafe fn splat_i(v: i32) -> Self::I {
        [_mm256_set1_epi32(v); 2]
    }
    #[inline(always)]
    unsafe fn or_i(a: Self::I, b: Self::I) -> Self::I {
        [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn mask(v: Self::I, byte: u8) -> Self::I {
        let mask = _mm256_set1_epi8(byte.cast_signed());
        [_mm256_and_si256(v[0], mask), _mm256_and_si256(v[1], mask)]
    }
    #[inline(always)]
    unsafe fn shl(v: Self::I, n: i32) -> Self::I {
        let n = _mm_cvtsi32_si128(n);
        [_mm256_sll_epi32(v[0], n), _mm256_sll_epi32(v[1], n)]
    }
    #[inline(always)]
    unsafe fn shr(v: Self::I, n: i32) -> Self::I {
        let n = _mm_cvtsi32_si128(n);
        [_mm256_srl_epi32(v[0], n), _mm256_srl_epi32(v[1], n)]
    }
    #[inline(always)]
    unsafe fn round_i(v: Self::F) -> Self::I {
        [_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1])]
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, v: Self::I) {
        // The pack instruction works within each half of the registers; the permutation restores the order.
        let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(v[0], v[1]));
        let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
        _mm_storeu_si128(p.cast(), bytes);
    }
    #[inline(always)]
    unsafe fn sum_i(v: Self::I) -> i32 {
        let mut lanes = [0i32; 8];
        _mm256_storeu_si256(lanes.as_mut_ptr().cast(), _mm256_add_epi32(v[0], v[1]));
        lanes.iter().sum()
    }
    #[inline(always)]
    unsafe fn largest(v: Self::F) -> f32 {
        let eight = _mm256_max_ps(v[0], v[1]);
        let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
    }
    #[inline(always)]
    unsafe fn byte(v: Self::I, j: i32) -> Self::F {
        [byte_256(v[0], j), byte_256(v[1], j)]
    }
    #[inline(always)]
    unsafe fn dot_u4(acc: Self::I, w: Self::I, x: i32) -> Self::I {
        [dot_u4_256(acc[0], w[0], x), dot_u4_256(acc[1], w[1], x)]
    }
    #[inline(always)]
    unsafe fn dot_i8(acc: Self::I, w: Self::I, x: i32) -> Self::I {
        [dot_i8_256(acc[0], w[0], x), dot_i8_256(acc[1], w[1], x)]
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
}

/// AVX-512; `VNNI` chooses the dot products.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const VNNI: bool>;

impl<const VNNI: bool> Simd for Avx512<VNNI> {
    type F = __m512;
    type I = __m512i;
    const WIDE: bool = true;
    const DOT_IS_OFFSET: bool = VNNI;

    #[inline(always)]
    unsafe fn splat(v: f32) -> Self::F {
        _mm512_set1_ps(v)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        _mm512_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::F) {
        _mm512_storeu_ps(p, v);
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        _mm512_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        _mm512_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        _mm512_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        _mm512_div_ps(a, b)
    }
    #[inline(always)]
    unsafe fn reciprocal(v: Self::F) -> Self::F {
        // One step of Newton's method doubles the 14 bits of the estimate.
        let estimate = _mm512_rcp14_ps(v);
        let error = _mm512_fnmadd_ps(v, estimate, _mm512_set1_ps(1.0));
        _mm512_fmadd_ps(estimate, error, estimate)
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        _mm512_max_ps(a, b)
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        _mm512_min_ps(a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn load_half(p: *const u16) -> Self::F {
        _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    unsafe fn load_upper(p: *const u16) -> Self::F {
        let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16, second: bool) -> Self::F {
        let pairs = _mm512_loadu_si512(p.cast());
        _mm512_castsi512_ps(if second {
            _mm512_and_si512(pairs, _mm512_set1_epi32(-1 << 16))
        } else {
            _mm512_slli_epi32::<16>(pairs)
        })
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self::F {
        _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self::F {
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())))
    }
    #[inline(always)]
    unsafe fn pow2(v: Self::F) -> Self::F {
        let shifted = _mm512_slli_epi32(_mm512_castps_si512(v), 23);
        _mm512_castsi512_ps(_mm512_add_epi32(shifted, _mm512_set1_epi32(127 << 23)))
    }
    #[inline(always)]
    unsafe fn zero_i() -> Self::I {
        _mm512_setzero_si512()
    }
    #[inline(always)]
    unsafe fn load_i(p: *const u8) -> Self::I {
        _mm512_loadu_si512(p.cast())
    }
    #[inline(always)]
    unsafe fn store_i(p: *mut u8, v: Self::I) {
        _mm512_storeu_si512(p.cast(), v);
    }
    #[inline(always)]
    unsafe fn add_i(a: Self::I, b: Self::I) -> Self::I {
        _mm512_add_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn to_f(v: Self::I) -> Self::F {
        _mm512_cvtepi32_ps(v)
    }
    #[inline(always)]
    unsafe fn splat_i(v: i32) -> Self::I {
        _mm512_set1_epi32(v)
    }
    #[inline(always)]
    unsafe fn or_i(a: Self::I, b: Self::I) -> Self::I {
        _mm512_or_si512(a, b)
    }
    #[inline(always)]
    unsafe fn mask(v: Self::I, byte: u8) -> Self::I {
        _mm512_and_si512(v, _mm512_set1_epi8(byte.cast_signed()))
    }
    #[inline(always)]
    unsafe fn shl(v: Self::I, n: i32) -> Self::I {
        _mm512_sll_epi32(v, _mm_cvtsi32_si128(n))
    }
    #[inline(always)]
    unsafe fn shr(v: Self::I, n: i32) -> Self::I {
        _mm512_srl_epi32(v, _mm_cvtsi32_si128(n))
    }
    #[inline(always)]
    unsafe fn round_i(v: Self::F) -> Self::I {
        _mm512_cvtps_epi32(v)
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, v: Self::I) {
        _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(v));
    }
    #[inline(always)]
    unsafe fn sum_i(v: Self::I) -> i32 {
        _mm512_reduce_add_epi32(v)
    }
    #[inline(always)]
    unsafe fn largest(v: Self::F) -> f32 {
        _mm512_reduce_max_ps(v)
    }
    #[inline(always)]
    unsafe fn byte(v: Self::I, j: i32) -> Self::F {
        let down = _mm512_srl_epi32(v, _mm_cvtsi32_si128(8 * j));
        _mm512_cvtepi32_ps(_mm512_and_si512(down, _mm512_set1_epi32(255)))
    }
    #[inline(always)]
    unsafe fn dot_u4(acc: Self::I, w: Self::I, x: i32) -> Self::I {
        let x = _mm512_set1_epi32(x);
        if VNNI {
            return _mm512_dpbusd_epi32(acc, w, x);
        }
        // Two products of at most 15 * 127 cannot saturate the 16-bit sums.
        _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(w, x), _mm512_set1_epi16(1)))
    }
    #[inline(always)]
    unsafe fn dot_i8(acc: Self::I, w: Self::I, x: i32) -> Self::I {
        let x = _mm512_set1_epi32(x);
        if VNNI {
            return _mm512_dpbusd_epi32(acc, w, x);
        }
        // AVX-512 has no sign instruction: x is negated where w is negative, by mask.
        let w = _mm512_xor_si512(w, _mm512_set1_epi8(-128));
        let signed = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
        let pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(w), signed);
        _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
}

/// Lanes that multiply bf16.
///
/// # Safety
/// As [`Simd`].
pub(crate) trait DotBf16: Simd {
    /// `acc + w[2 i] · x[0] + w[2 i + 1] · x[1]` per lane `i`; `x` are two bf16.
    unsafe fn dot_bf16(acc: Self::F, w: Self::I, x: i32) -> Self::F;
}

/// The instruction is part of the BF16 extension of AVX-512. Tiers that use it were checked for it.
impl DotBf16 for Avx512<true> {
    #[inline(always)]
    unsafe fn dot_bf16(acc: Self::F, w: Self::I, x: i32) -> Self::F {
        let pairs = |v: __m512i| std::mem::transmute::<__m512i, __m512bh>(v);
        _mm512_dpbf16_ps(acc, pairs(w), pairs(_mm512_set1_epi32(x)))
    }
}
