//! Projections by AMX's tile registers, which multiply sixteen rows by sixteen features at once.
//!
//! Integer products are exact, and what follows them is done in the order of [`super::int8`] and [`super::blocks`]: the
//! bits are those of the tier without tiles, so that a row may be read by either, whichever suits the number of rows. (A
//! panel of weights made bf16 would need no scaling block by block; but it rounds weights, and its sums differ from those
//! of a single row.) Rows of bf16 are multiplied here however few they are, for the same reason.

use std::arch::x86_64::{_mm512_set1_epi8, _mm512_storeu_si512, _mm512_sub_epi8};

use super::{MatMul, Side, exact, finish, forms::Quant};
use crate::{
    amx::{BLOCKS, Operands, TILE_ROWS, Tiles, WHOLE},
    kernels::{
        quantise::{
            Bf16Rows, BlockRows, Int8Rows, STACKED_RECORD_BYTES, STACKED_SCALE, STACKED_SCALED_SUM,
            STACKED_TILE,
        },
        simd::{LANES, Simd},
        x86::Avx512,
    },
    pack::BLOCK_COLS,
};

type Lanes = Avx512<true>;

const _: () = assert!(TILE_ROWS == STACKED_TILE && TILE_ROWS == LANES && 2 * TILE_ROWS <= exact::ROW_BLOCK);

/// Rows of a product over whole tiles.
const PRODUCT_ROWS: usize = 2 * TILE_ROWS;
/// Rows that meet all units before the next rows do. Of 384 bytes they take 24 KiB beside a unit's 12 KiB of weights, and
/// both fit the first-level cache.
const ROW_BLOCK: usize = 2 * PRODUCT_ROWS;

/// Values of one block's sums.
const PRODUCT_LEN: usize = TILE_ROWS * LANES;
/// Bytes of one block's weights as signed bytes.
const PANEL_BLOCK_BYTES: usize = BLOCK_COLS * LANES;

/// Values of scratch memory that [`blocks`] needs behind the sums: two blocks' products, and the weights of both groups.
pub(crate) const fn scratch_len(cols: usize) -> usize {
    2 * PRODUCT_LEN + 2 * cols.div_ceil(BLOCK_COLS) * PANEL_BLOCK_BYTES / size_of::<f32>()
}

/// Runs a share of [`Int8Rows`], which are stacked.
///
/// # Safety
/// As [`super::blocks::run`], and AMX is available.
#[inline(always)]
pub(crate) unsafe fn int8(job: &MatMul<'_>, x: &Int8Rows) {
    // SAFETY: the rows are stacked in whole tiles, filled up with zeros to whole steps, behind which weights may be anything;
    // sums, scales and rows exist.
    unsafe {
        let tiles = Tiles::configure(&WHOLE);
        for (unit, row, count) in products(job) {
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
            finish::<Lanes>(job, unit, (row, count));
        }
    }
}

/// Runs a share of [`Bf16Rows`].
///
/// # Safety
/// As [`int8`].
#[inline(always)]
pub(crate) unsafe fn bf16(job: &MatMul<'_>, x: &Bf16Rows) {
    // SAFETY: the rows' memory is whole tiles and whole blocks of columns; sums and rows exist.
    unsafe {
        let tiles = Tiles::configure(&WHOLE);
        for (unit, row, count) in products(job) {
            let second = if count > TILE_ROWS { row + TILE_ROWS } else { row };
            tiles.bf16(&Operands {
                rows: [x.row(row).cast(), x.row(second).cast()],
                row_stride_bytes: x.stride() * size_of::<u16>(),
                weights: job.sides(unit).map(|side| side.values),
                steps: job.matrix.blocks(),
                sums: job.sums(0),
            });
            finish::<Lanes>(job, unit, (row, count));
        }
    }
}

/// Every unit of a share with every [`PRODUCT_ROWS`] rows: the unit, the first row, and how many there are.
fn products(job: &MatMul<'_>) -> impl Iterator<Item = (usize, usize, usize)> {
    let (rows, units) = (job.rows, job.units.clone());
    (0..rows).step_by(ROW_BLOCK).flat_map(move |first| {
        let end = rows.min(first + ROW_BLOCK);
        let starts = (first..end).step_by(PRODUCT_ROWS);
        units
            .clone()
            .flat_map(move |unit| starts.clone().map(move |row| (unit, row, PRODUCT_ROWS.min(end - row))))
    })
}

/// Runs a share of [`BlockRows`], which are stacked.
///
/// # Safety
/// As [`int8`]; the scratch memory has [`scratch_len`] values behind the sums.
#[inline(always)]
pub(crate) unsafe fn blocks<Q: Quant>(job: &MatMul<'_>, x: &BlockRows) {
    let blocks = job.matrix.blocks();
    // SAFETY: the scratch memory has room; groups have the blocks, tiles of rows the records.
    unsafe {
        let tiles = Tiles::configure(&BLOCKS);
        let products = job.scratch.add(exact::ROW_BLOCK * 2 * LANES);
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
                    let sums = sums_of::<Q>(&tiles, (sides[g], panels[g]), (record, blocks), products);
                    for (r, sum) in sums.into_iter().enumerate() {
                        Lanes::store(job.sums(r).add(g * LANES), sum);
                    }
                }
                finish::<Lanes>(job, unit, (row, TILE_ROWS.min(job.rows - row)));
            }
        }
    }
}

/// A group's weights as signed bytes in fours: what is subtracted from quants is subtracted here.
#[inline(always)]
unsafe fn unpack<Q: Quant>(values: *const u8, blocks: usize, panel: *mut u8) {
    let centre = Q::CENTRE.map_or(0, |centre| (1u8 << centre).cast_signed());
    for b in 0..blocks {
        for k in 0..BLOCK_COLS / 4 {
            // SAFETY: the block exists, and the panel has room for it. Bytes are subtracted modulo 256, so that of 8-bit
            // quants, which are stored with 128 added, the signed number remains.
            unsafe {
                let four = Q::four::<Lanes>(values.add(b * Q::FORM.block_bytes()), k);
                let signed = _mm512_sub_epi8(four, _mm512_set1_epi8(centre));
                _mm512_storeu_si512(panel.add(b * PANEL_BLOCK_BYTES + k * 64).cast(), signed);
            }
        }
    }
}

/// The sums of sixteen rows with one group. While a part's integers are scaled, the next part's are on their way.
#[inline(always)]
unsafe fn sums_of<Q: Quant>(
    tiles: &Tiles,
    (side, panel): (Side, *const u8),
    (record, blocks): (*const u8, usize),
    products: *mut f32,
) -> [<Lanes as Simd>::F; TILE_ROWS] {
    let parts = if Q::HALVES { 2 } else { 1 };
    let product = |part: usize| products.wrapping_add(part % 2 * PRODUCT_LEN);
    // SAFETY: records and panel have the blocks, the products room for two parts.
    unsafe {
        let multiply = |part: usize| {
            let (b, half) = (part / parts, part % parts);
            let x = record.add(b * STACKED_RECORD_BYTES + half * BLOCK_COLS / 2);
            let weights = panel.add(b * PANEL_BLOCK_BYTES + half * PANEL_BLOCK_BYTES / 2);
            if Q::HALVES {
                tiles.half_block(x, weights, product(part));
            } else {
                tiles.block(x, weights, product(part));
            }
        };
        let mut sums = [Lanes::splat(0.0); TILE_ROWS];
        multiply(0);
        for part in 0..blocks * parts {
            if part + 1 < blocks * parts {
                multiply(part + 1);
            }
            let (b, dots) = (part / parts, product(part));
            let x = record.add(b * STACKED_RECORD_BYTES);
            let scale = Q::scale::<Lanes>(side.scales, b, part % parts);
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

/// What a record keeps for row `r`.
#[inline(always)]
unsafe fn own(record: *const u8, at: usize, r: usize) -> <Lanes as Simd>::F {
    // SAFETY: the record has these numbers of each of its rows.
    unsafe { Lanes::splat(*record.add(at + 4 * r).cast::<f32>()) }
}
