//! Scenarios about rollouts that are compared with limits by what gateways count.

use kube::runtime::watcher::Event;
use serde_json::json;
use trustformers_control::counts::Reported;
use trustformers_control::kinds::DEPLOYMENT;
use trustformers_proto::control::v1::{LatencyHistogram, Outcome, OutcomeCount, RevisionCounts};
use trustformers_proto::latency::{BucketCount, bucket_of};

use super::rollouts::{Serving, serving};
use super::*;

const COMPARED: &str = "{source: {uri: 'oci://localhost/m:2'}, rollout: {steps: [{weight: 50}], bake: 1h, \
                        analysis: {minRequests: 200, maxErrorRate: 0.01}}}";
const COMPARED_BY_LATENCY: &str = "{source: {uri: 'oci://localhost/m:2'}, rollout: {steps: [{weight: 50}], \
                                   bake: 1h, analysis: {minRequests: 200, maxLatencyRatio: 1.2}}}";

/// What a process has counted of a revision since it started.
struct RecordedSums {
    answered: u64,
    failed: u64,
    latency: Duration,
}

impl RecordedSums {
    fn answered(answered: u64) -> Self {
        Self { answered, failed: 0, latency: Duration::from_millis(100) }
    }
}

fn record(context: &Context, process: &str, revision: &str, sums: &RecordedSums) {
    let outcomes = [(Outcome::Ok, sums.answered), (Outcome::PodError, sums.failed)];
    let bucket = BucketCount { bucket: bucket_of(sums.latency), count: sums.answered };
    let counts = RevisionCounts {
        route: "team/chat".to_owned(),
        revision: revision.to_owned(),
        series: 1,
        attempts: sums.answered + sums.failed,
        outcomes: outcomes.map(|(outcome, count)| OutcomeCount { outcome: outcome.into(), count }).to_vec(),
        answer: Some(LatencyHistogram::of_buckets([bucket], 0)),
        ..RevisionCounts::default()
    };
    context.counts.record(process, Reported { counts: &[counts], held: &[] });
}

/// A candidate that gets half of the requests, and has had none yet.
async fn shifting(spec: &str) -> Serving {
    let mut case = Serving::new().await;
    case.server.expect([
        Expect::Rollout { phase: "Pending" },
        Expect::Create { kind: "ConfigMap" },
        Expect::Create { kind: "Deployment" },
        Expect::Status { phase: "Updating" },
        Expect::Rollout { phase: "Placing" },
        Expect::apply("Deployment", true),
        Expect::Status { phase: "Updating" },
        Expect::Event { reason: "RollingOut" },
    ]);
    case.reconcile(spec).await.unwrap();
    case.reconcile(spec).await.unwrap();
    case.server.is_done();
    let child = case.context.children.get(&DEPLOYMENT, "team", &deployment(spec)).unwrap();
    let mut complete = child.object();
    complete["status"] = json!({"replicas": 1, "updatedReplicas": 1});
    deliver(&case.context, &DEPLOYMENT, complete);
    case.writers.pods.apply_watcher_event(&Event::Apply(serving("new", &revision(spec))));
    case.server.expect([
        Expect::Status { phase: "Updating" },
        Expect::Rollout { phase: "Shifting" },
        Expect::Status { phase: "Updating" },
        Expect::Status { phase: "Updating" },
    ]);
    case.reconcile(spec).await.unwrap();
    case.reconcile(spec).await.unwrap();
    let action = case.reconcile(spec).await.unwrap();
    case.server.is_done();
    assert_eq!(case.rollout()["reason"], "Inconclusive");
    assert_eq!(case.rollout()["message"], "0 of 200 requests");
    assert_eq!(action, Action::requeue(Duration::from_secs(5)), "counts are looked at while they decide");
    tokio::time::advance(Duration::from_secs(6)).await;
    case
}

#[tokio::test(start_paused = true)]
async fn a_good_candidate_passes_its_steps_by_requests() {
    let case = shifting(COMPARED_BY_LATENCY).await;
    let new = revision(COMPARED_BY_LATENCY);
    record(&case.context, "p", &revision(SPEC), &RecordedSums::answered(300));
    record(&case.context, "p", &new, &RecordedSums::answered(250));
    case.server.expect([Expect::Rollout { phase: "Verifying" }, Expect::Status { phase: "Updating" }]);
    case.reconcile(COMPARED_BY_LATENCY).await.unwrap();
    case.server.is_done();
    let passed = case.history()[0]["message"].as_str().unwrap().to_owned();
    assert!(passed.contains("250 of 200 requests; 0 of 250 requests failed"), "{passed}");
    assert!(passed.contains("0 of 250 requests took longer than"), "{passed}");

    // The next step starts from nothing; the stable revision's figures are those of the attempt.
    case.server.expect([Expect::Status { phase: "Updating" }]);
    case.reconcile(COMPARED_BY_LATENCY).await.unwrap();
    case.server.is_done();
    assert_eq!(case.rollout()["message"], "0 of 200 requests");
    record(&case.context, "p", &new, &RecordedSums::answered(450));
    case.server.expect([
        Expect::Status { phase: "Ready" },
        Expect::Event { reason: "Promoted" },
        Expect::Event { reason: "Ready" },
    ]);
    case.reconcile(COMPARED_BY_LATENCY).await.unwrap();
    case.server.is_done();
    assert!(case.history()[1]["message"].as_str().unwrap().contains("200 of 200 requests"));

    // While the previous revision is ready, the new one is still compared with its figures.
    let slow = RecordedSums { latency: Duration::from_secs(2), ..RecordedSums::answered(700) };
    record(&case.context, "q", &new, &slow);
    case.server.expect([
        Expect::Rollout { phase: "RollingBack" },
        Expect::Event { reason: "RolledBack" },
        Expect::Status { phase: "Degraded" },
        Expect::Event { reason: "Latency" },
    ]);
    case.reconcile(COMPARED_BY_LATENCY).await.unwrap();
    case.server.is_done();
}

#[tokio::test(start_paused = true)]
async fn a_candidate_that_fails_requests_is_rolled_back_with_the_figures() {
    let case = shifting(COMPARED).await;
    let failing = RecordedSums { failed: 50, ..RecordedSums::answered(150) };
    record(&case.context, "p", &revision(COMPARED), &failing);
    case.server.expect([
        Expect::Rollout { phase: "RollingBack" },
        Expect::Event { reason: "RolledBack" },
        Expect::Status { phase: "Degraded" },
        Expect::Event { reason: "ErrorRate" },
    ]);
    case.reconcile(COMPARED).await.unwrap();
    case.server.is_done();
    let figures = "50 of 200 requests failed (25.00 %, limit 1.00 %)";
    assert_eq!(
        (&case.history()[0]["reason"], &case.history()[0]["message"]),
        (&json!("ErrorRate"), &json!(figures))
    );
    assert_eq!(case.rollout()["message"], figures);
    assert!(case.rollout()["sample"].is_null(), "nothing is compared any more");
}

#[tokio::test(start_paused = true)]
async fn a_slow_candidate_is_rolled_back() {
    let case = shifting(COMPARED_BY_LATENCY).await;
    let slow = RecordedSums { latency: Duration::from_millis(300), ..RecordedSums::answered(300) };
    record(&case.context, "p", &revision(SPEC), &RecordedSums::answered(300));
    record(&case.context, "p", &revision(COMPARED_BY_LATENCY), &slow);
    case.server.expect([
        Expect::Rollout { phase: "RollingBack" },
        Expect::Event { reason: "RolledBack" },
        Expect::Status { phase: "Degraded" },
        Expect::Event { reason: "Latency" },
    ]);
    case.reconcile(COMPARED_BY_LATENCY).await.unwrap();
    case.server.is_done();
    let message = case.history()[0]["message"].as_str().unwrap().to_owned();
    assert!(message.starts_with("300 of 300 requests took longer than"), "{message}");
}

#[tokio::test(start_paused = true)]
async fn with_hold_a_failing_candidate_waits_for_a_person() {
    let spec = COMPARED.replace("bake: 1h", "bake: 1h, onFailure: Hold");
    let case = shifting(&spec).await;
    record(&case.context, "p", &revision(&spec), &RecordedSums { failed: 50, ..RecordedSums::answered(150) });
    // Neither pods nor shares change.
    case.server.expect([
        Expect::Status { phase: "Degraded" },
        Expect::Event { reason: "ErrorRate" },
        Expect::Event { reason: "Held" },
    ]);
    case.reconcile(&spec).await.unwrap();
    case.server.is_done();
    assert_eq!((&case.rollout()["phase"], &case.rollout()["held"]), (&json!("Shifting"), &json!(true)));
}

#[tokio::test(start_paused = true)]
async fn another_operator_goes_on_with_the_counts_of_a_step() {
    let case = shifting(COMPARED).await;
    let new = revision(COMPARED);
    record(&case.context, "p", &new, &RecordedSums::answered(150));
    case.server.expect([Expect::Status { phase: "Updating" }]);
    case.reconcile(COMPARED).await.unwrap();
    case.server.is_done();
    assert_eq!(case.rollout()["message"], "150 of 200 requests");
    let sample = case.rollout()["sample"].clone();
    assert!(sample["candidateCounts"].as_str().unwrap().starts_with("150 0 "), "{sample}");

    // It has empty caches, and the process that counted has ended.
    let (context, mut writers) = context(&case.server);
    for child in case.context.children.of_owner("u1") {
        let object: StoredObject = serde_json::from_value(child.object()).unwrap();
        context.children.insert(Child::of(child.kind, object).unwrap());
    }
    for (name, revision) in [("old", revision(SPEC)), ("new", new.clone())] {
        writers.pods.apply_watcher_event(&Event::Apply(serving(name, &revision)));
    }
    let restarted = Serving { context, writers, ..case };
    record(&restarted.context, "q", &new, &RecordedSums::answered(60));
    restarted.server.expect([Expect::Rollout { phase: "Verifying" }, Expect::Status { phase: "Updating" }]);
    restarted.reconcile(COMPARED).await.unwrap();
    restarted.server.is_done();
    assert!(restarted.history()[0]["message"].as_str().unwrap().starts_with("210 of 200 requests"));
}
