//! A report of a stored test, as text and as a page.

use super::*;
use k8s_openapi::ByteString;
use trustformers_proto::control::v1::{LatencyHistogram, TestCheckpoint, VariantCounts};
use trustformers_proto::latency::BucketCount;

fn test() -> ABTest {
    serde_yaml::from_str(include_str!("../../tests/objects/ab-test.yaml")).unwrap()
}

/// What two gateways counted of the test: the treatment answers faster.
fn sums() -> StoredSums {
    let counts = |variant: &str, buckets: &[(usize, u64)]| {
        let buckets = buckets.iter().map(|&(bucket, count)| BucketCount { bucket, count });
        VariantCounts {
            test: "u".to_owned(),
            epoch: 2,
            variant: variant.to_owned(),
            answer: Some(LatencyHistogram::of_buckets(buckets, 0)),
            ..VariantCounts::default()
        }
    };
    let part = |counts| {
        ByteString(prost::Message::encode_to_vec(&TestCheckpoint { counts, ..TestCheckpoint::default() }))
    };
    let first = part(vec![
        counts("control", &[(150, 40), (200, 900), (260, 60)]),
        counts("treatment", &[(130, 50), (180, 60)]),
    ]);
    let second = part(vec![counts("control", &[(200, 500)])]);
    let data = [("p1".to_owned(), first), ("p2".to_owned(), second)].into();
    let map = ConfigMap { binary_data: Some(data), ..ConfigMap::default() };
    StoredSums::of(Some(&map), "u").unwrap()
}

fn report() -> TestReport {
    TestReport::of(&test(), &sums(), "2026-12-08T12:00:00Z".parse().unwrap())
}

#[test]
fn a_report_draws_intervals_in_the_terminal() {
    insta::assert_snapshot!(terminal::text(&report()));
}

#[test]
fn a_report_is_a_page_with_charts() {
    insta::assert_snapshot!(html::page(&report()));
}

#[test]
fn the_page_needs_no_network_and_has_no_script() {
    let page = html::page(&report());
    for absent in ["http://", "https://", "url(", "<script", "<img", "<link", "@import", " src="] {
        assert!(!page.contains(absent), "{absent}");
    }
    assert!(page.contains("default-src 'none'") && page.contains("prefers-color-scheme:dark"));
    assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
    // The shares, the goal, its course, one secondary metric, and the latencies.
    assert_eq!(page.matches("<svg").count(), 5);
}

#[test]
fn figures_are_those_of_the_status() {
    let report = serde_json::to_value(report()).unwrap();
    assert_eq!(report["confidence"], 0.992);
    assert_eq!(report["metrics"][0]["metric"], "feedbackScore");
    assert_eq!(report["metrics"][0]["rows"][1]["low"], 0.011);
    assert_eq!(report["metrics"][1]["rows"][1]["high"], serde_json::Value::Null);
    assert_eq!(report["variants"][1]["users"], 512);
    assert_eq!(report["latencies"][0]["answers"], 1500);
    assert_eq!(report["history"][1]["effects"][0]["low"], 0.002);
    assert_eq!(report["variants"][1]["loadPerReplica"], 0.4);
}

#[test]
fn what_a_variant_answered_as_a_shadow_is_in_the_report() {
    let mut test = test();
    let variants = &mut test.status.as_mut().unwrap().variants;
    variants[1].shadow = Some(ShadowStatus {
        same: 3,
        different: 1,
        dropped: 2,
        agreement: Some("0.7500".to_owned()),
        ..ShadowStatus::default()
    });
    let report = TestReport::of(&test, &sums(), "2026-12-08T12:00:00Z".parse().unwrap());
    let expected = "treatment as a shadow: 75.0 % of the answers that were compared are the same, \
                    3 the same, 1 different, 2 dropped";
    assert!(terminal::text(&report).contains(expected), "{}", terminal::text(&report));
    assert!(html::page(&report).contains(expected));
    assert!(!terminal::text(&report).contains("control as a shadow"));
    assert_eq!(serde_json::to_value(&report).unwrap()["variants"][1]["shadow"]["dropped"], 2);
}

#[test]
fn a_test_that_has_not_started_has_a_report() {
    let mut test = test();
    test.status = None;
    let report = TestReport::of(&test, &StoredSums::default(), "2026-12-08T12:00:00Z".parse().unwrap());
    assert_eq!(report.summary(), "Nothing can be said so far.");
    assert!(terminal::text(&report).contains("not looked at yet"));
    assert_eq!(html::page(&report).matches("<svg").count(), 0);
}

#[test]
fn the_summary_says_who_won_or_why_nobody_did() {
    let summary = |verdict: Option<&str>, winner: Option<&str>| {
        TestReport { verdict: verdict.map(str::to_owned), winner: winner.map(str::to_owned), ..report() }
            .summary()
    };
    assert_eq!(summary(Some("Winner"), Some("treatment")), "treatment wins with a confidence of 99.2 %.");
    assert!(summary(Some("Invalid"), None).contains("not divided as configured"));
    assert!(summary(Some("Inconclusive"), None).contains("without a verdict"));
    assert!(summary(None, None).contains("may be chance"));
}
