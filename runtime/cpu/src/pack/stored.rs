//! Reading stored blocks: quants in the order of their columns, and scales as they are stored.
//!
//! [`trustformers_plan::DType`] describes the layouts; the kernels' tests compare the results with
//! [`trustformers_plan::DType::dequantise`].

use super::{BLOCK_COLS, Form, GROUP_ROWS, SUPER_BLOCKS};

/// The unsigned quants of the `sub_block`-th 32 columns of a stored block. Each form copies its bytes into
/// arrays first: without bounds to check, the compiler computes all columns in vectors.
pub(super) fn quants(form: Form, stored: &[u8], sub_block: usize) -> [u8; BLOCK_COLS] {
    match form {
        Form::Q8 => bytes_at::<BLOCK_COLS>(stored, 2).map(|byte| byte ^ 0x80),
        Form::Q4 => nibbles(&bytes_at(stored, 2)),
        Form::Q4Min => nibbles(&bytes_at(stored, 4)),
        Form::Q5 => {
            let (low, fifth) = (nibbles(&bytes_at(stored, 6)), spread_bits(bytes_at(stored, 2)));
            both(&low, &fifth, |low, fifth| low | fifth << 4)
        }
        Form::Q4K => pair_nibbles(&bytes_at(stored, 16 + sub_block / 2 * BLOCK_COLS), sub_block),
        Form::Q5K => {
            let low = pair_nibbles(&bytes_at(stored, 48 + sub_block / 2 * BLOCK_COLS), sub_block);
            both(&low, &bytes_at(stored, 16), |low, bits| low | (bits >> sub_block & 1) << 4)
        }
        Form::Q6K => {
            // Sub-blocks 0 and 2 of each half of 128 columns share bytes of low bits, and so do 1 and 3.
            let (half, n) = (sub_block / 4, sub_block % 4);
            let low = bytes_at(stored, half * 64 + n % 2 * BLOCK_COLS);
            let high = bytes_at(stored, 128 + half * BLOCK_COLS);
            both(&low, &high, |low, high| (low >> (n / 2 * 4) & 15) | (high >> (2 * n) & 3) << 4)
        }
        Form::F32 | Form::F16 | Form::Bf16 | Form::Int8 => [0; BLOCK_COLS],
    }
}

/// The `N` bytes from `at` on.
fn bytes_at<const N: usize>(stored: &[u8], at: usize) -> [u8; N] {
    let mut own = [0; N];
    own.copy_from_slice(&stored[at..at + N]);
    own
}

/// `compute` of each pair.
fn both(a: &[u8; BLOCK_COLS], b: &[u8; BLOCK_COLS], compute: impl Fn(u8, u8) -> u8) -> [u8; BLOCK_COLS] {
    let mut out = [0; BLOCK_COLS];
    for (out, (a, b)) in out.iter_mut().zip(a.iter().zip(b)) {
        *out = compute(*a, *b);
    }
    out
}

/// The columns whose halves share sixteen bytes: the low four bits, then the high ones.
fn nibbles(bytes: &[u8; BLOCK_COLS / 2]) -> [u8; BLOCK_COLS] {
    let mut out = [0; BLOCK_COLS];
    let (low, high) = out.split_at_mut(BLOCK_COLS / 2);
    for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
        (*low, *high) = (byte & 15, byte >> 4);
    }
    out
}

/// The columns of sub-block `sub_block`; sub-blocks `2 p` and `2 p + 1` share 32 bytes.
fn pair_nibbles(bytes: &[u8; BLOCK_COLS], sub_block: usize) -> [u8; BLOCK_COLS] {
    let shift = sub_block % 2 * 4;
    bytes.map(|byte| byte >> shift & 15)
}

/// One bit for each column, as a byte of 0 or 1.
fn spread_bits(bits: [u8; BLOCK_COLS / 8]) -> [u8; BLOCK_COLS] {
    const ONES: u64 = 0x0101_0101_0101_0101;
    let mut out = [0; BLOCK_COLS];
    for (out, byte) in out.chunks_exact_mut(8).zip(bits) {
        // Byte `c` of the product keeps bit `c`; adding 127 carries any bit to the highest of its byte.
        let own = (u64::from(byte) * ONES) & 0x8040_2010_0804_0201;
        let spread = ((own + 0x7F * ONES) >> 7) & ONES;
        out.copy_from_slice(&spread.to_le_bytes());
    }
    out
}

/// Writes a stored block's scales into a group's second stream; `out` starts at the block.
pub(super) fn scales(form: Form, stored: &[u8], out: &mut [u16], lane: usize) {
    let word = |at: usize| u16::from_le_bytes([stored[at], stored[at + 1]]);
    match form {
        Form::Q8 | Form::Q4 | Form::Q5 => out[lane] = word(0),
        Form::Q4Min => {
            out[lane] = word(0);
            out[GROUP_ROWS + lane] = word(2);
        }
        Form::Q4K | Form::Q5K => {
            out[lane] = word(0);
            out[GROUP_ROWS + lane] = word(2);
            for sub_block in 0..SUPER_BLOCKS {
                let (scale, min) = six_bits(&stored[4..16], sub_block);
                let block = &mut out[(2 + sub_block) * GROUP_ROWS..];
                set_byte(block, lane, scale);
                set_byte(block, GROUP_ROWS + lane, min);
            }
        }
        Form::Q6K => {
            out[lane] = word(208);
            for half in 0..2 * SUPER_BLOCKS {
                set_byte(&mut out[GROUP_ROWS..], half * GROUP_ROWS + lane, stored[192 + half]);
            }
        }
        Form::F32 | Form::F16 | Form::Bf16 | Form::Int8 => {}
    }
}

/// Scale and minimum of a sub-block. Those of the first four are the low six bits of a byte. Those of the
/// last four are split: the low four bits share a byte, the high two are the top bits of the first four's
/// bytes.
fn six_bits(packed: &[u8], sub_block: usize) -> (u8, u8) {
    if sub_block < 4 {
        return (packed[sub_block] & 63, packed[sub_block + 4] & 63);
    }
    let (scale, min) = (packed[sub_block + 4] & 15, packed[sub_block + 4] >> 4);
    (scale | packed[sub_block - 4] >> 6 << 4, min | packed[sub_block] >> 6 << 4)
}

/// Sets byte `at` of words in memory order; they were zero.
fn set_byte(words: &mut [u16], at: usize, byte: u8) {
    words[at / 2] |= u16::from(byte) << (at % 2 * 8);
}
