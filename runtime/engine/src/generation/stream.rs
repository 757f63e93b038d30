//! The caller's end of a generation: a stream of events. Dropping it cancels the work.

use super::buffer::EventReceiver;
use crate::request::{EventResult, GenerateError, GenerationEvent};
use futures::{Stream, StreamExt};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

/// A running generation. Yields [`GenerationEvent`]s, at the end `Finished` or an error, then nothing.
///
/// Dropping it cancels the generation, whether it waits, reads its prompt or produces tokens. Its KV blocks
/// are free again before the next step. Read it as events come: unread events take memory, and where the
/// memory for all unread answers of an engine is used up, the largest one ends with
/// [`RequestFault::UnreadAnswer`](crate::RequestFault::UnreadAnswer).
#[derive(Debug)]
pub struct Generation {
    events: EventReceiver,
    prompt_ids: Arc<[u32]>,
    ended: bool,
}

impl Generation {
    pub(super) fn new(events: EventReceiver, prompt_ids: Arc<[u32]>) -> Self {
        Self { events, prompt_ids, ended: false }
    }

    /// The ids of the prompt, including a begin token where the model asks for one.
    pub fn prompt_ids(&self) -> &[u32] {
        &self.prompt_ids
    }

    /// Waits on the current thread for the next event; for programs and tests without an async runtime.
    ///
    /// # Panics
    /// When called from within an executor of the `futures` crate. In any other async runtime it blocks the
    /// thread.
    pub fn blocking_next(&mut self) -> Option<EventResult> {
        futures::executor::block_on(self.next())
    }
}

impl Stream for Generation {
    type Item = EventResult;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        // Events that end without a last one mean that the device thread died.
        let event = ready!(self.events.poll_recv(cx)).unwrap_or(Err(GenerateError::Stopped));
        self.ended = !matches!(event, Ok(GenerationEvent::Token { .. }));
        Poll::Ready(Some(event))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generation::buffer::{ANSWER_BUFFER_BYTES, AnswerBudget};

    #[tokio::test]
    async fn a_sender_that_ends_early_is_reported_as_one_error() {
        let (sender, receiver) = AnswerBudget::new(ANSWER_BUFFER_BYTES).channel();
        let token = GenerationEvent::Token { id: 1, text: "a".into(), margin: None, logprobs: None };
        sender.send(Ok(token.clone()));
        drop(sender);
        let all: Vec<_> = Generation::new(receiver, Arc::from([7])).collect().await;
        assert_eq!(all, vec![Ok(token), Err(GenerateError::Stopped)]);
    }
}
