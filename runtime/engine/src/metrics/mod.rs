//! The engine's Prometheus series.
//!
//! Families are registered once per process and shared by all engines through the `model` label, because a registry
//! refuses a second family of the same name. Reading them touches only atomics: a scrape never enters the engine's
//! thread. Gauges are only ever added to and subtracted from, so that two engines of one label (an old and a new
//! version during a swap) sum up instead of overwriting each other.

mod cache;
mod guesses;

pub(crate) use cache::{BlockGauges, CacheMetrics};

use crate::shared::Shared;
use cache::CacheFamilies;
use guesses::{GuessFamilies, GuessMetrics};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry,
};
use std::sync::{Arc, Mutex, PoisonError, Weak};

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
    guesses: GuessFamilies,
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
        let new = New(registry);
        let ages = LastStepAges::new()?;
        registry.register(Box::new(ages.clone()))?;
        Ok(Self {
            requests: new.counter(
                "trustformers_requests_total",
                "Requests by outcome: stop, length, done (encoded), cancelled, failed, overloaded or invalid.",
                &["model", "outcome"],
            )?,
            prompt_tokens: new.counter(
                "trustformers_prompt_tokens_total",
                "Prompt tokens that were computed.",
                &["model"],
            )?,
            generated_tokens: new.counter(
                "trustformers_generated_tokens_total",
                "Tokens that were produced.",
                &["model"],
            )?,
            first_token: new.histogram(
                "trustformers_time_to_first_token_seconds",
                "Time from submission to the first token.",
            )?,
            inter_token: new
                .histogram("trustformers_inter_token_seconds", "Time between two tokens of one sequence.")?,
            queue_wait: new.histogram(
                "trustformers_queue_wait_seconds",
                "Time from submission to the first step with rows of the sequence.",
            )?,
            running: new.gauge("trustformers_requests_running", "Sequences that are being computed.")?,
            waiting: new.gauge("trustformers_requests_waiting", "Requests that wait for room in a batch.")?,
            failed_steps: new.counter(
                "trustformers_failed_steps_total",
                "Steps that the device failed; all sequences or texts of such a step end.",
                &["model"],
            )?,
            cache: CacheFamilies::register(&new)?,
            guesses: GuessFamilies::register(&new)?,
            ages,
        })
    }

    /// Families that no one scrapes, for tests and one-shot commands.
    ///
    /// # Errors
    /// Never in practice: a fresh registry refuses nothing.
    pub fn unregistered() -> Result<Self, prometheus::Error> {
        Self::register(&Registry::new())
    }

    /// The series of one label, resolved once so that the hot path does no lookups.
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
            guesses: self.guesses.for_model(label),
        }
    }

    /// Lets scrapes report the age of this engine's last step for as long as it lives.
    pub(crate) fn watch(&self, label: &str, shared: &Arc<Shared>) {
        let mut engines = self.ages.engines.lock().unwrap_or_else(PoisonError::into_inner);
        engines.retain(|(_, engine)| engine.strong_count() > 0);
        engines.push((label.to_owned(), Arc::downgrade(shared)));
    }
}

/// Makes families and registers them.
struct New<'a>(&'a Registry);

impl New<'_> {
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
    pub(crate) guesses: GuessMetrics,
}

/// Counts one thing in a gauge for as long as it exists.
#[derive(Debug)]
pub(crate) struct Counted(IntGauge);

impl Counted {
    pub(crate) fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// A label and its engine, for as long as that lives.
type Watched = (String, Weak<Shared>);

/// Computes ages at scrape time, since a value that was set by the engine's thread would look healthy for ever once
/// that thread hangs.
#[derive(Clone)]
struct LastStepAges {
    family: GaugeVec,
    engines: Arc<Mutex<Vec<Watched>>>,
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
        for (label, engine) in engines.iter() {
            if let Some(shared) = engine.upgrade() {
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
    fn names_are_prefixed_and_a_second_registration_is_refused() {
        let registry = Registry::new();
        let metrics = EngineMetrics::register(&registry).unwrap();
        metrics.for_model("m");
        let shared = Arc::new(Shared::new(1));
        metrics.watch("m", &shared);
        let families = registry.gather();
        assert_eq!(families.len(), 18);
        assert!(families.iter().all(|f| f.name().starts_with("trustformers_")));
        assert!(EngineMetrics::register(&registry).is_err());
    }

    #[test]
    fn the_age_is_nought_without_work_and_gone_with_the_engine() {
        let registry = Registry::new();
        let metrics = EngineMetrics::register(&registry).unwrap();
        let shared = Arc::new(Shared::new(1));
        metrics.watch("m", &shared);
        let age = || {
            let families = registry.gather();
            let found = families.iter().find(|f| f.name() == "trustformers_last_step_age_seconds")?;
            Some(found.get_metric()[0].get_gauge().get_value())
        };
        assert_eq!(age(), Some(0.0));
        let ticket = shared.enter_unbounded();
        assert!(age().unwrap() >= 0.0);
        drop(ticket);
        drop(shared);
        assert_eq!(age(), None);
    }
}
