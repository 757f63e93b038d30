//! Rotary positions, and writing keys and values to the cache in the type of its elements.

use trustformers_plan::{AttentionShape, Buf, KV_BLOCK_TOKENS, KvType, RopeLayout, RopeSpec};

use super::{Step, ThreadContext};
use crate::kernels::kv::{Bf16Element, CacheSlot, HalfElement, KvElement};

/// The operands of a [`trustformers_plan::Op::RopeKvWrite`].
#[derive(Clone, Copy)]
pub(super) struct RopeKvWrite {
    pub(super) layer: usize,
    pub(super) query: Buf,
    pub(super) keys: Buf,
    pub(super) values: Buf,
    pub(super) spec: RopeSpec,
}

/// Keys and values on their way to the cache.
#[derive(Clone, Copy)]
struct NewKv {
    layer: usize,
    keys: Buf,
    values: Buf,
}

impl Step<'_> {
    pub(super) fn rope(&self, data: Buf, spec: &RopeSpec, thread: ThreadContext<'_>) {
        let heads = data.cols / spec.head_dim;
        for unit in self.my_share(self.rows(data) * heads, thread) {
            self.rotate(data, spec, unit / heads, unit % heads);
        }
    }

    /// Rotates one head of a row in place; the head is this thread's.
    fn rotate(&self, data: Buf, spec: &RopeSpec, row: usize, head: usize) {
        // SAFETY: see the parent module; the head lies in the row.
        let head = unsafe {
            std::slice::from_raw_parts_mut(self.at(data, row).add(head * spec.head_dim), spec.head_dim)
        };
        self.rotate_head(spec, self.position(data, row), head);
    }

    /// Rotates a head at a position.
    pub(super) fn rotate_head(&self, spec: &RopeSpec, position: usize, head: &mut [f32]) {
        self.for_each_pair(spec, position, |(a, b), (cos, sin)| {
            let (x, y) = (head[a], head[b]);
            (head[a], head[b]) = (x * cos - y * sin, x * sin + y * cos);
        });
    }

    /// Calls `each` with every pair of a head, and the cosine and sine of its rotation at a position.
    fn for_each_pair(
        &self,
        spec: &RopeSpec,
        position: usize,
        mut each: impl FnMut((usize, usize), (f32, f32)),
    ) {
        // Compiling checked that the table exists.
        let Some((_, table)) = self.shared.ropes.iter().find(|(own, _)| own == spec) else { return };
        let (cos, sin) = table.at(position);
        for (i, (cos, sin)) in cos.iter().zip(sin).enumerate() {
            let pair = match spec.layout {
                RopeLayout::Interleaved => (2 * i, 2 * i + 1),
                RopeLayout::Neox => (i, i + spec.dims / 2),
            };
            each(pair, (*cos, *sin));
        }
    }

    /// First byte of a layer's cache.
    pub(super) fn layer_cache(&self, layer: usize) -> *mut u8 {
        self.shared.cache.layer(self.shared.kv_layout.layer(layer).index)
    }

    /// The slot of one of the step's rows in the cache of one head.
    fn cache_slot(&self, layer: usize, row: usize, kv_head: usize) -> CacheSlot {
        let position = self.input.positions[row] as usize;
        let table = self.input.blocks_of(self.row_sequences[row] as usize);
        let block = self.shared.kv_layout.block(layer, table, position) as usize;
        let slot = position % KV_BLOCK_TOKENS;
        CacheSlot { cache: self.layer_cache(layer), kv_head, block, slot }
    }

    pub(super) fn kv_write(&self, layer: usize, keys: Buf, values: Buf, thread: ThreadContext<'_>) {
        let AttentionShape { kv_heads, .. } = self.shape();
        let new = NewKv { layer, keys, values };
        for unit in self.my_share(self.input.rows() * kv_heads, thread) {
            self.store(new, unit / kv_heads, unit % kv_heads, None);
        }
    }

    /// Rotates queries in place and stores rotated keys, and values, in the cache. A unit of work is a query
    /// or key head.
    pub(super) fn rope_kv_write(&self, operands: &RopeKvWrite, thread: ThreadContext<'_>) {
        let RopeKvWrite { query, ref spec, .. } = *operands;
        let AttentionShape { heads, kv_heads, .. } = self.shape();
        let queries = self.rows(query) * heads;
        for unit in self.my_share(queries + self.input.rows() * kv_heads, thread) {
            let Some(unit) = unit.checked_sub(queries) else {
                self.rotate(query, spec, unit / heads, unit % heads);
                continue;
            };
            self.store_rotated(operands, unit / kv_heads, unit % kv_heads);
        }
    }

    /// Stores one head of a row, rotated; no other thread uses its slot now.
    pub(super) fn store_rotated(&self, operands: &RopeKvWrite, row: usize, kv_head: usize) {
        let RopeKvWrite { layer, keys, values, ref spec, .. } = *operands;
        self.store(NewKv { layer, keys, values }, row, kv_head, Some(spec));
    }

    fn store(&self, new: NewKv, row: usize, kv_head: usize, spec: Option<&RopeSpec>) {
        match self.shared.kv_type {
            KvType::F32 => self.write::<f32>(new, row, kv_head, spec),
            KvType::F16 => self.write::<HalfElement>(new, row, kv_head, spec),
            KvType::Bf16 => self.write::<Bf16Element>(new, row, kv_head, spec),
        }
    }

    /// Stores one head of a row, whose key is rotated on the way where there is a rotation.
    fn write<K: KvElement>(&self, new: NewKv, row: usize, kv_head: usize, spec: Option<&RopeSpec>) {
        let shape = self.shape();
        let (dim, slot) = (shape.head_dim, self.cache_slot(new.layer, row, kv_head));
        let (key_out, value_out) = slot.of::<K>(&shape);
        // SAFETY: validation put the block inside the cache and lets one row alone write the slot; pairs are
        // elements of the head.
        unsafe {
            let key = self.at(new.keys, row).add(kv_head * dim);
            let store = |d: usize, v: f32| *key_out.add(d * KV_BLOCK_TOKENS) = K::nearest(v);
            if let Some(spec) = spec {
                let position = self.input.positions[row] as usize;
                self.for_each_pair(spec, position, |(a, b), (cos, sin)| {
                    let (x, y) = (*key.add(a), *key.add(b));
                    store(a, x * cos - y * sin);
                    store(b, x * sin + y * cos);
                });
            }
            for d in spec.map_or(0, |spec| spec.dims)..dim {
                store(d, *key.add(d));
            }
            let value = self.at(new.values, row).add(kv_head * dim);
            for d in 0..dim {
                *value_out.add(d) = K::nearest(*value.add(d));
            }
        }
    }
}
