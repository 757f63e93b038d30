//! Attention over the cache. Tiles of queries are dealt to the threads by their work, which grows with the
//! number of positions, so that one long sequence does not make the other threads wait. A thread's share may
//! end inside a tile; then each thread computes some chunks of positions, and a barrier precedes the merge.
//! The bits do not depend on where that is: see [`crate::kernels::attention`].
//!
//! In a step in which each row is alone, this op also rotates queries and writes keys and values
//! ([`Attention::joined`]). A thread rotates the queries of its tiles in its own memory, as each thread does
//! that has chunks of such a tile. The thread with a tile's last chunk, which has the row's own position,
//! writes the row's key and value before it reads the chunk; no other thread reads that block.

use std::ops::Range;

use trustformers_plan::{AttentionShape, Buf, Scores};

use super::{Step, ThreadContext, cache::RopeKvWrite};
use crate::{
    kernels::attention::{Attend, BlockEntries, CHUNK_TOKENS, Query, TILE, chunk_len, partial_len},
    pool::{Aborted, Dealer, Dealt, Pieces},
};

/// The operands of a [`trustformers_plan::Op::Attention`].
pub(super) struct Attention {
    pub(super) layer: usize,
    pub(super) query: Buf,
    pub(super) shape: AttentionShape,
    pub(super) scores: Scores,
    pub(super) out: Buf,
    /// The op before, where this one does its work.
    pub(super) joined: Option<RopeKvWrite>,
}

/// Queries of one sequence that share a key/value head. Query `q` of a sequence is head `q % group` of its
/// row `q / group`.
#[derive(Clone)]
struct Tile {
    sequence: usize,
    /// The first of the sequence's rows in the buffer of queries.
    first_row: usize,
    kv_head: usize,
    queries: Range<usize>,
}

/// What reading the keys and values of a chunk costs, in queries that are computed with them.
const READING_COST: usize = 4;

/// An unused entry of a tile's queries.
const NO_QUERY: Query = Query { ptr: std::ptr::null(), first: 0, positions: 0 };

impl Step<'_> {
    pub(super) fn attention(&self, a: &Attention, thread: ThreadContext<'_>) -> Result<(), Aborted> {
        let mut split_tiles = 0;
        self.deal_tiles(a, thread, |tile, Dealt { pieces, is_split }| {
            let partials = if is_split {
                split_tiles += 1;
                self.split_partials(a, split_tiles - 1)
            } else {
                self.shared.scratch.threads[thread.number].partials.ptr()
            };
            if pieces.is_empty() {
                return;
            }
            if let Some(rope) = &a.joined
                && self.first_chunk(a, &tile) + pieces.end == self.end_chunk(a, &tile)
            {
                self.store_rotated(rope, self.input.rows_of(tile.sequence).start, tile.kv_head);
            }
            let mut queries = [NO_QUERY; TILE];
            let attend = self.attend(a, &tile, &mut queries, thread);
            // SAFETY: see the parent module. The partials are this thread's: its own memory, or these chunks
            // of the common one. The queries of a tile that is not split are its own too.
            unsafe {
                let out = partials.add(pieces.start * chunk_len(&a.shape));
                let first = self.first_chunk(a, &tile);
                (self.shared.kernels.attend)(&attend, first + pieces.start..first + pieces.end, out);
                if !is_split {
                    tile.queries.clone().for_each(|query| self.merge(a, &tile, query, partials));
                }
            }
        });
        if split_tiles == 0 {
            return Ok(());
        }
        thread.barrier.wait()?;
        let (mut split_tiles, mut count) = (0, 0);
        self.deal_tiles(a, thread, |tile, dealt| {
            if !dealt.is_split {
                return;
            }
            let partials = self.split_partials(a, split_tiles);
            split_tiles += 1;
            for query in tile.queries.clone() {
                if count % self.threads == thread.number {
                    // SAFETY: the barrier lies between the partials' writing and this; the head is this
                    // thread's.
                    unsafe { self.merge(a, &tile, query, partials) };
                }
                count += 1;
            }
        });
        Ok(())
    }

    /// Calls `each` with every tile and this thread's chunks of it.
    fn deal_tiles(&self, a: &Attention, thread: ThreadContext<'_>, mut each: impl FnMut(Tile, Dealt)) {
        let cost_of = |tile: &Tile| {
            let count = self.end_chunk(a, tile) - self.first_chunk(a, tile);
            Pieces { count, cost: READING_COST + tile.queries.len() }
        };
        let total = self.tiles(a).map(|tile| cost_of(&tile).work()).sum();
        let mut dealer = Dealer::new(total, self.threads);
        for tile in self.tiles(a) {
            let dealt = dealer.deal(cost_of(&tile), thread.number);
            each(tile, dealt);
        }
    }

    /// The partial results of the `index`-th tile that is split. Each thread's share begins in one tile at
    /// most, so there are fewer of these than threads.
    fn split_partials(&self, a: &Attention, index: usize) -> *mut f32 {
        let tile_len = self.shared.hyper.context.div_ceil(CHUNK_TOKENS) * chunk_len(&a.shape);
        self.shared.scratch.partials.ptr().wrapping_add(index * tile_len)
    }

    fn tiles(&self, a: &Attention) -> impl Iterator<Item = Tile> {
        let (AttentionShape { heads, kv_heads, .. }, space) = (a.shape, a.query.rows);
        (0..self.input.sequences()).flat_map(move |sequence| {
            let rows = self.input.rows_within(space, sequence);
            let (first_row, queries) = (rows.start, rows.len() * (heads / kv_heads));
            (0..kv_heads).flat_map(move |kv_head| {
                (0..queries).step_by(TILE).map(move |first| {
                    let queries = first..queries.min(first + TILE);
                    Tile { sequence, first_row, kv_head, queries }
                })
            })
        })
    }

    /// Row (of the buffer of queries) and head of a tile's query.
    fn query(&self, a: &Attention, tile: &Tile, query: usize) -> (usize, usize) {
        let group = a.shape.heads / a.shape.kv_heads;
        (tile.first_row + query / group, tile.kv_head * group + query % group)
    }

    /// The first chunk that a tile reads: its first query's window begins there. Pieces of the tile's work,
    /// and its partial results, are numbered from this chunk on.
    fn first_chunk(&self, a: &Attention, tile: &Tile) -> usize {
        let (row, _) = self.query(a, tile, tile.queries.start);
        a.scores.first(self.position(a.query, row)) / CHUNK_TOKENS
    }

    /// The chunk after the last that a tile reads, which has its last query's position.
    fn end_chunk(&self, a: &Attention, tile: &Tile) -> usize {
        let (row, _) = self.query(a, tile, tile.queries.end - 1);
        (self.position(a.query, row) + 1).div_ceil(CHUNK_TOKENS)
    }

    /// Rotates a query in memory of this thread, as the `index`-th of a tile.
    fn rotated(&self, rope: &RopeKvWrite, query: Query, index: usize, thread: ThreadContext<'_>) -> Query {
        let dim = rope.spec.head_dim;
        let own = self.shared.scratch.threads[thread.number].rotated.ptr().wrapping_add(index * dim);
        // SAFETY: see the parent module; the memory is this thread's and has room for a tile's queries.
        let head = unsafe {
            std::ptr::copy_nonoverlapping(query.ptr, own, dim);
            std::slice::from_raw_parts_mut(own, dim)
        };
        self.rotate_head(&rope.spec, query.positions - 1, head);
        Query { ptr: own.cast_const(), ..query }
    }

    fn attend<'a>(
        &'a self,
        a: &Attention,
        tile: &Tile,
        queries: &'a mut [Query; TILE],
        thread: ThreadContext<'_>,
    ) -> Attend<'a> {
        for (index, (entry, query)) in queries.iter_mut().zip(tile.queries.clone()).enumerate() {
            let (row, head) = self.query(a, tile, query);
            let ptr = self.at(a.query, row).wrapping_add(head * a.shape.head_dim).cast_const();
            let position = self.position(a.query, row);
            let query = Query { ptr, first: a.scores.first(position), positions: position + 1 };
            *entry = a.joined.as_ref().map_or(query, |rope| self.rotated(rope, query, index, thread));
        }
        Attend {
            shape: a.shape,
            scale: a.scores.scale,
            soft_cap: a.scores.soft_cap,
            cache: self.layer_cache(a.layer),
            kv_type: self.shared.kv_type,
            table: BlockEntries {
                entries: self.input.blocks_of(tile.sequence),
                groups: self.shared.kv_layout.classes().groups(),
                group: self.shared.kv_layout.layer(a.layer).group,
            },
            kv_head: tile.kv_head,
            queries: &queries[..tile.queries.len()],
            scratch: self.shared.scratch.threads[thread.number].queries.ptr(),
        }
    }

    /// # Safety
    /// `partials` are all chunks of the tile; no other thread writes the query's head.
    unsafe fn merge(&self, a: &Attention, tile: &Tile, query: usize, partials: *const f32) {
        let (row, head) = self.query(a, tile, query);
        let position = self.position(a.query, row);
        let (base, first) = (self.first_chunk(a, tile), a.scores.first(position) / CHUNK_TOKENS);
        let chunks = (position + 1).div_ceil(CHUNK_TOKENS) - first;
        let dim = a.shape.head_dim;
        // SAFETY: as above, and see the parent module. A query's first chunk is none before the tile's.
        unsafe {
            let own = (query - tile.queries.start) * partial_len(&a.shape);
            let from = partials.add((first - base) * chunk_len(&a.shape) + own);
            let out = self.at(a.out, row).add(head * dim);
            (self.shared.kernels.merge)(from, chunk_len(&a.shape), chunks, out, dim);
        }
    }
}
