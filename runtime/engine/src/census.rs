//! Who is in flight, by class and by tenant: what a full queue goes by when one more comes.
//!
//! A queue that is full of one tenant's requests must not shut out another tenant, nor one full of class low shut out
//! class high. Such a request is let in beyond the limit, and before the next step the device thread puts somebody else
//! out ([`Queue::take_last`](crate::queue::Queue::take_last)).

use crate::priority::Priority;
use crate::tenants::Tenant;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
struct Counts {
    classes: [usize; 3],
    tenants: HashMap<Tenant, usize>,
}

/// The counts of one engine.
#[derive(Debug, Default)]
pub(crate) struct Census {
    counts: Mutex<Counts>,
}

impl Census {
    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a request of this class and tenant, which counts as `many`, has precedence over one that is in flight: of a
    /// lower class, or of a tenant that has more than this one would have.
    pub(crate) fn has_precedence(&self, class: Priority, tenant: &str, many: usize) -> bool {
        let counts = self.lock();
        let lower =
            Priority::ALL.into_iter().any(|other| other > class && counts.classes[other as usize] > 0);
        let own = counts.tenants.get(tenant).copied().unwrap_or(0);
        lower || counts.tenants.values().any(|count| *count > own + many)
    }

    /// Counts a request as `many` for as long as what is returned lives.
    pub(crate) fn enrol(self: &Arc<Self>, class: Priority, tenant: Tenant, many: usize) -> Enrolled {
        let mut counts = self.lock();
        counts.classes[class as usize] += many;
        *counts.tenants.entry(Arc::clone(&tenant)).or_default() += many;
        drop(counts);
        Enrolled { census: Arc::clone(self), class, tenant, many }
    }
}

/// One request in the census.
#[derive(Debug)]
pub(crate) struct Enrolled {
    census: Arc<Census>,
    class: Priority,
    tenant: Tenant,
    many: usize,
}

impl Drop for Enrolled {
    fn drop(&mut self) {
        let mut counts = self.census.lock();
        counts.classes[self.class as usize] -= self.many;
        if let Some(count) = counts.tenants.get_mut(&self.tenant) {
            *count -= self.many;
            if *count == 0 {
                counts.tenants.remove(&self.tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn precedence_is_for_higher_classes_and_for_who_has_less() {
        let census = Arc::new(Census::default());
        let has = |class, tenant| census.has_precedence(class, tenant, 1);
        assert!(!has(Priority::High, "a"));
        let first = census.enrol(Priority::Normal, "a".into(), 1);
        assert!(has(Priority::High, "a") && !has(Priority::Normal, "b"), "1 and 0 would become 0 and 1");
        let second = census.enrol(Priority::Normal, "a".into(), 5);
        assert!(has(Priority::Normal, "b") && has(Priority::Low, "b"));
        assert!(!has(Priority::Normal, "a"));
        let many = |many| census.has_precedence(Priority::Normal, "b", many);
        assert!(many(5) && !many(6), "six of the one and six of the other");
        drop((first, second));
        assert!(!has(Priority::High, "b"));
        assert!(census.lock().tenants.is_empty());
    }
}
