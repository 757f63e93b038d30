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
//! | [`liveness`] | whether a restart would help |
//! | [`lifecycle`] | one version of a model from Pending to Ready or Failed, and its end |
//! | [`probe`] | the prompt whose answer is known, asked before a model may serve |
//! | [`slots`] | which changes of a model's two versions are allowed: pure functions |
//! | [`model_table`] | the models of the process: added and unloaded while the others serve |
//! | `version_table` | the versions of a model: loaded beside the one that answers, swapped and rolled back |
//! | `load_rate` | how fast a load goes |
//! | `reading` | finding and reading the files of a model, and their digest |
//! | [`adapters`] | adapters of a model: their files, and the names by which callers choose them |
//! | [`control`] | who may load, swap and unload them |
//! | [`admin`] | the port on which the operator does, with its token |
//! | [`models`] | the `Inference` over all of them |
//! | [`params`], [`embed`], [`scores`], `generate` | translation between the API and the engines |
//! | [`entities`] | entities from labels of tokens |
//! | `conversation` | from a conversation to a prompt, by the model's chat template |
//! | [`inflight`] | requests in flight and the time of the last arrival |
//! | [`metrics_compat`] | the figures under the names of another server |
//! | `trace` | the spans of a generation's phases |
//! | [`process`] | listeners, signals, drain: the whole life of the process |

pub mod adapters;
pub mod admin;
pub mod control;
mod conversation;
pub mod device;
pub mod embed;
pub mod entities;
pub mod failure;
pub mod faults;
mod generate;
pub mod inflight;
pub mod lifecycle;
pub mod liveness;
pub mod load;
mod load_rate;
mod memory;
mod memory_ledger;
pub mod metrics_compat;
mod model_files;
pub mod model_table;
pub mod models;
pub mod params;
pub mod probe;
pub mod process;
mod reading;
pub mod runner;
pub mod scores;
pub mod slots;
pub mod spec;
pub mod status;
mod trace;
mod version_table;
