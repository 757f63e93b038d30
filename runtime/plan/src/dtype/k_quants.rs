//! The blocks of 256 weights ("K quants"): sub-blocks whose scales are small integers times one f16.

use super::half_at;

/// Scale and minimum of sub-block `j` (0..8) of 32 weights: 6 bits each, packed into twelve bytes. Those of
/// the first four sub-blocks are the low six bits of a byte. Those of the last four are split: the low four
/// bits share a byte, the high two are the top bits of the first four's bytes.
fn scale_and_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

pub(super) fn dequantise_q4(block: &[u8], out: &mut [f32]) {
    affine(block, &block[16..], out, |_, _| 0);
}

pub(super) fn dequantise_q5(block: &[u8], out: &mut [f32]) {
    affine(block, &block[48..], out, |sub, l| (block[16 + l] >> sub & 1) << 4);
}

/// Eight sub-blocks of 32, two of which share 32 bytes of `quants`; `high` gives the bits above the fourth.
fn affine(block: &[u8], quants: &[u8], out: &mut [f32], high: impl Fn(usize, usize) -> u8) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (sub, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_and_min(&block[4..16], sub);
        let (scale, min) = (d * scale, dmin * min);
        for (l, out) in out.iter_mut().enumerate() {
            let low = quants[sub / 2 * 32 + l] >> (sub % 2 * 4) & 15;
            *out = scale * f32::from(low | high(sub, l)) - min;
        }
    }
}

pub(super) fn dequantise_q6(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 208);
    for (i, out) in out.iter_mut().enumerate() {
        // In each half of 128 weights, weight `32 n + l` has its low bits in byte `32 (n % 2) + l`, in the
        // low (n < 2) or high four bits, and its high bits at `2 n` of byte `l`.
        let (half, n, l) = (i / 128, i % 128 / 32, i % 32);
        let low = block[half * 64 + n % 2 * 32 + l] >> (n / 2 * 4) & 15;
        let high = block[128 + half * 32 + l] >> (2 * n) & 3;
        let scale = f32::from(block[192 + i / 16].cast_signed());
        *out = d * scale * (f32::from(low | high << 4) - 32.0);
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use crate::DType;

    /// `d` 0.5, `dmin` 0.25; scales 1, 2, 3, 4, 17, 34, 51, 63 and minima 5, 6, 7, 8, 63, 32, 16, 1.
    fn head() -> Vec<u8> {
        let mut block = f16::from_f32(0.5).to_le_bytes().to_vec();
        block.extend(f16::from_f32(0.25).to_le_bytes());
        block.extend([1 | 1 << 6, 2 | 2 << 6, 3 | 3 << 6, 4 | 3 << 6]);
        block.extend([5 | 3 << 6, 6 | 2 << 6, 7 | 1 << 6, 8]);
        block.extend([1 | 15 << 4, 2, 3, 15 | 1 << 4]);
        block
    }

    #[test]
    fn q4_k_block_by_hand() {
        let mut block = head();
        let at = block.len();
        block.resize(at + 128, 0);
        block[at] = 3 | 9 << 4; // first weights of sub-blocks 0 and 1
        block[at + 31] = 15; // last weight of sub-block 0
        block[at + 64] = 2 << 4; // first weight of sub-block 5
        block[at + 127] = 1 << 4; // last weight of all
        let mut out = [0.0; 256];
        DType::Q4_K.dequantise(&block, &mut out);
        assert_eq!((out[0], out[1], out[31]), (0.5 * 3.0 - 1.25, -1.25, 0.5 * 15.0 - 1.25));
        assert_eq!((out[32], out[33], out[96]), (9.0 - 1.5, -1.5, -2.0));
        assert_eq!((out[128], out[160], out[192]), (-15.75, 0.5 * 34.0 * 2.0 - 8.0, -4.0));
        assert_eq!((out[224], out[255]), (-0.25, 31.5 - 0.25));
    }

    #[test]
    fn q5_k_block_by_hand() {
        let mut block = head();
        let high = block.len();
        let at = high + 32;
        block.resize(at + 128, 0);
        block[high] = 1; // sub-block 0, weight 0
        block[high + 31] = 1 << 7; // sub-block 7, weight 31
        block[at] = 3 | 9 << 4;
        block[at + 127] = 1 << 4;
        let mut out = [0.0; 256];
        DType::Q5_K.dequantise(&block, &mut out);
        assert_eq!((out[0], out[1], out[32]), (0.5 * 19.0 - 1.25, -1.25, 9.0 - 1.5));
        assert_eq!((out[224], out[255]), (-0.25, 31.5 * 17.0 - 0.25));
    }

    #[test]
    fn q6_k_block_by_hand() {
        let mut block = vec![0u8; 192];
        block[0] = 1 | 2 << 4; // low bits of weights 0 and 64
        block[32] = 3 | 4 << 4; // of 32 and 96
        block[64 + 63] = 5 << 4; // of 255
        block[128] = 2 | 1 << 2 | 3 << 4; // high bits of 0, 32 and 64
        block[128 + 63] = 2 << 6; // of 255
        block.extend([1u8, 1, 2, 1, 0xfe, 1, 4, 1, 1, 1, 1, 1, 1, 1, 1, 10]);
        block.extend(f16::from_f32(0.5).to_le_bytes());
        let mut out = [0.0; 256];
        DType::Q6_K.dequantise(&block, &mut out);
        assert_eq!((out[0], out[1], out[32]), (0.5 * (33.0 - 32.0), -16.0, 0.5 * 2.0 * (19.0 - 32.0)));
        assert_eq!((out[64], out[96], out[255]), (0.5 * -2.0 * 18.0, 0.5 * 4.0 * -28.0, 0.5 * 10.0 * 5.0));
    }
}
