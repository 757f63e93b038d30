//! A step of a plan on one thread.
//!
//! Every method computes this thread's share of one op. Three facts make the whole file safe: the step was
//! validated against the plan; the plan's buffers lie in the arena and do not overlap while they are live;
//! and [`crate::hazards`] put a barrier wherever a thread accesses what another one wrote.

mod encoder;
mod projection;

use trustformers_plan::{
    AttentionShape, Buf, KV_BLOCK_TOKENS, Op, Plan, RopeLayout, RopeSpec, RowSpace, Segment, StepInput,
    WeightId,
};

use crate::{
    kernels::attention::{Attend, CHUNK_TOKENS, Query, TILE, cache_index, chunk_len, partial_len},
    model::ModelState,
    pool::{Aborted, Barrier, share},
};
use encoder::{EncoderAttention, LayerNormOperands, PoolOperands};
use projection::Projection;

/// Most rows that each thread quantises for itself: the repeated work costs less than one more barrier.
pub(crate) const PRIVATE_ROWS: usize = 4;
/// With fewer tiles per thread than this, attention is split by chunks too.
pub(crate) const ITEMS_PER_THREAD: usize = 4;
/// Columns per unit of element-wise work.
const UNIT_COLS: usize = 256;

/// A running step, shared by all threads.
pub(crate) struct Step<'a> {
    pub(crate) shared: &'a ModelState,
    pub(crate) plan: &'a Plan,
    pub(crate) barriers: &'a [bool],
    pub(crate) input: &'a StepInput,
    pub(crate) row_sequences: &'a [u32],
    pub(crate) threads: usize,
}

/// This thread's number, and the barrier of the step.
#[derive(Clone, Copy)]
struct ThreadContext<'a> {
    number: usize,
    barrier: &'a Barrier,
}

impl Step<'_> {
    /// Runs this thread's share of every op.
    pub(crate) fn run(&self, number: usize, barrier: &Barrier) -> Result<(), Aborted> {
        let thread = ThreadContext { number, barrier };
        for (op, &barrier_before) in self.plan.ops().iter().zip(self.barriers) {
            if barrier_before {
                barrier.wait()?;
            }
            self.op(op, thread)?;
        }
        Ok(())
    }

    /// Appends the step's answer; the caller's thread calls it after all threads have ended.
    pub(crate) fn read_answer(&self, values: &mut Vec<f32>) {
        let out = self.plan.answer();
        for row in 0..self.rows(out) {
            // SAFETY: the row lies in the arena, and no thread runs any more.
            values.extend_from_slice(unsafe { std::slice::from_raw_parts(self.at(out, row), out.cols) });
        }
    }

    fn op(&self, op: &Op, thread: ThreadContext<'_>) -> Result<(), Aborted> {
        match *op {
            Op::Embed { table, out } => self.embed(table, &self.input.tokens, out, thread),
            Op::EmbedPositions { table, out } => self.embed(table, &self.input.positions, out, thread),
            Op::AddRow { input, weight, out } => self.add_row(input, weight, out, thread),
            Op::RmsNorm { input, weight, eps, out } => {
                let weight = &self.shared.vectors[&weight];
                for row in self.my_share(self.rows(out), thread) {
                    // SAFETY: see the module; the row is this thread's.
                    unsafe {
                        (self.shared.kernels.rms_norm)(self.at(input, row), weight, eps, self.at(out, row));
                    }
                }
            }
            Op::LayerNorm { input, weight, bias, eps, out } => {
                self.layer_norm(&LayerNormOperands { input, weight, bias, eps, out }, thread);
            }
            Op::MatMul { input, norm, ref segments, activation, residual, out } => {
                return self.matmul(&Projection { input, norm, segments, activation, residual, out }, thread);
            }
            Op::Logits { input, weight, out } => {
                return self
                    .matmul(&Projection::plain(input, &[Segment { weight, bias: None }], out), thread);
            }
            Op::Rope { data, spec } => self.rope(data, &spec, thread),
            Op::KvWrite { layer, keys, values } => self.kv_write(layer, keys, values, thread),
            Op::RopeKvWrite { layer, query, keys, values, spec } => {
                self.rope_kv_write(&RopeKvWrite { layer, query, keys, values, spec }, thread);
            }
            Op::Attention { layer, query, shape, scale, out } => {
                return self.attention(&Attention { layer, query, shape, scale, out }, thread);
            }
            Op::EncoderAttention { query, keys, values, shape, scale, out } => {
                self.encoder_attention(&EncoderAttention { query, keys, values, shape, scale, out }, thread);
            }
            Op::Gelu { input, out } => self.gelu(input, out, thread),
            Op::SiluMul { gate, up, out } => {
                self.element_wise(self.shared.kernels.silu_mul, &ElementWise { a: gate, b: up, out }, thread);
            }
            Op::Add { a, b, out } => {
                self.element_wise(self.shared.kernels.add, &ElementWise { a, b, out }, thread);
            }
            Op::GatherRows { input, out } => {
                for i in self.my_share(self.rows(out), thread) {
                    let row = self.input.logits_rows[i] as usize;
                    // SAFETY: see the module; the buffers do not overlap.
                    unsafe { std::ptr::copy_nonoverlapping(self.at(input, row), self.at(out, i), out.cols) };
                }
            }
            Op::Pool { input, pooling, normalise, out } => {
                self.pool(&PoolOperands { input, pooling, normalise, out }, thread);
            }
        }
        Ok(())
    }

    fn rows(&self, buf: Buf) -> usize {
        match buf.rows {
            RowSpace::Tokens => self.input.rows(),
            RowSpace::Logits => self.input.logits_rows.len(),
            RowSpace::Sequences => self.input.sequences(),
        }
    }

    fn my_share(&self, total: usize, thread: ThreadContext<'_>) -> std::ops::Range<usize> {
        share(total, self.threads, thread.number)
    }

    fn at(&self, buf: Buf, row: usize) -> *mut f32 {
        debug_assert!(row < self.rows(buf));
        // SAFETY: the buffer is one of the plan's, and validation bounded the rows.
        unsafe { self.shared.arena.row(buf, row) }
    }

    fn embed(&self, table: WeightId, picked: &[u32], out: Buf, thread: ThreadContext<'_>) {
        let table = self.shared.weights.get(table);
        for row in self.my_share(picked.len(), thread) {
            // SAFETY: see the module; the row is this thread's.
            let out = unsafe { std::slice::from_raw_parts_mut(self.at(out, row), out.cols) };
            table.dequantise_row(picked[row] as usize, out);
        }
    }

    fn element_wise(
        &self,
        kernel: unsafe fn(*const f32, *const f32, *mut f32, usize),
        operands: &ElementWise,
        thread: ThreadContext<'_>,
    ) {
        let ElementWise { a, b, out } = *operands;
        let units = out.cols.div_ceil(UNIT_COLS);
        for unit in self.my_share(self.rows(out) * units, thread) {
            let (row, first) = (unit / units, unit % units * UNIT_COLS);
            let len = UNIT_COLS.min(out.cols - first);
            // SAFETY: see the module; the columns are this thread's.
            unsafe {
                kernel(
                    self.at(a, row).add(first),
                    self.at(b, row).add(first),
                    self.at(out, row).add(first),
                    len,
                );
            }
        }
    }

    fn rope(&self, data: Buf, spec: &RopeSpec, thread: ThreadContext<'_>) {
        let heads = data.cols / spec.head_dim;
        for unit in self.my_share(self.input.rows() * heads, thread) {
            self.rotate(data, spec, unit / heads, unit % heads);
        }
    }

    /// Rotates one head of a row in place; the head is this thread's.
    fn rotate(&self, data: Buf, spec: &RopeSpec, row: usize, head: usize) {
        // SAFETY: see the module; the head lies in the row.
        let head = unsafe {
            std::slice::from_raw_parts_mut(self.at(data, row).add(head * spec.head_dim), spec.head_dim)
        };
        self.for_each_pair(spec, row, |(a, b), (cos, sin)| {
            let (x, y) = (head[a], head[b]);
            (head[a], head[b]) = (x * cos - y * sin, x * sin + y * cos);
        });
    }

    /// Calls `each` with every pair of a head, and the cosine and sine of its rotation at a row's position.
    fn for_each_pair(&self, spec: &RopeSpec, row: usize, mut each: impl FnMut((usize, usize), (f32, f32))) {
        // Compiling checked that the table exists.
        let Some((_, table)) = self.shared.ropes.iter().find(|(own, _)| own == spec) else { return };
        let (cos, sin) = table.at(self.input.positions[row] as usize);
        for (i, (cos, sin)) in cos.iter().zip(sin).enumerate() {
            let pair = match spec.layout {
                RopeLayout::Interleaved => (2 * i, 2 * i + 1),
                RopeLayout::Neox => (i, i + spec.dims / 2),
            };
            each(pair, (*cos, *sin));
        }
    }

    /// First value of a layer's cache.
    fn layer_cache(&self, layer: usize) -> *mut f32 {
        let hyper = &self.shared.hyper;
        let layer_len = self.shared.kv_blocks * 2 * KV_BLOCK_TOKENS * hyper.kv_heads * hyper.head_dim;
        self.shared.cache.ptr().wrapping_add(layer * layer_len)
    }

    fn table(&self, row: usize) -> &[u32] {
        self.input.blocks_of(self.row_sequences[row] as usize)
    }

    fn shape(&self) -> AttentionShape {
        let hyper = &self.shared.hyper;
        AttentionShape { heads: hyper.heads, kv_heads: hyper.kv_heads, head_dim: hyper.head_dim }
    }

    /// The slots of a row in the cache of one head: its key's elements are [`KV_BLOCK_TOKENS`] apart, its
    /// value's adjacent.
    fn cache_slot(&self, layer: usize, row: usize, kv_head: usize) -> (*mut f32, *mut f32) {
        let shape = self.shape();
        let position = self.input.positions[row] as usize;
        let (block, slot) = (self.table(row)[position / KV_BLOCK_TOKENS], position % KV_BLOCK_TOKENS);
        let cached = self.layer_cache(layer).wrapping_add(cache_index(&shape, block as usize, kv_head));
        let values = shape.head_dim * (KV_BLOCK_TOKENS + slot);
        (cached.wrapping_add(slot), cached.wrapping_add(values))
    }

    fn kv_write(&self, layer: usize, keys: Buf, values: Buf, thread: ThreadContext<'_>) {
        let AttentionShape { kv_heads, head_dim, .. } = self.shape();
        for unit in self.my_share(self.input.rows() * kv_heads, thread) {
            let (row, kv_head) = (unit / kv_heads, unit % kv_heads);
            let (key_out, value_out) = self.cache_slot(layer, row, kv_head);
            // SAFETY: validation put the block inside the cache and lets one row alone write the slot.
            unsafe {
                let key = self.at(keys, row).add(kv_head * head_dim);
                for d in 0..head_dim {
                    *key_out.add(d * KV_BLOCK_TOKENS) = *key.add(d);
                }
                let value = self.at(values, row).add(kv_head * head_dim);
                std::ptr::copy_nonoverlapping(value, value_out, head_dim);
            }
        }
    }

    /// Rotates queries in place and stores rotated keys, and values, in the cache. A unit of work is a query
    /// or key head.
    fn rope_kv_write(&self, operands: &RopeKvWrite, thread: ThreadContext<'_>) {
        let RopeKvWrite { layer, query, keys, values, ref spec } = *operands;
        let AttentionShape { heads, kv_heads, head_dim } = self.shape();
        let units = heads + kv_heads;
        for unit in self.my_share(self.input.rows() * units, thread) {
            let (row, head) = (unit / units, unit % units);
            if head < heads {
                self.rotate(query, spec, row, head);
                continue;
            }
            let kv_head = head - heads;
            let (key_out, value_out) = self.cache_slot(layer, row, kv_head);
            // SAFETY: as in `kv_write`; pairs are elements of the head.
            unsafe {
                let key = self.at(keys, row).add(kv_head * head_dim);
                self.for_each_pair(spec, row, |(a, b), (cos, sin)| {
                    let (x, y) = (*key.add(a), *key.add(b));
                    *key_out.add(a * KV_BLOCK_TOKENS) = x * cos - y * sin;
                    *key_out.add(b * KV_BLOCK_TOKENS) = x * sin + y * cos;
                });
                for d in spec.dims..head_dim {
                    *key_out.add(d * KV_BLOCK_TOKENS) = *key.add(d);
                }
                let value = self.at(values, row).add(kv_head * head_dim);
                std::ptr::copy_nonoverlapping(value, value_out, head_dim);
            }
        }
    }
}

/// The operands of an op on each element of two buffers.
struct ElementWise {
    a: Buf,
    b: Buf,
    out: Buf,
}

/// The operands of an [`Op::RopeKvWrite`].
struct RopeKvWrite {
    layer: usize,
    query: Buf,
    keys: Buf,
    values: Buf,
    spec: RopeSpec,
}

/// The operands of an [`Op::Attention`].
struct Attention {
    layer: usize,
    query: Buf,
    shape: AttentionShape,
    scale: f32,
    out: Buf,
}

// === attention ===

/// Queries of one sequence that share a key/value head. Query `q` of a sequence is head `q % group` of its
/// row `q / group`.
#[derive(Clone)]
struct Tile {
    sequence: usize,
    kv_head: usize,
    queries: std::ops::Range<usize>,
}

impl Step<'_> {
    fn attention(&self, a: &Attention, thread: ThreadContext<'_>) -> Result<(), Aborted> {
        let longest = self.input.context_lens.iter().max().map_or(0, |&tokens| tokens as usize);
        let few = self.tiles(a.shape).count() < ITEMS_PER_THREAD * self.threads;
        if few && longest > CHUNK_TOKENS && self.threads > 1 {
            return self.attention_by_chunks(a, thread);
        }
        let partials = self.shared.scratch.threads[thread.number].partials.ptr();
        // Adjacent tiles cost about the same, so every n-th tile for a thread balances the load. Tiles of one
        // head are adjacent, so that its keys and values stay in the processor's cache.
        for tile in self.tiles(a.shape).skip(thread.number).step_by(self.threads) {
            let mut queries = [NO_QUERY; TILE];
            let attend = self.attend(a, &tile, &mut queries, thread);
            // SAFETY: see the module; the partials are this thread's, and so are the tile's heads.
            unsafe {
                (self.shared.kernels.attend)(&attend, 0..attend.chunks(), partials);
                for query in tile.queries.clone() {
                    self.merge(a, &tile, query, partials);
                }
            }
        }
        Ok(())
    }

    /// [`Self::attention`] for few rows with long contexts: a unit of work is a chunk, and a barrier precedes
    /// the merge.
    fn attention_by_chunks(&self, a: &Attention, thread: ThreadContext<'_>) -> Result<(), Aborted> {
        let tile_len = self.shared.hyper.context.div_ceil(CHUNK_TOKENS) * chunk_len(&a.shape);
        let partials = |tile: usize| self.shared.scratch.partials.ptr().wrapping_add(tile * tile_len);
        let total = self.tiles(a.shape).map(|tile| self.chunks_of(a, &tile)).sum();
        let mine = self.my_share(total, thread);
        let mut first = 0;
        for (i, tile) in self.tiles(a.shape).enumerate() {
            let count = self.chunks_of(a, &tile);
            let chunks = mine.start.max(first)..mine.end.min(first + count);
            if !chunks.is_empty() {
                let mut queries = [NO_QUERY; TILE];
                let attend = self.attend(a, &tile, &mut queries, thread);
                let chunks = chunks.start - first..chunks.end - first;
                // SAFETY: see the module; the chunks' partials are this thread's.
                unsafe {
                    let out = partials(i).add(chunks.start * chunk_len(&a.shape));
                    (self.shared.kernels.attend)(&attend, chunks, out);
                }
            }
            first += count;
        }
        thread.barrier.wait()?;
        let all = || self.tiles(a.shape).enumerate();
        let mine = self.my_share(all().map(|(_, tile)| tile.queries.len()).sum(), thread);
        let each =
            all().flat_map(|(i, tile)| tile.queries.clone().map(move |query| (i, tile.clone(), query)));
        for (i, tile, query) in each.skip(mine.start).take(mine.len()) {
            // SAFETY: the barrier lies between the partials' writing and this; the head is this thread's.
            unsafe { self.merge(a, &tile, query, partials(i)) };
        }
        Ok(())
    }

    fn tiles(&self, shape: AttentionShape) -> impl Iterator<Item = Tile> {
        let group = shape.heads / shape.kv_heads;
        (0..self.input.sequences()).flat_map(move |sequence| {
            let queries = self.input.rows_of(sequence).len() * group;
            (0..shape.kv_heads).flat_map(move |kv_head| {
                (0..queries).step_by(TILE).map(move |first| {
                    let queries = first..queries.min(first + TILE);
                    Tile { sequence, kv_head, queries }
                })
            })
        })
    }

    /// Row and head of a tile's query.
    fn query(&self, a: &Attention, tile: &Tile, query: usize) -> (usize, usize) {
        let group = a.shape.heads / a.shape.kv_heads;
        (self.input.rows_of(tile.sequence).start + query / group, tile.kv_head * group + query % group)
    }

    fn chunks_of(&self, a: &Attention, tile: &Tile) -> usize {
        let (row, _) = self.query(a, tile, tile.queries.end - 1);
        (self.input.positions[row] as usize + 1).div_ceil(CHUNK_TOKENS)
    }

    fn attend<'a>(
        &'a self,
        a: &Attention,
        tile: &Tile,
        queries: &'a mut [Query; TILE],
        thread: ThreadContext<'_>,
    ) -> Attend<'a> {
        for (entry, query) in queries.iter_mut().zip(tile.queries.clone()) {
            let (row, head) = self.query(a, tile, query);
            let ptr = self.at(a.query, row).wrapping_add(head * a.shape.head_dim).cast_const();
            *entry = Query { ptr, positions: self.input.positions[row] as usize + 1 };
        }
        Attend {
            shape: a.shape,
            scale: a.scale,
            cache: self.layer_cache(a.layer),
            table: self.input.blocks_of(tile.sequence),
            kv_head: tile.kv_head,
            queries: &queries[..tile.queries.len()],
            scratch: self.shared.scratch.threads[thread.number].queries.ptr(),
        }
    }

    /// # Safety
    /// `partials` are all chunks of the tile; no other thread writes the query's head.
    unsafe fn merge(&self, a: &Attention, tile: &Tile, query: usize, partials: *const f32) {
        let (row, head) = self.query(a, tile, query);
        let chunks = (self.input.positions[row] as usize + 1).div_ceil(CHUNK_TOKENS);
        let dim = a.shape.head_dim;
        // SAFETY: as above, and see the module.
        unsafe {
            let from = partials.add((query - tile.queries.start) * partial_len(&a.shape));
            let out = self.at(a.out, row).add(head * dim);
            (self.shared.kernels.merge)(from, chunk_len(&a.shape), chunks, out, dim);
        }
    }
}

/// An unused entry of a tile's queries.
const NO_QUERY: Query = Query { ptr: std::ptr::null(), positions: 0 };
