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
//! | [`table`], [`policy`], `routing` | the operator's table, parsed and joined with live endpoints |
//! | [`split`], [`balance`], [`eject`], [`breaker`], [`retry`], [`hedge`], [`ewma`] | the pure decisions |
//! | [`ab_test`], [`user`], `score_token` | the variant of a request, its user, and what is counted of it |
//! | [`health`] | asks pods whether they are ready |
//! | `hold` | requests for models without a pod |
//! | `forward`, `endpoint`, `pool` | attempts, also two at once, a pod, connections to it |
//! | [`shadow`] | requests that another revision answers as well |
//! | `body`, `answer_end`, `late` | the answer, and how it ended |
//! | `attempt`, `outcome`, `record`, `counts` | what is counted of attempts and requests, and reported |
//! | `websocket`, `websocket_frames`, `websocket_relay` | WebSockets |
//! | `session` | the requests within a WebSocket or a `Session` |
//! | `local`, `services`, `models`, `feedback` | requests that the gateway answers itself |
//! | `trace` | the spans of requests |
//! | `feed`, [`disk`] | where tables come from, and where the last one is saved |
//! | [`server`], [`embedded`], [`drain`] | start, also inside another program, and end |
//! | [`metrics`], [`config`] | metrics and flags |

pub mod ab_test;
pub mod balance;
pub mod breaker;
pub mod config;
pub mod disk;
pub mod drain;
pub mod eject;
pub mod embedded;
pub mod ewma;
pub mod health;
pub mod hedge;
pub mod metrics;
pub mod policy;
pub mod retry;
pub mod server;
pub mod split;
pub mod table;
pub mod user;

mod answer_end;
mod attempt;
mod base64_stream;
mod body;
mod call;
mod connection;
mod counts;
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
mod outcome;
mod pool;
mod record;
mod request_body;
mod routing;
mod score_token;
mod services;
mod session;
pub mod shadow;
mod stack;
mod trace;
mod websocket;
mod websocket_frames;
mod websocket_relay;
mod wire;

#[cfg(test)]
mod fixtures;

pub use config::Settings;
pub use embedded::{EmbeddedSettings, Publisher, start_embedded};
pub use server::{Running, StartError, start};
