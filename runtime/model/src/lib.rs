//! Model files: GGUF and safetensors, tokenizers, architectures lowered to a Plan.
//!
//! [`Model::load`] opens an untrusted file or folder, checks all of it and gives what an engine needs: the
//! weights as byte ranges of the mapped file, a [`Tokenizer`], [`ModelFacts`] for display and schedulers, and
//! [`Model::plan`], which lowers the architecture to a plan for the given limits and device. [`Model::task`]
//! is the kind of its results. [`Model::read_adapter`] reads a small change of it (LoRA).
//!
//! A key or tensor that may change a result and is not supported is refused by name: a model that does not
//! load is better than one that answers wrongly.
//!
//! `CONTRIBUTING.md` lists the files of a new architecture.

mod arch;
pub mod chat;
mod checkpoint;
mod detokenizer;
mod encoder;
mod error;
mod foreign;
mod generator;
pub mod gguf;
mod lora;
mod model;
mod parts;
mod reading;
mod sampling;
mod score_head;
pub mod seeded;
mod source;
mod tokenizer;

pub use arch::TensorProblem;
pub use checkpoint::{CheckpointFiles, CheckpointProblem};
pub use detokenizer::Detokenizer;
pub use error::{LoadError, TokenizerProblem};
pub use foreign::ForeignFile;
pub use model::{ClassificationFacts, EmbeddingFacts, Model, ModelFacts, PlanRequest};
pub use sampling::SamplingSettings;
pub use score_head::ScoreActivation;
pub use source::{OnRead, ReadProgress};
pub use tokenizer::{EncodedPair, EncodedText, TokenSpan, TokenSpans, Tokenizer};
pub use trustformers_plan::{Adapter, AdapterRoom};
pub use trustformers_proto::Task;
