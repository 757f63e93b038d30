//! Admission counts: the requests in flight by class and by tenant.
//!
//! A full queue refuses new requests, with two exceptions: a request of a higher class than one in flight,
//! and a request of a tenant that has fewer requests in flight than another tenant. Such a request is
//! admitted beyond the limit. Before the next step the device thread removes another request from the queue
//! ([`Queue::remove_least_urgent`](super::queue::Queue::remove_least_urgent)).

use super::priority::Priority;
use super::tenants::Tenant;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
struct InflightCounts {
    classes: [usize; 3],
    tenants: HashMap<Tenant, usize>,
}

/// The admission counts of one engine.
#[derive(Debug, Default)]
pub(crate) struct AdmissionCounts {
    counts: Mutex<InflightCounts>,
}

impl AdmissionCounts {
    fn lock(&self) -> MutexGuard<'_, InflightCounts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a request of this class and tenant precedes one in flight: one of a lower class, or one of a
    /// tenant that has more in flight than this tenant would have. The request counts as `count` (an encoder
    /// counts texts).
    pub(crate) fn has_precedence(&self, class: Priority, tenant: &str, count: usize) -> bool {
        let counts = self.lock();
        let lower =
            Priority::ALL.into_iter().any(|other| other > class && counts.classes[other as usize] > 0);
        let own = counts.tenants.get(tenant).copied().unwrap_or(0);
        lower || counts.tenants.values().any(|other| *other > own + count)
    }

    /// Counts a request as `count` until the guard is dropped.
    pub(crate) fn register(self: &Arc<Self>, class: Priority, tenant: Tenant, count: usize) -> InflightGuard {
        let mut counts = self.lock();
        counts.classes[class as usize] += count;
        *counts.tenants.entry(Arc::clone(&tenant)).or_default() += count;
        drop(counts);
        InflightGuard { admission: Arc::clone(self), class, tenant, count }
    }
}

/// Keeps one request in the admission counts. Dropping it removes the request.
#[derive(Debug)]
pub(crate) struct InflightGuard {
    admission: Arc<AdmissionCounts>,
    class: Priority,
    tenant: Tenant,
    count: usize,
}

impl Drop for InflightGuard {
    fn drop(&mut self) {
        let mut counts = self.admission.lock();
        counts.classes[self.class as usize] -= self.count;
        if let Some(count) = counts.tenants.get_mut(&self.tenant) {
            *count -= self.count;
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
    fn higher_classes_and_smaller_tenants_have_precedence() {
        let admission = Arc::new(AdmissionCounts::default());
        let has = |class, tenant| admission.has_precedence(class, tenant, 1);
        assert!(!has(Priority::High, "a"));
        let first = admission.register(Priority::Normal, "a".into(), 1);
        assert!(has(Priority::High, "a") && !has(Priority::Normal, "b"), "1 and 0 would become 0 and 1");
        let second = admission.register(Priority::Normal, "a".into(), 5);
        assert!(has(Priority::Normal, "b") && has(Priority::Low, "b"));
        assert!(!has(Priority::Normal, "a"));
        let with_count = |count| admission.has_precedence(Priority::Normal, "b", count);
        assert!(with_count(5) && !with_count(6), "both tenants would have six");
        drop((first, second));
        assert!(!has(Priority::High, "b"));
        assert!(admission.lock().tenants.is_empty());
    }
}
