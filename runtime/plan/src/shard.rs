//! Divides a model among the devices of a group, each of which computes a share of every projection.
//!
//! The division is that of Megatron-LM. Queries, keys, values, and the first projections of a feed-forward
//! part are divided by rows: each device has whole heads, and a share of the hidden features. The projections
//! that follow are divided by columns: each device multiplies its share, and [`Op::AllReduce`] adds the
//! products. So a layer has two sums over devices. Norms, embeddings and the vocabulary head are whole on
//! every device, as are the rows between the layers.
//!
//! All devices run the same plan. What differs is the weights: a divided weight is a [`WeightView`] of the
//! stored tensor, under the same name and the same id.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use crate::{
    Access, Activation, Buf, FusedOps, Hyper, Op, Plan, PlanError, Segment, Value, WeightError, WeightId,
    WeightView, Weights,
    builder::{self, Draft},
};

/// What one device of a group loads.
#[derive(Debug, Clone)]
pub struct Shard {
    /// The same for all devices of the group.
    pub plan: Plan,
    /// The device's share of the weights.
    pub weights: Arc<Weights>,
}

/// Why a model could not be divided.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ShardError {
    /// Fewer than two devices.
    #[error("a model is divided among two devices or more, not {0}")]
    Devices(usize),
    /// A size that is no multiple of the number of devices.
    #[error(
        "{devices} devices cannot share the {value} {what} equally; choose a number of devices that divides them"
    )]
    Indivisible {
        /// The size, with the name of its weight if it is one of a weight.
        what: String,
        /// Its value.
        value: usize,
        /// Devices asked for.
        devices: usize,
    },
    /// A plan with room for adapters.
    #[error(
        "a plan with room for adapters cannot be divided; divide one without, and serve no adapters with it"
    )]
    Adapters,
    /// An op of a form that only a pass or a division makes.
    #[error("op {index} ({op}) is fused or divided already; divide a plan that was made with FusedOps::NONE")]
    NotPlain {
        /// Number of the op.
        index: usize,
        /// Its name.
        op: &'static str,
    },
    /// An op that needs whole rows, or a share of them, and has the other.
    #[error("op {index} ({op}) cannot be divided: {detail}")]
    Op {
        /// Number of the op.
        index: usize,
        /// Its name.
        op: &'static str,
        /// What it needs.
        detail: String,
    },
    /// A weight of which two ops need different parts.
    #[error("weight {0} is divided in one way by an op and in another, or not at all, by the next")]
    TwoCuts(String),
    /// A weight that cannot be cut there.
    #[error(transparent)]
    Weight(#[from] WeightError),
    /// The divided plan cannot be made.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// Divides a plan without fused forms among `devices`; then fuses the forms that each of them claims.
///
/// # Errors
/// [`ShardError`] naming the size, op or weight that cannot be divided.
pub fn shard(
    plan: &Plan,
    weights: &Weights,
    devices: usize,
    fused: &FusedOps,
) -> Result<Vec<Shard>, ShardError> {
    if devices < 2 {
        return Err(ShardError::Devices(devices));
    }
    if !plan.adapters().is_none() {
        return Err(ShardError::Adapters);
    }
    let whole = plan.hyper();
    let hyper = Hyper {
        heads: share("heads", whole.heads, devices)?,
        kv_heads: share("key/value heads", whole.kv_heads, devices)?,
        ..*whole
    };
    let draft = draft_of(plan)?;
    let mut division = Division::new(&draft, weights, devices);
    for (index, op) in draft.ops.iter().enumerate() {
        division.divide(index, op)?;
    }
    let Division { divided, cuts, .. } = division;
    let views = (0..devices).map(|device| views(weights, &cuts, DeviceShare { device, devices }));
    let views: Vec<Weights> = views.collect::<Result<_, WeightError>>()?;
    let placed = builder::place(divided, fused, &views[0], hyper, *plan.limits())?;
    let kv_layout = plan.kv_layout.clone();
    let plan = Plan { second_segment: plan.second_segment, kv_layout, ..placed };
    Ok(views.into_iter().map(|weights| Shard { plan: plan.clone(), weights: Arc::new(weights) }).collect())
}

/// A device in its group.
#[derive(Debug, Clone, Copy)]
struct DeviceShare {
    device: usize,
    devices: usize,
}

/// How a weight is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// Every device has all of it.
    Whole,
    Rows,
    Columns,
}

/// The weights of one device, in the order of the whole ones, so that ids stay.
fn views(
    weights: &Weights,
    cuts: &BTreeMap<WeightId, Cut>,
    place: DeviceShare,
) -> Result<Weights, WeightError> {
    let part = |len: usize| {
        let len = len / place.devices;
        place.device * len..(place.device + 1) * len
    };
    let mut own = Weights::new();
    for (id, weight) in weights.iter() {
        let view = match cuts.get(&id) {
            None | Some(Cut::Whole) => None,
            Some(Cut::Rows) => Some(WeightView::Rows(part(weight.rows()))),
            Some(Cut::Columns) => Some(WeightView::Cols(part(weight.cols()))),
        };
        own.push(match view {
            Some(view) => weight.view(weight.name(), &view)?,
            None => weight.clone(),
        })?;
    }
    Ok(own)
}

fn share(what: impl Into<String>, value: usize, devices: usize) -> Result<usize, ShardError> {
    if value.is_multiple_of(devices) {
        return Ok(value / devices);
    }
    Err(ShardError::Indivisible { what: what.into(), value, devices })
}

/// The ops of a plan before its buffers were placed. Several values can have one place, each until an op
/// writes the next.
fn draft_of(plan: &Plan) -> Result<Draft, ShardError> {
    let mut draft = Draft::default();
    let mut values: HashMap<Buf, Value> = HashMap::new();
    for (index, op) in plan.ops().iter().enumerate() {
        let mut is_plain = true;
        let op = op.map(|access, buf| {
            let known = if access == Access::Write { None } else { values.get(&buf).copied() };
            // What a plain op reads, an op before it wrote to the same columns.
            is_plain &= buf.stride == buf.cols && (access == Access::Write || known.is_some());
            known.unwrap_or_else(|| {
                let value = draft.new_value(buf.cols, buf.rows);
                values.insert(buf, value);
                value
            })
        });
        is_plain &= match &op {
            Op::MatMul { norm, segments, activation, residual, .. } => {
                let is_single = segments.len() == 1 && segments[0].bias.is_none();
                is_single && norm.is_none() && residual.is_none() && *activation == Activation::None
            }
            Op::RopeKvWrite { .. } | Op::AllReduce { .. } => false,
            _ => true,
        };
        if !is_plain {
            return Err(ShardError::NotPlain { index, op: op.name() });
        }
        draft.ops.push(op);
    }
    Ok(draft)
}

/// A division under way.
struct Division<'a> {
    whole: &'a Draft,
    weights: &'a Weights,
    devices: usize,
    /// The ops of a device so far. Values keep their numbers; those in `shares` have fewer columns.
    divided: Draft,
    /// Values of which each device has other columns.
    shares: BTreeSet<Value>,
    cuts: BTreeMap<WeightId, Cut>,
}

impl<'a> Division<'a> {
    fn new(whole: &'a Draft, weights: &'a Weights, devices: usize) -> Self {
        let divided = Draft { ops: Vec::new(), values: whole.values.clone() };
        Self { whole, weights, devices, divided, shares: BTreeSet::new(), cuts: BTreeMap::new() }
    }

    /// Appends a device's share of an op.
    fn divide(&mut self, index: usize, op: &Op<Value>) -> Result<(), ShardError> {
        let mut own = op.clone();
        match &mut own {
            Op::Embed { table, .. } | Op::EmbedPositions { table, .. } => self.cut(*table, Cut::Whole)?,
            Op::RmsNorm { input, weight, out, .. } if self.is_grouped(*input, *weight) => {
                self.cut(*weight, Cut::Whole)?;
                self.follow(*input, *out)?;
            }
            Op::RmsNorm { input, weight, .. } | Op::Logits { input, weight, .. } => {
                self.need_whole(index, op, *input)?;
                self.cut(*weight, Cut::Whole)?;
            }
            Op::LayerNorm { input, weight, bias, .. } => {
                self.need_whole(index, op, *input)?;
                self.cut(*weight, Cut::Whole)?;
                self.cut(*bias, Cut::Whole)?;
            }
            Op::Pool { input: data, .. } | Op::SoftCap { data, .. } => self.need_whole(index, op, *data)?,
            Op::AddRow { input, weight, out } => {
                let is_share = self.shares.contains(input);
                self.cut(*weight, if is_share { Cut::Columns } else { Cut::Whole })?;
                self.follow(*input, *out)?;
            }
            Op::ExpertsUp { .. } | Op::ExpertsDown { .. } => self.keep_whole(index, op)?,
            Op::MatMul { input, segments, out, .. } => return self.project(*input, segments, *out, op),
            Op::Rope { data, spec } => {
                self.need_share(index, op, *data)?;
                if let Some(frequencies) = spec.scaling.frequencies {
                    self.cut(frequencies, Cut::Whole)?;
                }
            }
            Op::KvWrite { keys, values, .. } => {
                self.need_share(index, op, *keys)?;
                self.need_share(index, op, *values)?;
            }
            Op::Attention { query, shape, out, .. } | Op::EncoderAttention { query, shape, out, .. } => {
                for value in op.inputs() {
                    self.need_share(index, op, value)?;
                }
                shape.heads = share("heads", shape.heads, self.devices)?;
                shape.kv_heads = share("key/value heads", shape.kv_heads, self.devices)?;
                // A table of distances has the values of one head after those of another.
                for (table, _) in op.weights() {
                    self.cut(table, Cut::Columns)?;
                }
                self.follow(*query, *out)?;
            }
            Op::Gelu { input, out, .. } | Op::Scale { input, out, .. } | Op::GatherRows { input, out } => {
                self.follow(*input, *out)?;
            }
            Op::SiluMul { gate: a, up: b, out } | Op::Mul { a, b, out } | Op::Add { a, b, out } => {
                if self.shares.contains(a) != self.shares.contains(b) {
                    let detail = "one operand is whole on every device, the other is a share";
                    return Err(ShardError::Op { index, op: op.name(), detail: detail.into() });
                }
                self.follow(*a, *out)?;
            }
            Op::RopeKvWrite { .. } | Op::AllReduce { .. } => {
                return Err(ShardError::NotPlain { index, op: op.name() });
            }
        }
        self.divided.ops.push(own);
        Ok(())
    }

    /// An op that every device computes whole.
    fn keep_whole(&mut self, index: usize, op: &Op<Value>) -> Result<(), ShardError> {
        for value in op.inputs() {
            self.need_whole(index, op, value)?;
        }
        op.weights().into_iter().try_for_each(|(weight, _)| self.cut(weight, Cut::Whole))
    }

    /// A projection of a share is divided by columns and summed over devices. One of whole rows is divided by
    /// rows where its readers work on shares.
    fn project(
        &mut self,
        input: Value,
        segments: &[Segment],
        out: Value,
        op: &Op<Value>,
    ) -> Result<(), ShardError> {
        let is_share = self.shares.contains(&input);
        let cut = match (is_share, self.is_read_as_share(out)) {
            (true, _) => Cut::Columns,
            (false, true) => Cut::Rows,
            (false, false) => Cut::Whole,
        };
        for segment in segments {
            self.cut(segment.weight, cut)?;
        }
        self.divided.ops.push(op.clone());
        match cut {
            Cut::Columns => self.divided.ops.push(Op::AllReduce { data: out }),
            Cut::Rows => self.make_share(out)?,
            Cut::Whole => {}
        }
        Ok(())
    }

    /// Whether the ops that read a value can work on a share of its columns, and end in a projection.
    fn is_read_as_share(&self, value: Value) -> bool {
        let mut readers = self.whole.ops.iter().filter(|op| op.inputs().contains(&value));
        readers.any(|op| match op {
            Op::Rope { .. }
            | Op::KvWrite { .. }
            | Op::Attention { .. }
            | Op::EncoderAttention { .. }
            | Op::SiluMul { .. }
            | Op::Mul { .. }
            | Op::Gelu { .. } => true,
            Op::RmsNorm { input, weight, out, .. } if self.is_grouped(*input, *weight) => {
                self.is_read_as_share(*out)
            }
            Op::AddRow { out, .. } => self.is_read_as_share(*out),
            Op::Embed { .. }
            | Op::EmbedPositions { .. }
            | Op::RmsNorm { .. }
            | Op::LayerNorm { .. }
            | Op::ExpertsUp { .. }
            | Op::ExpertsDown { .. }
            | Op::Scale { .. }
            | Op::SoftCap { .. }
            | Op::MatMul { .. }
            | Op::RopeKvWrite { .. }
            | Op::Add { .. }
            | Op::GatherRows { .. }
            | Op::Logits { .. }
            | Op::Pool { .. }
            | Op::AllReduce { .. } => false,
        })
    }

    /// Whether a norm is one of groups of columns, which are heads: each device norms its own.
    fn is_grouped(&self, input: Value, weight: WeightId) -> bool {
        self.weights.get(weight).cols() != self.whole.info(input).cols
    }

    /// `out` is a share where `input` is one.
    fn follow(&mut self, input: Value, out: Value) -> Result<(), ShardError> {
        if self.shares.contains(&input) { self.make_share(out) } else { Ok(()) }
    }

    fn make_share(&mut self, value: Value) -> Result<(), ShardError> {
        let cols = &mut self.divided.values[value.index()].cols;
        *cols = share("features", *cols, self.devices)?;
        self.shares.insert(value);
        Ok(())
    }

    fn need_whole(&self, index: usize, op: &Op<Value>, value: Value) -> Result<(), ShardError> {
        if !self.shares.contains(&value) {
            return Ok(());
        }
        let detail = "it needs whole rows, and each device has other columns of them".into();
        Err(ShardError::Op { index, op: op.name(), detail })
    }

    fn need_share(&self, index: usize, op: &Op<Value>, value: Value) -> Result<(), ShardError> {
        if self.shares.contains(&value) {
            return Ok(());
        }
        let detail = "it works on the heads of one device, and its rows are whole on every device".into();
        Err(ShardError::Op { index, op: op.name(), detail })
    }

    /// Notes how a weight is divided.
    fn cut(&mut self, id: WeightId, cut: Cut) -> Result<(), ShardError> {
        let weight = self.weights.get(id);
        let divided = match cut {
            Cut::Whole => None,
            Cut::Rows => Some(("rows", weight.rows())),
            Cut::Columns => Some(("columns", weight.cols())),
        };
        if let Some((axis, len)) = divided {
            share(format!("{axis} of {}", weight.name()), len, self.devices)?;
        }
        if *self.cuts.entry(id).or_insert(cut) == cut {
            return Ok(());
        }
        Err(ShardError::TwoCuts(weight.name().to_owned()))
    }
}
