//! Whether a restart would help: an engine that hangs or fails every step, or a load that stands still.
//!
//! A long prompt is no hang: it is read in steps of a bounded number of tokens, and each step is progress.

use std::time::Duration;

use trustformers_api::Verdict;
use trustformers_engine::Heartbeat;

/// Work pending and no step for this long: the engine hangs. The longest step there is, a full token budget
/// of a large model on a slow CPU, takes a few seconds.
pub const ENGINE_STALL: Duration = Duration::from_secs(60);
/// So many steps failed one after the other: the device is broken in a way that a restart may cure.
const FAILED_STEPS: u64 = 3;
/// Loading without a sign of life for this long: the storage hangs in a way that a restart may cure.
const LOAD_STALL: Duration = Duration::from_secs(600);

/// What is wrong with the engine of a model.
pub(crate) fn engine_fault(name: &str, beat: Heartbeat, stall: Duration) -> Option<Verdict> {
    if !beat.alive {
        return Some(Verdict::no(format!("the engine of {name} has ended unexpectedly; see the log")));
    }
    if beat.failed_steps >= FAILED_STEPS {
        let failed = beat.failed_steps;
        return Some(Verdict::no(format!(
            "the last {failed} steps of the engine of {name} failed; see the log"
        )));
    }
    if beat.work_pending && beat.last_step_age > stall {
        let age = beat.last_step_age.as_secs();
        return Some(Verdict::no(format!("the engine of {name} has work but made no step for {age} s")));
    }
    None
}

/// What is wrong with the load of a model that gave its last sign of life so long ago.
pub(crate) fn load_fault(name: &str, age: Duration) -> Option<Verdict> {
    (age > LOAD_STALL)
        .then(|| Verdict::no(format!("loading {name} made no progress for {} s", age.as_secs())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_engine_that_stands_still_with_work_or_fails_or_has_ended_is_at_fault() {
        let healthy =
            Heartbeat { last_step_age: Duration::ZERO, work_pending: true, alive: true, failed_steps: 0 };
        let old = Duration::from_secs(61);
        let cases = [
            (healthy, None),
            // Nothing to do, for however long.
            (Heartbeat { work_pending: false, last_step_age: Duration::from_secs(86_400), ..healthy }, None),
            (Heartbeat { last_step_age: ENGINE_STALL, ..healthy }, None),
            (Heartbeat { last_step_age: old, ..healthy }, Some("made no step for 61 s")),
            (Heartbeat { failed_steps: 2, ..healthy }, None),
            (Heartbeat { failed_steps: 3, ..healthy }, Some("the last 3 steps")),
            (Heartbeat { alive: false, work_pending: false, ..healthy }, Some("ended unexpectedly")),
        ];
        for (beat, wanted) in cases {
            let fault = engine_fault("m", beat, ENGINE_STALL);
            match (&fault, wanted) {
                (None, None) => {}
                (Some(verdict), Some(says)) => assert!(!verdict.ok && verdict.message.contains(says)),
                _ => panic!("{beat:?}: {fault:?}"),
            }
        }
        assert!(load_fault("m", Duration::from_secs(600)).is_none());
        assert!(load_fault("m", Duration::from_secs(601)).unwrap().message.contains("601 s"));
    }
}
