//! Loading and running the models: ragged steps of several sequences, with prompts in chunks and blocks in no
//! order.

use std::sync::Arc;

use trustformers_plan::{
    Backend, Executable, FusedOps, KvType, LoadSpec, LogitsRows, Numerics, Plan, SequenceStep, StepInput,
    StepOutput, Weights, buckets,
};

use crate::CaseError;
use crate::models::{Decoder, Encoder, VOCABULARY};

/// Blocks of the cache that the decoder is loaded with.
pub const KV_BLOCKS: usize = 80;

/// Loads a decoder and makes its plan runnable.
///
/// # Errors
/// The backend refuses it.
pub fn load_decoder(
    backend: &mut dyn Backend,
    decoder: Decoder,
    fused: &FusedOps,
    numerics: Numerics,
) -> Result<Box<dyn Executable>, CaseError> {
    let weights = decoder.weights()?;
    let plan = decoder.plan(&weights, fused)?;
    load_plan(backend, &LoadCase { weights, plan, kv_type: KvType::F32, numerics })
}

/// A plan to load, and how.
#[derive(Debug, Clone)]
pub struct LoadCase {
    /// The weights.
    pub weights: Arc<Weights>,
    /// The plan.
    pub plan: Plan,
    /// The type of the cache.
    pub kv_type: KvType,
    /// The numerics.
    pub numerics: Numerics,
}

/// Loads a plan and makes it runnable.
///
/// # Errors
/// The backend refuses it.
pub fn load_plan(backend: &mut dyn Backend, case: &LoadCase) -> Result<Box<dyn Executable>, CaseError> {
    let LoadCase { weights, plan, kv_type, numerics } = case;
    let spec = LoadSpec {
        weights: Arc::clone(weights),
        plan,
        kv_blocks: if plan.uses_cache() { KV_BLOCKS } else { 0 },
        kv_type: *kv_type,
        numerics: *numerics,
        progress: &mut |_| {},
    };
    let buckets = backend.caps().row_buckets.clone();
    Ok(buckets::compile(&mut *backend.load(spec)?, plan, &buckets)?)
}

/// Loads an encoder and makes its plan runnable.
///
/// # Errors
/// The backend refuses it.
pub fn load_encoder(
    backend: &mut dyn Backend,
    encoder: Encoder,
    fused: &FusedOps,
    numerics: Numerics,
) -> Result<Box<dyn Executable>, CaseError> {
    let weights = encoder.weights()?;
    let plan = encoder.plan(&weights, fused)?;
    load_plan(backend, &LoadCase { weights, plan, kv_type: KvType::F32, numerics })
}

/// Runs one step; returns the rows of its answer.
///
/// # Errors
/// The backend fails.
pub fn run(
    executable: &mut dyn Executable,
    sequences: &[SequenceStep<'_>],
) -> Result<Vec<Vec<f32>>, CaseError> {
    let mut input = StepInput::new();
    sequences.iter().for_each(|sequence| input.push_sequence(*sequence));
    let mut output = StepOutput::new();
    executable.submit(&input)?;
    executable.wait(&mut output)?;
    Ok((0..output.rows()).map(|row| output.row(row).to_vec()).collect())
}

/// Runs three sequences of different lengths over four steps: prompts (one in two chunks), then one token
/// each, batched in different ways.
///
/// # Errors
/// The backend fails.
pub fn decode(executable: &mut dyn Executable) -> Result<Vec<Vec<f32>>, CaseError> {
    let tokens: Vec<u32> = (0..290).map(|i| (i * 31 + i / 7) % VOCABULARY as u32).collect();
    // 7 and 80 have no common factor, so no block is used twice.
    let blocks: Vec<Vec<u32>> =
        (0..3).map(|s| (0..20).map(|b| (b * 3 + s) * 7 % KV_BLOCKS as u32).collect()).collect();
    let sequence = |s: usize, from: usize, to: usize, logits| SequenceStep {
        tokens: &tokens[from + s..to + s],
        cached_tokens: from,
        blocks: &blocks[s],
        logits,
    };
    let last = LogitsRows::Last;
    let mut rows = run(
        executable,
        &[
            sequence(0, 0, 5, LogitsRows::All),
            sequence(1, 0, 200, LogitsRows::None),
            sequence(2, 0, 17, last),
        ],
    )?;
    rows.extend(run(executable, &[sequence(1, 200, 280, last), sequence(0, 5, 6, last)])?);
    let each = [sequence(2, 17, 18, last), sequence(1, 280, 281, last), sequence(0, 6, 7, last)];
    rows.extend(run(executable, &each)?);
    rows.extend(run(executable, &[sequence(1, 281, 282, last)])?);
    Ok(rows)
}

/// Runs one text of each length, all in one step.
///
/// # Errors
/// The backend fails.
pub fn encode(executable: &mut dyn Executable, lengths: &[usize]) -> Result<Vec<Vec<f32>>, CaseError> {
    let texts: Vec<Vec<u32>> = lengths
        .iter()
        .map(|len| (0..*len).map(|i| ((i * 17 + i / 5 + len * 3) % VOCABULARY) as u32).collect())
        .collect();
    let sequences: Vec<_> = texts
        .iter()
        .map(|tokens| SequenceStep { tokens, cached_tokens: 0, blocks: &[], logits: LogitsRows::None })
        .collect();
    run(executable, &sequences)
}
