//! Budgets that callers share, so that one caller cannot use a server up.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

/// The party that a budget is shared between: an IPv4 address, or the /64 network of an IPv6 address, since
/// one machine usually has a whole /64 network to itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Caller(IpAddr);

impl Caller {
    /// The caller at the other end of a connection.
    #[must_use]
    pub fn at(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V6(v6) => {
                let [a, b, c, d, ..] = v6.segments();
                Self(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into())
            }
            v4 @ IpAddr::V4(_) => Self(v4),
        }
    }
}

/// A number of units (bytes, connections) that callers take and give back.
///
/// A caller may hold at most as many units as are free (a dynamic threshold with factor 1). A caller alone
/// therefore holds at most one half, two callers hold one third each, and `n` callers leave `1 / (n + 1)` for
/// a new one.
#[derive(Debug)]
pub struct FairBudget {
    total: usize,
    state: Mutex<BudgetState>,
}

#[derive(Debug, Default)]
struct BudgetState {
    used: usize,
    /// At most one entry for each unit in use.
    by_caller: HashMap<Caller, usize>,
}

/// Units that a caller holds. Dropping it gives them back.
#[derive(Debug)]
pub struct Share {
    budget: Arc<FairBudget>,
    caller: Caller,
    units: usize,
}

impl FairBudget {
    /// A budget of `total` units.
    #[must_use]
    pub fn new(total: usize) -> Arc<Self> {
        Arc::new(Self { total, state: Mutex::default() })
    }

    /// Takes `units` for `caller`. None where the caller would hold more than what is left for the others.
    #[must_use]
    pub fn try_acquire(self: &Arc<Self>, caller: Caller, units: usize) -> Option<Share> {
        let mut share = Share { budget: Arc::clone(self), caller, units: 0 };
        share.try_grow(units).then_some(share)
    }

    /// Units in use, of all callers.
    #[must_use]
    pub fn used(&self) -> usize {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).used
    }

    fn release(&self, caller: Caller, units: usize) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.used = state.used.saturating_sub(units);
        let held = state.by_caller.get(&caller).copied().unwrap_or(0).saturating_sub(units);
        if held == 0 {
            state.by_caller.remove(&caller);
        } else {
            state.by_caller.insert(caller, held);
        }
    }
}

impl Share {
    /// Takes `more` units. False, with nothing changed, where the caller would hold more than what is left.
    pub fn try_grow(&mut self, more: usize) -> bool {
        if more == 0 {
            return true;
        }
        let mut state = self.budget.state.lock().unwrap_or_else(PoisonError::into_inner);
        let held = state.by_caller.get(&self.caller).copied().unwrap_or(0);
        let free = self.budget.total.saturating_sub(state.used).checked_sub(more);
        if free.is_none_or(|free| held.saturating_add(more) > free) {
            return false;
        }
        state.used += more;
        state.by_caller.insert(self.caller, held + more);
        self.units += more;
        true
    }

    /// Units that are held.
    #[must_use]
    pub fn units(&self) -> usize {
        self.units
    }

    /// Gives units back until `units` are left. Does nothing where fewer are held.
    pub fn shrink_to(&mut self, units: usize) {
        let surplus = self.units.saturating_sub(units);
        self.budget.release(self.caller, surplus);
        self.units -= surplus;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.release(self.caller, self.units);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(last: u8) -> Caller {
        Caller::at([10, 0, 0, last].into())
    }

    #[test]
    fn one_caller_takes_at_most_half_and_others_get_theirs() {
        let budget = FairBudget::new(12);
        let mut first = budget.try_acquire(caller(1), 6).unwrap();
        assert!(!first.try_grow(1));
        assert!(budget.try_acquire(caller(1), 1).is_none());
        let second = budget.try_acquire(caller(2), 3).unwrap();
        assert!(budget.try_acquire(caller(2), 1).is_none());
        assert!(budget.try_acquire(caller(3), 1).is_some());
        drop(second);
        drop(first);
        assert_eq!(budget.used(), 0);
        assert!(budget.try_acquire(caller(2), 6).is_some());
    }

    #[test]
    fn a_share_that_shrinks_makes_room() {
        let budget = FairBudget::new(12);
        let mut share = budget.try_acquire(caller(1), 6).unwrap();
        share.shrink_to(2);
        assert_eq!(budget.used(), 2);
        share.shrink_to(4);
        assert_eq!(budget.used(), 2, "shrinking takes nothing");
        assert!(share.try_grow(4));
        drop(share);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn addresses_of_one_ipv6_network_are_one_caller() {
        let at = |text: &str| Caller::at(text.parse().unwrap());
        assert_eq!(at("2001:db8::1"), at("2001:db8::ffff:1"));
        assert_ne!(at("2001:db8::1"), at("2001:db8:0:1::1"));
        assert_eq!(at("::ffff:10.0.0.1"), caller(1));
    }
}
