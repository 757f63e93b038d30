//! Who gives way: which running sequence waits again so that another one can run.
//!
//! A request takes the place of one of a lower class. Within a class it takes the place of a tenant's that has more
//! than it, and still has as much as it afterwards: places are evened out, and no two push each other out in turn. The
//! newest goes first, because least of it is lost. What is due, because it has waited long enough, gives way to nobody
//! while somebody else can.

use crate::priority::Priority;
use crate::queue::Place;
use crate::tenants::Tenant;

/// A running sequence and what it needs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Runs<'a> {
    pub(crate) place: &'a Place,
    /// Blocks of the cache for all of its tokens, whether it has got them yet or not.
    pub(crate) blocks: usize,
}

/// What a request lacks that wants to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lack {
    /// A place in the batch.
    Place,
    /// So many more blocks than are free, of all that it needs for itself.
    Blocks { short: usize, own: usize },
}

/// The sequence that gives way to a request of this class and tenant, as an index of `running`; none where nobody
/// has to, or where it would not be enough.
pub(crate) fn gives_way(
    (class, tenant): (Priority, &Tenant),
    lack: Lack,
    running: &[Runs<'_>],
) -> Option<usize> {
    let below = |runs: &&Runs<'_>| runs.place.class > class;
    if let Lack::Blocks { short, .. } = lack {
        let freed: usize = running.iter().filter(below).map(|runs| runs.blocks).sum();
        if freed >= short {
            return last(running, |runs| below(&runs));
        }
    } else if running.iter().any(|runs| below(&runs)) {
        return last(running, |runs| below(&runs));
    }
    // Either places or blocks are what is evened out.
    let amount = |runs: &Runs<'_>| match lack {
        Lack::Place => 1,
        Lack::Blocks { .. } => runs.blocks,
    };
    let needed = match lack {
        Lack::Place => 1,
        Lack::Blocks { own, .. } => own,
    };
    let of = |tenant: &Tenant| -> usize {
        running.iter().filter(|runs| runs.place.tenant == *tenant).map(amount).sum()
    };
    let own = of(tenant) + needed;
    let richer = |runs: &&Runs<'_>| {
        runs.place.class == class
            && !runs.place.due
            && runs.place.tenant != *tenant
            && of(&runs.place.tenant) >= own + amount(runs)
    };
    let richest = running.iter().filter(richer).map(|runs| of(&runs.place.tenant)).max()?;
    last(running, |runs| richer(&runs) && of(&runs.place.tenant) == richest)
}

/// The sequence that gives way where those that run need more blocks than there are: of the lowest class, of the tenant
/// with the most sequences in it, the newest; of those that are due only where there are no others. Never the first of
/// all, so that one always goes on.
pub(crate) fn gives_way_to_growth(running: &[Runs<'_>]) -> Option<usize> {
    let first = running.iter().map(|runs| runs.place.rank()).min()?;
    let standing = |runs: &Runs<'_>| (!runs.place.due, runs.place.class);
    let others = || running.iter().filter(|runs| runs.place.rank() != first);
    let lowest = others().map(standing).max()?;
    let of = |tenant: &Tenant| {
        others().filter(|runs| standing(runs) == lowest && runs.place.tenant == *tenant).count()
    };
    let most = others().filter(|runs| standing(runs) == lowest).map(|runs| of(&runs.place.tenant)).max()?;
    last(running, |runs| {
        runs.place.rank() != first && standing(runs) == lowest && of(&runs.place.tenant) == most
    })
}

/// The lowest and newest of those that `may`.
fn last(running: &[Runs<'_>], may: impl Fn(&Runs<'_>) -> bool) -> Option<usize> {
    let all = running.iter().enumerate().filter(|(_, runs)| may(runs));
    all.max_by_key(|(_, runs)| runs.place.rank()).map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::priority::Priority::{self, High, Low, Normal};

    fn places(all: &[(Priority, &str)]) -> Vec<Place> {
        let place = |(order, (class, tenant)): (u64, &(Priority, &str))| Place {
            class: *class,
            tenant: (*tenant).into(),
            order,
            due: false,
        };
        (0..).zip(all).map(place).collect()
    }

    /// The running sequences hold one block each.
    fn runs(places: &[Place]) -> Vec<Runs<'_>> {
        places.iter().map(|place| Runs { place, blocks: 1 }).collect()
    }

    #[test]
    fn lower_classes_give_way_the_newest_first() {
        let places = places(&[(Low, "a"), (Low, "a"), (Normal, "a"), (High, "b")]);
        let running = runs(&places);
        let way = |class, lack| gives_way((class, &"a".into()), lack, &running);
        assert_eq!(way(High, Lack::Place), Some(1));
        assert_eq!(way(Normal, Lack::Place), Some(1));
        assert_eq!(way(Low, Lack::Place), None);
        assert_eq!(way(High, Lack::Blocks { short: 3, own: 5 }), Some(1));
        assert_eq!(way(High, Lack::Blocks { short: 4, own: 5 }), None, "it would not be enough");
    }

    #[test]
    fn places_are_evened_out_between_tenants_and_no_further() {
        let places = places(&[(Normal, "a"), (Normal, "a"), (Normal, "a"), (Normal, "b"), (High, "c")]);
        let running = runs(&places);
        let way = |tenant: &str| gives_way((Normal, &tenant.into()), Lack::Place, &running);
        assert_eq!(way("d"), Some(2), "the newest of who has most");
        assert_eq!(way("b"), Some(2), "3 and 1 become 2 and 2");
        assert_eq!(way("a"), None);
        let even = &running[1..];
        assert_eq!(gives_way((Normal, &"b".into()), Lack::Place, even), None, "2 and 1 would become 1 and 2");
    }

    #[test]
    fn blocks_are_evened_out_by_their_number() {
        let places = places(&[(Normal, "a"), (Normal, "a"), (Normal, "b")]);
        let held = [30, 10, 4];
        let running: Vec<Runs<'_>> =
            places.iter().zip(held).map(|(place, blocks)| Runs { place, blocks }).collect();
        let way = |own| gives_way((Normal, &"b".into()), Lack::Blocks { short: 1, own }, &running);
        assert_eq!(way(20), Some(1));
        assert_eq!(way(27), None, "a would keep 30, b would have 31");
    }

    #[test]
    fn growth_takes_from_the_lowest_and_largest_and_never_from_the_first() {
        let all = places(&[(Normal, "a"), (High, "a"), (Normal, "a"), (Normal, "b"), (Normal, "a")]);
        assert_eq!(gives_way_to_growth(&runs(&all)), Some(4));
        assert_eq!(gives_way_to_growth(&runs(&all[..4])), Some(2), "a runs more than b");
        assert_eq!(gives_way_to_growth(&runs(&all[..2])), Some(0), "the first is the one of class high");
        assert_eq!(gives_way_to_growth(&runs(&all[..1])), None);
    }

    #[test]
    fn what_is_due_gives_way_last() {
        let mut all = places(&[(High, "a"), (High, "a"), (High, "a"), (High, "a")]);
        for place in &mut all[2..] {
            place.due = true;
        }
        assert_eq!(gives_way((High, &"b".into()), Lack::Place, &runs(&all)), Some(1));
        assert_eq!(gives_way((High, &"b".into()), Lack::Place, &runs(&all[2..])), None);
        assert_eq!(gives_way_to_growth(&runs(&all)), Some(1));
        assert_eq!(gives_way_to_growth(&runs(&all[2..])), Some(1), "nobody else is there");
    }
}
