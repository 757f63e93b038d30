//! What an observer of a generation is told, and what is counted of its time and its tenant.

use super::*;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use trustformers_engine::{GenerationObserver, GenerationOutcome, GenerationProgress};

#[derive(Debug)]
struct Noted(SyncSender<GenerationProgress>);

impl GenerationObserver for Noted {
    fn observe(&mut self, progress: GenerationProgress) {
        let _gone = self.0.send(progress);
    }
}

fn observed(engine: &Engine, params: &GenerateParams) -> (Generation, Receiver<GenerationProgress>) {
    // More than any of these generations has.
    let (sender, receiver) = sync_channel(64);
    (engine.submit_observed(params, Some(Box::new(Noted(sender)))).unwrap(), receiver)
}

#[tokio::test]
async fn an_observer_is_told_the_course_from_the_first_step_to_the_end() {
    let (engine, steps, registry) = start_stepped(&config());
    let params = GenerateParams { tenant: "red".into(), ..tokens(&prompt(70, 1), 3) };
    let (generation, told) = observed(&engine, &params);
    drop(steps);
    answer(generation).await.unwrap();
    engine.drain().await;
    use GenerationProgress::{Ended, FirstToken, Started, Step};
    let step = |rows| Step { rows, sequences: 1 };
    let course: Vec<_> = told.iter().collect();
    // 70 tokens are more than one step's budget of 64.
    let wanted = [Started, step(64), step(6), FirstToken, step(1), step(1), Ended(GenerationOutcome::Length)];
    assert_eq!(course, wanted);
    // The last token is never computed.
    let served = value(&registry, "trustformers_tenant_served_tokens_total", Some("red"));
    assert_eq!(served, 72.0);
    for phase in ["request", "prefill", "decode", "queue_wait"] {
        assert_eq!(value(&registry, &format!("trustformers_{phase}_seconds"), None), 1.0, "{phase}");
    }
}

#[tokio::test]
async fn an_observer_is_told_how_a_generation_ended_and_dropped_then() {
    let config = EngineConfig { max_batch_size: 1, ..config() };
    let (engine, steps, _registry) = start_stepped(&config);
    let (running, of_running) = observed(&engine, &tokens(&prompt(4, 1), 50));
    steps.next_step();
    let (queued, of_queued) = observed(&engine, &tokens(&prompt(4, 2), 50));
    drop((running, queued));
    drop(steps);
    engine.drain().await;
    let last = |told: Receiver<GenerationProgress>| told.iter().last();
    let cancelled = Some(GenerationProgress::Ended(GenerationOutcome::Cancelled));
    assert_eq!((last(of_running), last(of_queued)), (cancelled, cancelled));
}
