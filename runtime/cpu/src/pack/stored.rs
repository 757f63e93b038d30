//! Reading stored blocks: quants in the order of their columns, and scales as they are stored.
//!
//! [`trustformers_plan::DType`] describes the layouts; the kernels' tests compare the results with
//! [`trustformers_plan::DType::dequantise`].

use super::{BLOCK_COLS, Form, GROUP_ROWS, SUPER_BLOCKS};

/// The unsigned quants of the `sub_block`-th 32 columns of a stored block.
pub(super) fn quants(form: Form, stored: &[u8], sub_block: usize) -> [u8; BLOCK_COLS] {
    match form {
        Form::Q8 => std::array::from_fn(|c| stored[2 + c] ^ 0x80),
        Form::Q4 => std::array::from_fn(|c| nibble(&stored[2..], c)),
        Form::Q4Min => std::array::from_fn(|c| nibble(&stored[4..], c)),
        Form::Q5 => {
            std::array::from_fn(|c| nibble(&stored[6..], c) | (stored[2 + c / 8] >> (c % 8) & 1) << 4)
        }
        Form::Q4K => std::array::from_fn(|c| pair_nibble(&stored[16..], sub_block, c)),
        Form::Q5K => std::array::from_fn(|c| {
            pair_nibble(&stored[48..], sub_block, c) | (stored[16 + c] >> sub_block & 1) << 4
        }),
        Form::Q6K => std::array::from_fn(|c| {
            // Sub-blocks 0 and 2 of each half of 128 columns share bytes of low bits, and so do 1 and 3.
            let (half, n) = (sub_block / 4, sub_block % 4);
            let low = stored[half * 64 + n % 2 * 32 + c] >> (n / 2 * 4) & 15;
            let high = stored[128 + half * 32 + c] >> (2 * n) & 3;
            low | high << 4
        }),
        Form::F32 | Form::F16 | Form::Bf16 | Form::Int8 => [0; BLOCK_COLS],
    }
}

/// Column `c` of 32 whose halves share sixteen bytes.
fn nibble(bytes: &[u8], c: usize) -> u8 {
    bytes[c % 16] >> (c / 16 * 4) & 15
}

/// Column `c` of sub-block `sub_block`; sub-blocks `2 p` and `2 p + 1` share 32 bytes.
fn pair_nibble(bytes: &[u8], sub_block: usize, c: usize) -> u8 {
    bytes[sub_block / 2 * 32 + c] >> (sub_block % 2 * 4) & 15
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
