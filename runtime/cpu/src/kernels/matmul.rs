//! Projections: every row of a step times the groups of a packed matrix.
//!
//! A tile is one group of 16 output features by up to [`EXACT_TILE`] or [`FAST_TILE`] rows, and keeps its sums in
//! registers over all columns. Each row's sums are formed in an order that depends on nothing but the tier, so a row
//! gives the same bits whatever shares its tile.
//!
//! *Exact*: weights become f32 once per tile (or once per group where many rows follow: the *panel*) and meet f32
//! activations. *Fast*: activations were quantised to 8 bits per 32 columns; a block's products are summed in integers
//! and scaled once.

#![allow(clippy::needless_range_loop, reason = "one index runs over several arrays, as in the formulas")]

use std::ops::Range;

use super::{
    quantise::QuantRows,
    simd::{LANES, Simd},
};
use crate::pack::{BLOCK_COLS, Form, Packed};

/// Rows of an exact tile with 32 registers; with 16 registers it is 3.
const EXACT_TILE: usize = 4;
/// Rows of a fast tile.
const FAST_TILE: usize = 4;

/// Rows of f32 to read.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) ptr: *const f32,
    /// Distance between rows, in values.
    pub(crate) stride: usize,
    pub(crate) count: usize,
}

/// Where a matrix's outputs go: `ptr` is row 0 of its first feature.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    pub(crate) ptr: *mut f32,
    pub(crate) stride: usize,
    /// Added to the outputs; laid out like them with its own stride.
    pub(crate) residual: Option<(*const f32, usize)>,
}

/// One thread's share of a projection.
pub(crate) struct MatMul<'a> {
    pub(crate) matrix: &'a Packed,
    pub(crate) groups: Range<usize>,
    pub(crate) input: Rows,
    /// The same rows quantised, where the fast kernels are wanted and the matrix is quantised.
    pub(crate) quantised: Option<QuantRows<'a>>,
    pub(crate) target: Target,
    /// Room for a whole dequantised group: `blocks * 32 * 16` values.
    pub(crate) panel: *mut f32,
}

/// Runs a share.
///
/// # Safety
/// The tier's instructions exist; pointers cover the rows and the matrix's features; no other thread touches the outputs
/// of these groups.
#[inline(always)]
pub(crate) unsafe fn run<S: Simd>(job: &MatMul<'_>) {
    // SAFETY: handed on.
    unsafe {
        match (job.matrix.form, job.quantised) {
            (Form::Q8, Some(x)) => fast::<S, Q8>(job, &x),
            (Form::Q4Min, Some(x)) => fast::<S, Q4Min>(job, &x),
            (Form::F32, _) => exact::<S, Float>(job),
            (Form::F16, _) => exact::<S, Half>(job),
            (Form::Q8, None) => exact::<S, Q8>(job),
            (Form::Q4Min, None) => exact::<S, Q4Min>(job),
        }
    }
}

/// A packed block as f32.
trait Unpack {
    /// Writes `columns` (at most 32) times 16 lanes to `out`.
    unsafe fn block<S: Simd>(values: *const u8, scales: *const u16, columns: usize, out: *mut f32);
}

/// A packed block times quantised activations.
trait Dot {
    /// Adds the block's share of [`FAST_TILE`] or fewer rows to `sums`; `x` is each row's block, scale and sum.
    unsafe fn block<S: Simd, const R: usize>(
        values: *const u8,
        scales: *const u16,
        x: &[(*const i8, f32, i32); R],
        sums: &mut [S::F; R],
    );
}

struct Float;
struct Half;
struct Q8;
struct Q4Min;

impl Unpack for Float {
    #[inline(always)]
    unsafe fn block<S: Simd>(values: *const u8, _: *const u16, columns: usize, out: *mut f32) {
        for c in 0..columns {
            // SAFETY: a column is 16 values on both sides.
            unsafe { S::store(out.add(c * LANES), S::load(values.cast::<f32>().add(c * LANES))) };
        }
    }
}

impl Unpack for Half {
    #[inline(always)]
    unsafe fn block<S: Simd>(values: *const u8, _: *const u16, columns: usize, out: *mut f32) {
        for c in 0..columns {
            // SAFETY: a column is 16 values on both sides.
            unsafe { S::store(out.add(c * LANES), S::load_half(values.cast::<u16>().add(c * LANES))) };
        }
    }
}

impl Unpack for Q8 {
    #[inline(always)]
    unsafe fn block<S: Simd>(values: *const u8, scales: *const u16, _: usize, out: *mut f32) {
        // SAFETY: a packed block is 512 bytes and 16 scales; `out` has 512 values.
        unsafe {
            let scale = S::load_half(scales);
            // An 11-bit scale times q + 128 or 128 is exact, so this is the stored weight, rounded nowhere.
            let offset = S::mul(scale, S::splat(-128.0));
            for k in 0..BLOCK_COLS / 4 {
                let four = S::load_i(values.add(k * 64));
                for j in 0..4 {
                    let weight = S::fma(S::byte(four, j), scale, offset);
                    S::store(out.add((4 * k + j as usize) * LANES), weight);
                }
            }
        }
    }
}

impl Unpack for Q4Min {
    #[inline(always)]
    unsafe fn block<S: Simd>(values: *const u8, scales: *const u16, _: usize, out: *mut f32) {
        // SAFETY: a packed block is 256 bytes, 16 scales and 16 minima; `out` has 512 values.
        unsafe {
            let (scale, min) = (S::load_half(scales), S::load_half(scales.add(LANES)));
            for k in 0..BLOCK_COLS / 8 {
                let eight = S::load_i(values.add(k * 64));
                let (low, high) = (S::low(eight), S::high(eight));
                for j in 0..4 {
                    let column = 4 * k + j as usize;
                    S::store(out.add(column * LANES), S::fma(S::byte(low, j), scale, min));
                    S::store(out.add((column + 16) * LANES), S::fma(S::byte(high, j), scale, min));
                }
            }
        }
    }
}

impl Dot for Q8 {
    #[inline(always)]
    unsafe fn block<S: Simd, const R: usize>(
        values: *const u8,
        scales: *const u16,
        x: &[(*const i8, f32, i32); R],
        sums: &mut [S::F; R],
    ) {
        // SAFETY: a packed block is 512 bytes and 16 scales, a quantised block 32 bytes.
        unsafe {
            let mut even = [S::zero_i(); R];
            let mut odd = [S::zero_i(); R];
            for k in 0..BLOCK_COLS / 8 {
                S::prefetch(values.wrapping_add(k * 128 + 4096));
                S::prefetch(values.wrapping_add(k * 128 + 4160));
                let (a, b) = (S::load_i(values.add(k * 128)), S::load_i(values.add(k * 128 + 64)));
                for r in 0..R {
                    let four = x[r].0.cast::<i32>().add(2 * k);
                    even[r] = S::dot_i8(even[r], a, four.read_unaligned());
                    odd[r] = S::dot_i8(odd[r], b, four.add(1).read_unaligned());
                }
            }
            let scale = S::load_half(scales);
            for r in 0..R {
                let mut products = S::to_f(S::add_i(even[r], odd[r]));
                if S::DOT_IS_OFFSET {
                    // Both are integers below 2^24: the difference is exact.
                    products = S::sub(products, S::splat((128 * x[r].2) as f32));
                }
                sums[r] = S::fma(products, S::mul(scale, S::splat(x[r].1)), sums[r]);
            }
        }
    }
}

impl Dot for Q4Min {
    #[inline(always)]
    unsafe fn block<S: Simd, const R: usize>(
        values: *const u8,
        scales: *const u16,
        x: &[(*const i8, f32, i32); R],
        sums: &mut [S::F; R],
    ) {
        // SAFETY: a packed block is 256 bytes, 16 scales and 16 minima, a quantised block 32 bytes.
        unsafe {
            let mut first = [S::zero_i(); R];
            let mut second = [S::zero_i(); R];
            for k in 0..BLOCK_COLS / 8 {
                S::prefetch(values.wrapping_add(k * 64 + 4096));
                let eight = S::load_i(values.add(k * 64));
                let (low, high) = (S::low(eight), S::high(eight));
                for r in 0..R {
                    let four = x[r].0.cast::<i32>().add(k);
                    first[r] = S::dot_u4(first[r], low, four.read_unaligned());
                    second[r] = S::dot_u4(second[r], high, four.add(4).read_unaligned());
                }
            }
            let (scale, min) = (S::load_half(scales), S::load_half(scales.add(LANES)));
            for r in 0..R {
                let products = S::to_f(S::add_i(first[r], second[r]));
                let scaled = S::fma(products, scale, S::mul(min, S::splat(x[r].2 as f32)));
                sums[r] = S::fma(scaled, S::splat(x[r].1), sums[r]);
            }
        }
    }
}

#[inline(always)]
unsafe fn fast<S: Simd, D: Dot>(job: &MatMul<'_>, x: &QuantRows<'_>) {
    for group in job.groups.clone() {
        let mut row = 0;
        while row < job.input.count {
            // SAFETY: the rows of a tile are below the count.
            row += unsafe {
                match job.input.count - row {
                    1 => fast_tile::<S, D, 1>(job, x, (group, row)),
                    2 => fast_tile::<S, D, 2>(job, x, (group, row)),
                    3 => fast_tile::<S, D, 3>(job, x, (group, row)),
                    _ => fast_tile::<S, D, FAST_TILE>(job, x, (group, row)),
                }
            };
        }
    }
}

#[inline(always)]
unsafe fn fast_tile<S: Simd, D: Dot, const R: usize>(
    job: &MatMul<'_>,
    x: &QuantRows<'_>,
    (group, row): (usize, usize),
) -> usize {
    let m = job.matrix;
    let (values, scales) = (m.values(group), m.scales(group));
    // SAFETY: blocks lie inside the group, rows inside the quantised rows.
    unsafe {
        let mut sums = [S::splat(0.0); R];
        for b in 0..m.blocks() {
            let blocks: [_; R] = std::array::from_fn(|r| x.block(row + r, b));
            let at = (values.add(b * m.block_bytes()), scales.add(b * m.block_scales()));
            D::block::<S, R>(at.0, at.1, &blocks, &mut sums);
        }
        for (r, sum) in sums.iter().enumerate() {
            store::<S>(job, (group, row + r), *sum);
        }
    }
    R
}

#[inline(always)]
unsafe fn exact<S: Simd, U: Unpack>(job: &MatMul<'_>) {
    let m = job.matrix;
    let tile = if S::WIDE { EXACT_TILE } else { 3 };
    for group in job.groups.clone() {
        let many = job.input.count > tile;
        if many {
            for b in 0..m.blocks() {
                // SAFETY: the panel holds a whole group.
                unsafe { unpack::<S, U>(m, (group, b), job.panel.add(b * BLOCK_COLS * LANES)) };
            }
        }
        let mut row = 0;
        while row < job.input.count {
            // SAFETY: the rows of a tile are below the count. With 32 registers four partial sums per row hide the
            // latency of the multiplication, with 16 there is room for two.
            row += unsafe {
                match (S::WIDE, job.input.count - row) {
                    (true, 1) => exact_tile::<S, U, 4, 1>(job, (group, row), many),
                    (true, 2) => exact_tile::<S, U, 4, 2>(job, (group, row), many),
                    (true, 3) => exact_tile::<S, U, 4, 3>(job, (group, row), many),
                    (true, _) => exact_tile::<S, U, 4, EXACT_TILE>(job, (group, row), many),
                    (false, 1) => exact_tile::<S, U, 2, 1>(job, (group, row), many),
                    (false, 2) => exact_tile::<S, U, 2, 2>(job, (group, row), many),
                    (false, _) => exact_tile::<S, U, 2, 3>(job, (group, row), many),
                }
            };
        }
    }
}

#[inline(always)]
unsafe fn unpack<S: Simd, U: Unpack>(m: &Packed, (group, b): (usize, usize), out: *mut f32) {
    let columns = BLOCK_COLS.min(m.cols - b * BLOCK_COLS);
    // SAFETY: the block lies inside the group; the caller gives room for a block.
    unsafe {
        let (values, scales) =
            (m.values(group).add(b * m.block_bytes()), m.scales(group).add(b * m.block_scales()));
        U::block::<S>(values, scales, columns, out);
    }
}

#[inline(always)]
unsafe fn exact_tile<S: Simd, U: Unpack, const SUMS: usize, const R: usize>(
    job: &MatMul<'_>,
    (group, row): (usize, usize),
    unpacked: bool,
) -> usize {
    let m = job.matrix;
    // SAFETY: columns are below the matrix's, rows below the count; the panel holds a block or the whole group.
    unsafe {
        let inputs: [*const f32; R] =
            std::array::from_fn(|r| job.input.ptr.add((row + r) * job.input.stride));
        let mut sums = [[S::splat(0.0); SUMS]; R];
        for b in 0..m.blocks() {
            let weights = if unpacked {
                job.panel.add(b * BLOCK_COLS * LANES)
            } else {
                unpack::<S, U>(m, (group, b), job.panel);
                job.panel
            };
            let first = b * BLOCK_COLS;
            let columns = BLOCK_COLS.min(m.cols - first);
            let mut c = 0;
            while c + SUMS <= columns {
                for s in 0..SUMS {
                    let weight = S::load(weights.add((c + s) * LANES));
                    for r in 0..R {
                        sums[r][s] = S::fma(weight, S::splat(*inputs[r].add(first + c + s)), sums[r][s]);
                    }
                }
                c += SUMS;
            }
            while c < columns {
                let weight = S::load(weights.add(c * LANES));
                for r in 0..R {
                    sums[r][0] = S::fma(weight, S::splat(*inputs[r].add(first + c)), sums[r][0]);
                }
                c += 1;
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            let mut sum = S::add(sums[0], sums[1]);
            if SUMS == 4 {
                sum = S::add(sum, S::add(sums[2], sums[SUMS - 1]));
            }
            store::<S>(job, (group, row + r), sum);
        }
    }
    R
}

/// Stores one row of a group, with the residual; features past the matrix's last are dropped.
#[inline(always)]
unsafe fn store<S: Simd>(job: &MatMul<'_>, (group, row): (usize, usize), sum: S::F) {
    let first = group * LANES;
    let features = LANES.min(job.matrix.rows - first);
    // SAFETY: only existing features are read and written.
    unsafe {
        let out = job.target.ptr.add(row * job.target.stride + first);
        let residual = job.target.residual.map(|(ptr, stride)| ptr.add(row * stride + first));
        if features == LANES {
            return match residual {
                Some(p) => S::store(out, S::add(sum, S::load(p))),
                None => S::store(out, sum),
            };
        }
        let mut lanes = [0.0; LANES];
        S::store(lanes.as_mut_ptr(), sum);
        for (i, lane) in lanes.iter().enumerate().take(features) {
            *out.add(i) = residual.map_or(*lane, |p| *lane + *p.add(i));
        }
    }
}
