//! Quantised weights times activations that are quantised by blocks of columns.
//!
//! A tile unpacks each block of weights to bytes. Where a step has rows for several tiles, that would be done
//! again for each of them: the weights of a unit are unpacked once, into memory that stays in the cache while
//! all tiles read it. Both ways multiply the same numbers in the same order, so they give the same bits.

use std::marker::PhantomData;

use super::{MatMul, Side, exact, finish, forms::Quant};
use crate::{
    kernels::{
        quantise::{BLOCK_RECORD_BYTES, BLOCK_TILE, BlockScaledRows, Layout, RECORD},
        simd::{LANES, Simd},
    },
    pack::{BLOCK_COLS, Form},
};

/// Distance of the prefetch in a stream of weights, in bytes.
const PREFETCH_BYTES: usize = 2048;

/// Bytes of an unpacked block of one group: 32 columns of 16 rows.
const GROUP_BYTES: usize = BLOCK_COLS * LANES;
/// Bytes of the scales of an unpacked block of one group, as f32: those of its halves, or scales and minima.
const GROUP_SCALES_BYTES: usize = 2 * LANES * size_of::<f32>();
/// Bytes of an unpacked block of a unit.
const UNPACKED_BYTES: usize = 2 * (GROUP_BYTES + GROUP_SCALES_BYTES);
/// Most blocks of a row that are unpacked: 16,384 columns, whose 640 KiB fit in a second-level cache of
/// 1 MiB. Wider rows are unpacked by each tile.
const MOST_UNPACKED_BLOCKS: usize = 512;

/// Values of scratch memory for the unpacked weights of a unit.
pub(super) const fn unpacked_len(cols: usize) -> usize {
    let blocks = cols.div_ceil(BLOCK_COLS);
    let blocks = if blocks < MOST_UNPACKED_BLOCKS { blocks } else { MOST_UNPACKED_BLOCKS };
    blocks * UNPACKED_BYTES / size_of::<f32>()
}

/// Where a tile reads the weights of its two groups.
trait TileWeights<S: Simd>: Copy {
    /// The form that they were packed in.
    type Packed: Quant;
    /// Columns `4 k .. 4 k + 4` of block `b` of group `g`, as unsigned bytes `[row][column]`.
    unsafe fn four(self, g: usize, b: usize, k: usize) -> S::I;
    /// The scales of a block (of its half `half`).
    unsafe fn scale(self, g: usize, b: usize, half: usize) -> S::F;
    /// The minima of a block, where blocks have them.
    unsafe fn min(self, g: usize, b: usize) -> S::F;
    /// Prefetches what will be read from memory next, while block `b` is computed.
    unsafe fn prefetch(self, b: usize);
}

/// Weights as they are packed.
#[derive(Clone, Copy)]
struct PackedWeights<'a, Q> {
    sides: &'a [Side; 2],
    /// Whether this is the unit's first tile, which reads the weights from memory. Later tiles read them from
    /// a cache.
    is_first: bool,
    form: PhantomData<Q>,
}

impl<S: Simd, Q: Quant> TileWeights<S> for PackedWeights<'_, Q> {
    type Packed = Q;
    #[inline(always)]
    unsafe fn four(self, g: usize, b: usize, k: usize) -> S::I {
        // SAFETY: the group has the block.
        unsafe { Q::four::<S>(self.sides[g].values.add(b * Q::FORM.block_bytes()), k) }
    }
    #[inline(always)]
    unsafe fn scale(self, g: usize, b: usize, half: usize) -> S::F {
        // SAFETY: as above.
        unsafe { Q::scale::<S>(self.sides[g].scales, b, half) }
    }
    #[inline(always)]
    unsafe fn min(self, g: usize, b: usize) -> S::F {
        // SAFETY: as above.
        unsafe { Q::min::<S>(self.sides[g].scales, b) }
    }
    #[inline(always)]
    unsafe fn prefetch(self, b: usize) {
        if self.is_first {
            // SAFETY: any address is allowed.
            unsafe { prefetch::<S, Q>(self.sides, b, PREFETCH_BYTES) };
        }
    }
}

/// Weights of a unit that [`unpack`] wrote.
#[derive(Clone, Copy)]
struct UnpackedWeights<'a, Q> {
    memory: *const u8,
    /// The next unit, which is read from memory when this one is done.
    next: Option<&'a [Side; 2]>,
    form: PhantomData<Q>,
}

impl<Q> UnpackedWeights<'_, Q> {
    /// The bytes of a block of a group; its scales follow.
    const fn block(self, g: usize, b: usize) -> *const u8 {
        self.memory.wrapping_add(b * UNPACKED_BYTES + g * (GROUP_BYTES + GROUP_SCALES_BYTES))
    }

    /// The first or the second vector of a block's scales.
    const fn scales(self, g: usize, b: usize, which: usize) -> *const f32 {
        self.block(g, b).wrapping_add(GROUP_BYTES + which * LANES * size_of::<f32>()).cast()
    }
}

impl<S: Simd, Q: Quant> TileWeights<S> for UnpackedWeights<'_, Q> {
    type Packed = Q;
    #[inline(always)]
    unsafe fn four(self, g: usize, b: usize, k: usize) -> S::I {
        // SAFETY: the block was unpacked.
        unsafe { S::load_i(self.block(g, b).add(k * 4 * LANES)) }
    }
    #[inline(always)]
    unsafe fn scale(self, g: usize, b: usize, half: usize) -> S::F {
        // SAFETY: as above.
        unsafe { S::load(self.scales(g, b, half)) }
    }
    #[inline(always)]
    unsafe fn min(self, g: usize, b: usize) -> S::F {
        // SAFETY: as above; blocks with minima have no halves.
        unsafe { S::load(self.scales(g, b, 1)) }
    }
    #[inline(always)]
    unsafe fn prefetch(self, b: usize) {
        if let Some(next) = self.next {
            // SAFETY: any address is allowed.
            unsafe { prefetch::<S, Q>(next, b, 0) };
        }
    }
}

/// Prefetches a block of both groups, `distance_bytes` further on.
#[inline(always)]
unsafe fn prefetch<S: Simd, Q: Quant>(sides: &[Side; 2], b: usize, distance_bytes: usize) {
    for line in 0..Q::FORM.block_bytes() / 64 {
        for side in sides {
            let at = b * Q::FORM.block_bytes() + line * 64 + distance_bytes;
            // SAFETY: any address is allowed.
            unsafe { S::prefetch(side.values.wrapping_add(at)) };
        }
    }
}

/// Writes the bytes and the scales of `blocks` blocks of a unit to `memory`.
#[inline(always)]
unsafe fn unpack<S: Simd, Q: Quant>(sides: &[Side; 2], blocks: usize, memory: *mut u8) {
    let unpacked = UnpackedWeights::<Q> { memory, next: None, form: PhantomData };
    for b in 0..blocks {
        for g in 0..2 {
            // SAFETY: both groups have the block, and the memory has room for it.
            unsafe {
                let values = sides[g].values.add(b * Q::FORM.block_bytes());
                let out = unpacked.block(g, b).cast_mut();
                put::<S, Q, 0>(values, out);
                put::<S, Q, 4>(values, out);
                put::<S, Q, 1>(values, out);
                put::<S, Q, 5>(values, out);
                put::<S, Q, 2>(values, out);
                put::<S, Q, 6>(values, out);
                put::<S, Q, 3>(values, out);
                put::<S, Q, 7>(values, out);
                let second = if Q::CENTRE.is_none() {
                    Some(Q::min::<S>(sides[g].scales, b))
                } else if Q::HALVES {
                    Some(Q::scale::<S>(sides[g].scales, b, 1))
                } else {
                    None
                };
                S::store(unpacked.scales(g, b, 0).cast_mut(), Q::scale::<S>(sides[g].scales, b, 0));
                if let Some(second) = second {
                    S::store(unpacked.scales(g, b, 1).cast_mut(), second);
                }
            }
        }
    }
}

/// Writes columns `4 K .. 4 K + 4` of a block. The number is a constant, because shifts by it are.
#[inline(always)]
unsafe fn put<S: Simd, Q: Quant, const K: usize>(values: *const u8, out: *mut u8) {
    // SAFETY: both blocks have 32 columns.
    unsafe { S::store_i(out.add(K * 4 * LANES), Q::four::<S>(values, K)) };
}

/// Computes a share of a projection.
///
/// # Safety
/// The tier's instructions exist; pointers cover the rows and the matrix's features; no other thread touches
/// the outputs of these units.
#[inline(always)]
pub(crate) unsafe fn run<S: Simd, Q: Quant>(job: &MatMul<'_>, x: &BlockScaledRows) {
    debug_assert!(x.layout() == Layout::Interleaved);
    let blocks = job.matrix.blocks();
    // Bytes need no unpacking.
    let unpacks = !is_bytes::<Q>() && job.rows > most_rows::<S>() && blocks <= MOST_UNPACKED_BLOCKS;
    for unit in job.units.clone() {
        let sides = job.sides(unit);
        // SAFETY: the scratch memory has room for the unpacked weights after the sums.
        unsafe {
            if unpacks {
                let memory = job.scratch.add(exact::STRIP_ROWS * 2 * LANES).cast::<u8>();
                unpack::<S, Q>(&sides, blocks, memory);
                let next = (unit + 1 < job.units.end).then(|| job.sides(unit + 1));
                let first = UnpackedWeights::<Q> { memory, next: next.as_ref(), form: PhantomData };
                let others = UnpackedWeights { next: None, ..first };
                all_rows::<S, _>(job, unit, x, [first, others]);
            } else {
                let first = PackedWeights::<Q> { sides: &sides, is_first: true, form: PhantomData };
                let others = PackedWeights { is_first: false, ..first };
                all_rows::<S, _>(job, unit, x, [first, others]);
            }
        }
    }
}

/// Rows of the largest tile: 16 registers hold the sums of three rows, half a stored tile.
#[inline(always)]
const fn most_rows<S: Simd>() -> usize {
    if S::WIDE { BLOCK_TILE } else { BLOCK_TILE / 2 }
}

/// Computes a unit for all rows, tile by tile: the first one with the first weights, which differ in what
/// they prefetch.
#[inline(always)]
unsafe fn all_rows<S: Simd, W: TileWeights<S>>(
    job: &MatMul<'_>,
    unit: usize,
    x: &BlockScaledRows,
    weights: [W; 2],
) {
    let mut row = 0;
    while row < job.rows {
        let (x, weights) = (x.record(row), weights[usize::from(row > 0)]);
        // SAFETY: the rows of a tile are below the count and in one stored tile.
        row += unsafe {
            match (job.rows - row).min(most_rows::<S>()) {
                1 => tile::<S, W, 1>(job, unit, row, weights, x),
                2 => tile::<S, W, 2>(job, unit, row, weights, x),
                3 => tile::<S, W, 3>(job, unit, row, weights, x),
                4 => tile::<S, W, 4>(job, unit, row, weights, x),
                5 => tile::<S, W, 5>(job, unit, row, weights, x),
                _ => tile::<S, W, BLOCK_TILE>(job, unit, row, weights, x),
            }
        };
    }
}

#[inline(always)]
unsafe fn tile<S: Simd, W: TileWeights<S>, const R: usize>(
    job: &MatMul<'_>,
    unit: usize,
    row: usize,
    weights: W,
    x: *const u8,
) -> usize {
    // SAFETY: blocks lie inside the groups and the row's records.
    unsafe {
        let mut sums = [[S::splat(0.0); R]; 2];
        for b in 0..job.matrix.blocks() {
            let x = x.add(b * BLOCK_RECORD_BYTES);
            weights.prefetch(b);
            if W::Packed::HALVES {
                let mut dots = start::<S, W::Packed, R>(x, RECORD.minus_first);
                step::<S, W, R, 0>(weights, b, x, &mut dots);
                step::<S, W, R, 1>(weights, b, x, &mut dots);
                step::<S, W, R, 2>(weights, b, x, &mut dots);
                step::<S, W, R, 3>(weights, b, x, &mut dots);
                add_scaled::<S, W, R>(weights, &BlockDots { b, half: 0, x, dots }, &mut sums);
                let mut dots = start::<S, W::Packed, R>(x, RECORD.minus_second);
                step::<S, W, R, 4>(weights, b, x, &mut dots);
                step::<S, W, R, 5>(weights, b, x, &mut dots);
                step::<S, W, R, 6>(weights, b, x, &mut dots);
                step::<S, W, R, 7>(weights, b, x, &mut dots);
                add_scaled::<S, W, R>(weights, &BlockDots { b, half: 1, x, dots }, &mut sums);
            } else {
                // Steps that share a vector of nibbles are adjacent.
                let mut dots = start::<S, W::Packed, R>(x, RECORD.minus);
                step::<S, W, R, 0>(weights, b, x, &mut dots);
                step::<S, W, R, 4>(weights, b, x, &mut dots);
                step::<S, W, R, 1>(weights, b, x, &mut dots);
                step::<S, W, R, 5>(weights, b, x, &mut dots);
                step::<S, W, R, 2>(weights, b, x, &mut dots);
                step::<S, W, R, 6>(weights, b, x, &mut dots);
                step::<S, W, R, 3>(weights, b, x, &mut dots);
                step::<S, W, R, 7>(weights, b, x, &mut dots);
                add_scaled::<S, W, R>(weights, &BlockDots { b, half: 0, x, dots }, &mut sums);
            }
        }
        for r in 0..R {
            S::store(job.sums(r), sums[0][r]);
            S::store(job.sums(r).add(LANES), sums[1][r]);
        }
        finish::<S>(job, unit, row, R);
    }
    R
}

/// The initial value of a block's integer sums: minus the quants' centre times the sum of the activations,
/// which the record has negated at `minus`.
#[inline(always)]
unsafe fn start<S: Simd, Q: Quant, const R: usize>(x: *const u8, minus: usize) -> [[S::I; R]; 2] {
    // SAFETY: the record has the sums of `R` rows.
    unsafe {
        let mut dots = [[S::zero_i(); R]; 2];
        let Some(centre) = Q::CENTRE else { return dots };
        if is_bytes::<Q>() && !S::DOT_IS_OFFSET {
            return dots;
        }
        for r in 0..R {
            let sum = S::splat_i(x.add(minus + 4 * r).cast::<i32>().read_unaligned());
            let first = S::shl(sum, centre);
            dots[0][r] = first;
            dots[1][r] = first;
        }
        dots
    }
}

#[inline(always)]
const fn is_bytes<Q: Quant>() -> bool {
    matches!(Q::FORM, Form::Q8)
}

/// Adds columns `4 K .. 4 K + 4`.
#[inline(always)]
unsafe fn step<S: Simd, W: TileWeights<S>, const R: usize, const K: usize>(
    weights: W,
    b: usize,
    x: *const u8,
    dots: &mut [[S::I; R]; 2],
) {
    // SAFETY: block and record have 32 columns.
    unsafe {
        let weights = [weights.four(0, b, K), weights.four(1, b, K)];
        for r in 0..R {
            let four = x.add((K * BLOCK_TILE + r) * 4).cast::<i32>().read_unaligned();
            for g in 0..2 {
                dots[g][r] = if is_bytes::<W::Packed>() {
                    S::dot_i8(dots[g][r], weights[g], four)
                } else {
                    S::dot_u4(dots[g][r], weights[g], four)
                };
            }
        }
    }
}

/// The integer sums of `R` rows over half a block, or over a whole one.
struct BlockDots<S: Simd, const R: usize> {
    b: usize,
    half: usize,
    /// The record of the rows' block.
    x: *const u8,
    dots: [[S::I; R]; 2],
}

/// Scales a block's integer sums and adds them to the rows' sums.
#[inline(always)]
unsafe fn add_scaled<S: Simd, W: TileWeights<S>, const R: usize>(
    weights: W,
    block: &BlockDots<S, R>,
    sums: &mut [[S::F; R]; 2],
) {
    let BlockDots { b, half, x, dots } = *block;
    // SAFETY: the block has scales, the record those of `R` rows.
    unsafe {
        for g in 0..2 {
            let scale = weights.scale(g, b, half);
            for r in 0..R {
                let own = S::splat(x.add(RECORD.scale + 4 * r).cast::<f32>().read_unaligned());
                sums[g][r] = S::fma(S::to_f(dots[g][r]), S::mul(scale, own), sums[g][r]);
            }
            if W::Packed::CENTRE.is_none() {
                let min = weights.min(g, b);
                for r in 0..R {
                    let sum = S::splat(x.add(RECORD.scaled_sum + 4 * r).cast::<f32>().read_unaligned());
                    sums[g][r] = S::fma(min, sum, sums[g][r]);
                }
            }
        }
    }
}
