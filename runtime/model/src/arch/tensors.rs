//! Finds an architecture's tensors by name and shape, and records which tensors were used.

use crate::gguf::Gguf;
use thiserror::Error;
use trustformers_plan::{DType, Weight, WeightError, WeightId, WeightView, Weights};

/// A tensor that an architecture cannot work with.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("tensor {name}: {why}")]
pub struct TensorProblem {
    /// The tensor.
    pub name: String,
    /// What is wrong and what to do.
    pub why: String,
}

/// Looks tensors up and records which were used.
pub(crate) struct TensorFinder<'a> {
    weights: &'a mut Weights,
    /// The file, where it has more rows of a tensor than the weights do.
    file: Option<&'a Gguf>,
    used: Vec<bool>,
}

impl<'a> TensorFinder<'a> {
    pub(super) fn new(weights: &'a mut Weights) -> Self {
        Self { used: vec![false; weights.len()], weights, file: None }
    }

    pub(super) fn of_file(file: &'a Gguf, weights: &'a mut Weights) -> Self {
        Self { file: Some(file), ..Self::new(weights) }
    }

    /// A matrix of `rows` by `cols` that must be there.
    pub(super) fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<WeightId, TensorProblem> {
        self.optional_matrix(name, rows, cols)?.ok_or_else(|| TensorProblem {
            name: name.to_owned(),
            why: format!(
                "it is missing ({rows} x {cols} was expected); the file is incomplete: convert it again"
            ),
        })
    }

    /// A matrix of `rows` by `cols` that may be left out.
    pub(super) fn optional_matrix(
        &mut self,
        name: &str,
        rows: usize,
        cols: usize,
    ) -> Result<Option<WeightId>, TensorProblem> {
        let Some(id) = self.weights.find(name) else { return Ok(None) };
        let weight = self.weights.get(id);
        if (weight.rows(), weight.cols()) != (rows, cols) {
            let why = format!(
                "it is {} x {}, the file's keys ask for {rows} x {cols}; convert the model again",
                weight.rows(),
                weight.cols()
            );
            return Err(TensorProblem { name: name.to_owned(), why });
        }
        self.used[id.index()] = true;
        Ok(Some(id))
    }

    /// A vector of `len` plain floats that must be there.
    pub(super) fn vector(&mut self, name: &str, len: usize) -> Result<WeightId, TensorProblem> {
        let id = self.matrix(name, 1, len)?;
        match self.weights.get(id).dtype() {
            DType::F32 | DType::F16 | DType::BF16 => Ok(id),
            other => Err(TensorProblem {
                name: name.to_owned(),
                why: format!(
                    "it is stored as {other}; norms and biases must be plain floats: convert the model again"
                ),
            }),
        }
    }

    /// Adds a part of a tensor to the weights, under the name that the part has where files store it alone.
    pub(super) fn part(
        &mut self,
        whole: WeightId,
        name: String,
        view: &WeightView,
    ) -> Result<WeightId, TensorProblem> {
        let part = self.weights.get(whole).view(name.as_str(), view);
        let id = part.and_then(|part| self.weights.push(part)).map_err(|problem| {
            let why = format!("it was expected inside {}: {problem}", self.weights.get(whole).name());
            TensorProblem { name, why }
        })?;
        self.used.push(true);
        Ok(id)
    }

    /// The values of a vector that may be left out. The architecture computes with them when it is read.
    pub(super) fn optional_floats(
        &mut self,
        name: &str,
        len: usize,
    ) -> Result<Option<Vec<f32>>, TensorProblem> {
        if self.weights.find(name).is_some() { self.floats(name, len).map(Some) } else { Ok(None) }
    }

    /// The values of a vector that must be there; they are finite and above 0.
    pub(super) fn floats(&mut self, name: &str, len: usize) -> Result<Vec<f32>, TensorProblem> {
        let id = self.vector(name, len)?;
        let mut values = vec![0.0; len];
        self.weights.get(id).dequantise_row(0, &mut values);
        match values.iter().find(|value| !(value.is_finite() && **value > 0.0)) {
            None => Ok(values),
            Some(value) => {
                let why = format!("it has the value {value}; numbers above 0 were expected");
                Err(TensorProblem { name: name.to_owned(), why })
            }
        }
    }

    /// All values of a matrix that must be there, row after row. The architecture computes with them.
    pub(super) fn values(&mut self, name: &str, rows: usize, cols: usize) -> Result<Vec<f32>, TensorProblem> {
        let id = self.matrix(name, rows, cols)?;
        let mut values = vec![0.0; rows * cols];
        for (row, values) in values.chunks_mut(cols).enumerate() {
            self.weights.get(id).dequantise_row(row, values);
        }
        Ok(values)
    }

    /// A vector whose stored values are too small by one, as those of Gemma's norms in a checkpoint.
    pub(super) fn vector_plus_one(&mut self, name: &str, len: usize) -> Result<WeightId, TensorProblem> {
        let id = self.vector(name, len)?;
        let mut values = vec![0.0; len];
        self.weights.get(id).dequantise_row(0, &mut values);
        values.iter_mut().for_each(|value| *value += 1.0);
        self.made(Weight::from_f32(format!("{name}.plus_one"), (1, len), &values))
    }

    /// Adds a weight that the architecture computed.
    pub(super) fn made(&mut self, weight: Result<Weight, WeightError>) -> Result<WeightId, TensorProblem> {
        let id = weight.and_then(|weight| self.weights.push(weight)).map_err(|problem| TensorProblem {
            name: "computed by the architecture".to_owned(),
            why: problem.to_string(),
        })?;
        self.used.push(true);
        Ok(id)
    }

    /// The transpose of a matrix that is stored as features in × features out.
    pub(super) fn transposed(
        &mut self,
        name: &str,
        rows: usize,
        cols: usize,
    ) -> Result<WeightId, TensorProblem> {
        let stored = self.matrix(name, cols, rows)?;
        self.part(stored, format!("{name}.transposed"), &WeightView::Transposed)
    }

    /// Rows of a tensor.
    pub(super) fn rows_of(&self, name: &str) -> Option<usize> {
        self.weights.find(name).map(|id| self.weights.get(id).rows())
    }

    /// Rows of a tensor as the file stores it, those without a token included.
    pub(super) fn stored_rows_of(&self, name: &str) -> Option<usize> {
        self.file?.tensor(name).map(|tensor| tensor.matrix().0)
    }

    /// Refuses a file with tensors that were not used.
    pub(super) fn all_used(&self, architecture: &str) -> Result<(), TensorProblem> {
        match self.weights.iter().find(|(id, _)| !self.used[id.index()]) {
            None => Ok(()),
            Some((_, weight)) => Err(TensorProblem {
                name: weight.name().to_owned(),
                why: format!(
                    "it is not part of the {architecture} architecture as it is supported here; without it the \
                     model would answer wrongly"
                ),
            }),
        }
    }
}
