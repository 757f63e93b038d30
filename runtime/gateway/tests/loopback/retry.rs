//! Which failures are retried on another pod.

use http::StatusCode;
use http_body_util::BodyExt;
use tokio::sync::mpsc;

use crate::operator::TableBuilder;
use crate::pods::{Pod, full};
use crate::{Scene, json, soon, text};

fn retries(reason: &str) -> String {
    format!(r#"trustformers_gateway_retries_total{{reason="{reason}",revision="r1",route="default/a"}}"#)
}

/// A pod that resets every stream before its answer.
pub(crate) async fn resetting() -> Pod {
    Pod::start(|_, _| async { Err("reset by the test".into()) }).await
}

#[tokio::test]
async fn an_absent_pod_fails_no_request() {
    let gone = Pod::absent().await;
    let here = Pod::named("here").await;
    let scene =
        Scene::with_table(TableBuilder::new(1, 1).route("a").backend("r1", 1, &[gone, here.address])).await;
    for _ in 0..50 {
        assert_eq!(scene.answer("a").await, (StatusCode::OK, "here".to_owned()));
    }
    // It was tried, and then ejected for a while instead of being tried for every request.
    let failed = r#"trustformers_gateway_connect_errors_total{revision="r1",route="default/a"}"#;
    let failed = scene.metric(failed).await;
    assert!((1.0..20.0).contains(&failed), "{failed} attempts of 50");
    assert!((scene.metric(&retries("connect")).await - failed).abs() < 1e-9);
}

#[tokio::test]
async fn a_reset_before_the_head_is_retried() {
    let (bad, good) = (resetting().await, Pod::named("good").await);
    let scene =
        Scene::with_table(TableBuilder::new(1, 1).route("a").backend("r1", 1, &[bad.address, good.address]))
            .await;
    for _ in 0..20 {
        assert_eq!(scene.answer("a").await, (StatusCode::OK, "good".to_owned()));
    }
    assert!(bad.requests() > 0, "the bad pod was not chosen in 20 requests");
    assert_eq!(good.requests(), 20);
    assert!((scene.metric(&retries("reset")).await - bad.requests() as f64).abs() < 1e-9);
}

#[tokio::test]
async fn retries_have_a_bound_and_no_pod_is_tried_twice() {
    let pods = [resetting().await, resetting().await, resetting().await];
    let addresses: Vec<_> = pods.iter().map(|pod| pod.address).collect();
    let requests = || pods.iter().map(Pod::requests).sum::<usize>();
    let table = |counter, allowed| {
        TableBuilder::new(1, counter).route("a").policy(0, allowed).backend("r1", 1, &addresses)
    };
    let scene = Scene::with_table(table(1, 1)).await;
    for (counter, allowed, expected) in [(2, 0, 1), (3, 1, 2), (4, 2, 3), (5, 9, 3)] {
        scene.publish(table(counter, allowed)).await;
        let before = requests();
        let (status, body) = scene.answer("a").await;
        assert_eq!(status, StatusCode::BAD_GATEWAY);
        let error = &json(&body)["error"];
        assert_eq!(error["type"], "bad_upstream");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(&format!("after {expected} attempt")), "{message}");
        assert_eq!(requests() - before, expected, "{allowed} retries");
    }
    let server_errors =
        r#"trustformers_gateway_requests_total{code="5xx",protocol="http",revision="r1",route="default/a"}"#;
    assert!((scene.metric(server_errors).await - 4.0).abs() < 1e-9);
}

#[tokio::test]
async fn unreachable_pods_are_502_and_no_pods_are_503() {
    let gone = Pod::absent().await;
    let table = TableBuilder::new(1, 1).route("a").backend("r1", 1, &[gone]).route("b").backend("r1", 1, &[]);
    let scene = Scene::with_table(table).await;
    let (status, body) = scene.answer("a").await;
    assert_eq!(
        (status, json(&body)["error"]["type"].as_str()),
        (StatusCode::BAD_GATEWAY, Some("unreachable"))
    );
    // Every endpoint is ejected now, and one is tried all the same.
    assert_eq!(scene.answer("a").await.0, StatusCode::BAD_GATEWAY);
    let (status, body) = scene.answer("b").await;
    assert_eq!(
        (status, json(&body)["error"]["type"].as_str()),
        (StatusCode::SERVICE_UNAVAILABLE, Some("unavailable"))
    );
}

#[tokio::test]
async fn a_request_to_an_ending_or_full_pod_is_retried() {
    for status in [StatusCode::SERVICE_UNAVAILABLE, StatusCode::TOO_MANY_REQUESTS] {
        let (no, yes) = (Pod::declining(status).await, Pod::named("yes").await);
        let scene = Scene::with_table(TableBuilder::new(1, 1).route("a").backend(
            "r1",
            1,
            &[no.address, yes.address],
        ))
        .await;
        for _ in 0..20 {
            assert_eq!(scene.answer("a").await, (StatusCode::OK, "yes".to_owned()), "{status}");
        }
        assert!(no.requests() > 0, "the declining pod was not chosen in 20 requests");
    }
}

#[tokio::test]
async fn if_all_queues_are_full_the_caller_gets_the_pods_429() {
    let full = StatusCode::TOO_MANY_REQUESTS;
    let pods = [Pod::declining(full).await, Pod::declining(full).await, Pod::declining(full).await];
    let addresses: Vec<_> = pods.iter().map(|pod| pod.address).collect();
    let scene =
        Scene::with_table(TableBuilder::new(1, 1).route("a").policy(0, 5).backend("r1", 1, &addresses)).await;
    let response = scene.request("a").await;
    assert_eq!(response.headers()["retry-after"], "7");
    assert_eq!(text(response).await, (full, "declined by the pod".to_owned()));
    // One retry and no more: overload must not be multiplied.
    assert_eq!(pods.iter().map(Pod::requests).sum::<usize>(), 2);
}

#[tokio::test]
async fn a_429_survives_failures_of_other_pods() {
    let full = Pod::declining(StatusCode::TOO_MANY_REQUESTS).await;
    let (gone, reset) = (Pod::absent().await, resetting().await);
    let unavailable = Pod::declining(StatusCode::SERVICE_UNAVAILABLE).await;
    let table = |counter, other| {
        TableBuilder::new(1, counter).route("a").policy(0, 1).backend("r1", 1, &[full.address, other])
    };
    let scene = Scene::with_table(table(1, gone)).await;
    for (counter, other) in [(2, gone), (3, reset.address), (4, unavailable.address)] {
        scene.publish(table(counter, other)).await;
        // In both orders: which pod is first is random.
        for _ in 0..10 {
            let response = scene.request("a").await;
            assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS, "{counter}");
            assert_eq!(response.headers()["retry-after"], "7");
        }
    }
}

#[tokio::test]
async fn a_429_survives_a_timeout_of_another_pod() {
    let full = Pod::declining(StatusCode::TOO_MANY_REQUESTS).await;
    let silent = Pod::start(|_, _| async {
        std::future::pending::<()>().await;
        unreachable!("the request is never answered")
    })
    .await;
    let table =
        TableBuilder::new(1, 1).route("a").policy(500, 1).backend("r1", 1, &[full.address, silent.address]);
    let scene = Scene::with_table(table).await;
    let mut statuses = Vec::new();
    while full.requests() == 0 {
        statuses.push(scene.request("a").await.status());
    }
    assert_eq!(statuses.pop(), Some(StatusCode::TOO_MANY_REQUESTS), "{statuses:?}");
}

#[tokio::test]
async fn a_pods_503_passes_if_there_is_no_other_pod() {
    let declining = Pod::declining(StatusCode::SERVICE_UNAVAILABLE).await;
    let scene =
        Scene::with_table(TableBuilder::new(1, 1).route("a").backend("r1", 1, &[declining.address])).await;
    assert_eq!(scene.answer("a").await, (StatusCode::SERVICE_UNAVAILABLE, "declined by the pod".to_owned()));
}

#[tokio::test]
async fn a_400_is_not_retried() {
    let pods = [Pod::declining(StatusCode::BAD_REQUEST).await, Pod::declining(StatusCode::BAD_REQUEST).await];
    let addresses: Vec<_> = pods.iter().map(|pod| pod.address).collect();
    let scene = Scene::with_table(TableBuilder::new(1, 1).route("a").backend("r1", 1, &addresses)).await;
    assert_eq!(scene.answer("a").await.0, StatusCode::BAD_REQUEST);
    assert_eq!(pods.iter().map(Pod::requests).sum::<usize>(), 1);
}

#[tokio::test]
async fn an_answer_that_does_not_begin_in_time_is_504() {
    let (events, mut receiver) = mpsc::channel::<()>(1);
    let silent = Pod::start(move |_, _| {
        let events = events.clone();
        async move {
            // The test ends this wait by closing the receiver.
            events.closed().await;
            Ok(full(StatusCode::OK, "too late"))
        }
    })
    .await;
    let scene = Scene::with_table(TableBuilder::new(1, 1).route("a").policy(50, 1).backend(
        "r1",
        1,
        &[silent.address],
    ))
    .await;
    let (status, body) = scene.answer("a").await;
    assert_eq!(status, StatusCode::GATEWAY_TIMEOUT);
    assert!(json(&body)["error"]["message"].as_str().unwrap().contains("50 ms"), "{body}");
    receiver.close();
}

#[tokio::test]
async fn requests_survive_a_goaway_and_a_restart_of_the_pod() {
    let pod = Pod::named("before").await;
    let scene = Scene::with_table(TableBuilder::new(1, 1).route("a").backend("r1", 1, &[pod.address])).await;
    assert_eq!(scene.answer("a").await.1, "before");
    let address = pod.address;
    pod.send_goaway();
    // Requests use the connection in every stage of its end, and none fails.
    for _ in 0..50 {
        assert_eq!(scene.answer("a").await, (StatusCode::OK, "before".to_owned()));
    }
    // A restart of the process at the same address, which the pool does not notice.
    soon("the pod to end", pod.kill()).await;
    let again = Pod::start_at(address, |_, _| async { Ok(full(StatusCode::OK, "after")) }).await;
    let answer = scene.request("a").await;
    assert_eq!(answer.status(), StatusCode::OK);
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "after");
    assert_eq!(again.requests(), 1);
}
