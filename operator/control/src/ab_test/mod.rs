//! A/B tests: what a test means, who gets which variant, what was counted, and what that says.
//!
//! | module | what it decides |
//! |---|---|
//! | [`validate`] | whether a spec can be honoured, alone and beside other objects |
//! | [`assign`] | shares of variants, owners of users, and the routes that variants share |
//! | [`sample`] | sums over gateways that survive restarts of gateways and operators |
//! | `scored` | which scores two gateways counted of one answer |
//! | [`metric`] | the sums of one metric, and how two variants differ in it |
//! | [`assess`] | verdicts, guardrails, and whether users are divided as configured |
//! | `figures` | how the status shows what was counted |
//! | [`status`] | the next state of a test, and its status |

pub mod assess;
pub mod assign;
mod figures;
pub mod metric;
pub mod sample;
mod scored;
pub mod status;
pub mod validate;

#[cfg(test)]
mod simulated;
