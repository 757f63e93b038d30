//! Fast numerics against exact ones, which the parity test compares with an independent f32 implementation.
//! Each position follows the text's own tokens, so that one difference does not cause others.

use std::sync::Arc;

use trustformers_model::{Model, PlanRequest};
use trustformers_plan::{
    KV_BLOCK_TOKENS, Limits, LoadSpec, LogitsRows, Numerics, SequenceStep, StepInput, StepOutput,
};

use crate::texts::PROSE;
use crate::{AnyError, Form, ObjectiveReport, cpu};

/// The reference's best token is clear where it is this much above the second.
const CLEAR: f32 = 0.5;
const MIN_AGREEMENT: f64 = 0.98;
const MIN_COSINE: f64 = 0.997;
/// Largest relative change of perplexity.
const MAX_CHANGE: f64 = 0.02;
/// Tokens of one step.
const CHUNK: usize = 64;
/// Tokens of one piece of text.
const PIECE: usize = 512;

/// The sums of a comparison.
#[derive(Debug, Default)]
struct ComparisonSums {
    positions: usize,
    clear: usize,
    agreed: usize,
    cosine: f64,
    surprise: [f64; 2],
}

pub(crate) fn run(model: &Arc<Model>, form: Form, report: &mut ObjectiveReport) -> Result<(), AnyError> {
    let ids = model.tokenizer().encode(PROSE)?;
    let mut sums = ComparisonSums::default();
    // Further pieces start at other positions, so that the same words have other contexts.
    let mut start = 0;
    while sums.positions < form.quality_tokens {
        let piece: Vec<u32> = ids.iter().copied().cycle().skip(start).take(PIECE.min(ids.len())).collect();
        let exact = logits(model, Numerics::Exact, &piece)?;
        let fast = logits(model, Numerics::Fast, &piece)?;
        for ((exact, fast), next) in exact.iter().zip(&fast).zip(&piece[1..]) {
            sums.record([exact, fast], *next as usize);
        }
        start += 331;
    }
    let ComparisonSums { positions, clear, agreed, cosine, surprise } = sums;
    let share = agreed as f64 / clear as f64;
    let cosine = cosine / positions as f64;
    let [exact, fast] = surprise.map(|sum| (sum / positions as f64).exp());
    let change = fast / exact - 1.0;
    report.number("quality positions", positions);
    report.objective(
        "quality top-1 agreement where clear",
        format!("{share:.4}"),
        format!(">= {MIN_AGREEMENT}"),
        share >= MIN_AGREEMENT,
    );
    report.objective(
        "quality cosine of logits",
        format!("{cosine:.5}"),
        format!(">= {MIN_COSINE}"),
        cosine >= MIN_COSINE,
    );
    report.number("quality perplexity exact", format!("{exact:.3}"));
    report.number("quality perplexity fast", format!("{fast:.3}"));
    report.objective(
        "quality change of perplexity",
        format!("{change:+.4}"),
        format!("+-{MAX_CHANGE}"),
        change.abs() <= MAX_CHANGE,
    );
    Ok(())
}

impl ComparisonSums {
    fn record(&mut self, [exact, fast]: [&Vec<f32>; 2], next: usize) {
        let best = |row: &[f32]| (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap_or(0);
        let top = best(exact);
        let second = exact.iter().enumerate().filter(|(id, _)| *id != top);
        let second = second.map(|(_, logit)| *logit).fold(f32::NEG_INFINITY, f32::max);
        self.positions += 1;
        if exact[top] - second > CLEAR {
            self.clear += 1;
            self.agreed += usize::from(best(fast) == top);
        }
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        self.cosine += dot(exact, fast) / (dot(exact, exact) * dot(fast, fast)).sqrt();
        for (row, sum) in [exact, fast].into_iter().zip(&mut self.surprise) {
            let max = f64::from(row[best(row)]);
            let mass: f64 = row.iter().map(|logit| (f64::from(*logit) - max).exp()).sum();
            *sum += max + mass.ln() - f64::from(row[next]);
        }
    }
}

/// The logits after each token of a text.
fn logits(model: &Model, numerics: Numerics, ids: &[u32]) -> Result<Vec<Vec<f32>>, AnyError> {
    let mut backend = cpu()?;
    let limits = Limits { rows: CHUNK, sequences: 1, logits_rows: CHUNK };
    let fused = backend.caps().fused;
    let plan = model.plan(&PlanRequest { context_tokens: PIECE, limits, fused })?;
    let blocks: Vec<u32> = (0..u32::try_from(PIECE.div_ceil(KV_BLOCK_TOKENS))?).collect();
    let spec = LoadSpec {
        weights: Arc::clone(model.weights()),
        plan: &plan,
        kv_blocks: blocks.len(),
        kv_type: backend.caps().default_kv_type(numerics),
        numerics,
        progress: &mut |_| {},
    };
    let mut loaded = backend.load(spec)?;
    let mut steps = loaded.compile(&plan)?;
    let (mut input, mut output, mut all) = (StepInput::new(), StepOutput::new(), Vec::new());
    for (index, tokens) in ids.chunks(CHUNK).enumerate() {
        input.clear();
        let cached_tokens = index * CHUNK;
        input.push_sequence(SequenceStep { tokens, cached_tokens, blocks: &blocks, logits: LogitsRows::All });
        steps.submit(&input)?;
        steps.wait(&mut output)?;
        all.extend((0..output.rows()).map(|row| output.row(row).to_vec()));
    }
    Ok(all)
}
