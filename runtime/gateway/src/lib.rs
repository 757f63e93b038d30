//! The front door: routes, splits, balances, retries.
//!
//! A gateway knows one thing, the routing table that the operator feeds it, and needs nobody while it serves: the
//! last good table is in memory and on disk. It holds no cluster credentials and looks at no Kubernetes object.
//!
//! | module | what it holds |
//! |---|---|
//! | `stack` | the order in which a request is handled, with the reason for each position: begin reading there |
//! | [`table`], `routing` | the operator's table, parsed; the same joined with live endpoints |
//! | [`split`], [`balance`], [`eject`], [`backoff`], [`dice`] | the pure decisions |
//! | `endpoint`, `pool`, `forward`, `body` | a pod, connections to it, attempts, the answer on its way back |
//! | `intake`, `headers`, `error` | what comes in, what is passed on, what callers are told |
//! | `local`, `grpc` | what the gateway answers itself |
//! | `feed`, [`disk`] | where tables come from, and where the last one is kept |
//! | [`drain`], [`server`] | listeners and the way out |
//! | [`metrics`], [`config`] | figures and flags |

pub mod backoff;
pub mod balance;
pub mod config;
pub mod dice;
pub mod disk;
pub mod drain;
pub mod eject;
pub mod metrics;
pub mod server;
pub mod split;
pub mod table;

mod body;
mod endpoint;
mod error;
mod feed;
mod forward;
mod gateway;
mod grpc;
mod headers;
mod intake;
mod local;
mod pool;
mod routing;
mod stack;

#[cfg(test)]
mod fixtures;

pub use config::Settings;
pub use server::{Running, StartError, start};
