//! Callers that send slowly, send too much, read slowly or send garbage.

use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use http::StatusCode;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tonic::Code;
use trustformers_gateway::{Running, start};
use trustformers_proto::v1::inference_service_client::InferenceServiceClient;
use trustformers_proto::v1::model_service_client::ModelServiceClient;
use trustformers_proto::v1::{GenerateRequest, WatchModelsRequest};

use crate::operator::{Operator, TableBuilder};
use crate::pods::{Pod, written};
use crate::{Scene, client, json, post, settings, soon, text};

/// A gateway without an operator, for tests whose clock is paused.
async fn alone(state: &tempfile::TempDir) -> Running {
    start(settings(Pod::absent().await, state.path(), &[])).await.unwrap()
}

async fn with_one_pod() -> (Pod, Scene) {
    let pod = Pod::named("one").await;
    let scene = Scene::with_table(TableBuilder::new(1, 1).route("a").backend("r1", 1, &[pod.address])).await;
    (pod, scene)
}

async fn read_to_close(stream: &mut TcpStream) -> String {
    let mut read = Vec::new();
    let _reset_or_closed = soon("the connection to close", stream.read_to_end(&mut read)).await;
    String::from_utf8(read).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_connection_without_a_complete_head_is_closed() {
    let state = tempfile::tempdir().unwrap();
    let gateway = alone(&state).await;
    for sent in ["", "PRI * HT", "PRI * HTTP/2.0\r\n\r\nSM\r\n", "GET /health/live HTTP/1.1\r\nhost:"] {
        for address in [gateway.http_address(), gateway.grpc_address()] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(sent.as_bytes()).await.unwrap();
            assert_eq!(read_to_close(&mut stream).await, "", "{sent}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_outlives_a_load_balancers_timeout() {
    let state = tempfile::tempdir().unwrap();
    let gateway = alone(&state).await;
    let mut stream = TcpStream::connect(gateway.http_address()).await.unwrap();
    for _ in 0..2 {
        stream.write_all(b"GET /health/live HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let mut answer = [0; 12];
        soon("an answer", stream.read_exact(&mut answer)).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200");
        let mut rest = vec![0; 4096];
        while !rest.ends_with(b"}") {
            let length = soon("its end", stream.read(&mut rest)).await.unwrap();
            rest.truncate(length);
        }
        sleep(Duration::from_secs(600)).await;
    }
}

#[tokio::test]
async fn a_refusal_reaches_a_caller_that_sends_its_whole_body_first() {
    let pod = Pod::named("one").await;
    let operator = Operator::start().await;
    let state = tempfile::tempdir().unwrap();
    let gateway =
        start(settings(operator.address(), state.path(), &["--body-limit-bytes", "1000"])).await.unwrap();
    let scene = Scene { gateway, operator, state, client: client(false) };
    scene.publish(TableBuilder::new(1, 1).route("a").backend("r1", 1, &[pod.address])).await;
    let body = vec![b' '; 8 << 20];
    for (head, status) in [
        ("POST /v1/generate HTTP/1.1\r\n", "413"),
        ("POST /elsewhere HTTP/1.1\r\n", "404"),
        ("PUT /v1/generate HTTP/1.1\r\n", "405"),
        ("POST /v1/generate HTTP/1.1\r\ncontent-encoding: compress\r\n", "415"),
    ] {
        let mut stream = TcpStream::connect(scene.http()).await.unwrap();
        let head = format!("{head}host: a\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
        soon("the request to be sent", async {
            stream.write_all(head.as_bytes()).await.unwrap();
            stream.write_all(&body).await.unwrap();
        })
        .await;
        let answer = read_to_close(&mut stream).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{head}: {answer}");
    }
    assert_eq!(pod.requests(), 0);
}

#[tokio::test]
async fn errors_quote_at_most_200_characters() {
    let (pod, scene) = with_one_pod().await;
    let long = "n".repeat(100_000);
    for (path, body) in [
        ("/v1/generate".to_owned(), format!(r#"{{"model": "{long}"}}"#)),
        ("/v1/generate".to_owned(), format!(r#""{long}""#)),
        ("/v1/generate".to_owned(), format!(r#"{{"model": ["{long}"]}}"#)),
        (format!("/{}", &long[..10_000]), "{}".to_owned()),
    ] {
        let answer = text(scene.client.request(post(scene.http(), &path, body)).await.unwrap()).await;
        assert!(answer.0.is_client_error() && answer.1.len() < 600, "{answer:?}");
        assert!(!answer.1.contains(&"n".repeat(201)), "{answer:?}");
    }
    let mut caller = InferenceServiceClient::connect(scene.grpc()).await.unwrap();
    let status = caller.generate(GenerateRequest { model: long, ..Default::default() }).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(status.message().len() < 400, "{status}");
    assert_eq!(pod.requests(), 0);
}

#[tokio::test]
async fn grpc_garbage_is_invalid_argument_with_our_metadata() {
    let (pod, scene) = with_one_pod().await;
    let http2 = client(true);
    for path in ["/trustformers.v1.InferenceService/Generate", "/trustformers.v1.ModelService/ListModels"] {
        for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0, 0, 0, 0, 2, 0xff, 0xff], &[7; 64], b""] {
            let mut request = post(scene.http(), path, Bytes::copy_from_slice(garbage));
            request.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
            let response = soon("a status", http2.request(request)).await.unwrap();
            let headers = response.headers();
            assert_eq!(headers["grpc-status"], "3", "{path} {garbage:?}: {headers:?}");
            assert_eq!(headers["trustformers-error"], "invalid_request", "{path} {garbage:?}");
        }
    }
    assert_eq!(pod.requests(), 0);
}

#[tokio::test]
async fn an_unknown_encoding_is_415_and_reaches_no_pod() {
    let (pod, scene) = with_one_pod().await;
    for values in [&["compress"][..], &["identity", "aws-chunked"], &["gzip", "br"]] {
        let mut request = post(scene.http(), "/v1/generate", "{}");
        for value in values {
            request.headers_mut().append("content-encoding", value.parse().unwrap());
        }
        let response = scene.client.request(request).await.unwrap();
        assert_eq!(response.headers()["accept-encoding"], "gzip, deflate, br, zstd");
        let (status, body) = text(response).await;
        assert_eq!(status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
        assert_eq!(json(&body)["error"]["type"], "unsupported_encoding");
    }
    assert_eq!(pod.requests(), 0);
}

#[tokio::test]
async fn watchers_have_a_bound_and_the_refusal_says_when_to_retry() {
    let (_pod, scene) = with_one_pod().await;
    let mut models = ModelServiceClient::connect(scene.grpc()).await.unwrap();
    let mut watches = Vec::new();
    // Half of 32: the share of one caller.
    for _ in 0..16 {
        watches.push(models.watch_models(WatchModelsRequest {}).await.unwrap().into_inner());
    }
    let status = models.watch_models(WatchModelsRequest {}).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(status.metadata().get("retry-after").unwrap(), "1");
    let firsts = join_all(watches.iter_mut().map(tonic::Streaming::message)).await;
    assert!(firsts.into_iter().all(|first| first.unwrap().unwrap().models.len() == 1));
    // The caller's share is full for HTTP too.
    let (status, body) = scene.get("/v1/models").await;
    assert_eq!(
        (status, json(&body)["error"]["code"].as_str()),
        (StatusCode::TOO_MANY_REQUESTS, Some("overloaded"))
    );
}

#[tokio::test]
async fn a_table_that_arrives_during_an_upload_decides() {
    let (old, new) = (Pod::named("old").await, Pod::named("new").await);
    let scene = Scene::with_table(TableBuilder::new(1, 1).route("a").backend("r1", 1, &[old.address])).await;
    let mut stream = TcpStream::connect(scene.http()).await.unwrap();
    let body = r#"{"model": "a"}"#;
    let head = format!("POST /v1/generate HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&body.as_bytes()[..5]).await.unwrap();
    // This answer comes over the same listener, so the upload has begun by then.
    assert_eq!(scene.answer("a").await.1, "old");
    scene.publish(TableBuilder::new(1, 2).route("a").backend("r1", 1, &[new.address])).await;
    stream.write_all(&body.as_bytes()[5..]).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"new") && !answer.ends_with(b"old") {
        assert_ne!(soon("an answer", stream.read_buf(&mut answer)).await.unwrap(), 0);
    }
    assert!(answer.ends_with(b"new"), "the acknowledged table lacks the pod that answered");
}

#[tokio::test]
async fn a_slow_reader_holds_less_than_100_kib() {
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
    let stream = TcpStream::connect(scene.http()).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(1024)
        .handshake::<_, Full<Bytes>>(TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    let request = post(scene.http(), "/v1/generate", r#"{"model": "a"}"#);
    let response = soon("the head of an answer", sender.send_request(request)).await.unwrap();
    let writer = soon("the request", answers.recv()).await.unwrap();
    let piece = || Ok(http_body::Frame::data(Bytes::from(vec![b'x'; 4096])));
    let (mut sent_bytes, mut refusals) = (0, 0);
    // All servers of the test run on this thread, so many turns without progress mean that all of them wait.
    while refusals < 50_000 {
        match writer.try_send(piece()) {
            Ok(()) => (sent_bytes, refusals) = (sent_bytes + 4096, 0),
            Err(_full) => refusals += 1,
        }
        tokio::task::yield_now().await;
    }
    // 48 KiB in the gateway, 20 KiB in the pod of this test, 1 KiB at the caller.
    assert!(sent_bytes < 100 << 10, "{sent_bytes} bytes were accepted for a caller that reads none");
    drop(writer);
    let read = soon("the answer", response.into_body().collect()).await.unwrap().to_bytes();
    assert_eq!(read.len(), sent_bytes);
}

#[tokio::test]
async fn the_head_of_a_request_has_a_bound() {
    let (pod, scene) = with_one_pod().await;
    let mut stream = TcpStream::connect(scene.http()).await.unwrap();
    let head = format!("POST /v1/generate HTTP/1.1\r\nhost: a\r\nx-long: {}\r\n\r\n", "v".repeat(20 << 10));
    stream.write_all(head.as_bytes()).await.unwrap();
    let answer = read_to_close(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    assert_eq!(pod.requests(), 0);
}
