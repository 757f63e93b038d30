//! `kubectl trustformers`: the state of models, commands to rollouts, logs, checks of an installation and
//! reports of A/B tests.
//!
//! Each command reads objects of the cluster ([`cluster`]), makes a plain value of them, and prints that as
//! text or JSON. Values and texts are made by pure functions of objects and the present time, which tests
//! compare with stored output; the files of commands do the requests. The plugin works with the rights of the
//! person who calls it, and changes annotations of models alone.

pub mod args;
pub mod cluster;
pub mod doctor;
pub mod logs;
pub mod model;
pub mod output;
pub mod report;
pub mod rollout;
pub mod run;
pub mod status;
pub mod table;
pub mod text;
