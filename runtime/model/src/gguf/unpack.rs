//! Types of GGUF that no backend multiplies: their tensors become tensors of another type when the file is
//! read, with the same values to the last bit.
//!
//! Three of them become quantised types that hold the same products: `IQ4_NL` and `MXFP4` take 8.5 bits a
//! weight then (4.5 and 4.25 in the file), `Q3_K` 6.6 (3.4). The others have products of more bits than any
//! quantised type and become F32, 32 bits a weight: `Q5_1` (6 in the file), `Q2_K` (2.6), `IQ4_XS` (4.25) and
//! `Q8_K` (9.1), whose scale is an f32.
//! The unpacked tensors lie on the heap, beside the file.
//!
//! The layouts are those of the `block_*` structures of the ggml project.

use super::GgufProblem;
use half::f16;
use trustformers_plan::DType;

/// How a tensor of the file is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types, reason = "these are the names of the formats")]
pub enum Packing {
    /// 32 weights in 24 bytes: f16 scale `d`, f16 minimum `m`, 32 fifth bits, 16 bytes. A weight is
    /// `d * q + m` with `q` in 0..=31.
    Q5_1,
    /// 256 weights in 84 bytes: sixteen bytes with a scale and a minimum of four bits each, 64 bytes of two
    /// bits, f16 `d`, f16 `dmin`.
    Q2_K,
    /// 256 weights in 110 bytes: 32 bytes of third bits, 64 bytes of two bits, sixteen scales of six bits,
    /// f16 `d`. A weight is `d * (s - 32) * (q - 4)`.
    Q3_K,
    /// 256 weights in 292 bytes: f32 `d`, 256 signed bytes, sixteen sums that no product needs.
    Q8_K,
    /// 32 weights in 18 bytes: f16 scale, then four bits each that select one of sixteen numbers.
    IQ4_NL,
    /// 256 weights in 136 bytes: f16 `d`, sixteen bits and four bytes of eight scales, four bits a weight
    /// that select one of sixteen numbers.
    IQ4_XS,
    /// 32 weights in 17 bytes: an exponent, then four bits each that select one of sixteen numbers.
    MXFP4,
}

/// The numbers that four bits select in `IQ4_NL` and `IQ4_XS`.
const NON_LINEAR: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// Twice the numbers that four bits select in `MXFP4`.
const FP4: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Bytes of a `Q8_0` and of a `Q6_K` block.
const Q8_BYTES: usize = 34;
const Q6_BYTES: usize = 210;

impl Packing {
    /// The packing with this number in GGUF.
    pub(super) const fn of_code(code: u32) -> Option<Self> {
        match code {
            7 => Some(Self::Q5_1),
            10 => Some(Self::Q2_K),
            11 => Some(Self::Q3_K),
            15 => Some(Self::Q8_K),
            20 => Some(Self::IQ4_NL),
            23 => Some(Self::IQ4_XS),
            39 => Some(Self::MXFP4),
            _ => None,
        }
    }

    /// The type of the unpacked tensor.
    pub(super) const fn dtype(self) -> DType {
        match self {
            Self::Q5_1 | Self::Q2_K | Self::Q8_K | Self::IQ4_XS => DType::F32,
            Self::IQ4_NL | Self::MXFP4 => DType::Q8_0,
            Self::Q3_K => DType::Q6_K,
        }
    }

    const fn block_len(self) -> usize {
        match self {
            Self::Q5_1 | Self::IQ4_NL | Self::MXFP4 => 32,
            Self::Q2_K | Self::Q3_K | Self::Q8_K | Self::IQ4_XS => 256,
        }
    }

    const fn block_bytes(self) -> usize {
        match self {
            Self::Q5_1 => 24,
            Self::Q2_K => 84,
            Self::Q3_K => 110,
            Self::Q8_K => 292,
            Self::IQ4_NL => 18,
            Self::IQ4_XS => 136,
            Self::MXFP4 => 17,
        }
    }

    /// Bytes of a row of `cols` weights in the file; `None` where it is no whole number of blocks.
    pub(super) fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (cols / self.block_len()).checked_mul(self.block_bytes())
    }

    /// The bytes of whole blocks as [`TensorInfo::dtype`](super::TensorInfo) stores them.
    ///
    /// # Errors
    /// A block of the tensor `name` whose scale the other type does not have.
    pub(crate) fn unpack(self, name: &str, stored: &[u8]) -> Result<Vec<u8>, GgufProblem> {
        let blocks = stored.chunks_exact(self.block_bytes());
        let per_block = self.block_len() / self.dtype().block_len() * self.dtype().block_bytes();
        let mut out = Vec::with_capacity(blocks.len() * per_block);
        for block in blocks {
            match self {
                Self::Q5_1 => floats(&mut out, &q5_1(block)),
                Self::Q2_K => floats(&mut out, &q2_k(block)),
                Self::Q8_K => floats(&mut out, &q8_k(block)),
                Self::IQ4_XS => floats(&mut out, &iq4_xs(block)),
                Self::IQ4_NL => q8_0(&mut out, [block[0], block[1]], &selected(&block[2..], &NON_LINEAR)),
                Self::MXFP4 => {
                    let scale = mxfp4_scale(block[0]).ok_or_else(|| GgufProblem::Tensor {
                        name: name.to_owned(),
                        why: format!(
                            "a block of MXFP4 has the exponent {}, outside of 104..=143, which is not supported",
                            block[0]
                        ),
                    })?;
                    q8_0(&mut out, scale.to_le_bytes(), &selected(&block[1..], &FP4));
                }
                Self::Q3_K => out.extend_from_slice(&q6_of_q3(block)),
            }
        }
        Ok(out)
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn floats(out: &mut Vec<u8>, values: &[f32]) {
    out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
}

/// A block of `Q8_0`.
fn q8_0(out: &mut Vec<u8>, scale: [u8; 2], quants: &[i8; 32]) {
    debug_assert_eq!(Q8_BYTES, scale.len() + quants.len());
    out.extend(scale);
    out.extend(quants.iter().map(|q| q.cast_unsigned()));
}

/// The numbers that sixteen bytes select: the low four bits of all, then the high ones.
fn selected(bytes: &[u8], numbers: &[i8; 16]) -> [i8; 32] {
    std::array::from_fn(|i| numbers[usize::from(bytes[i % 16] >> (i / 16 * 4) & 15)])
}

/// Half of two to the power of the exponent less 127, where f16 has that number.
fn mxfp4_scale(exponent: u8) -> Option<f16> {
    (104..=143).contains(&exponent).then(|| f16::from_f32(2.0_f32.powi(i32::from(exponent) - 128)))
}

fn q5_1(block: &[u8]) -> [f32; 32] {
    let (scale, min) = (half_at(block, 0), half_at(block, 2));
    let fifth = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    std::array::from_fn(|i| {
        let low = block[8 + i % 16] >> (i / 16 * 4) & 15;
        let high = ((fifth >> i) & 1) as u8 * 16;
        scale * f32::from(low | high) + min
    })
}

/// Weight `i` of two bits each: the `n`-th 32 of each half of 128 are bits `2 n` of 32 bytes.
fn two_bits(quants: &[u8], i: usize) -> u8 {
    quants[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3
}

fn q2_k(block: &[u8]) -> [f32; 256] {
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    std::array::from_fn(|i| {
        let scale = block[i / 16];
        let (step, min) = (d * f32::from(scale & 15), dmin * f32::from(scale >> 4));
        step * f32::from(two_bits(&block[16..80], i)) - min
    })
}

fn q8_k(block: &[u8]) -> [f32; 256] {
    let scale = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
    std::array::from_fn(|i| scale * f32::from(block[4 + i].cast_signed()))
}

/// The sixteen scales of a `Q3_K` block, less 32: low four bits in eight bytes, high two bits in four.
fn q3_scales(packed: &[u8]) -> [i8; 16] {
    std::array::from_fn(|i| {
        let low = packed[i % 8] >> (i / 8 * 4) & 15;
        let high = packed[8 + i % 4] >> (i / 4 * 2) & 3;
        (low | high << 4).cast_signed() - 32
    })
}

/// A block of `Q6_K` with the same products: quants of three bits are quants of six.
fn q6_of_q3(block: &[u8]) -> [u8; Q6_BYTES] {
    let mut out = [0; Q6_BYTES];
    for i in 0..256 {
        // The third bit says that nothing is subtracted.
        let third = block[i % 32] >> (i / 32) & 1;
        let quant = two_bits(&block[32..96], i) + third * 4 + 32 - 4;
        let (half, n, l) = (i / 128, i % 128 / 32, i % 32);
        out[half * 64 + n % 2 * 32 + l] |= (quant & 15) << (n / 2 * 4);
        out[128 + half * 32 + l] |= (quant >> 4) << (2 * n);
    }
    for (out, scale) in out[192..208].iter_mut().zip(q3_scales(&block[96..108])) {
        *out = scale.cast_unsigned();
    }
    out[208..].copy_from_slice(&block[108..110]);
    out
}

fn iq4_xs(block: &[u8]) -> [f32; 256] {
    let d = half_at(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    std::array::from_fn(|i| {
        let sub_block = i / 32;
        let low = block[4 + sub_block / 2] >> (sub_block % 2 * 4) & 15;
        let scale = i16::from(low) | ((high >> (2 * sub_block)) & 3).cast_signed() << 4;
        let byte = block[8 + sub_block * 16 + i % 16];
        let number = NON_LINEAR[usize::from(byte >> (i % 32 / 16 * 4) & 15)];
        d * f32::from(scale - 32) * f32::from(number)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(hex: &serde_json::Value) -> Vec<u8> {
        let digits = hex.as_str().unwrap();
        (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
    }

    #[test]
    fn values_are_those_of_the_reference_bit_for_bit() {
        let reference: serde_json::Value =
            serde_json::from_str(include_str!("unpack_reference.json")).unwrap();
        let packings = [
            ("Q5_1", Packing::Q5_1),
            ("Q2_K", Packing::Q2_K),
            ("Q3_K", Packing::Q3_K),
            ("Q8_K", Packing::Q8_K),
            ("IQ4_NL", Packing::IQ4_NL),
            ("IQ4_XS", Packing::IQ4_XS),
            ("MXFP4", Packing::MXFP4),
        ];
        assert_eq!(reference.as_object().unwrap().len(), packings.len());
        for (name, packing) in packings {
            let stored = bytes(&reference[name]["stored"]);
            let unpacked = packing.unpack("a", &stored).unwrap();
            let len = stored.len() / packing.block_bytes() * packing.block_len();
            let mut values = vec![0.0; len];
            packing.dtype().dequantise(&unpacked, &mut values);
            let expected = bytes(&reference[name]["values"]);
            for (i, (value, expected)) in values.iter().zip(expected.chunks_exact(4)).enumerate() {
                let expected = f32::from_le_bytes(expected.try_into().unwrap());
                // A zero may have either sign.
                let same = value.to_bits() == expected.to_bits() || *value == 0.0 && expected == 0.0;
                assert!(same, "{name} {i}: {value} for {expected}");
            }
        }
    }

    #[test]
    fn exponents_that_no_half_has_are_refused() {
        let mut block = [0; 17];
        block[0] = 90;
        let problem = Packing::MXFP4.unpack("blk.0.ffn_up.weight", &block).unwrap_err().to_string();
        assert!(problem.contains("blk.0.ffn_up.weight: a block of MXFP4 has the exponent 90"), "{problem}");
        assert_eq!(Packing::IQ4_NL.row_bytes(64), Some(36));
        assert_eq!(Packing::Q2_K.row_bytes(128), None);
    }
}
