//! Says in the log when spans cannot be sent, and when they can again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};

/// An exporter whose failures are logged once, not for each batch.
#[derive(Debug)]
pub(super) struct LoggedExporter<E> {
    inner: E,
    destination: String,
    failing: AtomicBool,
}

impl<E> LoggedExporter<E> {
    pub(super) fn new(inner: E, destination: String) -> Self {
        Self { inner, destination, failing: AtomicBool::new(false) }
    }
}

impl<E: SpanExporter> SpanExporter for LoggedExporter<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let outcome = self.inner.export(batch).await;
        let failed_before = self.failing.swap(outcome.is_err(), Ordering::Relaxed);
        let destination = &self.destination;
        match &outcome {
            Err(error) if !failed_before => {
                tracing::warn!(destination, spans, %error, "spans are lost: they cannot be exported");
            }
            Ok(()) if failed_before => tracing::info!(destination, "spans are exported again"),
            _ => {}
        }
        outcome
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}
