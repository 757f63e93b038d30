//! The gateway: it routes, splits, balances and retries requests.
//!
//! Its only input is the routing table from the operator's feed, and it needs no other program while it
//! serves: the last valid table is in memory and on disk. It has no cluster credentials and reads no
//! Kubernetes object.
//!
//! | module | content |
//! |---|---|
//! | `stack` | the order in which a request is handled, with the reasons: begin reading here |
//! | `listener`, `connection` | accepted connections, their protocol and their timeouts |
//! | `limits` | bounds on connections, requests and bytes, in total and for one caller, with the arithmetic |
//! | `request_body`, `headers`, `error` | a request's body and headers, and errors as answers |
//! | [`table`], `routing` | the operator's table, parsed, and the same table joined with live endpoints |
//! | [`split`], [`balance`], [`eject`] | the pure decisions |
//! | `forward`, `body`, `endpoint`, `pool` | attempts, the answer, a pod, connections to it |
//! | `local`, `grpc` | requests that the gateway answers itself |
//! | `feed`, [`disk`] | where tables come from, and where the last one is saved |
//! | [`server`], [`drain`] | start and end |
//! | [`metrics`], [`config`] | metrics and flags |

pub mod balance;
pub mod config;
pub mod disk;
pub mod drain;
pub mod eject;
pub mod metrics;
pub mod server;
pub mod split;
pub mod table;

mod body;
mod connection;
mod endpoint;
mod error;
mod feed;
mod forward;
mod gateway;
mod grpc;
mod headers;
mod limits;
mod listener;
mod local;
mod pool;
mod request_body;
mod routing;
mod stack;

#[cfg(test)]
mod fixtures;

pub use config::Settings;
pub use server::{Running, StartError, start};
