//! Classes: high overtakes, low is served within its bound. Every step is held until all that was said before it has
//! been read, and requests come while one is held: what is reported are the engine's decisions. The clock has a say only
//! in how prompts are cut, which moves some figures within their bounds.

use std::sync::Arc;

use futures::{FutureExt, StreamExt};
use trustformers_engine::{
    EngineConfig, GenerateError, GenerateParams, Generation, GenerationEvent, Priority,
};
use trustformers_model::Model;

use crate::texts::{request, token};
use crate::watched::Work;
use crate::{AnyError, Report, Started, start};

/// Places in the batch.
const PLACES: usize = 4;
/// Tokens of each prompt.
const PROMPT_TOKENS: usize = 24;
/// Requests of class high that may be admitted while one of class low waits, as ARCHITECTURE.md says.
const MOST_BEFORE_LOW: usize = 16;
/// The step that runs when a request of class high comes, and its own.
const MOST_STEPS: usize = 2;

pub(crate) async fn run(model: &Arc<Model>, report: &mut Report) -> Result<(), AnyError> {
    let config =
        EngineConfig { max_batch_size: PLACES, context_tokens: Some(256), ..EngineConfig::default() };
    overtaking(&start(model, &config).await?, report).await?;
    low_beside_many(&start(model, &config).await?, report).await
}

/// Requests and those of them that have ended.
#[derive(Default)]
struct Race {
    running: Vec<(Priority, Generation)>,
    ended: Vec<Priority>,
}

impl Race {
    fn enter(
        &mut self,
        on: &Started,
        class: Priority,
        salt: usize,
        answer_tokens: usize,
    ) -> Result<(), AnyError> {
        let ends = on.engine.model().tokenizer().eos_ids();
        let params = GenerateParams { priority: class, ..request(PROMPT_TOKENS, salt, answer_tokens, ends) };
        self.running.push((class, on.engine.submit(&params)?));
        Ok(())
    }

    /// Advances step by step until a request of this class has ended; gives the number of steps.
    async fn until_ended(&mut self, class: Priority, work: &Work) -> Result<usize, GenerateError> {
        let mut steps = 0;
        while !self.ended.contains(&class) {
            work.advance().await;
            steps += 1;
            self.read()?;
        }
        Ok(steps)
    }

    /// Reads everything that has been said.
    fn read(&mut self) -> Result<(), GenerateError> {
        let mut going_on = Vec::new();
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
                going_on.push((class, generation));
            }
        }
        self.running = going_on;
        Ok(())
    }

    fn ended(&self, class: Priority) -> usize {
        self.ended.iter().filter(|ended| **ended == class).count()
    }
}

/// The batch is full of long answers, and as many again wait, when one of class high comes.
async fn overtaking(on: &Started, report: &mut Report) -> Result<(), AnyError> {
    let mut race = Race::default();
    let before = on.work.hold();
    for salt in 0..2 * PLACES {
        race.enter(on, Priority::Normal, salt, 64)?;
    }
    on.work.begun(before + 1).await;
    for _ in 0..2 * PLACES {
        on.work.advance().await;
    }
    race.enter(on, Priority::High, 100, 1)?;
    let steps = race.until_ended(Priority::High, &on.work).await?;
    let normal = race.ended(Priority::Normal);
    report.bar("priority normal ended before high", normal, "<= 0", normal == 0);
    report.bar(
        "priority steps until high's first token",
        steps,
        format!("<= {MOST_STEPS}"),
        steps <= MOST_STEPS,
    );
    on.work.open();
    on.engine.stop().await;
    Ok(())
}

/// Eighty of class high are there, all of which came earlier, when one of class low begins to wait.
async fn low_beside_many(on: &Started, report: &mut Report) -> Result<(), AnyError> {
    let mut race = Race::default();
    let before = on.work.hold();
    // Takes the step that is held while the others come.
    race.enter(on, Priority::Normal, 1, 1)?;
    on.work.begun(before + 1).await;
    for salt in 300..380 {
        race.enter(on, Priority::High, salt, 8)?;
    }
    race.enter(on, Priority::Low, 200, 1)?;
    // Whenever that one ends, there is a step after it.
    race.enter(on, Priority::Low, 201, 128)?;
    race.until_ended(Priority::Low, &on.work).await?;
    let order = on.work.prompts();
    let at = order.iter().position(|first| *first == token(0, 200)).unwrap_or(order.len());
    // Before it are the one that took the step, and those of class high.
    let begun = at.saturating_sub(1);
    let ended = race.ended(Priority::High);
    for (name, high) in [("begun", begun), ("ended", ended)] {
        report.bar(
            &format!("priority high {name} before low"),
            high,
            format!("1..={MOST_BEFORE_LOW}"),
            (1..=MOST_BEFORE_LOW).contains(&high),
        );
    }
    on.work.open();
    on.engine.stop().await;
    Ok(())
}
