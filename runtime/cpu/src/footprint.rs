//! How much memory a model takes, computed before any of it is allocated.
//!
//! [`Footprint::of`] is the one place with the arithmetic: [`crate::CpuBackend`] reports its sums as the
//! estimate, and a load allocates what it says. So the estimate differs from the load by the allocator's own
//! records only.

use std::collections::{BTreeMap, BTreeSet};

use trustformers_plan::{
    Activation, AttentionShape, BackendError, EstimateSpec, KV_BLOCK_TOKENS, MemoryReport, Numerics, Op,
    Plan, RopeSpec, SampleScratch, Segment, WeightId, WeightUse, rope::RopeTable,
};

use crate::{
    kernels::{
        Kernels,
        attention::{self, CHUNK_TOKENS, chunk_len},
        encoder,
        quantise::{Bf16Rows, BlockScaledRows, Int8Rows},
    },
    kv_memory::KvSizes,
    memory::SharedF32,
    pack::{BLOCK_COLS, Form, GROUP_ROWS, Packed},
    step::PRIVATE_ROWS,
};

/// The sizes of everything that a load allocates.
pub(crate) struct Footprint {
    /// The layout of each matrix.
    pub(crate) forms: BTreeMap<WeightId, Form>,
    /// How the plan reads each weight.
    pub(crate) uses: BTreeMap<WeightId, BTreeSet<WeightUse>>,
    /// Weights that projections add as biases.
    pub(crate) biases: BTreeSet<WeightId>,
    /// Bytes of all repacked matrices.
    pub(crate) packed_bytes: usize,
    /// Bytes of vectors, and of biases filled up to whole groups.
    vector_bytes: usize,
    /// The key/value cache.
    pub(crate) cache: KvSizes,
    /// Bytes of its blocks at the load.
    cache_bytes: usize,
    /// Values of the arena.
    pub(crate) arena_len: usize,
    /// The rotary tables of the plan.
    pub(crate) ropes: Vec<RopeSpec>,
    rope_bytes: u64,
    pub(crate) scratch: ScratchSizes,
    /// Bytes that an executable takes to choose tokens, on all threads together.
    pub(crate) sampling_bytes: u64,
}

/// Sizes of the intermediate results that are no buffers of the plan, in f32 values.
#[derive(Clone, Copy)]
pub(crate) struct ScratchSizes {
    pub(crate) quantised: usize,
    pub(crate) normed: usize,
    /// Of the tiles that are split among threads, fewer than there are threads.
    pub(crate) partials: usize,
    /// The first products of adapters.
    pub(crate) low_rank: usize,
    pub(crate) threads: usize,
    /// Of each thread.
    pub(crate) thread: ThreadScratchSizes,
}

/// The share of one thread.
#[derive(Clone, Copy)]
pub(crate) struct ThreadScratchSizes {
    pub(crate) matmul: usize,
    pub(crate) quantised: usize,
    pub(crate) normed: usize,
    pub(crate) partials: usize,
    /// Queries of a tile as the kernel reads them, and once more as they are rotated.
    pub(crate) queries: usize,
    pub(crate) encoder: usize,
}

impl Footprint {
    /// The sizes for a model on `threads` threads with these kernels.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] where a size overflows, [`BackendError::Unsupported`] for a plan that
    /// gates one matrix with one of another type, [`BackendError::OneDevice`] for a plan of a group.
    pub(crate) fn of(
        spec: &EstimateSpec<'_>,
        kernels: &Kernels,
        threads: usize,
    ) -> Result<Self, BackendError> {
        let EstimateSpec { weights, plan, kv_blocks, kv_type, numerics: _ } = *spec;
        plan.check_one_device("the processor")?;
        let hyper = plan.hyper();
        let mut uses: BTreeMap<WeightId, BTreeSet<WeightUse>> = BTreeMap::new();
        for (id, how) in plan.ops().iter().flat_map(Op::weights) {
            uses.entry(id).or_default().insert(how);
        }
        let biases: BTreeSet<WeightId> =
            plan.ops().iter().flat_map(segments).filter_map(|segment| segment.bias).collect();
        let forms = forms(spec)?;
        let packed_bytes = forms.iter().map(|(id, form)| {
            let weight = weights.get(*id);
            Packed::bytes_of(*form, weight.rows(), weight.cols())
        });
        let packed_bytes = packed_bytes.sum();
        let vectors = uses.iter().filter(|(_, uses)| uses.contains(&WeightUse::Vector)).map(|(id, _)| id);
        let vector_len = vectors.map(|id| {
            let cols = weights.get(*id).cols();
            cols + if biases.contains(id) { cols.next_multiple_of(GROUP_ROWS) } else { 0 }
        });
        let vector_bytes = vector_len.sum::<usize>() * size_of::<f32>();
        let block_layers = plan.kv_layout().block_layers();
        let elements = [block_layers, 2, KV_BLOCK_TOKENS, hyper.kv_heads, hyper.head_dim, kv_blocks];
        let cache_bytes = elements
            .into_iter()
            .try_fold(kv_type.bytes(), usize::checked_mul)
            .ok_or(BackendError::OutOfMemory { what: "the key/value cache", needed_bytes: u64::MAX })?;
        let cache = KvSizes {
            layers: block_layers,
            block_bytes: 2 * KV_BLOCK_TOKENS * hyper.kv_heads * hyper.head_dim * kv_type.bytes(),
            room: plan.kv_room(kv_blocks),
        };
        let mut ropes: Vec<RopeSpec> = Vec::new();
        for op in plan.ops() {
            if let Op::Rope { spec, .. } | Op::RopeKvWrite { spec, .. } = op
                && !ropes.contains(spec)
            {
                ropes.push(*spec);
            }
        }
        Ok(Self {
            scratch: ScratchSizes::of(spec, kernels, threads, &forms),
            forms,
            uses,
            biases,
            packed_bytes,
            vector_bytes,
            cache,
            cache_bytes,
            arena_len: plan.arena_bytes() / size_of::<f32>(),
            rope_bytes: ropes.iter().map(|spec| RopeTable::bytes_of(spec, hyper.context)).sum(),
            ropes,
            sampling_bytes: sampling_bytes(plan, threads),
        })
    }

    /// The sums that a caller compares with the memory there is.
    pub(crate) fn report(&self) -> MemoryReport {
        MemoryReport {
            weights_bytes: (self.packed_bytes + self.vector_bytes) as u64,
            arena_bytes: SharedF32::bytes_of(self.arena_len),
            kv_bytes: self.cache_bytes as u64,
            other_bytes: self.scratch.bytes() + self.sampling_bytes + self.rope_bytes,
        }
    }
}

impl ScratchSizes {
    fn of(
        spec: &EstimateSpec<'_>,
        kernels: &Kernels,
        threads: usize,
        forms: &BTreeMap<WeightId, Form>,
    ) -> Self {
        let EstimateSpec { weights, plan, numerics, .. } = *spec;
        let (hyper, limits) = (plan.hyper(), plan.limits());
        let blocks = forms.keys().map(|id| weights.get(*id).cols().div_ceil(BLOCK_COLS));
        let cols = blocks.max().unwrap_or(0) * BLOCK_COLS;
        let rounds = numerics == Numerics::Fast
            && kernels.quantise_bf16.is_some()
            && forms
                .values()
                .any(|form| *form == Form::Bf16 || kernels.has_panels() && form.has_block_scales());
        let quantised_len = |rows| {
            let halves = if rounds { Bf16Rows::bytes(rows, cols) } else { 0 };
            (BlockScaledRows::bytes(rows, cols) + Int8Rows::bytes(rows, cols) + halves)
                .div_ceil(size_of::<f32>())
        };
        let normed_cols = |which: &dyn Fn(&Op) -> bool| {
            plan.ops().iter().filter(|&op| which(op)).filter_map(normed_cols).max().unwrap_or(0)
        };
        // Rows that no other op reads, and that no kernel reads as floats, lie in the threads' own memory.
        let reads_floats = |segment: &Segment| kernels.reads_floats(forms[&segment.weight], numerics);
        let shared = |op: &Op| match op {
            Op::MatMul { normed: None, segments, .. } => segments.iter().any(reads_floats),
            _ => false,
        };
        let rows = limits.rows.max(limits.logits_rows);
        let shape = AttentionShape { heads: hyper.heads, kv_heads: hyper.kv_heads, head_dim: hyper.head_dim };
        let tile_partials = hyper.context.div_ceil(CHUNK_TOKENS) * chunk_len(&shape);
        let encodes = plan.ops().iter().any(|op| matches!(op, Op::EncoderAttention { .. }));
        Self {
            quantised: quantised_len(rows),
            normed: rows * normed_cols(&shared),
            partials: tile_partials * (threads - 1),
            low_rank: low_rank_len(plan, rows),
            threads,
            thread: ThreadScratchSizes {
                matmul: kernels.matmul_scratch_len(cols),
                quantised: quantised_len(PRIVATE_ROWS),
                normed: PRIVATE_ROWS * normed_cols(&|_| true),
                partials: tile_partials,
                queries: attention::TILE * hyper.head_dim,
                encoder: if encodes {
                    encoder::scratch_len(hyper.context.min(limits.rows), hyper.head_dim)
                } else {
                    0
                },
            },
        }
    }

    fn bytes(&self) -> u64 {
        let Self { quantised, normed, partials, low_rank, threads, thread } = *self;
        let shared: u64 = [quantised, normed, partials, low_rank].into_iter().map(SharedF32::bytes_of).sum();
        let ThreadScratchSizes { matmul, quantised, normed, partials, queries, encoder } = thread;
        let own: u64 = [matmul, quantised, normed, partials, queries, queries, encoder]
            .into_iter()
            .map(SharedF32::bytes_of)
            .sum();
        shared + own * threads as u64
    }
}

/// The layout of each matrix: that of its stored type, except that an encoder's floats become eight bits
/// where `fast` numerics allow it.
fn forms(spec: &EstimateSpec<'_>) -> Result<BTreeMap<WeightId, Form>, BackendError> {
    let EstimateSpec { weights, plan, numerics, .. } = *spec;
    let rounded = numerics == Numerics::Fast && !plan.uses_cache();
    let form = |id: WeightId| match Form::of(weights.get(id).dtype()) {
        Form::F32 | Form::F16 | Form::Bf16 if rounded => Form::Int8,
        form => form,
    };
    // The gated kernel reads both matrices side by side in one form. `trustformers_plan::passes` fuse no
    // others.
    for op in plan.ops() {
        if let Op::MatMul { activation: Activation::SiluMul, segments, .. } = op
            && segments.iter().any(|segment| form(segment.weight) != form(segments[0].weight))
        {
            let names: Vec<&str> = segments.iter().map(|s| weights.get(s.weight).name()).collect();
            return Err(BackendError::Unsupported {
                device: "cpu".to_owned(),
                what: format!("a fused silu_mul of {}, which have different types", names.join(" and ")),
            });
        }
    }
    let uses = plan.ops().iter().flat_map(Op::weights);
    Ok(uses.filter(|(_, how)| *how == WeightUse::Matrix).map(|(id, _)| (id, form(id))).collect())
}

/// Bytes of the memory in which an executable of a plan with logits chooses tokens.
fn sampling_bytes(plan: &Plan, threads: usize) -> u64 {
    let scratches = sampling_threads(plan, threads) as u64;
    scratches * SampleScratch::bytes_of(plan.answer().cols)
}

/// Values of the first products of adapters, for the widest projection of `rows` rows.
fn low_rank_len(plan: &Plan, rows: usize) -> usize {
    let room = plan.adapters();
    if room.is_none() {
        return 0;
    }
    let most_segments = plan.ops().iter().map(|op| segments(op).len()).max().unwrap_or(0);
    rows * most_segments * room.rank
}

/// How many threads choose tokens at a time, at most one for each row of logits.
pub(crate) fn sampling_threads(plan: &Plan, threads: usize) -> usize {
    threads.min(plan.limits().logits_rows)
}

/// The segments of a projection; none of other ops.
pub(crate) fn segments(op: &Op) -> &[Segment] {
    match op {
        Op::MatMul { segments, .. } => segments,
        _ => &[],
    }
}

/// Columns of the rows that a projection norms.
fn normed_cols(op: &Op) -> Option<usize> {
    match op {
        Op::MatMul { input, norm: Some(_), .. } => Some(input.cols),
        _ => None,
    }
}
