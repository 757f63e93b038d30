//! Growing, jittered pauses between attempts to reach the operator.
//!
//! Jitter keeps gateways that lost the same operator from coming back in one wave. The longest pause is short,
//! because a new leader waits only six seconds for gateways that it has not heard yet.

use std::time::Duration;

use crate::dice::{Dice, below};

const FIRST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(1);

/// The pauses of one series of failures.
#[derive(Debug, Default)]
pub struct Backoff {
    attempts: u32,
}

impl Backoff {
    /// The next pause: between half of the step and the whole of it, where the step doubles up to a second.
    pub fn next(&mut self, dice: &Dice) -> Duration {
        let step = FIRST.saturating_mul(1 << self.attempts.min(16)).min(LONGEST);
        self.attempts = self.attempts.saturating_add(1);
        let half_us = u64::try_from(step.as_micros() / 2).unwrap_or(u64::MAX - 1);
        Duration::from_micros(half_us + below(dice.roll(), half_us + 1))
    }

    /// Something worked: the next series starts small.
    pub fn reset(&mut self) {
        self.attempts = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_with_jitter_up_to_the_longest() {
        let dice = Dice::seeded(5);
        let mut backoff = Backoff::default();
        for step_ms in [50, 100, 200, 400, 800, 1000, 1000] {
            let pause = backoff.next(&dice);
            let step = Duration::from_millis(step_ms);
            assert!(pause >= step / 2 && pause <= step, "{pause:?} of {step:?}");
        }
        backoff.reset();
        assert!(backoff.next(&dice) <= FIRST);
    }

    #[test]
    fn two_gateways_do_not_wait_alike() {
        let (one, two) = (Dice::seeded(1), Dice::seeded(2));
        assert_ne!(Backoff::default().next(&one), Backoff::default().next(&two));
    }
}
