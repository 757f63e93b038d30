//! Tool calls and reasoning: which syntax a model writes them in, what a request may say about them, the
//! grammar that makes an answer a call, and the parser that takes an answer apart while it streams. Pure: no
//! I/O.
//!
//! | module | what it holds |
//! |---|---|
//! | [`syntax`] | the families of call syntax, and how a chat template tells its family |
//! | [`check`] | the fields `tools` and `tool_choice` of a request |
//! | [`grammar`] | the grammar of an answer that must be a call |
//! | [`parser`] | the streaming parser: content, reasoning and calls |

pub mod check;
mod emitter;
mod functions;
mod gemma_call;
pub mod grammar;
mod json_calls;
mod json_object;
mod json_scan;
pub mod parser;
mod reader;
mod reasoning;
mod splitter;
pub mod syntax;
mod xml_call;

pub use check::{MAX_TOOLS, check_choice, check_tools};
pub use grammar::call_grammar;
pub use parser::{AnswerParser, Part};
pub use syntax::{AnswerSyntax, CallSyntax, ReasoningSyntax};

#[cfg(test)]
mod tests;
