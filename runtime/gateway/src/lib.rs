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
//! | `wire`, `model_name`, `request_body` | the protocol, the model and the body of a request |
//! | `call`, `headers` | a request as it goes to pods; who sends it |
//! | `error`, `error_shape` | errors, and how each protocol writes them |
//! | [`table`], `routing` | the operator's table, parsed, and the same table joined with live endpoints |
//! | [`split`], [`balance`], [`eject`] | the pure decisions |
//! | `hold` | requests for models without a pod |
//! | `forward`, `endpoint`, `pool` | attempts, a pod, connections to it |
//! | `body`, `answer_end`, `late`, `record` | the answer, how it ended, and what is counted of it |
//! | `websocket`, `websocket_frames` | WebSockets |
//! | `local`, `services`, `models`, `feedback` | requests that the gateway answers itself |
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

mod answer_end;
mod base64_stream;
mod body;
mod call;
mod connection;
mod endpoint;
mod error;
mod error_shape;
mod feed;
mod feedback;
mod forward;
mod gateway;
mod headers;
mod hold;
mod late;
mod limits;
mod listener;
mod local;
mod model_name;
mod models;
mod pool;
mod record;
mod request_body;
mod routing;
mod services;
mod stack;
mod websocket;
mod websocket_frames;
mod wire;

#[cfg(test)]
mod fixtures;

pub use config::Settings;
pub use server::{Running, StartError, start};
