//! Building a plan: one call per op, each checked at once.
//!
//! [`PlanBuilder::finish`] reports the first mistake with the number of its op, so that model code reads like
//! the formulas it implements. Each value is defined once (only [`PlanBuilder::rope`] changes one in place),
//! so that passes can reorder ops and the arena can reuse memory.

use std::sync::Arc;

use crate::{
    Activation, AdapterRoom, AttentionShape, EncoderScores, Experts, FusedOps, GeluForm, Hyper, KvLayout,
    Limits, Op, Plan, PlanError, Pooling, RopeSpec, RowSpace, Scores, Segment, WeightId, Weights, arena,
    passes,
};

/// A matrix that some op makes; belongs to its builder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value(pub(crate) u32);

impl Value {
    /// Position in its draft's list of values.
    pub(crate) const fn index(self) -> usize {
        self.0 as usize
    }
}

/// The properties of a [`Value`] before the arena is planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ValueInfo {
    pub(crate) cols: usize,
    pub(crate) rows: RowSpace,
    /// Set where the value is a range of columns of another value.
    pub(crate) columns_of: Option<ColumnsOf>,
}

/// Where a value lies in a wider one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ColumnsOf {
    /// The wider value.
    pub(crate) whole: Value,
    /// Its column that is the value's first.
    pub(crate) first_col: usize,
}

/// The ops and values of a model before the arena is planned; passes rewrite it.
#[derive(Debug, Default)]
pub(crate) struct Draft {
    pub(crate) ops: Vec<Op<Value>>,
    pub(crate) values: Vec<ValueInfo>,
}

impl Draft {
    pub(crate) fn info(&self, value: Value) -> ValueInfo {
        self.values[value.index()]
    }

    pub(crate) fn new_value(&mut self, cols: usize, rows: RowSpace) -> Value {
        self.values.push(ValueInfo { cols, rows, columns_of: None });
        // Four billion values would exhaust memory first.
        Value(u32::try_from(self.values.len() - 1).unwrap_or(u32::MAX))
    }
}

/// Fuses the forms that the device claims, plans the arena, and makes the plan.
pub(crate) fn place(
    mut draft: Draft,
    fused: &FusedOps,
    weights: &Weights,
    hyper: Hyper,
    limits: Limits,
) -> Result<Plan, PlanError> {
    passes::run(&mut draft, fused, weights);
    let layout = arena::lay_out(&draft, &limits)?;
    let weight_names: Arc<[String]> = weights.iter().map(|(_, w)| w.name().to_owned()).collect();
    let ops = draft.ops.iter().map(|op| op.map(|_, value| layout.buf(value))).collect();
    Ok(Plan {
        ops,
        hyper,
        limits,
        adapters: AdapterRoom::NONE,
        kv_room: 0,
        kv_layout: KvLayout::one_class(hyper.layers),
        arena_bytes: layout.bytes,
        weight_names,
        second_segment: None,
    })
}

/// The matrices of all experts of a part, each the rows of one expert after those of the last.
#[derive(Debug, Clone, Copy)]
pub struct ExpertWeights {
    /// (experts · hidden) × width.
    pub gate: WeightId,
    /// Like `gate`.
    pub up: WeightId,
    /// (experts · width) × hidden.
    pub down: WeightId,
}

/// Collects a model's ops. The crate's tests have a complete small model.
pub struct PlanBuilder<'a> {
    weights: &'a Weights,
    hyper: Hyper,
    limits: Limits,
    draft: Draft,
    second_segment: Option<usize>,
    first_error: Option<PlanError>,
}

impl<'a> PlanBuilder<'a> {
    /// Begins a plan for a model of these sizes and for steps up to these limits.
    #[must_use]
    pub fn new(weights: &'a Weights, hyper: Hyper, limits: Limits) -> Self {
        let first_error = hyper.check().and_then(|()| limits.check()).err();
        Self { weights, hyper, limits, draft: Draft::default(), second_segment: None, first_error }
    }

    /// Tokens that a sequence may have.
    #[must_use]
    pub const fn context_tokens(&self) -> usize {
        self.hyper.context
    }

    /// Rows of the embedding table for the step's tokens.
    pub fn embed(&mut self, table: WeightId) -> Value {
        let weight = self.weights.get(table);
        let (rows, cols) = (weight.rows(), weight.cols());
        self.check(rows >= self.hyper.vocab, "embed", || {
            format!("a table of {rows} rows for a larger vocabulary")
        });
        let out = self.draft.new_value(cols, RowSpace::Tokens);
        self.push(Op::Embed { table, out }, out)
    }

    /// Rows of a table of learned positions, one for each token's position.
    pub fn embed_positions(&mut self, table: WeightId) -> Value {
        let weight = self.weights.get(table);
        let (rows, cols) = (weight.rows(), weight.cols());
        let context = self.hyper.context;
        self.check(rows >= context, "embed_positions", || {
            format!("a table of {rows} rows for a context of {context}")
        });
        let out = self.draft.new_value(cols, RowSpace::Tokens);
        self.push(Op::EmbedPositions { table, out }, out)
    }

    /// [`Self::embed_positions`] of a table that also knows the segment: its first `second` rows are those of
    /// the positions in a first segment, the rows from there on those of the positions in a second one. So a
    /// model that reads pairs of texts needs no further op. Steps say where a second segment begins with
    /// [`crate::StepInput::begin_second_segment`].
    pub fn embed_positions_of_segments(&mut self, table: WeightId, second: usize) -> Value {
        let (rows, context) = (self.weights.get(table).rows(), self.hyper.context);
        self.check(second >= context && rows >= second + context, "embed_positions", || {
            format!("a table of {rows} rows, {second} of the first segment, for a context of {context}")
        });
        self.second_segment = Some(second);
        self.embed_positions(table)
    }

    /// Adds a vector to each row, such as a bias or BERT's embedding of the only token type in use.
    pub fn add_row(&mut self, input: Value, weight: WeightId) -> Value {
        let info = self.check_vector("add_row", input, weight);
        let out = self.draft.new_value(info.cols, info.rows);
        self.push(Op::AddRow { input, weight, out }, out)
    }

    /// Root-mean-square norm of each row, times `weight`; of each group of columns where the weight is
    /// narrower than the row and its columns divide the row's.
    pub fn rms_norm(&mut self, input: Value, weight: WeightId, eps: f32) -> Value {
        let (info, w) = (self.draft.info(input), self.weights.get(weight));
        let (rows, cols, name) = (w.rows(), w.cols(), w.name().to_owned());
        self.check(rows == 1 && cols > 0 && info.cols.is_multiple_of(cols), "rms_norm", || {
            format!("{name} is {rows} x {cols}, the input has {} columns", info.cols)
        });
        let out = self.draft.new_value(info.cols, info.rows);
        self.push(Op::RmsNorm { input, weight, eps, out }, out)
    }

    /// Layer norm of each row, times `weight`, plus `bias`.
    pub fn layer_norm(&mut self, input: Value, weight: WeightId, bias: WeightId, eps: f32) -> Value {
        let info = self.check_vector("layer_norm", input, weight);
        self.check_vector("layer_norm", input, bias);
        let out = self.draft.new_value(info.cols, info.rows);
        self.push(Op::LayerNorm { input, weight, bias, eps, out }, out)
    }

    /// `weight · row` for each row.
    pub fn matmul(&mut self, input: Value, weight: WeightId) -> Value {
        let info = self.draft.info(input);
        self.check_projection("matmul", input, weight);
        let out = self.draft.new_value(self.weights.get(weight).rows(), info.rows);
        let (segments, activation) = (vec![Segment { weight, bias: None }], Activation::None);
        let op = Op::MatMul { input, norm: None, normed: None, segments, activation, residual: None, out };
        self.push(op, out)
    }

    /// Rotates the heads of `data` in place and returns the same value.
    pub fn rope(&mut self, data: Value, spec: RopeSpec) -> Value {
        let info = self.draft.info(data);
        let fits = spec.head_dim > 0 && info.cols.is_multiple_of(spec.head_dim);
        self.check(info.rows != RowSpace::Sequences, "rope", || "a row of a sequence has no position".into());
        self.check(fits, "rope", || format!("{} columns are no whole heads of {}", info.cols, spec.head_dim));
        let dims_ok = spec.dims > 0 && spec.dims.is_multiple_of(2) && spec.dims <= spec.head_dim;
        self.check(dims_ok, "rope", || {
            format!("{} rotary dimensions in heads of {}", spec.dims, spec.head_dim)
        });
        if let Some(id) = spec.scaling.frequencies {
            let (pairs, w) = (spec.dims / 2, self.weights.get(id));
            let (rows, cols, name) = (w.rows(), w.cols(), w.name().to_owned());
            self.check((rows, cols) == (1, pairs), "rope", || {
                format!("{name} is {rows} x {cols}, a frequency for each of {pairs} pairs was expected")
            });
        }
        self.push(Op::Rope { data, spec }, data)
    }

    /// Stores this step's keys and values in the cache of `layer`.
    pub fn kv_write(&mut self, layer: usize, keys: Value, values: Value) {
        let cols = self.hyper.kv_heads * self.hyper.head_dim;
        for value in [keys, values] {
            let info = self.draft.info(value);
            self.check(info.cols == cols && info.rows == RowSpace::Tokens, "kv_write", || {
                format!("{} columns, the cache has {cols}", info.cols)
            });
        }
        self.check_layer("kv_write", layer);
        self.push(Op::KvWrite { layer, keys, values }, keys);
    }

    /// Causal attention of `query`, of all rows or of gathered ones, over the cache of `layer`, which must
    /// have been written before in this plan.
    pub fn attention(&mut self, layer: usize, query: Value, scores: impl Into<Scores>) -> Value {
        let scores = scores.into();
        self.check(scores.window != Some(0), "attention", || "a window has one position at least".into());
        let cap_ok = scores.soft_cap.is_none_or(|cap| cap > 0.0);
        self.check(cap_ok, "attention", || "a soft cap is above 0".into());
        let Hyper { heads, kv_heads, head_dim, .. } = self.hyper;
        let info = self.draft.info(query);
        let fits = info.cols == heads * head_dim && info.rows != RowSpace::Sequences;
        self.check(fits, "attention", || {
            format!("{} columns, {heads} heads of {head_dim} were expected", info.cols)
        });
        self.check_layer("attention", layer);
        let written =
            self.draft.ops.iter().any(|op| matches!(op, Op::KvWrite { layer: l, .. } if *l == layer));
        self.check(written, "attention", || format!("layer {layer} is read before it is written"));
        let shape = AttentionShape { heads, kv_heads, head_dim };
        let out = self.draft.new_value(info.cols, info.rows);
        self.push(Op::Attention { layer, query, shape, scores, out }, out)
    }

    /// Attention of each row of `query` to the rows of its sequence in the step: all of them, those of a
    /// window, or, where it is causal, none after it. For plans without a cache; `query` may have the first
    /// row of each sequence only, unless the attention is causal.
    pub fn encoder_attention(
        &mut self,
        query: Value,
        keys: Value,
        values: Value,
        scores: impl Into<EncoderScores>,
    ) -> Value {
        let Hyper { heads, kv_heads, head_dim, .. } = self.hyper;
        for (value, heads) in [(query, heads), (keys, kv_heads), (values, kv_heads)] {
            let info = self.draft.info(value);
            let rows_fit =
                info.rows == RowSpace::Tokens || value == query && info.rows == RowSpace::Sequences;
            self.check(info.cols == heads * head_dim && rows_fit, "encoder_attention", || {
                format!("{} columns, {heads} heads of {head_dim} were expected", info.cols)
            });
        }
        let shape = AttentionShape { heads, kv_heads, head_dim };
        let rows = self.draft.info(query).rows;
        let out = self.draft.new_value(heads * head_dim, rows);
        let scores = scores.into();
        let asks = !scores.causal || rows == RowSpace::Tokens;
        self.check(asks, "encoder_attention", || "causal attention needs the queries of all rows".into());
        if let Some(table) = scores.distances {
            self.check_distances(table);
        }
        self.push(Op::EncoderAttention { query, keys, values, shape, scores, out }, out)
    }

    /// `gelu(input)`, by the error function.
    pub fn gelu(&mut self, input: Value) -> Value {
        self.gelu_by(input, GeluForm::Erf)
    }

    /// `gelu(input)`, by the hyperbolic tangent.
    pub fn gelu_tanh(&mut self, input: Value) -> Value {
        self.gelu_by(input, GeluForm::Tanh)
    }

    fn gelu_by(&mut self, input: Value, form: GeluForm) -> Value {
        let info = self.draft.info(input);
        let out = self.draft.new_value(info.cols, info.rows);
        self.push(Op::Gelu { input, form, out }, out)
    }

    /// The feed-forward part of the experts that each row uses by its `scores`.
    pub fn experts(
        &mut self,
        input: Value,
        scores: Value,
        experts: Experts,
        weights: ExpertWeights,
    ) -> Value {
        let (info, scored) = (self.draft.info(input), self.draft.info(scores));
        let Experts { count, used, hidden } = experts;
        let fits = (1..=count).contains(&used) && scored.cols == count && scored.rows == info.rows;
        self.check(fits, "experts", || format!("{} scores for {used} of {count} experts", scored.cols));
        let ExpertWeights { gate, up, down } = weights;
        for (id, rows, cols) in
            [(gate, hidden, info.cols), (up, hidden, info.cols), (down, info.cols, hidden)]
        {
            let weight = self.weights.get(id);
            let (shape, name) = ((weight.rows(), weight.cols()), weight.name().to_owned());
            self.check(Some(shape.0) == count.checked_mul(rows) && shape.1 == cols, "experts", || {
                format!("{name} is {} x {}, {count} times {rows} x {cols} was expected", shape.0, shape.1)
            });
        }
        let middle = self.draft.new_value(used.saturating_mul(hidden), info.rows);
        self.push(Op::ExpertsUp { input, scores, gate, up, experts, out: middle }, middle);
        let out = self.draft.new_value(info.cols, info.rows);
        self.push(Op::ExpertsDown { input: middle, scores, down, experts, out }, out)
    }

    /// `input * factor`.
    pub fn scale(&mut self, input: Value, factor: f32) -> Value {
        let info = self.draft.info(input);
        let out = self.draft.new_value(info.cols, info.rows);
        self.push(Op::Scale { input, factor, out }, out)
    }

    /// `a * b`, element by element.
    pub fn mul(&mut self, a: Value, b: Value) -> Value {
        let out = self.like("mul", a, b);
        self.push(Op::Mul { a, b, out }, out)
    }

    /// `silu(gate) * up`.
    pub fn silu_mul(&mut self, gate: Value, up: Value) -> Value {
        let out = self.like("silu_mul", gate, up);
        self.push(Op::SiluMul { gate, up, out }, out)
    }

    /// `a + b`.
    pub fn add(&mut self, a: Value, b: Value) -> Value {
        let out = self.like("add", a, b);
        self.push(Op::Add { a, b, out }, out)
    }

    /// Keeps only the rows whose logits are requested. In the last layer only these need queries and what
    /// follows them; the other rows need keys and values.
    pub fn gather_rows(&mut self, input: Value) -> Value {
        let info = self.draft.info(input);
        self.check(info.rows == RowSpace::Tokens, "gather_rows", || "rows were gathered before".into());
        let out = self.draft.new_value(info.cols, RowSpace::Logits);
        self.push(Op::GatherRows { input, out }, out)
    }

    /// Keeps only the first row of each sequence, the one that [`Pooling::Cls`] takes.
    pub fn gather_first_rows(&mut self, input: Value) -> Value {
        let info = self.draft.info(input);
        self.check(info.rows == RowSpace::Tokens, "gather_rows", || "rows were gathered before".into());
        let out = self.draft.new_value(info.cols, RowSpace::Sequences);
        self.push(Op::GatherRows { input, out }, out)
    }

    /// Projects gathered rows onto the vocabulary: the step's answer.
    pub fn logits(&mut self, input: Value, weight: WeightId) {
        self.capped_logits(input, weight, None);
    }

    /// [`Self::logits`] of which each value `v` becomes `cap * tanh(v / cap)`, where there is a cap.
    pub fn capped_logits(&mut self, input: Value, weight: WeightId, soft_cap: Option<f32>) {
        let (rows, vocab) = (self.weights.get(weight).rows(), self.hyper.vocab);
        self.check(rows == vocab, "logits", || format!("{rows} rows for a vocabulary of {vocab}"));
        let out = self.answer_rows(input, weight);
        if let Some(cap) = soft_cap {
            self.check(cap > 0.0, "soft_cap", || format!("{cap} is not above 0"));
            self.push(Op::SoftCap { data: out, cap }, out);
        }
    }

    /// Projects gathered rows onto the labels of a model that labels tokens: the step's answer.
    pub fn label_logits(&mut self, input: Value, weight: WeightId) {
        self.answer_rows(input, weight);
    }

    fn answer_rows(&mut self, input: Value, weight: WeightId) -> Value {
        let (info, rows) = (self.draft.info(input), self.weights.get(weight).rows());
        self.check(info.rows == RowSpace::Logits, "logits", || "gather the rows first".into());
        self.check_projection("logits", input, weight);
        let out = self.draft.new_value(rows, RowSpace::Logits);
        self.push(Op::Logits { input, weight, out }, out)
    }

    /// One row per sequence, the answer of an encoding plan. `normalise` divides each row by its length. With
    /// [`Pooling::Cls`] the first rows may have been gathered before.
    pub fn pool(&mut self, input: Value, pooling: Pooling, normalise: bool) {
        let info = self.draft.info(input);
        let fits =
            info.rows == RowSpace::Tokens || info.rows == RowSpace::Sequences && pooling == Pooling::Cls;
        self.check(fits, "pool", || "rows were gathered before".into());
        let out = self.draft.new_value(info.cols, RowSpace::Sequences);
        self.push(Op::Pool { input, pooling, normalise, out }, out);
    }

    /// One row per sequence for the ops of a head that follows; [`Self::pool`] with [`Pooling::Cls`] ends the
    /// plan then.
    pub fn pool_rows(&mut self, input: Value, pooling: Pooling) -> Value {
        let info = self.draft.info(input);
        self.check(info.rows == RowSpace::Tokens, "pool", || "rows were gathered before".into());
        let out = self.draft.new_value(info.cols, RowSpace::Sequences);
        self.push(Op::Pool { input, pooling, normalise: false, out }, out)
    }

    /// Fuses the forms that the device claims, plans the arena, and makes the plan.
    ///
    /// # Errors
    /// The first mistake of the calls before, or an arena whose size overflows.
    pub fn finish(mut self, fused: &FusedOps) -> Result<Plan, PlanError> {
        let answers = self.draft.ops.iter().filter(|op| self.is_answer(op)).count();
        let mut behind = self.draft.ops.iter().rev().skip_while(|op| matches!(op, Op::SoftCap { .. }));
        let last = behind.next().is_some_and(|op| op.answer().is_some());
        self.check(answers == 1 && last, "answer", || {
            format!("a plan ends in logits or pool, and has one of them: found {answers}")
        });
        self.check_pooled();
        if let Some(error) = self.first_error {
            return Err(error);
        }
        let plan = place(self.draft, fused, self.weights, self.hyper, self.limits)?;
        Ok(Plan { second_segment: self.second_segment, ..plan })
    }

    /// Whether an op makes an answer: pooled rows that other ops read are none.
    fn is_answer(&self, op: &Op<Value>) -> bool {
        let is_read = |value: Value| self.draft.ops.iter().any(|other| other.inputs().contains(&value));
        match op {
            Op::Pool { out, .. } => !is_read(*out),
            other => other.answer().is_some(),
        }
    }

    fn push(&mut self, op: Op<Value>, result: Value) -> Value {
        self.draft.ops.push(op);
        result
    }

    fn check(&mut self, ok: bool, op: &'static str, detail: impl FnOnce() -> String) {
        if !ok && self.first_error.is_none() {
            self.first_error = Some(PlanError::Shape { index: self.draft.ops.len(), op, detail: detail() });
        }
    }

    /// A plan that answers by sequence needs whole sequences in each step, so it can have no cache. A plan
    /// that answers by row needs room for the rows.
    fn check_pooled(&mut self) {
        let has = |f: fn(&Op<Value>) -> bool| self.draft.ops.iter().any(f);
        let cached = has(|op| matches!(op, Op::KvWrite { .. }));
        let (pooled, whole) =
            (has(|op| matches!(op, Op::Pool { .. })), has(|op| matches!(op, Op::EncoderAttention { .. })));
        self.check(!(cached && (pooled || whole)), "kv_write", || {
            "a plan with encoder_attention or pool sees whole sequences and has no cache".into()
        });
        if !pooled && self.limits.logits_rows == 0 && self.first_error.is_none() {
            let (field, detail) = ("logits_rows", "must be above zero where a plan ends in logits");
            self.first_error = Some(PlanError::Size { field, value: 0, detail });
        }
    }

    /// Checks that a table has a value for each head and distance.
    fn check_distances(&mut self, table: WeightId) {
        let (Hyper { heads, context, .. }, w) = (self.hyper, self.weights.get(table));
        let (rows, cols, name) = (w.rows(), w.cols(), w.name().to_owned());
        let own = cols.checked_div(heads).unwrap_or(0);
        let fits = rows == 1 && own * heads == cols && own % 2 == 1 && own / 2 + 1 >= context;
        self.check(fits, "encoder_attention", || {
            format!("{name} is {rows} x {cols}, {heads} times an odd number from {context} * 2 - 1 on was expected")
        });
    }

    /// Checks that `weight` is a vector as wide as `input`.
    fn check_vector(&mut self, op: &'static str, input: Value, weight: WeightId) -> ValueInfo {
        let (info, w) = (self.draft.info(input), self.weights.get(weight));
        let (rows, cols, name) = (w.rows(), w.cols(), w.name().to_owned());
        self.check((rows, cols) == (1, info.cols), op, || {
            format!("{name} is {rows} x {cols}, the input has {} columns", info.cols)
        });
        info
    }

    fn check_layer(&mut self, op: &'static str, layer: usize) {
        let layers = self.hyper.layers;
        self.check(layer < layers, op, || format!("layer {layer} of a model with {layers}"));
    }

    fn check_projection(&mut self, op: &'static str, input: Value, weight: WeightId) {
        let (cols, w) = (self.draft.info(input).cols, self.weights.get(weight));
        let (wcols, name) = (w.cols(), w.name().to_owned());
        self.check(wcols == cols, op, || format!("{name} takes {wcols} columns, the input has {cols}"));
    }

    fn like(&mut self, op: &'static str, a: Value, b: Value) -> Value {
        let (ia, ib) = (self.draft.info(a), self.draft.info(b));
        self.check((ia.cols, ia.rows) == (ib.cols, ib.rows), op, || {
            format!("{} and {} columns", ia.cols, ib.cols)
        });
        self.draft.new_value(ia.cols, ia.rows)
    }
}
