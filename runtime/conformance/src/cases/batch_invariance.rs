//! A sequence gives the same bits alone, batched with others, in chunks, token by token, as draft tokens, and
//! after a prefix that another sequence wrote.

use trustformers_plan::{DType, KV_BLOCK_TOKENS, LogitsRows, Numerics, Pooling, RopeLayout, SequenceStep};

use super::numerics::decoders;
use crate::compare::same_bits;
use crate::harness::{encode, load_decoder, load_encoder, run};
use crate::models::{Decoder, Encoder, VOCABULARY};
use crate::{CaseError, Open};

fn prompt(len: u32) -> Vec<u32> {
    (0..len).map(|i| (i * 13 + 5) % VOCABULARY as u32).collect()
}

pub(super) fn decoder(open: Open<'_>) -> Result<(), CaseError> {
    let tokens = prompt(150);
    let (blocks, others): (Vec<u32>, Vec<u32>) = ((10..20).collect(), (30..50).collect());
    let step = |from: usize, to: usize, blocks| SequenceStep {
        tokens: &tokens[from..to],
        cached_tokens: from,
        blocks,
        logits: LogitsRows::Last,
    };
    let silent = |step| SequenceStep { logits: LogitsRows::None, ..step };
    for decoder in decoders(&open()?.caps().dtypes.clone()) {
        let mut backend = open()?;
        let fused = backend.caps().fused;
        let executable = &mut *load_decoder(&mut *backend, decoder, &fused, Numerics::Exact)?;
        let whole = run(executable, &[step(0, 150, &blocks)])?;
        for cut in [1, 3, 130, 147] {
            run(executable, &[step(0, 60, &others), silent(step(0, cut, &blocks))])?;
            let rest = run(executable, &[step(60, 63, &others), step(cut, 150, &blocks)])?;
            same_bits(&format!("{decoder:?} cut at {cut}"), &rest[1..], &whole)?;
        }
        let mut last = Vec::new();
        for i in 0..150 {
            last = run(executable, &[step(i, i + 1, &blocks)])?;
        }
        same_bits(&format!("{decoder:?} token by token"), &last, &whole)?;
    }
    Ok(())
}

/// Most decoding rows of a step that verifies draft tokens, of all sequences together.
const VERIFIED_ROWS: usize = 8;

/// Tokens that are computed in one step, as draft tokens are, give the same logits as one step for each.
/// `fast` numerics promise no other invariance, and this one only where the device claims it
/// ([`trustformers_plan::Caps::rows_are_invariant`]): there an answer does not depend on whether speculation
/// was used.
pub(super) fn draft_tokens(open: Open<'_>) -> Result<(), CaseError> {
    if !open()?.caps().rows_are_invariant {
        return Ok(());
    }
    let (read, tokens) = (40, prompt(40 + VERIFIED_ROWS as u32));
    let blocks: [Vec<u32>; 3] = [(10..14).collect(), (20..24).collect(), (30..34).collect()];
    let step = |from: usize, to: usize, of: usize, logits| SequenceStep {
        tokens: &tokens[from..to],
        cached_tokens: from,
        blocks: &blocks[of],
        logits,
    };
    for decoder in decoders(&open()?.caps().dtypes.clone()) {
        let mut backend = open()?;
        let fused = backend.caps().fused;
        let executable = &mut *load_decoder(&mut *backend, decoder, &fused, Numerics::Fast)?;
        for of in 0..blocks.len() {
            run(executable, &[step(0, read, of, LogitsRows::None)])?;
        }
        let mut one_by_one = Vec::new();
        for at in read..tokens.len() {
            one_by_one.extend(run(executable, &[step(at, at + 1, 0, LogitsRows::Last)])?);
        }
        // Alone in a step, and batched with another sequence. Each pass computes the first tokens again in
        // the same slots.
        for count in [2, 4, VERIFIED_ROWS] {
            let together = run(executable, &[step(read, read + count, 1, LogitsRows::All)])?;
            same_bits(&format!("{decoder:?}, {count} at once"), &together, &one_by_one[..count])?;
            let others = step(read, read + 1, 2, LogitsRows::None);
            let together = run(executable, &[others, step(read, read + count, 1, LogitsRows::All)])?;
            same_bits(
                &format!("{decoder:?}, {count} batched with another sequence"),
                &together,
                &one_by_one[..count],
            )?;
        }
    }
    Ok(())
}

/// Two sequences read, in one step, the blocks that a third one wrote, and continue each in its own way.
pub(super) fn prefix(open: Open<'_>) -> Result<(), CaseError> {
    let shared = 3 * KV_BLOCK_TOKENS;
    let tokens = prompt(80);
    let decoder = Decoder { dtype: DType::F32, mixed_with: None, layout: RopeLayout::Neox, biased: false };
    let mut backend = open()?;
    let fused = backend.caps().fused;
    let executable = &mut *load_decoder(&mut *backend, decoder, &fused, Numerics::Exact)?;
    let step = |tokens, cached_tokens, blocks| SequenceStep {
        tokens,
        cached_tokens,
        blocks,
        logits: LogitsRows::Last,
    };
    let other: Vec<u32> = tokens[..shared].iter().copied().chain([3, 1, 4, 1, 5]).collect();
    let alone = [
        run(executable, &[step(&tokens[..60], 0, &[20, 21, 22, 23])])?,
        run(executable, &[step(&other, 0, &[30, 31, 32, 33])])?,
    ]
    .concat();
    run(executable, &[step(&tokens[..shared], 0, &[1, 2, 3])])?;
    let together = run(
        executable,
        &[step(&tokens[shared..60], shared, &[1, 2, 3, 40]), step(&other[shared..], shared, &[1, 2, 3, 41])],
    )?;
    same_bits("after a shared prefix", &together, &alone)
}

pub(super) fn encoder(open: Open<'_>) -> Result<(), CaseError> {
    let lengths = [5, 90, 33, 1];
    let claimed = open()?.caps().dtypes.clone();
    for dtype in [DType::F32, DType::F16, DType::BF16].into_iter().filter(|dtype| claimed.contains(dtype)) {
        let encoder = Encoder { dtype, pooling: Pooling::Mean, normalise: true };
        let mut backend = open()?;
        let fused = backend.caps().fused;
        let executable = &mut *load_encoder(&mut *backend, encoder, &fused, Numerics::Exact)?;
        let together = encode(executable, &lengths)?;
        for (i, len) in lengths.into_iter().enumerate() {
            let alone = encode(executable, &[len])?;
            same_bits(&format!("{dtype}: {len} tokens alone"), &alone, &together[i..=i])?;
        }
    }
    Ok(())
}
