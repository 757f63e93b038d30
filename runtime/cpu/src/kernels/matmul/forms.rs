//! The meaning of the bytes of a packed block: one type per form.

use std::marker::PhantomData;

use crate::{
    kernels::simd::{LANES, Simd},
    pack::{BLOCK_COLS, Form, SUPER_BLOCKS},
};

/// A form whose weights are `scale * (quant - centre)` or `scale * quant + min`.
pub(crate) trait Quant: Copy {
    const FORM: Form;
    /// The centre's power of two; none where blocks have minima.
    const CENTRE: Option<i32>;
    /// Whether columns 0..16 and 16..32 of a block have different scales.
    const HALVES: bool = false;
    /// Columns `4 k .. 4 k + 4` of a block, as unsigned bytes `[row][column]`.
    unsafe fn four<S: Simd>(block: *const u8, k: usize) -> S::I;
    /// The scales of block `b` (of its half `half`) of a group.
    unsafe fn scale<S: Simd>(scales: *const u16, b: usize, half: usize) -> S::F;
    /// The minima of block `b` of a group, where blocks have them.
    unsafe fn min<S: Simd>(_scales: *const u16, _b: usize) -> S::F {
        // SAFETY: arithmetic only.
        unsafe { S::splat(0.0) }
    }
}

/// A form whose blocks can become f32.
pub(crate) trait Unpack {
    /// Whether [`Self::column`] returns what [`Self::block`] writes. It saves the writes where all rows fit
    /// in one tile.
    const HAS_COLUMNS: bool = false;
    /// Column `c` of a group, where the form has columns.
    unsafe fn column<S: Simd>(_values: *const u8, _c: usize) -> S::F {
        // SAFETY: arithmetic only.
        unsafe { S::splat(0.0) }
    }
    /// Whether columns are f32 already.
    const IS_F32: bool = false;
    /// Writes `columns` (at most 32) of block `b` of a group times 16 lanes to `out`.
    unsafe fn block<S: Simd>(values: *const u8, scales: *const u16, b: usize, columns: usize, out: *mut f32);
}

/// [`Form::F32`]
pub(crate) struct Floats;
/// [`Form::F16`]
pub(crate) struct HalfFloats;
/// [`Form::Bf16`]
pub(crate) struct UpperHalves;
/// A [`Quant`] as [`Unpack`].
pub(crate) struct Quants<Q>(PhantomData<Q>);
/// [`Form::Q8`]
#[derive(Clone, Copy)]
pub(crate) struct Q8;
/// [`Form::Q4`]
#[derive(Clone, Copy)]
pub(crate) struct Q4;
/// [`Form::Q5`]
#[derive(Clone, Copy)]
pub(crate) struct Q5;
/// [`Form::Q4Min`]
#[derive(Clone, Copy)]
pub(crate) struct Q4Min;
/// [`Form::Q4K`]
#[derive(Clone, Copy)]
pub(crate) struct Q4K;
/// [`Form::Q5K`]
#[derive(Clone, Copy)]
pub(crate) struct Q5K;
/// [`Form::Q6K`]
#[derive(Clone, Copy)]
pub(crate) struct Q6K;

/// Writes the columns that [`Unpack::column`] returns.
#[inline(always)]
unsafe fn columns<S: Simd, U: Unpack>(values: *const u8, b: usize, columns: usize, out: *mut f32) {
    for c in 0..columns {
        // SAFETY: a column is 16 values on both sides.
        unsafe { S::store(out.add(c * LANES), U::column::<S>(values, b * BLOCK_COLS + c)) };
    }
}

impl Unpack for Floats {
    const HAS_COLUMNS: bool = true;
    const IS_F32: bool = true;
    #[inline(always)]
    unsafe fn column<S: Simd>(values: *const u8, c: usize) -> S::F {
        // SAFETY: a column is 16 values.
        unsafe { S::load(values.cast::<f32>().add(c * LANES)) }
    }
    #[inline(always)]
    unsafe fn block<S: Simd>(values: *const u8, _: *const u16, b: usize, columns: usize, out: *mut f32) {
        // SAFETY: the caller's contract is the same.
        unsafe { self::columns::<S, Self>(values, b, columns, out) }
    }
}

impl Unpack for HalfFloats {
    const HAS_COLUMNS: bool = true;
    #[inline(always)]
    unsafe fn column<S: Simd>(values: *const u8, c: usize) -> S::F {
        // SAFETY: a column is 16 values.
        unsafe { S::load_half(values.cast::<u16>().add(c * LANES)) }
    }
    #[inline(always)]
    unsafe fn block<S: Simd>(values: *const u8, _: *const u16, b: usize, columns: usize, out: *mut f32) {
        // SAFETY: the caller's contract is the same.
        unsafe { self::columns::<S, Self>(values, b, columns, out) }
    }
}

impl Unpack for UpperHalves {
    const HAS_COLUMNS: bool = true;
    #[inline(always)]
    unsafe fn column<S: Simd>(values: *const u8, c: usize) -> S::F {
        // SAFETY: a pair of columns is 32 values.
        unsafe { S::load_bf16(values.cast::<u16>().add(c / 2 * 2 * LANES), c % 2 == 1) }
    }
    #[inline(always)]
    unsafe fn block<S: Simd>(values: *const u8, _: *const u16, b: usize, columns: usize, out: *mut f32) {
        // SAFETY: the caller's contract is the same.
        unsafe { self::columns::<S, Self>(values, b, columns, out) }
    }
}

impl<Q: Quant> Unpack for Quants<Q> {
    #[inline(always)]
    unsafe fn block<S: Simd>(values: *const u8, scales: *const u16, b: usize, _: usize, out: *mut f32) {
        // SAFETY: the block exists, and `out` has 32 columns; rows of quants are whole blocks.
        unsafe {
            let block = values.add(b * Q::FORM.block_bytes());
            for half in 0..2 {
                let scale = Q::scale::<S>(scales, b, half);
                // A scale of at most 17 bits times a power of two is exact, so a weight is rounded once, as
                // by `DType::dequantise`.
                let offset = match Q::CENTRE {
                    Some(centre) => S::mul(scale, S::splat(-((1 << centre) as f32))),
                    None => Q::min::<S>(scales, b),
                };
                for k in 4 * half..4 * half + 4 {
                    let four = Q::four::<S>(block, k);
                    for j in 0..4 {
                        let weight = S::fma(S::byte(four, j), scale, offset);
                        S::store(out.add((4 * k + j as usize) * LANES), weight);
                    }
                }
            }
        }
    }
}

/// The low four bits of step `k`.
#[inline(always)]
unsafe fn four_bits<S: Simd>(block: *const u8, k: usize) -> S::I {
    // SAFETY: the plane has 256 bytes.
    unsafe {
        let both = S::load_i(block.add(k % 4 * 64));
        S::mask(if k < 4 { both } else { S::shr(both, 4) }, 15)
    }
}

#[inline(always)]
unsafe fn five_bits<S: Simd>(block: *const u8, k: usize) -> S::I {
    // SAFETY: the plane of fifth bits has 64 bytes.
    unsafe {
        let bits = S::load_i(block.add(256));
        let bits = if k <= 4 { S::shl(bits, 4 - k as i32) } else { S::shr(bits, k as i32 - 4) };
        S::or_i(four_bits::<S>(block, k), S::mask(bits, 1 << 4))
    }
}

#[inline(always)]
unsafe fn six_bits<S: Simd>(block: *const u8, k: usize) -> S::I {
    // SAFETY: the plane of high bits has 128 bytes.
    unsafe {
        let bits = S::load_i(block.add(256 + k / 4 * 64));
        let bits = if k % 4 <= 2 { S::shl(bits, 4 - 2 * (k % 4) as i32) } else { S::shr(bits, 2) };
        S::or_i(four_bits::<S>(block, k), S::mask(bits, 3 << 4))
    }
}

/// f16 scales of block `b`, for forms with no other scales.
#[inline(always)]
unsafe fn plain_scale<S: Simd>(scales: *const u16, b: usize) -> S::F {
    // SAFETY: a block has sixteen scales.
    unsafe { S::load_half(scales.add(b * LANES)) }
}

/// The f16 `d` or `dmin` (`which`) times its byte for block `b` of a group.
#[inline(always)]
unsafe fn affine_scale<S: Simd>(scales: *const u16, b: usize, which: usize) -> S::F {
    // SAFETY: eight blocks share two f16 per row, and each has two bytes per row.
    unsafe {
        let shared = scales.add(b / SUPER_BLOCKS * Form::SUPER_WORDS_AFFINE);
        let own = shared.add((2 + b % SUPER_BLOCKS) * LANES).cast::<u8>();
        S::mul(S::load_half(shared.add(which * LANES)), S::load_u8(own.add(which * LANES)))
    }
}

impl Quant for Q8 {
    const FORM: Form = Form::Q8;
    const CENTRE: Option<i32> = Some(7);
    #[inline(always)]
    unsafe fn four<S: Simd>(block: *const u8, k: usize) -> S::I {
        // SAFETY: the plane has 512 bytes.
        unsafe { S::load_i(block.add(k * 64)) }
    }
    #[inline(always)]
    unsafe fn scale<S: Simd>(scales: *const u16, b: usize, _: usize) -> S::F {
        // SAFETY: the caller's contract is the same.
        unsafe { plain_scale::<S>(scales, b) }
    }
}

impl Quant for Q4 {
    const FORM: Form = Form::Q4;
    const CENTRE: Option<i32> = Some(3);
    #[inline(always)]
    unsafe fn four<S: Simd>(block: *const u8, k: usize) -> S::I {
        // SAFETY: the caller's contract is the same.
        unsafe { four_bits::<S>(block, k) }
    }
    #[inline(always)]
    unsafe fn scale<S: Simd>(scales: *const u16, b: usize, _: usize) -> S::F {
        // SAFETY: the caller's contract is the same.
        unsafe { plain_scale::<S>(scales, b) }
    }
}

impl Quant for Q5 {
    const FORM: Form = Form::Q5;
    const CENTRE: Option<i32> = Some(4);
    #[inline(always)]
    unsafe fn four<S: Simd>(block: *const u8, k: usize) -> S::I {
        // SAFETY: the caller's contract is the same.
        unsafe { five_bits::<S>(block, k) }
    }
    #[inline(always)]
    unsafe fn scale<S: Simd>(scales: *const u16, b: usize, _: usize) -> S::F {
        // SAFETY: the caller's contract is the same.
        unsafe { plain_scale::<S>(scales, b) }
    }
}

impl Quant for Q4Min {
    const FORM: Form = Form::Q4Min;
    const CENTRE: Option<i32> = None;
    #[inline(always)]
    unsafe fn four<S: Simd>(block: *const u8, k: usize) -> S::I {
        // SAFETY: the caller's contract is the same.
        unsafe { four_bits::<S>(block, k) }
    }
    #[inline(always)]
    unsafe fn scale<S: Simd>(scales: *const u16, b: usize, _: usize) -> S::F {
        // SAFETY: a block has sixteen scales and sixteen minima.
        unsafe { plain_scale::<S>(scales, 2 * b) }
    }
    #[inline(always)]
    unsafe fn min<S: Simd>(scales: *const u16, b: usize) -> S::F {
        // SAFETY: as above.
        unsafe { plain_scale::<S>(scales, 2 * b + 1) }
    }
}

impl Quant for Q4K {
    const FORM: Form = Form::Q4K;
    const CENTRE: Option<i32> = None;
    #[inline(always)]
    unsafe fn four<S: Simd>(block: *const u8, k: usize) -> S::I {
        // SAFETY: the caller's contract is the same.
        unsafe { four_bits::<S>(block, k) }
    }
    #[inline(always)]
    unsafe fn scale<S: Simd>(scales: *const u16, b: usize, _: usize) -> S::F {
        // SAFETY: the caller's contract is the same.
        unsafe { affine_scale::<S>(scales, b, 0) }
    }
    #[inline(always)]
    unsafe fn min<S: Simd>(scales: *const u16, b: usize) -> S::F {
        // SAFETY: the caller's contract is the same.
        unsafe { S::sub(S::splat(0.0), affine_scale::<S>(scales, b, 1)) }
    }
}

impl Quant for Q5K {
    const FORM: Form = Form::Q5K;
    const CENTRE: Option<i32> = None;
    #[inline(always)]
    unsafe fn four<S: Simd>(block: *const u8, k: usize) -> S::I {
        // SAFETY: the caller's contract is the same.
        unsafe { five_bits::<S>(block, k) }
    }
    #[inline(always)]
    unsafe fn scale<S: Simd>(scales: *const u16, b: usize, _: usize) -> S::F {
        // SAFETY: the caller's contract is the same.
        unsafe { affine_scale::<S>(scales, b, 0) }
    }
    #[inline(always)]
    unsafe fn min<S: Simd>(scales: *const u16, b: usize) -> S::F {
        // SAFETY: the caller's contract is the same.
        unsafe { S::sub(S::splat(0.0), affine_scale::<S>(scales, b, 1)) }
    }
}

impl Quant for Q6K {
    const FORM: Form = Form::Q6K;
    const CENTRE: Option<i32> = Some(5);
    const HALVES: bool = true;
    #[inline(always)]
    unsafe fn four<S: Simd>(block: *const u8, k: usize) -> S::I {
        // SAFETY: the caller's contract is the same.
        unsafe { six_bits::<S>(block, k) }
    }
    #[inline(always)]
    unsafe fn scale<S: Simd>(scales: *const u16, b: usize, half: usize) -> S::F {
        // SAFETY: eight blocks share an f16 per row, and each half block has a byte per row.
        unsafe {
            let shared = scales.add(b / SUPER_BLOCKS * Form::SUPER_WORDS_SIGNED);
            let own = shared.add((1 + b % SUPER_BLOCKS) * LANES).cast::<i8>();
            S::mul(S::load_half(shared), S::load_i8(own.add(half * LANES)))
        }
    }
}
