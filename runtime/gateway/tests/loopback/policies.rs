//! What a route's policy and split do: breakers, time limits, budgets, checks, users, shares that wait.

use std::collections::HashMap;

use http::StatusCode;
use trustformers_proto::buckets::{BucketOwners, RevisionWeight};
use trustformers_proto::control::v1 as wire;

use crate::operator::TableBuilder;
use crate::pods::{Answer, Pod, full};
use crate::{Scene, client, json, post, soon, text, until};

/// A pod that never answers.
async fn hung() -> Pod {
    Pod::start(|_, _| async {
        std::future::pending::<()>().await;
        unreachable!("the request is never answered")
    })
    .await
}

#[tokio::test]
async fn a_request_whose_connection_broke_reaches_no_second_pod() {
    let (victim, other) = (hung().await, Pod::named("other").await);
    let table = |counter, pods: &[_]| TableBuilder::new(1, counter).route("a").backend("r1", 1, pods);
    let scene = Scene::with_table(table(1, &[victim.address])).await;
    let body = r#"{"model": "a", "prompt": "p"}"#;
    let waiting = tokio::spawn(client(false).request(post(scene.http(), "/v1/generate", body)));
    until("the request to arrive", || async { victim.requests() == 1 }).await;
    scene.publish(table(2, &[victim.address, other.address])).await;
    soon("the pod to end", victim.kill()).await;
    let (status, body) = text(soon("an answer", waiting).await.unwrap().unwrap()).await;
    assert_eq!((status, &json(&body)["error"]["type"]), (StatusCode::BAD_GATEWAY, &"bad_upstream".into()));
    assert_eq!(other.requests(), 0);
    // The next request can't reach the pod any more, and is retried.
    for _ in 0..10 {
        assert_eq!(scene.answer("a").await, (StatusCode::OK, "other".to_owned()));
    }
}

#[tokio::test]
async fn a_breaker_leaves_a_failing_pod_out() {
    let bad = Pod::declining(StatusCode::INTERNAL_SERVER_ERROR).await;
    let good = Pod::named("good").await;
    let breaker = wire::CircuitBreaker { consecutive_failures: 3, open_ms: 600_000, ..Default::default() };
    let table =
        TableBuilder::new(1, 1).route("a").with_policy(|policy| policy.circuit_breaker = Some(breaker));
    let scene = Scene::with_table(table.backend("r1", 1, &[bad.address, good.address])).await;
    until("three failures", || async {
        scene.answer("a").await;
        bad.requests() == 3
    })
    .await;
    for _ in 0..30 {
        assert_eq!(scene.answer("a").await, (StatusCode::OK, "good".to_owned()));
    }
    assert_eq!(bad.requests(), 3);
}

#[tokio::test]
async fn an_attempts_limit_leaves_a_hung_pod_and_opens_its_breaker() {
    let (hung, good) = (hung().await, Pod::named("good").await);
    let breaker = wire::CircuitBreaker { consecutive_failures: 2, open_ms: 600_000, ..Default::default() };
    let table = TableBuilder::new(1, 1).route("a").with_policy(|policy| {
        policy.attempt_timeout_ms = 50;
        policy.first_byte_timeout_ms = 60_000;
        policy.circuit_breaker = Some(breaker);
    });
    let scene = Scene::with_table(table.backend("r1", 1, &[hung.address, good.address])).await;
    for _ in 0..30 {
        assert_eq!(scene.answer("a").await, (StatusCode::OK, "good".to_owned()));
    }
    assert_eq!(hung.requests(), 2);
    let retries = r#"trustformers_gateway_retries_total{reason="timeout",revision="r1",route="default/a"}"#;
    assert!((scene.metric(retries).await - 2.0).abs() < 1e-9);
}

#[tokio::test]
async fn a_request_that_encodes_gets_the_answer_of_the_faster_of_two_pods() {
    let (slow, good) = (hung().await, Pod::named("good").await);
    let (slow_to_generate, other) = (hung().await, Pod::named("other").await);
    let hedged = |policy: &mut wire::Policy| {
        policy.hedge = Some(wire::Hedge { delay_ms: 5, budget_percent: 100 });
    };
    let table = TableBuilder::new(1, 1).route("a").with_policy(hedged);
    let table = table.backend("r1", 1, &[slow.address, good.address]).route("b").with_policy(hedged);
    let scene = Scene::with_table(table.backend("r1", 1, &[slow_to_generate.address, other.address])).await;
    // What generates is never sent twice: this one waits.
    let waiting = loop {
        let body = r#"{"model": "b", "prompt": "p"}"#;
        let sent = tokio::spawn(client(false).request(post(scene.http(), "/v1/generate", body)));
        until("a prompt to be there", || async { slow_to_generate.requests() > 0 || sent.is_finished() })
            .await;
        if slow_to_generate.requests() > 0 {
            break sent;
        }
    };
    for _ in 0..20 {
        let request = post(scene.http(), "/v1/embeddings", r#"{"model": "a", "input": "p"}"#);
        let response = soon("an answer", scene.client.request(request)).await.unwrap();
        assert_eq!(text(response).await, (StatusCode::OK, "good".to_owned()));
    }
    let series = |name: &str, label: &str, route: &str| {
        format!("trustformers_gateway_{name}_total{{{label},revision=\"r1\",route=\"default/{route}\"}}")
    };
    let hedges = scene.metric(&series("retries", "reason=\"hedge\"", "a")).await;
    assert!(hedges > 0.5, "the slow pod was asked first at least once in 20 requests");
    // The loser is cancelled, and has not failed.
    until("the losers to be counted", || async {
        let cancelled = scene.metric(&series("attempts", "outcome=\"cancelled\"", "a")).await;
        (cancelled - hedges).abs() < 1e-9
    })
    .await;
    assert!((scene.metric(&series("attempts", "outcome=\"ok\"", "a")).await - 20.0).abs() < 1e-9);
    assert!(scene.metric(&series("retries", "reason=\"hedge\"", "b")).await < 0.5);
    assert!(!waiting.is_finished());
    waiting.abort();
}

#[tokio::test]
async fn without_a_budget_a_failure_is_not_retried() {
    let resetting = || Pod::start(|_, _| async { Err("reset by the test".into()) });
    let (one, two) = (resetting().await, resetting().await);
    let table = TableBuilder::new(1, 1).route("a").with_policy(|policy| {
        policy.retry =
            Some(wire::Retry { base_delay_ms: 1, budget_percent: 0, min_retries: 1, window_ms: 600_000 });
    });
    let scene = Scene::with_table(table.backend("r1", 1, &[one.address, two.address])).await;
    for expected in [2, 3, 4] {
        assert_eq!(scene.answer("a").await.0, StatusCode::BAD_GATEWAY);
        assert_eq!(one.requests() + two.requests(), expected);
    }
}

#[tokio::test]
async fn a_pod_that_fails_its_checks_is_left_out() {
    let unready = Pod::start(|parts, _| async move {
        let ready = parts.uri.path() != "/health/ready";
        let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        Ok::<Answer, _>(full(status, "unready"))
    })
    .await;
    let good = Pod::named("good").await;
    let table = TableBuilder::new(1, 1).route("a").with_policy(|policy| {
        policy.health_check =
            Some(wire::HealthCheck { interval_ms: 1000, timeout_ms: 1000, down_after: 1, up_after: 1 });
    });
    let scene = Scene::with_table(table.backend("r1", 1, &[unready.address, good.address])).await;
    // By chance 20 in a row go to one of two pods once in a million.
    let mut in_a_row = 0;
    while in_a_row < 20 {
        let (status, name) = scene.answer("a").await;
        assert_eq!(status, StatusCode::OK);
        in_a_row = if name == "good" { in_a_row + 1 } else { 0 };
    }
    let mut checks = unready.paths().into_iter();
    assert!(checks.any(|path| path == "/health/ready"));
}

fn by_user(weights: &[RevisionWeight], before: Option<&BucketOwners>) -> BucketOwners {
    before.map_or_else(|| BucketOwners::with_weights(weights), |before| before.changed_to(weights)).unwrap()
}

fn weights(stable: u32, candidate: u32) -> [RevisionWeight; 2] {
    [("stable", stable), ("candidate", candidate)]
        .map(|(revision, weight)| RevisionWeight { revision: revision.into(), weight })
}

fn split(owners: &BucketOwners) -> wire::Split {
    wire::Split {
        by: wire::SplitBy::User.into(),
        user_header: "x-user-id".to_owned(),
        salt: "s1".to_owned(),
        owners: owners.to_ranges(),
        forced_header: "x-revision".to_owned(),
        forced_revisions: vec!["candidate".to_owned()],
        ..wire::Split::default()
    }
}

#[tokio::test]
async fn users_keep_their_revision_and_a_forced_one_is_for_the_listed_only() {
    let (stable, candidate) = (Pod::named("stable").await, Pod::named("candidate").await);
    let table = |counter, owners: &BucketOwners| {
        let route = TableBuilder::new(1, counter).route("a").split(split(owners));
        // The weights are for requests without a user.
        route.backend("stable", 1, &[stable.address]).backend("candidate", 0, &[candidate.address])
    };
    let first = by_user(&weights(80, 20), None);
    let scene = Scene::with_table(table(1, &first)).await;
    let send = async |headers: &[(&'static str, String)]| {
        let mut request = post(scene.http(), "/v1/generate", r#"{"model": "a"}"#);
        for (name, value) in headers {
            request.headers_mut().insert(*name, value.parse().unwrap());
        }
        text(soon("an answer", scene.client.request(request)).await.unwrap()).await.1
    };
    let users = |user: u32| ("x-user-id", format!("user-{user}"));
    let mut seen: HashMap<u32, String> = HashMap::new();
    for _ in 0..2 {
        for user in 0..200 {
            let revision = send(&[users(user)]).await;
            assert_eq!(*seen.entry(user).or_insert_with(|| revision.clone()), revision, "user {user}");
        }
    }
    let of_candidate =
        |seen: &HashMap<u32, String>| seen.values().filter(|name| *name == "candidate").count();
    // 40 expected; five standard deviations are 28.
    assert!((12..=68).contains(&of_candidate(&seen)), "{}", of_candidate(&seen));
    scene.publish(table(2, &by_user(&weights(50, 50), Some(&first)))).await;
    for user in 0..200 {
        let revision = send(&[users(user)]).await;
        if seen.insert(user, revision.clone()).is_some_and(|before| before == "candidate") {
            assert_eq!(revision, "candidate", "user {user} flipped back");
        }
    }
    assert!((65..=135).contains(&of_candidate(&seen)), "{}", of_candidate(&seen));
    let stays = seen.iter().find(|(_, name)| *name == "stable").map(|(user, _)| *user).unwrap();
    let forced = |revision: &str| ("x-revision", revision.to_owned());
    assert_eq!(send(&[users(stays), forced("candidate")]).await, "candidate");
    let moved = seen.iter().find(|(_, name)| *name == "candidate").map(|(user, _)| *user).unwrap();
    assert_eq!(send(&[users(moved), forced("stable")]).await, "candidate", "stable is not on the list");
    assert_eq!(send(&[]).await, "stable");
}

#[tokio::test]
async fn the_share_of_a_revision_without_pods_waits_where_its_backend_says_so() {
    let stable = Pod::named("stable").await;
    let table = |counter, candidates: &[_]| {
        let route = TableBuilder::new(1, counter).route("a").hold(60_000);
        route.backend("stable", 1, &[stable.address]).backend("candidate", 1, candidates).keeps_share()
    };
    let scene = Scene::with_table(table(1, &[])).await;
    let body = r#"{"model": "a"}"#;
    let send = || tokio::spawn(client(false).request(post(scene.http(), "/v1/generate", body)));
    let mut sent: Vec<_> = (0..10).map(|_| send()).collect();
    let held = r#"trustformers_gateway_held{route="default/a"}"#;
    until("half to be answered, half to be held", || async {
        stable.requests() == 5 && (scene.metric(held).await - 5.0).abs() < 1e-9
    })
    .await;
    let candidate = Pod::named("candidate").await;
    scene.publish(table(2, &[candidate.address])).await;
    for answer in sent.drain(..) {
        assert_eq!(soon("an answer", answer).await.unwrap().unwrap().status(), StatusCode::OK);
    }
    assert_eq!((stable.requests(), candidate.requests()), (5, 5));
}
