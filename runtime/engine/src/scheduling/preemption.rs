//! Preemption: which running sequence waits again so that another request can run.
//!
//! A request preempts sequences of lower classes. Within its own class it preempts only tenants that still
//! hold at least as much afterwards as its own tenant does: capacity is evened out, and two tenants never
//! preempt each other in turn. The newest sequence is preempted first, because it loses the least work. An
//! aged sequence (see [`super::queue`]) is preempted only where no other one is left.

use super::priority::Priority;
use super::queue::QueueKey;
use super::tenants::TenantId;

/// A running sequence that could be preempted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Candidate<'a> {
    pub(crate) key: &'a QueueKey,
    /// KV blocks that all of its tokens need, allocated or not.
    pub(crate) blocks: usize,
}

/// The request that needs room.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Requester {
    pub(crate) class: Priority,
    pub(crate) tenant: TenantId,
}

/// Why a request cannot run now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shortage {
    /// The batch is full.
    Batch,
    /// The cache lacks `short` of the `own` blocks that the request needs.
    Blocks { short: usize, own: usize },
}

/// The sequence to preempt for a request, as an index of `running`. `None` where the policy allows no
/// preemption, or where all allowed preemptions together would not make enough room.
pub(crate) fn select_victim(
    requester: Requester,
    shortage: Shortage,
    running: &[Candidate<'_>],
) -> Option<usize> {
    let Requester { class, tenant } = requester;
    let is_lower = |candidate: &&Candidate<'_>| candidate.key.class > class;
    if let Shortage::Blocks { short, .. } = shortage {
        let freed: usize = running.iter().filter(is_lower).map(|candidate| candidate.blocks).sum();
        if freed >= short {
            return last(running, |candidate| is_lower(&candidate));
        }
    } else if running.iter().any(|candidate| is_lower(&candidate)) {
        return last(running, |candidate| is_lower(&candidate));
    }
    // What is evened out between tenants: sequences of the batch, or blocks.
    let amount = |candidate: &Candidate<'_>| match shortage {
        Shortage::Batch => 1,
        Shortage::Blocks { .. } => candidate.blocks,
    };
    let needed = match shortage {
        Shortage::Batch => 1,
        Shortage::Blocks { own, .. } => own,
    };
    let held_by = |tenant: TenantId| -> usize {
        running.iter().filter(|candidate| candidate.key.tenant == tenant).map(amount).sum()
    };
    let own = held_by(tenant) + needed;
    let has_more = |candidate: &&Candidate<'_>| {
        candidate.key.class == class
            && !candidate.key.aged
            && candidate.key.tenant != tenant
            && held_by(candidate.key.tenant) >= own + amount(candidate)
    };
    let most = running.iter().filter(has_more).map(|candidate| held_by(candidate.key.tenant)).max()?;
    last(running, |candidate| has_more(&candidate) && held_by(candidate.key.tenant) == most)
}

/// The sequence to preempt where the running ones need more blocks than there are: of the lowest class, of
/// the tenant with the most sequences in it, the newest. Aged sequences come last. The first sequence of all
/// is never preempted, so that one always makes progress.
pub(crate) fn select_victim_for_growth(running: &[Candidate<'_>]) -> Option<usize> {
    let first = running.iter().map(|candidate| candidate.key.rank()).min()?;
    let level = |candidate: &Candidate<'_>| (!candidate.key.aged, candidate.key.class);
    let others = || running.iter().filter(|candidate| candidate.key.rank() != first);
    let lowest = others().map(level).max()?;
    let sequences_of = |tenant: TenantId| {
        others().filter(|candidate| level(candidate) == lowest && candidate.key.tenant == tenant).count()
    };
    let most = others()
        .filter(|candidate| level(candidate) == lowest)
        .map(|candidate| sequences_of(candidate.key.tenant))
        .max()?;
    last(running, |candidate| {
        candidate.key.rank() != first
            && level(candidate) == lowest
            && sequences_of(candidate.key.tenant) == most
    })
}

/// The lowest and newest of the sequences that `may_preempt` allows.
fn last(running: &[Candidate<'_>], may_preempt: impl Fn(&Candidate<'_>) -> bool) -> Option<usize> {
    let allowed = running.iter().enumerate().filter(|(_, candidate)| may_preempt(candidate));
    allowed.max_by_key(|(_, candidate)| candidate.key.rank()).map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::priority::Priority::{self, High, Low, Normal};

    fn keys(all: &[(Priority, &str)]) -> Vec<QueueKey> {
        let key = |(arrival, (class, tenant)): (u64, &(Priority, &str))| QueueKey {
            class: *class,
            tenant: TenantId::of_letter(tenant),
            arrival,
            aged: false,
        };
        (0..).zip(all).map(key).collect()
    }

    /// Running sequences of one block each.
    fn candidates(keys: &[QueueKey]) -> Vec<Candidate<'_>> {
        keys.iter().map(|key| Candidate { key, blocks: 1 }).collect()
    }

    fn victim(class: Priority, tenant: &str, shortage: Shortage, running: &[Candidate<'_>]) -> Option<usize> {
        select_victim(Requester { class, tenant: TenantId::of_letter(tenant) }, shortage, running)
    }

    #[test]
    fn lower_classes_are_preempted_newest_first() {
        let keys = keys(&[(Low, "a"), (Low, "a"), (Normal, "a"), (High, "b")]);
        let running = candidates(&keys);
        let victim_of = |class, shortage| victim(class, "a", shortage, &running);
        assert_eq!(victim_of(High, Shortage::Batch), Some(1));
        assert_eq!(victim_of(Normal, Shortage::Batch), Some(1));
        assert_eq!(victim_of(Low, Shortage::Batch), None);
        assert_eq!(victim_of(High, Shortage::Blocks { short: 3, own: 5 }), Some(1));
        assert_eq!(victim_of(High, Shortage::Blocks { short: 4, own: 5 }), None, "it would not be enough");
    }

    #[test]
    fn preemption_evens_out_tenants_and_stops_there() {
        let keys = keys(&[(Normal, "a"), (Normal, "a"), (Normal, "a"), (Normal, "b"), (High, "c")]);
        let running = candidates(&keys);
        let victim_of = |tenant| victim(Normal, tenant, Shortage::Batch, &running);
        assert_eq!(victim_of("d"), Some(2), "the newest of the largest tenant");
        assert_eq!(victim_of("b"), Some(2), "3 and 1 become 2 and 2");
        assert_eq!(victim_of("a"), None);
        let even = &running[1..];
        assert_eq!(victim(Normal, "b", Shortage::Batch, even), None, "2 and 1 would become 1 and 2");
    }

    #[test]
    fn blocks_are_evened_out_by_their_number() {
        let keys = keys(&[(Normal, "a"), (Normal, "a"), (Normal, "b")]);
        let blocks = [30, 10, 4];
        let running: Vec<Candidate<'_>> =
            keys.iter().zip(blocks).map(|(key, blocks)| Candidate { key, blocks }).collect();
        let victim_of = |own| victim(Normal, "b", Shortage::Blocks { short: 1, own }, &running);
        assert_eq!(victim_of(20), Some(1));
        assert_eq!(victim_of(27), None, "a would keep 30, b would have 31");
    }

    #[test]
    fn growth_preempts_the_lowest_class_and_never_the_first() {
        let all = keys(&[(Normal, "a"), (High, "a"), (Normal, "a"), (Normal, "b"), (Normal, "a")]);
        assert_eq!(select_victim_for_growth(&candidates(&all)), Some(4));
        assert_eq!(select_victim_for_growth(&candidates(&all[..4])), Some(2), "a has more sequences than b");
        let two = candidates(&all[..2]);
        assert_eq!(select_victim_for_growth(&two), Some(0), "the first is the one of class high");
        assert_eq!(select_victim_for_growth(&candidates(&all[..1])), None);
    }

    #[test]
    fn aged_sequences_are_preempted_last() {
        let mut all = keys(&[(High, "a"), (High, "a"), (High, "a"), (High, "a")]);
        for key in &mut all[2..] {
            key.aged = true;
        }
        assert_eq!(victim(High, "b", Shortage::Batch, &candidates(&all)), Some(1));
        assert_eq!(victim(High, "b", Shortage::Batch, &candidates(&all[2..])), None);
        assert_eq!(select_victim_for_growth(&candidates(&all)), Some(1));
        assert_eq!(select_victim_for_growth(&candidates(&all[2..])), Some(1), "only aged ones are left");
    }
}
