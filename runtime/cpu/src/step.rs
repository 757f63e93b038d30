//! One thread's way through a plan.
//!
//! Every method here does this thread's share of one op. Safety rests on three things that hold for the whole file:
//! the step was validated against the plan, the plan's buffers lie in the arena and do not overlap while they live, and
//! [`crate::hazards`] put a barrier wherever one thread's share meets another's.

mod encoder;
mod projection;

use trustformers_plan::{
    AttentionShape, Buf, KV_BLOCK_TOKENS, Op, Part, Plan, RopeLayout, RopeSpec, RowSpace, StepInput, WeightId,
};

use crate::{
    kernels::attention::{Attend, CHUNK_TOKENS, Query, TILE, cache_index, chunk_len, partial_len},
    model::Shared,
    pool::{Aborted, Barrier, share},
};
use encoder::EncoderAttention;
use projection::Projection;

/// Rows that each thread quantises for itself: repeating so little costs less than meeting once more.
pub(crate) const PRIVATE_ROWS: usize = 4;
/// With fewer tiles per thread than this, attention is split by chunks too.
pub(crate) const ITEMS_PER_THREAD: usize = 4;
/// Columns per unit of element-wise work.
const UNIT_COLS: usize = 256;

/// A step under way, as all threads see it.
pub(crate) struct Step<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) plan: &'a Plan,
    pub(crate) barriers: &'a [bool],
    pub(crate) input: &'a StepInput,
    pub(crate) row_sequences: &'a [u32],
    pub(crate) threads: usize,
}

/// This thread's number, and where it meets the others.
#[derive(Clone, Copy)]
struct Me<'a> {
    number: usize,
    barrier: &'a Barrier,
}

impl Step<'_> {
    /// Runs this thread's share of every op.
    pub(crate) fn run(&self, number: usize, barrier: &Barrier) -> Result<(), Aborted> {
        let me = Me { number, barrier };
        for (op, &barrier_before) in self.plan.ops().iter().zip(self.barriers) {
            if barrier_before {
                barrier.wait()?;
            }
            self.op(op, me)?;
        }
        Ok(())
    }

    /// Appends the step's answer; for the caller's thread, after all have ended.
    pub(crate) fn read_answer(&self, values: &mut Vec<f32>) {
        let out = self.plan.answer();
        for row in 0..self.rows(out) {
            // SAFETY: the row lies in the arena, and no thread runs any more.
            values.extend_from_slice(unsafe { std::slice::from_raw_parts(self.at(out, row), out.cols) });
        }
    }

    fn op(&self, op: &Op, me: Me<'_>) -> Result<(), Aborted> {
        match *op {
            Op::Embed { table, out } => self.embed(table, &self.input.tokens, out, me),
            Op::EmbedPositions { table, out } => self.embed(table, &self.input.positions, out, me),
            Op::AddRow { input, weight, out } => self.add_row(input, weight, out, me),
            Op::RmsNorm { input, weight, eps, out } => {
                let weight = &self.shared.vectors[&weight];
                for row in self.my_share(self.rows(out), me) {
                    // SAFETY: see the module; the row is this thread's.
                    unsafe {
                        (self.shared.kernels.rms_norm)(self.at(input, row), weight, eps, self.at(out, row));
                    }
                }
            }
            Op::LayerNorm { input, weight, bias, eps, out } => {
                self.layer_norm((input, out), (weight, bias), eps, me);
            }
            Op::MatMul { input, norm, ref parts, activation, residual, out } => {
                return self.matmul(&Projection { input, norm, parts, activation, residual, out }, me);
            }
            Op::Logits { input, weight, out } => {
                return self.matmul(&Projection::plain(input, &[Part { weight, bias: None }], out), me);
            }
            Op::Rope { data, spec } => self.rope(data, &spec, me),
            Op::KvWrite { layer, keys, values } => self.kv_write(layer, keys, values, me),
            Op::RopeKvWrite { layer, query, keys, values, ref spec } => {
                self.rope_kv_write(layer, (query, keys, values), spec, me);
            }
            Op::Attention { layer, query, shape, scale, out } => {
                return self.attention(&Attention { layer, query, shape, scale, out }, me);
            }
            Op::EncoderAttention { query, keys, values, shape, scale, out } => {
                self.encoder_attention(&EncoderAttention { query, keys, values, shape, scale, out }, me);
            }
            Op::Gelu { input, out } => self.gelu(input, out, me),
            Op::SiluMul { gate, up, out } => {
                self.element_wise(self.shared.kernels.silu_mul, (gate, up, out), me);
            }
            Op::Add { a, b, out } => self.element_wise(self.shared.kernels.add, (a, b, out), me),
            Op::GatherRows { input, out } => {
                for i in self.my_share(self.rows(out), me) {
                    let row = self.input.logits_rows[i] as usize;
                    // SAFETY: see the module; the buffers do not overlap.
                    unsafe { std::ptr::copy_nonoverlapping(self.at(input, row), self.at(out, i), out.cols) };
                }
            }
            Op::Pool { input, pooling, normalise, out } => self.pool((input, out), pooling, normalise, me),
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

    fn my_share(&self, total: usize, me: Me<'_>) -> std::ops::Range<usize> {
        share(total, self.threads, me.number)
    }

    fn at(&self, buf: Buf, row: usize) -> *mut f32 {
        debug_assert!(row < self.rows(buf));
        // SAFETY: the buffer is one of the plan's, and validation bounded the rows.
        unsafe { self.shared.arena.row(buf, row) }
    }

    fn embed(&self, table: WeightId, picked: &[u32], out: Buf, me: Me<'_>) {
        let table = self.shared.weights.get(table);
        for row in self.my_share(picked.len(), me) {
            // SAFETY: see the module; the row is this thread's.
            let out = unsafe { std::slice::from_raw_parts_mut(self.at(out, row), out.cols) };
            table.dequantise_row(picked[row] as usize, out);
        }
    }

    fn element_wise(
        &self,
        kernel: unsafe fn(*const f32, *const f32, *mut f32, usize),
        (a, b, out): (Buf, Buf, Buf),
        me: Me<'_>,
    ) {
        let units = out.cols.div_ceil(UNIT_COLS);
        for unit in self.my_share(self.rows(out) * units, me) {
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

    fn rope(&self, data: Buf, spec: &RopeSpec, me: Me<'_>) {
        let heads = data.cols / spec.head_dim;
        for unit in self.my_share(self.input.rows() * heads, me) {
            self.turn(data, spec, (unit / heads, unit % heads));
        }
    }

    /// Turns one head of a row in place; the head is this thread's.
    fn turn(&self, data: Buf, spec: &RopeSpec, (row, head): (usize, usize)) {
        // SAFETY: see the module; the head lies in the row.
        let head = unsafe {
            std::slice::from_raw_parts_mut(self.at(data, row).add(head * spec.head_dim), spec.head_dim)
        };
        self.turned(spec, row, |(a, b), (cos, sin)| {
            let (x, y) = (head[a], head[b]);
            (head[a], head[b]) = (x * cos - y * sin, x * sin + y * cos);
        });
    }

    /// Hands the pairs of a head, and by how much they turn at a row's position, to `each`.
    fn turned(&self, spec: &RopeSpec, row: usize, mut each: impl FnMut((usize, usize), (f32, f32))) {
        // Compiling checked that the table exists.
        let Some((_, table)) = self.shared.ropes.iter().find(|(known, _)| known == spec) else { return };
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

    /// Where a row's key of one head goes, [`KV_BLOCK_TOKENS`] apart, and where its value goes, side by side.
    fn slot(&self, layer: usize, row: usize, kv_head: usize) -> (*mut f32, *mut f32) {
        let shape = self.shape();
        let position = self.input.positions[row] as usize;
        let (block, slot) = (self.table(row)[position / KV_BLOCK_TOKENS], position % KV_BLOCK_TOKENS);
        let cached = self.layer_cache(layer).wrapping_add(cache_index(&shape, block as usize, kv_head));
        let values = shape.head_dim * (KV_BLOCK_TOKENS + slot);
        (cached.wrapping_add(slot), cached.wrapping_add(values))
    }

    fn kv_write(&self, layer: usize, keys: Buf, values: Buf, me: Me<'_>) {
        let AttentionShape { kv_heads, head_dim, .. } = self.shape();
        for unit in self.my_share(self.input.rows() * kv_heads, me) {
            let (row, kv_head) = (unit / kv_heads, unit % kv_heads);
            let (key_slot, value_slot) = self.slot(layer, row, kv_head);
            // SAFETY: validation put the block inside the cache and lets one row alone write the slot.
            unsafe {
                let key = self.at(keys, row).add(kv_head * head_dim);
                for d in 0..head_dim {
                    *key_slot.add(d * KV_BLOCK_TOKENS) = *key.add(d);
                }
                let value = self.at(values, row).add(kv_head * head_dim);
                std::ptr::copy_nonoverlapping(value, value_slot, head_dim);
            }
        }
    }

    /// Turns queries in place and puts turned keys and values into the cache; heads of both kinds are the units of work.
    fn rope_kv_write(
        &self,
        layer: usize,
        (query, keys, values): (Buf, Buf, Buf),
        spec: &RopeSpec,
        me: Me<'_>,
    ) {
        let AttentionShape { heads, kv_heads, head_dim } = self.shape();
        let units = heads + kv_heads;
        for unit in self.my_share(self.input.rows() * units, me) {
            let (row, head) = (unit / units, unit % units);
            if head < heads {
                self.turn(query, spec, (row, head));
                continue;
            }
            let kv_head = head - heads;
            let (key_slot, value_slot) = self.slot(layer, row, kv_head);
            // SAFETY: as in `kv_write`; pairs are elements of the head.
            unsafe {
                let key = self.at(keys, row).add(kv_head * head_dim);
                self.turned(spec, row, |(a, b), (cos, sin)| {
                    let (x, y) = (*key.add(a), *key.add(b));
                    *key_slot.add(a * KV_BLOCK_TOKENS) = x * cos - y * sin;
                    *key_slot.add(b * KV_BLOCK_TOKENS) = x * sin + y * cos;
                });
                for d in spec.dims..head_dim {
                    *key_slot.add(d * KV_BLOCK_TOKENS) = *key.add(d);
                }
                let value = self.at(values, row).add(kv_head * head_dim);
                std::ptr::copy_nonoverlapping(value, value_slot, head_dim);
            }
        }
    }
}

/// The operands of a [`Op::Attention`].
struct Attention {
    layer: usize,
    query: Buf,
    shape: AttentionShape,
    scale: f32,
    out: Buf,
}

// === attention ===

/// Queries of one sequence that share a key/value head. Query `q` of a sequence is head `q % group` of its row `q / group`.
#[derive(Clone)]
struct Tile {
    sequence: usize,
    kv_head: usize,
    queries: std::ops::Range<usize>,
}

impl Step<'_> {
    fn attention(&self, a: &Attention, me: Me<'_>) -> Result<(), Aborted> {
        let longest = self.input.context_lens.iter().max().map_or(0, |&tokens| tokens as usize);
        let few = self.tiles(a.shape).count() < ITEMS_PER_THREAD * self.threads;
        if few && longest > CHUNK_TOKENS && self.threads > 1 {
            return self.attention_by_chunks(a, me);
        }
        let partials = self.shared.scratch.threads[me.number].partials.ptr();
        // Neighbouring tiles cost about the same, so taking every n-th balances the threads; one head after the other
        // keeps its keys and values in the cache.
        for tile in self.tiles(a.shape).skip(me.number).step_by(self.threads) {
            let mut queries = [NO_QUERY; TILE];
            let attend = self.attend(a, &tile, &mut queries, me);
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

    /// The same for few rows with long contexts: chunks are the units of work, and merging follows a barrier.
    fn attention_by_chunks(&self, a: &Attention, me: Me<'_>) -> Result<(), Aborted> {
        let tile_len = self.shared.hyper.context.div_ceil(CHUNK_TOKENS) * chunk_len(&a.shape);
        let partials = |tile: usize| self.shared.scratch.partials.ptr().wrapping_add(tile * tile_len);
        let total = self.tiles(a.shape).map(|tile| self.chunks_of(a, &tile)).sum();
        let mine = self.my_share(total, me);
        let mut first = 0;
        for (i, tile) in self.tiles(a.shape).enumerate() {
            let count = self.chunks_of(a, &tile);
            let chunks = mine.start.max(first)..mine.end.min(first + count);
            if !chunks.is_empty() {
                let mut queries = [NO_QUERY; TILE];
                let attend = self.attend(a, &tile, &mut queries, me);
                let chunks = chunks.start - first..chunks.end - first;
                // SAFETY: see the module; the chunks' partials are this thread's.
                unsafe {
                    let out = partials(i).add(chunks.start * chunk_len(&a.shape));
                    (self.shared.kernels.attend)(&attend, chunks, out);
                }
            }
            first += count;
        }
        me.barrier.wait()?;
        let all = || self.tiles(a.shape).enumerate();
        let mine = self.my_share(all().map(|(_, tile)| tile.queries.len()).sum(), me);
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
        me: Me<'_>,
    ) -> Attend<'a> {
        for (slot, query) in queries.iter_mut().zip(tile.queries.clone()) {
            let (row, head) = self.query(a, tile, query);
            let ptr = self.at(a.query, row).wrapping_add(head * a.shape.head_dim).cast_const();
            *slot = Query { ptr, positions: self.input.positions[row] as usize + 1 };
        }
        Attend {
            shape: a.shape,
            scale: a.scale,
            cache: self.layer_cache(a.layer),
            table: self.input.blocks_of(tile.sequence),
            kv_head: tile.kv_head,
            queries: &queries[..tile.queries.len()],
            scratch: self.shared.scratch.threads[me.number].queries.ptr(),
        }
    }

    /// # Safety
    /// `partials` are the tile's, all chunks of it; nobody else writes the query's head.
    unsafe fn merge(&self, a: &Attention, tile: &Tile, query: usize, partials: *const f32) {
        let (row, head) = self.query(a, tile, query);
        let chunks = (self.input.positions[row] as usize + 1).div_ceil(CHUNK_TOKENS);
        let dim = a.shape.head_dim;
        // SAFETY: as above, and see the module.
        unsafe {
            let from = partials.add((query - tile.queries.start) * partial_len(&a.shape));
            let out = self.at(a.out, row).add(head * dim);
            (self.shared.kernels.merge)(from, chunk_len(&a.shape), chunks, (out, dim));
        }
    }
}

/// What a tile's places hold before they are filled.
const NO_QUERY: Query = Query { ptr: std::ptr::null(), positions: 0 };
