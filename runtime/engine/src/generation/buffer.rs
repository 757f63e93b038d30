//! The events between the device thread and the callers, and the bound on all of them together.
//!
//! The device thread never waits for a reader, so events wait for their readers in memory. All unread events
//! of an engine share one budget ([`AnswerBudget`]). When it is used up, the answer with the most unread
//! bytes is discarded: its events are replaced by one error, and its sequence ends. An answer whose reader
//! keeps up has hardly any unread bytes, so a stalled reader never harms another request.

use crate::faults::RequestFault;
use crate::request::{EventResult, GenerationEvent};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};

/// Bytes that all unread events of one engine may take. An event takes some 230 bytes, with 20 log
/// probabilities some 390. So 32 MiB are some 140,000 events: 17 unread answers of 8192 tokens, or 260 unread
/// tokens of each of the 560 requests that the default configuration lets in flight, which a full batch takes
/// more than ten seconds to produce.
pub(crate) const ANSWER_BUFFER_BYTES: usize = 32 << 20;

/// Slots of an empty queue that are kept for the next events.
const IDLE_EVENTS: usize = 32;

/// The budget of one engine for unread events.
#[derive(Debug)]
pub(crate) struct AnswerBudget {
    limit_bytes: usize,
    unread_bytes: AtomicUsize,
    buffers: Mutex<Buffers>,
}

/// The buffers that a reader still has.
#[derive(Debug, Default)]
struct Buffers {
    next_id: u64,
    by_id: BTreeMap<u64, Weak<EventBuffer>>,
}

/// One answer's unread events.
#[derive(Debug)]
struct EventBuffer {
    id: u64,
    budget: Arc<AnswerBudget>,
    /// Bytes of `state.events`, readable without the lock.
    unread_bytes: AtomicUsize,
    state: Mutex<BufferState>,
}

#[derive(Debug, Default)]
struct BufferState {
    events: VecDeque<EventResult>,
    /// Of the reader that waits.
    waker: Option<Waker>,
    /// The reader was dropped, or the answer was discarded.
    closed: bool,
    discarded: bool,
    /// The sender was dropped.
    complete: bool,
}

/// The device thread's end of an answer. Dropping it ends the stream.
#[derive(Debug)]
pub(crate) struct EventSender {
    buffer: Arc<EventBuffer>,
}

/// The caller's end of an answer. Dropping it cancels the generation.
#[derive(Debug)]
pub(crate) struct EventReceiver {
    buffer: Arc<EventBuffer>,
}

/// Bytes that an event takes while it is unread. A queue doubles when it grows, so that half of its slots may
/// be empty.
fn event_bytes(event: &EventResult) -> usize {
    let payload = match event {
        Ok(GenerationEvent::Token { text, logprobs, .. }) => {
            let top = logprobs.as_ref().map_or(0, |logprobs| logprobs.top.capacity());
            text.capacity() + top * size_of::<(u32, f32)>()
        }
        Ok(GenerationEvent::Finished { .. }) | Err(_) => 0,
    };
    2 * size_of::<EventResult>() + payload
}

impl AnswerBudget {
    pub(crate) fn new(limit_bytes: usize) -> Arc<Self> {
        Arc::new(Self { limit_bytes, unread_bytes: AtomicUsize::new(0), buffers: Mutex::default() })
    }

    /// Bytes of all unread events.
    pub(crate) fn unread_bytes(&self) -> usize {
        self.unread_bytes.load(Ordering::SeqCst)
    }

    /// The two ends of a new answer.
    pub(crate) fn channel(self: &Arc<Self>) -> (EventSender, EventReceiver) {
        let mut buffers = self.lock();
        let id = buffers.next_id;
        buffers.next_id += 1;
        let buffer = Arc::new(EventBuffer {
            id,
            budget: Arc::clone(self),
            unread_bytes: AtomicUsize::new(0),
            state: Mutex::default(),
        });
        buffers.by_id.insert(id, Arc::downgrade(&buffer));
        (EventSender { buffer: Arc::clone(&buffer) }, EventReceiver { buffer })
    }

    fn lock(&self) -> MutexGuard<'_, Buffers> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Discards the largest answers until the unread bytes are within the limit.
    fn enforce(&self) {
        while self.unread_bytes() > self.limit_bytes {
            let largest = {
                let buffers = self.lock();
                let live = buffers.by_id.values().filter_map(Weak::upgrade);
                live.max_by_key(|buffer| buffer.unread_bytes.load(Ordering::SeqCst))
            };
            let Some(largest) = largest else { return };
            // Another thread may have read it since; then nothing is left to discard.
            if !largest.discard(self.limit_bytes) {
                return;
            }
        }
    }
}

impl EventBuffer {
    fn lock(&self) -> MutexGuard<'_, BufferState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn charge(&self, bytes: usize) {
        self.unread_bytes.fetch_add(bytes, Ordering::SeqCst);
        self.budget.unread_bytes.fetch_add(bytes, Ordering::SeqCst);
    }

    fn refund(&self, bytes: usize) {
        self.unread_bytes.fetch_sub(bytes, Ordering::SeqCst);
        self.budget.unread_bytes.fetch_sub(bytes, Ordering::SeqCst);
    }

    /// Replaces all unread events by an error. False where it was closed already or holds nothing.
    fn discard(&self, limit_bytes: usize) -> bool {
        let mut state = self.lock();
        if state.closed || state.events.is_empty() {
            return false;
        }
        let unread_bytes = state.events.iter().map(event_bytes).sum();
        self.refund(unread_bytes);
        let error = Err(RequestFault::UnreadAnswer { unread_bytes, limit_bytes }.into());
        self.charge(event_bytes(&error));
        state.events = VecDeque::from([error]);
        (state.closed, state.discarded) = (true, true);
        tracing::warn!(unread_bytes, limit_bytes, "an answer that was not read was discarded");
        wake(state);
        true
    }
}

/// Wakes the reader after the lock is released.
fn wake(mut state: MutexGuard<'_, BufferState>) {
    let waker = state.waker.take();
    drop(state);
    if let Some(waker) = waker {
        waker.wake();
    }
}

impl EventSender {
    /// Adds an event. A closed buffer drops it; the next sweep of the device thread ends the sequence.
    pub(crate) fn send(&self, event: EventResult) {
        let mut state = self.buffer.lock();
        if state.closed {
            return;
        }
        self.buffer.charge(event_bytes(&event));
        state.events.push_back(event);
        wake(state);
        self.buffer.budget.enforce();
    }

    /// Whether the reader was dropped or the answer was discarded.
    pub(crate) fn is_closed(&self) -> bool {
        self.buffer.lock().closed
    }

    /// Whether the answer was discarded because it was not read.
    pub(crate) fn is_discarded(&self) -> bool {
        self.buffer.lock().discarded
    }
}

impl Drop for EventSender {
    fn drop(&mut self) {
        let mut state = self.buffer.lock();
        state.complete = true;
        wake(state);
    }
}

impl EventReceiver {
    /// The next event; `None` at the end.
    pub(crate) fn poll_recv(&self, context: &mut Context<'_>) -> Poll<Option<EventResult>> {
        let mut state = self.buffer.lock();
        if let Some(event) = state.events.pop_front() {
            self.buffer.refund(event_bytes(&event));
            if state.events.is_empty() {
                state.events.shrink_to(IDLE_EVENTS);
            }
            return Poll::Ready(Some(event));
        }
        if state.complete || state.discarded {
            return Poll::Ready(None);
        }
        state.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Drop for EventReceiver {
    fn drop(&mut self) {
        let mut state = self.buffer.lock();
        state.closed = true;
        let events = std::mem::take(&mut state.events);
        drop(state);
        self.buffer.refund(events.iter().map(event_bytes).sum());
        self.buffer.budget.lock().by_id.remove(&self.buffer.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::GenerateError;
    use futures::FutureExt;
    use futures::future::poll_fn;

    fn token(text: &str) -> EventResult {
        Ok(GenerationEvent::Token { id: 1, text: text.into(), margin: None, logprobs: None })
    }

    /// The event that is there; `None` where the reader would wait.
    fn read(receiver: &EventReceiver) -> Option<Option<EventResult>> {
        poll_fn(|context| receiver.poll_recv(context)).now_or_never()
    }

    #[test]
    fn events_arrive_in_order_and_end_with_the_sender() {
        let budget = AnswerBudget::new(ANSWER_BUFFER_BYTES);
        let (sender, receiver) = budget.channel();
        assert_eq!(read(&receiver), None);
        sender.send(token("a"));
        sender.send(token("b"));
        assert!(budget.unread_bytes() > 0);
        drop(sender);
        let all = [(); 3].map(|()| read(&receiver).unwrap());
        assert_eq!(all, [Some(token("a")), Some(token("b")), None]);
        assert_eq!(budget.unread_bytes(), 0);
    }

    #[tokio::test]
    async fn a_waiting_reader_is_woken_by_an_event_and_by_the_end() {
        let (sender, receiver) = AnswerBudget::new(ANSWER_BUFFER_BYTES).channel();
        let reading = tokio::spawn(async move {
            let mut events = Vec::new();
            while let Some(event) = poll_fn(|context| receiver.poll_recv(context)).await {
                events.push(event);
            }
            events
        });
        tokio::task::yield_now().await;
        sender.send(token("a"));
        tokio::task::yield_now().await;
        drop(sender);
        assert_eq!(reading.await.unwrap(), [token("a")]);
    }

    #[test]
    fn the_largest_unread_answer_is_discarded_and_no_other() {
        let limit_bytes = 20 * event_bytes(&token("x"));
        let budget = AnswerBudget::new(limit_bytes);
        let (stalled, stalled_reader) = budget.channel();
        let (read_now, reader) = budget.channel();
        for _ in 0..100 {
            stalled.send(token("x"));
            read_now.send(token("x"));
            assert_eq!(read(&reader), Some(Some(token("x"))));
            assert!(budget.unread_bytes() <= limit_bytes);
        }
        assert!(stalled.is_closed() && stalled.is_discarded());
        assert!(!read_now.is_closed() && !read_now.is_discarded());
        let Some(Some(Err(GenerateError::Request(fault)))) = read(&stalled_reader) else { panic!() };
        assert!(matches!(fault, RequestFault::UnreadAnswer { .. }), "{fault}");
        assert!(fault.to_string().contains("read the stream as it comes"), "{fault}");
        assert_eq!(read(&stalled_reader), Some(None), "nothing follows the error");
        assert_eq!(budget.unread_bytes(), 0);
    }

    #[test]
    fn finished_answers_that_are_not_read_are_bounded_in_sum() {
        let limit_bytes = 1000 * event_bytes(&token("x"));
        let budget = AnswerBudget::new(limit_bytes);
        let readers: Vec<EventReceiver> = (0..50)
            .map(|_| {
                let (sender, receiver) = budget.channel();
                (0..100).for_each(|_| sender.send(token("x")));
                receiver
            })
            .collect();
        assert!(budget.unread_bytes() <= limit_bytes, "{}", budget.unread_bytes());
        drop(readers);
        assert_eq!((budget.unread_bytes(), budget.lock().by_id.len()), (0, 0));
    }

    #[test]
    fn a_dropped_reader_closes_its_answer_and_refunds_its_bytes() {
        let budget = AnswerBudget::new(ANSWER_BUFFER_BYTES);
        let (sender, receiver) = budget.channel();
        sender.send(token("a"));
        drop(receiver);
        assert!(sender.is_closed() && !sender.is_discarded());
        sender.send(token("b"));
        assert_eq!(budget.unread_bytes(), 0);
    }
}
