//! The operator's metrics.

use std::time::Duration;

use prometheus::{
    HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};
use trustformers_control::gate::GatewayCounts;

/// The operator's own metrics. Clones share the values.
#[derive(Debug, Clone)]
pub struct Metrics {
    reconciles: IntCounterVec,
    reconcile_seconds: HistogramVec,
    requests: IntCounterVec,
    events: IntCounterVec,
    /// 1 while this process leads.
    pub leader: IntGauge,
    /// Models in the table.
    pub routes: IntGauge,
    /// Pods in the table.
    pub endpoints: IntGauge,
    /// Tables published.
    pub tables: IntCounter,
    gateways: IntGaugeVec,
    /// Open streams to pods.
    pub observed_pods: IntGauge,
}

impl Metrics {
    /// Creates the metrics and registers them.
    ///
    /// # Errors
    /// Only when two metrics share a name, which a test rules out.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let metrics = Self {
            reconciles: IntCounterVec::new(
                Opts::new(
                    "trustformers_operator_reconciles_total",
                    "Reconciles by result; errors by step and kind.",
                ),
                &["result", "error"],
            )?,
            reconcile_seconds: HistogramVec::new(
                HistogramOpts::new("trustformers_operator_reconcile_seconds", "Duration of reconciles.")
                    .buckets(vec![0.0005, 0.002, 0.01, 0.05, 0.2, 1.0, 5.0]),
                &["result"],
            )?,
            requests: IntCounterVec::new(
                Opts::new(
                    "trustformers_operator_writes_total",
                    "Objects written to the API server, by kind.",
                ),
                &["kind"],
            )?,
            events: IntCounterVec::new(
                Opts::new("trustformers_operator_events_total", "Events published, by type."),
                &["type"],
            )?,
            leader: IntGauge::new("trustformers_operator_leader", "1 while this process leads.")?,
            routes: IntGauge::new("trustformers_operator_routes", "Models in the route table.")?,
            endpoints: IntGauge::new("trustformers_operator_endpoints", "Pods in the route table.")?,
            tables: IntCounter::new("trustformers_operator_tables_total", "Route tables published.")?,
            gateways: IntGaugeVec::new(
                Opts::new(
                    "trustformers_operator_feed_gateways",
                    "Gateways by state: live, late (readiness gates wait for a report), left_out (gates do not wait).",
                ),
                &["state"],
            )?,
            observed_pods: IntGauge::new(
                "trustformers_operator_observed_pods",
                "Open streams to model pods.",
            )?,
        };
        let Self {
            reconciles,
            reconcile_seconds,
            requests,
            events,
            leader,
            routes,
            endpoints,
            tables,
            gateways,
            observed_pods,
        } = metrics.clone();
        registry.register(Box::new(reconciles))?;
        registry.register(Box::new(reconcile_seconds))?;
        registry.register(Box::new(requests))?;
        registry.register(Box::new(events))?;
        registry.register(Box::new(leader))?;
        registry.register(Box::new(routes))?;
        registry.register(Box::new(endpoints))?;
        registry.register(Box::new(tables))?;
        registry.register(Box::new(gateways))?;
        registry.register(Box::new(observed_pods))?;
        Ok(metrics)
    }

    /// Counts a reconcile; `error` is its label if it failed.
    pub fn reconciled(&self, error: Option<&str>, took: Duration) {
        let result = if error.is_some() { "error" } else { "ok" };
        self.reconciles.with_label_values(&[result, error.unwrap_or("")]).inc();
        self.reconcile_seconds.with_label_values(&[result]).observe(took.as_secs_f64());
    }

    /// Counts a write of an object.
    pub fn count_write(&self, kind: &str) {
        self.requests.with_label_values(&[kind]).inc();
    }

    /// Counts a published Event.
    pub fn count_event(&self, warning: bool) {
        self.events.with_label_values(&[if warning { "Warning" } else { "Normal" }]).inc();
    }

    /// Shows how many gateways there are.
    pub fn gateways(&self, counts: GatewayCounts) {
        for (state, number) in [("live", counts.live), ("late", counts.late), ("left_out", counts.left_out)] {
            self.gateways.with_label_values(&[state]).set(i64::try_from(number).unwrap_or(i64::MAX));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use trustformers_telemetry::metrics::encode;

    #[test]
    fn values_appear_under_their_names() {
        let registry = Registry::new();
        let metrics = Metrics::new(&registry).unwrap();
        metrics.reconciled(None, Duration::from_millis(3));
        metrics.reconciled(Some("Validate/Source"), Duration::from_millis(1));
        metrics.count_write("Deployment");
        metrics.gateways(GatewayCounts { live: 2, late: 1, left_out: 0 });
        let text = encode(&registry).unwrap();
        for line in [
            "trustformers_operator_reconciles_total{error=\"\",result=\"ok\"} 1",
            "trustformers_operator_reconciles_total{error=\"Validate/Source\",result=\"error\"} 1",
            "trustformers_operator_writes_total{kind=\"Deployment\"} 1",
            "trustformers_operator_feed_gateways{state=\"live\"} 2",
            "trustformers_operator_leader 0",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
    }
}
