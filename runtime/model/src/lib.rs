//! Model files: GGUF and safetensors, tokenizers, architectures lowered to a Plan.
//!
//! [`Model::load`] opens a file or folder that comes from outside, checks all of it and gives what an engine needs: the
//! weights as byte ranges of the mapped file, a [`Tokenizer`], [`ModelFacts`] for people and schedulers, and
//! [`Model::plan`], which writes the architecture down as a plan for whatever limits and device are chosen.
//! [`Model::task`] says what that plan answers.
//!
//! Everything a file may say and this crate does not honour is refused by name. A model that answers wrongly because
//! a setting was overlooked is worse than one that does not load.

mod arch;
pub mod chat;
mod checkpoint;
mod detokenizer;
mod encoder;
mod error;
pub mod gguf;
mod model;
pub mod seeded;
mod source;
mod tokenizer;

pub use arch::TensorProblem;
pub use checkpoint::{CheckpointFiles, CheckpointProblem};
pub use detokenizer::Detokenizer;
pub use error::{LoadError, TokenizerProblem};
pub use model::{EmbeddingFacts, Model, ModelFacts, PlanRequest};
pub use source::ReadProgress;
pub use tokenizer::{EncodedText, Tokenizer};
pub use trustformers_proto::Task;
