//! Gemma 3 270M: pieces of SentencePiece, windows, norms of heads, a width that is not the queries'. The
//! model is not fetched by the stages of the tests, because its terms restrict its use.

use super::{ReferenceCase, check_logits, cpu, first_logits, generate, optional_model};
use std::sync::Arc;
use trustformers_cpu::Tier;
use trustformers_model::Model;

/// Tokens that are generated from each prompt that fits the engine's context.
const TOKENS: usize = 12;
const PROMPT_TOKENS: usize = 400;

fn model() -> Option<Arc<Model>> {
    optional_model("gemma-3-270m.Q4_K_M.gguf")
}

fn cases() -> Vec<ReferenceCase> {
    super::cases(include_str!("../reference/gemma-3-270m.json"))
}

fn best_tier() -> Tier {
    super::tiers().into_iter().next_back().unwrap()
}

#[test]
fn prompts_give_the_ids_of_the_reference() {
    let Some(model) = model() else { return };
    for case in cases() {
        assert_eq!(model.tokenizer().encode(&case.prompt).unwrap(), case.ids, "{:?}", case.prompt);
        assert_eq!(model.tokenizer().decode(&case.greedy), case.text);
    }
    assert_eq!((model.facts().layers, model.facts().vocabulary), (18, 262_144));
}

#[test]
fn the_best_tier_follows_the_reference() {
    let Some(model) = model() else { return };
    let (cases, tier) = (cases(), best_tier());
    let short: Vec<(&ReferenceCase, usize)> = cases
        .iter()
        .filter(|case| case.ids.len() <= PROMPT_TOKENS)
        .map(|case| (case, case.decided().min(TOKENS)))
        .collect();
    assert!(short.len() >= 3);
    for ((case, count), (ids, _)) in short.iter().zip(generate(&model, cpu(tier), &short)) {
        assert_eq!(ids, case.greedy[..*count], "{:?}", case.prompt);
    }
    // The longest prompt has passed the window of 512 tokens.
    for case in &cases {
        check_logits("gemma 3", case, &first_logits(&model, &mut *cpu(tier), &case.ids));
    }
}
