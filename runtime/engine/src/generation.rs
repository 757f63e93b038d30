//! The caller's end of one generation: a stream of events that cancels the work when it is dropped.

use crate::request::{GenerateError, GenerationEvent};
use futures::Stream;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::sync::mpsc;

/// What travels from the device thread to a caller.
pub(crate) type EventResult = Result<GenerationEvent, GenerateError>;

/// A generation under way. Yields [`GenerationEvent`]s, at the end `Finished` or an error, then nothing.
///
/// Dropping it cancels the generation wherever it is: still queued, reading its prompt or producing tokens. Its KV
/// blocks are free again before the next step.
#[derive(Debug)]
pub struct Generation {
    events: mpsc::Receiver<EventResult>,
    prompt_ids: Arc<[u32]>,
    ended: bool,
}

impl Generation {
    pub(crate) fn new(events: mpsc::Receiver<EventResult>, prompt_ids: Arc<[u32]>) -> Self {
        Self { events, prompt_ids, ended: false }
    }

    /// The ids that the prompt became, a begin token included where the model asks for one.
    pub fn prompt_ids(&self) -> &[u32] {
        &self.prompt_ids
    }

    /// Waits on the current thread for the next event; for programs and tests without an async runtime.
    ///
    /// # Panics
    /// When called from within an async runtime.
    pub fn blocking_next(&mut self) -> Option<EventResult> {
        if self.ended {
            return None;
        }
        let event = self.events.blocking_recv();
        Some(self.note(event))
    }

    /// Turns the end of the channel into the end of the stream, exactly once.
    fn note(&mut self, event: Option<EventResult>) -> EventResult {
        let event = event.unwrap_or(Err(GenerateError::Stopped));
        self.ended = !matches!(event, Ok(GenerationEvent::Token { .. }));
        event
    }
}

impl Stream for Generation {
    type Item = EventResult;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let event = ready!(self.events.poll_recv(cx));
        Poll::Ready(Some(self.note(event)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::StreamExt;

    #[tokio::test]
    async fn a_channel_that_closes_early_is_an_error_once() {
        let (sender, receiver) = mpsc::channel(4);
        let token = GenerationEvent::Token { id: 1, text: "a".into(), margin: None, logprobs: None };
        sender.send(Ok(token.clone())).await.unwrap();
        drop(sender);
        let all: Vec<_> = Generation::new(receiver, Arc::from([7])).collect().await;
        assert_eq!(all, vec![Ok(token), Err(GenerateError::Stopped)]);
    }
}
