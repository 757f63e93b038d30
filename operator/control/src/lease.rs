//! Leader election on a Lease: a state machine whose inputs are stored records and times of a local clock.
//!
//! Clocks of different machines are never compared. A candidate waits for the length of the lease since *it*
//! saw the record change last. A leader counts from the time at which it *sent* its last successful renewal,
//! and stops before another candidate may start. `leaseTransitions` increases whenever the holder changes and
//! orders the tables of successive leaders, so every process has an identity of its own: a restarted leader
//! is a new holder. A deleted Lease is created again with a term above every earlier one, see [`first_term`].
//!
//! `kube-lease-manager` is not used because route tables need these terms: it keeps `leaseTransitions` to
//! itself, has no rule for a deleted Lease, and reports the end of a lead by a channel instead of a deadline.

use std::time::Duration;

/// How long a lease lasts after its last renewal.
pub const LEASE: Duration = Duration::from_secs(10);
/// A leader that could not renew for this long stops leading. It is shorter than [`LEASE`] by twice the limit
/// of one request, so that the old leader has stopped when another one starts.
pub const RENEW_DEADLINE: Duration = Duration::from_secs(6);
/// Interval between renewals, and between reads of a lease that another candidate holds.
pub const RENEW_EVERY: Duration = Duration::from_secs(2);

/// The content of a stored Lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Identity of the holder; empty if the lease was released.
    pub holder: String,
    /// Changes of the holder so far.
    pub transitions: u64,
    /// Last renewal by the holder's clock. It is compared for change only, never with our clock.
    pub renewed: Option<String>,
}

/// The term of a Lease that is created: the seconds since 1970.
///
/// Gateways accept only tables of a higher term than their last one, and a deleted Lease took its term with
/// it. Terms increase by one with each leader, and leaders last longer than a second on average, so the clock
/// is above every earlier term. `leaseTransitions` is an i32: in 2026, 350,000,000 terms remain.
#[must_use]
pub fn first_term(unix_seconds: i64) -> u64 {
    u64::try_from(unix_seconds).unwrap_or(0).clamp(1, i32::MAX as u64)
}

/// The next step of a candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// There is no Lease: create it, with [`first_term`].
    Create,
    /// Write the Lease with this identity as holder and this number of transitions.
    Acquire {
        /// `leaseTransitions` to write: the term of the new leader.
        transitions: u64,
    },
    /// Write a new renewal time.
    Renew,
    /// Stop leading: the lease could not be renewed in time, or another candidate holds it.
    StepDown,
    /// Read the Lease again after this time.
    Wait(Duration),
}

/// The state of one candidate.
#[derive(Debug)]
pub struct Election {
    identity: String,
    /// The record that was read last, and when it was first read with this content.
    stored: Option<(Record, Duration)>,
    /// While leading: the term, and when the last successful renewal was sent.
    leading: Option<(u64, Duration)>,
}

impl Election {
    /// A candidate that has not read the Lease yet.
    #[must_use]
    pub fn new(identity: String) -> Self {
        Self { identity, stored: None, leading: None }
    }

    /// Records a read of the Lease: `None` if there is none.
    pub fn record_read(&mut self, record: Option<Record>, now: Duration) {
        match (&self.stored, record) {
            (Some((previous, _)), Some(record)) if *previous == record => {}
            (_, Some(record)) => self.stored = Some((record, now)),
            (_, None) => self.stored = None,
        }
    }

    /// Records that a write which was sent at `sent` succeeded and stored `record`.
    pub fn record_write(&mut self, record: Record, sent: Duration) {
        self.leading = (record.holder == self.identity).then_some((record.transitions, sent));
        self.stored = Some((record, sent));
    }

    /// The term, while leading.
    #[must_use]
    pub fn term(&self) -> Option<u64> {
        self.leading.map(|(term, _)| term)
    }

    /// While leading: when the lead ends unless a renewal succeeds.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        self.leading.map(|(_, sent)| sent + RENEW_DEADLINE)
    }

    /// Records that this candidate no longer leads.
    pub fn stepped_down(&mut self) {
        self.leading = None;
    }

    /// The next step.
    #[must_use]
    pub fn step(&self, now: Duration) -> Step {
        let Some((record, since)) = &self.stored else {
            return if self.leading.is_some() { Step::StepDown } else { Step::Create };
        };
        if let Some((_, sent)) = self.leading {
            if record.holder != self.identity || now >= sent + RENEW_DEADLINE {
                return Step::StepDown;
            }
            let next = sent + RENEW_EVERY;
            return if now >= next { Step::Renew } else { Step::Wait(next - now) };
        }
        if record.holder.is_empty() || now >= *since + LEASE {
            return Step::Acquire { transitions: record.transitions + 1 };
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
    fn the_first_candidate_creates_the_lease_and_renews_it() {
        let mut me = Election::new("me".to_owned());
        me.record_read(None, S);
        assert_eq!(me.step(S), Step::Create);
        me.record_write(record("me", 1, "a"), S);
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
    fn a_lease_is_acquired_after_its_length_without_change() {
        let mut me = Election::new("me".to_owned());
        me.record_read(Some(record("you", 4, "a")), S);
        assert_eq!(me.step(S), Step::Wait(RENEW_EVERY));
        me.record_read(Some(record("you", 4, "b")), 8 * S);
        assert_eq!(me.step(12 * S), Step::Wait(2 * S));
        me.record_read(Some(record("you", 4, "b")), 17 * S);
        assert_eq!(me.step(17 * S), Step::Wait(S));
        assert_eq!(me.step(18 * S), Step::Acquire { transitions: 5 });
    }

    #[test]
    fn a_released_lease_is_acquired_at_once() {
        let mut me = Election::new("me".to_owned());
        me.record_read(Some(record("", 4, "a")), S);
        assert_eq!(me.step(S), Step::Acquire { transitions: 5 });
    }

    #[test]
    fn a_leader_that_cannot_renew_stops_before_others_start() {
        let mut me = Election::new("me".to_owned());
        me.record_write(record("me", 1, "a"), S);
        assert_eq!(me.deadline(), Some(7 * S));
        assert_eq!(me.step(6 * S), Step::Renew);
        assert_eq!(me.step(7 * S), Step::StepDown);
        const { assert!(RENEW_DEADLINE.as_secs() + 4 <= LEASE.as_secs()) };
    }

    #[test]
    fn a_leader_that_lost_its_lease_stops() {
        let mut me = Election::new("me".to_owned());
        me.record_write(record("me", 1, "a"), S);
        me.record_read(Some(record("you", 2, "b")), 2 * S);
        assert_eq!(me.step(2 * S), Step::StepDown);
        me.stepped_down();
        assert_eq!(me.term(), None);
        me.record_write(record("me", 3, "c"), 20 * S);
        me.record_read(None, 21 * S);
        assert_eq!(me.step(21 * S), Step::StepDown);
    }
}
