//! How the status of a test shows what was counted.

use trustformers_crds::{LookEffect, MetricStatus, VariantStatus};
use trustformers_stats::buckets::Scale;

use super::assess::{MetricJudgement, VariantJudgement};
use super::metric::{VariantDifference, scale_of};

/// Writes the sums of a variant, and what they say, into its status.
pub(super) fn fill(status: &mut VariantStatus, one: &VariantJudgement) {
    let total = &one.total;
    let quantile = |q: f64| total.answer.quantile(q).map(|latency| decimals(latency.as_secs_f64() * 1e3, 1));
    status.users = signed(one.samples);
    status.requests = signed(total.requests());
    status.errors = signed(total.errors());
    status.fallbacks = signed(total.fallbacks);
    status.uncounted = signed(total.unidentified + total.forced);
    status.tokens = signed(total.buckets.iter().map(|bucket| bucket.completion_tokens).sum());
    status.scores = signed(total.buckets.iter().map(|bucket| bucket.scores).sum());
    status.latency_p50_ms = quantile(0.5);
    status.latency_p95_ms = quantile(0.95);
    status.metrics = one.metrics.iter().map(metric_status).collect();
    status.shortfalls.clone_from(&one.shortfalls);
    status.information = (one.information > 0.0).then(|| format!("{:.6e}", one.information));
}

fn metric_status(one: &MetricJudgement) -> MetricStatus {
    let effect = |value: f64| {
        let shown = if scale_of(one.metric) == Scale::LogRatio { value.exp_m1() } else { value };
        shown.is_finite().then(|| decimals(shown, 4))
    };
    let of = |pick: fn(&VariantDifference) -> f64| one.comparison.as_ref().map(pick).and_then(effect);
    MetricStatus {
        metric: one.metric,
        value: one.value.map(|value| decimals(value, 4)),
        effect: of(|comparison| comparison.estimate),
        low: of(|comparison| comparison.low).filter(|_| is_bounded(one)),
        high: of(|comparison| comparison.high),
        differs: one.differs,
        cuped: one.comparison.as_ref().and_then(|one| one.theta).map(|theta| decimals(theta, 6)),
    }
}

/// The goal's effects that a status shows, of the variants behind the control.
pub(super) fn effects(variants: &[VariantStatus]) -> Vec<LookEffect> {
    let effect = |variant: &VariantStatus| {
        let goal = variant.metrics.first()?;
        Some(LookEffect {
            variant: variant.name.clone(),
            effect: goal.effect.clone()?,
            low: goal.low.clone(),
            high: goal.high.clone(),
        })
    };
    variants.iter().skip(1).filter_map(effect).collect()
}

/// Whether too little is known for an end of the interval: minus 100 % is none.
fn is_bounded(one: &MetricJudgement) -> bool {
    one.comparison.as_ref().is_some_and(|comparison| comparison.low.is_finite())
}

/// A number with so many digits behind the point.
pub(super) fn decimals(value: f64, digits: usize) -> String {
    format!("{value:.digits$}")
}

/// A count as the status has it.
pub(super) fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
