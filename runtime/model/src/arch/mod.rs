//! The architectures that can be served: a name in a file leads to a checked description, which can write itself down
//! as a plan.

pub(crate) mod bert;
mod decoder;
mod llama;
mod qwen2;
mod tensors;

use crate::gguf::{GgufProblem, Metadata};
use crate::model::PlanRequest;
use std::fmt;
use tensors::TensorFinder;
pub use tensors::TensorProblem;
use trustformers_plan::{Plan, PlanError, Weights};

/// A model of some architecture whose sizes and tensors have been checked.
pub(crate) trait Architecture: fmt::Debug + Send + Sync {
    /// Sizes that schedulers and people ask for.
    fn sizes(&self) -> ArchSizes;

    /// Writes the model down for these limits.
    fn plan(&self, weights: &Weights, request: &PlanRequest) -> Result<Plan, PlanError>;
}

/// What an architecture tells about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ArchSizes {
    pub(crate) context_tokens: usize,
    pub(crate) vocabulary: usize,
    pub(crate) layers: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

type Resolve = fn(&Metadata, &mut TensorFinder<'_>) -> Result<Box<dyn Architecture>, GgufProblem>;

/// Every architecture of GGUF files by the name in `general.architecture`.
const ARCHITECTURES: &[(&str, Resolve)] = &[("llama", llama::resolve), ("qwen2", qwen2::resolve)];

/// The names of all architectures of GGUF files, for messages.
pub(crate) fn supported() -> String {
    ARCHITECTURES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

/// Checks a file's sizes and tensors against the architecture of that name; `None` when there is none. Every tensor
/// of the file must be used: one that is not means that the model is not what it seems to be.
pub(crate) fn resolve(
    name: &str,
    metadata: &Metadata,
    weights: &Weights,
) -> Option<Result<Box<dyn Architecture>, GgufProblem>> {
    let (_, resolve) = ARCHITECTURES.iter().find(|(known, _)| *known == name)?;
    let mut finder = TensorFinder::new(weights);
    Some(resolve(metadata, &mut finder).and_then(|architecture| {
        finder.all_used(name)?;
        Ok(architecture)
    }))
}
