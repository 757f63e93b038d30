//! The text form of a plan. Golden files are compared with it, so it changes only on purpose.

use std::fmt::Write as _;

use crate::{
    Activation, AttentionShape, Buf, Experts, GeluForm, Op, Plan, Pooling, RopeLayout, RopeSpec, RowSpace,
    Scores, WeightId,
};

pub(crate) fn dump(plan: &Plan) -> String {
    let (h, l) = (plan.hyper(), plan.limits());
    let mut text = format!(
        "model: width {}, layers {}, heads {}, kv_heads {}, head_dim {}, vocab {}, context {}\n\
         limits: rows {}, sequences {}, logits_rows {}\narena: {} bytes\n",
        h.width,
        h.layers,
        h.heads,
        h.kv_heads,
        h.head_dim,
        h.vocab,
        h.context,
        l.rows,
        l.sequences,
        l.logits_rows,
        plan.arena_bytes(),
    );
    if !plan.adapters().is_none() {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "adapters: {} slots of rank {}", plan.adapters().slots, plan.adapters().rank);
    }
    for (index, op) in plan.ops().iter().enumerate() {
        let target = op.output().map_or_else(String::new, |out| format!(" -> {}", buf(out)));
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{index:4} {:<11} {}{target}", op.name(), operands(plan, op));
    }
    text
}

fn operands(plan: &Plan, op: &Op) -> String {
    match op {
        Op::Embed { table, .. } | Op::EmbedPositions { table, .. } => plan.weight_name(*table).to_owned(),
        Op::AddRow { input, weight, .. } => format!("{} + {}", buf(*input), plan.weight_name(*weight)),
        Op::RmsNorm { input, weight, eps, .. } => norm(plan, *input, *weight, *eps),
        Op::LayerNorm { input, weight, bias, eps, .. } => {
            format!("{} + {}", norm(plan, *input, *weight, *eps), plan.weight_name(*bias))
        }
        Op::MatMul { .. } => projection(plan, op),
        Op::Rope { data, spec } => format!("{} {}", buf(*data), rope(plan, spec)),
        Op::KvWrite { layer, keys, values } => format!("layer {layer}: k {} v {}", buf(*keys), buf(*values)),
        Op::RopeKvWrite { layer, query, keys, values, spec } => {
            let rotated = format!("q {} k {}", buf(*query), buf(*keys));
            format!("layer {layer}: {rotated} v {} {}", buf(*values), rope(plan, spec))
        }
        Op::Attention { layer, query, shape, scores, .. } => {
            format!("layer {layer}: q {} {} {}", buf(*query), heads(shape), scores_text(scores))
        }
        Op::EncoderAttention { query, keys, values, shape, scores, .. } => {
            let operands = format!("q {} k {} v {}", buf(*query), buf(*keys), buf(*values));
            let window = scores.window.map_or_else(String::new, |window| format!(" within {window}"));
            let causal = if scores.causal { " causal" } else { "" };
            let name = |id: WeightId| format!(" distances {}", plan.weight_name(id));
            let distances = scores.distances.map_or_else(String::new, name);
            format!("{operands} {} scale {}{window}{causal}{distances}", heads(shape), scores.scale)
        }
        Op::SiluMul { gate: a, up: b, .. } | Op::Mul { a, b, .. } => format!("{} * {}", buf(*a), buf(*b)),
        Op::ExpertsUp { input, scores, gate, up, experts, .. } => {
            let names = format!("{} | {}", plan.weight_name(*gate), plan.weight_name(*up));
            format!("[{names}] . {} by {} {}", buf(*input), buf(*scores), experts_text(experts))
        }
        Op::ExpertsDown { input, scores, down, experts, .. } => {
            let name = plan.weight_name(*down);
            format!("[{name}] . {} by {} {}", buf(*input), buf(*scores), experts_text(experts))
        }
        Op::Scale { input, factor, .. } => format!("{} * {factor}", buf(*input)),
        Op::SoftCap { data, cap } => format!("{} cap {cap}", buf(*data)),
        Op::Add { a, b, .. } => format!("{} + {}", buf(*a), buf(*b)),
        Op::GatherRows { input, .. } | Op::Gelu { input, form: GeluForm::Erf, .. } => buf(*input),
        Op::Gelu { input, form: GeluForm::Tanh, .. } => format!("{} by tanh", buf(*input)),
        Op::AllReduce { data } => buf(*data),
        Op::Logits { input, weight, .. } => format!("[{}] . {}", plan.weight_name(*weight), buf(*input)),
        Op::Pool { input, pooling, normalise, .. } => {
            let pooling = match pooling {
                Pooling::Mean => "mean",
                Pooling::Cls => "cls",
                Pooling::Last => "last",
                Pooling::Max => "max",
            };
            format!("{pooling} {}{}", buf(*input), if *normalise { " normalised" } else { "" })
        }
    }
}

fn norm(plan: &Plan, input: Buf, weight: WeightId, eps: f32) -> String {
    format!("{} * {} eps {eps:e}", buf(input), plan.weight_name(weight))
}

fn projection(plan: &Plan, op: &Op) -> String {
    let Op::MatMul { input, norm: before, normed, segments, activation, residual, .. } = op else {
        return String::new();
    };
    let segment = |segment: &crate::Segment| {
        let bias = segment.bias.map_or_else(String::new, |bias| format!(" + {}", plan.weight_name(bias)));
        format!("{}{bias}", plan.weight_name(segment.weight))
    };
    let segments: Vec<String> = segments.iter().map(segment).collect();
    let input = match before {
        Some(n) => {
            let scaled = norm(plan, *input, n.weight, n.eps);
            let normed = normed.map_or_else(String::new, |normed| format!(" = {}", buf(normed)));
            match n.bias {
                Some(bias) => format!("layer_norm({scaled} + {}){normed}", plan.weight_name(bias)),
                None => format!("rms_norm({scaled}){normed}"),
            }
        }
        None => buf(*input),
    };
    let product = format!("[{}] . {input}", segments.join(" | "));
    let product = match activation {
        Activation::None => product,
        Activation::Gelu => format!("gelu({product})"),
        Activation::SiluMul => format!("silu_mul({product})"),
    };
    residual.map_or_else(|| product.clone(), |r| format!("{product} + {}", buf(r)))
}

fn rope(plan: &Plan, spec: &RopeSpec) -> String {
    let layout = match spec.layout {
        RopeLayout::Interleaved => "interleaved",
        RopeLayout::Neox => "neox",
    };
    let name = |id: WeightId| format!(" frequencies {}", plan.weight_name(id));
    let frequencies = spec.scaling.frequencies.map_or_else(String::new, name);
    let magnitude = match spec.scaling.magnitude {
        1.0 => String::new(),
        magnitude => format!(" magnitude {magnitude}"),
    };
    format!("{layout} base {} dims {}/{}{frequencies}{magnitude}", spec.base, spec.dims, spec.head_dim)
}

fn scores_text(scores: &Scores) -> String {
    let cap = scores.soft_cap.map_or_else(String::new, |cap| format!(" cap {cap}"));
    let window = scores.window.map_or_else(String::new, |window| format!(" window {window}"));
    format!("scale {}{cap}{window}", scores.scale)
}

fn experts_text(experts: &Experts) -> String {
    format!("{} of {} experts x {}", experts.used, experts.count, experts.hidden)
}

fn heads(shape: &AttentionShape) -> String {
    format!("heads {}/{} x {}", shape.heads, shape.kv_heads, shape.head_dim)
}

/// `offset[rows x cols]`, with the stride where it differs; `T` is the step's tokens, `L` its rows of logits,
/// `S` its sequences.
fn buf(b: Buf) -> String {
    let rows = match b.rows {
        RowSpace::Tokens => 'T',
        RowSpace::Logits => 'L',
        RowSpace::Sequences => 'S',
    };
    let stride = if b.stride == b.cols { String::new() } else { format!("/{}", b.stride) };
    format!("@{}[{rows}x{}{stride}]", b.offset, b.cols)
}
