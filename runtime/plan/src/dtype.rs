//! The stored types of weights, and the f32 values of a stored block.
//!
//! The quantised layouts are those of GGUF files (the format's description and the `block_*` structures of
//! the ggml project define them); all numbers are little-endian. [`DType::dequantise`] defines them here by
//! plain loops; backends repack the weights and must agree with it.

mod k_quants;

use half::{bf16, f16};

/// Element type of a stored weight.
#[allow(non_camel_case_types, reason = "these are the names of the formats")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// IEEE single precision, 4 bytes each.
    F32,
    /// IEEE half precision, 2 bytes each.
    F16,
    /// The upper half of an IEEE single, 2 bytes each.
    BF16,
    /// 32 weights in 34 bytes: f16 scale `d`, then 32 signed bytes `q`. A weight is `d * q`.
    Q8_0,
    /// 32 weights in 20 bytes: f16 scale `d`, f16 minimum `m`, then 16 bytes. Byte `j` holds weight `j` in
    /// its low four bits and weight `j + 16` in its high four bits. A weight is `d * q + m` with `q` in
    /// 0..=15.
    Q4_1,
    /// 32 weights in 18 bytes: f16 scale `d`, then 16 bytes as in `Q4_1`. A weight is `d * (q - 8)`.
    Q4_0,
    /// 32 weights in 22 bytes: f16 scale `d`, 32 bits of which bit `j` is the fifth bit of weight `j`, then
    /// 16 bytes as in `Q4_1`. A weight is `d * (q - 16)` with `q` in 0..=31.
    Q5_0,
    /// 256 weights in 144 bytes: f16 `d`, f16 `dmin`, eight 6-bit scales `s` and minima `m` in 12 bytes, then
    /// 128 bytes. Byte `l` of the `p`-th 32 holds a weight of sub-block `2p` in its low and one of `2p + 1`
    /// in its high four bits. A weight is `d * s * q - dmin * m`.
    Q4_K,
    /// 256 weights in 176 bytes: as `Q4_K`, with 32 bytes between scales and quants: bit `b` of byte `l` is
    /// the fifth bit of weight `l` of sub-block `b`.
    Q5_K,
    /// 256 weights in 210 bytes: 128 bytes of low four bits, 64 of high two bits, sixteen signed scales `s`,
    /// f16 `d`. A weight of the `i`-th sixteen is `d * s[i] * (q - 32)` with `q` in 0..=63.
    Q6_K,
}

impl DType {
    /// Every type that a plan may use.
    pub const ALL: [Self; 10] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q8_0,
        Self::Q4_1,
        Self::Q4_0,
        Self::Q5_0,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
    ];

    /// Weights per block: the columns of a row must be a multiple of it.
    #[must_use]
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q8_0 | Self::Q4_1 | Self::Q4_0 | Self::Q5_0 => 32,
            Self::Q4_K | Self::Q5_K | Self::Q6_K => 256,
        }
    }

    /// Bytes that a block takes.
    #[must_use]
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_1 => 20,
            Self::Q4_0 => 18,
            Self::Q5_0 => 22,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    /// Whether weights are small integers with scales, as opposed to floats.
    #[must_use]
    pub const fn is_quantised(self) -> bool {
        self.block_len() > 1
    }

    /// Bytes of one row of `cols` weights; `None` where `cols` is no whole number of blocks or the size
    /// overflows.
    #[must_use]
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (cols / self.block_len()).checked_mul(self.block_bytes())
    }

    /// The name used in dumps and messages, equal to GGUF's.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_1 => "Q4_1",
            Self::Q4_0 => "Q4_0",
            Self::Q5_0 => "Q5_0",
            Self::Q4_K => "Q4_K",
            Self::Q5_K => "Q5_K",
            Self::Q6_K => "Q6_K",
        }
    }

    /// Writes the f32 value of every weight in `bytes` into `out`.
    ///
    /// # Panics
    /// When `bytes` and `out` do not describe the same whole number of blocks: callers hold checked
    /// [`crate::Weight`]s.
    pub fn dequantise(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(
            self.row_bytes(out.len()),
            Some(bytes.len()),
            "{} bytes do not fit the output",
            self.name()
        );
        let blocks = bytes.chunks_exact(self.block_bytes()).zip(out.chunks_exact_mut(self.block_len()));
        match self {
            Self::F32 => blocks.for_each(|(b, o)| o[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            Self::F16 => blocks.for_each(|(b, o)| o[0] = half_at(b, 0)),
            Self::BF16 => blocks.for_each(|(b, o)| o[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32()),
            Self::Q8_0 => blocks.for_each(|(b, o)| dequantise_q8_0(b, o)),
            Self::Q4_1 => blocks.for_each(|(b, o)| dequantise_q4_1(b, o)),
            Self::Q4_0 => blocks.for_each(|(b, o)| dequantise_q4_0(b, o)),
            Self::Q5_0 => blocks.for_each(|(b, o)| dequantise_q5_0(b, o)),
            Self::Q4_K => blocks.for_each(|(b, o)| k_quants::dequantise_q4(b, o)),
            Self::Q5_K => blocks.for_each(|(b, o)| k_quants::dequantise_q5(b, o)),
            Self::Q6_K => blocks.for_each(|(b, o)| k_quants::dequantise_q6(b, o)),
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn dequantise_q8_0(block: &[u8], out: &mut [f32]) {
    let scale = half_at(block, 0);
    for (o, &q) in out.iter_mut().zip(&block[2..]) {
        *o = scale * f32::from(q.cast_signed());
    }
}

fn dequantise_q4_1(block: &[u8], out: &mut [f32]) {
    let (scale, min) = (half_at(block, 0), half_at(block, 2));
    for (j, &byte) in block[4..].iter().enumerate() {
        out[j] = scale * f32::from(byte & 15) + min;
        out[j + 16] = scale * f32::from(byte >> 4) + min;
    }
}

fn dequantise_q4_0(block: &[u8], out: &mut [f32]) {
    let scale = half_at(block, 0);
    for (j, &byte) in block[2..].iter().enumerate() {
        out[j] = scale * (f32::from(byte & 15) - 8.0);
        out[j + 16] = scale * (f32::from(byte >> 4) - 8.0);
    }
}

fn dequantise_q5_0(block: &[u8], out: &mut [f32]) {
    let scale = half_at(block, 0);
    let fifth = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    let bit = |j: usize| ((fifth >> j) & 1) as u8 * 16;
    for (j, &byte) in block[6..].iter().enumerate() {
        out[j] = scale * (f32::from(byte & 15 | bit(j)) - 16.0);
        out[j + 16] = scale * (f32::from(byte >> 4 | bit(j + 16)) - 16.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn q8_0_block_by_hand() {
        let mut block = f16::from_f32(0.5).to_le_bytes().to_vec();
        block.extend((0..32).map(|i| (i as i8 - 16).cast_unsigned()));
        let mut out = [0.0; 32];
        DType::Q8_0.dequantise(&block, &mut out);
        assert_eq!(out[0], -8.0);
        assert_eq!(out[16], 0.0);
        assert_eq!(out[31], 7.5);
    }

    #[test]
    fn q4_1_block_by_hand() {
        let mut block = f16::from_f32(0.25).to_le_bytes().to_vec();
        block.extend(f16::from_f32(-1.0).to_le_bytes());
        block.extend((0..16u8).map(|j| j | ((15 - j) << 4)));
        let mut out = [0.0; 32];
        DType::Q4_1.dequantise(&block, &mut out);
        assert_eq!((out[0], out[1], out[15]), (-1.0, -0.75, 2.75));
        assert_eq!((out[16], out[17], out[31]), (2.75, 2.5, -1.0));
    }

    #[test]
    fn q4_0_block_by_hand() {
        let mut block = f16::from_f32(0.5).to_le_bytes().to_vec();
        block.extend((0..16u8).map(|j| j | ((15 - j) << 4)));
        let mut out = [0.0; 32];
        DType::Q4_0.dequantise(&block, &mut out);
        assert_eq!((out[0], out[1], out[8], out[15]), (-4.0, -3.5, 0.0, 3.5));
        assert_eq!((out[16], out[17], out[31]), (3.5, 3.0, -4.0));
    }

    #[test]
    fn q5_0_block_by_hand() {
        let mut block = f16::from_f32(0.25).to_le_bytes().to_vec();
        // The fifth bit of weights 0, 9, 16 and 31.
        block.extend((1u32 | 1 << 9 | 1 << 16 | 1 << 31).to_le_bytes());
        block.extend((0..16u8).map(|j| j | ((15 - j) << 4)));
        let mut out = [0.0; 32];
        DType::Q5_0.dequantise(&block, &mut out);
        assert_eq!((out[0], out[1], out[9], out[15]), (0.0, -3.75, 2.25, -0.25));
        assert_eq!((out[16], out[17], out[30], out[31]), (3.75, -0.5, -3.75, 0.0));
    }

    #[test]
    fn plain_floats() {
        let mut out = [0.0; 2];
        DType::F32.dequantise(&[0, 0, 128, 63, 0, 0, 0, 192], &mut out);
        assert_eq!(out, [1.0, -2.0]);
        DType::F16.dequantise(&[0x00, 0x3c, 0x00, 0xc0], &mut out);
        assert_eq!(out, [1.0, -2.0]);
        DType::BF16.dequantise(&[0x80, 0x3f, 0x49, 0xc0], &mut out);
        assert_eq!(out, [1.0, -3.140_625]);
    }

    #[test]
    fn rows_must_be_whole_blocks() {
        assert_eq!(DType::Q8_0.row_bytes(64), Some(68));
        assert_eq!(DType::Q8_0.row_bytes(48), None);
        assert_eq!(DType::Q6_K.row_bytes(512), Some(420));
        assert_eq!(DType::Q4_K.row_bytes(32), None);
        assert_eq!(DType::F32.row_bytes(usize::MAX), None);
    }
}
