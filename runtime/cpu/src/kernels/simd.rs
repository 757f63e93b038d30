//! Vectors of sixteen lanes, for every tier.
//!
//! Kernels are generic over [`Simd`] and compiled per tier inside functions that enable the tier's
//! instructions. Everything here is inlined into those functions, which makes the intrinsics legal. Fused
//! multiply-add is a method because tiers round differently: the scalar tier has no such instruction and
//! rounds twice.

/// Lanes of a vector; the rows of a packed group.
pub(crate) const LANES: usize = 16;

/// Adding this to a small number leaves its nearest integer in the low bits (1.5 · 2²³).
pub(crate) const ROUND_MAGIC: f32 = 12_582_912.0;

/// Sixteen f32 (`F`) and sixteen times four bytes (`I`, which is also sixteen i32).
///
/// # Safety
/// Every method needs the instructions of its tier and, where it takes a pointer, the full width behind it.
pub(crate) trait Simd: Copy {
    /// Sixteen f32.
    type F: Copy;
    /// Sixty-four bytes, or sixteen i32.
    type I: Copy;
    /// Whether there are 32 registers of the full width.
    const WIDE: bool;
    /// Whether [`Self::dot_i8`] adds `128 · Σx`, because it takes its first operand as it is stored
    /// (`q + 128`).
    const DOT_IS_OFFSET: bool;

    unsafe fn splat(v: f32) -> Self::F;
    unsafe fn load(p: *const f32) -> Self::F;
    unsafe fn store(p: *mut f32, v: Self::F);
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// `1 / v` to about one unit in the last place, of numbers that are not subnormal and below 2^126.
    unsafe fn reciprocal(v: Self::F) -> Self::F;
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Sixteen halves.
    unsafe fn load_half(p: *const u16) -> Self::F;
    /// Sixteen bf16.
    unsafe fn load_upper(p: *const u16) -> Self::F;
    /// The first of each of sixteen pairs of bf16, or the second.
    unsafe fn load_bf16(p: *const u16, second: bool) -> Self::F;
    /// Sixteen bytes as numbers.
    unsafe fn load_u8(p: *const u8) -> Self::F;
    /// Sixteen signed bytes as numbers.
    unsafe fn load_i8(p: *const i8) -> Self::F;
    /// `2^n` where `v` is `n + ROUND_MAGIC`, `n` an integer in -126..=127.
    unsafe fn pow2(v: Self::F) -> Self::F;

    unsafe fn zero_i() -> Self::I;
    unsafe fn load_i(p: *const u8) -> Self::I;
    unsafe fn store_i(p: *mut u8, v: Self::I);
    unsafe fn add_i(a: Self::I, b: Self::I) -> Self::I;
    /// i32 to f32.
    unsafe fn to_f(v: Self::I) -> Self::F;
    unsafe fn splat_i(v: i32) -> Self::I;
    unsafe fn or_i(a: Self::I, b: Self::I) -> Self::I;
    /// Bitwise and of each byte and `byte`.
    unsafe fn mask(v: Self::I, byte: u8) -> Self::I;
    /// Each 32-bit lane, shifted up by `n` bits.
    unsafe fn shl(v: Self::I, n: i32) -> Self::I;
    /// Each 32-bit lane, shifted down by `n` bits; the upper bits of the result are undefined.
    unsafe fn shr(v: Self::I, n: i32) -> Self::I;
    /// Nearest integers, halves to even, of numbers between -2^31 and 2^31.
    unsafe fn round_i(v: Self::F) -> Self::I;
    /// Stores sixteen i32 of -128..=127 as bytes.
    unsafe fn store_i8(p: *mut i8, v: Self::I);
    unsafe fn sum_i(v: Self::I) -> i32;
    unsafe fn largest(v: Self::F) -> f32;
    /// Byte `j` (0..4, lowest first) of each 32-bit lane, unsigned, as f32.
    unsafe fn byte(v: Self::I, j: i32) -> Self::F;
    /// `acc + Σ w[4 i + j] · x[j]` per lane `i`; `w` are 0..=15, `x` four signed bytes.
    unsafe fn dot_u4(acc: Self::I, w: Self::I, x: i32) -> Self::I;
    /// The same for `w` stored as `q + 128`; see [`Self::DOT_IS_OFFSET`]. `x` are -127..=127.
    unsafe fn dot_i8(acc: Self::I, w: Self::I, x: i32) -> Self::I;
    /// Prefetches a cache line; any address is allowed.
    unsafe fn prefetch(p: *const u8);
}

/// f16 bits to f32, without a check of the processor's features on each call.
#[inline(always)]
pub(crate) fn half_to_f32(bits: u16) -> f32 {
    half::f16::from_bits(bits).to_f32_const()
}

/// The sum of all lanes, halves added to each other. One lane after the other would be a chain of sixteen
/// additions.
#[inline(always)]
pub(crate) fn tree_sum(lanes: &[f32; LANES]) -> f32 {
    let mut sums = *lanes;
    let mut count = LANES;
    while count > 1 {
        count /= 2;
        for i in 0..count {
            sums[i] += sums[i + count];
        }
    }
    sums[0]
}

/// Plain arrays.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Scalar {
    type F = [f32; LANES];
    type I = [i32; LANES];
    const WIDE: bool = false;
    const DOT_IS_OFFSET: bool = false;

    #[inline(always)]
    unsafe fn splat(v: f32) -> Self::F {
        [v; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        // SAFETY: the caller's pointer has sixteen values.
        unsafe { p.cast::<Self::F>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::F) {
        // SAFETY: the caller's pointer has sixteen values.
        unsafe { p.cast::<Self::F>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn reciprocal(v: Self::F) -> Self::F {
        v.map(f32::recip)
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        // Like the vector instructions, the second operand where the comparison fails.
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn load_half(p: *const u16) -> Self::F {
        // SAFETY: the caller's pointer has sixteen values.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(half_to_f32)
    }
    #[inline(always)]
    unsafe fn load_upper(p: *const u16) -> Self::F {
        // SAFETY: the caller's pointer has sixteen values.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16, second: bool) -> Self::F {
        // SAFETY: the caller's pointer has sixteen pairs.
        let pairs = unsafe { p.cast::<[[u16; 2]; LANES]>().read_unaligned() };
        pairs.map(|pair| f32::from_bits(u32::from(pair[usize::from(second)]) << 16))
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self::F {
        // SAFETY: the caller's pointer has sixteen values.
        unsafe { p.cast::<[u8; LANES]>().read() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self::F {
        // SAFETY: the caller's pointer has sixteen values.
        unsafe { p.cast::<[i8; LANES]>().read() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn pow2(v: Self::F) -> Self::F {
        v.map(|v| f32::from_bits((v.to_bits() << 23).wrapping_add(127 << 23)))
    }
    #[inline(always)]
    unsafe fn zero_i() -> Self::I {
        [0; LANES]
    }
    #[inline(always)]
    unsafe fn load_i(p: *const u8) -> Self::I {
        // SAFETY: the caller's pointer has 64 bytes.
        unsafe { p.cast::<Self::I>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_i(p: *mut u8, v: Self::I) {
        // SAFETY: the caller's pointer has 64 bytes.
        unsafe { p.cast::<Self::I>().write_unaligned(v) };
    }
    #[inline(always)]
    unsafe fn add_i(a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    unsafe fn to_f(v: Self::I) -> Self::F {
        v.map(|v| v as f32)
    }
    #[inline(always)]
    unsafe fn splat_i(v: i32) -> Self::I {
        [v; LANES]
    }
    #[inline(always)]
    unsafe fn or_i(a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    unsafe fn mask(v: Self::I, byte: u8) -> Self::I {
        v.map(|v| v & i32::from_ne_bytes([byte; 4]))
    }
    #[inline(always)]
    unsafe fn shl(v: Self::I, n: i32) -> Self::I {
        v.map(|v| v << n)
    }
    #[inline(always)]
    unsafe fn shr(v: Self::I, n: i32) -> Self::I {
        v.map(|v| v >> n)
    }
    #[inline(always)]
    unsafe fn round_i(v: Self::F) -> Self::I {
        v.map(|v| v.round_ties_even() as i32)
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, v: Self::I) {
        // SAFETY: the caller's pointer has sixteen bytes.
        unsafe { p.cast::<[i8; LANES]>().write(v.map(|v| v as i8)) };
    }
    #[inline(always)]
    unsafe fn sum_i(v: Self::I) -> i32 {
        v.iter().sum()
    }
    #[inline(always)]
    unsafe fn largest(v: Self::F) -> f32 {
        v.iter().fold(v[0], |a, &b| if b > a { b } else { a })
    }
    #[inline(always)]
    unsafe fn byte(v: Self::I, j: i32) -> Self::F {
        v.map(|v| ((v >> (8 * j)) & 255) as f32)
    }
    #[inline(always)]
    unsafe fn dot_u4(acc: Self::I, w: Self::I, x: i32) -> Self::I {
        let x = x.to_le_bytes().map(|b| i32::from(b.cast_signed()));
        std::array::from_fn(|i| (0..4).fold(acc[i], |sum, j| sum + ((w[i] >> (8 * j)) & 255) * x[j]))
    }
    #[inline(always)]
    unsafe fn dot_i8(acc: Self::I, w: Self::I, x: i32) -> Self::I {
        let x = x.to_le_bytes().map(|b| i32::from(b.cast_signed()));
        std::array::from_fn(|i| (0..4).fold(acc[i], |sum, j| sum + (((w[i] >> (8 * j)) & 255) - 128) * x[j]))
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
}
