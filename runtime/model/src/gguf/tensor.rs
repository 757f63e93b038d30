//! A tensor's description: name, shape, type and where its bytes are.

use super::{GgufProblem, Packing};
use std::ops::Range;
use trustformers_plan::DType;

/// Names of the types by their number in GGUF, for refusals. Numbers without a name were removed from the
/// format.
const TYPE_NAMES: [&str; 40] = [
    "F32", "F16", "Q4_0", "Q4_1", "", "", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
    "Q6_K", "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "I8",
    "I16", "I32", "I64", "F64", "IQ1_M", "BF16", "", "", "", "TQ1_0", "TQ2_0", "", "", "", "MXFP4",
];

/// The supported type with this number in GGUF.
fn dtype(code: u32) -> Option<DType> {
    match code {
        0 => Some(DType::F32),
        1 => Some(DType::F16),
        2 => Some(DType::Q4_0),
        3 => Some(DType::Q4_1),
        6 => Some(DType::Q5_0),
        8 => Some(DType::Q8_0),
        12 => Some(DType::Q4_K),
        13 => Some(DType::Q5_K),
        14 => Some(DType::Q6_K),
        30 => Some(DType::BF16),
        _ => None,
    }
}

/// This type's number in GGUF.
pub(super) fn dtype_code(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::Q4_0 => 2,
        DType::Q4_1 => 3,
        DType::Q5_0 => 6,
        DType::Q8_0 => 8,
        DType::Q4_K => 12,
        DType::Q5_K => 13,
        DType::Q6_K => 14,
        DType::BF16 => 30,
    }
}

/// One tensor of a file; its range lies within the file and overlaps no other tensor's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// The shape in the file's order: the first dimension is contiguous. One to four of them, none zero.
    pub dims: Vec<usize>,
    /// How elements are stored, or how they are once they are unpacked.
    pub dtype: DType,
    /// How the file stores them, where they are unpacked when the file is read.
    pub packing: Option<Packing>,
    /// The bytes within the file.
    pub range: Range<usize>,
}

impl TensorInfo {
    /// Rows and columns when the tensor is seen as a matrix: all dimensions but the first are rows; a vector
    /// has one row.
    pub fn matrix(&self) -> (usize, usize) {
        let cols = self.dims.first().copied().unwrap_or(0);
        (self.dims.iter().skip(1).product(), cols)
    }
}

/// A description as it stands in the file, before the place of the data is known.
#[derive(Debug)]
pub(super) struct RawTensor {
    pub(super) name: String,
    pub(super) dims: Vec<u64>,
    pub(super) type_code: u32,
    pub(super) offset: u64,
}

/// Where tensor data lies in the file.
#[derive(Debug, Clone, Copy)]
pub(super) struct DataRegion {
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) alignment: u64,
}

impl RawTensor {
    /// Checks type, shape and place.
    pub(super) fn resolve(self, region: DataRegion) -> Result<TensorInfo, GgufProblem> {
        let packing = Packing::of_code(self.type_code);
        let Some(dtype) = dtype(self.type_code).or(packing.map(Packing::dtype)) else {
            let known = TYPE_NAMES.get(self.type_code as usize).filter(|name| !name.is_empty());
            let dtype = known.map_or_else(|| format!("type {}", self.type_code), |name| (*name).to_owned());
            return Err(GgufProblem::UnsupportedType { name: self.name, dtype });
        };
        let wrong = |why: String| GgufProblem::Tensor { name: self.name.clone(), why };
        let too_large =
            || wrong(format!("its shape {:?} is larger than memory; the file is corrupt", self.dims));
        let dims: Option<Vec<usize>> = self.dims.iter().map(|d| usize::try_from(*d).ok()).collect();
        let dims = dims.ok_or_else(too_large)?;
        if dims.contains(&0) {
            return Err(wrong(format!("its shape {dims:?} has a zero; the file is corrupt")));
        }
        let cols = dims[0];
        let row_bytes = packing.map_or_else(|| dtype.row_bytes(cols), |packing| packing.row_bytes(cols));
        let row_bytes = row_bytes.ok_or_else(|| {
            let name = TYPE_NAMES.get(self.type_code as usize).copied().unwrap_or_default();
            wrong(format!("rows of {cols} values cannot be stored as {name}; the file is corrupt"))
        })?;
        let size =
            dims[1..].iter().try_fold(row_bytes, |size, d| size.checked_mul(*d)).ok_or_else(too_large)?;
        if !self.offset.is_multiple_of(region.alignment) {
            return Err(wrong(format!(
                "its offset {} is not a multiple of the file's alignment {}; the file is corrupt",
                self.offset, region.alignment
            )));
        }
        let place = || {
            let start = region.start.checked_add(usize::try_from(self.offset).ok()?)?;
            let end = start.checked_add(size)?;
            (end <= region.end).then_some(start..end)
        };
        let range = place().ok_or_else(|| {
            wrong(format!(
                "its {size} bytes at offset {} end beyond the file's {} bytes; the file is truncated: download it again",
                self.offset, region.end
            ))
        })?;
        Ok(TensorInfo { name: self.name, dims, dtype, packing, range })
    }
}

/// Refuses two tensors of one name, and two that share bytes.
pub(super) fn check_apart(tensors: &[TensorInfo]) -> Result<(), GgufProblem> {
    let mut by_name: Vec<&TensorInfo> = tensors.iter().collect();
    by_name.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = by_name.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return Err(GgufProblem::Duplicate { what: format!("tensor {}", pair[0].name) });
    }
    let mut by_place: Vec<&TensorInfo> = tensors.iter().collect();
    by_place.sort_by_key(|tensor| (tensor.range.start, tensor.range.end));
    if let Some(pair) = by_place.windows(2).find(|pair| pair[0].range.end > pair[1].range.start) {
        let why =
            format!("it shares bytes with tensor {}; the file is corrupt: download it again", pair[0].name);
        return Err(GgufProblem::Tensor { name: pair[1].name.clone(), why });
    }
    Ok(())
}
