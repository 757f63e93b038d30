//! Weights of `F8_E4M3`, each times the scale of its row, of its block, or of the whole tensor.

use super::{Member, PackedModule, PackedProblem, Unpacked};
use trustformers_plan::{DType, MatrixShape};

/// The type of the weights in a file.
const FP8: &str = "F8_E4M3";

/// The lower half of an f32, which BF16 does not have.
const BEYOND_BF16: u32 = 0xffff;

/// The products of a scale with every byte.
type Products = [f32; 256];

/// The value of a byte: a sign, four bits of exponent, three of fraction. There is no infinity.
fn value(byte: u8) -> f32 {
    let (exponent, fraction) = (byte >> 3 & 15, byte & 7);
    let magnitude = match (exponent, fraction) {
        (15, 7) => f32::NAN,
        (0, _) => f32::from(fraction) / 512.0,
        _ => f32::from(8 + fraction) * 2.0_f32.powi(i32::from(exponent) - 10),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

fn products(scale: f32) -> Products {
    std::array::from_fn(|byte| value(byte as u8) * scale)
}

/// The scales of a matrix: one for each part of some rows and columns.
struct Scales {
    values: Vec<f32>,
    part: MatrixShape,
    /// Parts beside each other.
    across: usize,
}

impl Scales {
    /// The scales of a matrix of this shape, in blocks of `block` where the checkpoint has blocks.
    fn read(scales: &Member, shape: MatrixShape, block: Option<MatrixShape>) -> Result<Self, PackedProblem> {
        let (values, found) = (scales.floats()?, scales.shape());
        let MatrixShape { rows, cols } = shape;
        let per_row = MatrixShape { rows: 1, cols };
        if values.len() == 1 {
            return Ok(Self { values, part: shape, across: 1 });
        }
        if values.len() == rows && (found.rows == 1 || found.cols == 1) {
            return Ok(Self { values, part: per_row, across: 1 });
        }
        let part = match block {
            Some(block) => block,
            None if found.rows == rows && cols.is_multiple_of(found.cols.max(1)) => {
                MatrixShape { rows: 1, cols: cols / found.cols.max(1) }
            }
            None => {
                let why = format!(
                    "it is {} x {} for weights of {rows} x {cols}, and config.json says nothing of blocks",
                    found.rows, found.cols
                );
                return Err(scales.wrong(why));
            }
        };
        let across = cols.div_ceil(part.cols);
        scales.of_shape(MatrixShape { rows: rows.div_ceil(part.rows), cols: across })?;
        Ok(Self { values, part, across })
    }
}

/// Unpacks a module whose weights have this type.
pub(super) fn unpack(
    module: &mut PackedModule,
    weight: &Member,
    block: Option<MatrixShape>,
) -> Result<Unpacked, PackedProblem> {
    weight.of_type(FP8)?;
    if weight.bytes().is_empty() {
        return Err(weight.wrong("it is empty; download the checkpoint again".to_owned()));
    }
    let inverse = module.take("weight_scale_inv");
    let scales = match inverse {
        Some(scales) => scales,
        None => module.need("weight_scale", weight)?,
    };
    let shape = weight.shape();
    let scales = Scales::read(&scales, shape, block)?;
    let whole = |scale: &f32| {
        let finite = products(*scale).into_iter().filter(|value| !value.is_nan());
        finite.map(f32::to_bits).all(|bits| bits & BEYOND_BF16 == 0)
    };
    let dtype = if scales.values.iter().all(whole) { DType::BF16 } else { DType::F32 };
    let bytes = write(weight.bytes(), shape, &scales, dtype);
    let bytes = bytes.ok_or_else(|| {
        weight.wrong("it has a weight that is not a number; download the checkpoint again".to_owned())
    })?;
    Ok(Unpacked { dtype, shape, bytes })
}

/// The values; `None` where one is not finite.
fn write(stored: &[u8], shape: MatrixShape, scales: &Scales, dtype: DType) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(stored.len() * dtype.block_bytes());
    let mut tables: Vec<Products> = Vec::new();
    for (row, bytes) in stored.chunks_exact(shape.cols.max(1)).enumerate() {
        if row.is_multiple_of(scales.part.rows) {
            let first = row / scales.part.rows * scales.across;
            let own = scales.values.get(first..first + scales.across).unwrap_or_default();
            tables = own.iter().map(|scale| products(*scale)).collect();
        }
        for (bytes, table) in bytes.chunks(scales.part.cols.max(1)).zip(&tables) {
            for value in bytes.iter().map(|byte| table[usize::from(*byte)]) {
                if !value.is_finite() {
                    return None;
                }
                match dtype {
                    DType::BF16 => out.extend(((value.to_bits() >> 16) as u16).to_le_bytes()),
                    _ => out.extend(value.to_le_bytes()),
                }
            }
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_the_values_of_the_format() {
        let cases = [
            (0x00, 0.0),
            (0x01, 1.0 / 512.0),
            (0x07, 7.0 / 512.0),
            (0x08, 1.0 / 64.0),
            (0x38, 1.0),
            (0x7e, 448.0),
            (0xc0, -2.0),
        ];
        for (byte, expected) in cases {
            assert_eq!(value(byte), expected, "{byte:#x}");
        }
        assert!(value(0x7f).is_nan() && value(0xff).is_nan());
    }
}
