//! Taking stored blocks apart: quants in the order of their columns, and scales as they are.
//!
//! The layouts are described at [`trustformers_plan::DType`]; the kernels' tests compare what is made of them with
//! [`trustformers_plan::DType::dequantise`].

use super::{BLOCK_COLS, Form, GROUP_ROWS, SUPER_BLOCKS};

/// The unsigned quants of the `part`-th 32 columns of a stored block.
pub(super) fn quants(form: Form, stored: &[u8], part: usize) -> [u8; BLOCK_COLS] {
    match form {
        Form::Q8 => std::array::from_fn(|c| stored[2 + c] ^ 0x80),
        Form::Q4 => std::array::from_fn(|c| nibble(&stored[2..], c)),
        Form::Q4Min => std::array::from_fn(|c| nibble(&stored[4..], c)),
        Form::Q5 => {
            std::array::from_fn(|c| nibble(&stored[6..], c) | (stored[2 + c / 8] >> (c % 8) & 1) << 4)
        }
        Form::Q4K => std::array::from_fn(|c| pair_nibble(&stored[16..], part, c)),
        Form::Q5K => {
            std::array::from_fn(|c| pair_nibble(&stored[48..], part, c) | (stored[16 + c] >> part & 1) << 4)
        }
        Form::Q6K => std::array::from_fn(|c| {
            // Parts 0 and 2 of each half of 128 columns share bytes of low bits, and so do 1 and 3.
            let (half, n) = (part / 4, part % 4);
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

/// Column `c` of sub-block `part`; sub-blocks `2 p` and `2 p + 1` share 32 bytes.
fn pair_nibble(bytes: &[u8], part: usize, c: usize) -> u8 {
    bytes[part / 2 * 32 + c] >> (part % 2 * 4) & 15
}

/// Writes a stored block's scales into a group's second stream, which starts at the block's.
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
            for part in 0..SUPER_BLOCKS {
                let (scale, min) = six_bits(&stored[4..16], part);
                let block = &mut out[(2 + part) * GROUP_ROWS..];
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

/// Scale and minimum of a sub-block: the first four lie in the low six bits of a byte; of the last four the low four bits
/// lie together, the high two on top of the first's.
fn six_bits(packed: &[u8], part: usize) -> (u8, u8) {
    if part < 4 {
        return (packed[part] & 63, packed[part + 4] & 63);
    }
    let (scale, min) = (packed[part + 4] & 15, packed[part + 4] >> 4);
    (scale | packed[part - 4] >> 6 << 4, min | packed[part] >> 6 << 4)
}

/// Sets byte `at` of words in memory order; they were zero.
fn set_byte(words: &mut [u16], at: usize, byte: u8) {
    words[at / 2] |= u16::from(byte) << (at % 2 * 8);
}
