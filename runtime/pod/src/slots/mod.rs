//! The two slots of a model: which states a version goes through, and which changes of the slots are allowed.
//!
//! Both are pure functions. The table of models (`model_table.rs`) asks them under its lock and then acts.

mod decisions;
mod state;

pub(crate) use decisions::{
    LoadDecision, RollbackDecision, SlotFacts, SwapDecision, UnloadDecision, check_take_over, decide_beside,
    decide_load, decide_rollback, decide_swap, decide_unload, find_version,
};
pub use decisions::{Refusal, SwapTarget, VersionFilter};
pub(crate) use state::may_follow;
