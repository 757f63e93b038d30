//! How the layers of a model share the blocks of its key/value cache.
//!
//! A block has the keys and values of [`KV_BLOCK_TOKENS`] tokens in a *group* of layers, and all blocks of a
//! cache have one size. Usually one group has all layers. Where layers have windows, they are in groups of
//! their own ([`crate::Plan::with_layer_classes`]), of the class *windowed*: a sequence gives their blocks
//! back when no row of it can reach them any more, while layers of the class *full* keep all of them. The
//! groups take their blocks from one cache, so that its memory serves whichever class needs it.
//!
//! A sequence's block table has one entry for each group and each block of tokens: those of the first
//! [`KV_BLOCK_TOKENS`] tokens, one for each group, then those of the next.

use crate::{Hyper, KV_BLOCK_TOKENS, KvType};

/// The entry of a block table whose block was given back: no row can reach its tokens.
pub const ABSENT_BLOCK: u32 = u32::MAX;

/// Most groups of a model: each is an entry for every block of tokens in every block table.
const MAX_GROUPS: usize = 16;

/// The shortest window that is used. A row after a full block then reaches into that block, so that a
/// sequence always has the last full block of each group.
const MIN_WINDOW: usize = KV_BLOCK_TOKENS + 1;

/// The groups of layers by class. Groups of full layers come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerClasses {
    full_groups: usize,
    windowed_groups: usize,
    /// The longest window of the windowed layers, in tokens; zero without any.
    window: usize,
}

impl LayerClasses {
    /// All layers in one group that keeps all blocks.
    pub const ONE: Self = Self { full_groups: 1, windowed_groups: 0, window: 0 };

    /// Entries of a block table for each block of tokens.
    #[must_use]
    pub const fn groups(&self) -> usize {
        self.full_groups + self.windowed_groups
    }

    /// Groups that keep all blocks: the first ones.
    #[must_use]
    pub const fn full_groups(&self) -> usize {
        self.full_groups
    }

    /// Groups that keep the blocks of their window only: the last ones.
    #[must_use]
    pub const fn windowed_groups(&self) -> usize {
        self.windowed_groups
    }

    /// The first block of tokens that windowed layers of a sequence with `cached_tokens` tokens in the cache
    /// can still reach: its next row, and all after it, attend to no position before this block.
    #[must_use]
    pub const fn first_windowed_block(&self, cached_tokens: usize) -> usize {
        if self.windowed_groups == 0 {
            return 0;
        }
        (cached_tokens + 1).saturating_sub(self.window) / KV_BLOCK_TOKENS
    }

    /// [`Self::first_windowed_block`] for a group: zero for one of full layers.
    #[must_use]
    pub const fn first_block(&self, group: usize, cached_tokens: usize) -> usize {
        if group < self.full_groups { 0 } else { self.first_windowed_block(cached_tokens) }
    }

    /// The most blocks that a sequence of `tokens` tokens has at a time in a cache of these groups, if at
    /// most `rows` of its rows are in steps that were not awaited.
    ///
    /// A windowed group has the positions from the window of the first such row to the last one, which are
    /// `window - 1 + rows`. A range of so many positions touches one block more than it fills.
    #[must_use]
    pub const fn most_blocks(&self, tokens: usize, rows: usize) -> usize {
        let all = tokens.div_ceil(KV_BLOCK_TOKENS);
        self.full_groups * all + self.windowed_groups * self.most_windowed_blocks(tokens, rows)
    }

    /// The share of one windowed group in [`Self::most_blocks`].
    #[must_use]
    pub const fn most_windowed_blocks(&self, tokens: usize, rows: usize) -> usize {
        let all = tokens.div_ceil(KV_BLOCK_TOKENS);
        let reached = self.window.saturating_add(rows).saturating_sub(1).div_ceil(KV_BLOCK_TOKENS) + 1;
        if all < reached { all } else { reached }
    }
}

/// Where the cache has a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheLayer {
    /// The group of the layer: the entry of a block table for each block of tokens.
    pub group: usize,
    /// Which of the layers of a block it is.
    pub index: usize,
}

/// Which layers share the blocks of a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvLayout {
    classes: LayerClasses,
    /// Layers of a block. The last group of a class may have fewer.
    block_layers: usize,
    layers: Vec<CacheLayer>,
}

impl KvLayout {
    /// All layers in one group that keeps all blocks.
    #[must_use]
    pub fn one_class(layers: usize) -> Self {
        Self {
            classes: LayerClasses::ONE,
            block_layers: layers,
            layers: (0..layers).map(|index| CacheLayer { group: 0, index }).collect(),
        }
    }

    /// The groups of layers with these windows. A window as long as the context is none.
    #[must_use]
    pub fn of_windows(windows: &[Option<usize>], context: usize) -> Self {
        let usable = |window: &Option<usize>| window.map(|w| w.max(MIN_WINDOW)).filter(|w| *w < context);
        let windows: Vec<Option<usize>> = windows.iter().map(usable).collect();
        let windowed = windows.iter().flatten().count();
        if windowed == 0 {
            return Self::one_class(windows.len());
        }
        let full = windows.len() - windowed;
        let block_layers = block_layers(full, windowed);
        let full_groups = full.div_ceil(block_layers);
        // The next layer of each class, counted from the first layer of its first group.
        let (mut next_full, mut next_windowed) = (0, full_groups * block_layers);
        let layers = windows.iter().map(|window| {
            let next = if window.is_some() { &mut next_windowed } else { &mut next_full };
            let layer = CacheLayer { group: *next / block_layers, index: *next % block_layers };
            *next += 1;
            layer
        });
        let layers = layers.collect();
        let window = windows.iter().flatten().max().copied().unwrap_or(0);
        let windowed_groups = windowed.div_ceil(block_layers);
        Self { classes: LayerClasses { full_groups, windowed_groups, window }, block_layers, layers }
    }

    /// The groups by class.
    #[must_use]
    pub const fn classes(&self) -> LayerClasses {
        self.classes
    }

    /// Layers of a block.
    #[must_use]
    pub const fn block_layers(&self) -> usize {
        self.block_layers
    }

    /// Where a layer is.
    ///
    /// # Panics
    /// When the model has no such layer.
    #[must_use]
    pub fn layer(&self, layer: usize) -> CacheLayer {
        self.layers[layer]
    }

    /// The block with a layer's keys and values at `position`, of the sequence with this block table.
    ///
    /// # Panics
    /// When the model has no such layer, or the table no such position.
    #[must_use]
    pub fn block(&self, layer: usize, table: &[u32], position: usize) -> u32 {
        table[position / KV_BLOCK_TOKENS * self.classes.groups() + self.layer(layer).group]
    }

    /// Bytes of a block: keys and values of [`KV_BLOCK_TOKENS`] tokens in its layers.
    #[must_use]
    pub const fn block_bytes(&self, kv_type: KvType, hyper: &Hyper) -> u64 {
        let Hyper { kv_heads, head_dim, .. } = *hyper;
        (self.block_layers * 2 * KV_BLOCK_TOKENS * kv_heads * head_dim * kv_type.bytes()) as u64
    }
}

/// The layers of a block for so many full and windowed layers: with the least room in the last groups that no
/// layer uses, and then with the fewest groups.
fn block_layers(full: usize, windowed: usize) -> usize {
    let most = full.max(windowed);
    let groups = |layers: usize| full.div_ceil(layers) + windowed.div_ceil(layers);
    let allowed = (1..=most).filter(|layers| groups(*layers) <= MAX_GROUPS);
    // With `most` layers there is one group of each class, so one is always allowed.
    allowed.min_by_key(|layers| (groups(*layers) * layers, groups(*layers))).unwrap_or(most)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Windowed layers with a full one after every `interval - 1` of them.
    fn windows(layers: usize, interval: usize, window: usize) -> Vec<Option<usize>> {
        (1..=layers).map(|layer| (layer % interval != 0).then_some(window)).collect()
    }

    #[test]
    fn layers_without_a_shorter_window_share_one_group() {
        for windows in [vec![None; 3], vec![Some(64); 3], vec![Some(900), None, None]] {
            assert_eq!(KvLayout::of_windows(&windows, 64), KvLayout::one_class(3));
        }
        let layout = KvLayout::one_class(3);
        assert_eq!((layout.block_layers(), layout.classes()), (3, LayerClasses::ONE));
        assert_eq!(layout.layer(2), CacheLayer { group: 0, index: 2 });
        assert_eq!(LayerClasses::ONE.first_block(0, 1000), 0);
        assert_eq!(LayerClasses::ONE.most_blocks(33, 5), 3);
    }

    #[test]
    fn the_groups_of_real_models_leave_little_room_unused() {
        // Layers, interval of full ones; then layers of a block, full and windowed groups.
        let cases = [
            ("Gemma 2 2B", 26, 2, 13, 1, 1),
            ("Gemma 3 270M", 18, 6, 3, 1, 5),
            ("Gemma 3 1B", 26, 6, 2, 2, 11),
            ("Gemma 3 4B", 34, 6, 5, 1, 6),
            ("Gemma 3 12B", 48, 6, 8, 1, 5),
            ("Gemma 3 27B", 62, 6, 4, 3, 13),
        ];
        for (model, layers, interval, of_block, full, windowed) in cases {
            let layout = KvLayout::of_windows(&windows(layers, interval, 512), 8192);
            let classes = layout.classes();
            let got = (layout.block_layers(), classes.full_groups(), classes.windowed_groups());
            assert_eq!(got, (of_block, full, windowed), "{model}");
            assert!(classes.groups() * layout.block_layers() <= layers + layers / 16, "{model}");
        }
        let mistral = KvLayout::of_windows(&[Some(4096); 32], 32_768);
        let classes = mistral.classes();
        assert_eq!((mistral.block_layers(), classes.full_groups(), classes.windowed_groups()), (32, 0, 1));
    }

    #[test]
    fn every_layer_has_its_own_part_of_the_blocks() {
        for (layers, interval) in [(6, 6), (26, 6), (34, 6), (7, 2), (5, 9)] {
            let windows = windows(layers, interval, 20);
            let layout = KvLayout::of_windows(&windows, 1000);
            let mut all: Vec<(usize, usize)> = Vec::new();
            for (layer, window) in windows.iter().enumerate() {
                let CacheLayer { group, index } = layout.layer(layer);
                assert_eq!(window.is_none(), group < layout.classes().full_groups(), "{layer} of {layers}");
                assert!(index < layout.block_layers() && group < layout.classes().groups());
                all.push((group, index));
            }
            all.sort_unstable();
            all.dedup();
            assert_eq!(all.len(), layers);
        }
    }

    #[test]
    fn a_block_is_needed_while_a_row_can_reach_it() {
        let windows = [None, Some(20), Some(30)];
        let classes = KvLayout::of_windows(&windows, 1000).classes();
        for cached in 0..200 {
            let first = classes.first_windowed_block(cached);
            // The row at position `cached` reaches 30 positions, its own included.
            let reached = (cached + 1).saturating_sub(30);
            assert!((first * 16..(first + 1) * 16).contains(&reached), "{cached}");
            assert_eq!((classes.first_block(0, cached), classes.first_block(1, cached)), (0, first));
        }
        // A window of one position keeps the last full block nevertheless.
        let short = KvLayout::of_windows(&[Some(1)], 1000).classes();
        assert_eq!(
            [0, 16, 31, 32, 47, 48].map(|cached| short.first_windowed_block(cached)),
            [0, 0, 0, 1, 1, 2]
        );
    }

    #[test]
    fn the_most_blocks_are_those_of_the_worst_position() {
        let classes = KvLayout::of_windows(&[None, Some(40), Some(40)], 10_000).classes();
        assert_eq!((classes.full_groups(), classes.windowed_groups()), (1, 2));
        for rows in [1, 7, 16, 40] {
            let used = |cached: usize| (cached + rows).div_ceil(16) - classes.first_windowed_block(cached);
            let worst = (0..2000).map(used).max();
            assert!(worst <= Some(classes.most_windowed_blocks(2000 + rows, rows)), "{rows}");
            assert!(worst >= Some(classes.most_windowed_blocks(2000 + rows, rows) - 1), "{rows}");
        }
        assert_eq!(classes.most_blocks(48, 1), 3 * 3, "a short sequence has all of its blocks");
        assert_eq!(classes.most_blocks(1600, 1), 100 + 2 * 4);
    }

    #[test]
    fn a_block_has_the_bytes_of_its_layers() {
        let hyper = Hyper { width: 8, layers: 6, heads: 4, kv_heads: 2, head_dim: 8, vocab: 8, context: 100 };
        let layout = KvLayout::of_windows(&windows(6, 3, 20), 100);
        assert_eq!(layout.block_layers(), 2);
        assert_eq!(layout.block_bytes(KvType::F32, &hyper), 2 * 2 * 16 * 2 * 8 * 4);
        let whole = KvLayout::one_class(6).block_bytes(KvType::F16, &hyper);
        assert_eq!(whole, KvType::F16.block_bytes(&hyper));
    }

    #[test]
    fn a_table_has_an_entry_for_each_group() {
        let layout = KvLayout::of_windows(&[Some(20), None, Some(20)], 100);
        assert_eq!((layout.block_layers(), layout.classes().groups()), (1, 3));
        let table = [7, ABSENT_BLOCK, ABSENT_BLOCK, 3, 5, 9];
        assert_eq!([0, 1, 2].map(|layer| layout.block(layer, &table, 16)), [5, 3, 9]);
        assert_eq!(layout.block(1, &table, 15), 7);
    }
}
