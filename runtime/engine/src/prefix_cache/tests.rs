//! The prefix cache: allocation, sharing, eviction, invalidation.

use super::*;
use prometheus::IntGauge;

fn pool(count: usize) -> (BlockPool, BlockGauges) {
    let gauge = |name| IntGauge::new(name, name).unwrap();
    let gauges = BlockGauges { used: gauge("used"), evictable: gauge("evictable"), total: gauge("total") };
    (BlockPool::new(count, gauges.clone()), gauges)
}

fn tokens(len: usize, salt: u32) -> Vec<u32> {
    (0..len as u32).map(|i| i * 7 + salt).collect()
}

/// A sequence that has computed all of these tokens.
fn computed(pool: &BlockPool, tokens: &[u32]) -> BlockTable {
    let mut table = pool.match_prefix(PrefixRoot::MODEL, tokens);
    assert!(table.reserve(tokens.len()));
    table.register(tokens);
    table
}

#[test]
fn blocks_are_reserved_all_or_none_and_lowest_first() {
    let (pool, gauges) = pool(4);
    let mut first = pool.match_prefix(PrefixRoot::MODEL, &[]);
    assert!(first.reserve(33));
    assert_eq!(first.ids(), [0, 1, 2]);
    let mut second = pool.match_prefix(PrefixRoot::MODEL, &[]);
    assert!(!second.reserve(17));
    assert!(second.ids().is_empty());
    assert!(second.reserve(16));
    assert_eq!((gauges.used.get(), gauges.total.get(), pool.available()), (4, 4, 0));
    drop(first);
    assert!(second.reserve(17));
    assert_eq!(second.ids(), [3, 0]);
    drop(second);
    assert_eq!((gauges.used.get(), pool.available()), (0, 4));
    drop(pool);
    assert_eq!((gauges.total.get(), gauges.evictable.get()), (0, 0));
}

#[test]
fn a_partial_block_counts_as_a_whole_one() {
    assert_eq!([0, 1, 16, 17].map(blocks_for), [0, 1, 1, 2]);
}

#[test]
fn a_prefix_matches_while_it_is_used_and_afterwards() {
    let (pool, gauges) = pool(8);
    let first = computed(&pool, &tokens(40, 1));
    let longer = [tokens(40, 1), tokens(9, 2)].concat();
    let second = pool.match_prefix(PrefixRoot::MODEL, &longer);
    assert_eq!(second.ids(), &first.ids()[..2], "a partial block is not shared");
    assert_eq!(gauges.used.get(), 3);
    drop((first, second));
    assert_eq!((gauges.used.get(), gauges.evictable.get(), pool.available()), (0, 2, 8));
    assert_eq!(pool.match_prefix(PrefixRoot::MODEL, &longer).ids().len(), 2);
    assert_eq!(pool.match_prefix(PrefixRoot::MODEL, &tokens(40, 2)).ids().len(), 0);
    assert_eq!(
        pool.match_prefix(PrefixRoot::MODEL, &tokens(32, 1)).ids().len(),
        1,
        "the last token is left to compute"
    );
}

#[test]
fn equal_tokens_after_a_different_block_do_not_match() {
    let (pool, _gauges) = pool(8);
    let same = tokens(16, 5);
    let one = computed(&pool, &[tokens(16, 1), same.clone(), vec![0]].concat());
    let other = computed(&pool, &[tokens(16, 2), same, vec![0]].concat());
    assert_ne!(one.ids()[1], other.ids()[1]);
}

#[test]
fn sequences_that_compute_the_same_block_share_it_afterwards() {
    let (pool, gauges) = pool(8);
    let all = tokens(33, 1);
    let (mut one, mut other) =
        (pool.match_prefix(PrefixRoot::MODEL, &all), pool.match_prefix(PrefixRoot::MODEL, &all));
    assert!(one.reserve(33) && other.reserve(33));
    one.register(&all);
    other.register(&all);
    assert_eq!(one.ids()[..2], other.ids()[..2]);
    assert_eq!(gauges.used.get(), 4);
    // The blocks that follow are shared as well.
    let more = [all, tokens(15, 9)].concat();
    assert!(one.reserve(48) && other.reserve(48));
    other.register(&more);
    drop(other);
    one.register(&more);
    assert_eq!(one.ids().len(), 3);
    drop(one);
    assert_eq!((gauges.used.get(), gauges.evictable.get(), pool.available()), (0, 3, 8));
}

#[test]
fn the_earliest_release_and_the_end_of_a_sequence_are_evicted_first() {
    let (pool, gauges) = pool(4);
    let (old, new) = ([tokens(32, 1), vec![0]].concat(), [tokens(16, 2), vec![0]].concat());
    drop(computed(&pool, &old[..32]));
    drop(computed(&pool, &new[..16]));
    let mut table = pool.match_prefix(PrefixRoot::MODEL, &[]);
    assert!(table.reserve(32));
    assert_eq!(
        pool.match_prefix(PrefixRoot::MODEL, &old).ids().len(),
        1,
        "its end was evicted, its beginning is cached"
    );
    assert_eq!(pool.match_prefix(PrefixRoot::MODEL, &new).ids().len(), 1);
    assert!(table.reserve(64));
    assert_eq!((gauges.used.get(), gauges.evictable.get(), pool.available()), (4, 0, 0));
    assert!(
        pool.match_prefix(PrefixRoot::MODEL, &old).ids().is_empty()
            && pool.match_prefix(PrefixRoot::MODEL, &new).ids().is_empty()
    );
}

#[test]
fn invalidated_content_neither_matches_nor_is_registered_again() {
    let (pool, gauges) = pool(4);
    let all = tokens(33, 1);
    let mut used = computed(&pool, &all[..16]);
    drop(computed(&pool, &tokens(16, 2)));
    pool.invalidate();
    assert_eq!((gauges.used.get(), gauges.evictable.get(), pool.available()), (1, 0, 3));
    assert!(used.reserve(33));
    used.register(&all);
    assert!(pool.match_prefix(PrefixRoot::MODEL, &all).ids().is_empty());
    drop(used);
    assert_eq!((gauges.used.get(), gauges.evictable.get(), pool.available()), (0, 0, 4));
}

/// Random allocations, registrations and releases: no block is lost, and a match has the content that it
/// claims.
#[test]
fn random_operations_neither_lose_nor_mix_up_blocks() {
    let (pool, gauges) = pool(12);
    let mut sequences: Vec<(Vec<u32>, BlockTable)> = Vec::new();
    // The content of each block on the device.
    let mut device = vec![Vec::new(); 12];
    let mut rng = fastrand::Rng::with_seed(7);
    for _ in 0..20_000 {
        if sequences.len() < 4 && rng.bool() {
            // Few different prefixes, so that sequences share some.
            let len = 16 * rng.u32(..5) + 1 + rng.u32(..16);
            let all: Vec<u32> = (0..len).map(|i| i / 16 * rng.u32(..2)).collect();
            let table = pool.match_prefix(PrefixRoot::MODEL, &all);
            for (block, id) in all.chunks(16).zip(table.ids()) {
                assert_eq!(device[*id as usize], block);
            }
            sequences.push((all, table));
        } else if !sequences.is_empty() {
            let index = rng.usize(..sequences.len());
            let (all, table) = &mut sequences[index];
            if rng.bool() && table.reserve(all.len()) {
                for (block, id) in all.chunks(16).zip(table.ids()) {
                    device[*id as usize] = block.to_vec();
                }
                table.register(all);
            } else {
                sequences.swap_remove(index);
            }
        }
        let used: std::collections::HashSet<u32> =
            sequences.iter().flat_map(|(_, table)| table.ids().to_vec()).collect();
        assert_eq!(gauges.used.get() as usize, used.len());
        assert_eq!(pool.available() + used.len(), 12);
    }
    drop(sequences);
    assert_eq!((gauges.used.get(), pool.available()), (0, 12));
}

#[test]
fn sequences_of_different_roots_share_no_block() {
    let (pool, _) = pool(16);
    let all = tokens(40, 1);
    let (first, second) = (pool.new_root(), pool.new_root());
    for root in [PrefixRoot::MODEL, first] {
        let mut table = pool.match_prefix(root, &all);
        assert!(table.ids().is_empty(), "nothing is shared with another root");
        assert!(table.reserve(all.len()));
        table.register(&all);
    }
    let under = |root| pool.match_prefix(root, &all).ids().to_vec();
    assert_eq!((under(PrefixRoot::MODEL).len(), under(first).len(), under(second).len()), (2, 2, 0));
    assert!(under(first).iter().all(|id| !under(PrefixRoot::MODEL).contains(id)));
    // A root is never used again, so a later adapter finds nothing of an earlier one.
    assert_ne!(pool.new_root(), first);
}

#[test]
fn a_pool_grows_and_gives_back_what_nothing_uses() {
    let (pool, gauges) = pool(4);
    let pool = pool.with_limit(10);
    let held = computed(&pool, &tokens(60, 1));
    assert_eq!((pool.total(), pool.free()), (4, 0));
    pool.grow(10);
    assert_eq!((pool.total(), pool.free(), gauges.total.get()), (10, 6, 10), "the gauge shows the limit");
    let above = computed(&pool, &tokens(40, 2));
    assert!(above.ids().iter().all(|id| *id >= 4));
    assert!(!pool.shrink(4), "a block above is in use");
    assert_eq!((pool.total(), gauges.total.get()), (10, 10));
    drop(above);
    assert_eq!(gauges.evictable.get(), 2);
    assert!(pool.shrink(4));
    assert_eq!((pool.total(), pool.free(), gauges.total.get(), gauges.evictable.get()), (4, 0, 10, 0));
    assert!(pool.match_prefix(PrefixRoot::MODEL, &tokens(40, 2)).ids().is_empty(), "its content is gone");
    drop(held);
    assert_eq!(pool.match_prefix(PrefixRoot::MODEL, &tokens(60, 1)).ids().len(), 3, "this content stayed");
    assert!(pool.shrink(4) && pool.shrink(9), "there is nothing to remove");
}
