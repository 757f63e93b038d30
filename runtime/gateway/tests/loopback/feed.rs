//! Tables: taken, refused, kept, and waited for.

use std::fs;

use http::StatusCode;
use trustformers_gateway::start;

use crate::operator::{Operator, Table};
use crate::pods::Pod;
use crate::{Scene, client, get, post, settings, text, until};

#[tokio::test]
async fn an_older_table_is_refused() {
    let (old, new) = (Pod::named("old").await, Pod::named("new").await);
    let scene = Scene::with_table(Table::new(5, 2).route("a").backend("r1", 1, &[new.address])).await;
    let before = scene.operator.reports();
    scene.operator.publish(Table::new(5, 1).route("a").backend("r1", 1, &[old.address]));
    let refused = r#"trustformers_gateway_tables_refused_total{reason="stale"}"#;
    until("the table to be refused", || async { scene.metric(refused).await > 0.5 }).await;
    // The report that follows says what is in force.
    let report = scene.operator.report(before, |_| true).await;
    assert_eq!(report.acknowledged, Some(Table::new(5, 2).version()));
    assert_eq!(scene.answer("a").await.1, "new");
    scene.publish(Table::new(6, 0).route("a").backend("r1", 1, &[old.address])).await;
    assert_eq!(scene.answer("a").await.1, "old");
}

#[tokio::test]
async fn a_table_that_cannot_be_used_leaves_the_one_before() {
    let pod = Pod::named("one").await;
    let table = |counter| Table::new(1, counter).route("a").backend("r1", 1, &[pod.address]);
    let scene = Scene::with_table(table(1)).await;
    // The same route twice.
    scene.operator.publish(table(2).route("a"));
    let refused = r#"trustformers_gateway_tables_refused_total{reason="invalid"}"#;
    until("the table to be refused", || async { scene.metric(refused).await > 0.5 }).await;
    assert_eq!(scene.answer("a").await.1, "one");
    scene.publish(table(3)).await;
}

#[tokio::test]
async fn reports_come_every_second_and_name_the_gateway() {
    let scene = Scene::with_table(Table::new(1, 1)).await;
    let before = scene.operator.reports();
    for count in 0..2 {
        let report = scene.operator.report(before + count, |_| true).await;
        assert_eq!(report.instance, "gateway-under-test");
        assert!(!report.draining);
    }
}

#[tokio::test]
async fn the_operator_may_go_and_come_back() {
    let (one, two) = (Pod::named("one").await, Pod::named("two").await);
    let mut scene = Scene::with_table(Table::new(1, 1).route("a").backend("r1", 1, &[one.address])).await;
    for round in 2..5 {
        scene.operator.stop().await;
        until("the loss to be noticed", || async {
            scene.metric("trustformers_gateway_feed_connected").await < 0.5
        })
        .await;
        assert_eq!(scene.get("/health/ready").await.0, StatusCode::OK);
        assert_eq!(scene.answer("a").await.0, StatusCode::OK);
        // It may have been made since: that is for the operator to say.
        let (status, body) = scene.answer("made-meanwhile").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(body.contains("table_outdated"), "{body}");
        scene.operator.come_back().await;
        let pod = if round % 2 == 0 { &two } else { &one };
        scene.publish(Table::new(round, 0).route("a").backend("r1", 1, &[pod.address])).await;
        assert_eq!(scene.answer("a").await.1, if round % 2 == 0 { "two" } else { "one" });
        assert_eq!(scene.answer("made-meanwhile").await.0, StatusCode::NOT_FOUND);
    }
}

#[tokio::test]
async fn the_token_is_read_at_each_connect() {
    let mut operator = Operator::start().await;
    let state = tempfile::tempdir().unwrap();
    let file = state.path().join("token");
    fs::write(&file, "first\n").unwrap();
    let settings = settings(operator.address(), state.path(), &["--feed-token-file", file.to_str().unwrap()]);
    let gateway = start(settings).await.unwrap();
    until("the first connect", || async { operator.tokens().len() == 1 }).await;
    fs::write(&file, "second").unwrap();
    operator.stop().await;
    operator.come_back().await;
    until("the second connect", || async { operator.tokens().len() >= 2 }).await;
    let tokens = operator.tokens();
    assert_eq!(tokens[0].as_deref(), Some("Bearer first"));
    assert_eq!(tokens[1].as_deref(), Some("Bearer second"));
    drop(gateway);
}

#[tokio::test]
async fn a_restarted_gateway_serves_without_an_operator() {
    let pod = Pod::named("one").await;
    let mut scene = Scene::with_table(Table::new(2, 7).route("a").backend("r1", 1, &[pod.address])).await;
    let file = scene.state.path().join("table");
    until("the table to be kept", || async { file.exists() }).await;
    scene.operator.stop().await;
    let Scene { gateway, operator, state, .. } = scene;
    gateway.finish().await;
    let client = client(false);

    let gateway = start(settings(operator.address(), state.path(), &[])).await.unwrap();
    assert_eq!(get(&client, gateway.http_address(), "/health/ready").await.0, StatusCode::OK);
    let answer =
        client.request(post(gateway.http_address(), "/v1/generate", r#"{"model":"a"}"#)).await.unwrap();
    assert_eq!(text(answer).await, (StatusCode::OK, "one".to_owned()));
    gateway.finish().await;

    // A damaged file is as good as none, and does not keep the gateway from starting.
    let mut damaged = fs::read(&file).unwrap();
    let last = damaged.len() - 1;
    damaged[last] ^= 0x40;
    fs::write(&file, damaged).unwrap();
    let gateway = start(settings(operator.address(), state.path(), &[])).await.unwrap();
    for path in ["/health/ready", "/v1/models"] {
        let (status, body) = get(&client, gateway.http_address(), path).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{path}: {body}");
    }
}

#[tokio::test]
async fn a_kept_table_gives_way_to_a_newer_one_only() {
    let pod = Pod::named("one").await;
    let mut scene = Scene::with_table(Table::new(2, 7).route("a").backend("r1", 1, &[pod.address])).await;
    let file = scene.state.path().join("table");
    until("the table to be kept", || async { file.exists() }).await;
    scene.operator.stop().await;
    let Scene { gateway, mut operator, state, client } = scene;
    gateway.finish().await;
    operator.publish(Table::new(2, 6).route("b").backend("r1", 1, &[pod.address]));
    operator.come_back().await;
    let before = operator.reports();
    let gateway = start(settings(operator.address(), state.path(), &[])).await.unwrap();
    let scene = Scene { gateway, operator, state, client };
    let report = scene.operator.report(before, |_| true).await;
    assert_eq!(report.acknowledged, Some(Table::new(2, 7).version()));
    let refused = r#"trustformers_gateway_tables_refused_total{reason="stale"}"#;
    until("the older one to be refused", || async { scene.metric(refused).await > 0.5 }).await;
    assert_eq!(scene.answer("a").await.1, "one");
    scene.publish(Table::new(2, 8).route("b").backend("r1", 1, &[pod.address])).await;
    assert_eq!(scene.answer("a").await.0, StatusCode::NOT_FOUND);
    assert_eq!(scene.answer("b").await.1, "one");
}

#[tokio::test]
async fn a_state_folder_that_cannot_be_used_is_named_at_the_start() {
    let state = tempfile::tempdir().unwrap();
    let occupied = state.path().join("file");
    fs::write(&occupied, "").unwrap();
    let error = start(settings(Pod::absent().await, &occupied, &[])).await.unwrap_err().to_string();
    assert!(error.contains("--state-dir") && error.contains(occupied.to_str().unwrap()), "{error}");
}
