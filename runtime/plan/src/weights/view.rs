//! Views of stored tensors: ranges of rows or columns, transposes, and several tensors stacked by rows.
//!
//! A view copies nothing. It is a [`Weight`] of its own, with a name of its own, that reads the bytes of the
//! tensor it was made from. So one stored tensor can serve several projections (queries, keys and values in
//! one tensor), a device of a group can hold its share of a matrix, and a tensor that is stored as features
//! in × features out can be multiplied.

use std::{borrow::Cow, ops::Range};

use super::{Weight, WeightBytes, WeightError};
use crate::DType;

/// Which part of a tensor a view has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WeightView {
    /// These rows (output features).
    Rows(Range<usize>),
    /// These columns (input features). A quantised type packs several columns in a block; the range consists
    /// of whole blocks.
    Cols(Range<usize>),
    /// Rows become columns. Only for types of one value per block, because a block is packed along a row.
    Transposed,
}

/// Rows at equal distances in one source, and blocks at equal distances in each row.
#[derive(Clone)]
pub(super) struct Strip {
    pub(super) source: WeightBytes,
    pub(super) rows: usize,
    /// Byte of the first block of the first row.
    pub(super) start: usize,
    /// Bytes from a row to the next.
    pub(super) row_step: usize,
    /// Bytes from a block of a row to the next.
    pub(super) block_step: usize,
}

impl Strip {
    /// The blocks of one row, which are copied only where they do not lie side by side.
    pub(super) fn row(&self, row: usize, dtype: DType, cols: usize) -> Cow<'_, [u8]> {
        let (bytes, block_bytes) = ((*self.source).as_ref(), dtype.block_bytes());
        let (first, blocks) = (self.start + row * self.row_step, cols / dtype.block_len());
        if self.block_step == block_bytes {
            return Cow::Borrowed(&bytes[first..first + blocks * block_bytes]);
        }
        let starts = (0..blocks).map(|block| first + block * self.block_step);
        Cow::Owned(starts.flat_map(|start| &bytes[start..start + block_bytes]).copied().collect())
    }
}

impl Weight {
    /// A part of this tensor under another name. Views can be made of views.
    ///
    /// # Errors
    /// [`WeightError::OutOfRange`] when a range is empty or ends outside the tensor,
    /// [`WeightError::CutBlock`] when a range of columns cuts a block, [`WeightError::Transpose`] when the
    /// values cannot be transposed.
    pub fn view(&self, name: impl Into<String>, view: &WeightView) -> Result<Self, WeightError> {
        let name = name.into();
        match view {
            WeightView::Rows(range) => self.row_range(name, range),
            WeightView::Cols(range) => self.column_range(name, range),
            WeightView::Transposed => self.transposed(name),
        }
    }

    /// The rows of all `parts`, one tensor after the other, under one name.
    ///
    /// # Errors
    /// [`WeightError::Stack`] when there is no part, or when a part has another type or other columns than
    /// the first.
    pub fn stacked(name: impl Into<String>, parts: &[&Self]) -> Result<Self, WeightError> {
        let name = name.into();
        let Some(first) = parts.first() else {
            return Err(WeightError::Stack { name, detail: "it has no tensors".into() });
        };
        if let Some(other) = parts.iter().find(|part| (part.dtype, part.cols) != (first.dtype, first.cols)) {
            let detail = format!("{other:?} does not continue {first:?}: types and columns must be equal");
            return Err(WeightError::Stack { name, detail });
        }
        let Some(rows) = parts.iter().try_fold(0_usize, |rows, part| rows.checked_add(part.rows)) else {
            return Err(WeightError::Stack { name, detail: "the number of its rows overflows".into() });
        };
        let strips = parts.iter().flat_map(|part| part.strips.iter().cloned()).collect();
        Ok(Self { name, dtype: first.dtype, rows, cols: first.cols, strips })
    }

    fn row_range(&self, name: String, range: &Range<usize>) -> Result<Self, WeightError> {
        self.check_range(&name, "rows", range, self.rows)?;
        let mut strips = Vec::new();
        let mut strip_start = 0;
        for strip in &self.strips {
            let (first, end) = (range.start.max(strip_start), range.end.min(strip_start + strip.rows));
            if first < end {
                let start = strip.start + (first - strip_start) * strip.row_step;
                strips.push(Strip { rows: end - first, start, ..strip.clone() });
            }
            strip_start += strip.rows;
        }
        Ok(Self { name, dtype: self.dtype, rows: range.len(), cols: self.cols, strips })
    }

    fn column_range(&self, name: String, range: &Range<usize>) -> Result<Self, WeightError> {
        self.check_range(&name, "columns", range, self.cols)?;
        let block_len = self.dtype.block_len();
        if !range.start.is_multiple_of(block_len) || !range.end.is_multiple_of(block_len) {
            let (tensor, dtype, Range { start, end }) = (self.name.clone(), self.dtype, range.clone());
            return Err(WeightError::CutBlock { name, tensor, dtype, start, end });
        }
        let first_block = range.start / block_len;
        let narrowed =
            |strip: &Strip| Strip { start: strip.start + first_block * strip.block_step, ..strip.clone() };
        let strips = self.strips.iter().map(narrowed).collect();
        Ok(Self { name, dtype: self.dtype, rows: self.rows, cols: range.len(), strips })
    }

    fn transposed(&self, name: String) -> Result<Self, WeightError> {
        let tensor = self.name.clone();
        if self.dtype.block_len() > 1 {
            let detail = format!("{} packs {} values of a row together", self.dtype, self.dtype.block_len());
            return Err(WeightError::Transpose { name, tensor, detail });
        }
        let [strip] = self.strips.as_slice() else {
            let detail = "it is a stack of tensors; transpose each of them first".into();
            return Err(WeightError::Transpose { name, tensor, detail });
        };
        let (row_step, block_step) = (strip.block_step, strip.row_step);
        let strips = vec![Strip { rows: self.cols, row_step, block_step, ..strip.clone() }];
        Ok(Self { name, dtype: self.dtype, rows: self.cols, cols: self.rows, strips })
    }

    fn check_range(
        &self,
        name: &str,
        axis: &'static str,
        range: &Range<usize>,
        len: usize,
    ) -> Result<(), WeightError> {
        if range.start < range.end && range.end <= len {
            return Ok(());
        }
        let (name, tensor, Range { start, end }) = (name.to_owned(), self.name.clone(), range.clone());
        Err(WeightError::OutOfRange { name, tensor, axis, start, end, len })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// Three rows of four columns: 0, 1, 2, 3; 10, 11, 12, 13; 20, 21, 22, 23.
    fn counted() -> Weight {
        let values: Vec<f32> = (0..12_u8).map(|i| f32::from(i / 4 * 10 + i % 4)).collect();
        Weight::from_f32("counted", (3, 4), &values).unwrap()
    }

    fn rows(weight: &Weight) -> Vec<Vec<f32>> {
        let read = |row| {
            let mut values = vec![0.0; weight.cols()];
            weight.dequantise_row(row, &mut values);
            values
        };
        (0..weight.rows()).map(read).collect()
    }

    #[test]
    fn ranges_and_transposes_read_the_values_they_name() {
        let whole = counted();
        let view = |view: WeightView| rows(&whole.view("part", &view).unwrap());
        assert_eq!(view(WeightView::Rows(1..3)), [[10.0, 11.0, 12.0, 13.0], [20.0, 21.0, 22.0, 23.0]]);
        assert_eq!(view(WeightView::Cols(1..3)), [[1.0, 2.0], [11.0, 12.0], [21.0, 22.0]]);
        let transposed = [[0.0, 10.0, 20.0], [1.0, 11.0, 21.0], [2.0, 12.0, 22.0], [3.0, 13.0, 23.0]];
        assert_eq!(view(WeightView::Transposed), transposed);
    }

    #[test]
    fn views_of_views_compose() {
        let transposed = counted().view("t", &WeightView::Transposed).unwrap();
        let inner = transposed.view("rows", &WeightView::Rows(1..3)).unwrap();
        let inner = inner.view("cols", &WeightView::Cols(1..3)).unwrap();
        assert_eq!(rows(&inner), [[11.0, 21.0], [12.0, 22.0]]);
        let back = transposed.view("back", &WeightView::Transposed).unwrap();
        assert_eq!(rows(&back), rows(&counted()));
        assert!(matches!(back.row(1), Cow::Borrowed(_)), "rows that lie side by side are not copied");
    }

    #[test]
    fn stacks_are_read_and_cut_across_their_tensors() {
        let (whole, top) = (counted(), counted().view("top", &WeightView::Rows(0..1)).unwrap());
        let stack = Weight::stacked("stack", &[&whole, &top, &whole]).unwrap();
        assert_eq!((stack.name(), stack.rows(), stack.cols()), ("stack", 7, 4));
        let expected = [rows(&whole), rows(&top), rows(&whole)].concat();
        assert_eq!(rows(&stack), expected);
        for (start, end) in [(0, 3), (2, 5), (3, 4), (4, 7), (0, 7)] {
            let part = stack.view("part", &WeightView::Rows(start..end)).unwrap();
            assert_eq!(rows(&part), expected[start..end], "{start}..{end}");
        }
        let narrow = stack.view("narrow", &WeightView::Cols(3..4)).unwrap();
        assert_eq!(rows(&narrow).concat(), [3.0, 13.0, 23.0, 3.0, 3.0, 13.0, 23.0]);
        assert!(matches!(
            stack.view("t", &WeightView::Transposed),
            Err(WeightError::Transpose { tensor, .. }) if tensor == "stack"
        ));
    }

    #[test]
    fn stacks_of_unlike_tensors_are_refused_by_name() {
        let narrow = counted().view("narrow", &WeightView::Cols(0..2)).unwrap();
        let error = Weight::stacked("qkv", &[&counted(), &narrow]).unwrap_err().to_string();
        assert!(error.contains("qkv") && error.contains("narrow") && error.contains("counted"), "{error}");
        assert!(matches!(Weight::stacked("none", &[]), Err(WeightError::Stack { .. })));
    }

    #[test]
    fn ranges_outside_the_tensor_are_refused_by_name() {
        let whole = counted();
        for view in [WeightView::Rows(1..4), WeightView::Rows(2..2), WeightView::Cols(0..5)] {
            let error = whole.view("part", &view).unwrap_err();
            assert!(matches!(error, WeightError::OutOfRange { .. }), "{error}");
            let text = error.to_string();
            assert!(text.contains("part") && text.contains("counted"), "{text}");
        }
    }

    #[test]
    fn quantised_blocks_are_kept_whole() {
        // Two rows of two blocks; each block's scale says which it is.
        let block = |number: u8| {
            let mut bytes = half::f16::from_f32(f32::from(number)).to_le_bytes().to_vec();
            bytes.extend((0..32).map(|i| i + number));
            bytes
        };
        let bytes: Vec<u8> = (1..5).flat_map(block).collect();
        let len = bytes.len();
        let whole = Weight::new("packed", DType::Q8_0, (2, 64), Arc::new(bytes), 0..len).unwrap();
        let right = whole.view("right", &WeightView::Cols(32..64)).unwrap();
        let expected: Vec<Vec<f32>> = rows(&whole).into_iter().map(|row| row[32..].to_vec()).collect();
        assert_eq!(rows(&right), expected);
        assert_eq!(right.stored_bytes(), 68);
        let cut = whole.view("cut", &WeightView::Cols(16..64)).unwrap_err();
        assert!(matches!(&cut, WeightError::CutBlock { start: 16, end: 64, .. }), "{cut}");
        assert!(cut.to_string().contains("cut") && cut.to_string().contains("packed"), "{cut}");
        assert!(matches!(
            whole.view("t", &WeightView::Transposed),
            Err(WeightError::Transpose { tensor, .. }) if tensor == "packed"
        ));
    }
}
