//! The pod: engines behind gRPC and HTTP, with states that can be watched, health, metrics and drain.
//!
//! The process serves its status from the first moment and loads in the background, so that a client can
//! watch the progress, and the reason when loading fails. It never exits because a model is bad: a restart
//! would fail the same way and hide the cause. The library half is what `trustformers-serve` runs several
//! models with.
//!
//! | module | what it holds |
//! |---|---|
//! | [`spec`] | what to load and with which settings |
//! | [`device`] | which backend a device's name means |
//! | [`load`] | files → digest → model → engine, blocking, with progress |
//! | `memory` | whether a model fits in memory, before it is loaded |
//! | [`runner`] | the engine of a model's task |
//! | [`failure`] | why that failed, and whether to try again |
//! | [`status`] | the states of all models, published |
//! | [`lifecycle`] | one model from Pending to Ready or Failed, and its end |
//! | [`model_table`] | the models of the process: added, replaced and unloaded while the others serve |
//! | [`control`] | who may load and unload them |
//! | [`models`] | the `Inference` over all of them |
//! | [`params`], [`embed`], `generate` | translation between the API and the engines |
//! | `conversation` | from a conversation to a prompt, by the model's chat template |
//! | [`inflight`] | requests in flight and the time of the last arrival |
//! | [`process`] | listeners, signals, drain: the whole life of the process |

pub mod control;
mod conversation;
pub mod device;
pub mod embed;
pub mod failure;
mod generate;
pub mod inflight;
pub mod lifecycle;
pub mod load;
mod memory;
pub mod model_table;
pub mod models;
pub mod params;
pub mod process;
pub mod runner;
pub mod spec;
pub mod status;
