//! A step of a plan on one thread.
//!
//! Every method computes this thread's share of one op. Three facts make the whole file safe: the step was
//! validated against the plan; the plan's buffers lie in the arena and do not overlap while they are live;
//! and [`crate::hazards`] put a barrier wherever a thread accesses what another one wrote.
//!
//! A layer of a Llama in which one row is decoded has five barriers: before attention, before its output
//! projection, before gate and up, before down, and before the next layer. One more precedes the merge of
//! positions that several threads attended to.

mod adapter;
pub(crate) mod alone;
mod attention;
mod cache;
mod elements;
mod encoder;
mod experts;
mod projection;
pub(crate) mod prompts;

use std::sync::Arc;

use trustformers_plan::{AttentionShape, Buf, GeluForm, Op, Plan, RowSpace, Segment, StepInput, WeightId};

use crate::{
    adapter::CpuAdapter,
    hazards::Fence,
    kernels::attention::TILE,
    model::ModelState,
    pool::{Aborted, Barrier, share},
};
use attention::Attention;
use cache::RopeKvWrite;
use elements::RmsNormOperands;
use encoder::{EncoderAttention, LayerNormOperands, PoolOperands};
use experts::{ExpertsDown, ExpertsUp};
use projection::Projection;
use prompts::PromptRows;

/// Most rows that each thread quantises for itself: the repeated work costs less than one more barrier.
pub(crate) const PRIVATE_ROWS: usize = 4;
/// Most values of several such rows. A block of 32 takes some thirty cycles (a maximum, a division, two sums
/// over lanes), so half of these values, which each of two threads repeats for the other, take about as long
/// as a barrier: some four thousand cycles.
const PRIVATE_VALUES: usize = 8192;
/// Columns per unit of element-wise work.
const UNIT_COLS: usize = 256;

/// A running step, shared by all threads.
pub(crate) struct Step<'a> {
    pub(crate) shared: &'a ModelState,
    pub(crate) plan: &'a Plan,
    pub(crate) fences: &'a [Fence],
    pub(crate) input: &'a StepInput,
    /// The token of each row.
    pub(crate) ids: &'a [u32],
    pub(crate) row_sequences: &'a [u32],
    pub(crate) prompt_rows: &'a PromptRows,
    /// Whether each row is alone; see [`alone`].
    pub(crate) rows_are_alone: bool,
    /// The adapter of each sequence; empty where all chose none.
    pub(crate) adapters: &'a [Option<Arc<CpuAdapter>>],
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
        let ops = self.plan.ops();
        let mut index = 0;
        while index < ops.len() {
            if self.fences[index] != Fence::Open {
                barrier.wait()?;
            }
            if let Some(attention) = self.joint(index) {
                self.attention(&attention, thread)?;
                index += 2;
            } else {
                self.op(&ops[index], thread)?;
                index += 1;
            }
        }
        Ok(())
    }

    /// The attention after the op at `index`, if this step computes both together.
    fn joint(&self, index: usize) -> Option<Attention> {
        if !self.rows_are_alone || self.fences.get(index + 1) != Some(&Fence::Joint) {
            return None;
        }
        let ops = self.plan.ops();
        let (
            &Op::RopeKvWrite { layer, query, keys, values, spec },
            &Op::Attention { shape, scores, out, .. },
        ) = (&ops[index], &ops[index + 1])
        else {
            return None;
        };
        // Each row must have a query, and all of a head's queries must be one tile, which one thread ends.
        let is_whole = self.rows(query) == self.input.rows() && shape.heads / shape.kv_heads <= TILE;
        let joined = Some(RopeKvWrite { layer, query, keys, values, spec });
        is_whole.then_some(Attention { layer, query, shape, scores, out, joined })
    }

    fn op(&self, op: &Op, thread: ThreadContext<'_>) -> Result<(), Aborted> {
        match *op {
            Op::Embed { table, out } => self.embed(table, self.ids, out, thread),
            Op::EmbedPositions { table, out } => self.embed(table, &self.input.positions, out, thread),
            Op::AddRow { input, weight, out } => self.add_row(input, weight, out, thread),
            Op::RmsNorm { input, weight, eps, out } => {
                self.rms_norm(&RmsNormOperands { input, weight, eps, out }, thread);
            }
            Op::LayerNorm { input, weight, bias, eps, out } => {
                self.layer_norm(&LayerNormOperands { input, weight, bias, eps, out }, thread);
            }
            Op::MatMul { input, norm, normed, ref segments, activation, residual, out } => {
                let projection = Projection { input, norm, normed, segments, activation, residual, out };
                self.matmul(&projection, thread)?;
                return self.adapt(&projection, thread);
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
            Op::Attention { layer, query, shape, scores, out } => {
                let joined = None;
                return self.attention(&Attention { layer, query, shape, scores, out, joined }, thread);
            }
            Op::EncoderAttention { query, keys, values, shape, scores, out } => {
                self.encoder_attention(&EncoderAttention { query, keys, values, shape, scores, out }, thread);
            }
            Op::Gelu { input, form: GeluForm::Erf, out } => self.gelu(input, out, thread),
            Op::Gelu { input, form: GeluForm::Tanh, out } => self.gelu_tanh(input, out, thread),
            Op::ExpertsUp { input, scores, gate, up, experts, out } => {
                self.experts_up(&ExpertsUp { input, scores, gate, up, experts, out }, thread);
            }
            Op::ExpertsDown { input, scores, down, experts, out } => {
                self.experts_down(&ExpertsDown { input, scores, down, experts, out }, thread);
            }
            Op::Mul { a, b, out } => {
                self.element_wise(self.shared.kernels.mul, &ElementWise { a, b, out }, thread);
            }
            Op::Scale { input, factor, out } => self.scale(input, factor, out, thread),
            Op::SoftCap { data, cap } => self.soft_cap(data, cap, thread),
            Op::SiluMul { gate, up, out } => {
                self.element_wise(self.shared.kernels.silu_mul, &ElementWise { a: gate, b: up, out }, thread);
            }
            Op::Add { a, b, out } => {
                self.element_wise(self.shared.kernels.add, &ElementWise { a, b, out }, thread);
            }
            Op::GatherRows { input, out } => {
                for i in self.my_share(self.rows(out), thread) {
                    let row = self.input.token_row(out.rows, i);
                    // SAFETY: see the module; the buffers do not overlap.
                    unsafe { std::ptr::copy_nonoverlapping(self.at(input, row), self.at(out, i), out.cols) };
                }
            }
            Op::Pool { input, pooling, normalise, out } => {
                self.pool(&PoolOperands { input, pooling, normalise, out }, thread);
            }
            Op::AllReduce { .. } => unreachable!("refused at load: the processor is one device"),
        }
        Ok(())
    }

    /// Rows of a buffer in this step.
    pub(crate) fn rows(&self, buf: Buf) -> usize {
        match buf.rows {
            RowSpace::Tokens => self.input.rows(),
            RowSpace::Logits => self.input.logits_rows.len(),
            RowSpace::Sequences => self.input.sequences(),
        }
    }

    /// The position of a buffer's row in its sequence.
    fn position(&self, buf: Buf, row: usize) -> usize {
        self.input.positions[self.input.token_row(buf.rows, row)] as usize
    }

    fn shape(&self) -> AttentionShape {
        let hyper = &self.shared.hyper;
        AttentionShape { heads: hyper.heads, kv_heads: hyper.kv_heads, head_dim: hyper.head_dim }
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
}

/// The operands of an op on each element of two buffers.
struct ElementWise {
    a: Buf,
    b: Buf,
    out: Buf,
}
