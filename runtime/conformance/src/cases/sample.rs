//! Tokens that the device chooses: the same as the reference chooses from the device's own logits, and the
//! same whether the host or the device gives them to the next step.

use trustformers_plan::{
    BackendError, DType, Executable, Filters, LogitsRows, Numerics, Penalties, RopeLayout, SampleInput,
    SampleResult, SampleScratch, SampleSpec, SampledStep, SequenceStep, StepError, StepInput, StepOutput,
    TokenCount, sample,
};

use super::order::expect;
use crate::compare::{same_bits, wrong};
use crate::harness::{load_decoder, run};
use crate::models::{Decoder, VOCABULARY};
use crate::{CaseError, Open};

const DECODER: Decoder =
    Decoder { dtype: DType::F32, mixed_with: None, layout: RopeLayout::Neox, biased: false };

/// Rows of logits of the step whose tokens are chosen: with these two sequences as many as verify drafts.
const ROWS: usize = 9;

fn prompts() -> [Vec<u32>; 2] {
    let prompt = |salt: u32| (0..8).map(|i| (i * 29 + salt * 7) % VOCABULARY as u32).collect();
    [prompt(1), prompt(2)]
}

/// A step with [`ROWS`] rows of logits.
fn step(prompts: &[Vec<u32>; 2]) -> [SequenceStep<'_>; 2] {
    let of = |index: usize, blocks, logits| SequenceStep {
        tokens: &prompts[index],
        cached_tokens: 0,
        blocks,
        logits,
    };
    [of(0, &[1], LogitsRows::All), of(1, &[2], LogitsRows::Last)]
}

/// The answer of a step whose tokens are chosen.
fn run_sampled(
    executable: &mut dyn Executable,
    sequences: &[SequenceStep<'_>],
    sample: &SampleInput,
) -> Result<StepOutput, CaseError> {
    let (mut input, mut output) = (StepInput::new(), StepOutput::new());
    sequences.iter().for_each(|sequence| input.push_sequence(*sequence));
    executable.submit(&input)?;
    executable.sample(sample)?;
    executable.wait(&mut output)?;
    Ok(output)
}

/// Settings that together use every field.
fn specs<'a>(mask: &'a [u32], counts: &'a [TokenCount]) -> Vec<SampleSpec<'a>> {
    let plain = SampleSpec { temperature: 0.8, uniform: 0.37, ..SampleSpec::greedy(0) };
    let filters = |filters| SampleSpec { filters, ..plain };
    let none = Filters::NONE;
    let penalties = Penalties { repetition: 1.3, presence: 0.4, frequency: 0.2 };
    vec![
        SampleSpec { margin: true, logprobs: Some(3), ..SampleSpec::greedy(0) },
        SampleSpec { logprobs: Some(0), ..plain },
        filters(Filters { top_k: 5, ..none }),
        filters(Filters { typical_p: 0.7, ..none }),
        filters(Filters { top_k: 40, top_p: 0.8, min_p: 0.1, ..none }),
        SampleSpec { mask: Some(mask), margin: true, ..plain },
        SampleSpec { penalties, counts, drafted: &[5, 6, 5], ..plain },
        SampleSpec { bias: &[(3, 4.0), (4, f32::NEG_INFINITY)], mask: Some(mask), ..plain },
        SampleSpec { mask: Some(&[]), ..SampleSpec::greedy(0) },
    ]
}

/// Choices equal those of the reference bit for bit, in any subset of the rows, and logits stay
/// on the device.
pub(super) fn choices(open: Open<'_>) -> Result<(), CaseError> {
    let prompts = prompts();
    let counts: Vec<TokenCount> = (0..20).map(|id| TokenCount { id: id * 3, produced: id % 3 }).collect();
    let mask: Vec<u32> = (0..VOCABULARY.div_ceil(32)).map(|word| 0x5a5a_1234 << (word % 3)).collect();
    let specs = specs(&mask, &counts);
    for numerics in [Numerics::Exact, Numerics::Fast] {
        let mut backend = open()?;
        let fused = backend.caps().fused;
        let executable = &mut *load_decoder(&mut *backend, DECODER, &fused, numerics)?;
        let logits = run(executable, &step(&prompts))?;
        for kept in [1, 2, ROWS] {
            let mut input = SampleInput::new();
            let rows = (0..ROWS).filter(|row| row % 4 < kept);
            rows.zip(specs.iter().cycle().skip(kept))
                .for_each(|(row, spec)| input.push(&SampleSpec { logits_row: row, ..*spec }));
            let output = run_sampled(executable, &step(&prompts), &input)?;
            let mut scratch = SampleScratch::default();
            let choice = |index| -> SampleResult {
                let spec = input.row(index);
                sample::choose(&logits[spec.logits_row], &spec, &mut scratch)
            };
            let want: Vec<SampleResult> = (0..input.len()).map(choice).collect();
            if output.choices != want {
                return wrong(format!("{numerics:?}: {:?} were chosen, not {want:?}", output.choices));
            }
            if !output.values.is_empty() {
                return wrong("the logits of a sampled step left the device");
            }
        }
        same_bits("a step after sampled ones", &run(executable, &step(&prompts))?, &logits)?;
    }
    Ok(())
}

/// A token that the device chose gives the logits that it gives by its id.
pub(super) fn slots(open: Open<'_>) -> Result<(), CaseError> {
    let prompts = prompts();
    let mut backend = open()?;
    let fused = backend.caps().fused;
    let executable = &mut *load_decoder(&mut *backend, DECODER, &fused, Numerics::Exact)?;
    let mut sample = SampleInput::new();
    let (last, other) = (SampleSpec::greedy(7), SampleSpec::greedy(8));
    [last, other].iter().for_each(|spec| sample.push(spec));
    let ids = run_sampled(executable, &step(&prompts), &sample)?.choices;
    let ids: Vec<u32> = ids.into_iter().flatten().map(|token| token.id).collect();
    let [Some(last), Some(other)] = [ids.first(), ids.get(1)].map(Option::<&u32>::copied) else {
        return wrong(format!("{ids:?} were chosen from finite rows"));
    };
    let next =
        |token| SequenceStep { tokens: token, cached_tokens: 8, blocks: &[], logits: LogitsRows::Last };
    let (last, other) = ([last], [other]);
    let next = [SequenceStep { blocks: &[2], ..next(&other) }, SequenceStep { blocks: &[1], ..next(&last) }];
    let want = run(executable, &next)?;
    run_sampled(executable, &step(&prompts), &sample)?;
    let (mut input, mut output) = (StepInput::new(), StepOutput::new());
    for (slot, blocks) in [(1, &[2]), (0, &[1])] {
        input.push_sampled(SampledStep { slot, cached_tokens: 8, blocks });
    }
    executable.submit(&input)?;
    executable.wait(&mut output)?;
    let got: Vec<Vec<f32>> = (0..output.rows()).map(|row| output.row(row).to_vec()).collect();
    same_bits("tokens of a sample", &got, &want)
}

/// As many steps are in flight as the device claims, each with tokens of the one before. Answers come in
/// order.
pub(super) fn flight(open: Open<'_>) -> Result<(), CaseError> {
    let prompts = prompts();
    let mut backend = open()?;
    let (fused, in_flight) = (backend.caps().fused, backend.caps().steps_in_flight);
    let executable = &mut *load_decoder(&mut *backend, DECODER, &fused, Numerics::Exact)?;
    let mut greedy = SampleInput::new();
    greedy.push(&SampleSpec::greedy(0));
    let first =
        SequenceStep { tokens: &prompts[0], cached_tokens: 0, blocks: &[1], logits: LogitsRows::Last };
    // One after the other.
    let mut want = Vec::new();
    let mut tokens = prompts[0].clone();
    for _ in 0..6 {
        let cached = if want.is_empty() { 0 } else { tokens.len() - 1 };
        let step = SequenceStep { tokens: &tokens[cached..], cached_tokens: cached, ..first };
        let choices = run_sampled(executable, &[step], &greedy)?.choices;
        let Some(Ok(token)) = choices.first() else { return wrong("no token was chosen from a finite row") };
        tokens.push(token.id);
        want.push(choices);
    }
    // Beside a device that takes two steps, the next one is submitted before the answer of the last.
    let (mut got, output) = (Vec::new(), &mut StepOutput::new());
    for index in 0..want.len() {
        let mut input = StepInput::new();
        match index {
            0 => input.push_sequence(first),
            _ => input.push_sampled(SampledStep { slot: 0, cached_tokens: 7 + index, blocks: &[1] }),
        }
        executable.submit(&input)?;
        if in_flight > 1 && index > 0 {
            executable.wait(output)?;
            got.push(output.choices.clone());
        }
        executable.sample(&greedy)?;
        if in_flight == 1 || index + 1 == want.len() {
            executable.wait(output)?;
            got.push(output.choices.clone());
        }
    }
    if got == want { Ok(()) } else { wrong(format!("{got:?} were chosen in flight, {want:?} one by one")) }
}

/// Samples without a step, of rows that it lacks, and tokens of rows that a sample lacks are refused.
pub(super) fn order(open: Open<'_>) -> Result<(), CaseError> {
    let prompts = prompts();
    let mut backend = open()?;
    let fused = backend.caps().fused;
    let executable = &mut *load_decoder(&mut *backend, DECODER, &fused, Numerics::Exact)?;
    let is_order = |error: &BackendError| matches!(error, BackendError::Order(_));
    let mut greedy = SampleInput::new();
    greedy.push(&SampleSpec::greedy(0));
    expect("sample without submit", executable.sample(&greedy), is_order)?;
    let (mut input, mut ahead) = (StepInput::new(), StepInput::new());
    step(&prompts).into_iter().for_each(|sequence| input.push_sequence(sequence));
    ahead.push_sampled(SampledStep { slot: 0, cached_tokens: 8, blocks: &[1] });
    let is_slot = |error: &BackendError| matches!(error, BackendError::Step(StepError::Slot { .. }));
    expect("a token of no sample", executable.submit(&ahead), is_slot)?;
    executable.submit(&input)?;
    let mut outside = SampleInput::new();
    outside.push(&SampleSpec::greedy(ROWS));
    let is_row = |error: &BackendError| matches!(error, BackendError::Step(StepError::SampleRow { .. }));
    expect("a sample of a row that the step lacks", executable.sample(&outside), is_row)?;
    executable.sample(&greedy)?;
    expect("two samples of a step", executable.sample(&greedy), is_order)?;
    let output = &mut StepOutput::new();
    executable.wait(output)?;
    if output.choices.len() != 1 {
        return wrong(format!("{} choices of a sample of one row", output.choices.len()));
    }
    expect("sample after wait", executable.sample(&greedy), is_order)
}
