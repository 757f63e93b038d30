//! Projections: every row of a step times a packed matrix.
//!
//! Work is divided into *units*: two adjacent groups of 16 output features, or the same group of a gate and
//! of the matrix that it gates. A *tile* is a unit by a few rows. Its sums stay in registers, so that a
//! loaded and unpacked weight is used for several rows, and an activation for 32 features. The order in which
//! a row is summed depends on the tier only, so a row gives the same bits in every tile.
//!
//! * [`exact`]: weights become f32 and are multiplied by f32 activations.
//! * [`block_scaled`]: activations were quantised to 8 bits per 32 columns; a block's products are summed in
//!   integers and scaled together. Where several tiles read a unit, its weights are unpacked once for all.
//! * [`int8`]: activations have one scale per row and weights one per feature; sums are integers over all
//!   columns.
//! * [`bf16`]: weights are bf16 and activations were rounded to it; sums are f32.
//! * [`tiles`]: the last three on tile registers, and block-scaled weights that become bf16 for many rows.

#![allow(clippy::needless_range_loop, reason = "one index runs over several arrays, as in the formulas")]

/// Repeats a body for each row of a tile, with the row's number as a constant. The compiler does not unroll a
/// loop of this length, and sums with a variable index would be in memory: their loads and stores took most
/// of the time.
macro_rules! each_row {
    ($rows:expr, $row:ident => $body:block) => {
        each_row!(@ $rows, $row => $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    };
    (@ $rows:expr, $row:ident => $body:block, $($number:literal)*) => {
        const { assert!($rows <= 16) };
        $(if $number < $rows {
            let $row: usize = $number;
            $body
        })*
    };
}

/// Most rows of a tile in [`by_rows`].
const MOST_ROWS: usize = 12;

/// Calls a tile's function with the number of its rows, of 1 to [`MOST_ROWS`], as its last constant.
macro_rules! by_rows {
    ($rows:expr, $tile:ident::<$($lanes:ty),*> $arguments:tt) => {
        by_rows!(@ $rows, $tile, { $($lanes),* }, $arguments, 1 2 3 4 5 6 7 8 9 10 11)
    };
    (@ $rows:expr, $tile:ident, $lanes:tt, $arguments:tt, $($number:literal)*) => {
        match $rows {
            $($number => by_rows!(@call $tile, $lanes, $number, $arguments),)*
            _ => by_rows!(@call $tile, $lanes, { super::MOST_ROWS }, $arguments),
        }
    };
    (@call $tile:ident, { $($lanes:ty),* }, $number:tt, ($($argument:expr),*)) => {
        $tile::<$($lanes,)* $number>($($argument),*)
    };
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod bf16;
pub(crate) mod block_scaled;
pub(crate) mod exact;
mod forms;
pub(crate) mod int8;
#[cfg(target_arch = "x86_64")]
pub(crate) mod tiles;

use std::ops::Range;

pub(crate) use forms::{Floats, HalfFloats, Q4, Q4K, Q4Min, Q5, Q5K, Q6K, Q8, Quants, UpperHalves};

use super::{
    encoder,
    quantise::{Bf16Rows, BlockScaledRows, Int8Rows},
    rows,
    simd::{LANES, Simd},
};
use crate::pack::Packed;

/// Values of scratch memory for matrices of at most `cols` columns: sums of a strip of rows, then panels of
/// unpacked weights, which are larger for tile registers.
pub(crate) fn scratch_len(cols: usize, has_tiles: bool) -> usize {
    let panels = exact::PANELS_LEN.max(block_scaled::unpacked_len(cols));
    let panels = if has_tiles { tile_panels_len(cols).max(panels) } else { panels };
    exact::STRIP_ROWS * 2 * LANES + panels
}

#[cfg(target_arch = "x86_64")]
const fn tile_panels_len(cols: usize) -> usize {
    tiles::scratch_len(cols)
}

#[cfg(not(target_arch = "x86_64"))]
const fn tile_panels_len(_: usize) -> usize {
    0
}

/// Rows of f32 to read.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) ptr: *const f32,
    /// Distance between rows, in values.
    pub(crate) stride: usize,
}

/// The input rows of a projection, by their form.
#[derive(Clone, Copy)]
pub(crate) enum Input<'a> {
    Floats(Rows),
    BlockScaled(&'a BlockScaledRows),
    Int8(&'a Int8Rows),
    #[cfg_attr(
        not(target_arch = "x86_64"),
        allow(dead_code, reason = "no other processor's tier multiplies them yet")
    )]
    Bf16(&'a Bf16Rows),
    /// Rows of prompts, for weights of blocks that become bf16 first; see [`tiles::panels`].
    #[cfg_attr(
        not(target_arch = "x86_64"),
        allow(dead_code, reason = "no other processor's tier multiplies them yet")
    )]
    Panels(&'a Bf16Rows),
}

/// What follows the bias.
#[derive(Clone, Copy)]
pub(crate) enum Activation<'a> {
    None,
    Gelu,
    /// The silu of the matrix's output times the output of a second matrix of the same form and size, with
    /// its own bias.
    Gate(&'a Packed, Option<&'a [f32]>),
}

/// The outputs: `ptr` is row 0 of the first feature.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) ptr: *mut f32,
    pub(crate) stride: usize,
    /// Added to the sums; filled up to whole groups.
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) activation: Activation<'a>,
    /// Added at the end; laid out like the outputs with its own stride.
    pub(crate) residual: Option<(*const f32, usize)>,
}

/// One thread's share of a projection.
pub(crate) struct MatMul<'a> {
    pub(crate) matrix: &'a Packed,
    /// Below [`Self::units_of`].
    pub(crate) units: Range<usize>,
    pub(crate) rows: usize,
    /// The output row of each row, where they are not the first ones in order.
    pub(crate) row_map: Option<&'a [u32]>,
    pub(crate) input: Input<'a>,
    pub(crate) target: Target<'a>,
    /// [`scratch_len`] values that only this thread uses.
    pub(crate) scratch: *mut f32,
}

/// A group's streams.
#[derive(Clone, Copy)]
struct Side {
    values: *const u8,
    scales: *const u16,
}

impl MatMul<'_> {
    /// Units of a projection.
    pub(crate) const fn units_of(matrix: &Packed, activation: &Activation<'_>) -> usize {
        match activation {
            Activation::Gate(..) => matrix.groups(),
            Activation::None | Activation::Gelu => matrix.groups().div_ceil(2),
        }
    }

    /// The two groups of a unit. Where the last unit has one group, that group is both.
    fn sides(&self, unit: usize) -> [Side; 2] {
        let of = |m: &Packed, group: usize| Side { values: m.values(group), scales: m.scales(group) };
        match self.target.activation {
            Activation::Gate(up, _) => [of(self.matrix, unit), of(up, unit)],
            Activation::None | Activation::Gelu => {
                let last = self.matrix.groups() - 1;
                [of(self.matrix, 2 * unit), of(self.matrix, (2 * unit + 1).min(last))]
            }
        }
    }

    /// The sums of row `row` of a strip: 16 of one group, then 16 of the other.
    const fn sums(&self, row: usize) -> *mut f32 {
        self.scratch.wrapping_add(row * 2 * LANES)
    }
}

/// Applies bias and activation to the sums of `count` rows of a unit (see [`MatMul::sums`]) and stores them.
#[inline(always)]
unsafe fn finish<S: Simd>(job: &MatMul<'_>, unit: usize, first_row: usize, count: usize) {
    let target = &job.target;
    for i in 0..count {
        // SAFETY: the sums were stored; features and rows exist.
        unsafe {
            let sums = [S::load(job.sums(i)), S::load(job.sums(i).add(LANES))];
            if let Activation::Gate(_, up_bias) = target.activation {
                let gate = biased::<S>(sums[0], target.bias, unit);
                let up = biased::<S>(sums[1], up_bias, unit);
                store::<S>(job, unit, first_row + i, rows::gated::<S>(gate, up));
                continue;
            }
            for (side, sum) in sums.into_iter().enumerate() {
                let group = 2 * unit + side;
                if group < job.matrix.groups() {
                    let mut sum = biased::<S>(sum, target.bias, group);
                    if let Activation::Gelu = target.activation {
                        sum = encoder::gelu_of::<S>(sum);
                    }
                    store::<S>(job, group, first_row + i, sum);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn biased<S: Simd>(sum: S::F, bias: Option<&[f32]>, group: usize) -> S::F {
    match bias {
        // SAFETY: the bias has whole groups.
        Some(bias) => unsafe { S::add(sum, S::load(bias.as_ptr().add(group * LANES))) },
        None => sum,
    }
}

/// Stores one row of a group and adds the residual. Features after the matrix's last are dropped.
#[inline(always)]
unsafe fn store<S: Simd>(job: &MatMul<'_>, group: usize, row: usize, sum: S::F) {
    let row = job.row_map.map_or(row, |map| map[row] as usize);
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
