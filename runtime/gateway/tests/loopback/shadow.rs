//! Requests that another revision answers as well: compared, counted apart, and never in a caller's way.

use http::StatusCode;

use crate::operator::TableBuilder;
use crate::pods::{Answer, Pod, full};
use crate::{Scene, post, soon, text, until};

/// A pod that says this.
async fn saying(answer: &'static str) -> Pod {
    Pod::start(move |_, _| async move { Ok(full(StatusCode::OK, answer)) }).await
}

/// The series of a result.
fn series(result: &str) -> String {
    format!("trustformers_gateway_shadow_total{{result=\"{result}\",revision=\"r2\",route=\"default/a\"}}")
}

async fn scene(main: &Pod, other: &Pod, percent: u32) -> Scene {
    let table = TableBuilder::new(1, 1).route("a").shadow("r2", percent);
    let table = table.backend("r1", 1, &[main.address]).backend("r2", 0, &[other.address]);
    Scene::with_table(table).await
}

#[tokio::test]
async fn an_exact_share_is_compared_and_callers_get_the_answers_of_their_revision() {
    let main = saying(r#"{"text": "Paris", "tokens": [1]}"#).await;
    let other = saying(r#"{"text": "Paros", "tokens": [2]}"#).await;
    let scene = scene(&main, &other, 40).await;
    for _ in 0..100 {
        let (status, answer) = scene.answer("a").await;
        assert!(status == StatusCode::OK && answer.contains("Paris"), "{answer}");
    }
    let different = series("different");
    until("the comparisons", || async { scene.metric(&different).await > 39.5 }).await;
    assert_eq!((main.requests(), other.requests()), (100, 40));
    let sum = r#"trustformers_gateway_shadow_similarity_sum{kind="text",revision="r2",route="default/a"}"#;
    assert!((scene.metric(sum).await - 40.0 * 0.8).abs() < 1e-6, "one letter of five differs");
    // The shadow is behind every other request of its pod, and demands no format that can't be read.
    let head = other.last_head();
    assert_eq!(head.headers["x-trustformers-priority"], "low");
    assert!(!head.headers.contains_key("accept-encoding"));
    // A rollout does not see it.
    let attempts = r#"trustformers_gateway_attempts_total{outcome="ok",revision="r2",route="default/a"}"#;
    assert!(scene.metric(attempts).await < 0.5);
}

#[tokio::test]
async fn another_model_answers_by_its_own_shares_without_its_name() {
    let main = saying(r#"{"text": "Paris"}"#).await;
    let (old, new) = (saying(r#"{"text": "Paris"}"#).await, saying(r#"{"text": "Paris"}"#).await);
    let table = |counter, discard| {
        let table = TableBuilder::new(1, counter).route("a").shadow_route("default/b", discard);
        let table = table.backend("r1", 1, &[main.address]).route("b");
        table.backend("old", 0, &[old.address]).backend("new", 1, &[new.address])
    };
    let scene = Scene::with_table(table(1, false)).await;
    let series = |result: &str| {
        format!(
            "trustformers_gateway_shadow_total{{result=\"{result}\",revision=\"default/b\",route=\"default/a\"}}"
        )
    };
    for _ in 0..10 {
        assert_eq!(scene.answer("a").await.0, StatusCode::OK);
    }
    let same = series("same");
    until("the comparisons", || async { scene.metric(&same).await > 9.5 }).await;
    assert_eq!((main.requests(), old.requests(), new.requests()), (10, 0, 10));
    // The request names model a, which the pod of b does not have.
    assert_eq!(new.last_head().headers["x-trustformers-routed"], "1");
    assert!(!main.last_head().headers.contains_key("x-trustformers-routed"));
    // Its requests are not the route's: its own callers are not mirrored.
    assert_eq!(scene.answer("b").await.0, StatusCode::OK);
    assert_eq!((main.requests(), new.requests()), (10, 11));

    // Without a comparison an answer is counted and thrown away.
    scene.publish(table(2, true)).await;
    assert_eq!(scene.answer("a").await.0, StatusCode::OK);
    let answered = series("answered");
    until("the answer", || async { scene.metric(&answered).await > 0.5 }).await;
    assert!((scene.metric(&same).await - 10.0).abs() < 1e-9);
}

#[tokio::test]
async fn vectors_failures_and_equal_answers_are_told_apart() {
    let main = saying(r#"{"data": [{"embedding": [1.0, 0.5]}]}"#).await;
    let other = Pod::start(|parts, _| async move {
        Ok::<Answer, _>(match parts.headers.get("x-case").map(http::HeaderValue::as_bytes) {
            Some(b"same") => full(StatusCode::OK, r#"{"data": [{"embedding": [1.0, 0.5]}]}"#),
            Some(b"turned") => full(StatusCode::OK, r#"{"data": [{"embedding": [-1.0, -0.5]}]}"#),
            Some(b"text") => full(StatusCode::OK, "no JSON"),
            _ => full(StatusCode::INTERNAL_SERVER_ERROR, "{}"),
        })
    })
    .await;
    let scene = scene(&main, &other, 100).await;
    for (case, result) in
        [("same", "same"), ("turned", "different"), ("text", "incomparable"), ("fails", "failed")]
    {
        let mut request = post(scene.http(), "/v1/embeddings", r#"{"model": "a", "input": "p"}"#);
        request.headers_mut().insert("x-case", case.parse().unwrap());
        let response = soon("an answer", scene.client.request(request)).await.unwrap();
        assert_eq!(text(response).await.0, StatusCode::OK);
        let counted = series(result);
        until("the comparison", || async { scene.metric(&counted).await > 0.5 }).await;
    }
}

#[tokio::test]
async fn a_shadow_that_hangs_delays_no_caller_and_what_does_not_fit_is_dropped() {
    let main = saying(r#"{"text": "Paris"}"#).await;
    let other = Pod::start(|_, _| async {
        std::future::pending::<()>().await;
        unreachable!("the request is never answered")
    })
    .await;
    let scene = scene(&main, &other, 100).await;
    for _ in 0..100 {
        assert_eq!(scene.answer("a").await.0, StatusCode::OK);
    }
    // 64 wait, and 4 were sent.
    let dropped = series("dropped");
    until("the rest to be dropped", || async { scene.metric(&dropped).await > 31.5 }).await;
    until("four to be sent", || async { other.requests() == 4 }).await;
    assert!((scene.metric(&dropped).await - 32.0).abs() < 1e-9);
}
