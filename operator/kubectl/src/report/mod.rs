//! `report`: what an A/B test shows, on the terminal or as a page with charts.
//!
//! Every figure is from the status of the ABTest, or from the sums that its ConfigMap has; nothing is
//! computed anew, so that a report and the operator never disagree.

pub mod chart;
pub mod course;
pub mod html;
pub mod sums;
pub mod terminal;

use std::path::Path;
use std::process::ExitCode;

use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use serde::Serialize;
use trustformers_crds::names::ab_test_samples;
use trustformers_crds::{ABTest, ABTestStatus, Direction, Metric, ShadowStatus, TestLook};

use crate::args::ReportArgs;
use crate::cluster::{Cluster, CommandError, answered};
use crate::output;
use crate::text;
use sums::{LatencyCurve, StoredSums};

/// What a test shows.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TestReport {
    /// Namespace of the test.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The model's name that callers use.
    pub route: String,
    /// Where it is; empty before the operator has looked at it.
    pub phase: String,
    /// What it says, if it has ended.
    pub verdict: Option<String>,
    /// The variant that won.
    pub winner: Option<String>,
    /// The variant that is ahead, which may be chance.
    pub leader: Option<String>,
    /// How sure it is that the leader and the control differ, 0 to 1.
    pub confidence: Option<f64>,
    /// How sure a verdict has to be.
    pub required_confidence: f64,
    /// `ok`, `broken` or `-`.
    pub srm: Option<String>,
    /// Bound of the probability of such a division.
    pub srm_p_value: Option<f64>,
    /// Users, or requests, of all variants.
    pub samples: i64,
    /// When the samples began.
    pub started: Option<String>,
    /// When the test came to its verdict.
    pub concluded: Option<String>,
    /// The effect that the test finds now with a probability of 80 %.
    pub detectable_effect: Option<f64>,
    /// Days until the smallest effect that matters is found.
    pub days_left: Option<f64>,
    /// The variants, the control first.
    pub variants: Vec<VariantReport>,
    /// The goal, then the secondary metrics.
    pub metrics: Vec<MetricReport>,
    /// The goal's effect over time, the oldest first.
    pub history: Vec<LookReport>,
    /// How latencies of the newest time of constant weights are distributed.
    pub latencies: Vec<LatencyCurve>,
    /// What is not as it should be.
    pub warnings: Vec<String>,
    /// When the report was made.
    pub made: String,
}

/// The goal's effect at one time.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LookReport {
    /// When.
    pub at: String,
    /// The same in seconds since 1970.
    pub at_seconds: i64,
    /// Users, or requests, of all variants.
    pub samples: i64,
    /// The variants behind the control.
    pub effects: Vec<IntervalRow>,
}

/// One variant.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VariantReport {
    /// Its name.
    pub name: String,
    /// Its model.
    pub model: String,
    /// The revisions that serve it.
    pub revision: String,
    /// Percent of the users that it gets by the spec.
    pub weight: u32,
    /// Users, or requests.
    pub users: i64,
    /// Requests that were answered or failed.
    pub requests: i64,
    /// Requests that failed.
    pub errors: i64,
    /// Requests that another variant answered.
    pub fallbacks: i64,
    /// Scores.
    pub scores: i64,
    /// What it answered as the test's shadow.
    pub shadow: Option<ShadowStatus>,
    /// Pods that serve it.
    pub replicas: i64,
    /// Requests per second and pod.
    pub load_per_replica: Option<f64>,
    /// Median latency in ms.
    pub latency_p50_ms: Option<f64>,
    /// 95th percentile of the latency in ms.
    pub latency_p95_ms: Option<f64>,
    /// Why it has too little for a verdict.
    pub shortfalls: Vec<String>,
}

/// One metric of all variants.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MetricReport {
    /// Which one, as the spec writes it.
    pub metric: String,
    /// Whether it decides.
    pub is_goal: bool,
    /// Which direction is better.
    pub better: String,
    /// Whether effects are relative to the control: 0.02 is 2 %. Otherwise they are differences.
    pub is_relative: bool,
    /// The variants, the control first.
    pub rows: Vec<IntervalRow>,
}

/// A metric of a variant, beside the control's.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct IntervalRow {
    /// The variant.
    pub variant: String,
    /// Its value.
    pub value: Option<f64>,
    /// How it differs from the control's.
    pub effect: Option<f64>,
    /// The lower end of the effect's interval.
    pub low: Option<f64>,
    /// The upper end.
    pub high: Option<f64>,
    /// Whether the difference is one beyond chance.
    pub differs: bool,
}

/// A number of the status.
fn number(text: &Option<String>) -> Option<f64> {
    text.as_ref()?.parse().ok().filter(|value: &f64| value.is_finite())
}

/// The word of a metric in the spec.
fn word(metric: Metric) -> String {
    serde_json::to_value(metric).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

impl TestReport {
    /// The report of a test, with the sums that are stored.
    #[must_use]
    pub fn of(test: &ABTest, sums: &StoredSums, now: Timestamp) -> Self {
        let empty = ABTestStatus::default();
        let status = test.status.as_ref().unwrap_or(&empty);
        Self {
            namespace: test.namespace().unwrap_or_default(),
            name: test.name_any(),
            route: test.spec.route.clone(),
            phase: status.phase.map(|phase| format!("{phase:?}")).unwrap_or_default(),
            verdict: status.verdict.map(|verdict| format!("{verdict:?}")),
            winner: status.winner.clone(),
            leader: status.leader.clone(),
            confidence: number(&status.confidence),
            required_confidence: test.spec.stop_when.confidence,
            srm: status.srm.clone(),
            srm_p_value: number(&status.srm_p_value),
            samples: status.samples,
            started: status.started_at.as_ref().map(|time| text::time(time.0)),
            concluded: status.concluded_at.as_ref().map(|time| text::time(time.0)),
            detectable_effect: number(&status.detectable_effect),
            days_left: number(&status.days_left),
            variants: variants(test, status),
            metrics: metrics(test, status),
            history: status.history.iter().map(look).collect(),
            latencies: sums.latencies(test, status),
            warnings: warnings(status, sums),
            made: text::time(now),
        }
    }

    /// What the test says, in one sentence.
    #[must_use]
    pub fn summary(&self) -> String {
        let confidence = self.confidence.map(|value| format!(" with a confidence of {:.1} %", value * 100.0));
        let confidence = confidence.unwrap_or_default();
        match (self.verdict.as_deref(), &self.winner, &self.leader) {
            (Some("Winner"), Some(winner), _) => format!("{winner} wins{confidence}."),
            (Some("Equivalent"), ..) => "The variants differ by less than the margin.".to_owned(),
            (Some("Invalid"), ..) => "Users were not divided as configured: nothing can be said.".to_owned(),
            (Some(_), ..) => "The test ended without a verdict about which variant is better.".to_owned(),
            (None, _, Some(leader)) => {
                let needed = self.required_confidence * 100.0;
                format!(
                    "{leader} is ahead{confidence}, of {needed:.1} % that a verdict needs: it may be chance."
                )
            }
            (None, ..) => "Nothing can be said so far.".to_owned(),
        }
    }
}

impl VariantReport {
    /// What it answered as the test's shadow, in one sentence.
    #[must_use]
    pub fn shadow_summary(&self) -> Option<String> {
        let ShadowStatus { same, different, incomparable, answered, failed, dropped, agreement } =
            self.shadow.as_ref()?;
        let mut facts: Vec<String> = Vec::new();
        if let Some(agreement) = number(agreement) {
            facts.push(format!("{:.1} % of the answers that were compared are the same", agreement * 100.0));
        }
        let counts = [
            (same, "the same"),
            (different, "different"),
            (incomparable, "not comparable"),
            (answered, "not compared"),
            (failed, "failed"),
            (dropped, "dropped"),
        ];
        let counts = counts.iter().filter(|(count, _)| **count > 0);
        facts.extend(counts.map(|(count, what)| format!("{count} {what}")));
        Some(format!("{} as a shadow: {}", self.name, facts.join(", ")))
    }
}

fn variants(test: &ABTest, status: &ABTestStatus) -> Vec<VariantReport> {
    let of = |variant: &trustformers_crds::Variant| {
        let known = status.variants.iter().find(|one| one.name == variant.name).cloned().unwrap_or_default();
        VariantReport {
            name: variant.name.clone(),
            model: variant.model_ref.name.clone(),
            revision: known.revision,
            weight: variant.weight,
            users: known.users,
            requests: known.requests,
            errors: known.errors,
            fallbacks: known.fallbacks,
            scores: known.scores,
            shadow: known.shadow,
            replicas: known.replicas,
            load_per_replica: number(&known.load_per_replica),
            latency_p50_ms: number(&known.latency_p50_ms),
            latency_p95_ms: number(&known.latency_p95_ms),
            shortfalls: known.shortfalls,
        }
    };
    test.spec.variants.iter().map(of).collect()
}

fn metrics(test: &ABTest, status: &ABTestStatus) -> Vec<MetricReport> {
    let secondary = test.spec.secondary.iter().map(|one| (one.metric, one.direction));
    let all = std::iter::once((test.spec.goal.metric, test.spec.goal.direction)).chain(secondary);
    all.enumerate()
        .map(|(index, (metric, direction))| MetricReport {
            metric: word(metric),
            is_goal: index == 0,
            better: match direction {
                Direction::Higher => "higher".to_owned(),
                Direction::Lower => "lower".to_owned(),
            },
            is_relative: metric != Metric::FeedbackScore,
            rows: test.spec.variants.iter().map(|variant| row(status, &variant.name, metric)).collect(),
        })
        .collect()
}

fn row(status: &ABTestStatus, variant: &str, metric: Metric) -> IntervalRow {
    let known = status.variants.iter().find(|one| one.name == variant);
    let known = known.and_then(|one| one.metrics.iter().find(|one| one.metric == metric));
    IntervalRow {
        variant: variant.to_owned(),
        value: known.and_then(|one| number(&one.value)),
        effect: known.and_then(|one| number(&one.effect)),
        low: known.and_then(|one| number(&one.low)),
        high: known.and_then(|one| number(&one.high)),
        differs: known.is_some_and(|one| one.differs),
    }
}

fn look(stored: &TestLook) -> LookReport {
    let effects = stored.effects.iter().map(|one| IntervalRow {
        variant: one.variant.clone(),
        value: None,
        effect: number(&Some(one.effect.clone())),
        low: number(&one.low),
        high: number(&one.high),
        differs: false,
    });
    LookReport {
        at: text::time(stored.at.0),
        at_seconds: stored.at.0.as_second(),
        samples: stored.samples,
        effects: effects.collect(),
    }
}

fn warnings(status: &ABTestStatus, sums: &StoredSums) -> Vec<String> {
    let mut warnings: Vec<String> = status
        .conditions
        .iter()
        .filter(|one| one.status == "False")
        .map(|one| format!("{} is false ({}): {}", one.type_, one.reason, one.message))
        .collect();
    if status.verdict.is_none() {
        let short = status.variants.iter().filter(|one| !one.shortfalls.is_empty());
        warnings
            .extend(short.map(|one| format!("{} has too little: {}", one.name, one.shortfalls.join(", "))));
    }
    if sums.is_empty() {
        warnings.push("no sums are stored yet, so there is no distribution of latencies".to_owned());
    }
    warnings
}

/// Runs the command.
///
/// # Errors
/// When a request fails, the sums cannot be read, or the file cannot be written.
pub async fn run(cluster: &Cluster, args: ReportArgs) -> Result<ExitCode, CommandError> {
    let ReportArgs { name, html, format } = args;
    let what = format!("ABTest {name} in namespace {}", cluster.namespace);
    let test = answered(&what, cluster.api::<ABTest>().get(&name)).await?;
    let map = ab_test_samples(&name);
    let stored = answered(&format!("ConfigMap {map}"), cluster.api::<ConfigMap>().get_opt(&map)).await?;
    let sums = StoredSums::of(stored.as_ref(), &test.uid().unwrap_or_default())?;
    let report = TestReport::of(&test, &sums, Timestamp::now());
    if let Some(path) = html {
        write_page(&path, &report)?;
        output::write(&format!("{}\n", path.display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    output::print(format.output, &report, terminal::text)?;
    Ok(ExitCode::SUCCESS)
}

fn write_page(path: &Path, report: &TestReport) -> Result<(), CommandError> {
    std::fs::write(path, html::page(report))
        .map_err(|cause| CommandError::File { path: path.display().to_string(), cause })
}

#[cfg(test)]
mod tests;
