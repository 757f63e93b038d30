//! Requests for models without a pod, and what counts of callers' own words.

use http::StatusCode;
use trustformers_proto::control::v1::HeldRequests;

use crate::operator::TableBuilder;
use crate::pods::Pod;
use crate::{Scene, client, json, post, soon, text, until};

const HELD: &str = r#"trustformers_gateway_held{route="default/a"}"#;

#[tokio::test]
async fn a_held_request_is_answered_by_the_first_pod_that_comes() {
    let table = |counter| TableBuilder::new(1, counter).route("a").hold(60_000);
    let scene = Scene::with_table(table(1).backend("r1", 1, &[])).await;
    let send = || client(false).request(post(scene.http(), "/v1/generate", r#"{"model": "a"}"#));
    let (waiting, leaving) = (tokio::spawn(send()), tokio::spawn(send()));
    until("both to be held", || async { scene.metric(HELD).await > 1.5 }).await;
    let held = [HeldRequests { route: "default/a".to_owned(), count: 2 }];
    scene.operator.report(0, |report| report.held == held).await;
    leaving.abort();
    until("the caller that left to free its place", || async { scene.metric(HELD).await < 1.5 }).await;
    let pod = Pod::named("came").await;
    scene.publish(table(2).backend("r1", 1, &[pod.address])).await;
    let answer = soon("the held answer", waiting).await.unwrap().unwrap();
    assert_eq!(text(answer).await, (StatusCode::OK, "came".to_owned()));
    assert_eq!(pod.requests(), 1);
    assert!(scene.metric(HELD).await < 0.5);
}

#[tokio::test]
async fn the_routes_time_to_hold_ends_with_503() {
    let scene = Scene::with_table(TableBuilder::new(1, 1).route("a").hold(50).backend("r1", 1, &[])).await;
    let response = scene.request("a").await;
    assert_eq!(response.headers()["retry-after"], "1");
    let (status, body) = text(response).await;
    assert_eq!(
        (status, &json(&body)["error"]["type"]),
        (StatusCode::SERVICE_UNAVAILABLE, &"unavailable".into())
    );
    assert!(body.contains("50 ms"), "{body}");
}

#[tokio::test]
async fn a_callers_tenant_and_class_reach_the_pod_only_where_the_route_allows_it() {
    let pod = Pod::named("one").await;
    let table = |counter| TableBuilder::new(1, counter).route("a");
    let scene = Scene::with_table(table(1).backend("r1", 1, &[pod.address])).await;
    let send = async || {
        let mut request = post(scene.http(), "/v1/generate", r#"{"model": "a"}"#);
        request.headers_mut().insert("x-gateway-inference-fairness-id", "mine".parse().unwrap());
        request.headers_mut().insert("x-trustformers-priority", "high".parse().unwrap());
        assert_eq!(scene.client.request(request).await.unwrap().status(), StatusCode::OK);
        let headers = pod.last_head().headers;
        ["x-gateway-inference-fairness-id", "x-trustformers-priority"]
            .map(|name| headers.get(name).map(|value| value.to_str().unwrap().to_owned()))
    };
    assert_eq!(send().await, [None, None]);
    scene.publish(table(2).accepting_caller_headers().backend("r1", 1, &[pod.address])).await;
    assert_eq!(send().await, [Some("mine".to_owned()), Some("high".to_owned())]);
}
