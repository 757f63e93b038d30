//! Each op by its definition, row by row.

use std::sync::Arc;

use super::{
    Memory,
    encoder::{EncoderAttention, LayerNorm},
    experts::FirstMatrices,
};
use crate::{
    Activation, Adapter, AttentionShape, Buf, Norm, Op, RopeLayout, RopeSpec, RowSpace, Scores, Segment,
    StepInput, WeightId, Weights, rope::RopeTable,
};

/// What a projection does to its products.
struct Epilogue {
    activation: Activation,
    residual: Option<Buf>,
}

/// How an attention over the cache computes its scores.
#[derive(Clone, Copy)]
struct CachedHeads {
    shape: AttentionShape,
    scores: Scores,
}

/// A step that runs.
pub(super) struct Step<'a> {
    pub(super) input: &'a StepInput,
    /// The token of each row.
    pub(super) ids: &'a [u32],
    pub(super) weights: &'a Weights,
    pub(super) ropes: &'a [(RopeSpec, RopeTable)],
    pub(super) memory: &'a mut Memory,
    /// The adapter of each sequence; empty where all chose none.
    pub(super) adapters: &'a [Option<Arc<Adapter>>],
}

impl Step<'_> {
    /// Runs one op.
    pub(super) fn run(&mut self, op: &Op) {
        match *op {
            Op::Embed { table, out } => self.embed(table, self.ids, out),
            Op::EmbedPositions { table, out } => self.embed(table, &self.input.positions, out),
            Op::AddRow { input, weight, out } => self.add_row(input, weight, out),
            Op::RmsNorm { input, weight, eps, out } => {
                let rows = self.rms_norm(input, weight, eps);
                self.store_rows(out, &rows);
            }
            Op::LayerNorm { input, weight, bias, eps, out } => {
                let rows = self.layer_norm(input, &LayerNorm { weight, bias, eps });
                self.store_rows(out, &rows);
            }
            Op::MatMul { input, norm, normed, ref segments, activation, residual, out } => {
                let rows = norm.map_or_else(|| self.all_rows(input), |norm| self.normed(input, norm));
                if let Some(normed) = normed {
                    self.store_rows(normed, &rows);
                }
                self.matmul(&rows, segments, &Epilogue { activation, residual }, out);
                self.adapt(&rows, segments, out);
            }
            Op::Rope { data, spec } => self.rope(data, &spec),
            Op::KvWrite { layer, keys, values } => self.kv_write(layer, keys, values),
            Op::RopeKvWrite { layer, query, keys, values, spec } => {
                // The op does not change its keys, so they are restored after the rotation.
                let before = self.all_rows(keys);
                self.rope(query, &spec);
                self.rope(keys, &spec);
                self.kv_write(layer, keys, values);
                self.store_rows(keys, &before);
            }
            Op::Attention { layer, query, shape, scores, out } => {
                self.attention(layer, query, &CachedHeads { shape, scores }, out);
            }
            Op::EncoderAttention { query, keys, values, shape, scores, out } => {
                let operands = EncoderAttention { query, keys, values, shape, scores };
                self.encoder_attention(&operands, out);
            }
            Op::Gelu { input, form, out } => self.gelu(input, form, out),
            Op::SiluMul { gate, up, out } => self.zip(gate, up, out, silu_mul),
            Op::ExpertsUp { input, scores, gate, up, experts, out } => {
                self.experts_up([input, scores], &FirstMatrices { gate, up }, experts, out);
            }
            Op::ExpertsDown { input, scores, down, experts, out } => {
                self.experts_down([input, scores], down, experts, out);
            }
            Op::Mul { a, b, out } => self.zip(a, b, out, |a, b| a * b),
            Op::Scale { input, factor, out } => self.zip(input, input, out, |v, _| v * factor),
            Op::SoftCap { data, cap } => self.zip(data, data, data, |v, _| soft_capped(v, cap)),
            Op::Add { a, b, out } => self.zip(a, b, out, |a, b| a + b),
            Op::GatherRows { input, out } => {
                for i in 0..self.rows(out) {
                    let values = self.row(input, self.input.token_row(out.rows, i)).to_vec();
                    self.store(out, i, &values);
                }
            }
            Op::Logits { input, weight, out } => {
                let rows = self.all_rows(input);
                let epilogue = Epilogue { activation: Activation::None, residual: None };
                self.matmul(&rows, &[Segment { weight, bias: None }], &epilogue, out);
            }
            Op::Pool { input, pooling, normalise, out } => self.pool(input, pooling, normalise, out),
            Op::AllReduce { .. } => unreachable!("one device refuses the plan; a group adds between steps"),
        }
    }

    /// All values of a buffer, row after row.
    pub(super) fn read(&self, buf: Buf) -> Vec<f32> {
        self.all_rows(buf).concat()
    }

    pub(super) fn all_rows(&self, buf: Buf) -> Vec<Vec<f32>> {
        (0..self.rows(buf)).map(|r| self.row(buf, r).to_vec()).collect()
    }

    pub(super) fn vector(&self, weight: WeightId) -> Vec<f32> {
        let mut values = vec![0.0; self.weights.get(weight).cols()];
        self.weights.get(weight).dequantise_row(0, &mut values);
        values
    }

    pub(super) fn rows(&self, buf: Buf) -> usize {
        match buf.rows {
            RowSpace::Tokens => self.input.rows(),
            RowSpace::Logits => self.input.logits_rows.len(),
            RowSpace::Sequences => self.input.sequences(),
        }
    }

    pub(super) fn row(&self, buf: Buf, row: usize) -> &[f32] {
        let start = buf.offset / size_of::<f32>() + row * buf.stride;
        &self.memory.arena[start..start + buf.cols]
    }

    pub(super) fn store(&mut self, buf: Buf, row: usize, values: &[f32]) {
        let start = buf.offset / size_of::<f32>() + row * buf.stride;
        self.memory.arena[start..start + buf.cols].copy_from_slice(values);
    }

    fn store_rows(&mut self, buf: Buf, rows: &[Vec<f32>]) {
        for (r, row) in rows.iter().enumerate() {
            self.store(buf, r, row);
        }
    }

    fn zip(&mut self, a: Buf, b: Buf, out: Buf, f: impl Fn(f32, f32) -> f32) {
        for r in 0..self.rows(out) {
            let values: Vec<f32> =
                self.row(a, r).iter().zip(self.row(b, r)).map(|(&a, &b)| f(a, b)).collect();
            self.store(out, r, &values);
        }
    }

    fn embed(&mut self, table: WeightId, picked: &[u32], out: Buf) {
        let mut values = vec![0.0; out.cols];
        for (r, &row) in picked.iter().enumerate() {
            self.weights.get(table).dequantise_row(row as usize, &mut values);
            self.store(out, r, &values);
        }
    }

    /// The rows that a projection with a norm multiplies.
    fn normed(&self, input: Buf, norm: Norm) -> Vec<Vec<f32>> {
        let Norm { weight, bias, eps } = norm;
        match bias {
            Some(bias) => self.layer_norm(input, &LayerNorm { weight, bias, eps }),
            None => self.rms_norm(input, weight, eps),
        }
    }

    fn rms_norm(&self, input: Buf, weight: WeightId, eps: f32) -> Vec<Vec<f32>> {
        let weights = self.vector(weight);
        let norm = |group: &[f32]| -> Vec<f32> {
            let mean = group.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / group.len() as f64;
            let factor = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
            group.iter().zip(&weights).map(|(v, w)| v * factor * w).collect()
        };
        let groups = |r| self.row(input, r).chunks_exact(weights.len()).flat_map(norm).collect();
        (0..self.rows(input)).map(groups).collect()
    }

    fn matmul(&mut self, inputs: &[Vec<f32>], segments: &[Segment], epilogue: &Epilogue, out: Buf) {
        let mut outputs = vec![Vec::with_capacity(out.cols); inputs.len()];
        for segment in segments {
            let weight = self.weights.get(segment.weight);
            let bias = segment.bias.map(|bias| self.vector(bias));
            let mut stored = vec![0.0; weight.cols()];
            for feature in 0..weight.rows() {
                weight.dequantise_row(feature, &mut stored);
                for (output, input) in outputs.iter_mut().zip(inputs) {
                    let product = dot(&stored, input);
                    output.push(bias.as_ref().map_or(product, |bias| product + bias[feature]));
                }
            }
        }
        for (r, output) in outputs.into_iter().enumerate() {
            let mut output: Vec<f32> = match epilogue.activation {
                Activation::None => output,
                Activation::Gelu => output.into_iter().map(super::encoder::gelu).collect(),
                Activation::SiluMul => {
                    let (gate, up) = output.split_at(output.len() / 2);
                    gate.iter().zip(up).map(|(gate, up)| silu_mul(*gate, *up)).collect()
                }
            };
            if let Some(residual) = epilogue.residual {
                output.iter_mut().zip(self.row(residual, r)).for_each(|(o, v)| *o += v);
            }
            self.store(out, r, &output);
        }
    }

    fn rope(&mut self, data: Buf, spec: &RopeSpec) {
        // `compile` makes a table for every spec of the plan.
        let Some((_, table)) = self.ropes.iter().find(|(own, _)| own == spec) else { return };
        for r in 0..self.rows(data) {
            let position = self.input.positions[self.input.token_row(data.rows, r)];
            let (cos, sin) = table.at(position as usize);
            let mut values = self.row(data, r).to_vec();
            for head in values.chunks_exact_mut(spec.head_dim) {
                for i in 0..spec.dims / 2 {
                    let (a, b) = match spec.layout {
                        RopeLayout::Interleaved => (2 * i, 2 * i + 1),
                        RopeLayout::Neox => (i, i + spec.dims / 2),
                    };
                    let (x, y) = (head[a], head[b]);
                    head[a] = x * cos[i] - y * sin[i];
                    head[b] = x * sin[i] + y * cos[i];
                }
            }
            self.store(data, r, &values);
        }
    }

    fn kv_write(&mut self, layer: usize, keys: Buf, values: Buf) {
        for s in 0..self.input.sequences() {
            for r in self.input.rows_of(s) {
                for (side, buf) in [keys, values].into_iter().enumerate() {
                    let row = self.row(buf, r).to_vec();
                    let position = self.input.positions[r] as usize;
                    let start = self.memory.cache.index(layer, side, self.input.blocks_of(s), position);
                    self.memory.cache.write(start, &row);
                }
            }
        }
    }

    fn attention(&mut self, layer: usize, query: Buf, heads: &CachedHeads, out: Buf) {
        let CachedHeads { shape: AttentionShape { heads, kv_heads, head_dim }, scores: how } = *heads;
        for i in 0..self.rows(query) {
            let row = self.input.token_row(query.rows, i);
            let table = self.input.blocks_of(self.input.sequence_of(row));
            let (cache, position) = (&self.memory.cache, self.input.positions[row] as usize);
            let seen = how.first(position)..position + 1;
            let cached =
                |side| -> Vec<_> { seen.clone().map(|p| cache.read(layer, side, table, p)).collect() };
            let (cached_keys, cached_values) = (cached(0), cached(1));
            let mut values = vec![0.0; query.cols];
            for h in 0..heads {
                let kv = h / (heads / kv_heads) * head_dim..(h / (heads / kv_heads) + 1) * head_dim;
                let q = &self.row(query, i)[h * head_dim..(h + 1) * head_dim];
                let score = |key: &[f32]| {
                    let scaled = dot(q, key) * how.scale;
                    f64::from(how.soft_cap.map_or(scaled, |cap| soft_capped(scaled, cap)))
                };
                let scores: Vec<f64> = cached_keys.iter().map(|k| score(&k[kv.clone()])).collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let shares: Vec<f64> = scores.iter().map(|v| (v - largest).exp()).collect();
                let total: f64 = shares.iter().sum();
                let mut mixed = vec![0.0f64; head_dim];
                for (share, v) in shares.iter().zip(&cached_values) {
                    mixed.iter_mut().zip(&v[kv.clone()]).for_each(|(m, &v)| *m += share * f64::from(v));
                }
                let head = &mut values[h * head_dim..(h + 1) * head_dim];
                head.iter_mut().zip(mixed).for_each(|(o, m)| *o = (m / total) as f32);
            }
            drop((cached_keys, cached_values));
            self.store(out, i, &values);
        }
    }
}

fn soft_capped(v: f32, cap: f32) -> f32 {
    (f64::from(cap) * (f64::from(v) / f64::from(cap)).tanh()) as f32
}

pub(super) fn silu_mul(gate: f32, up: f32) -> f32 {
    (f64::from(gate) / (1.0 + f64::from(-gate).exp()) * f64::from(up)) as f32
}

/// Sum of products in f64, in eight interleaved partial sums that are added pairwise at the end, so that the
/// compiler may use vector registers without changing the order.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f64; 8];
    for (a, b) in a.chunks(8).zip(b.chunks(8)) {
        for (sum, (&a, &b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += f64::from(a) * f64::from(b);
        }
    }
    let [a, b, c, d, e, f, g, h] = sums;
    (((a + b) + (c + d)) + ((e + f) + (g + h))) as f32
}
