//! Counts of the requests that came over this protocol, which its clients ask for as statistics.
//!
//! Other surfaces do not count here, and no phase of a request is timed: `GET /metrics` has both.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tokio::time::Instant;
use trustformers_proto::{inference, v1};

use super::metadata;

/// Counts of all models, by the first of their names. Only models of this server are counted, so that there
/// are as many entries as models.
#[derive(Debug, Default)]
pub(crate) struct Statistics(Mutex<BTreeMap<String, ModelCounts>>);

#[derive(Debug, Clone, Copy, Default)]
struct ModelCounts {
    last_unix_ms: u64,
    items: u64,
    success: DurationCount,
    fail: DurationCount,
}

/// How often something happened, and how long it took together.
#[derive(Debug, Clone, Copy, Default)]
struct DurationCount {
    count: u64,
    nanoseconds: u64,
}

impl DurationCount {
    fn to_wire(self) -> inference::StatisticDuration {
        inference::StatisticDuration { count: self.count, ns: self.nanoseconds }
    }

    fn to_json(self) -> Value {
        json!({"count": self.count, "ns": self.nanoseconds})
    }
}

/// A request that runs.
#[derive(Debug)]
pub(crate) struct Outcome {
    model: String,
    items: usize,
    started: Instant,
}

impl Outcome {
    /// A request of so many prompts or texts, which begins now.
    pub(crate) fn new(model: &str, items: usize) -> Self {
        Self { model: model.to_owned(), items, started: Instant::now() }
    }
}

impl Statistics {
    /// Counts a request that has ended. One that its caller left is not counted.
    pub(crate) fn record(&self, outcome: &Outcome, succeeded: bool) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let took = u64::try_from(outcome.started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let mut models = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let counts = models.entry(outcome.model.clone()).or_default();
        counts.last_unix_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let part = if succeeded { &mut counts.success } else { &mut counts.fail };
        part.count += 1;
        part.nanoseconds = part.nanoseconds.saturating_add(took);
        if succeeded {
            counts.items += outcome.items as u64;
        }
    }

    fn of(&self, model: &v1::ModelStatus) -> ModelCounts {
        let models = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        models.get(&model.name).copied().unwrap_or_default()
    }

    /// The counts of a model as a message.
    pub(crate) fn message(&self, model: &v1::ModelStatus) -> inference::ModelStatistics {
        let counts = self.of(model);
        let unmeasured = DurationCount::default().to_wire();
        inference::ModelStatistics {
            name: model.name.clone(),
            version: metadata::version_of(model).to_owned(),
            last_inference: counts.last_unix_ms,
            inference_count: counts.items,
            execution_count: counts.success.count,
            inference_stats: Some(inference::InferStatistics {
                success: Some(counts.success.to_wire()),
                fail: Some(counts.fail.to_wire()),
                queue: Some(unmeasured),
                compute_input: Some(unmeasured),
                compute_infer: Some(unmeasured),
                compute_output: Some(unmeasured),
            }),
        }
    }

    /// The counts of a model as JSON.
    pub(crate) fn json(&self, model: &v1::ModelStatus) -> Value {
        let counts = self.of(model);
        let unmeasured = DurationCount::default().to_json();
        json!({
            "name": model.name,
            "version": metadata::version_of(model),
            "last_inference": counts.last_unix_ms,
            "inference_count": counts.items,
            "execution_count": counts.success.count,
            "inference_stats": {
                "success": counts.success.to_json(),
                "fail": counts.fail.to_json(),
                "queue": unmeasured,
                "compute_input": unmeasured,
                "compute_infer": unmeasured,
                "compute_output": unmeasured,
            },
            "batch_stats": [],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn requests_are_counted_by_model_and_outcome() {
        let counts = Statistics::default();
        let model = |name: &str| v1::ModelStatus { name: name.to_owned(), ..Default::default() };
        let outcome = Outcome::new("a", 3);
        tokio::time::advance(std::time::Duration::from_millis(2)).await;
        counts.record(&outcome, true);
        counts.record(&outcome, false);
        let message = counts.message(&model("a"));
        let stats = message.inference_stats.unwrap();
        let each = inference::StatisticDuration { count: 1, ns: 2_000_000 };
        assert_eq!((stats.success, stats.fail), (Some(each), Some(each)));
        assert_eq!((message.inference_count, message.execution_count), (3, 1));
        assert!(message.last_inference > 0);
        let json = counts.json(&model("a"));
        assert_eq!(json["inference_stats"]["fail"], json!({"count": 1, "ns": 2_000_000}));
        assert_eq!((json["inference_count"].as_u64(), json["version"].as_str()), (Some(3), Some("1")));
        assert_eq!(counts.message(&model("b")).inference_count, 0);
    }
}
