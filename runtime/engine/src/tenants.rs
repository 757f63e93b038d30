//! How much each tenant was served, so that the next turn goes to whoever had least.
//!
//! Every computed token counts for its tenant, of a prompt or of an answer alike. A tenant that comes, or comes back,
//! begins with no less than the least of those who are here: nobody saves up turns by staying away, and nobody who was
//! served much elsewhen is punished for it. Counts live as long as they can matter: a tenant that has gone is
//! forgotten once all who are here have had as much.

use std::collections::HashMap;
use std::sync::Arc;

/// Who is counted together. The empty name stands for all requests that name nobody.
pub(crate) type Tenant = Arc<str>;

/// Tenants that have gone and are still remembered, at some 100 bytes each. Beyond it the least served are forgotten,
/// which gives them at most what those who are here have had less.
const REMEMBERED: usize = 4096;

/// One tenant's account.
#[derive(Debug, Clone, Copy, Default)]
struct Account {
    /// Tokens, in a count that starts where the least served stood when the tenant came.
    served: u64,
    /// Requests that wait or run.
    here: usize,
}

/// How a tenant stands: what it was served, then its requests that are here. Whoever has less goes first; the second
/// decides for a newcomer, who begins with what the least served of the others has had.
pub(crate) type Standing = (u64, usize);

/// The accounts of one engine.
#[derive(Debug, Default)]
pub(crate) struct Tenants {
    accounts: HashMap<Tenant, Account>,
}

impl Tenants {
    /// A request has come.
    pub(crate) fn enter(&mut self, tenant: &Tenant) {
        let least = self.least();
        let account = self.accounts.entry(Arc::clone(tenant)).or_default();
        if account.here == 0 {
            account.served = account.served.max(least);
        }
        account.here += 1;
    }

    /// A request has ended, one way or another.
    pub(crate) fn leave(&mut self, tenant: &Tenant) {
        if let Some(account) = self.accounts.get_mut(tenant) {
            account.here = account.here.saturating_sub(1);
            if account.here == 0 {
                self.forget();
            }
        }
    }

    /// So many tokens were computed for it.
    pub(crate) fn charge(&mut self, tenant: &Tenant, tokens: usize) {
        if let Some(account) = self.accounts.get_mut(tenant) {
            account.served = account.served.saturating_add(tokens as u64);
        }
    }

    /// What it was served.
    pub(crate) fn served(&self, tenant: &Tenant) -> u64 {
        self.accounts.get(tenant).map_or(0, |account| account.served)
    }

    /// What it was served, and its requests that are here.
    pub(crate) fn standing(&self, tenant: &Tenant) -> Standing {
        self.accounts.get(tenant).map_or((0, 0), |account| (account.served, account.here))
    }

    /// Whether anybody who is here was served more, or as much with more requests.
    pub(crate) fn is_behind(&self, tenant: &Tenant) -> bool {
        let own = self.standing(tenant);
        self.here().any(|account| (account.served, account.here) > own)
    }

    fn here(&self) -> impl Iterator<Item = &Account> {
        self.accounts.values().filter(|account| account.here > 0)
    }

    /// What the least served of those who are here has had.
    fn least(&self) -> u64 {
        self.here().map(|account| account.served).min().unwrap_or(0)
    }

    /// Forgets those who have gone and would begin with the least anyway, and more of them where they are too many.
    fn forget(&mut self) {
        let nobody = self.here().next().is_none();
        let least = self.least();
        self.accounts.retain(|_, account| account.here > 0 || (!nobody && account.served > least));
        let mut gone: Vec<u64> = self
            .accounts
            .values()
            .filter(|account| account.here == 0)
            .map(|account| account.served)
            .collect();
        if gone.len() > REMEMBERED {
            gone.sort_unstable();
            // Half of them, so that this is rare.
            let floor = gone[gone.len() / 2];
            self.accounts.retain(|_, account| account.here > 0 || account.served > floor);
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
    fn a_newcomer_begins_with_the_least_of_those_who_are_here() {
        let mut tenants = Tenants::default();
        let (a, b, c) = (name("a"), name("b"), name("c"));
        tenants.enter(&a);
        tenants.charge(&a, 100);
        tenants.enter(&b);
        assert_eq!((tenants.served(&b), tenants.is_behind(&b)), (100, false));
        tenants.charge(&a, 50);
        tenants.enter(&c);
        assert_eq!((tenants.served(&c), tenants.is_behind(&c), tenants.is_behind(&a)), (100, true, false));
    }

    #[test]
    fn a_newcomer_is_behind_who_has_a_crowd_here() {
        let mut tenants = Tenants::default();
        let (a, b) = (name("a"), name("b"));
        for _ in 0..3 {
            tenants.enter(&a);
            tenants.charge(&a, 50);
        }
        tenants.enter(&b);
        assert_eq!((tenants.standing(&a), tenants.standing(&b)), ((150, 3), (150, 1)));
        assert!(tenants.is_behind(&b) && !tenants.is_behind(&a));
    }

    #[test]
    fn who_comes_back_has_neither_saved_up_nor_lost_its_count() {
        let mut tenants = Tenants::default();
        let (a, b) = (name("a"), name("b"));
        tenants.enter(&a);
        tenants.enter(&b);
        tenants.charge(&b, 70);
        tenants.leave(&b);
        tenants.enter(&b);
        assert_eq!(tenants.served(&b), 70, "leaving for a moment does not wipe a count");
        tenants.leave(&b);
        tenants.charge(&a, 200);
        tenants.enter(&b);
        assert_eq!(tenants.served(&b), 200, "staying away saves nothing up");
    }

    #[test]
    fn what_cannot_matter_any_more_is_forgotten() {
        let mut tenants = Tenants::default();
        let (a, b) = (name("a"), name("b"));
        tenants.enter(&a);
        tenants.enter(&b);
        tenants.charge(&a, 10);
        tenants.charge(&b, 10);
        tenants.leave(&a);
        assert_eq!(tenants.accounts.len(), 1);
        tenants.leave(&b);
        assert!(tenants.accounts.is_empty());
        tenants.enter(&a);
        for index in 0..3 * REMEMBERED {
            let other = name(&index.to_string());
            tenants.enter(&other);
            tenants.charge(&other, index + 1);
            tenants.leave(&other);
        }
        assert!(tenants.accounts.len() <= REMEMBERED + 1);
        assert_eq!(tenants.served(&name(&(3 * REMEMBERED - 1).to_string())), 3 * REMEMBERED as u64);
    }
}
