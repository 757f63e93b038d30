//! SmolLM2: every tier of the processor, and the oracle.

use super::{GeneratedText, ReferenceCase, check_fast, check_logits, cpu, first_logits, generate, tiers};
use std::sync::Arc;
use trustformers_cpu::Tier;
use trustformers_model::Model;
use trustformers_plan::oracle::Oracle;

const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// The oracle is plain loops: it runs only the shortest prompts and this many tokens, which takes some
/// seconds.
const ORACLE_PROMPT_TOKENS: usize = 8;
const ORACLE_TOKENS: usize = 8;

fn model() -> Option<Arc<Model>> {
    super::model(FILE)
}

fn cases() -> Vec<ReferenceCase> {
    super::cases(include_str!("../reference/smollm2-135m-instruct.json"))
}

#[test]
fn prompts_give_the_ids_of_the_reference() {
    let Some(model) = model() else { return };
    for case in cases() {
        assert_eq!(model.tokenizer().encode(&case.prompt).unwrap(), case.ids, "{:?}", case.prompt);
        let text = model.tokenizer().decode(&case.greedy);
        assert_eq!(text, case.text);
    }
    let facts = model.facts();
    assert_eq!((facts.layers, facts.vocabulary, facts.context_tokens), (30, 49_152, 8192));
    assert!(facts.chat_template.as_ref().is_some_and(|template| template.contains("<|im_start|>")));
}

#[test]
fn the_oracle_follows_the_reference() {
    let Some(model) = model() else { return };
    let cases = cases();
    let short: Vec<(&ReferenceCase, usize)> = cases
        .iter()
        .filter(|case| case.ids.len() <= ORACLE_PROMPT_TOKENS)
        .map(|case| (case, case.decided().min(ORACLE_TOKENS)))
        .collect();
    assert!(short.len() >= 2);
    println!("{} prompts of at most {ORACLE_PROMPT_TOKENS} tokens, {ORACLE_TOKENS} tokens each", short.len());
    for ((case, count), (ids, _)) in short.iter().zip(generate(&model, Box::new(Oracle::new()), &short)) {
        assert_eq!(ids, case.greedy[..*count], "{:?}", case.prompt);
        check_logits("oracle", case, &first_logits(&model, &mut Oracle::new(), &case.ids));
    }
}

#[test]
fn every_cpu_tier_follows_the_reference() {
    let Some(model) = model() else { return };
    let cases = cases();
    let requests: Vec<(&ReferenceCase, usize)> = cases.iter().map(|case| (case, case.greedy.len())).collect();
    let mut before: Option<(Tier, Vec<GeneratedText>)> = None;
    for tier in tiers() {
        let started = std::time::Instant::now();
        let answers = generate(&model, cpu(tier), &requests);
        println!("{tier:?}: {} prompts in {:.1} s", cases.len(), started.elapsed().as_secs_f32());
        for (case, (ids, text)) in cases.iter().zip(&answers) {
            let decided = case.decided();
            assert_eq!(ids[..decided], case.greedy[..decided], "{tier:?}: {:?}", case.prompt);
            if decided == case.greedy.len() {
                assert_eq!(text, &case.text);
            }
        }
        if let Some((other, expected)) = &before {
            assert_eq!(&answers, expected, "{tier:?} against {other:?}");
        }
        before = Some((tier, answers));
        for case in cases.iter().take(3) {
            check_logits(&format!("{tier:?}"), case, &first_logits(&model, &mut *cpu(tier), &case.ids));
        }
    }
    assert!(before.is_some());
}

#[test]
fn fast_numerics_agree_where_the_reference_is_clear() {
    let Some(model) = model() else { return };
    let cases = cases();
    for tier in tiers().into_iter().filter(|tier| *tier != Tier::Scalar) {
        check_fast(&model, &cases, tier);
    }
}
