//! Weights that are views of other tensors: the answers are those of copies of the same values, bit for bit.

use std::sync::Arc;

use trustformers_plan::{
    DType, Executable, KvType, LogitsRows, MatrixShape, Numerics, RopeLayout, SequenceStep, Weight,
    WeightError, WeightView, Weights,
};

use crate::compare::wrong;
use crate::harness::{LoadCase, load_plan, run};
use crate::models::{Decoder, VOCABULARY};
use crate::{CaseError, Open};

/// A decoder whose weights are views of all kinds answers as the decoder that stores each of them.
pub(super) fn decoder(open: Open<'_>) -> Result<(), CaseError> {
    for dtype in open()?.caps().dtypes.clone() {
        let decoder = Decoder { dtype, mixed_with: None, layout: RopeLayout::Neox, biased: true };
        let copies = decoder.weights()?;
        let views = Arc::new(viewed(&copies, decoder.hyper().layers)?);
        for numerics in [Numerics::Exact, Numerics::Fast] {
            let answers = |weights: &Arc<Weights>| {
                let mut backend = open()?;
                let plan = decoder.plan(weights, &backend.caps().fused)?;
                let case = LoadCase { weights: Arc::clone(weights), plan, kv_type: KvType::F32, numerics };
                steps(&mut *load_plan(&mut *backend, &case)?)
            };
            let (want, found) = (answers(&copies)?, answers(&views)?);
            let bits = |rows: &[Vec<f32>]| rows.concat().into_iter().map(f32::to_bits).collect::<Vec<_>>();
            if bits(&want) != bits(&found) {
                return wrong(format!("{dtype} {numerics:?}: views give another answer than copies"));
            }
        }
    }
    Ok(())
}

/// Two prompts in one step, then one token, so that kernels of many rows and of one run.
fn steps(executable: &mut dyn Executable) -> Result<Vec<Vec<f32>>, CaseError> {
    let tokens: Vec<u32> = (0..40).map(|i| (i * 31 + i / 7) % VOCABULARY as u32).collect();
    let prompt = |tokens, blocks, logits| SequenceStep { tokens, cached_tokens: 0, blocks, logits };
    let prompts =
        [prompt(&tokens[..5], &[0], LogitsRows::Last), prompt(&tokens[5..35], &[1, 2], LogitsRows::Last)];
    let mut rows = run(executable, &prompts)?;
    let next =
        SequenceStep { tokens: &tokens[35..36], cached_tokens: 5, blocks: &[0], logits: LogitsRows::Last };
    rows.extend(run(executable, &[next])?);
    Ok(rows)
}

/// The same values under the same names, each read through a view.
fn viewed(copies: &Weights, layers: usize) -> Result<Weights, CaseError> {
    let mut views = Weights::new();
    for (_, weight) in copies.iter() {
        let part = weight.name().rsplit('.').next().unwrap_or_default();
        // Queries, keys and values follow below: they are parts of one tensor.
        if ["q", "k", "v", "bias"].contains(&part) {
            continue;
        }
        let view = match part {
            "o" => columns_of_wider(weight)?,
            "down" if weight.dtype().block_len() == 1 => stored_transposed(weight)?,
            "gate" | "up" | "down" => halves(weight)?,
            _ => weight.clone(),
        };
        views.push(view)?;
    }
    for layer in 0..layers {
        let names = ["q", "k", "v"].map(|part| format!("{layer}.{part}"));
        for view in parts_of_one(copies, &names, Axis::Rows)? {
            views.push(view)?;
        }
        let names = names.map(|name| format!("{name}.bias"));
        for view in parts_of_one(copies, &names, Axis::Columns)? {
            views.push(view)?;
        }
    }
    Ok(views)
}

/// The tensor as the middle columns of one that is two blocks wider.
fn columns_of_wider(weight: &Weight) -> Result<Weight, WeightError> {
    let (dtype, cols) = (weight.dtype(), weight.cols());
    let block = vec![0x11; dtype.block_bytes()];
    let row = |row| [&block[..], &weight.row(row)[..], &block[..]].concat();
    let bytes: Vec<u8> = (0..weight.rows()).flat_map(row).collect();
    let first = dtype.block_len();
    let shape = MatrixShape { rows: weight.rows(), cols: cols + 2 * first };
    stored(dtype, shape, bytes)?.view(weight.name(), &WeightView::Cols(first..first + cols))
}

/// The transpose of the tensor's stored transpose.
fn stored_transposed(weight: &Weight) -> Result<Weight, WeightError> {
    let (dtype, shape) = (weight.dtype(), MatrixShape { rows: weight.cols(), cols: weight.rows() });
    let size = dtype.block_bytes();
    let rows: Vec<_> = (0..weight.rows()).map(|row| weight.row(row)).collect();
    let column = |col: usize| rows.iter().flat_map(move |row| row[col * size..(col + 1) * size].to_vec());
    let bytes: Vec<u8> = (0..weight.cols()).flat_map(column).collect();
    stored(dtype, shape, bytes)?.view(weight.name(), &WeightView::Transposed)
}

/// The tensor as a stack of two, its upper and its lower rows.
fn halves(weight: &Weight) -> Result<Weight, WeightError> {
    // An uneven cut, so that a group of the kernels' rows has rows of both.
    let cut = weight.rows() / 2 + 3;
    let upper = weight.view("upper", &WeightView::Rows(0..cut))?;
    let lower = weight.view("lower", &WeightView::Rows(cut..weight.rows()))?;
    Weight::stacked(weight.name(), &[&upper, &lower])
}

/// How tensors lie in one.
#[derive(Clone, Copy)]
enum Axis {
    Rows,
    Columns,
}

/// Tensors as parts of one that stores them one after the other.
fn parts_of_one(copies: &Weights, names: &[String], axis: Axis) -> Result<Vec<Weight>, CaseError> {
    let mut parts = Vec::new();
    for name in names {
        let Some(id) = copies.find(name) else { return wrong(format!("the decoder has no weight {name}")) };
        parts.push(copies.get(id));
    }
    let bytes: Vec<u8> =
        parts.iter().flat_map(|part| (0..part.rows()).flat_map(move |row| part.row(row).to_vec())).collect();
    let total = |of: fn(&Weight) -> usize| parts.iter().map(|part| of(part)).sum::<usize>();
    let (rows, cols) = match axis {
        Axis::Rows => (total(Weight::rows), parts[0].cols()),
        Axis::Columns => (1, total(Weight::cols)),
    };
    let whole = stored(parts[0].dtype(), MatrixShape { rows, cols }, bytes)?;
    let mut first = 0;
    let mut views = Vec::new();
    for part in parts {
        let len = match axis {
            Axis::Rows => part.rows(),
            Axis::Columns => part.cols(),
        };
        let range = first..first + len;
        let view = match axis {
            Axis::Rows => WeightView::Rows(range),
            Axis::Columns => WeightView::Cols(range),
        };
        first += len;
        views.push(whole.view(part.name(), &view)?);
    }
    Ok(views)
}

fn stored(dtype: DType, shape: MatrixShape, bytes: Vec<u8>) -> Result<Weight, WeightError> {
    let range = 0..bytes.len();
    Weight::new("stored", dtype, shape, Arc::new(bytes), range)
}
