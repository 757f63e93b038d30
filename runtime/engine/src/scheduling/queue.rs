//! The queue: which waiting request is admitted next.
//!
//! A class precedes the classes below it, within a bound: while requests wait in a class, at most
//! [`MAX_BYPASSES`] requests of higher classes are admitted. Then the next request of the class is *aged*:
//! until it ends it counts as the first request of the highest class, so that a request which waited that
//! long also finishes. Aged requests take only a share of the batch ([`AGED_SHARE`]); while that share is
//! used up, further ones wait for it. Within a class the least served tenant is next, and within a tenant the
//! oldest request.

use super::priority::Priority;
use super::tenants::{TenantId, Tenants};
use std::collections::{BTreeMap, VecDeque};

/// Most admissions from higher classes while a request of a class waits, by class.
pub(crate) const MAX_BYPASSES: [usize; 3] = [usize::MAX, 8, 16];

/// Aged requests take at most one of so many sequences of the batch, and at least one. The others stay
/// available to the highest class, however long the answers of lower classes are.
pub(crate) const AGED_SHARE: usize = 4;

/// What decides the order of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct QueueKey {
    pub(crate) class: Priority,
    pub(crate) tenant: TenantId,
    /// Its number in the order of arrival.
    pub(crate) arrival: u64,
    /// It was bypassed too often: it belongs to the highest class and precedes all others there.
    pub(crate) aged: bool,
}

/// The order of requests without regard to tenants; the smaller one is first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct QueueRank {
    pub(crate) is_young: bool,
    pub(crate) class: Priority,
    pub(crate) arrival: u64,
}

impl QueueKey {
    pub(crate) fn rank(&self) -> QueueRank {
        QueueRank { is_young: !self.aged, class: self.class, arrival: self.arrival }
    }
}

/// An item of a [`Queue`].
pub(crate) trait HasQueueKey {
    /// What decides its order.
    fn queue_key(&self) -> &QueueKey;
}

/// The choice of [`Queue::select_next`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NextInQueue {
    /// The class it waits in.
    class: Priority,
    tenant: TenantId,
    /// The request, or its class, was bypassed too often.
    aged: bool,
}

impl NextInQueue {
    /// The class that counts when it is compared with running sequences.
    pub(crate) fn class(&self) -> Priority {
        if self.aged { Priority::High } else { self.class }
    }

    pub(crate) fn tenant(&self) -> TenantId {
        self.tenant
    }

    pub(crate) fn is_aged(&self) -> bool {
        self.aged
    }
}

#[derive(Debug)]
struct ClassQueue<T> {
    /// Each tenant's requests, the oldest first; no list is empty.
    tenants: BTreeMap<TenantId, VecDeque<T>>,
    /// Admissions from higher classes since the last one from this class, while a request waited here.
    bypass_count: usize,
}

/// The waiting requests.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    classes: [ClassQueue<T>; 3],
    /// Requests in all of them.
    len: usize,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        let classes = [(); 3].map(|()| ClassQueue { tenants: BTreeMap::new(), bypass_count: 0 });
        Self { classes, len: 0 }
    }
}

impl<T: HasQueueKey> Queue<T> {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The oldest request of each tenant in each class.
    pub(crate) fn fronts(&self) -> impl Iterator<Item = &T> {
        self.classes.iter().flat_map(|class| class.tenants.values()).filter_map(VecDeque::front)
    }

    /// Adds a request, before those of its tenant and class that arrived after it.
    pub(crate) fn push(&mut self, item: T) {
        let key = item.queue_key();
        let (class, tenant, rank) = (key.class, key.tenant, key.rank());
        let requests = self.classes[class as usize].tenants.entry(tenant).or_default();
        let at = requests.partition_point(|other| other.queue_key().rank() < rank);
        requests.insert(at, item);
        self.len += 1;
    }

    /// Selects the next request. `running` gives the number of running requests of a tenant: among tenants
    /// that were served alike, the one with the fewest is next. An aged request that was preempted precedes
    /// everything else. `may_age` says whether one more request may become aged.
    pub(crate) fn select_next(
        &self,
        tenants: &Tenants,
        running: impl Fn(TenantId) -> usize,
        may_age: bool,
    ) -> Option<NextInQueue> {
        let waiting = |class: &Priority| !self.classes[*class as usize].tenants.is_empty();
        let must_age = |class: &Priority| {
            may_age
                && waiting(class)
                && self.classes[*class as usize].bypass_count >= MAX_BYPASSES[*class as usize]
        };
        let was_preempted =
            |requests: &VecDeque<T>| requests.front().is_some_and(|item| item.queue_key().aged);
        let any_preempted = self.classes[Priority::High as usize].tenants.values().any(was_preempted);
        let aged =
            if any_preempted { Some(Priority::High) } else { Priority::ALL.into_iter().rev().find(must_age) };
        let class = aged.or_else(|| Priority::ALL.into_iter().find(waiting))?;
        let candidates = self.classes[class as usize].tenants.iter();
        let (tenant, _) = candidates.min_by_key(|(tenant, requests)| {
            let oldest = requests.front().map_or(0, |item| item.queue_key().arrival);
            (!was_preempted(requests), tenants.served_tokens(**tenant), running(**tenant), oldest)
        })?;
        Some(NextInQueue { class, tenant: *tenant, aged: aged.is_some() })
    }

    /// The selected request.
    pub(crate) fn peek(&self, next: &NextInQueue) -> Option<&T> {
        self.classes[next.class as usize].tenants.get(&next.tenant)?.front()
    }

    /// Removes the selected request, and counts the bypass of the lower classes that wait.
    pub(crate) fn pop(&mut self, next: &NextInQueue) -> Option<T> {
        let tenants = &mut self.classes[next.class as usize].tenants;
        let requests = tenants.get_mut(&next.tenant)?;
        let item = requests.pop_front();
        self.len -= usize::from(item.is_some());
        if requests.is_empty() {
            tenants.remove(&next.tenant);
        }
        for class in Priority::ALL {
            let own = &mut self.classes[class as usize];
            if class == next.class || own.tenants.is_empty() {
                own.bypass_count = 0;
            } else if class > next.class {
                own.bypass_count += 1;
            }
        }
        item
    }

    /// Removes the request that matters least among those that `may_remove` allows: of the lowest class, of
    /// the tenant with the most requests in it, the newest.
    pub(crate) fn remove_least_urgent(&mut self, may_remove: impl Fn(&T) -> bool) -> Option<T> {
        for class in self.classes.iter_mut().rev() {
            let newest = |requests: &VecDeque<T>| requests.iter().rposition(&may_remove);
            let removable = class
                .tenants
                .iter()
                .filter_map(|(tenant, requests)| Some((tenant, requests, newest(requests)?)));
            let found = removable
                .max_by_key(|(_, requests, newest)| (requests.len(), requests[*newest].queue_key().arrival));
            let Some((tenant, _, newest)) = found else { continue };
            let tenant = *tenant;
            let requests = class.tenants.get_mut(&tenant)?;
            let item = requests.remove(newest);
            self.len -= usize::from(item.is_some());
            if requests.is_empty() {
                class.tenants.remove(&tenant);
            }
            return item;
        }
        None
    }

    /// All waiting requests.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.classes.iter_mut().flat_map(|class| class.tenants.values_mut()).flatten()
    }

    /// Removes the requests for which `keep` is false.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&mut T) -> bool) {
        self.len = 0;
        for class in &mut self.classes {
            class.tenants.retain(|_, requests| {
                requests.retain_mut(&mut keep);
                self.len += requests.len();
                !requests.is_empty()
            });
        }
    }

    /// Removes all requests.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = T> {
        let classes = std::mem::take(self).classes;
        classes.into_iter().flat_map(|class| class.tenants.into_values()).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl HasQueueKey for QueueKey {
        fn queue_key(&self) -> &QueueKey {
            self
        }
    }

    fn key(class: Priority, tenant: &str, arrival: u64) -> QueueKey {
        QueueKey { class, tenant: TenantId::of_letter(tenant), arrival, aged: false }
    }

    /// Removes the next request; gives its number and whether it was aged.
    fn pop_next(queue: &mut Queue<QueueKey>, tenants: &Tenants) -> (u64, bool) {
        let next = queue.select_next(tenants, |_| 0, true).unwrap();
        (queue.pop(&next).unwrap().arrival, next.aged)
    }

    #[test]
    fn the_class_decides_first_and_then_the_arrival() {
        let mut queue = Queue::default();
        let classes = [Priority::Low, Priority::Normal, Priority::High, Priority::Normal, Priority::High];
        for (arrival, class) in (0..).zip(classes) {
            queue.push(key(class, "", arrival));
        }
        // A preempted request precedes those that arrived after it.
        let first = queue.select_next(&Tenants::default(), |_| 0, true).unwrap();
        let preempted = queue.pop(&first).unwrap();
        queue.push(preempted);
        let order: Vec<u64> = (0..5).map(|_| pop_next(&mut queue, &Tenants::default()).0).collect();
        assert_eq!(order, [2, 4, 1, 3, 0]);
        assert!(queue.is_empty() && queue.select_next(&Tenants::default(), |_| 0, true).is_none());
    }

    #[test]
    fn no_class_is_bypassed_more_often_than_its_bound() {
        let tenants = Tenants::default();
        let mut queue = Queue::default();
        let mut arrival = 0;
        let mut push = |queue: &mut Queue<QueueKey>, class| {
            arrival += 1;
            queue.push(key(class, "", arrival));
            arrival
        };
        let (low, normal) = (push(&mut queue, Priority::Low), push(&mut queue, Priority::Normal));
        let mut popped = Vec::new();
        for _ in 0..40 {
            push(&mut queue, Priority::High);
            popped.push(pop_next(&mut queue, &tenants));
        }
        let at = |wanted: u64| popped.iter().position(|(arrival, _)| *arrival == wanted).unwrap();
        assert_eq!((at(normal), at(low)), (8, 16), "{popped:?}");
        assert!(popped[8].1 && popped[16].1 && popped.iter().filter(|(_, aged)| *aged).count() == 2);
        // While the share of the batch for aged requests is used up, no further request becomes aged.
        push(&mut queue, Priority::Low);
        for _ in 0..20 {
            push(&mut queue, Priority::High);
            let next = queue.select_next(&tenants, |_| 0, false).unwrap();
            assert!(!next.is_aged() && queue.pop(&next).is_some());
        }
        assert!(pop_next(&mut queue, &tenants).1, "it becomes aged once the share has room");
        // The count starts again for the next request that waits.
        push(&mut queue, Priority::Low);
        let waits = (0..40).position(|_| {
            push(&mut queue, Priority::High);
            pop_next(&mut queue, &tenants).1
        });
        assert_eq!(waits, Some(16));
    }

    #[test]
    fn an_aged_request_that_was_preempted_is_next() {
        let mut tenants = Tenants::default();
        let mut queue = Queue::default();
        queue.push(key(Priority::High, "a", 1));
        queue.push(key(Priority::High, "b", 2));
        queue.push(QueueKey { aged: true, ..key(Priority::High, "b", 3) });
        for tenant in ["a", "b"] {
            tenants.request_arrived(&tenant.into());
        }
        tenants.charge(TenantId::of_letter("b"), 9);
        let popped = [(); 3].map(|()| pop_next(&mut queue, &tenants));
        assert_eq!(popped, [(3, true), (1, false), (2, false)]);
    }

    #[test]
    fn the_least_served_tenant_is_next_then_the_one_that_runs_least() {
        let [a, b] = ["a", "b"].map(TenantId::of_letter);
        let mut tenants = Tenants::default();
        let mut queue = Queue::default();
        for (arrival, tenant) in (0..).zip(["a", "a", "b", "c"]) {
            queue.push(key(Priority::Normal, tenant, arrival));
            tenants.request_arrived(&tenant.into());
        }
        tenants.charge(TenantId::of_letter("a"), 5);
        tenants.charge(TenantId::of_letter("b"), 5);
        tenants.charge(TenantId::of_letter("c"), 6);
        let next = queue.select_next(&tenants, |tenant| usize::from(tenant == a), true).unwrap();
        assert_eq!((next.tenant(), queue.peek(&next).unwrap().arrival), (b, 2));
        let next = queue.select_next(&tenants, |_| 0, true).unwrap();
        assert_eq!(queue.pop(&next).unwrap().arrival, 0);
        tenants.charge(TenantId::of_letter("a"), 5);
        assert_eq!(pop_next(&mut queue, &tenants).0, 2);
        assert_eq!(pop_next(&mut queue, &tenants).0, 3);
    }

    #[test]
    fn the_newest_of_the_largest_tenant_in_the_lowest_class_is_removed() {
        let mut queue = Queue::default();
        let all = [
            (Priority::High, "b"),
            (Priority::Low, "a"),
            (Priority::Low, "b"),
            (Priority::Low, "b"),
            (Priority::Normal, "a"),
        ];
        for (arrival, (class, tenant)) in (0..).zip(all) {
            queue.push(key(class, tenant, arrival));
        }
        assert_eq!(queue.remove_least_urgent(|item| item.arrival < 2).unwrap().arrival, 1);
        queue.push(key(Priority::Low, "a", 1));
        let removed: Vec<u64> =
            std::iter::from_fn(|| queue.remove_least_urgent(|_| true)).map(|item| item.arrival).collect();
        assert_eq!(removed, [3, 2, 1, 4, 0]);
    }
}
