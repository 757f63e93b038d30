//! Who is next: the requests that wait, by class and by tenant.
//!
//! A class goes before the next one, but not without end: while a request waits in a class, at most
//! [`PASSED_OVER_MOST`] requests of classes above it are admitted, then its turn has come. It is *due* then, until it
//! ends: it is treated as the first of the first class, so whatever has had to wait that long also finishes; only a part
//! of the batch is for such requests ([`DUE_PART`]), and where that is taken the next one waits for a place in it. Within a
//! class it is the turn of the tenant that was served least, and within a tenant that of the oldest request.

use crate::priority::Priority;
use crate::tenants::{Tenant, Tenants};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// Requests of the classes above that may be admitted while one of a class waits, by class.
pub(crate) const PASSED_OVER_MOST: [usize; 3] = [usize::MAX, 8, 16];

/// Requests that are due take at most one place of so many of the batch, and at least one: the others stay open to the
/// first class however long the answers of lower ones are.
pub(crate) const DUE_PART: usize = 4;

/// Where a request belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) class: Priority,
    pub(crate) tenant: Tenant,
    /// Its number in the order of arrival.
    pub(crate) order: u64,
    /// It has been passed over often enough, so it is of the first class and goes before all others there.
    pub(crate) due: bool,
}

impl Place {
    /// Smaller is better.
    pub(crate) fn rank(&self) -> (bool, Priority, u64) {
        (!self.due, self.class, self.order)
    }
}

/// What can wait.
pub(crate) trait Placed {
    /// Where it belongs.
    fn place(&self) -> &Place;
}

/// Whose turn it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Turn {
    /// The class it waits in.
    class: Priority,
    tenant: Tenant,
    /// It, or its class, has been passed over often enough.
    due: bool,
}

impl Turn {
    /// The class that counts when it is weighed against what runs.
    pub(crate) fn class(&self) -> Priority {
        if self.due { Priority::High } else { self.class }
    }

    pub(crate) fn tenant(&self) -> &Tenant {
        &self.tenant
    }

    pub(crate) fn is_due(&self) -> bool {
        self.due
    }
}

#[derive(Debug)]
struct Class<T> {
    /// Each tenant's requests, the oldest first; none is empty.
    lines: BTreeMap<Tenant, VecDeque<T>>,
    /// Admissions from classes above since this one's last, while something waited here.
    passed_over: usize,
}

/// The requests that wait.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    classes: [Class<T>; 3],
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { classes: [(); 3].map(|()| Class { lines: BTreeMap::new(), passed_over: 0 }) }
    }
}

impl<T: Placed> Queue<T> {
    pub(crate) fn len(&self) -> usize {
        self.classes.iter().flat_map(|class| class.lines.values()).map(VecDeque::len).sum()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.classes.iter().all(|class| class.lines.is_empty())
    }

    /// The oldest request of each tenant in each class.
    pub(crate) fn fronts(&self) -> impl Iterator<Item = &T> {
        self.classes.iter().flat_map(|class| class.lines.values()).filter_map(VecDeque::front)
    }

    /// Adds a request, before those of its tenant and class that came after it.
    pub(crate) fn push(&mut self, item: T) {
        let place = item.place();
        let (class, tenant, rank) = (place.class, Arc::clone(&place.tenant), place.rank());
        let line = self.classes[class as usize].lines.entry(tenant).or_default();
        let at = line.partition_point(|other| other.place().rank() < rank);
        line.insert(at, item);
    }

    /// Whose turn it is. `running` says how many requests of a tenant run: among tenants that were served alike, the
    /// one with the fewest is first. One that was due and has given way since goes before everything else.
    /// `more_due` says whether one more may become due.
    pub(crate) fn turn(
        &self,
        tenants: &Tenants,
        running: impl Fn(&Tenant) -> usize,
        more_due: bool,
    ) -> Option<Turn> {
        let waiting = |class: &Priority| !self.classes[*class as usize].lines.is_empty();
        let is_due = |class: &Priority| {
            more_due
                && waiting(class)
                && self.classes[*class as usize].passed_over >= PASSED_OVER_MOST[*class as usize]
        };
        let gave_way = |line: &VecDeque<T>| line.front().is_some_and(|item| item.place().due);
        let first = self.classes[Priority::High as usize].lines.values().any(gave_way);
        let due = if first { Some(Priority::High) } else { Priority::ALL.into_iter().rev().find(is_due) };
        let class = due.or_else(|| Priority::ALL.into_iter().find(waiting))?;
        let lines = self.classes[class as usize].lines.iter();
        let (tenant, _) = lines.min_by_key(|(tenant, line)| {
            let oldest = line.front().map_or(0, |item| item.place().order);
            (!gave_way(line), tenants.served(tenant), running(tenant), oldest)
        })?;
        Some(Turn { class, tenant: Arc::clone(tenant), due: due.is_some() })
    }

    /// The request whose turn it is.
    pub(crate) fn peek(&self, turn: &Turn) -> Option<&T> {
        self.classes[turn.class as usize].lines.get(&turn.tenant)?.front()
    }

    /// Takes the request whose turn it is, and counts whom it passes over.
    pub(crate) fn take(&mut self, turn: &Turn) -> Option<T> {
        let lines = &mut self.classes[turn.class as usize].lines;
        let line = lines.get_mut(&turn.tenant)?;
        let item = line.pop_front();
        if line.is_empty() {
            lines.remove(&turn.tenant);
        }
        for class in Priority::ALL {
            let own = &mut self.classes[class as usize];
            if class == turn.class || own.lines.is_empty() {
                own.passed_over = 0;
            } else if class > turn.class {
                own.passed_over += 1;
            }
        }
        item
    }

    /// Takes the one that can best be spared among those that `may` be: of the lowest class, of the tenant with the most
    /// requests in it, the newest.
    pub(crate) fn take_last(&mut self, may: impl Fn(&T) -> bool) -> Option<T> {
        for class in self.classes.iter_mut().rev() {
            let newest = |line: &VecDeque<T>| line.iter().rposition(&may);
            let lines = class.lines.iter().filter_map(|(tenant, line)| Some((tenant, line, newest(line)?)));
            let found = lines.max_by_key(|(_, line, newest)| (line.len(), line[*newest].place().order));
            let Some((tenant, _, newest)) = found else { continue };
            let tenant = Arc::clone(tenant);
            let line = class.lines.get_mut(&tenant)?;
            let item = line.remove(newest);
            if line.is_empty() {
                class.lines.remove(&tenant);
            }
            return item;
        }
        None
    }

    /// All that wait.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.classes.iter_mut().flat_map(|class| class.lines.values_mut()).flatten()
    }

    /// Takes away those for which `keep` says no.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        for class in &mut self.classes {
            class.lines.retain(|_, line| {
                line.retain(&mut keep);
                !line.is_empty()
            });
        }
    }

    /// Takes everything.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = T> {
        let classes = std::mem::take(self).classes;
        classes.into_iter().flat_map(|class| class.lines.into_values()).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Placed for Place {
        fn place(&self) -> &Place {
            self
        }
    }

    fn place(class: Priority, tenant: &str, order: u64) -> Place {
        Place { class, tenant: tenant.into(), order, due: false }
    }

    /// Takes whose turn it is, with the word whether it was due.
    fn next(queue: &mut Queue<Place>, tenants: &Tenants) -> (u64, bool) {
        let turn = queue.turn(tenants, |_| 0, true).unwrap();
        (queue.take(&turn).unwrap().order, turn.due)
    }

    #[test]
    fn classes_overtake_and_arrival_decides_within() {
        let mut queue = Queue::default();
        let classes = [Priority::Low, Priority::Normal, Priority::High, Priority::Normal, Priority::High];
        for (order, class) in (0..).zip(classes) {
            queue.push(place(class, "", order));
        }
        // One that comes back goes before those that came after it.
        let first = queue.turn(&Tenants::default(), |_| 0, true).unwrap();
        let back = queue.take(&first).unwrap();
        queue.push(back);
        let taken: Vec<u64> = (0..5).map(|_| next(&mut queue, &Tenants::default()).0).collect();
        assert_eq!(taken, [2, 4, 1, 3, 0]);
        assert!(queue.is_empty() && queue.turn(&Tenants::default(), |_| 0, true).is_none());
    }

    #[test]
    fn no_class_is_passed_over_more_often_than_its_bound() {
        let tenants = Tenants::default();
        let mut queue = Queue::default();
        let mut order = 0;
        let mut push = |queue: &mut Queue<Place>, class| {
            order += 1;
            queue.push(place(class, "", order));
            order
        };
        let (low, normal) = (push(&mut queue, Priority::Low), push(&mut queue, Priority::Normal));
        let mut taken = Vec::new();
        for _ in 0..40 {
            push(&mut queue, Priority::High);
            taken.push(next(&mut queue, &tenants));
        }
        let at = |wanted: u64| taken.iter().position(|(order, _)| *order == wanted).unwrap();
        assert_eq!((at(normal), at(low)), (8, 16), "{taken:?}");
        assert!(taken[8].1 && taken[16].1 && taken.iter().filter(|(_, due)| *due).count() == 2);
        // Where the part of the batch for such requests is taken, nobody becomes due.
        push(&mut queue, Priority::Low);
        for _ in 0..20 {
            push(&mut queue, Priority::High);
            let turn = queue.turn(&tenants, |_| 0, false).unwrap();
            assert!(!turn.is_due() && queue.take(&turn).is_some());
        }
        assert!(next(&mut queue, &tenants).1, "it is once there is a place");
        // The count begins again with whoever waits next.
        push(&mut queue, Priority::Low);
        let waits = (0..40).position(|_| {
            push(&mut queue, Priority::High);
            next(&mut queue, &tenants).1
        });
        assert_eq!(waits, Some(16));
    }

    #[test]
    fn what_was_due_and_gave_way_goes_before_everything_else() {
        let mut tenants = Tenants::default();
        let mut queue = Queue::default();
        queue.push(place(Priority::High, "a", 1));
        queue.push(place(Priority::High, "b", 2));
        queue.push(Place { due: true, ..place(Priority::High, "b", 3) });
        for tenant in ["a", "b"] {
            tenants.enter(&tenant.into());
        }
        tenants.charge(&"b".into(), 9);
        let taken = [(); 3].map(|()| next(&mut queue, &tenants));
        assert_eq!(taken, [(3, true), (1, false), (2, false)]);
    }

    #[test]
    fn the_least_served_tenant_is_next_and_among_equals_the_one_that_runs_least() {
        let mut tenants = Tenants::default();
        let mut queue = Queue::default();
        for (order, tenant) in (0..).zip(["a", "a", "b", "c"]) {
            queue.push(place(Priority::Normal, tenant, order));
            tenants.enter(&tenant.into());
        }
        tenants.charge(&"a".into(), 5);
        tenants.charge(&"b".into(), 5);
        tenants.charge(&"c".into(), 6);
        let turn = queue.turn(&tenants, |tenant| usize::from(&**tenant == "a"), true).unwrap();
        assert_eq!((&**turn.tenant(), queue.peek(&turn).unwrap().order), ("b", 2));
        let turn = queue.turn(&tenants, |_| 0, true).unwrap();
        assert_eq!(queue.take(&turn).unwrap().order, 0);
        tenants.charge(&"a".into(), 5);
        assert_eq!(next(&mut queue, &tenants).0, 2);
        assert_eq!(next(&mut queue, &tenants).0, 3);
    }

    #[test]
    fn the_newest_of_who_has_most_in_the_lowest_class_is_spared_first() {
        let mut queue = Queue::default();
        let all = [
            (Priority::High, "b"),
            (Priority::Low, "a"),
            (Priority::Low, "b"),
            (Priority::Low, "b"),
            (Priority::Normal, "a"),
        ];
        for (order, (class, tenant)) in (0..).zip(all) {
            queue.push(place(class, tenant, order));
        }
        assert_eq!(queue.take_last(|item| item.order < 2).unwrap().order, 1);
        queue.push(place(Priority::Low, "a", 1));
        let taken: Vec<u64> =
            std::iter::from_fn(|| queue.take_last(|_| true)).map(|item| item.order).collect();
        assert_eq!(taken, [3, 2, 1, 4, 0]);
    }
}
