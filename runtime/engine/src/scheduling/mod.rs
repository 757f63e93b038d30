//! Scheduling: which requests are admitted, which are preempted, and how many rows each gets in a step.
//!
//! Everything here is free of I/O and clocks, so that its tests are tables. `docs/engine.md` explains the
//! policy.
//!
//! | module | what it decides |
//! |---|---|
//! | `priority` | the classes of requests |
//! | `admission` | whether a request may enter a full queue |
//! | `queue` | which waiting request is admitted next |
//! | `tenants` | how much each tenant was served |
//! | `preemption` | which running sequence makes room for another |
//! | `rows` | how many rows each running sequence gets in the next step |

pub(crate) mod admission;
pub(crate) mod preemption;
pub(crate) mod priority;
pub(crate) mod queue;
pub(crate) mod rows;
pub(crate) mod tenants;
