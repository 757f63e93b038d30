//! Adapters: sequences of one step choose different ones, and each gets the answer that it gets alone.

use std::sync::Arc;

use trustformers_plan::buckets;
use trustformers_plan::oracle::Oracle;
use trustformers_plan::seeded::SeededRng;
use trustformers_plan::{
    Adapter, AdapterRoom, AdapterSlot, Backend, BackendError, DType, Executable, FusedOps, KvType, LoadSpec,
    Loaded, LogitsRows, LowRank, Numerics, Plan, RopeLayout, SequenceStep, StepError, StepInput, StepOutput,
    Weights,
};

use super::order::expect;
use crate::compare::{FAST_COSINE, alike, near, same_bits, wrong};
use crate::harness::KV_BLOCKS;
use crate::models::{Decoder, VOCABULARY};
use crate::{CaseError, Open};

const ROOM: AdapterRoom = AdapterRoom { slots: 3, rank: 8 };
const FIRST: AdapterSlot = AdapterSlot(0);
const SECOND: AdapterSlot = AdapterSlot(1);
const NEVER_FILLED: AdapterSlot = AdapterSlot(2);

/// The projections of a layer that [`adapter`] changes: all of them, or those of the attention.
const ALL: [&str; 7] = ["q", "k", "v", "o", "gate", "up", "down"];
const ATTENTION: [&str; 3] = ["q", "v", "o"];

/// An adapter of the decoder with seeded values that change answers visibly.
fn adapter(weights: &Weights, seed: u64, rank: usize, projections: &[&str]) -> Adapter {
    let mut rng = SeededRng::new(seed);
    let changed = weights.iter().filter(|(_, weight)| {
        let projection = weight.name().split_once('.').map(|(_, projection)| projection);
        projection.is_some_and(|projection| projections.contains(&projection))
    });
    let changes = changed.map(|(id, weight)| {
        let mut values = |count: usize, size: f32| (0..count).map(|_| rng.next_signed() * size).collect();
        let down = values(rank * weight.cols(), 1.0 / (weight.cols() as f32).sqrt());
        let up = values(weight.rows() * rank, 0.5);
        (id, LowRank { rank, scale: 0.75, down, up })
    });
    Adapter { name: format!("seed {seed}"), changes: changes.collect() }
}

/// A decoder with room for adapters on a device, with two of them.
struct Adapted {
    executable: Box<dyn Executable>,
    loaded: Box<dyn Loaded>,
    _backend: Box<dyn Backend>,
}

impl Adapted {
    fn load(
        mut backend: Box<dyn Backend>,
        decoder: Decoder,
        fused: &FusedOps,
        numerics: Numerics,
    ) -> Result<Self, CaseError> {
        let weights = decoder.weights()?;
        let plan = decoder.plan_with_adapters(&weights, fused, ROOM)?;
        let mut loaded = load(&mut *backend, &weights, &plan, numerics)?;
        let executable = buckets::compile(&mut *loaded, &plan, &backend.caps().row_buckets)?;
        loaded.put_adapter(FIRST, &adapter(&weights, 1, 8, &ALL))?;
        loaded.put_adapter(SECOND, &adapter(&weights, 2, 3, &ATTENTION))?;
        Ok(Self { executable, loaded, _backend: backend })
    }

    /// Runs one step of sequences with their adapters; returns the rows of logits.
    fn run(&mut self, sequences: &[ChoosingSequence<'_>]) -> Result<Vec<Vec<f32>>, CaseError> {
        let mut input = StepInput::new();
        for ChoosingSequence { step, adapter } in sequences {
            input.push_sequence(*step);
            input.choose_adapter(*adapter);
        }
        let mut output = StepOutput::new();
        self.executable.submit(&input)?;
        self.executable.wait(&mut output)?;
        Ok((0..output.rows()).map(|row| output.row(row).to_vec()).collect())
    }
}

fn load(
    backend: &mut dyn Backend,
    weights: &Arc<Weights>,
    plan: &Plan,
    numerics: Numerics,
) -> Result<Box<dyn Loaded>, CaseError> {
    let spec = LoadSpec {
        weights: Arc::clone(weights),
        plan,
        kv_blocks: KV_BLOCKS,
        kv_type: KvType::F32,
        numerics,
        progress: &mut |_| {},
    };
    Ok(backend.load(spec)?)
}

/// The rows of one sequence, and the adapter that it chose.
#[derive(Clone, Copy)]
struct ChoosingSequence<'a> {
    step: SequenceStep<'a>,
    adapter: Option<AdapterSlot>,
}

/// Four sequences: two that chose one adapter, one that chose the other, and one that chose none.
const CHOICES: [Option<AdapterSlot>; 4] = [Some(FIRST), None, Some(SECOND), Some(FIRST)];

/// Prompts of different lengths (one of them longer than any tile of rows), then a chunk and single tokens.
/// `together` decides whether the sequences share their steps. The rows of each sequence come in its order.
fn answers(
    adapted: &mut Adapted,
    choices: [Option<AdapterSlot>; 4],
    together: bool,
) -> Result<Vec<Vec<Vec<f32>>>, CaseError> {
    let tokens: Vec<u32> = (0..120).map(|i| (i * 29 + i / 5) % VOCABULARY as u32).collect();
    let blocks: Vec<Vec<u32>> = (0..4).map(|s| (s * 8..s * 8 + 8).collect()).collect();
    // The end of each sequence after each step, from a prompt to single tokens.
    let ends = [[5, 40, 17, 90], [6, 70, 18, 91], [7, 71, 30, 92]];
    let mut rows: Vec<Vec<Vec<f32>>> = vec![Vec::new(); 4];
    let mut cached = [0; 4];
    for ends in ends {
        let steps: Vec<ChoosingSequence<'_>> = (0..4)
            .map(|s| ChoosingSequence {
                step: SequenceStep {
                    tokens: &tokens[cached[s]..ends[s]],
                    cached_tokens: cached[s],
                    blocks: &blocks[s],
                    logits: LogitsRows::Last,
                },
                adapter: choices[s],
            })
            .collect();
        let answers = if together {
            adapted.run(&steps)?
        } else {
            let alone = steps.iter().map(|step| adapted.run(std::slice::from_ref(step)));
            alone.collect::<Result<Vec<_>, _>>()?.concat()
        };
        for (rows, answer) in rows.iter_mut().zip(answers) {
            rows.push(answer);
        }
        cached = ends;
    }
    Ok(rows)
}

/// The types of weights in which adapters are tried: floats, and one quantised by blocks.
fn decoders(claimed: &[DType]) -> impl Iterator<Item = Decoder> {
    let variants = [(DType::F32, RopeLayout::Neox, true), (DType::Q4_1, RopeLayout::Interleaved, false)];
    variants
        .into_iter()
        .filter(|(dtype, ..)| claimed.contains(dtype))
        .map(|(dtype, layout, biased)| Decoder { dtype, mixed_with: None, layout, biased })
}

/// Two adapters and the plain model in one step give each the bits that it has alone, and the oracle's
/// answer.
pub(super) fn mixed(open: Open<'_>) -> Result<(), CaseError> {
    let caps = open()?.caps().clone();
    for decoder in decoders(&caps.dtypes).filter(|_| caps.adapters) {
        let mut adapted = Adapted::load(open()?, decoder, &caps.fused, Numerics::Exact)?;
        let together = answers(&mut adapted, CHOICES, true)?;
        let alone = answers(&mut adapted, CHOICES, false)?;
        let mut oracle = Adapted::load(Box::new(Oracle::new()), decoder, &FusedOps::NONE, Numerics::Exact)?;
        let wanted = answers(&mut oracle, CHOICES, true)?;
        let plain = answers(&mut adapted, [None; 4], true)?;
        for (s, choice) in CHOICES.into_iter().enumerate() {
            let what = format!("{decoder:?}, sequence {s} with adapter {choice:?}");
            same_bits(&format!("{what} beside others"), &together[s], &alone[s])?;
            near(&what, &together[s], &wanted[s])?;
            match choice {
                None => same_bits(&format!("{what}, a plain step"), &plain[s], &together[s])?,
                Some(_) if plain[s] == together[s] => return wrong(format!("{what}: it changes nothing")),
                Some(_) => {}
            }
        }
    }
    Ok(())
}

/// As [`mixed`] in `fast` numerics: the oracle's direction.
pub(super) fn fast(open: Open<'_>) -> Result<(), CaseError> {
    let caps = open()?.caps().clone();
    for decoder in decoders(&caps.dtypes).filter(|_| caps.adapters) {
        let mut adapted = Adapted::load(open()?, decoder, &caps.fused, Numerics::Fast)?;
        let mut oracle = Adapted::load(Box::new(Oracle::new()), decoder, &FusedOps::NONE, Numerics::Fast)?;
        let (got, wanted) = (answers(&mut adapted, CHOICES, true)?, answers(&mut oracle, CHOICES, true)?);
        for (s, choice) in CHOICES.into_iter().enumerate() {
            let what = format!("{decoder:?}, sequence {s} with adapter {choice:?}");
            alike(&what, &got[s], &wanted[s], FAST_COSINE)?;
        }
    }
    Ok(())
}

/// What cannot be put, dropped or chosen is refused with the right error, and changes no answer; an adapter
/// that was dropped leaves no memory behind, and its slot can be used again.
pub(super) fn slots(open: Open<'_>) -> Result<(), CaseError> {
    let caps = open()?.caps().clone();
    if !caps.adapters {
        return Ok(());
    }
    let decoder = Decoder { dtype: DType::F32, mixed_with: None, layout: RopeLayout::Neox, biased: false };
    let weights = decoder.weights()?;
    let mut adapted = Adapted::load(open()?, decoder, &caps.fused, Numerics::Exact)?;
    let before = answers(&mut adapted, CHOICES, true)?;
    let with_both = adapted.loaded.memory();
    let is_refused = |error: &BackendError| matches!(error, BackendError::Adapter(_));
    let good = || adapter(&weights, 3, 4, &ATTENTION);
    let mut short = good();
    short.changes.values_mut().for_each(|change| change.up.truncate(1));
    let mut foreign = good();
    let change = foreign.changes.values().next().cloned();
    foreign.changes.extend(weights.find("embedding").zip(change));
    let mut not_finite = good();
    not_finite.changes.values_mut().for_each(|change| change.down[0] = f32::NAN);
    let put = [
        ("an adapter for a slot that is in use", SECOND, good()),
        ("an adapter for a slot that the plan does not have", AdapterSlot(3), good()),
        ("an adapter of a higher rank", NEVER_FILLED, adapter(&weights, 3, 9, &ATTENTION)),
        ("an adapter with a short matrix", NEVER_FILLED, short),
        ("an adapter of the embedding", NEVER_FILLED, foreign),
        ("an adapter with a number that is not finite", NEVER_FILLED, not_finite),
    ];
    for (what, slot, adapter) in put {
        expect(what, adapted.loaded.put_adapter(slot, &adapter), is_refused)?;
    }
    expect("a drop of an empty slot", adapted.loaded.drop_adapter(NEVER_FILLED), is_refused)?;
    for slot in [NEVER_FILLED, AdapterSlot(3)] {
        let mut input = StepInput::new();
        let (tokens, blocks) = (&[1u32, 2][..], &[70u32][..]);
        let logits = LogitsRows::Last;
        input.push_sequence(SequenceStep { tokens, cached_tokens: 0, blocks, logits });
        input.choose_adapter(Some(slot));
        let is_step = |error: &BackendError| {
            matches!(error, BackendError::Step(StepError::EmptySlot { .. } | StepError::Adapter { .. }))
        };
        expect("a step with an empty slot", adapted.executable.submit(&input), is_step)?;
    }
    if adapted.loaded.memory() != with_both {
        return wrong("refused adapters take memory");
    }
    for (s, rows) in answers(&mut adapted, CHOICES, true)?.iter().enumerate() {
        same_bits(&format!("sequence {s} after refused adapters"), rows, &before[s])?;
    }
    reused(&mut adapted, &weights, &before)
}

/// Dropping frees the memory, and a slot that is used again has nothing of the adapter before.
fn reused(adapted: &mut Adapted, weights: &Weights, before: &[Vec<Vec<f32>>]) -> Result<(), CaseError> {
    let with_both = adapted.loaded.memory().total_bytes();
    adapted.loaded.drop_adapter(FIRST)?;
    let with_one = adapted.loaded.memory().total_bytes();
    if with_one >= with_both {
        return wrong(format!("{with_both} bytes with two adapters, {with_one} with one"));
    }
    let of_second = answers(adapted, [None, None, Some(SECOND), None], true)?;
    for s in [1, 2] {
        same_bits(&format!("sequence {s} after a drop"), &of_second[s], &before[s])?;
    }
    adapted.loaded.put_adapter(FIRST, &adapter(weights, 1, 8, &ALL))?;
    for (s, rows) in answers(adapted, CHOICES, true)?.iter().enumerate() {
        same_bits(&format!("sequence {s} with the adapter again"), rows, &before[s])?;
    }
    adapted.loaded.drop_adapter(FIRST)?;
    adapted.loaded.drop_adapter(SECOND)?;
    adapted.loaded.put_adapter(FIRST, &adapter(weights, 2, 3, &ATTENTION))?;
    let swapped = answers(adapted, [None, None, Some(FIRST), None], true)?;
    same_bits("an adapter in another slot", &swapped[2], &before[2])
}
