//! Routing tables: applied, refused, saved and awaited.

use std::fs;

use http::StatusCode;
use trustformers_gateway::start;

use crate::operator::{Operator, TableBuilder};
use crate::pods::Pod;
use crate::{Scene, client, get, post, settings, text, until};

#[tokio::test]
async fn an_older_table_is_refused() {
    let (old, new) = (Pod::named("old").await, Pod::named("new").await);
    let scene = Scene::with_table(TableBuilder::new(5, 2).route("a").backend("r1", 1, &[new.address])).await;
    let before = scene.operator.reports();
    scene.operator.publish(TableBuilder::new(5, 1).route("a").backend("r1", 1, &[old.address]));
    let refused = r#"trustformers_gateway_tables_refused_total{reason="stale"}"#;
    until("the table to be refused", || async { scene.metric(refused).await > 0.5 }).await;
    // The next report has the version in force.
    let report = scene.operator.report(before, |_| true).await;
    assert_eq!(report.acknowledged, Some(TableBuilder::new(5, 2).version()));
    assert_eq!(scene.answer("a").await.1, "new");
    scene.publish(TableBuilder::new(6, 0).route("a").backend("r1", 1, &[old.address])).await;
    assert_eq!(scene.answer("a").await.1, "old");
}

#[tokio::test]
async fn an_invalid_table_leaves_the_last_one_in_force() {
    let pod = Pod::named("one").await;
    let table = |counter| TableBuilder::new(1, counter).route("a").backend("r1", 1, &[pod.address]);
    let scene = Scene::with_table(table(1)).await;
    // The same route twice.
    scene.operator.publish(table(2).route("a"));
    let refused = r#"trustformers_gateway_tables_refused_total{reason="invalid"}"#;
    until("the table to be refused", || async { scene.metric(refused).await > 0.5 }).await;
    assert_eq!(scene.answer("a").await.1, "one");
    scene.publish(table(3)).await;
}

#[tokio::test]
async fn a_report_with_the_gateways_name_comes_every_second() {
    let scene = Scene::with_table(TableBuilder::new(1, 1)).await;
    let before = scene.operator.reports();
    for count in 0..2 {
        let report = scene.operator.report(before + count, |_| true).await;
        assert_eq!(report.instance, "gateway-under-test");
        assert!(!report.draining);
    }
}

#[tokio::test]
async fn the_gateway_serves_while_the_operator_restarts() {
    let (one, two) = (Pod::named("one").await, Pod::named("two").await);
    let mut scene =
        Scene::with_table(TableBuilder::new(1, 1).route("a").backend("r1", 1, &[one.address])).await;
    for round in 2..5 {
        scene.operator.stop().await;
        until("the loss to be noticed", || async {
            scene.metric("trustformers_gateway_feed_connected").await < 0.5
        })
        .await;
        assert_eq!(scene.get("/health/ready").await.0, StatusCode::OK);
        assert_eq!(scene.answer("a").await.0, StatusCode::OK);
        // The model may be newer than the table; only the operator can decide that.
        let (status, body) = scene.answer("created-later").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(body.contains("table_outdated"), "{body}");
        scene.operator.restart().await;
        let pod = if round % 2 == 0 { &two } else { &one };
        scene.publish(TableBuilder::new(round, 0).route("a").backend("r1", 1, &[pod.address])).await;
        assert_eq!(scene.answer("a").await.1, if round % 2 == 0 { "two" } else { "one" });
        assert_eq!(scene.answer("created-later").await.0, StatusCode::NOT_FOUND);
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
    operator.restart().await;
    until("the second connect", || async { operator.tokens().len() >= 2 }).await;
    let tokens = operator.tokens();
    assert_eq!(tokens[0].as_deref(), Some("Bearer first"));
    assert_eq!(tokens[1].as_deref(), Some("Bearer second"));
    drop(gateway);
}

#[tokio::test]
async fn a_restarted_gateway_serves_without_an_operator() {
    let pod = Pod::named("one").await;
    let mut scene =
        Scene::with_table(TableBuilder::new(2, 7).route("a").backend("r1", 1, &[pod.address])).await;
    let file = scene.state.path().join("table");
    until("the table to be saved", || async { file.exists() }).await;
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

    // A damaged file counts as none, and the gateway starts.
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
async fn only_a_newer_table_replaces_the_saved_one() {
    let pod = Pod::named("one").await;
    let mut scene =
        Scene::with_table(TableBuilder::new(2, 7).route("a").backend("r1", 1, &[pod.address])).await;
    let file = scene.state.path().join("table");
    until("the table to be saved", || async { file.exists() }).await;
    scene.operator.stop().await;
    let Scene { gateway, mut operator, state, client } = scene;
    gateway.finish().await;
    operator.publish(TableBuilder::new(2, 6).route("b").backend("r1", 1, &[pod.address]));
    operator.restart().await;
    let before = operator.reports();
    let gateway = start(settings(operator.address(), state.path(), &[])).await.unwrap();
    let scene = Scene { gateway, operator, state, client };
    let report = scene.operator.report(before, |_| true).await;
    assert_eq!(report.acknowledged, Some(TableBuilder::new(2, 7).version()));
    let refused = r#"trustformers_gateway_tables_refused_total{reason="stale"}"#;
    until("the older one to be refused", || async { scene.metric(refused).await > 0.5 }).await;
    assert_eq!(scene.answer("a").await.1, "one");
    scene.publish(TableBuilder::new(2, 8).route("b").backend("r1", 1, &[pod.address])).await;
    assert_eq!(scene.answer("a").await.0, StatusCode::NOT_FOUND);
    assert_eq!(scene.answer("b").await.1, "one");
}

#[tokio::test]
async fn an_unusable_state_folder_is_named_at_the_start() {
    let state = tempfile::tempdir().unwrap();
    let occupied = state.path().join("file");
    fs::write(&occupied, "").unwrap();
    let error = start(settings(Pod::absent().await, &occupied, &[])).await.unwrap_err().to_string();
    assert!(error.contains("--state-dir") && error.contains(occupied.to_str().unwrap()), "{error}");
}
