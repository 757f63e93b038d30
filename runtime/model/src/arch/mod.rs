//! The architectures that can be served. The name in a file selects one; its module checks the file and
//! lowers the model to a plan.

pub(crate) mod bert;
pub(crate) mod bert_file;
mod decoder;
mod distilbert;
mod electra;
pub(crate) mod encoder_family;
mod gemma;
mod gpt2;
mod granite;
mod keys;
mod llama;
pub(crate) mod modernbert;
pub(crate) mod mpnet;
mod nomic;
mod olmo2;
mod phi3;
mod qwen2;
mod qwen3;
mod roberta;
mod rope;
mod smollm3;
mod tensors;

use crate::gguf::{Gguf, GgufProblem, Metadata};
use crate::model::PlanRequest;
use keys::ArchKeys;
pub(crate) use keys::ConfigKeys;
pub(crate) use rope::{Scaling, yarn_magnitude};
use std::fmt;
use tensors::TensorFinder;
pub use tensors::TensorProblem;
use trustformers_plan::{Hyper, Plan, PlanError, Pooling, Weights};

/// A model of some architecture whose sizes and tensors have been checked.
pub(crate) trait Architecture: fmt::Debug + Send + Sync {
    /// Sizes for schedulers and for display.
    fn sizes(&self) -> ArchSizes;

    /// Lowers the model to a plan for these limits.
    fn plan(&self, weights: &Weights, request: &PlanRequest) -> Result<Plan, PlanError>;

    /// Makes it a model that reads whole texts and gives one row for each, instead of logits. The error says
    /// why it cannot be.
    fn read_texts(&mut self, _head: TextHead) -> Result<(), &'static str> {
        Err("models of this architecture only generate text in this version")
    }

    /// How a generating architecture that reads whole texts gives their rows; `None` where it generates.
    fn text_head(&self) -> Option<TextHead> {
        None
    }
}

/// How a decoder that reads whole texts gives one row for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TextHead {
    pub(crate) pooling: Pooling,
    /// Whether rows are divided by their length.
    pub(crate) normalise: bool,
}

/// The sizes of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ArchSizes {
    /// Values of a row.
    pub(crate) width: usize,
    pub(crate) context_tokens: usize,
    pub(crate) vocabulary: usize,
    pub(crate) layers: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

impl From<&Hyper> for ArchSizes {
    fn from(hyper: &Hyper) -> Self {
        let Hyper { width, context, vocab, layers, kv_heads, head_dim, .. } = *hyper;
        Self { width, context_tokens: context, vocabulary: vocab, layers, kv_heads, head_dim }
    }
}

type Resolve = fn(&ArchKeys<'_>, &mut TensorFinder<'_>) -> Result<Box<dyn Architecture>, GgufProblem>;

/// Every architecture of GGUF files but the encoders (`bert_file.rs`), by the name in
/// `general.architecture`, which is also the prefix of its keys.
const ARCHITECTURES: &[(&str, Resolve)] = &[
    ("gemma2", |keys, tensors| decoder::resolve(&gemma::GEMMA2, keys, tensors)),
    ("gemma3", |keys, tensors| decoder::resolve(&gemma::GEMMA3, keys, tensors)),
    ("gpt2", gpt2::resolve),
    ("granite", |keys, tensors| decoder::resolve(&granite::FAMILY, keys, tensors)),
    ("llama", |keys, tensors| decoder::resolve(&llama::FAMILY, keys, tensors)),
    ("olmo2", |keys, tensors| decoder::resolve(&olmo2::FAMILY, keys, tensors)),
    ("phi3", |keys, tensors| decoder::resolve(&phi3::FAMILY, keys, tensors)),
    ("qwen2", |keys, tensors| decoder::resolve(&qwen2::FAMILY, keys, tensors)),
    ("qwen3", |keys, tensors| decoder::resolve(&qwen3::FAMILY, keys, tensors)),
    ("qwen3moe", |keys, tensors| decoder::resolve(&qwen3::WITH_EXPERTS, keys, tensors)),
    ("smollm3", |keys, tensors| decoder::resolve(&smollm3::FAMILY, keys, tensors)),
];

/// The names of all architectures of GGUF files, for messages.
pub(crate) fn supported() -> String {
    let decoders = ARCHITECTURES.iter().map(|(name, _)| *name);
    bert_file::names().chain(decoders).collect::<Vec<_>>().join(", ")
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

/// The same for a checkpoint whose configuration and tensors have the names that GGUF files give them.
///
/// # Errors
/// The first key or tensor that does not fit, or that nothing reads.
pub(crate) fn resolve_checkpoint(
    name: &str,
    metadata: &Metadata,
    config: &ConfigKeys,
    weights: &mut Weights,
) -> Result<Box<dyn Architecture>, GgufProblem> {
    let Some((_, resolve)) = ARCHITECTURES.iter().find(|(known, _)| *known == name) else {
        return Err(GgufProblem::MissingKey { key: "general.architecture".to_owned() });
    };
    let keys = ArchKeys::of_config(metadata, name, config);
    let mut finder = TensorFinder::new(weights);
    let architecture = resolve(&keys, &mut finder)?;
    keys.all_read()?;
    finder.all_used(name)?;
    Ok(architecture)
}

/// Whether the rows of this tensor are the vocabulary's.
pub(crate) fn has_row_per_token(tensor: &str) -> bool {
    [decoder::EMBEDDING, decoder::HEAD].contains(&tensor)
}
