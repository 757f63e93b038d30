//! Finds an architecture's tensors by name and shape, and records which tensors were used.

use crate::gguf::Gguf;
use thiserror::Error;
use trustformers_plan::{DType, WeightId, WeightView, Weights};

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
