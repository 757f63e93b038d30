//! The ops of encoders: layer norm, gelu, attention within a sequence's rows, pooling.

use trustformers_plan::{AttentionShape, Buf, EncoderScores, Pooling, WeightId};

use super::{Step, ThreadContext};
use crate::{
    kernels::encoder::{EncoderAttend, LayerNorm, TILE},
    pool::{Dealer, Pieces},
};

/// The operands of a [`trustformers_plan::Op::EncoderAttention`].
pub(super) struct EncoderAttention {
    pub(super) query: Buf,
    pub(super) keys: Buf,
    pub(super) values: Buf,
    pub(super) shape: AttentionShape,
    pub(super) scores: EncoderScores,
    pub(super) out: Buf,
}

/// The operands of a [`trustformers_plan::Op::LayerNorm`].
pub(super) struct LayerNormOperands {
    pub(super) input: Buf,
    pub(super) weight: WeightId,
    pub(super) bias: WeightId,
    pub(super) eps: f32,
    pub(super) out: Buf,
}

/// The operands of a [`trustformers_plan::Op::Pool`].
pub(super) struct PoolOperands {
    pub(super) input: Buf,
    pub(super) pooling: Pooling,
    pub(super) normalise: bool,
    pub(super) out: Buf,
}

impl Step<'_> {
    pub(super) fn add_row(&self, input: Buf, weight: WeightId, out: Buf, thread: ThreadContext<'_>) {
        let weight = &self.shared.vectors[&weight];
        for row in self.my_share(self.rows(out), thread) {
            // SAFETY: see the parent module; the row is this thread's.
            unsafe {
                (self.shared.kernels.add)(
                    self.at(input, row),
                    weight.as_ptr(),
                    self.at(out, row),
                    weight.len(),
                );
            }
        }
    }

    pub(super) fn layer_norm(&self, operands: &LayerNormOperands, thread: ThreadContext<'_>) {
        let LayerNormOperands { input, weight, bias, eps, out } = *operands;
        let (weight, bias) = (&self.shared.vectors[&weight], &self.shared.vectors[&bias]);
        let norm = LayerNorm { weight, bias, eps };
        for row in self.my_share(self.rows(out), thread) {
            // SAFETY: see the parent module; the row is this thread's.
            unsafe { (self.shared.kernels.layer_norm)(self.at(input, row), &norm, self.at(out, row)) };
        }
    }

    pub(super) fn gelu(&self, input: Buf, out: Buf, thread: ThreadContext<'_>) {
        for row in self.my_share(self.rows(out), thread) {
            // SAFETY: see the parent module; the row is this thread's.
            unsafe { (self.shared.kernels.gelu)(self.at(input, row), self.at(out, row), out.cols) };
        }
    }

    /// A unit of work is a key/value head of a sequence, and its pieces are tiles of rows, whose cost grows
    /// with the length of the sequence. A thread that has some of a unit's rows lays out its keys and values
    /// for itself, so that no thread waits for another.
    pub(super) fn encoder_attention(&self, a: &EncoderAttention, thread: ThreadContext<'_>) {
        let AttentionShape { heads, kv_heads, head_dim } = a.shape;
        let group = heads / kv_heads;
        let scratch = self.shared.scratch.threads[thread.number].encoder.ptr();
        let asking = |sequence: usize| self.input.rows_within(a.query.rows, sequence);
        let cost_of = |unit: usize| {
            let sequence = unit / kv_heads;
            let len = self.input.rows_of(sequence).len();
            // The rows of a tile attend to its positions and to a window's on either side.
            let most = a.scores.window.map_or(len, |w| w.saturating_mul(2).saturating_add(TILE));
            Pieces { count: asking(sequence).len().div_ceil(TILE), cost: len.min(most) }
        };
        let units = 0..self.input.sequences() * kv_heads;
        let mut dealer = Dealer::new(units.clone().map(|unit| cost_of(unit).work()).sum(), self.threads);
        for unit in units {
            let tiles = dealer.deal(cost_of(unit), thread.number).pieces;
            if tiles.is_empty() {
                continue;
            }
            let (sequence, kv_head) = (unit / kv_heads, unit % kv_heads);
            let (rows, own) = (self.input.rows_of(sequence), asking(sequence));
            let own = own.start + tiles.start * TILE..own.end.min(own.start + tiles.end * TILE);
            // Rows after the last one that asks are seen by none where attention is causal.
            let rows = if a.scores.causal { rows.start..own.end } else { rows };
            let at = |buf: Buf, row: usize, head: usize| self.at(buf, row).wrapping_add(head * head_dim);
            let first = kv_head * group;
            let distances = a.scores.distances.map(|table| {
                let table = &self.shared.vectors[&table];
                let own = table.len() / heads;
                &table[first * own..(first + group) * own]
            });
            // SAFETY: see the parent module; the heads' outputs are this thread's, and so is the scratch
            // space.
            unsafe {
                (self.shared.kernels.encoder_attend)(&EncoderAttend {
                    len: rows.len(),
                    rows: own.len(),
                    first: tiles.start * TILE,
                    head_dim,
                    heads: group,
                    scores: a.scores,
                    distances,
                    query: (at(a.query, own.start, first), a.query.stride),
                    keys: (at(a.keys, rows.start, kv_head), a.keys.stride),
                    values: (at(a.values, rows.start, kv_head), a.values.stride),
                    out: (at(a.out, own.start, first), a.out.stride),
                    scratch,
                });
            }
        }
    }

    /// A unit of work is a sequence. Sums are in f64, so that a mean over many rows is as exact as one over
    /// few.
    pub(super) fn pool(&self, operands: &PoolOperands, thread: ThreadContext<'_>) {
        let PoolOperands { input, pooling, normalise, out } = *operands;
        let mut pooled = [0.0f64; POOL_COLS];
        for sequence in self.my_share(self.input.sequences(), thread) {
            let rows = match pooling {
                Pooling::Mean | Pooling::Max => self.input.rows_of(sequence),
                Pooling::Cls => {
                    let first = self.input.rows_within(input.rows, sequence).start;
                    first..first + 1
                }
                Pooling::Last => {
                    let end = self.input.rows_within(input.rows, sequence).end;
                    end - 1..end
                }
            };
            // SAFETY: see the parent module; the sequence's row is this thread's.
            let out = unsafe { std::slice::from_raw_parts_mut(self.at(out, sequence), out.cols) };
            let mut squares = 0.0f64;
            for (i, out) in out.chunks_mut(POOL_COLS).enumerate() {
                let sums = &mut pooled[..out.len()];
                sums.fill(if pooling == Pooling::Max { f64::NEG_INFINITY } else { 0.0 });
                for row in rows.clone() {
                    // SAFETY: as above; no thread writes the input during this op.
                    let row = unsafe {
                        std::slice::from_raw_parts(self.at(input, row).add(i * POOL_COLS), out.len())
                    };
                    let values = sums.iter_mut().zip(row);
                    match pooling {
                        Pooling::Max => values.for_each(|(most, v)| *most = most.max(f64::from(*v))),
                        Pooling::Mean | Pooling::Cls | Pooling::Last => {
                            values.for_each(|(sum, v)| *sum += f64::from(*v));
                        }
                    }
                }
                let share = if pooling == Pooling::Max { 1.0 } else { rows.len() as f64 };
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out = (*sum / share) as f32;
                    squares += f64::from(*out) * f64::from(*out);
                }
            }
            if normalise {
                let length = squares.sqrt().max(1e-12);
                out.iter_mut().for_each(|v| *v = (f64::from(*v) / length) as f32);
            }
        }
    }
}

/// Columns that are summed together; they fit in the first-level cache.
const POOL_COLS: usize = 256;
