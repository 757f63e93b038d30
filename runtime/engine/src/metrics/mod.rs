//! The engine's Prometheus series.
//!
//! Families are registered once per process and shared by all engines through the `model` label, because a
//! registry refuses a second family of the same name. A scrape reads only atomics and never involves the
//! device thread. Gauges are only incremented and decremented, so that two engines with one label (an old and
//! a new version during a swap) add up instead of overwriting each other.

mod cache;
mod cancellations;
mod latency;
mod speculation;
mod tenants;

pub(crate) use cache::{BlockGauges, CacheMetrics};
pub(crate) use cancellations::CancellationMetrics;
pub(crate) use latency::LatencyMetrics;
pub(crate) use tenants::TenantMetrics;

use crate::device_thread::Shared;
use cache::CacheFamilies;
use cancellations::CancellationFamilies;
use latency::LatencyFamilies;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry,
};
use speculation::{SpeculationFamilies, SpeculationMetrics};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use tenants::TenantFamilies;

/// Upper bounds of the latency histograms in seconds: from one decode step of a small model to a long prompt.
const SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// The families of all engines of a process; cheap to clone.
#[derive(Clone)]
pub struct EngineMetrics {
    pub(crate) requests: IntCounterVec,
    pub(crate) prompt_tokens: IntCounterVec,
    generated_tokens: IntCounterVec,
    first_token: HistogramVec,
    inter_token: HistogramVec,
    pub(crate) queue_wait: HistogramVec,
    pub(crate) running: IntGaugeVec,
    pub(crate) waiting: IntGaugeVec,
    pub(crate) failed_steps: IntCounterVec,
    cache: CacheFamilies,
    cancellations: CancellationFamilies,
    latency: LatencyFamilies,
    speculation: SpeculationFamilies,
    tenants: TenantFamilies,
    ages: LastStepAges,
}

impl std::fmt::Debug for EngineMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EngineMetrics")
    }
}

impl EngineMetrics {
    /// Registers the families, all named `trustformers_*`.
    ///
    /// # Errors
    /// When the registry already holds families of these names: register once and clone.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let registrar = FamilyRegistrar(registry);
        let ages = LastStepAges::new()?;
        registry.register(Box::new(ages.clone()))?;
        Ok(Self {
            requests: registrar.counter(
                "trustformers_requests_total",
                "Requests by outcome: stop, length, done (encoded), cancelled, failed, overloaded or invalid.",
                &["model", "outcome"],
            )?,
            prompt_tokens: registrar.counter(
                "trustformers_prompt_tokens_total",
                "Prompt tokens that were computed.",
                &["model"],
            )?,
            generated_tokens: registrar.counter(
                "trustformers_generated_tokens_total",
                "Tokens that were produced.",
                &["model"],
            )?,
            first_token: registrar.histogram(
                "trustformers_time_to_first_token_seconds",
                "Time from submission to the first token.",
            )?,
            inter_token: registrar
                .histogram("trustformers_inter_token_seconds", "Time between two tokens of one sequence.")?,
            queue_wait: registrar.histogram(
                "trustformers_queue_wait_seconds",
                "Time from submission to the first step with rows of the sequence.",
            )?,
            running: registrar.gauge("trustformers_requests_running", "Sequences that run.")?,
            waiting: registrar.gauge("trustformers_requests_waiting", "Requests that wait for room in a batch.")?,
            failed_steps: registrar.counter(
                "trustformers_failed_steps_total",
                "Steps that the device failed; all sequences or texts of such a step end with an error.",
                &["model"],
            )?,
            cache: CacheFamilies::register(&registrar)?,
            cancellations: CancellationFamilies::register(&registrar)?,
            latency: LatencyFamilies::register(&registrar)?,
            speculation: SpeculationFamilies::register(&registrar)?,
            tenants: TenantFamilies::register(&registrar)?,
            ages,
        })
    }

    /// Families without an exporter, for tests and one-shot commands.
    ///
    /// # Errors
    /// None in practice: a new registry refuses nothing.
    pub fn unregistered() -> Result<Self, prometheus::Error> {
        Self::register(&Registry::new())
    }

    /// The series of one label, resolved once, so that steps do no lookups.
    pub(crate) fn for_model(&self, label: &str) -> ModelMetrics {
        let outcome = |name| self.requests.with_label_values(&[label, name]);
        ModelMetrics {
            stop: outcome("stop"),
            length: outcome("length"),
            cancelled: outcome("cancelled"),
            failed: outcome("failed"),
            overloaded: outcome("overloaded"),
            invalid: outcome("invalid"),
            prompt_tokens: self.prompt_tokens.with_label_values(&[label]),
            generated_tokens: self.generated_tokens.with_label_values(&[label]),
            first_token: self.first_token.with_label_values(&[label]),
            inter_token: self.inter_token.with_label_values(&[label]),
            queue_wait: self.queue_wait.with_label_values(&[label]),
            running: self.running.with_label_values(&[label]),
            waiting: self.waiting.with_label_values(&[label]),
            failed_steps: self.failed_steps.with_label_values(&[label]),
            cache: self.cache.for_model(label),
            cancellations: self.cancellations(label),
            latency: self.latency.for_model(label),
            speculation: self.speculation.for_model(label),
            tenants: self.tenants(label),
        }
    }

    /// The time of whole requests.
    pub(crate) fn request_seconds(&self, label: &str) -> Histogram {
        self.latency.whole(label)
    }

    /// Requests whose callers left.
    pub(crate) fn cancellations(&self, label: &str) -> CancellationMetrics {
        self.cancellations.for_model(label)
    }

    /// What tenants were served.
    pub(crate) fn tenants(&self, label: &str) -> TenantMetrics {
        self.tenants.for_model(label)
    }

    /// Reports the age of this engine's last step in scrapes while the engine lives.
    pub(crate) fn track_step_age(&self, label: &str, shared: &Arc<Shared>) {
        let mut engines = self.ages.engines.lock().unwrap_or_else(PoisonError::into_inner);
        engines.retain(|engine| engine.shared.strong_count() > 0);
        engines.push(TrackedEngine { label: label.to_owned(), shared: Arc::downgrade(shared) });
    }
}

/// Creates and registers families.
struct FamilyRegistrar<'a>(&'a Registry);

impl FamilyRegistrar<'_> {
    fn counter(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, prometheus::Error> {
        let family = IntCounterVec::new(Opts::new(name, help), labels)?;
        self.0.register(Box::new(family.clone()))?;
        Ok(family)
    }

    fn gauge(&self, name: &str, help: &str) -> Result<IntGaugeVec, prometheus::Error> {
        let family = IntGaugeVec::new(Opts::new(name, help), &["model"])?;
        self.0.register(Box::new(family.clone()))?;
        Ok(family)
    }

    fn histogram(&self, name: &str, help: &str) -> Result<HistogramVec, prometheus::Error> {
        let options = HistogramOpts::new(name, help).buckets(SECONDS.to_vec());
        let family = HistogramVec::new(options, &["model"])?;
        self.0.register(Box::new(family.clone()))?;
        Ok(family)
    }
}

/// One label's series.
#[derive(Clone, Debug)]
pub(crate) struct ModelMetrics {
    pub(crate) stop: IntCounter,
    pub(crate) length: IntCounter,
    pub(crate) cancelled: IntCounter,
    pub(crate) failed: IntCounter,
    pub(crate) overloaded: IntCounter,
    pub(crate) invalid: IntCounter,
    pub(crate) prompt_tokens: IntCounter,
    pub(crate) generated_tokens: IntCounter,
    pub(crate) first_token: Histogram,
    pub(crate) inter_token: Histogram,
    pub(crate) queue_wait: Histogram,
    pub(crate) running: IntGauge,
    pub(crate) waiting: IntGauge,
    pub(crate) failed_steps: IntCounter,
    pub(crate) cache: CacheMetrics,
    pub(crate) cancellations: CancellationMetrics,
    pub(crate) latency: LatencyMetrics,
    pub(crate) speculation: SpeculationMetrics,
    pub(crate) tenants: TenantMetrics,
}

/// Counts one thing in a gauge until it is dropped.
#[derive(Debug)]
pub(crate) struct GaugeGuard(IntGauge);

impl GaugeGuard {
    pub(crate) fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// An engine whose step age is reported.
struct TrackedEngine {
    label: String,
    shared: Weak<Shared>,
}

/// Computes ages at scrape time: a value that the device thread sets would look healthy for ever once that
/// thread hangs.
#[derive(Clone)]
struct LastStepAges {
    family: GaugeVec,
    engines: Arc<Mutex<Vec<TrackedEngine>>>,
}

impl LastStepAges {
    fn new() -> Result<Self, prometheus::Error> {
        let family = GaugeVec::new(
            Opts::new(
                "trustformers_last_step_age_seconds",
                "Time since the engine's last step while it has work; 0 while it has none.",
            ),
            &["model"],
        )?;
        Ok(Self { family, engines: Arc::new(Mutex::new(Vec::new())) })
    }
}

impl Collector for LastStepAges {
    fn desc(&self) -> Vec<&Desc> {
        self.family.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let engines = self.engines.lock().unwrap_or_else(PoisonError::into_inner);
        self.family.reset();
        for TrackedEngine { label, shared } in engines.iter() {
            if let Some(shared) = shared.upgrade() {
                let gauge: Gauge = self.family.with_label_values(&[label]);
                let beat = shared.heartbeat();
                let age = if beat.work_pending { beat.last_step_age.as_secs_f64() } else { 0.0 };
                gauge.set(gauge.get().max(age));
            }
        }
        self.family.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_the_prefix_and_register_only_once() {
        let registry = Registry::new();
        let metrics = EngineMetrics::register(&registry).unwrap();
        metrics.for_model("m");
        let shared = Arc::new(Shared::new(1));
        metrics.track_step_age("m", &shared);
        let families = registry.gather();
        assert_eq!(families.len(), 22);
        assert!(families.iter().all(|f| f.name().starts_with("trustformers_")));
        assert!(EngineMetrics::register(&registry).is_err());
    }

    #[test]
    fn the_step_age_is_zero_without_work_and_ends_with_the_engine() {
        let registry = Registry::new();
        let metrics = EngineMetrics::register(&registry).unwrap();
        let shared = Arc::new(Shared::new(1));
        metrics.track_step_age("m", &shared);
        let age = || {
            let families = registry.gather();
            let found = families.iter().find(|f| f.name() == "trustformers_last_step_age_seconds")?;
            Some(found.get_metric()[0].get_gauge().get_value())
        };
        assert_eq!(age(), Some(0.0));
        let permit = shared.acquire_unbounded();
        assert!(age().unwrap() >= 0.0);
        drop(permit);
        drop(shared);
        assert_eq!(age(), None);
    }
}
