//! The generation engine: from a request to a stream of tokens.
//!
//! | module | what it holds |
//! |---|---|
//! | `handle` | [`Engine`], which callers submit requests to |
//! | `stream` | [`Generation`], the stream that a caller reads |
//! | `adapters` | adapters on the device thread |
//! | `buffer` | the events between the device thread and a caller, and the bound on all of them |
//! | `device` | the loop of the device thread |
//! | `flight` | the steps that the device has |
//! | `kv` | the size of the KV cache |
//! | `sequence` | one request on the device thread |
//! | `completion` | one answer: how tokens are chosen, their text, and whether one is the last |
//! | `stop` | stop texts |

mod adapters;
mod buffer;
mod completion;
mod device;
mod flight;
mod handle;
mod kv;
mod sequence;
mod stop;
mod stream;

pub(crate) use buffer::ANSWER_BUFFER_BYTES;
pub use handle::{Engine, EngineInfo};
pub(crate) use sequence::Sequence;
pub use stream::Generation;
