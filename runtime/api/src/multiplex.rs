//! Several requests at once over one connection or call: each has an id of the caller's choice, and its
//! replies come as they are made, between those of the others.
//!
//! WebSocket (`websocket/`) and gRPC's Session (`grpc/session.rs`) share it. Nothing here reads or writes: a
//! [`Multiplexer`] is polled for the next reply when the caller can take one, so a caller that does not read
//! slows its own requests down and nothing is queued for it beyond the budget of each answer.

use std::panic::AssertUnwindSafe;

use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt};
use tokio_stream::StreamMap;

use crate::contain::panicked;
use crate::error::ApiError;
use crate::limits::CallerLimits;

/// Requests of one connection or call that run at a time. Their unread answers take up to 64 KiB each, 8 MiB
/// together. A step of the engine that gives each of them a token makes 128 * 128 streams be looked at, which
/// takes less than a millisecond.
pub(crate) const MAX_REQUESTS: usize = 128;
/// The longest id, in bytes: every reply repeats it.
pub(crate) const MAX_ID_BYTES: usize = 128;
/// Seconds after which a request beyond [`MAX_REQUESTS`] may be sent again.
const RETRY_AFTER_S: u32 = 1;

/// One message of an answer.
pub(crate) trait RequestReply: Send + 'static {
    /// Whether it is the last one of its request.
    fn is_last(&self) -> bool;
    /// The last message of a request that failed.
    fn failed(error: ApiError) -> Self;
}

/// The running requests of one connection or call. Dropping it cancels all of them.
pub(crate) struct Multiplexer<R> {
    replies: StreamMap<String, BoxStream<'static, R>>,
    limits: CallerLimits,
    /// The field of a request that holds its id.
    id_field: &'static str,
}

impl<R: RequestReply> Multiplexer<R> {
    /// None run yet. Requests count against the budgets of this caller.
    pub(crate) fn new(id_field: &'static str, limits: CallerLimits) -> Self {
        Self { replies: StreamMap::new(), limits, id_field }
    }

    /// Whether no request runs.
    pub(crate) fn is_idle(&self) -> bool {
        self.replies.is_empty()
    }

    /// Whether this can be the id of a request.
    ///
    /// # Errors
    /// An empty or a long id.
    pub(crate) fn check_id(&self, id: &str) -> Result<(), ApiError> {
        if (1..=MAX_ID_BYTES).contains(&id.len()) {
            return Ok(());
        }
        let message = format!("has {} bytes: name the request in 1 to {MAX_ID_BYTES} bytes", id.len());
        Err(ApiError::field(self.id_field, message))
    }

    /// Starts a request whose message had `bytes`.
    ///
    /// # Errors
    /// An id that is in use: the request that runs under it is cancelled as well, so that one error ends
    /// both. Too many requests; a budget in use.
    pub(crate) fn start(
        &mut self,
        id: &str,
        bytes: usize,
        replies: impl Stream<Item = R> + Send + 'static,
    ) -> Result<(), ApiError> {
        self.check_id(id)?;
        if self.cancel(id) {
            let message = "is in use by a request that still ran; both are cancelled: give each its own";
            return Err(ApiError::field(self.id_field, message));
        }
        if self.replies.len() >= MAX_REQUESTS {
            let message = format!(
                "{MAX_REQUESTS} requests run here, the most at a time; wait for one to end, or connect again"
            );
            return Err(ApiError::Overloaded { message, retry_after_s: RETRY_AFTER_S });
        }
        let unread = self.limits.answer()?;
        let mut body = Some(self.limits.request_bytes(bytes)?);
        let contained = AssertUnwindSafe(replies)
            .catch_unwind()
            .map(|reply| reply.unwrap_or_else(|payload| R::failed(panicked(payload.as_ref()))));
        let ends = stream::once(async { R::failed(ApiError::ended_early()) });
        let metered = contained.chain(ends).map(move |reply| {
            let _counts_while_the_request_runs = &unread;
            // As over HTTP, the request itself counts until its answer begins.
            drop(body.take());
            reply
        });
        self.replies.insert(id.to_owned(), metered.boxed());
        Ok(())
    }

    /// Ends a request without a reply. Returns whether it ran.
    pub(crate) fn cancel(&mut self, id: &str) -> bool {
        self.replies.remove(id).is_some()
    }

    /// Ends every request without a reply.
    pub(crate) fn clear(&mut self) {
        self.replies.clear();
    }

    /// The next reply of any request, with its id. Waits for ever while none runs. Dropping the future loses
    /// nothing.
    pub(crate) async fn next(&mut self) -> Identified<R> {
        match self.replies.next().await {
            Some((id, reply)) => {
                if reply.is_last() {
                    self.replies.remove(&id);
                }
                Identified { id, reply }
            }
            None => std::future::pending().await,
        }
    }
}

/// A reply with the id of its request.
#[derive(Debug, PartialEq)]
pub(crate) struct Identified<R> {
    pub(crate) id: String,
    pub(crate) reply: R,
}

/// The refusal of a request that comes while the server ends.
pub(crate) fn server_is_ending() -> ApiError {
    let message =
        "the server is ending: it finishes what runs and takes nothing new; connect again".to_owned();
    ApiError::Unavailable { message, retry_after_s: Some(RETRY_AFTER_S) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use futures::channel::mpsc;

    #[derive(Debug, PartialEq)]
    enum Told {
        Piece(u32),
        Finished,
        Failed(ApiError),
    }

    impl RequestReply for Told {
        fn is_last(&self) -> bool {
            !matches!(self, Self::Piece(_))
        }
        fn failed(error: ApiError) -> Self {
            Self::Failed(error)
        }
    }

    fn gives_up() -> Told {
        panic!("a library gave up")
    }

    fn multiplexer() -> Multiplexer<Told> {
        Multiplexer::new("id", CallerLimits::default())
    }

    fn named(id: &str, reply: Told) -> Identified<Told> {
        Identified { id: id.into(), reply }
    }

    #[tokio::test]
    async fn replies_of_several_requests_come_as_they_are_made() {
        let mut all = multiplexer();
        let (mut first, replies) = mpsc::channel(4);
        all.start("a", 0, replies).unwrap();
        let (mut second, replies) = mpsc::channel(4);
        all.start("b", 0, replies).unwrap();
        assert!(all.next().now_or_never().is_none());
        second.try_send(Told::Piece(1)).unwrap();
        assert_eq!(all.next().await, named("b", Told::Piece(1)));
        first.try_send(Told::Piece(2)).unwrap();
        assert_eq!(all.next().await, named("a", Told::Piece(2)));
        second.try_send(Told::Finished).unwrap();
        assert_eq!(all.next().await, named("b", Told::Finished));
        assert!(second.is_closed(), "the work ends with its last reply");
        let (_third, replies) = mpsc::channel(1);
        all.start("b", 0, replies).unwrap();
        assert!(!first.is_closed());
    }

    #[tokio::test]
    async fn cancelling_and_dropping_end_the_work() {
        let mut all = multiplexer();
        let (first, replies) = mpsc::channel(1);
        all.start("a", 0, replies).unwrap();
        let (second, replies) = mpsc::channel(1);
        all.start("b", 0, replies).unwrap();
        assert!(all.cancel("a") && first.is_closed() && !second.is_closed());
        assert!(!all.cancel("a"));
        drop(all);
        assert!(second.is_closed());
    }

    #[tokio::test]
    async fn an_id_in_use_ends_both_requests_with_one_error() {
        let mut all = multiplexer();
        let (first, replies) = mpsc::channel(1);
        all.start("a", 0, replies).unwrap();
        let error = all.start("a", 0, stream::pending()).unwrap_err();
        assert!(first.is_closed() && all.is_idle(), "{error}");
        assert!(error.to_string().starts_with("id: is in use"), "{error}");
        assert!(all.start("a", 0, stream::pending()).is_ok());
        for id in [String::new(), "x".repeat(MAX_ID_BYTES + 1)] {
            assert_eq!(all.start(&id, 0, stream::pending()).unwrap_err().kind(), "invalid_request");
        }
    }

    #[tokio::test]
    async fn requests_are_bounded_in_number_and_by_the_budgets() {
        let mut all = multiplexer();
        for id in 0..MAX_REQUESTS {
            all.start(&id.to_string(), 0, stream::pending()).unwrap();
        }
        assert_eq!(all.start("more", 0, stream::pending()).unwrap_err().kind(), "overloaded");
        assert!(all.cancel("7"));
        all.start("more", 0, stream::pending()).unwrap();

        let mut all = multiplexer();
        let half = 64 << 20;
        all.start("a", half, stream::iter([Told::Piece(1)]).chain(stream::pending())).unwrap();
        assert_eq!(all.start("b", 1, stream::pending()).unwrap_err().kind(), "overloaded");
        all.next().await;
        all.start("b", half, stream::pending()).unwrap();
    }

    #[tokio::test]
    async fn a_panic_and_an_early_end_become_the_error_of_their_request() {
        let mut all = multiplexer();
        all.start("a", 0, stream::once(async { gives_up() })).unwrap();
        let Identified { id, reply } = all.next().await;
        assert!(matches!(reply, Told::Failed(ApiError::Internal { .. })) && id == "a" && all.is_idle());
        all.start("b", 0, stream::iter([Told::Piece(1)])).unwrap();
        all.next().await;
        assert!(matches!(all.next().await.reply, Told::Failed(ApiError::Internal { .. })));
    }
}
