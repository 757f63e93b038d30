//! How the status of a test shows what was counted.

use trustformers_crds::{LookEffect, MetricStatus, ShadowStatus, VariantStatus};
use trustformers_stats::buckets::Scale;

use super::assess::{MetricJudgement, VariantJudgement};
use super::metric::{VariantDifference, scale_of};
use super::sample::ShadowSums;

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
    status.shadow = shadow_status(total.shadow);
    status.metrics = one.metrics.iter().map(metric_status).collect();
    status.shortfalls.clone_from(&one.shortfalls);
    status.information = (one.information > 0.0).then(|| format!("{:.6e}", one.information));
}

/// None where the variant answered nothing as a shadow.
fn shadow_status(sums: ShadowSums) -> Option<ShadowStatus> {
    let ShadowSums { same, different, incomparable, answered, failed, dropped } = sums;
    let compared = same + different;
    let status = ShadowStatus {
        same: signed(same),
        different: signed(different),
        incomparable: signed(incomparable),
        answered: signed(answered),
        failed: signed(failed),
        dropped: signed(dropped),
        agreement: (compared > 0).then(|| decimals(same as f64 / compared as f64, 4)),
    };
    (sums != ShadowSums::default()).then_some(status)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_that_agree_are_a_share_of_those_that_were_compared() {
        assert_eq!(shadow_status(ShadowSums::default()), None);
        let dropped = shadow_status(ShadowSums { dropped: 2, ..ShadowSums::default() }).unwrap();
        assert_eq!((dropped.dropped, dropped.agreement), (2, None));
        let sums = ShadowSums { same: 3, different: 1, incomparable: 5, failed: 7, ..ShadowSums::default() };
        let status = shadow_status(sums).unwrap();
        assert_eq!((status.same, status.different, status.incomparable, status.failed), (3, 1, 5, 7));
        assert_eq!(status.agreement.as_deref(), Some("0.7500"));
    }
}
