//! Priority classes: class high is next, class low is served within its bound. Every step is blocked until
//! all events before it have been read, and requests arrive while one is blocked: the results are decisions
//! of the engine. The clock affects only the chunks of prompts, which changes some numbers within their
//! bounds.

use std::sync::Arc;

use futures::{FutureExt, StreamExt};
use trustformers_engine::{
    EngineConfig, GenerateError, GenerateParams, Generation, GenerationEvent, Priority,
};
use trustformers_model::Model;

use crate::observed::EngineWork;
use crate::texts::{TestRequest, token};
use crate::{AnyError, ObjectiveReport, Started, start};

/// Sequences of the batch.
const BATCH: usize = 4;
/// Tokens of each prompt.
const PROMPT_TOKENS: usize = 24;
/// Requests of class high that may be admitted while one of class low waits, as `docs/engine.md` says.
const MAX_BEFORE_LOW: usize = 16;
/// The step that runs when a request of class high arrives, and its own.
const MAX_STEPS: usize = 2;

pub(crate) async fn run(model: &Arc<Model>, report: &mut ObjectiveReport) -> Result<(), AnyError> {
    let config = EngineConfig { max_batch_size: BATCH, context_tokens: Some(256), ..EngineConfig::default() };
    high_beside_long_answers(&start(model, &config).await?, report).await?;
    low_beside_many(&start(model, &config).await?, report).await
}

/// Running requests, and the classes of those that have ended.
#[derive(Default)]
struct Race {
    running: Vec<(Priority, Generation)>,
    ended: Vec<Priority>,
}

impl Race {
    fn submit(
        &mut self,
        on: &Started,
        class: Priority,
        salt: usize,
        answer_tokens: usize,
    ) -> Result<(), AnyError> {
        let request = TestRequest { prompt_tokens: PROMPT_TOKENS, salt, answer_tokens };
        let params = GenerateParams { priority: class, ..request.params(&on.engine) };
        self.running.push((class, on.engine.submit(&params)?));
        Ok(())
    }

    /// Runs steps until a request of this class has ended; gives their number.
    async fn until_ended(&mut self, class: Priority, work: &EngineWork) -> Result<usize, GenerateError> {
        let mut steps = 0;
        while !self.ended.contains(&class) {
            work.advance().await;
            steps += 1;
            self.read()?;
        }
        Ok(steps)
    }

    /// Reads all events.
    fn read(&mut self) -> Result<(), GenerateError> {
        let mut unfinished = Vec::new();
        for (class, mut generation) in self.running.drain(..) {
            let ended = loop {
                match generation.next().now_or_never() {
                    None => break false,
                    Some(Some(Ok(GenerationEvent::Token { .. }))) => {}
                    Some(Some(Ok(GenerationEvent::Finished { .. })) | None) => break true,
                    Some(Some(Err(error))) => return Err(error),
                }
            };
            if ended {
                self.ended.push(class);
            } else {
                unfinished.push((class, generation));
            }
        }
        self.running = unfinished;
        Ok(())
    }

    fn ended(&self, class: Priority) -> usize {
        self.ended.iter().filter(|ended| **ended == class).count()
    }
}

/// The batch is full of long answers, and as many more wait, when a request of class high arrives.
async fn high_beside_long_answers(on: &Started, report: &mut ObjectiveReport) -> Result<(), AnyError> {
    let mut race = Race::default();
    let before = on.work.block();
    for salt in 0..2 * BATCH {
        race.submit(on, Priority::Normal, salt, 64)?;
    }
    on.work.until_started(before + 1).await;
    for _ in 0..2 * BATCH {
        on.work.advance().await;
    }
    race.submit(on, Priority::High, 100, 1)?;
    let steps = race.until_ended(Priority::High, &on.work).await?;
    let normal = race.ended(Priority::Normal);
    report.objective("priority normal ended before high", normal, "<= 0", normal == 0);
    report.objective(
        "priority steps until high's first token",
        steps,
        format!("<= {MAX_STEPS}"),
        steps <= MAX_STEPS,
    );
    on.work.unblock();
    on.engine.stop().await;
    Ok(())
}

/// Eighty requests of class high arrived before one of class low.
async fn low_beside_many(on: &Started, report: &mut ObjectiveReport) -> Result<(), AnyError> {
    let mut race = Race::default();
    let before = on.work.block();
    // Runs in the step that is blocked while the others arrive.
    race.submit(on, Priority::Normal, 1, 1)?;
    on.work.until_started(before + 1).await;
    for salt in 300..380 {
        race.submit(on, Priority::High, salt, 8)?;
    }
    race.submit(on, Priority::Low, 200, 1)?;
    // So that there is a step after the end of that one.
    race.submit(on, Priority::Low, 201, 128)?;
    race.until_ended(Priority::Low, &on.work).await?;
    let order = on.work.prompts();
    let at = order.iter().position(|first| *first == token(0, 200)).unwrap_or(order.len());
    // Before it are the request of the blocked step, and those of class high.
    let started = at.saturating_sub(1);
    let ended = race.ended(Priority::High);
    for (name, high) in [("begun", started), ("ended", ended)] {
        report.objective(
            &format!("priority high {name} before low"),
            high,
            format!("1..={MAX_BEFORE_LOW}"),
            (1..=MAX_BEFORE_LOW).contains(&high),
        );
    }
    on.work.unblock();
    on.engine.stop().await;
    Ok(())
}
