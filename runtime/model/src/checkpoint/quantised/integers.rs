//! Weights of four or eight bits in groups of columns: each is a code less the zero of its group, times the
//! scale of its group. GPTQ, AWQ and compressed-tensors differ in how codes and zeros are packed.

use super::{Member, PackedModule, PackedProblem, Unpacked, Words, is_half};
use crate::checkpoint::{CONFIG, CheckpointProblem};
use half::f16;
use trustformers_plan::{DType, MatrixShape};

/// Rows that are read together. Where a file has the codes of one column side by side, these are the 64 bytes
/// that memory gives at once.
const ROWS_TOGETHER: usize = 16;

/// The type of signed bytes in a file.
pub(super) const BYTES: &str = "I8";

/// Weights of a block of every type that is written.
const BLOCK: usize = 32;

/// For each of eight rows, the position of its four bits in a number of AWQ.
const AWQ_POSITIONS: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// The middle of four bits.
const MIDDLE: i16 = 8;

/// How the codes are stored. Rows are output features.
enum Codes<'a> {
    /// Numbers that hold codes of one row, each row in whole numbers.
    Rows { words: Words<'a>, words_per_row: usize, bits: usize },
    /// Numbers that hold codes of eight columns; those of all rows lie side by side.
    Columns(Words<'a>),
    /// Numbers that hold codes of eight rows in the order of [`AWQ_POSITIONS`]; those of one column side by
    /// side.
    Interleaved(Words<'a>),
    /// Signed bytes.
    Bytes(&'a [u8]),
}

/// The zero of every group.
enum Zeros {
    Same(i16),
    /// By row and group.
    Each(Vec<i16>),
}

/// A matrix as it is stored.
struct Grouped<'a> {
    shape: MatrixShape,
    bits: usize,
    codes: Codes<'a>,
    zeros: Zeros,
    /// By row and group.
    scales: Vec<f32>,
    /// Groups of a row.
    groups: usize,
    /// The group of each column.
    group_of: Vec<usize>,
    /// Whether groups are whole blocks of columns in their order.
    is_blocked: bool,
}

/// A module of GPTQ. Numbers of the first version of the format hold the zeros less one.
pub(super) fn gptq(
    module: &mut PackedModule,
    group: Option<usize>,
    less_one: bool,
) -> Result<Unpacked, PackedProblem> {
    let (packed, zeros, scales) = triple(module)?;
    let words = packed.words()?;
    let MatrixShape { rows: octets, cols: rows } = packed.shape();
    let shape = MatrixShape { rows, cols: octets * 8 };
    let groups = groups_of(&packed, shape, group)?;
    scales.of_shape(MatrixShape { rows: groups, cols: rows })?;
    zeros.of_shape(MatrixShape { rows: groups, cols: rows.div_ceil(8) })?;
    let stored = zeros.words()?;
    let added = i16::from(less_one);
    let zeros =
        by_row(rows, groups, |row, at| nibble(stored.at(at * rows.div_ceil(8) + row / 8), row % 8) + added);
    let own = scales.floats()?;
    let scales = (0..rows).flat_map(|row| (0..groups).map(move |at| at * rows + row));
    let scales = scales.map(|at| own[at]).collect();
    let order = module.take("g_idx");
    let (group_of, is_blocked) = columns(shape.cols, groups, group, order.as_ref())?;
    let codes = Codes::Columns(words);
    Grouped { shape, bits: 4, codes, zeros, scales, groups, group_of, is_blocked }.unpacked()
}

/// A module of AWQ.
pub(super) fn awq(module: &mut PackedModule, group: Option<usize>) -> Result<Unpacked, PackedProblem> {
    let (packed, zeros, scales) = triple(module)?;
    let words = packed.words()?;
    let MatrixShape { rows: cols, cols: octets } = packed.shape();
    let (rows, shape) = (octets * 8, MatrixShape { rows: octets * 8, cols });
    let groups = groups_of(&packed, shape, group)?;
    scales.of_shape(MatrixShape { rows: groups, cols: rows })?;
    zeros.of_shape(MatrixShape { rows: groups, cols: octets })?;
    let stored = zeros.words()?;
    let zeros =
        by_row(rows, groups, |row, at| nibble(stored.at(at * octets + row / 8), AWQ_POSITIONS[row % 8]));
    let own = scales.floats()?;
    let scales = (0..rows).flat_map(|row| (0..groups).map(move |at| at * rows + row));
    let scales = scales.map(|at| own[at]).collect();
    let (group_of, is_blocked) = columns(cols, groups, group, None)?;
    let codes = Codes::Interleaved(words);
    Grouped { shape, bits: 4, codes, zeros, scales, groups, group_of, is_blocked }.unpacked()
}

/// A module of compressed-tensors whose codes are packed into numbers.
pub(super) fn packed(module: &mut PackedModule) -> Result<Unpacked, PackedProblem> {
    let Some(packed) = module.take("weight_packed") else { return Err(lacking(module, "weight_packed")) };
    let words = packed.words()?;
    let scales = module.need("weight_scale", &packed)?;
    let shape = stored_shape(&module.need("weight_shape", &packed)?)?;
    let MatrixShape { rows, cols } = shape;
    let found = packed.shape();
    let bits =
        [4_usize, 8].into_iter().find(|bits| cols.div_ceil(32 / bits) == found.cols && found.rows == rows);
    let Some(bits) = bits else {
        let why = format!(
            "it is {} x {}, which are {rows} x {cols} weights of neither four nor eight bits",
            found.rows, found.cols
        );
        return Err(packed.wrong(why));
    };
    let codes = Codes::Rows { words, words_per_row: found.cols, bits };
    let middle = 1 << (bits - 1);
    let zeros = match module.take("weight_zero_point") {
        None => Zeros::Same(middle),
        Some(zeros) => {
            let of_scales = scales.shape();
            let groups = (of_scales.rows.saturating_mul(of_scales.cols) / rows).max(1);
            zeros.of_shape(MatrixShape { rows: rows.div_ceil(32 / bits), cols: groups })?;
            let stored = zeros.words()?;
            let per_word = 32 / bits;
            by_row(rows, groups, |row, at| {
                code(stored.at(row / per_word * groups + at), row % per_word, bits)
            })
        }
    };
    let order = module.take("weight_g_idx");
    of_rows(&scales, order.as_ref(), StoredCodes { shape, bits, codes, zeros })
}

/// A module of compressed-tensors whose codes are bytes.
pub(super) fn bytes(module: &mut PackedModule, weight: &Member) -> Result<Unpacked, PackedProblem> {
    let (shape, codes) = (weight.shape(), Codes::Bytes(weight.bytes()));
    let scales = module.need("weight_scale", weight)?;
    let zeros = match module.take("weight_zero_point") {
        None => Zeros::Same(0),
        Some(zeros) => {
            zeros.of_type(BYTES)?;
            zeros.of_shape(scales.shape())?;
            let groups = (zeros.bytes().len() / shape.rows.max(1)).max(1);
            let own = zeros.bytes();
            let whole = own.len() == 1;
            by_row(shape.rows, groups, |row, at| {
                let at = if whole { 0 } else { row * groups + at };
                own.get(at).map_or(0, |byte| i16::from(byte.cast_signed()))
            })
        }
    };
    of_rows(&scales, None, StoredCodes { shape, bits: 8, codes, zeros })
}

/// The codes of a module of compressed-tensors.
struct StoredCodes<'a> {
    shape: MatrixShape,
    bits: usize,
    codes: Codes<'a>,
    zeros: Zeros,
}

/// Unpacks a module whose scales are by row and group, or one for the whole tensor.
fn of_rows(
    scales: &Member,
    order: Option<&Member>,
    stored: StoredCodes<'_>,
) -> Result<Unpacked, PackedProblem> {
    let StoredCodes { shape, bits, codes, zeros } = stored;
    let MatrixShape { rows, cols } = shape;
    let mut values = scales.floats()?;
    let groups = if values.len() == 1 { 1 } else { values.len() / rows.max(1) };
    if values.len() == 1 {
        values = vec![values[0]; rows];
    }
    let found = scales.shape();
    let is_whole = groups > 0 && values.len() == rows * groups && cols.is_multiple_of(groups);
    // One scale for each row may be a vector, one for the tensor anything.
    let is_placed = found.rows == rows || groups == 1 && found.rows == 1 || found.rows * found.cols == 1;
    if !is_whole || !is_placed {
        let why = format!("it is {} x {} for weights of {rows} x {cols}", found.rows, found.cols);
        return Err(scales.wrong(why));
    }
    let (group_of, is_blocked) = columns(cols, groups, Some(cols / groups), order)?;
    Grouped { shape, bits, codes, zeros, scales: values, groups, group_of, is_blocked }.unpacked()
}

/// The tensors of a module of GPTQ or AWQ: codes, zeros and scales.
fn triple(module: &mut PackedModule) -> Result<(Member, Member, Member), PackedProblem> {
    let Some(packed) = module.take("qweight") else { return Err(lacking(module, "qweight")) };
    let (zeros, scales) = (module.need("qzeros", &packed)?, module.need("scales", &packed)?);
    Ok((packed, zeros, scales))
}

/// The refusal of a module that is stored in another way than the configuration says.
pub(super) fn lacking(module: &PackedModule, name: &str) -> PackedProblem {
    let why = format!("{}.{name} was expected, as quantization_config of config.json says", module.name);
    match module.members.values().next() {
        Some(member) => member.wrong(why),
        None => PackedProblem { file: CONFIG.to_owned(), problem: CheckpointProblem::Configuration(why) },
    }
}

/// The two sizes that a tensor holds.
fn stored_shape(member: &Member) -> Result<MatrixShape, PackedProblem> {
    let size = |bytes: &[u8]| {
        let number = u64::from_le_bytes(bytes.try_into().ok()?);
        // Every number that a plan carries fits 32 bits.
        usize::try_from(number).ok().filter(|size| (1..=u32::MAX as usize / 2).contains(size))
    };
    let sizes: Vec<Option<usize>> = match member.tensor.stored_as.as_str() {
        "I64" => member.bytes().chunks_exact(8).map(size).collect(),
        "I32" => member.bytes().chunks_exact(4).map(|bytes| size(&[bytes, &[0; 4]].concat())).collect(),
        _ => Vec::new(),
    };
    match sizes.as_slice() {
        [Some(rows), Some(cols)] => Ok(MatrixShape { rows: *rows, cols: *cols }),
        _ => Err(member.wrong("it does not hold the rows and columns of a matrix".to_owned())),
    }
}

/// Groups of a row; one where the configuration has no groups.
fn groups_of(packed: &Member, shape: MatrixShape, group: Option<usize>) -> Result<usize, PackedProblem> {
    if shape.cols == 0 || shape.rows == 0 {
        return Err(packed.wrong("it is empty; download the checkpoint again".to_owned()));
    }
    Ok(group.map_or(1, |group| shape.cols.div_ceil(group)))
}

/// The group of each column, and whether groups are whole blocks of columns in their order. `order` names the
/// groups of columns that were quantised in another order.
fn columns(
    cols: usize,
    groups: usize,
    group: Option<usize>,
    order: Option<&Member>,
) -> Result<(Vec<usize>, bool), PackedProblem> {
    let len = group.unwrap_or(cols).max(1);
    let plain: Vec<usize> = (0..cols).map(|col| col / len).collect();
    let is_blocked = cols.is_multiple_of(BLOCK) && (groups == 1 || len.is_multiple_of(BLOCK));
    let Some(order) = order else { return Ok((plain, is_blocked)) };
    order.of_shape(MatrixShape { rows: 1, cols })?;
    let words = order.words()?;
    let own: Vec<usize> = (0..cols).map(|col| words.at(col) as usize).collect();
    if let Some(group) = own.iter().find(|group| **group >= groups) {
        return Err(
            order.wrong(format!("it names the group {group} of {groups}; download the checkpoint again"))
        );
    }
    let is_plain = own == plain;
    Ok((own, is_blocked && is_plain))
}

fn nibble(word: u32, index: usize) -> i16 {
    code(word, index, 4)
}

/// Code `index` of a number.
fn code(word: u32, index: usize, bits: usize) -> i16 {
    (word >> (index * bits) & ((1 << bits) - 1)) as i16
}

/// The zeros of all rows and groups.
fn by_row(rows: usize, groups: usize, zero: impl Fn(usize, usize) -> i16) -> Zeros {
    let each: Vec<i16> = (0..rows * groups).map(|at| zero(at / groups, at % groups)).collect();
    match each.first() {
        Some(first) if each.iter().all(|zero| zero == first) => Zeros::Same(*first),
        _ => Zeros::Each(each),
    }
}

impl Grouped<'_> {
    /// The type that has these values.
    fn dtype(&self) -> DType {
        if !self.is_blocked || !self.scales.iter().all(|scale| is_half(*scale)) {
            return DType::F32;
        }
        let is_signed = matches!(self.codes, Codes::Bytes(_));
        match (self.bits, &self.zeros) {
            (4, Zeros::Same(MIDDLE)) => DType::Q4_0,
            // A code less its zero is one of -16 to 15.
            (4, _) => DType::Q5_0,
            (_, Zeros::Same(0)) if is_signed => DType::Q8_0,
            (_, Zeros::Same(128)) if !is_signed => DType::Q8_0,
            _ => DType::F32,
        }
    }

    fn unpacked(&self) -> Result<Unpacked, PackedProblem> {
        let MatrixShape { rows, cols } = self.shape;
        let dtype = self.dtype();
        let row_bytes = dtype.row_bytes(cols).unwrap_or(0);
        // Not more than eight times the file's own bytes: a weight of four bits becomes one of 32.
        let mut bytes = Vec::with_capacity(row_bytes.saturating_mul(rows));
        let mut codes = vec![0; ROWS_TOGETHER.min(rows) * cols];
        for first in (0..rows).step_by(ROWS_TOGETHER) {
            let count = ROWS_TOGETHER.min(rows - first);
            let codes = &mut codes[..count * cols];
            self.read(first, codes);
            for (row, codes) in (first..).zip(codes.chunks_exact_mut(cols.max(1))) {
                self.subtract_zeros(row, codes);
                self.write(dtype, row, codes, &mut bytes);
            }
        }
        Ok(Unpacked { dtype, shape: self.shape, bytes })
    }

    /// The codes of some rows.
    fn read(&self, first: usize, codes: &mut [i16]) {
        let MatrixShape { rows, cols } = self.shape;
        let count = codes.len() / cols.max(1);
        match self.codes {
            Codes::Rows { words, words_per_row, bits } => {
                let per_word = 32 / bits;
                for (at, out) in codes.iter_mut().enumerate() {
                    let (row, col) = (first + at / cols, at % cols);
                    *out = code(words.at(row * words_per_row + col / per_word), col % per_word, bits);
                }
            }
            Codes::Columns(words) => {
                for octet in 0..cols / 8 {
                    for row in 0..count {
                        let word = words.at(octet * rows + first + row);
                        for (index, out) in codes[row * cols + octet * 8..][..8].iter_mut().enumerate() {
                            *out = nibble(word, index);
                        }
                    }
                }
            }
            Codes::Interleaved(words) => {
                for col in 0..cols {
                    for row in 0..count {
                        let word = words.at(col * (rows / 8) + (first + row) / 8);
                        codes[row * cols + col] = nibble(word, AWQ_POSITIONS[(first + row) % 8]);
                    }
                }
            }
            Codes::Bytes(bytes) => {
                let own = bytes.get(first * cols..).unwrap_or_default();
                for (out, byte) in codes.iter_mut().zip(own) {
                    *out = i16::from(byte.cast_signed());
                }
            }
        }
    }

    fn subtract_zeros(&self, row: usize, codes: &mut [i16]) {
        match &self.zeros {
            Zeros::Same(zero) => codes.iter_mut().for_each(|code| *code -= zero),
            Zeros::Each(zeros) => {
                let own = &zeros[row * self.groups..][..self.groups];
                for (code, group) in codes.iter_mut().zip(&self.group_of) {
                    *code -= own[*group];
                }
            }
        }
    }

    fn write(&self, dtype: DType, row: usize, codes: &[i16], out: &mut Vec<u8>) {
        let scales = &self.scales[row * self.groups..][..self.groups];
        if dtype == DType::F32 {
            let values =
                codes.iter().zip(&self.group_of).map(|(code, group)| scales[*group] * f32::from(*code));
            out.extend(values.flat_map(f32::to_le_bytes));
            return;
        }
        for (block, group) in codes.chunks_exact(BLOCK).zip(self.group_of.iter().step_by(BLOCK)) {
            out.extend(f16::from_f32(scales[*group]).to_le_bytes());
            match dtype {
                DType::Q4_0 => halves(block, MIDDLE, out),
                DType::Q5_0 => {
                    let fifth = |bits: u32, at: usize| bits | u32::from(block[at] >= 0) << at;
                    out.extend((0..BLOCK).fold(0, fifth).to_le_bytes());
                    halves(block, 2 * MIDDLE, out);
                }
                _ => out.extend(block.iter().map(|code| *code as u8)),
            }
        }
    }
}

/// The low four bits of the codes plus `offset`: those of the first half of a block with those of the second.
fn halves(block: &[i16], offset: i16, out: &mut Vec<u8>) {
    let low = |code: i16| (code + offset) as u8 & 15;
    let (first, second) = block.split_at(BLOCK / 2);
    out.extend(first.iter().zip(second).map(|(a, b)| low(*a) | low(*b) << 4));
}
