//! The tensors of a model as a plan needs them: a name, a type, a shape and bytes with a shared owner.
//!
//! The bytes are a range of a shared source (usually a mapped file), so that a model of several gigabytes is
//! described without being read. A shape is checked against the bytes once, when the weight is made. A weight
//! may also be a [`WeightView`] of another, which reads the same bytes.

mod view;

use std::{borrow::Cow, collections::HashMap, ops::Range, sync::Arc};

use crate::DType;
use view::Strip;

pub use view::WeightView;

/// The owner of weight bytes: a mapped file, or a vector in tests.
pub type WeightBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Why a weight was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WeightError {
    /// The row is no whole number of blocks of its type.
    #[error("tensor {name}: rows of {cols} columns cannot be stored as {dtype}, which packs {} at a time", .dtype.block_len())]
    RaggedRow {
        /// The tensor's name in its file.
        name: String,
        /// Its element type.
        dtype: DType,
        /// Its columns.
        cols: usize,
    },
    /// The byte range does not hold exactly `rows` rows, or lies outside its source.
    #[error(
        "tensor {name}: {rows} x {cols} {dtype} needs {needed} bytes, but range {start}..{end} of a {source_len}-byte file was given"
    )]
    WrongSize {
        /// The tensor's name in its file.
        name: String,
        /// Its element type.
        dtype: DType,
        /// Its rows.
        rows: usize,
        /// Its columns.
        cols: usize,
        /// Bytes that the shape needs.
        needed: u128,
        /// Start of the range given.
        start: usize,
        /// End of the range given.
        end: usize,
        /// Bytes of the source.
        source_len: usize,
    },
    /// A view's range is empty or ends outside its tensor.
    #[error(
        "view {name} asks for {axis} {start}..{end} of tensor {tensor}, which has {len}; a range has one at least"
    )]
    OutOfRange {
        /// The view's name.
        name: String,
        /// The tensor that it is made of.
        tensor: String,
        /// `rows` or `columns`.
        axis: &'static str,
        /// First row or column.
        start: usize,
        /// The one after the last.
        end: usize,
        /// How many the tensor has.
        len: usize,
    },
    /// A view's columns begin or end inside a block of a quantised type.
    #[error(
        "view {name}: columns {start}..{end} of tensor {tensor} cut blocks of {dtype}, which packs {} at a time", .dtype.block_len()
    )]
    CutBlock {
        /// The view's name.
        name: String,
        /// The tensor that it is made of.
        tensor: String,
        /// The tensor's element type.
        dtype: DType,
        /// First column.
        start: usize,
        /// The column after the last.
        end: usize,
    },
    /// A tensor that cannot be read by columns.
    #[error("view {name}: tensor {tensor} cannot be transposed: {detail}")]
    Transpose {
        /// The view's name.
        name: String,
        /// The tensor that it is made of.
        tensor: String,
        /// Why, and what can be done.
        detail: String,
    },
    /// Tensors that do not make one matrix.
    #[error("tensors stacked as {name}: {detail}")]
    Stack {
        /// Name of the stack.
        name: String,
        /// What does not match.
        detail: String,
    },
    /// Two tensors have one name.
    #[error("tensor {0} occurs twice in the model's files")]
    Duplicate(String),
}

/// Identifies a weight of one [`Weights`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WeightId(pub(crate) u32);

impl WeightId {
    /// Position in its [`Weights`].
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// The shape of a matrix; a pair of numbers converts to it in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MatrixShape {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
}

impl From<(usize, usize)> for MatrixShape {
    fn from((rows, cols): (usize, usize)) -> Self {
        Self { rows, cols }
    }
}

/// A matrix of `rows` output features by `cols` input features, row-major; a vector has one row.
#[derive(Clone)]
pub struct Weight {
    name: String,
    dtype: DType,
    rows: usize,
    cols: usize,
    /// Its rows in order. A tensor of a file has one strip, a stack as many as it has tensors.
    strips: Vec<Strip>,
}

impl Weight {
    /// Describes bytes `range` of `source` as a matrix of `dtype`.
    ///
    /// # Errors
    /// [`WeightError`] when the columns are no whole blocks or the range is not exactly the matrix.
    pub fn new(
        name: impl Into<String>,
        dtype: DType,
        shape: impl Into<MatrixShape>,
        source: WeightBytes,
        range: Range<usize>,
    ) -> Result<Self, WeightError> {
        let (name, MatrixShape { rows, cols }) = (name.into(), shape.into());
        let Some(row_bytes) = dtype.row_bytes(cols) else {
            return Err(WeightError::RaggedRow { name, dtype, cols });
        };
        let needed = row_bytes as u128 * rows as u128;
        let source_len = (*source).as_ref().len();
        if range.start > range.end || range.end > source_len || (range.end - range.start) as u128 != needed {
            let (start, end) = (range.start, range.end);
            return Err(WeightError::WrongSize { name, dtype, rows, cols, needed, start, end, source_len });
        }
        let block_step = dtype.block_bytes();
        let strips = vec![Strip { source, rows, start: range.start, row_step: row_bytes, block_step }];
        Ok(Self { name, dtype, rows, cols, strips })
    }

    /// A weight that owns `values` as f32; for tests and small synthetic models.
    ///
    /// # Errors
    /// [`WeightError::WrongSize`] when `values` is not `rows × cols` long.
    pub fn from_f32(
        name: impl Into<String>,
        shape: impl Into<MatrixShape>,
        values: &[f32],
    ) -> Result<Self, WeightError> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let range = 0..bytes.len();
        Self::new(name, DType::F32, shape, Arc::new(bytes), range)
    }

    /// The tensor's name in its file.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Element type.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// Output features.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    #[must_use]
    pub const fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes that its values take as they are stored.
    #[must_use]
    pub const fn stored_bytes(&self) -> u64 {
        self.rows as u64 * self.row_bytes() as u64
    }

    /// The stored blocks of one row. They are copied only where a view's blocks do not lie side by side.
    ///
    /// # Panics
    /// When `row` is not below [`Self::rows`].
    #[must_use]
    pub fn row(&self, row: usize) -> Cow<'_, [u8]> {
        assert!(row < self.rows, "row {row} of {}, which has {}", self.name, self.rows);
        let mut row_in_strip = row;
        for strip in &self.strips {
            if row_in_strip < strip.rows {
                return strip.row(row_in_strip, self.dtype, self.cols);
            }
            row_in_strip -= strip.rows;
        }
        unreachable!("the strips of {} have all of its rows", self.name)
    }

    const fn row_bytes(&self) -> usize {
        self.cols / self.dtype.block_len() * self.dtype.block_bytes()
    }

    /// Writes one row as f32 into `out`, which is [`Self::cols`] long.
    ///
    /// # Panics
    /// When `row` is not below [`Self::rows`] or `out` is not `cols` long.
    pub fn dequantise_row(&self, row: usize, out: &mut [f32]) {
        self.dtype.dequantise(&self.row(row), out);
    }
}

impl std::fmt::Debug for Weight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}[{}, {}]", self.name, self.dtype, self.rows, self.cols)
    }
}

/// Every tensor of one model; ids are given in the order of [`Weights::push`].
#[derive(Debug, Clone, Default)]
pub struct Weights {
    list: Vec<Weight>,
    by_name: HashMap<String, WeightId>,
}

impl Weights {
    /// No weights.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a weight.
    ///
    /// # Errors
    /// [`WeightError::Duplicate`] when the name is taken.
    pub fn push(&mut self, weight: Weight) -> Result<WeightId, WeightError> {
        let id = WeightId(
            u32::try_from(self.list.len()).map_err(|_| WeightError::Duplicate(weight.name.clone()))?,
        );
        if self.by_name.contains_key(&weight.name) {
            return Err(WeightError::Duplicate(weight.name));
        }
        self.by_name.insert(weight.name.clone(), id);
        self.list.push(weight);
        Ok(id)
    }

    /// The weight of that name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<WeightId> {
        self.by_name.get(name).copied()
    }

    /// The weight itself.
    ///
    /// # Panics
    /// When `id` came from another, larger [`Weights`].
    #[must_use]
    pub fn get(&self, id: WeightId) -> &Weight {
        &self.list[id.index()]
    }

    /// Every weight with its id.
    pub fn iter(&self) -> impl Iterator<Item = (WeightId, &Weight)> {
        (0..).map(WeightId).zip(&self.list)
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Bytes of all weights as stored. Bytes of which there are views count once for each.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.list.iter().map(Weight::stored_bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_checked_against_bytes() {
        let source: WeightBytes = Arc::new(vec![0u8; 68]);
        assert!(Weight::new("a", DType::Q8_0, (2, 32), source.clone(), 0..68).is_ok());
        assert!(matches!(
            Weight::new("a", DType::Q8_0, (2, 33), source.clone(), 0..68),
            Err(WeightError::RaggedRow { cols: 33, .. })
        ));
        for (start, end) in [(0, 67), (1, 69), (60, 20)] {
            assert!(matches!(
                Weight::new("a", DType::Q8_0, (2, 32), source.clone(), start..end),
                Err(WeightError::WrongSize { needed: 68, .. })
            ));
        }
        // A shape whose size overflows is refused, not wrapped.
        assert!(Weight::new("a", DType::F32, (usize::MAX, 1 << 40), source, 0..68).is_err());
    }

    #[test]
    fn names_are_unique_and_found() {
        let mut weights = Weights::new();
        let id = weights.push(Weight::from_f32("x", (1, 2), &[1.0, 2.0]).unwrap()).unwrap();
        assert_eq!(weights.find("x"), Some(id));
        assert_eq!(weights.find("y"), None);
        let again = weights.push(Weight::from_f32("x", (1, 2), &[1.0, 2.0]).unwrap());
        assert_eq!(again, Err(WeightError::Duplicate("x".into())));
        let mut row = [0.0; 2];
        weights.get(id).dequantise_row(0, &mut row);
        assert_eq!(row, [1.0, 2.0]);
    }
}
