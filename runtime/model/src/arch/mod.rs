//! The architectures that can be served. The name in a file selects one; its module checks the file and
//! lowers the model to a plan.

pub(crate) mod bert;
mod decoder;
mod keys;
mod llama;
mod qwen2;
mod tensors;

use crate::gguf::{Gguf, GgufProblem};
use crate::model::PlanRequest;
use keys::ArchKeys;
use std::fmt;
use tensors::TensorFinder;
pub use tensors::TensorProblem;
use trustformers_plan::{Plan, PlanError, Weights};

/// A model of some architecture whose sizes and tensors have been checked.
pub(crate) trait Architecture: fmt::Debug + Send + Sync {
    /// Sizes for schedulers and for display.
    fn sizes(&self) -> ArchSizes;

    /// Lowers the model to a plan for these limits.
    fn plan(&self, weights: &Weights, request: &PlanRequest) -> Result<Plan, PlanError>;
}

/// The sizes of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ArchSizes {
    pub(crate) context_tokens: usize,
    pub(crate) vocabulary: usize,
    pub(crate) layers: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

type Resolve = fn(&ArchKeys<'_>, &mut TensorFinder<'_>) -> Result<Box<dyn Architecture>, GgufProblem>;

/// Every architecture of GGUF files by the name in `general.architecture`, which is also the prefix of its
/// keys.
const ARCHITECTURES: &[(&str, Resolve)] = &[
    ("llama", |keys, tensors| decoder::resolve(&llama::FAMILY, keys, tensors)),
    ("qwen2", |keys, tensors| decoder::resolve(&qwen2::FAMILY, keys, tensors)),
];

/// The names of all architectures of GGUF files, for messages.
pub(crate) fn supported() -> String {
    ARCHITECTURES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

/// Checks a file's keys and tensors against the architecture of that name; `None` when there is none. Adds
/// views of tensors that hold several of the architecture's matrices. Every tensor and every key of the
/// architecture must be used: one that is not used means that the model computes something else.
pub(crate) fn resolve(
    name: &str,
    gguf: &Gguf,
    weights: &mut Weights,
) -> Option<Result<Box<dyn Architecture>, GgufProblem>> {
    let (_, resolve) = ARCHITECTURES.iter().find(|(known, _)| *known == name)?;
    let keys = ArchKeys::new(&gguf.metadata, name);
    let mut finder = TensorFinder::of_file(gguf, weights);
    Some(resolve(&keys, &mut finder).and_then(|architecture| {
        keys.all_read()?;
        finder.all_used(name)?;
        Ok(architecture)
    }))
}

/// Whether the rows of this tensor are the vocabulary's.
pub(crate) fn has_row_per_token(tensor: &str) -> bool {
    [decoder::EMBEDDING, decoder::HEAD].contains(&tensor)
}
