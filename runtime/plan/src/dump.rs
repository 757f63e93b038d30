//! The text form of a plan. It is compared with golden files, so its shape changes only on purpose.

use std::fmt::Write as _;

use crate::{Buf, Epilogue, Op, Plan, RopeLayout, RowSpace};

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
    for (index, op) in plan.ops().iter().enumerate() {
        let target = op.output().map_or_else(String::new, |out| format!(" -> {}", buf(out)));
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{index:4} {:<11} {}{target}", op.name(), operands(plan, op));
    }
    text
}

fn operands(plan: &Plan, op: &Op) -> String {
    match op {
        Op::Embed { table, .. } => plan.weight_name(*table).to_owned(),
        Op::RmsNorm { input, weight, eps, .. } => {
            format!("{} * {} eps {eps:e}", buf(*input), plan.weight_name(*weight))
        }
        Op::MatMul { input, weights, epilogue, .. } => {
            let names: Vec<&str> = weights.iter().map(|w| plan.weight_name(*w)).collect();
            let tail = match epilogue {
                Epilogue::None => String::new(),
                Epilogue::Add(b) => format!(" + {}", buf(*b)),
            };
            format!("[{}] . {}{tail}", names.join(" | "), buf(*input))
        }
        Op::Rope { data, spec } => {
            let layout = match spec.layout {
                RopeLayout::Interleaved => "interleaved",
                RopeLayout::Neox => "neox",
            };
            format!("{} {layout} base {} dims {}/{}", buf(*data), spec.base, spec.dims, spec.head_dim)
        }
        Op::KvWrite { layer, keys, values } => format!("layer {layer}: k {} v {}", buf(*keys), buf(*values)),
        Op::Attention { layer, query, shape, scale, .. } => format!(
            "layer {layer}: q {} heads {}/{} x {} scale {scale}",
            buf(*query),
            shape.heads,
            shape.kv_heads,
            shape.head_dim
        ),
        Op::SiluMul { gate, up, .. } => format!("{} * {}", buf(*gate), buf(*up)),
        Op::Add { a, b, .. } => format!("{} + {}", buf(*a), buf(*b)),
        Op::GatherRows { input, .. } => buf(*input),
        Op::Logits { input, weight, .. } => format!("[{}] . {}", plan.weight_name(*weight), buf(*input)),
    }
}

/// `offset[rows x cols]`, with the stride where it differs; `T` is the step's tokens, `L` its rows of logits.
fn buf(b: Buf) -> String {
    let rows = match b.rows {
        RowSpace::Tokens => 'T',
        RowSpace::Logits => 'L',
    };
    let stride = if b.stride == b.cols { String::new() } else { format!("/{}", b.stride) };
    format!("@{}[{rows}x{}{stride}]", b.offset, b.cols)
}
