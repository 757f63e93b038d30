//! Leader election on a Lease, as a state machine fed with what was read and with instants of a local clock.
//!
//! Clocks of different machines are never compared: a candidate waits for as long as the lease lasts since *it* saw the
//! record change last. A leader counts from the moment it *sent* a renewal that succeeded, and stops before anybody
//! else may begin. `leaseTransitions` goes up whenever the holder changes and orders the tables of successive leaders,
//! so every process uses an identity of its own: a restarted leader is a new holder. A Lease that somebody deleted is
//! made anew with a term above every earlier one, see [`first_term`].

use std::time::Duration;

/// How long a lease lasts after its last renewal.
pub const LEASE: Duration = Duration::from_secs(10);
/// A leader that could not renew for this long stops leading. Shorter than [`LEASE`] by more than one request may take.
pub const RENEW_DEADLINE: Duration = Duration::from_secs(6);
/// Pause between renewals, and between looks at a lease that somebody else holds.
pub const RENEW_EVERY: Duration = Duration::from_secs(2);

/// What a stored Lease says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Identity of the holder; empty when it was released.
    pub holder: String,
    /// Changes of the holder so far.
    pub transitions: u64,
    /// When the holder renewed last, by its own clock: compared for change, never with our clock.
    pub renewed: Option<String>,
}

/// The term of a Lease that is made anew: the seconds since 1970.
///
/// Gateways take only tables of a higher term than their last, and the Lease may have been deleted with the terms that
/// were in it. Terms grow by one with each leader and leaders last longer than a second on average, so that the clock
/// is above every earlier term. It fits `leaseTransitions` (an i32) with 350,000,000 terms to spare in 2026.
#[must_use]
pub fn first_term(unix_seconds: i64) -> u64 {
    u64::try_from(unix_seconds).unwrap_or(0).clamp(1, i32::MAX as u64)
}

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// There is no Lease: make it, with [`first_term`].
    Make,
    /// Write the Lease with this identity as holder and this number of transitions.
    Take {
        /// `leaseTransitions` to write: the term of the new leader.
        transitions: u64,
    },
    /// Write a new renewal time.
    Renew,
    /// Stop leading: the lease could not be renewed in time, or somebody else holds it.
    StepDown,
    /// Look again after this long.
    Wait(Duration),
}

/// The state of one candidate.
#[derive(Debug)]
pub struct Election {
    identity: String,
    /// The record as last seen, and when it was first seen so.
    seen: Option<(Record, Duration)>,
    /// While leading: the term, and when the last successful renewal was sent.
    leading: Option<(u64, Duration)>,
}

impl Election {
    /// A candidate that has seen nothing yet.
    #[must_use]
    pub fn new(identity: String) -> Self {
        Self { identity, seen: None, leading: None }
    }

    /// Notes what a read of the Lease gave: `None` where there is none.
    pub fn saw(&mut self, record: Option<Record>, now: Duration) {
        match (&self.seen, record) {
            (Some((known, _)), Some(record)) if *known == record => {}
            (_, Some(record)) => self.seen = Some((record, now)),
            (_, None) => self.seen = None,
        }
    }

    /// Notes that a write which was sent at `sent` succeeded and stored `record`.
    pub fn wrote(&mut self, record: Record, sent: Duration) {
        self.leading = (record.holder == self.identity).then_some((record.transitions, sent));
        self.seen = Some((record, sent));
    }

    /// The term, while leading.
    #[must_use]
    pub fn term(&self) -> Option<u64> {
        self.leading.map(|(term, _)| term)
    }

    /// When a leader must have renewed, or stop.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        self.leading.map(|(_, sent)| sent + RENEW_DEADLINE)
    }

    /// Notes that it no longer leads.
    pub fn stepped_down(&mut self) {
        self.leading = None;
    }

    /// What to do now.
    #[must_use]
    pub fn step(&self, now: Duration) -> Step {
        let Some((record, since)) = &self.seen else {
            return if self.leading.is_some() { Step::StepDown } else { Step::Make };
        };
        if let Some((_, sent)) = self.leading {
            if record.holder != self.identity || now >= sent + RENEW_DEADLINE {
                return Step::StepDown;
            }
            let next = sent + RENEW_EVERY;
            return if now >= next { Step::Renew } else { Step::Wait(next - now) };
        }
        if record.holder.is_empty() || now >= *since + LEASE {
            return Step::Take { transitions: record.transitions + 1 };
        }
        Step::Wait((*since + LEASE - now).min(RENEW_EVERY))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn record(holder: &str, transitions: u64, renewed: &str) -> Record {
        Record { holder: holder.to_owned(), transitions, renewed: Some(renewed.to_owned()) }
    }

    #[test]
    fn the_first_candidate_makes_the_lease_and_renews_it() {
        let mut me = Election::new("me".to_owned());
        me.saw(None, S);
        assert_eq!(me.step(S), Step::Make);
        me.wrote(record("me", 1, "a"), S);
        assert_eq!(me.term(), Some(1));
        assert_eq!(me.step(S), Step::Wait(RENEW_EVERY));
        assert_eq!(me.step(3 * S), Step::Renew);
    }

    #[test]
    fn the_term_of_a_new_lease_is_above_those_of_a_deleted_one() {
        let (made, later) = (first_term(1_790_000_000), first_term(1_790_000_100));
        assert!(later > made + 50, "fifty leaders in a hundred seconds");
        assert!(i32::try_from(later).is_ok());
        assert_eq!(first_term(-5), 1, "a clock that was never set");
    }

    #[test]
    fn a_held_lease_is_taken_only_when_it_has_not_changed_for_its_length() {
        let mut me = Election::new("me".to_owned());
        me.saw(Some(record("you", 4, "a")), S);
        assert_eq!(me.step(S), Step::Wait(RENEW_EVERY));
        me.saw(Some(record("you", 4, "b")), 8 * S);
        assert_eq!(me.step(12 * S), Step::Wait(2 * S));
        me.saw(Some(record("you", 4, "b")), 17 * S);
        assert_eq!(me.step(17 * S), Step::Wait(S));
        assert_eq!(me.step(18 * S), Step::Take { transitions: 5 });
    }

    #[test]
    fn a_released_lease_is_taken_at_once() {
        let mut me = Election::new("me".to_owned());
        me.saw(Some(record("", 4, "a")), S);
        assert_eq!(me.step(S), Step::Take { transitions: 5 });
    }

    #[test]
    fn a_leader_that_cannot_renew_stops_before_another_may_begin() {
        let mut me = Election::new("me".to_owned());
        me.wrote(record("me", 1, "a"), S);
        assert_eq!(me.deadline(), Some(7 * S));
        assert_eq!(me.step(6 * S), Step::Renew);
        assert_eq!(me.step(7 * S), Step::StepDown);
        const { assert!(RENEW_DEADLINE.as_secs() + 2 <= LEASE.as_secs()) };
    }

    #[test]
    fn a_leader_whose_lease_is_anothers_or_gone_stops() {
        let mut me = Election::new("me".to_owned());
        me.wrote(record("me", 1, "a"), S);
        me.saw(Some(record("you", 2, "b")), 2 * S);
        assert_eq!(me.step(2 * S), Step::StepDown);
        me.stepped_down();
        assert_eq!(me.term(), None);
        me.wrote(record("me", 3, "c"), 20 * S);
        me.saw(None, 21 * S);
        assert_eq!(me.step(21 * S), Step::StepDown);
    }
}
