//! Qwen2.5-Coder, 0.5B and, where it is present, 1.5B: five weight types in one file, biases, rope on halves
//! of heads.

use super::{GeneratedText, ReferenceCase, check_fast, check_logits, cpu, first_logits, generate, tiers};
use std::sync::Arc;
use trustformers_cpu::Tier;
use trustformers_model::Model;
use trustformers_plan::DType;

const FILE: &str = "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf";

/// The model is four times as large as SmolLM2, so all tiers but the best one run only the shortest prompts
/// and this many tokens.
const SHORT_PROMPT_TOKENS: usize = 30;
const SHORT_TOKENS: usize = 12;

fn model() -> Option<Arc<Model>> {
    super::model(FILE)
}

fn cases() -> Vec<ReferenceCase> {
    super::cases(include_str!("../reference/qwen2.5-coder-0.5b.json"))
}

#[test]
fn prompts_give_the_ids_of_the_reference() {
    let Some(model) = model() else { return };
    let cases = cases();
    assert!(cases.len() >= 10);
    for case in &cases {
        assert_eq!(model.tokenizer().encode(&case.prompt).unwrap(), case.ids, "{:?}", case.prompt);
        assert_eq!(model.tokenizer().decode(&case.greedy), case.text);
    }
    let facts = model.facts();
    assert_eq!((facts.layers, facts.vocabulary, facts.context_tokens), (24, 151_665, 32_768));
    let mut types: Vec<DType> = model.weights().iter().map(|(_, weight)| weight.dtype()).collect();
    types.sort_unstable();
    types.dedup();
    assert_eq!(types, [DType::F32, DType::Q8_0, DType::Q5_0, DType::Q4_K, DType::Q6_K]);
}

/// Every case on one tier, compared as far as the reference is decided.
fn check_greedy(model: &Arc<Model>, cases: &[ReferenceCase], tier: Tier) -> Vec<GeneratedText> {
    let all: Vec<(&ReferenceCase, usize)> = cases.iter().map(|case| (case, case.greedy.len())).collect();
    let started = std::time::Instant::now();
    let answers: Vec<GeneratedText> = generate(model, cpu(tier), &all);
    println!("{tier:?}: {} prompts in {:.1} s", cases.len(), started.elapsed().as_secs_f32());
    let mut equal = 0;
    for (case, (ids, text)) in cases.iter().zip(&answers) {
        let decided = case.decided();
        assert_eq!(ids[..decided], case.greedy[..decided], "{tier:?}: {:?}", case.prompt);
        if decided == case.greedy.len() {
            assert_eq!(text, &case.text);
        }
        equal += decided;
    }
    println!("{tier:?}: {equal} decided tokens are equal");
    answers
}

#[test]
fn all_tiers_follow_the_reference() {
    let Some(model) = model() else { return };
    let (cases, tiers) = (cases(), tiers());
    let best = *tiers.last().unwrap();
    let all: Vec<(&ReferenceCase, usize)> = cases.iter().map(|case| (case, case.greedy.len())).collect();
    let answers = check_greedy(&model, &cases, best);
    let short: Vec<(&ReferenceCase, usize)> = all
        .iter()
        .filter(|(case, count)| case.ids.len() <= SHORT_PROMPT_TOKENS && *count >= SHORT_TOKENS)
        .take(3)
        .map(|(case, _)| (*case, SHORT_TOKENS))
        .collect();
    assert!(short.len() == 3);
    for tier in tiers {
        for ((case, count), (ids, _)) in short.iter().zip(generate(&model, cpu(tier), &short)) {
            let at = cases.iter().position(|other| other.prompt == case.prompt).unwrap();
            assert_eq!(ids, answers[at].0[..*count], "{tier:?} against {best:?}: {:?}", case.prompt);
        }
        let case = short[0].0;
        check_logits(&format!("{tier:?}"), case, &first_logits(&model, &mut *cpu(tier), &case.ids));
    }
}

#[test]
fn fast_numerics_agree_where_the_reference_is_clear() {
    let Some(model) = model() else { return };
    let best = tiers().into_iter().rfind(|tier| *tier != Tier::Scalar);
    if let Some(best) = best {
        check_fast(&model, &cases(), best);
    }
}

#[test]
fn the_larger_model_follows_its_reference_where_present() {
    let Some(model) = super::optional_model("Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf") else { return };
    let cases = super::cases(include_str!("../reference/qwen2.5-coder-1.5b.json"));
    for case in &cases {
        assert_eq!(model.tokenizer().encode(&case.prompt).unwrap(), case.ids, "{:?}", case.prompt);
    }
    let best = *tiers().last().unwrap();
    check_greedy(&model, &cases, best);
    if best != Tier::Scalar {
        check_fast(&model, &cases, best);
    }
}
