//! Faults of requests, models and devices: which requests end, and what counts against liveness.

use crate::stepped::Verdict;
use crate::{answer, config, kv_used, prompt, start, start_stepped, tokens, value};
use trustformers_engine::{
    GenerateError, GenerateParams, Generation, MIN_REPETITION_PENALTY, RequestFault, SubmitError,
};

#[tokio::test]
async fn a_refused_step_ends_only_the_request_that_it_is_about() {
    let (engine, steps, registry) = start_stepped(&config());
    let first = engine.submit(&tokens(&prompt(20, 1), 3)).unwrap();
    assert_eq!(steps.run_step(), [20]);
    steps.next_step();
    let second = engine.submit(&tokens(&prompt(5, 2), 3)).unwrap();
    steps.decide(Verdict::Run);
    let step = steps.next_step();
    assert_eq!((step.rows_of(0).len(), step.rows_of(1).len()), (1, 5));
    steps.decide(Verdict::RefuseRow(3));
    // The step is submitted again without the refused request.
    assert_eq!(steps.run_step(), [1]);
    let error = answer(second).await.unwrap_err();
    assert!(matches!(error, GenerateError::Request(RequestFault::RefusedStep { .. })), "{error}");
    drop(steps);
    assert_eq!(answer(first).await.unwrap(), answer(unaffected(20)).await.unwrap());
    engine.drain().await;
    assert_eq!(value(&registry, "trustformers_failed_steps_total", None), 0.0);
    assert_eq!((engine.heartbeat().failed_steps, kv_used(&registry)), (0, 0.0));
    assert!(value(&registry, "trustformers_kv_blocks_kept", None) > 0.0, "the cache stays valid");
}

fn unaffected(len: usize) -> Generation {
    start(&config()).submit(&tokens(&prompt(len, 1), 3)).unwrap()
}

#[tokio::test]
async fn refused_steps_in_a_row_never_count_as_failed() {
    let (engine, steps, registry) = start_stepped(&config());
    for salt in 0..5 {
        let generation = engine.submit(&tokens(&prompt(4, salt), 5)).unwrap();
        steps.next_step();
        steps.decide(Verdict::RefuseRow(0));
        let error = answer(generation).await.unwrap_err();
        assert!(matches!(error, GenerateError::Request(_)), "{error}");
        assert_eq!(engine.heartbeat().failed_steps, 0);
    }
    assert_eq!(value(&registry, "trustformers_failed_steps_total", None), 0.0);
    assert_eq!(value(&registry, "trustformers_requests_total", Some("failed")), 5.0);
}

#[tokio::test]
async fn no_accepted_setting_empties_the_prefix_cache() {
    let (engine, steps, registry) = start_stepped(&config());
    drop(steps);
    let cached = engine.submit(&tokens(&prompt(40, 1), 1)).unwrap();
    answer(cached).await.unwrap();
    let tiny = |penalty| GenerateParams { repetition_penalty: penalty, ..tokens(&prompt(40, 1), 8) };
    let refused = engine.submit(&tiny(1e-38)).unwrap_err();
    assert!(matches!(refused, SubmitError::Invalid { field: "repetition_penalty", .. }), "{refused}");
    answer(engine.submit(&tiny(MIN_REPETITION_PENALTY)).unwrap()).await.unwrap();
    answer(engine.submit(&tokens(&prompt(40, 1), 1)).unwrap()).await.unwrap();
    assert_eq!(value(&registry, "trustformers_prompt_tokens_reused_total", None), 64.0);
}

#[tokio::test]
async fn unread_answers_take_no_more_than_their_budget() {
    let engine = start(&config());
    let request = GenerateParams { logit_bias: vec![(2, -100.0)], ..tokens(&prompt(4, 1), 100) };
    let unread = engine.submit(&request).unwrap();
    engine.drain().await;
    let one = engine.unread_bytes();
    assert!(one > 100 * 64 && one < 100 * 1024, "{one} bytes of 100 tokens");
    drop(unread);
    assert_eq!(engine.unread_bytes(), 0, "a dropped answer takes no memory");
}
