//! Adding and removing adapters while the engine serves.

use super::Engine;
use crate::adapters::{AdapterChangeError, DropAdapter, PutAdapter};
use crate::generation::device::DeviceJob;
use std::sync::PoisonError;
use tokio::sync::oneshot;
use trustformers_plan::Adapter;

impl Engine {
    /// Adds an adapter under its name: requests choose it by [`crate::GenerateParams::adapter`]. Requests in
    /// flight go on. The engine must have room for it ([`crate::EngineConfig::adapters`]).
    ///
    /// # Errors
    /// A name that is in use, no free slot, an adapter that does not fit the model, or an engine that ends.
    pub async fn add_adapter(&self, adapter: Adapter) -> Result<(), AdapterChangeError> {
        self.send_adapter(adapter)?.await.unwrap_or(Err(AdapterChangeError::Stopped))
    }

    /// [`Self::add_adapter`] for callers that may block, outside of asynchronous code.
    ///
    /// # Errors
    /// As [`Self::add_adapter`].
    ///
    /// # Panics
    /// In asynchronous code.
    pub fn add_adapter_blocking(&self, adapter: Adapter) -> Result<(), AdapterChangeError> {
        self.send_adapter(adapter)?.blocking_recv().unwrap_or(Err(AdapterChangeError::Stopped))
    }

    /// Removes an adapter: no request can choose it from now on. Returns when the requests that have chosen
    /// it have ended and its memory is free. It goes on when the future is dropped.
    ///
    /// # Errors
    /// [`AdapterChangeError::Unknown`], or an engine that ends meanwhile.
    pub async fn remove_adapter(&self, name: &str) -> Result<(), AdapterChangeError> {
        let (reply, gone) = oneshot::channel();
        {
            // Under the lock under which requests look their adapters up and are sent: every request that has
            // chosen it is before this in the channel.
            let jobs = self.inner.jobs.lock().unwrap_or_else(PoisonError::into_inner);
            let sender = jobs.as_ref().ok_or(AdapterChangeError::Stopped)?;
            let adapter = self.inner.adapters.withdraw(name)?;
            let job = DeviceJob::DropAdapter(DropAdapter { adapter, reply });
            sender.try_send(job).map_err(|_| AdapterChangeError::Stopped)?;
        }
        gone.await.map_err(|_| AdapterChangeError::Stopped)
    }

    /// The names of the adapters that requests can choose.
    pub fn adapters(&self) -> Vec<String> {
        self.inner.adapters.names()
    }

    /// Reserves a slot and asks the device thread to fill it.
    fn send_adapter(
        &self,
        adapter: Adapter,
    ) -> Result<oneshot::Receiver<Result<(), AdapterChangeError>>, AdapterChangeError> {
        let (reply, done) = oneshot::channel();
        let jobs = self.inner.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let sender = jobs.as_ref().ok_or(AdapterChangeError::Stopped)?;
        let slot = self.inner.adapters.reserve(&adapter.name)?;
        let job = DeviceJob::PutAdapter(PutAdapter { slot, adapter, reply });
        sender.try_send(job).map_err(|_| AdapterChangeError::Stopped)?;
        Ok(done)
    }
}
