//! The Open Inference Protocol, version 2, as KServe and Triton define it: tensors in, tensors out, over HTTP
//! and gRPC. `docs/kserve.md` describes which tensors and parameters the models of this server have.
//!
//! | module | what it holds |
//! |---|---|
//! | `tensors.rs` | data types and values: JSON, little-endian bytes, typed lists |
//! | `metadata.rs` | the tensors of each task; descriptions of models |
//! | `infer.rs`, `run.rs` | a request becomes requests of [`crate::Inference`], and answers become tensors |
//! | `scores.rs` | the same of models that give scores |
//! | `json.rs`, `http.rs` | the codec over HTTP, with binary tensors and the generate extension |
//! | `messages.rs`, `grpc.rs` | the codec over gRPC |
//! | `statistics.rs` | counts of the requests over this protocol |

pub(crate) mod grpc;
pub(crate) mod http;
mod infer;
pub(crate) mod json;
mod messages;
mod metadata;
mod run;
mod scores;
mod statistics;
mod tensors;

pub(crate) use statistics::Statistics;
