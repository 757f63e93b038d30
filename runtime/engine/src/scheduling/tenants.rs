//! The tokens that each tenant was served, so that the least served tenant is next.
//!
//! Every computed token counts for its tenant, prompt and answer alike. A tenant without requests in flight
//! that sends one starts at the lowest count of the active tenants or at its own, whichever is higher: a
//! tenant saves nothing up while it is idle, and pays nothing for what it was served while others were idle.
//! A count is kept as long as it can matter: the count of an idle tenant is dropped once all active tenants
//! have reached it.

use std::collections::HashMap;
use std::sync::Arc;

/// The name by which requests are accounted together. The empty name stands for all requests without a
/// tenant.
pub(crate) type Tenant = Arc<str>;

/// Most idle tenants whose counts are kept: 4096 of some 350 bytes (a name of at most 256, two words, table
/// overhead) are 1.4 MB. Beyond it the lowest counts are dropped. Such a tenant gains at most the difference
/// between the active tenants' counts and its own.
const MAX_IDLE_ACCOUNTS: usize = 4096;

/// One tenant's account.
#[derive(Debug, Clone, Copy, Default)]
struct TenantAccount {
    /// Tokens served, counted from the lowest active count at the time when the tenant became active.
    served_tokens: u64,
    /// Requests that wait or run.
    inflight: usize,
}

/// What a tenant uses. The smaller one is served first; requests in flight decide between equal counts, for
/// example for a new tenant, which starts at the lowest count of the others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TenantUsage {
    pub(crate) served_tokens: u64,
    pub(crate) inflight: usize,
}

/// The accounts of one engine.
#[derive(Debug, Default)]
pub(crate) struct Tenants {
    accounts: HashMap<Tenant, TenantAccount>,
}

impl Tenants {
    /// Counts a request that has arrived.
    pub(crate) fn request_arrived(&mut self, tenant: &Tenant) {
        let lowest = self.lowest_active_count();
        let account = self.accounts.entry(Arc::clone(tenant)).or_default();
        if account.inflight == 0 {
            account.served_tokens = account.served_tokens.max(lowest);
        }
        account.inflight += 1;
    }

    /// Counts a request that has ended, for whatever reason.
    pub(crate) fn request_ended(&mut self, tenant: &Tenant) {
        if let Some(account) = self.accounts.get_mut(tenant) {
            account.inflight = account.inflight.saturating_sub(1);
            if account.inflight == 0 {
                self.prune();
            }
        }
    }

    /// Adds tokens that were computed for a tenant.
    pub(crate) fn charge(&mut self, tenant: &Tenant, tokens: usize) {
        if let Some(account) = self.accounts.get_mut(tenant) {
            account.served_tokens = account.served_tokens.saturating_add(tokens as u64);
        }
    }

    /// Tokens that a tenant was served.
    pub(crate) fn served_tokens(&self, tenant: &Tenant) -> u64 {
        self.accounts.get(tenant).map_or(0, |account| account.served_tokens)
    }

    /// Tokens that a tenant was served, and its requests in flight.
    pub(crate) fn usage(&self, tenant: &Tenant) -> TenantUsage {
        self.accounts.get(tenant).map_or_else(TenantUsage::default, TenantAccount::usage)
    }

    /// Whether an active tenant was served more than this one, or as much with more requests in flight.
    pub(crate) fn is_underserved(&self, tenant: &Tenant) -> bool {
        let own = self.usage(tenant);
        self.active().any(|account| account.usage() > own)
    }

    fn active(&self) -> impl Iterator<Item = &TenantAccount> {
        self.accounts.values().filter(|account| account.inflight > 0)
    }

    fn lowest_active_count(&self) -> u64 {
        self.active().map(|account| account.served_tokens).min().unwrap_or(0)
    }

    /// Drops idle accounts that no longer matter, and more of them where there are too many.
    fn prune(&mut self) {
        let all_idle = self.active().next().is_none();
        let lowest = self.lowest_active_count();
        self.accounts
            .retain(|_, account| account.inflight > 0 || (!all_idle && account.served_tokens > lowest));
        let mut idle: Vec<u64> = self
            .accounts
            .values()
            .filter(|account| account.inflight == 0)
            .map(|account| account.served_tokens)
            .collect();
        if idle.len() > MAX_IDLE_ACCOUNTS {
            idle.sort_unstable();
            // Half of them at once, so that this happens rarely.
            let floor = idle[idle.len() / 2];
            self.accounts.retain(|_, account| account.inflight > 0 || account.served_tokens > floor);
        }
    }
}

impl TenantAccount {
    fn usage(&self) -> TenantUsage {
        TenantUsage { served_tokens: self.served_tokens, inflight: self.inflight }
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
        tenants.request_arrived(&a);
        tenants.charge(&a, 100);
        tenants.request_arrived(&b);
        assert_eq!((tenants.served_tokens(&b), tenants.is_underserved(&b)), (100, false));
        tenants.charge(&a, 50);
        tenants.request_arrived(&c);
        assert_eq!(tenants.served_tokens(&c), 100);
        assert!(tenants.is_underserved(&c) && !tenants.is_underserved(&a));
    }

    #[test]
    fn fewer_requests_in_flight_make_a_tenant_underserved() {
        let mut tenants = Tenants::default();
        let (a, b) = (name("a"), name("b"));
        for _ in 0..3 {
            tenants.request_arrived(&a);
            tenants.charge(&a, 50);
        }
        tenants.request_arrived(&b);
        let usage = |inflight| TenantUsage { served_tokens: 150, inflight };
        assert_eq!((tenants.usage(&a), tenants.usage(&b)), (usage(3), usage(1)));
        assert!(tenants.is_underserved(&b) && !tenants.is_underserved(&a));
    }

    #[test]
    fn an_idle_tenant_neither_saves_up_nor_loses_its_count() {
        let mut tenants = Tenants::default();
        let (a, b) = (name("a"), name("b"));
        tenants.request_arrived(&a);
        tenants.request_arrived(&b);
        tenants.charge(&b, 70);
        tenants.request_ended(&b);
        tenants.request_arrived(&b);
        assert_eq!(tenants.served_tokens(&b), 70, "a short pause does not reset a count");
        tenants.request_ended(&b);
        tenants.charge(&a, 200);
        tenants.request_arrived(&b);
        assert_eq!(tenants.served_tokens(&b), 200, "an idle tenant saves nothing up");
    }

    #[test]
    fn counts_that_no_longer_matter_are_dropped() {
        let mut tenants = Tenants::default();
        let (a, b) = (name("a"), name("b"));
        tenants.request_arrived(&a);
        tenants.request_arrived(&b);
        tenants.charge(&a, 10);
        tenants.charge(&b, 10);
        tenants.request_ended(&a);
        assert_eq!(tenants.accounts.len(), 1);
        tenants.request_ended(&b);
        assert!(tenants.accounts.is_empty());
        tenants.request_arrived(&a);
        for index in 0..3 * MAX_IDLE_ACCOUNTS {
            let other = name(&index.to_string());
            tenants.request_arrived(&other);
            tenants.charge(&other, index + 1);
            tenants.request_ended(&other);
        }
        assert!(tenants.accounts.len() <= MAX_IDLE_ACCOUNTS + 1);
        let last = name(&(3 * MAX_IDLE_ACCOUNTS - 1).to_string());
        assert_eq!(tenants.served_tokens(&last), 3 * MAX_IDLE_ACCOUNTS as u64);
    }
}
