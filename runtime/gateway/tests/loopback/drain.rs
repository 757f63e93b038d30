//! The drain: it is announced, and no request fails that could have been served.

use std::time::Duration;

use http::StatusCode;
use http_body_util::BodyExt;
use tokio::sync::mpsc;
use tokio::time::Instant;
use trustformers_gateway::start;

use crate::operator::{Operator, TableBuilder};
use crate::pods::{Pod, full, piece, written};
use crate::{Scene, client, post, settings, soon, text, until};

#[tokio::test]
async fn a_drain_is_announced_and_requests_are_answered() {
    let pod = Pod::named("one").await;
    let scene = Scene::with_table(TableBuilder::new(1, 1).route("a").backend("r1", 1, &[pod.address])).await;
    assert!(scene.request("a").await.headers().get("connection").is_none());
    let before = scene.operator.reports();
    let began = Instant::now();
    scene.gateway.start_drain();
    scene.operator.report(before, |report| report.draining).await;
    assert!(began.elapsed() < Duration::from_millis(900), "the report waited for the next second");
    let (status, body) = scene.get("/health/ready").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(body.contains("draining"), "{body}");
    assert_eq!(scene.get("/health/live").await.0, StatusCode::OK);
    let response = scene.request("a").await;
    assert_eq!(response.headers()["connection"], "close");
    assert_eq!(text(response).await, (StatusCode::OK, "one".to_owned()));
    // A new table still comes into force, for the requests that are left.
    scene.publish(TableBuilder::new(1, 2).route("b").backend("r1", 1, &[pod.address])).await;
    assert_eq!(scene.answer("b").await.0, StatusCode::OK);
}

#[tokio::test]
async fn the_gateway_waits_for_a_stream_in_flight() {
    let (writers, mut answers) = mpsc::channel(1);
    let pod = Pod::start(move |_, _| {
        let writers = writers.clone();
        async move {
            let (answer, writer) = written();
            writers.send(writer).await?;
            Ok(answer)
        }
    })
    .await;
    let operator = Operator::start().await;
    let state = tempfile::tempdir().unwrap();
    let settings = settings(operator.address(), state.path(), &[]);
    let settings = trustformers_gateway::Settings { drain_timeout: Duration::from_secs(60), ..settings };
    let scene = Scene { gateway: start(settings).await.unwrap(), operator, state, client: client(true) };
    scene.publish(TableBuilder::new(1, 1).route("a").backend("r1", 1, &[pod.address])).await;
    let address = scene.http();
    let response = scene.request("a").await;
    let writer = answers.recv().await.unwrap();
    let Scene { gateway, client, .. } = scene;
    let ending = tokio::spawn(gateway.finish());
    until("the listener to close", || async { tokio::net::TcpStream::connect(address).await.is_err() }).await;
    assert!(!ending.is_finished());
    writer.send(piece("the ")).await.unwrap();
    writer.send(piece("rest")).await.unwrap();
    drop(writer);
    assert_eq!(text(response).await.1, "the rest");
    assert_eq!(soon("the gateway to end", ending).await.unwrap(), 0);
    drop(client);
}

#[tokio::test]
async fn http2_callers_get_goaway_and_lose_no_request() {
    let pod = Pod::start(|_, _| async { Ok(full(StatusCode::OK, "one")) }).await;
    let scene = Scene::with_table(TableBuilder::new(1, 1).route("a").backend("r1", 1, &[pod.address])).await;
    let stream = tokio::net::TcpStream::connect(scene.http()).await.unwrap();
    let executor = hyper_util::rt::TokioExecutor::new();
    let io = hyper_util::rt::TokioIo::new(stream);
    let (mut sender, connection) = hyper::client::conn::http2::handshake(executor, io).await.unwrap();
    let connection = tokio::spawn(connection);
    let request = || post(scene.http(), "/v1/generate", r#"{"model": "a"}"#);
    assert_eq!(sender.send_request(request()).await.unwrap().status(), StatusCode::OK);
    scene.gateway.start_drain();
    let again = sender.send_request(request()).await.unwrap();
    assert_eq!(again.status(), StatusCode::OK);
    again.into_body().collect().await.unwrap();
    // GOAWAY: the connection ends without an error although the caller keeps it.
    soon("the connection to end", connection).await.unwrap().unwrap();
    assert!(sender.is_closed());
    // New connections are still served.
    let late = client(true).request(request()).await.unwrap();
    assert_eq!(late.status(), StatusCode::OK);
}

#[tokio::test]
async fn the_drain_timeout_cuts_and_counts_requests() {
    let (writers, mut answers) = mpsc::channel(1);
    let pod = Pod::start(move |_, _| {
        let writers = writers.clone();
        async move {
            let (answer, writer) = written();
            writers.send(writer).await?;
            Ok(answer)
        }
    })
    .await;
    let scene = Scene::with_table(TableBuilder::new(1, 1).route("a").backend("r1", 1, &[pod.address])).await;
    let response = scene.request("a").await;
    let writer = answers.recv().await.unwrap();
    let Scene { gateway, .. } = scene;
    // The limit of this gateway is 300 ms.
    assert_eq!(soon("the gateway to end", gateway.finish()).await, 1);
    drop((response, writer));
}
