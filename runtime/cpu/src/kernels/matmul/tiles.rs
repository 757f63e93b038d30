//! Projections on AMX's tile registers, which multiply sixteen rows by sixteen features with one instruction.
//!
//! Integer products are exact, and the float operations after them have the order of [`super::int8`] and
//! [`super::block_scaled`]. So the bits are those of the tier without tiles, and either can compute a row,
//! depending on the number of rows. Weights converted to bf16 need no scaling by block, but the conversion
//! rounds them, and the sums differ from those of a single row: only long parts of prompts are computed so
//! ([`panels`]). For the same reason this module multiplies bf16 rows of any number by bf16 weights.

use std::arch::x86_64::{
    __m512i, _mm512_add_epi32, _mm512_and_si512, _mm512_castps_si512, _mm512_or_si512, _mm512_set1_epi8,
    _mm512_set1_epi32, _mm512_srli_epi32, _mm512_storeu_si512, _mm512_sub_epi8,
};

use super::{
    MatMul, Side, exact, finish,
    forms::{Quant, Quants, Unpack},
};
use crate::{
    amx::{BLOCKS, Operands, TILE_ROWS, Tiles, WHOLE},
    kernels::{
        quantise::{
            Bf16Rows, BlockScaledRows, Int8Rows, STACKED_RECORD_BYTES, STACKED_SCALE, STACKED_SCALED_SUM,
            STACKED_TILE,
        },
        simd::{LANES, Simd},
        x86::Avx512,
    },
    pack::BLOCK_COLS,
};

type Lanes = Avx512<true>;

const _: () = assert!(TILE_ROWS == STACKED_TILE && TILE_ROWS == LANES && 2 * TILE_ROWS <= exact::STRIP_ROWS);

/// Rows of a product over whole tiles.
const PRODUCT_ROWS: usize = 2 * TILE_ROWS;
/// Rows of a strip: all units are computed for them before the next strip. Rows of 384 bytes take 24 KiB and
/// a unit's weights 12 KiB, so both fit in the first-level cache.
const STRIP_ROWS: usize = 2 * PRODUCT_ROWS;

/// Values of one block's sums.
const PRODUCT_LEN: usize = TILE_ROWS * LANES;
/// Bytes of one block's weights as signed bytes.
const PANEL_BLOCK_BYTES: usize = BLOCK_COLS * LANES;

/// Bytes of one block's weights as bf16.
const PANEL_BLOCK_BF16_BYTES: usize = BLOCK_COLS * LANES * size_of::<u16>();

/// Values of scratch memory that these kernels need after the sums: two blocks' products, or a block of
/// floats; and the weights of both groups, at most as bf16.
pub(crate) const fn scratch_len(cols: usize) -> usize {
    2 * PRODUCT_LEN + 2 * cols.div_ceil(BLOCK_COLS) * PANEL_BLOCK_BF16_BYTES / size_of::<f32>()
}

const _: () =
    assert!(2 * PRODUCT_LEN >= BLOCK_COLS * LANES, "a block of floats fits in the products' memory");

/// Bytes of the rows that [`panels`] multiplies before the next unit's weights are unpacked: half of a
/// second-level cache of 2 MiB.
const PANEL_ROWS_BYTES: usize = 1 << 20;
/// Fewest of these rows: unpacking a weight costs as much as multiplying it by some tens of rows.
const LEAST_PANEL_ROWS: usize = 4 * PRODUCT_ROWS;

/// Computes a share of a projection of stacked [`Int8Rows`].
///
/// # Safety
/// As [`super::block_scaled::run`], and AMX is available.
#[inline(always)]
pub(crate) unsafe fn int8(job: &MatMul<'_>, x: &Int8Rows) {
    // SAFETY: the rows are stacked in whole tiles, filled up with zeros to whole steps, which weights of any
    // value are multiplied by; sums, scales and rows exist.
    unsafe {
        let tiles = Tiles::configure(&WHOLE);
        for (unit, row, count) in products(job, STRIP_ROWS) {
            let (first, row_stride_bytes) = x.stacked(row);
            let second = if count > TILE_ROWS { x.stacked(row + TILE_ROWS).0 } else { first };
            let sides = job.sides(unit);
            tiles.bytes(&Operands {
                rows: [first, second],
                row_stride_bytes,
                weights: sides.map(|side| side.values),
                steps: job.matrix.blocks().div_ceil(2),
                sums: job.sums(0),
            });
            let scales = [Lanes::load(sides[0].scales.cast()), Lanes::load(sides[1].scales.cast())];
            for r in 0..count {
                let (own, minus) = (Lanes::splat(*x.scale(row + r)), Lanes::splat_i(*x.minus(row + r)));
                for g in 0..2 {
                    let at = job.sums(r).add(g * LANES);
                    let dots = Lanes::add_i(Lanes::load_i(at.cast()), Lanes::shl(minus, 7));
                    Lanes::store(at, Lanes::mul(Lanes::to_f(dots), Lanes::mul(scales[g], own)));
                }
            }
            finish::<Lanes>(job, unit, row, count);
        }
    }
}

/// Computes a share of a projection of [`Bf16Rows`].
///
/// # Safety
/// As [`int8`].
#[inline(always)]
pub(crate) unsafe fn bf16(job: &MatMul<'_>, x: &Bf16Rows) {
    // SAFETY: the rows' memory is whole tiles and whole blocks of columns; sums and rows exist.
    unsafe {
        let tiles = Tiles::configure(&WHOLE);
        for (unit, row, count) in products(job, panel_strip(x)) {
            let second = if count > TILE_ROWS { row + TILE_ROWS } else { row };
            tiles.bf16(&Operands {
                rows: [x.row(row).cast(), x.row(second).cast()],
                row_stride_bytes: x.stride() * size_of::<u16>(),
                weights: job.sides(unit).map(|side| side.values),
                steps: job.matrix.blocks(),
                sums: job.sums(0),
            });
            finish::<Lanes>(job, unit, row, count);
        }
    }
}

/// Computes a share of a projection of rows of prompts: a unit's weights become bf16, rounded once, and are
/// multiplied by [`Bf16Rows`], so that no sum is scaled by block. The bits differ from those of
/// [`block_scaled`], so rows that must not depend on the size of a step are not computed here.
///
/// # Safety
/// As [`bf16`]; the scratch memory has [`scratch_len`] values after the sums.
#[inline(always)]
pub(crate) unsafe fn panels<Q: Quant>(job: &MatMul<'_>, x: &Bf16Rows) {
    let blocks = job.matrix.blocks();
    let (row_bytes, strip) = (x.stride() * size_of::<u16>(), panel_strip(x));
    // SAFETY: the scratch memory has room; groups have the blocks; the rows' memory is whole tiles and whole
    // blocks of columns.
    unsafe {
        let tiles = Tiles::configure(&WHOLE);
        let floats = job.scratch.add(exact::STRIP_ROWS * 2 * LANES);
        let panel = floats.add(2 * PRODUCT_LEN).cast::<u8>();
        let panels = [panel, panel.add(blocks * PANEL_BLOCK_BF16_BYTES)];
        for first in (0..job.rows).step_by(strip) {
            let end = job.rows.min(first + strip);
            for unit in job.units.clone() {
                let sides = job.sides(unit);
                for g in 0..2 {
                    unpack_to_bf16::<Q>(&sides[g], blocks, floats, panels[g]);
                }
                for row in (first..end).step_by(PRODUCT_ROWS) {
                    let count = PRODUCT_ROWS.min(end - row);
                    let second = if count > TILE_ROWS { row + TILE_ROWS } else { row };
                    tiles.bf16(&Operands {
                        rows: [x.row(row).cast(), x.row(second).cast()],
                        row_stride_bytes: row_bytes,
                        weights: panels.map(<*mut u8>::cast_const),
                        steps: blocks,
                        sums: job.sums(0),
                    });
                    finish::<Lanes>(job, unit, row, count);
                }
            }
        }
    }
}

/// Rows of a strip of [`Bf16Rows`]: all units are computed for them before the next strip.
fn panel_strip(x: &Bf16Rows) -> usize {
    let row_bytes = x.stride() * size_of::<u16>();
    (PANEL_ROWS_BYTES / row_bytes / PRODUCT_ROWS * PRODUCT_ROWS).max(LEAST_PANEL_ROWS)
}

/// Unpacks a group's weights to bf16 in pairs of columns per feature.
#[inline(always)]
unsafe fn unpack_to_bf16<Q: Quant>(side: &Side, blocks: usize, floats: *mut f32, panel: *mut u8) {
    for b in 0..blocks {
        // SAFETY: the block exists; `floats` has room for a block, the panel for all.
        unsafe {
            Quants::<Q>::block::<Lanes>(side.values, side.scales, b, BLOCK_COLS, floats);
            for pair in 0..BLOCK_COLS / 2 {
                let column = |c: usize| _mm512_castps_si512(Lanes::load(floats.add(c * LANES)));
                let (even, odd) = (rounded(column(2 * pair)), rounded(column(2 * pair + 1)));
                let both = _mm512_or_si512(
                    _mm512_srli_epi32::<16>(even),
                    _mm512_and_si512(odd, _mm512_set1_epi32(-1 << 16)),
                );
                let to = panel.add(b * PANEL_BLOCK_BF16_BYTES + pair * 2 * LANES * size_of::<u16>());
                _mm512_storeu_si512(to.cast(), both);
            }
        }
    }
}

/// The bits of floats that are rounded to bf16, in their upper halves; the lower halves are undefined.
/// Weights are finite, so that no NaN is made an infinity.
#[inline(always)]
unsafe fn rounded(bits: __m512i) -> __m512i {
    // SAFETY: arithmetic only.
    unsafe {
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)))
    }
}

/// Every unit of a share with every [`PRODUCT_ROWS`] rows, strip by strip: the unit, the first row, and how
/// many there are.
fn products(job: &MatMul<'_>, strip: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    let (rows, units) = (job.rows, job.units.clone());
    (0..rows).step_by(strip).flat_map(move |first| {
        let end = rows.min(first + strip);
        let starts = (first..end).step_by(PRODUCT_ROWS);
        units
            .clone()
            .flat_map(move |unit| starts.clone().map(move |row| (unit, row, PRODUCT_ROWS.min(end - row))))
    })
}

/// Computes a share of a projection of stacked [`BlockScaledRows`].
///
/// # Safety
/// As [`int8`]; the scratch memory has [`scratch_len`] values after the sums.
#[inline(always)]
pub(crate) unsafe fn block_scaled<Q: Quant>(job: &MatMul<'_>, x: &BlockScaledRows) {
    let blocks = job.matrix.blocks();
    // SAFETY: the scratch memory has room; groups have the blocks, tiles of rows the records.
    unsafe {
        let tiles = Tiles::configure(&BLOCKS);
        let products = job.scratch.add(exact::STRIP_ROWS * 2 * LANES);
        let panel = products.add(2 * PRODUCT_LEN).cast::<u8>();
        let panels = [panel, panel.add(blocks * PANEL_BLOCK_BYTES)];
        for unit in job.units.clone() {
            let sides = job.sides(unit);
            for g in 0..2 {
                unpack::<Q>(sides[g].values, blocks, panels[g]);
            }
            for row in (0..job.rows).step_by(TILE_ROWS) {
                let record = x.stacked_record(row);
                for g in 0..2 {
                    let sums = sums_of::<Q>(
                        &tiles,
                        &GroupOperands { side: sides[g], panel: panels[g], record, blocks },
                        products,
                    );
                    for (r, sum) in sums.into_iter().enumerate() {
                        Lanes::store(job.sums(r).add(g * LANES), sum);
                    }
                }
                finish::<Lanes>(job, unit, row, TILE_ROWS.min(job.rows - row));
            }
        }
    }
}

/// Unpacks a group's weights to signed bytes in fours; it subtracts the centre from the quants.
#[inline(always)]
unsafe fn unpack<Q: Quant>(values: *const u8, blocks: usize, panel: *mut u8) {
    let centre = Q::CENTRE.map_or(0, |centre| (1u8 << centre).cast_signed());
    for b in 0..blocks {
        for k in 0..BLOCK_COLS / 4 {
            // SAFETY: the block exists, and the panel has room for it. Bytes are subtracted modulo 256, so
            // that of 8-bit quants, which are stored with 128 added, the signed number remains.
            unsafe {
                let four = Q::four::<Lanes>(values.add(b * Q::FORM.block_bytes()), k);
                let signed = _mm512_sub_epi8(four, _mm512_set1_epi8(centre));
                _mm512_storeu_si512(panel.add(b * PANEL_BLOCK_BYTES + k * 64).cast(), signed);
            }
        }
    }
}

/// Sixteen rows and one group of features.
struct GroupOperands {
    side: Side,
    /// The group's unpacked weights.
    panel: *const u8,
    /// The first record of the rows.
    record: *const u8,
    blocks: usize,
}

/// The sums of sixteen rows with one group. The tile registers compute the next product while this one is
/// scaled; a product covers a block, or half of one where each half has a scale.
#[inline(always)]
unsafe fn sums_of<Q: Quant>(
    tiles: &Tiles,
    operands: &GroupOperands,
    products: *mut f32,
) -> [<Lanes as Simd>::F; TILE_ROWS] {
    let GroupOperands { side, panel, record, blocks } = *operands;
    let per_block = if Q::HALVES { 2 } else { 1 };
    let product = |index: usize| products.wrapping_add(index % 2 * PRODUCT_LEN);
    // SAFETY: records and panel have the blocks; there is room for two products.
    unsafe {
        let multiply = |index: usize| {
            let (b, half) = (index / per_block, index % per_block);
            let x = record.add(b * STACKED_RECORD_BYTES + half * BLOCK_COLS / 2);
            let weights = panel.add(b * PANEL_BLOCK_BYTES + half * PANEL_BLOCK_BYTES / 2);
            if Q::HALVES {
                tiles.half_block(x, weights, product(index));
            } else {
                tiles.block(x, weights, product(index));
            }
        };
        let mut sums = [Lanes::splat(0.0); TILE_ROWS];
        multiply(0);
        for index in 0..blocks * per_block {
            if index + 1 < blocks * per_block {
                multiply(index + 1);
            }
            let (b, dots) = (index / per_block, product(index));
            let x = record.add(b * STACKED_RECORD_BYTES);
            let scale = Q::scale::<Lanes>(side.scales, b, index % per_block);
            each_row!(TILE_ROWS, r => {
                let dots = Lanes::to_f(Lanes::load_i(dots.add(r * LANES).cast()));
                sums[r] = Lanes::fma(dots, Lanes::mul(scale, own(x, STACKED_SCALE, r)), sums[r]);
            });
            if Q::CENTRE.is_none() {
                let min = Q::min::<Lanes>(side.scales, b);
                each_row!(TILE_ROWS, r => {
                    sums[r] = Lanes::fma(min, own(x, STACKED_SCALED_SUM, r), sums[r]);
                });
            }
        }
        sums
    }
}

/// A record's number for row `r`.
#[inline(always)]
unsafe fn own(record: *const u8, at: usize, r: usize) -> <Lanes as Simd>::F {
    // SAFETY: the record has these numbers of each of its rows.
    unsafe { Lanes::splat(*record.add(at + 4 * r).cast::<f32>()) }
}
