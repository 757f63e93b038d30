//! The variants of a test: who gets which, what answers say, and what is reported of them.

use std::collections::{BTreeMap, BTreeSet};

use http::StatusCode;
use trustformers_proto::buckets::{BucketOwners, RevisionWeight};
use trustformers_proto::control::v1 as wire;

use crate::operator::TableBuilder;
use crate::pods::Pod;
use crate::{Scene, post, soon, text, until};

/// A table with a test of two variants.
fn table(counter: u64, control: &[std::net::SocketAddr], treatment: &[std::net::SocketAddr]) -> TableBuilder {
    let weights = [("control", 90), ("treatment", 10)]
        .map(|(revision, weight)| RevisionWeight { revision: revision.into(), weight });
    let split = wire::Split {
        by: wire::SplitBy::User.into(),
        user_header: "x-user-id".to_owned(),
        salt: "s1".to_owned(),
        owners: BucketOwners::with_weights(&weights).unwrap().to_ranges(),
        forced_users: vec![wire::ForcedUser { user: "qa".to_owned(), variant: "treatment".to_owned() }],
        ..wire::Split::default()
    };
    let variant = |name: &str, weight| wire::RouteVariant { name: name.to_owned(), weight };
    let test = wire::RouteTest {
        uid: "t1".to_owned(),
        epoch: 3,
        variants: vec![variant("control", 9000), variant("treatment", 1000)],
        feedback_metric: "score".to_owned(),
        baseline: false,
    };
    TableBuilder::new(1, counter)
        .route("chat")
        .split(split)
        .test(test)
        .backend("control:r1", 1, control)
        .variant("control")
        .backend("treatment:r1", 1, treatment)
        .variant("treatment")
}

/// Sends a request of a user. Gives the status, the variant that the answer names, and its id.
async fn send(scene: &Scene, user: Option<&str>) -> (StatusCode, String, String) {
    let mut request = post(scene.http(), "/v1/generate", r#"{"model": "chat"}"#);
    if let Some(user) = user {
        request.headers_mut().insert("x-user-id", user.parse().unwrap());
    }
    let response = soon("an answer", scene.client.request(request)).await.unwrap();
    let header = |name: &str| {
        response.headers().get(name).map_or(String::new(), |value| value.to_str().unwrap().to_owned())
    };
    let (variant, id) = (header("x-trustformers-variant"), header("x-request-id"));
    (text(response).await.0, variant, id)
}

/// The last that was reported of a bucket, summed over the buckets of each variant, and its users.
#[derive(Debug, Default, PartialEq)]
struct Reported {
    requests: u64,
    scores: u64,
    users: BTreeSet<u64>,
}

fn reported(scene: &Scene) -> BTreeMap<String, Reported> {
    let mut buckets = BTreeMap::new();
    let mut all: BTreeMap<String, Reported> = BTreeMap::new();
    for counts in scene.operator.variants() {
        assert_eq!((counts.test.as_str(), counts.epoch), ("t1", 3));
        all.entry(counts.variant.clone()).or_default().users.extend(counts.users);
        for bucket in counts.buckets {
            buckets.insert((counts.variant.clone(), bucket.bucket), (bucket.requests, bucket.scores));
        }
    }
    for ((variant, _), (requests, scores)) in buckets {
        let sums = all.entry(variant).or_default();
        sums.requests += requests;
        sums.scores += scores;
    }
    all
}

#[tokio::test]
async fn what_is_reported_of_variants_is_what_their_callers_counted() {
    let (control, treatment) = (Pod::named("control").await, Pod::named("treatment").await);
    let scene = Scene::with_table(table(1, &[control.address], &[treatment.address])).await;
    let mut requests: BTreeMap<String, u64> = BTreeMap::new();
    let mut users: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let (mut last, mut last_user) = (String::new(), String::new());
    for round in 0..2 {
        for number in 0..100 {
            let user = format!("user-{number}");
            let (status, variant, id) = send(&scene, Some(&user)).await;
            assert_eq!(status, StatusCode::OK);
            *requests.entry(variant.clone()).or_default() += 1;
            let is_new = users.entry(variant).or_default().insert(user.clone());
            assert_eq!(is_new, round == 0, "a user keeps the variant");
            (last, last_user) = (id, user);
        }
    }
    assert_eq!(requests["control"] + requests["treatment"], 200);
    // Requests that do not count, and a score of the last answer that does.
    assert_eq!(send(&scene, Some("qa")).await.1, "treatment", "a forced user");
    let mut named = post(scene.http(), "/v1/generate", r#"{"model": "chat"}"#);
    for (name, value) in [("x-user-id", "user-1"), ("x-trustformers-revision", "r1")] {
        named.headers_mut().insert(name, value.parse().unwrap());
    }
    let _of_a_revision = text(scene.client.request(named).await.unwrap()).await;
    let _without_user = send(&scene, None).await;
    let score = format!(r#"{{"request_id": "{last}", "score": 1}}"#);
    for (user, expected) in [("user-0", StatusCode::NOT_FOUND), (last_user.as_str(), StatusCode::OK)] {
        let mut request = post(scene.http(), "/v1/feedback", score.clone());
        request.headers_mut().insert("x-user-id", user.parse().unwrap());
        let scored = scene.client.request(request).await.unwrap();
        assert_eq!(scored.status(), expected, "a score of {user}");
    }
    until("every request to be reported", || async {
        let all = reported(&scene);
        let scores: u64 = all.values().map(|one| one.scores).sum();
        let expected = |variant: &str| {
            all.get(variant).is_some_and(|one| {
                one.requests == requests[variant] && one.users.len() == users[variant].len()
            })
        };
        expected("control") && expected("treatment") && scores == 1
    })
    .await;
    let sum = |of: fn(&wire::VariantCounts) -> u64| {
        let mut last = BTreeMap::new();
        for counts in scene.operator.variants() {
            last.insert(counts.variant.clone(), of(&counts));
        }
        last.values().sum::<u64>()
    };
    until("the others to be reported", || async {
        (sum(|counts| counts.forced), sum(|counts| counts.unidentified)) == (2, 1)
    })
    .await;
}

#[tokio::test]
async fn another_gateway_counts_a_score_by_the_token_of_its_answer() {
    let pod = Pod::named("control").await;
    let answering = Scene::with_table(table(1, &[pod.address], &[])).await;
    let other = Scene::with_table(table(1, &[pod.address], &[])).await;
    let mut request = post(answering.http(), "/v1/generate", r#"{"model": "chat"}"#);
    request.headers_mut().insert("x-user-id", "ann".parse().unwrap());
    let response = soon("an answer", answering.client.request(request)).await.unwrap();
    let header = |name: &str| response.headers()[name].to_str().unwrap().to_owned();
    let (id, token) = (header("x-request-id"), header("x-trustformers-feedback"));
    let score = |id: &str, more: &str| format!(r#"{{"request_id": "{id}", "score": 1{more}}}"#);
    let token = format!(r#", "token": "{token}""#);
    for (body, expected) in [
        (score(&id, ""), StatusCode::NOT_FOUND),
        (score("another", &token), StatusCode::NOT_FOUND),
        (score(&id, &token), StatusCode::OK),
        // Sent again it changes nothing.
        (score(&id, &token), StatusCode::OK),
    ] {
        let scored = other.client.request(post(other.http(), "/v1/feedback", body.clone())).await.unwrap();
        assert_eq!(scored.status(), expected, "{body}");
    }
    until("the score to be reported", || async {
        reported(&other).values().map(|one| one.scores).sum::<u64>() == 1
    })
    .await;
}

#[tokio::test]
async fn a_request_that_another_variant_answers_counts_at_its_own_as_a_fallback() {
    let control = Pod::named("control").await;
    let scene = Scene::with_table(table(1, &[control.address], &[])).await;
    for number in 0..100 {
        let (status, variant, _) = send(&scene, Some(&format!("user-{number}"))).await;
        assert_eq!((status, variant.as_str()), (StatusCode::OK, "control"));
    }
    until("every request to be reported", || async {
        reported(&scene).values().map(|one| one.requests).sum::<u64>() == 100
    })
    .await;
    let treatment = reported(&scene).remove("treatment").unwrap();
    let fallbacks = scene.operator.variants().into_iter().filter(|one| one.variant == "treatment");
    let fallbacks = fallbacks.map(|one| one.fallbacks).max();
    assert_eq!(fallbacks, Some(treatment.requests));
    assert!((1..=30).contains(&treatment.requests), "{treatment:?}");
}
