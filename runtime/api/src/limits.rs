//! The budgets of one process, shared by its listeners and fair between its callers.

use std::net::Ipv4Addr;
use std::sync::Arc;

use crate::Api;
use crate::budget::{Caller, FairBudget, Share};
use crate::error::ApiError;
use crate::overload::OverloadGate;

/// Unsent bytes of one answer that the listener buffers. Tokens are some hundred bytes each, so this is a
/// second or more of the fastest answer.
pub(crate) const SEND_BUFFER_BYTES: usize = 64 * 1024;
/// Connections of one process: at about 20 KiB each 40 MiB. One caller may have half of them.
const MAX_CONNECTIONS: usize = 2048;
/// Bytes of request bodies that are being read or handled: 32 bodies of the longest length (4 MiB). One
/// caller may have half of them.
const MAX_REQUEST_BYTES: usize = 128 * 1024 * 1024;
/// Bytes of answers that wait for their clients: 4,096 send buffers. One caller may have half of them, as
/// many as one connection has streams.
const MAX_ANSWER_BYTES: usize = 4096 * SEND_BUFFER_BYTES;
/// Seconds after which a request that found a budget in use may be sent again.
const RETRY_AFTER_S: u32 = 1;

/// What the callers of one process share. Clones share the same budgets.
#[derive(Debug, Clone)]
pub struct Limits {
    pub(crate) connections: Arc<FairBudget>,
    pub(crate) request_bytes: Arc<FairBudget>,
    pub(crate) answer_bytes: Arc<FairBudget>,
    /// What refuses requests while the server of models is full; none: its routes do.
    pub(crate) overload: Option<Arc<OverloadGate>>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: FairBudget::new(MAX_CONNECTIONS),
            request_bytes: FairBudget::new(MAX_REQUEST_BYTES),
            answer_bytes: FairBudget::new(MAX_ANSWER_BYTES),
            overload: None,
        }
    }
}

impl Limits {
    /// With requests to generate refused before they are parsed while the models of `api` are full. For
    /// listeners of its routes.
    #[must_use]
    pub fn refusing_early(self, api: &Api) -> Self {
        Self { overload: Some(Arc::new(OverloadGate::new(api))), ..self }
    }

    /// The budgets as this caller sees them.
    pub(crate) fn of(&self, caller: Caller) -> CallerLimits {
        CallerLimits { limits: self.clone(), caller }
    }
}

/// The budgets of a process for one caller. The listener puts them into the extensions of each request, for
/// routes that hold more than one request and its answer: decoded bodies, and the requests of one connection
/// or call.
#[derive(Debug, Clone)]
pub(crate) struct CallerLimits {
    limits: Limits,
    caller: Caller,
}

impl Default for CallerLimits {
    /// Budgets that nobody shares, for a router that no listener of [`crate::server`] serves.
    fn default() -> Self {
        Limits::default().of(Caller::at(Ipv4Addr::LOCALHOST.into()))
    }
}

impl CallerLimits {
    /// A share for the bytes of a request.
    ///
    /// # Errors
    /// [`ApiError::Overloaded`] where the caller would hold more than what is left for the others.
    pub(crate) fn request_bytes(&self, bytes: usize) -> Result<Share, ApiError> {
        self.limits.request_bytes.try_acquire(self.caller, bytes).ok_or_else(too_many_request_bytes)
    }

    /// A share for bytes of an answer beside its send buffer, which are held until it is read.
    ///
    /// # Errors
    /// [`ApiError::Overloaded`] where the caller would hold more than what is left for the others.
    pub(crate) fn answer_bytes(&self, bytes: usize) -> Result<Share, ApiError> {
        self.limits.answer_bytes.try_acquire(self.caller, bytes).ok_or_else(too_many_answers)
    }

    /// A share for an answer that its client reads as it comes, of [`SEND_BUFFER_BYTES`].
    ///
    /// # Errors
    /// [`ApiError::Overloaded`] where the caller would hold more than what is left for the others.
    pub(crate) fn answer(&self) -> Result<Share, ApiError> {
        self.answer_bytes(SEND_BUFFER_BYTES)
    }
}

/// The refusal of a body that finds no room.
pub(crate) fn too_many_request_bytes() -> ApiError {
    let message = "the memory for request bodies is in use; send the request again later".to_owned();
    ApiError::Overloaded { message, retry_after_s: RETRY_AFTER_S }
}

/// The refusal of a request whose answer would find no room.
pub(crate) fn too_many_answers() -> ApiError {
    let message =
        "too many answers are waiting for their clients to read them; read them, or ask again later";
    ApiError::Overloaded { message: message.to_owned(), retry_after_s: RETRY_AFTER_S }
}
