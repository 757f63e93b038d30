//! The tokens that each tenant was served, so that the least served tenant is next.
//!
//! Every computed token counts for its tenant, prompt and answer alike. A tenant without requests in flight
//! that sends one starts at the lowest count of the active tenants or at its own, whichever is higher: a
//! tenant saves nothing up while it is idle, and pays nothing for what it was served while others were idle.
//! A count is kept as long as it can matter: the count of an idle tenant is dropped once all active tenants
//! have reached it.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

/// The name by which requests are accounted together. The empty name stands for all requests without a
/// tenant.
pub(crate) type Tenant = Arc<str>;

/// The number of a tenant's account, which stands for its name on the device thread: comparing numbers is
/// cheaper than comparing names. It is valid while a request of the tenant is in flight; later the number may
/// be given to another tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct TenantId(u32);

impl TenantId {
    /// All requests without a tenant.
    pub(crate) const NONE: Self = Self(0);

    fn index(self) -> usize {
        self.0 as usize
    }

    /// The number of the tenant `a`, `b`, `c`, ... where tenants arrive in this order.
    #[cfg(test)]
    pub(crate) fn of_letter(name: &str) -> Self {
        name.bytes().next().map_or(Self::NONE, |letter| Self(u32::from(letter - b'a') + 1))
    }
}

/// Most idle tenants whose counts are kept: 4096 of some 450 bytes (a name of at most 256, four words, the
/// overhead of a table and of a tree) are 1.8 MB. Beyond it the lowest counts are dropped. Such a tenant
/// gains at most the difference between the active tenants' counts and its own.
const MAX_IDLE_ACCOUNTS: usize = 4096;

/// One tenant's account.
#[derive(Debug)]
struct TenantAccount {
    name: Tenant,
    usage: TenantUsage,
}

/// What a tenant uses. The smaller one is served first; requests in flight decide between equal counts, for
/// example for a new tenant, which starts at the lowest count of the others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TenantUsage {
    /// Tokens served, counted from the lowest active count at the time when the tenant became active.
    pub(crate) served_tokens: u64,
    /// Requests that wait or run.
    pub(crate) inflight: usize,
}

/// The accounts of one engine. Every call takes a time that grows with the logarithm of their number.
#[derive(Debug, Default)]
pub(crate) struct Tenants {
    /// By number; `None` where the number is free.
    accounts: Vec<Option<TenantAccount>>,
    ids: HashMap<Tenant, TenantId>,
    free: Vec<TenantId>,
    /// Accounts with requests in flight, in the order of their usage.
    active: BTreeSet<(TenantUsage, TenantId)>,
    /// The other accounts, in the order of their counts.
    idle: BTreeSet<(TenantUsage, TenantId)>,
}

impl Tenants {
    /// Counts a request that has arrived.
    pub(crate) fn request_arrived(&mut self, tenant: &Tenant) -> TenantId {
        let lowest = self.lowest_active_count();
        let id = self.id_of(tenant);
        self.update(id, |usage| {
            if usage.inflight == 0 {
                usage.served_tokens = usage.served_tokens.max(lowest);
            }
            usage.inflight += 1;
        });
        id
    }

    /// Counts a request that has ended, for whatever reason.
    pub(crate) fn request_ended(&mut self, tenant: TenantId) {
        self.update(tenant, |usage| usage.inflight = usage.inflight.saturating_sub(1));
        if self.usage(tenant).inflight == 0 {
            self.prune();
        }
    }

    /// Adds tokens that were computed for a tenant.
    pub(crate) fn charge(&mut self, tenant: TenantId, tokens: usize) {
        self.update(tenant, |usage| usage.served_tokens = usage.served_tokens.saturating_add(tokens as u64));
    }

    /// Tokens that a tenant was served.
    pub(crate) fn served_tokens(&self, tenant: TenantId) -> u64 {
        self.usage(tenant).served_tokens
    }

    /// Tokens that a tenant was served, and its requests in flight.
    pub(crate) fn usage(&self, tenant: TenantId) -> TenantUsage {
        let account = self.accounts.get(tenant.index()).and_then(Option::as_ref);
        account.map_or_else(TenantUsage::default, |account| account.usage)
    }

    /// Whether an active tenant was served more than this one, or as much with more requests in flight.
    pub(crate) fn is_underserved(&self, tenant: TenantId) -> bool {
        self.active.last().is_some_and(|(most, _)| *most > self.usage(tenant))
    }

    fn lowest_active_count(&self) -> u64 {
        self.active.first().map_or(0, |(usage, _)| usage.served_tokens)
    }

    /// The number of a tenant's account, which is opened where there is none.
    fn id_of(&mut self, tenant: &Tenant) -> TenantId {
        if let Some(id) = self.ids.get(tenant) {
            return *id;
        }
        let id = if tenant.is_empty() {
            TenantId::NONE
        } else {
            // Every account has a request in flight or is one of the idle ones, so the numbers are few.
            let next = TenantId(u32::try_from(self.accounts.len().max(1)).unwrap_or(u32::MAX));
            self.free.pop().unwrap_or(next)
        };
        if self.accounts.len() <= id.index() {
            self.accounts.resize_with(id.index() + 1, || None);
        }
        let usage = TenantUsage::default();
        self.accounts[id.index()] = Some(TenantAccount { name: Arc::clone(tenant), usage });
        self.ids.insert(Arc::clone(tenant), id);
        self.idle.insert((usage, id));
        id
    }

    /// Changes an account and its place in the order.
    fn update(&mut self, id: TenantId, change: impl FnOnce(&mut TenantUsage)) {
        let Some(account) = self.accounts.get_mut(id.index()).and_then(Option::as_mut) else { return };
        let before = account.usage;
        change(&mut account.usage);
        let after = account.usage;
        for (usage, is_present) in [(before, false), (after, true)] {
            let list = if usage.inflight > 0 { &mut self.active } else { &mut self.idle };
            if is_present {
                list.insert((usage, id));
            } else {
                list.remove(&(usage, id));
            }
        }
    }

    /// Drops idle accounts that no longer matter, and the lowest of them where there are too many.
    fn prune(&mut self) {
        let all_idle = self.active.is_empty();
        let lowest = self.lowest_active_count();
        while let Some((usage, id)) = self.idle.first().copied() {
            if !all_idle && usage.served_tokens > lowest && self.idle.len() <= MAX_IDLE_ACCOUNTS {
                break;
            }
            self.idle.remove(&(usage, id));
            if let Some(account) = self.accounts[id.index()].take() {
                self.ids.remove(&account.name);
            }
            if id != TenantId::NONE {
                self.free.push(id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> Tenant {
        name.into()
    }

    #[test]
    fn a_new_tenant_starts_at_the_lowest_active_count() {
        let mut tenants = Tenants::default();
        let (a, b, c) = (name("a"), name("b"), name("c"));
        let a = tenants.request_arrived(&a);
        tenants.charge(a, 100);
        let b = tenants.request_arrived(&b);
        assert_eq!((tenants.served_tokens(b), tenants.is_underserved(b)), (100, false));
        tenants.charge(a, 50);
        let c = tenants.request_arrived(&c);
        assert_eq!(tenants.served_tokens(c), 100);
        assert!(tenants.is_underserved(c) && !tenants.is_underserved(a));
    }

    #[test]
    fn fewer_requests_in_flight_make_a_tenant_underserved() {
        let mut tenants = Tenants::default();
        let (a, b) = (name("a"), name("b"));
        let mut first = TenantId::NONE;
        for _ in 0..3 {
            first = tenants.request_arrived(&a);
            tenants.charge(first, 50);
        }
        let second = tenants.request_arrived(&b);
        let usage = |inflight| TenantUsage { served_tokens: 150, inflight };
        assert_eq!((tenants.usage(first), tenants.usage(second)), (usage(3), usage(1)));
        assert!(tenants.is_underserved(second) && !tenants.is_underserved(first));
    }

    #[test]
    fn an_idle_tenant_neither_saves_up_nor_loses_its_count() {
        let mut tenants = Tenants::default();
        let (a, b) = (name("a"), name("b"));
        let first = tenants.request_arrived(&a);
        let second = tenants.request_arrived(&b);
        tenants.charge(second, 70);
        tenants.request_ended(second);
        let second = tenants.request_arrived(&b);
        assert_eq!(tenants.served_tokens(second), 70, "a short pause does not reset a count");
        tenants.request_ended(second);
        tenants.charge(first, 200);
        let second = tenants.request_arrived(&b);
        assert_eq!(tenants.served_tokens(second), 200, "an idle tenant saves nothing up");
    }

    #[test]
    fn counts_that_no_longer_matter_are_dropped() {
        let mut tenants = Tenants::default();
        let (a, b) = (name("a"), name("b"));
        let (first, second) = (tenants.request_arrived(&a), tenants.request_arrived(&b));
        tenants.charge(first, 10);
        tenants.charge(second, 10);
        tenants.request_ended(first);
        assert_eq!(tenants.ids.len(), 1);
        tenants.request_ended(second);
        assert!(tenants.ids.is_empty() && tenants.idle.is_empty() && tenants.active.is_empty());
        let first = tenants.request_arrived(&a);
        let mut last = first;
        for index in 0..3 * MAX_IDLE_ACCOUNTS {
            last = tenants.request_arrived(&name(&index.to_string()));
            tenants.charge(last, index + 1);
            tenants.request_ended(last);
        }
        assert!(tenants.ids.len() <= MAX_IDLE_ACCOUNTS + 1);
        assert!(tenants.accounts.len() <= MAX_IDLE_ACCOUNTS + 3, "numbers are used again");
        assert_eq!(tenants.served_tokens(last), 3 * MAX_IDLE_ACCOUNTS as u64);
    }

    #[test]
    fn a_number_stays_with_its_tenant_while_a_request_is_in_flight() {
        let mut tenants = Tenants::default();
        let (a, none) = (tenants.request_arrived(&name("a")), tenants.request_arrived(&name("")));
        assert_eq!((tenants.request_arrived(&name("a")), none), (a, TenantId::NONE));
        tenants.request_ended(a);
        let b = tenants.request_arrived(&name("b"));
        assert!(a != b && b != TenantId::NONE);
        tenants.request_ended(a);
        tenants.request_ended(none);
        tenants.request_ended(b);
        // All numbers are free, and the requests without a tenant keep theirs.
        assert_ne!(tenants.request_arrived(&name("c")), TenantId::NONE);
        assert_eq!(tenants.request_arrived(&name("")), TenantId::NONE);
    }
}
