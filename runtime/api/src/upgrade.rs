//! Connections that leave HTTP: what a route does with its connection once `101 Switching Protocols` is sent.
//!
//! The listener runs it as part of the connection. So it counts against the budget for connections, the end
//! of the listener waits for it, and dropping the listener's future cuts it off.

use std::sync::{Arc, Mutex, PoisonError};

use axum::response::Response;
use futures::future::BoxFuture;

/// The work of a connection after its upgrade. It travels in the extensions of the 101 answer.
#[derive(Clone, Default)]
pub(crate) struct AfterUpgrade(Arc<Mutex<Option<BoxFuture<'static, ()>>>>);

impl AfterUpgrade {
    /// `work` waits for the upgraded connection itself.
    pub(crate) fn new(work: BoxFuture<'static, ()>) -> Self {
        Self(Arc::new(Mutex::new(Some(work))))
    }

    /// Moves the work of an answer, where it has any, to the connection that waits in `self`.
    pub(crate) fn take_from(&self, response: &mut Response) {
        if let Some(answered) = response.extensions_mut().remove::<Self>() {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = answered.take();
        }
    }

    /// The work, once.
    pub(crate) fn take(&self) -> Option<BoxFuture<'static, ()>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
