//! The prefix cache: allocation, sharing, eviction, invalidation.

use super::*;
use prometheus::IntGauge;
use std::collections::HashSet;
use trustformers_plan::KvLayout;

fn pool(count: usize) -> (BlockPool, BlockGauges) {
    pool_of(count, LayerClasses::ONE)
}

fn pool_of(count: usize, classes: LayerClasses) -> (BlockPool, BlockGauges) {
    let gauge = |name| IntGauge::new(name, name).unwrap();
    let gauges = BlockGauges { used: gauge("used"), evictable: gauge("evictable"), total: gauge("total") };
    let needs = BlockNeeds { classes, rows: 16 };
    (BlockPool::new(count, needs, gauges.clone()), gauges)
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
        let used: HashSet<u32> = sequences.iter().flat_map(|(_, table)| table.ids().to_vec()).collect();
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

/// One group of full layers and one of layers with a window of 20.
fn windowed() -> LayerClasses {
    KvLayout::of_windows(&[None, Some(20)], 1000).classes()
}

#[test]
fn blocks_that_no_row_reaches_are_released() {
    const ABSENT: u32 = ABSENT_BLOCK;
    let (pool, gauges) = pool_of(8, windowed());
    let mut table = pool.match_prefix(PrefixRoot::MODEL, &[]);
    assert!(table.reserve(48));
    assert_eq!((table.ids(), table.token_blocks()), (&[0, 1, 2, 3, 4, 5][..], 3));
    // The row at position 34 reaches 15..=34, the one at 35 reaches 16..=35.
    table.release_unreachable(34);
    assert_eq!(gauges.used.get(), 6);
    table.release_unreachable(35);
    assert_eq!((table.ids(), gauges.used.get()), (&[0, ABSENT, 2, 3, 4, 5][..], 5));
    table.release_unreachable(20);
    assert_eq!(gauges.used.get(), 5, "nothing comes back");
    // One more block of the full layer. A windowed layer has at most four at a time: `(20 - 1 + 16) / 16`,
    // rounded up, and one more.
    assert_eq!((table.missing_for(64), table.missing_until(64), table.missing_until(640)), (2, 3, 37 + 2));
    assert!(table.reserve(64));
    assert_eq!(table.ids(), [0, ABSENT, 2, 3, 4, 5, 1, 6]);
    table.release_unreachable(64);
    assert_eq!(table.ids(), [0, ABSENT, 2, ABSENT, 4, 5, 1, 6]);
    drop(table);
    assert_eq!((gauges.used.get(), pool.available()), (0, 8));
}

#[test]
fn a_prefix_matches_where_windowed_layers_have_what_the_next_row_reaches() {
    let (pool, gauges) = pool_of(12, windowed());
    let all = tokens(70, 1);
    let mut table = computed(&pool, &all);
    table.release_unreachable(70);
    assert_eq!((gauges.used.get(), gauges.evictable.get(), pool.free()), (7, 3, 2));
    let whole = pool.match_prefix(PrefixRoot::MODEL, &all);
    // The row at position 64 reaches position 45, which is in the third block.
    let absent: Vec<bool> = whole.ids().iter().map(|id| *id == ABSENT_BLOCK).collect();
    assert_eq!(absent, [false, true, false, true, false, false, false, false]);
    drop(whole);
    // The two free blocks go first, then the windowed blocks that were released first: none remains for the
    // beginning, but the end has all that it needs.
    let mut other = pool.match_prefix(PrefixRoot::MODEL, &[]);
    assert!(other.reserve(32));
    assert_eq!((gauges.evictable.get(), pool.free()), (1, 0));
    assert_eq!(pool.match_prefix(PrefixRoot::MODEL, &all[..33]).token_blocks(), 0);
    assert_eq!(pool.match_prefix(PrefixRoot::MODEL, &all[..64]).token_blocks(), 0);
    assert_eq!(pool.match_prefix(PrefixRoot::MODEL, &all).token_blocks(), 4);
    // Another sequence computes the beginning again, and takes the full layer's blocks from the cache.
    drop((table, other));
    let again = computed(&pool, &all[..33]);
    let beginning = pool.match_prefix(PrefixRoot::MODEL, &all[..33]);
    assert_eq!(beginning.ids(), &again.ids()[..4]);
    drop((again, beginning));
    assert_eq!((gauges.used.get(), pool.available()), (0, 12));
}

#[test]
fn a_prefix_of_windowed_layers_alone_is_found_by_its_end() {
    let (pool, gauges) = pool_of(5, KvLayout::of_windows(&[Some(20); 3], 1000).classes());
    let all = tokens(70, 1);
    let mut table = computed(&pool, &all);
    table.release_unreachable(70);
    let mut other = pool.match_prefix(PrefixRoot::MODEL, &[]);
    assert!(other.reserve(48), "the three blocks before the window");
    assert_eq!((gauges.used.get(), pool.available()), (5, 0));
    drop(other);
    drop(table);
    // Of four full blocks the last one alone is cached, and the row after it reaches the third as well.
    assert_eq!(pool.match_prefix(PrefixRoot::MODEL, &all).token_blocks(), 0);
    let longer = computed(&pool, &all);
    assert_eq!(pool.match_prefix(PrefixRoot::MODEL, &all).token_blocks(), 4);
    drop(longer);
    pool.invalidate();
    assert_eq!((gauges.used.get(), pool.free()), (0, 5));
}

/// What a test wrote to a block: the group of layers, and all tokens up to its end.
type Written = (usize, Vec<u32>);

/// Sequences that compute a few rows at a time: all that a row reaches is in its table and has the content of
/// its own tokens, no sequence has more blocks than it may, and no block is lost.
#[test]
fn random_sequences_of_windowed_layers_read_what_they_wrote() {
    let classes = KvLayout::of_windows(&[Some(20), None, Some(30)], 1000).classes();
    let (pool, gauges) = pool_of(40, classes);
    let needs = BlockNeeds { classes, rows: 16 };
    let mut device: Vec<Written> = vec![(0, Vec::new()); 40];
    let mut sequences: Vec<(Vec<u32>, usize, BlockTable)> = Vec::new();
    let (mut rng, mut reused) = (fastrand::Rng::with_seed(11), 0);
    for _ in 0..20_000 {
        if sequences.len() < 4 && rng.bool() {
            let len = 1 + rng.u32(..140);
            let salt = rng.u32(..3);
            let all: Vec<u32> = (0..len).map(|i| i / 16 * salt).collect();
            let table = pool.match_prefix(PrefixRoot::MODEL, &all);
            let cached = table.token_blocks() * 16;
            reused += cached;
            sequences.push((all, cached, table));
        } else if !sequences.is_empty() {
            let index = rng.usize(..sequences.len());
            let (all, cached, table) = &mut sequences[index];
            let rows = (1 + rng.usize(..16)).min(all.len() - *cached);
            table.release_unreachable(*cached);
            if rows == 0 || !table.reserve(*cached + rows) {
                sequences.swap_remove(index);
            } else {
                for (entry, id) in table.ids().iter().enumerate() {
                    let (block, group) = (entry / 3, entry % 3);
                    if block < classes.first_block(group, *cached) {
                        continue;
                    }
                    let own = &mut device[*id as usize];
                    let full = (group, all[..all.len().min((block + 1) * 16)].to_vec());
                    if (block + 1) * 16 <= *cached {
                        assert_eq!(*own, full, "block {block} of group {group}");
                    } else {
                        *own = full;
                    }
                }
                *cached += rows;
                table.register(&all[..*cached]);
                let held = table.ids().iter().filter(|id| **id != ABSENT_BLOCK).count();
                assert!(held <= needs.most(*cached));
            }
        }
        let tables = sequences.iter().flat_map(|(_, _, table)| table.ids().to_vec());
        let used: HashSet<u32> = tables.filter(|id| *id != ABSENT_BLOCK).collect();
        assert_eq!(gauges.used.get() as usize, used.len());
        assert_eq!(pool.available() + used.len(), 40);
    }
    assert!(reused > 1000, "{reused}");
    drop(sequences);
    assert_eq!((gauges.used.get(), pool.available()), (0, 40));
}
