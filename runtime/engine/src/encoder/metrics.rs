//! The encoder engine's Prometheus series: those that all engines share, and those of batches.

use crate::metrics::{CancellationMetrics, EngineMetrics, TenantMetrics};
use prometheus::{Histogram, HistogramOpts, HistogramVec, IntCounter, IntGauge, Registry};

/// Upper bounds of texts in a step, up to the largest batch.
const TEXTS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

/// Upper bounds of tokens in a step.
const TOKENS: &[f64] = &[16.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0];

/// Upper bounds of a step's time in seconds, from one short text of a small model on.
const SECONDS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// The families of all encoder engines of a process; cheap to clone.
#[derive(Clone, Debug)]
pub struct EncoderMetrics {
    pub(super) engines: EngineMetrics,
    texts: HistogramVec,
    tokens: HistogramVec,
    seconds: HistogramVec,
}

impl EncoderMetrics {
    /// Registers the families, beside those that all engines share.
    ///
    /// # Errors
    /// When the registry already has families of these names: register once per process and clone the value.
    pub fn register(registry: &Registry, engines: &EngineMetrics) -> Result<Self, prometheus::Error> {
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            let family = HistogramVec::new(options, &["model"])?;
            registry.register(Box::new(family.clone()))?;
            Ok::<_, prometheus::Error>(family)
        };
        Ok(Self {
            engines: engines.clone(),
            texts: histogram(
                "trustformers_batch_texts",
                "Texts that an encoder computed in one step.",
                TEXTS,
            )?,
            tokens: histogram(
                "trustformers_batch_tokens",
                "Tokens that an encoder computed in one step.",
                TOKENS,
            )?,
            seconds: histogram("trustformers_batch_seconds", "Time of an encoder's step.", SECONDS)?,
        })
    }

    /// Families without an exporter, for tests and one-shot commands.
    ///
    /// # Errors
    /// None in practice: a new registry refuses nothing.
    pub fn unregistered() -> Result<Self, prometheus::Error> {
        Self::register(&Registry::new(), &EngineMetrics::unregistered()?)
    }

    /// The series of one label.
    pub(super) fn for_model(&self, label: &str) -> EncoderSeries {
        let outcome = |name| self.engines.requests.with_label_values(&[label, name]);
        EncoderSeries {
            done: outcome("done"),
            cancelled: outcome("cancelled"),
            cancellations: self.engines.cancellations(label),
            failed: outcome("failed"),
            overloaded: outcome("overloaded"),
            invalid: outcome("invalid"),
            prompt_tokens: self.engines.prompt_tokens.with_label_values(&[label]),
            request_seconds: self.engines.request_seconds(label),
            tenants: self.engines.tenants(label),
            queue_wait: self.engines.queue_wait.with_label_values(&[label]),
            running: self.engines.running.with_label_values(&[label]),
            waiting: self.engines.waiting.with_label_values(&[label]),
            failed_steps: self.engines.failed_steps.with_label_values(&[label]),
            texts: self.texts.with_label_values(&[label]),
            tokens: self.tokens.with_label_values(&[label]),
            seconds: self.seconds.with_label_values(&[label]),
        }
    }
}

/// One label's series.
#[derive(Clone, Debug)]
pub(super) struct EncoderSeries {
    pub(super) done: IntCounter,
    pub(super) cancelled: IntCounter,
    /// By stage; its texts being computed is `prefill`, as a model reads them then.
    pub(super) cancellations: CancellationMetrics,
    pub(super) failed: IntCounter,
    pub(super) overloaded: IntCounter,
    pub(super) invalid: IntCounter,
    pub(super) prompt_tokens: IntCounter,
    pub(super) request_seconds: Histogram,
    pub(super) tenants: TenantMetrics,
    pub(super) queue_wait: Histogram,
    /// Requests since their first step.
    pub(super) running: IntGauge,
    /// Requests before their first step.
    pub(super) waiting: IntGauge,
    pub(super) failed_steps: IntCounter,
    pub(super) texts: Histogram,
    pub(super) tokens: Histogram,
    pub(super) seconds: Histogram,
}
