//! Which pod gets a request, and the errors where none does.

use std::collections::HashMap;

use bytes::Bytes;
use futures::future::join_all;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use tokio::sync::mpsc;

use crate::operator::{Operator, TableBuilder};
use crate::pods::{Pod, full, written};
use crate::{Scene, client, get, json, post, settings, soon, text, until};
use trustformers_gateway::start;

#[tokio::test]
async fn requests_go_to_the_route_of_their_model() {
    let (one, two) = (Pod::named("one").await, Pod::named("two").await);
    let table = TableBuilder::new(1, 1).route("a").backend("r1", 1, &[one.address]);
    let table = table.route("b").backend("r1", 1, &[two.address]);
    let scene = Scene::with_table(table).await;
    for (name, pod) in [("a", "one"), ("default/a", "one"), ("b", "two"), ("default/b", "two")] {
        assert_eq!(scene.answer(name).await, (StatusCode::OK, pod.to_owned()), "{name}");
    }
    let (status, body) = scene.answer("c").await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    let error = &json(&body)["error"];
    assert_eq!(error["type"], "unknown_model");
    assert_eq!(error["choices"], serde_json::json!(["default/a", "default/b"]));
    let (status, body) = scene.answer("").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(json(&body)["error"]["type"], "model_required");
    let refused = r#"trustformers_gateway_refused_total{protocol="http",reason="unknown_model"}"#;
    assert!((scene.metric(refused).await - 1.0).abs() < 0.5);
}

#[tokio::test]
async fn a_pod_that_holds_two_revisions_is_asked_for_each_by_its_share() {
    let pod = Pod::start(|head, _| async move {
        let asked = head.headers.get("x-trustformers-revision").map(|value| value.to_str().unwrap());
        Ok(full(StatusCode::OK, asked.unwrap_or_default().to_owned()))
    })
    .await;
    let table = |counter| {
        let table = TableBuilder::new(1, counter).route("a").backend("r1", 3, &[pod.address]);
        table.backend("r2", 1, &[pod.address])
    };
    let scene = Scene::with_table(table(1).by_revision()).await;
    let mut asked = HashMap::new();
    for _ in 0..8 {
        *asked.entry(scene.answer("a").await.1).or_insert(0) += 1;
    }
    assert_eq!(asked, HashMap::from([("r1".to_owned(), 6), ("r2".to_owned(), 2)]));
    // A pod with one revision is not asked for it.
    scene.publish(table(2)).await;
    assert_eq!(scene.answer("a").await.1, "");
}

#[tokio::test]
async fn a_pod_that_lost_the_revision_of_its_table_fails_no_request() {
    let lost = Pod::start(|_, _| async {
        let mut answer = full(StatusCode::NOT_FOUND, "no such revision");
        answer.headers_mut().insert("trustformers-error", "unknown_revision".parse().unwrap());
        Ok(answer)
    })
    .await;
    let here = Pod::named("here").await;
    let addresses = [lost.address, here.address];
    let table = |counter| TableBuilder::new(1, counter).route("a").backend("r2", 1, &addresses);
    let scene = Scene::with_table(table(1).by_revision()).await;
    for _ in 0..20 {
        assert_eq!(scene.answer("a").await, (StatusCode::OK, "here".to_owned()));
    }
    assert!(lost.requests() > 0, "the pod that lost it was not chosen in 20 requests");
}

#[tokio::test]
async fn without_a_name_the_path_decides_on_the_model() {
    let (words, vectors) = (Pod::named("words").await, Pod::named("vectors").await);
    let table = |counter| {
        let table =
            TableBuilder::new(1, counter).route("g").task("generate").backend("r1", 1, &[words.address]);
        table.route("e").task("embed").backend("r1", 1, &[vectors.address]).route("new")
    };
    let scene = Scene::with_table(table(1)).await;
    let send = async |path: &str| {
        let request = post(scene.http(), path, r#"{"input": "i"}"#);
        text(scene.client.request(request).await.unwrap()).await
    };
    for (path, pod) in
        [("/v1/generate", "words"), ("/v1/generate/stream?x=1", "words"), ("/v1/embeddings", "vectors")]
    {
        assert_eq!(send(path).await, (StatusCode::OK, pod.to_owned()), "{path}");
    }
    let choices = async |path: &str| {
        let (status, body) = send(path).await;
        assert_eq!(
            (status, &json(&body)["error"]["code"]),
            (StatusCode::BAD_REQUEST, &"model_required".into())
        );
        json(&body)["error"]["choices"].clone()
    };
    scene.publish(table(2).route("f").task("embed")).await;
    assert_eq!(choices("/v1/embeddings").await, serde_json::json!(["default/e", "default/f"]));
}

#[tokio::test]
async fn a_header_names_the_model_of_a_request_that_names_none() {
    let (one, two) = (Pod::named("one").await, Pod::named("two").await);
    let table = TableBuilder::new(1, 1).route("a").backend("r1", 1, &[one.address]);
    let scene = Scene::with_table(table.route("b").backend("r1", 1, &[two.address])).await;
    let send = async |header: &str, body: &'static str| {
        let mut request = post(scene.http(), "/v1/generate", body);
        request.headers_mut().insert("x-trustformers-model", header.parse().unwrap());
        text(scene.client.request(request).await.unwrap()).await
    };
    assert_eq!(send("default/b", "{}").await, (StatusCode::OK, "two".to_owned()));
    assert!(!two.last_head().headers.contains_key("x-trustformers-model"), "it ends at the gateway");
    // The request's own word counts.
    assert_eq!(send("default/b", r#"{"model": "a"}"#).await, (StatusCode::OK, "one".to_owned()));
    assert_eq!(send("c", "{}").await.0, StatusCode::NOT_FOUND);
    assert_eq!(send("", "{}").await.0, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn path_and_query_reach_the_pod_and_its_status_the_caller() {
    let pod = Pod::start(|head, body| async move {
        let text = format!("{} {}", head.uri.path_and_query().unwrap(), body.len());
        Ok(full(StatusCode::IM_A_TEAPOT, text))
    })
    .await;
    let scene = Scene::with_table(TableBuilder::new(1, 1).route("a").backend("r1", 1, &[pod.address])).await;
    let request = post(scene.http(), "/v1/embeddings?x=1", r#"{"input": "i"}"#);
    let (status, body) = text(scene.client.request(request).await.unwrap()).await;
    assert_eq!((status, body.as_str()), (StatusCode::IM_A_TEAPOT, "/v1/embeddings?x=1 14"));
}

#[tokio::test]
async fn headers_name_the_caller_without_those_of_one_hop() {
    let pod = Pod::start(|_, _| async {
        let mut answer = full(StatusCode::OK, "x");
        answer.headers_mut().insert("x-from-pod", "yes".parse().unwrap());
        Ok(answer)
    })
    .await;
    let scene = Scene::with_table(TableBuilder::new(1, 1).route("a").backend("r1", 1, &[pod.address])).await;
    let mut request = post(scene.http(), "/v1/generate", r#"{"model": "a"}"#);
    for (name, value) in [
        ("host", "models.example"),
        ("connection", "x-secret"),
        ("x-secret", "s"),
        ("x-forwarded-for", "198.51.100.9"),
        ("x-request-id", "id-7"),
        ("authorization", "Bearer t"),
    ] {
        request.headers_mut().insert(name, value.parse().unwrap());
    }
    let response = scene.client.request(request).await.unwrap();
    assert_eq!(response.headers()["x-request-id"], "id-7");
    assert_eq!(response.headers()["x-from-pod"], "yes");
    let head = pod.last_head();
    assert_eq!(head.headers["x-forwarded-for"], "198.51.100.9, 127.0.0.1");
    assert_eq!(head.headers["x-request-id"], "id-7");
    assert_eq!(head.headers["authorization"], "Bearer t");
    assert_eq!(head.headers["x-trustformers-report-end"], "1");
    assert!(!head.headers.contains_key("x-secret") && !head.headers.contains_key("connection"));
    assert_eq!(head.uri.authority().unwrap(), "models.example");
    assert_eq!(head.version, http::Version::HTTP_2);
    let made = scene.request("a").await.headers()["x-request-id"].clone();
    assert_eq!(pod.last_head().headers["x-request-id"], made);
}

#[tokio::test]
async fn a_split_is_exact() {
    let (old, new) = (Pod::named("old").await, Pod::named("new").await);
    let table = |counter, weights: (u32, u32)| {
        let table = TableBuilder::new(1, counter).route("a");
        table.backend("r1", weights.0, &[old.address]).backend("r2", weights.1, &[new.address])
    };
    let scene = Scene::with_table(table(1, (95, 5))).await;
    for (counter, weights, expected) in
        [(1, (95, 5), (190, 10)), (2, (50, 50), (100, 100)), (3, (0, 7), (0, 200))]
    {
        scene.publish(table(counter, weights)).await;
        let before = (old.requests(), new.requests());
        for chunk in 0..20 {
            // Concurrent, as real traffic is.
            let answers = join_all((0..10).map(|_| scene.answer("a"))).await;
            assert!(answers.iter().all(|(status, _)| *status == StatusCode::OK), "{chunk}: {answers:?}");
        }
        assert_eq!((old.requests() - before.0, new.requests() - before.1), expected, "{weights:?}");
    }
}

#[tokio::test]
async fn the_pod_with_fewer_unfinished_answers_is_chosen() {
    let (writers, mut open) = mpsc::channel(8);
    let slow = Pod::start(move |_, _| {
        let writers = writers.clone();
        async move {
            let (answer, writer) = written();
            writers.send(writer).await?;
            Ok(answer)
        }
    })
    .await;
    let scene = Scene::with_table(TableBuilder::new(1, 1).route("a").backend("r1", 1, &[slow.address])).await;
    let first = scene.request("a").await;
    let writer = soon("the first request", open.recv()).await.unwrap();
    let quick = Pod::named("quick").await;
    let both = TableBuilder::new(1, 2).route("a").backend("r1", 1, &[slow.address, quick.address]);
    scene.publish(both).await;
    // The head of the first answer has arrived, but its body has not ended, so it counts.
    for _ in 0..20 {
        assert_eq!(scene.answer("a").await.1, "quick");
    }
    drop(writer);
    assert_eq!(text(first).await.1, "");
    // Now both have no requests, and a random choice reaches the slow one again soon.
    let mut answers = Vec::new();
    until("the slow pod to get a request", || {
        answers.push(tokio::spawn(scene.client.request(post(
            scene.http(),
            "/v1/generate",
            r#"{"model":"a"}"#,
        ))));
        async { slow.requests() == 2 }
    })
    .await;
    drop(open);
}

#[tokio::test]
async fn local_endpoints_show_the_state() {
    let operator = Operator::start().await;
    let state = tempfile::tempdir().unwrap();
    let gateway = start(settings(operator.address(), state.path(), &[])).await.unwrap();
    let (client, address) = (client(false), gateway.http_address());
    let (status, body) = get(&client, address, "/health/ready").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(body.contains("no routing table"), "{body}");
    assert_eq!(get(&client, address, "/health/live").await.0, StatusCode::OK);
    assert_eq!(get(&client, address, "/health/startup").await.0, StatusCode::SERVICE_UNAVAILABLE);
    let early = client.request(post(address, "/v1/generate", "{}")).await.unwrap();
    assert_eq!(early.headers()["retry-after"], "1");
    assert_eq!(json(&text(early).await.1)["error"]["type"], "no_table");
    let pod = Pod::named("one").await;
    let scene = Scene { gateway, operator, state, client };
    let table = TableBuilder::new(3, 8)
        .route("a")
        .task("generate")
        .backend("r1", 90, &[pod.address])
        .backend("r2", 10, &[]);
    scene.publish(table).await;
    for path in ["/health", "/health/ready", "/health/startup"] {
        assert_eq!(scene.get(path).await.0, StatusCode::OK, "{path}");
    }
    let (_, body) = scene.get("/v1/models").await;
    let model = &json(&body)["data"][0];
    assert_eq!(model["id"], "default/a");
    assert_eq!(model["aliases"], serde_json::json!(["default/a", "a"]));
    assert_eq!(model["task"], "generate");
    assert_eq!(model["ready_endpoints"], 1);
    assert_eq!((&model["owned_by"], &model["state"]), (&"trustformers".into(), &"ready".into()));
    assert!(model["created"].as_u64().unwrap() > 1_600_000_000);
    for path in ["/v1/models/a", "/v1/models/default/a", "/openai/v1/models/default%2Fa"] {
        assert_eq!(json(&scene.get(path).await.1), *model, "{path}");
    }
    let (status, body) = scene.get("/v1/models/other").await;
    assert_eq!((status, &json(&body)["error"]["code"]), (StatusCode::NOT_FOUND, &"model_not_found".into()));
    let second =
        serde_json::json!({"revision": "r2", "digest": "digest-r2", "weight": 10, "ready_endpoints": 0});
    assert_eq!(model["revisions"][1], second);
    scene.answer("a").await;
    for (line, value) in [
        ("trustformers_gateway_table_term", 3.0),
        ("trustformers_gateway_table_counter", 8.0),
        ("trustformers_gateway_feed_connected", 1.0),
        (
            r#"trustformers_gateway_requests_total{code="2xx",protocol="http",revision="r1",route="default/a"}"#,
            1.0,
        ),
        (r#"trustformers_gateway_in_flight{revision="r1",route="default/a"}"#, 0.0),
        (r#"trustformers_gateway_first_byte_seconds_count{revision="r1",route="default/a"}"#, 1.0),
    ] {
        let found = scene.metric(line).await;
        assert!((found - value).abs() < 1e-9, "{line} is {found}");
    }
}

#[tokio::test]
async fn unserved_paths_and_methods_are_refused_with_a_reason() {
    let pod = Pod::named("one").await;
    let scene = Scene::with_table(TableBuilder::new(1, 1).route("a").backend("r1", 1, &[pod.address])).await;
    let send = async |method: &str, path: &str, body: &str| {
        let request = Request::builder().method(method).uri(format!("http://{}{path}", scene.http()));
        let request = request.body(Full::new(Bytes::from(body.to_owned()))).unwrap();
        let (status, body) = text(scene.client.request(request).await.unwrap()).await;
        (status.as_u16(), json(&body)["error"]["type"].as_str().unwrap().to_owned())
    };
    for (method, path, body, status, kind) in [
        ("GET", "/elsewhere", "", 404, "unknown_route"),
        ("POST", "/v1/reverse", "{}", 404, "unknown_route"),
        ("POST", "/", "{}", 404, "unknown_route"),
        ("GET", "/v1/generate", "", 405, "method_not_allowed"),
        ("POST", "/v1/models/load", "{}", 403, "operated"),
        ("POST", "/v1/generate", "{", 400, "invalid_request"),
    ] {
        assert_eq!(send(method, path, body).await, (status, kind.to_owned()), "{method} {path}");
    }
    assert_eq!(pod.requests(), 0);
}

#[tokio::test]
async fn a_long_body_is_refused_with_or_without_a_length() {
    let pod = Pod::named("one").await;
    let operator = Operator::start().await;
    let state = tempfile::tempdir().unwrap();
    let gateway =
        start(settings(operator.address(), state.path(), &["--body-limit-bytes", "1000"])).await.unwrap();
    let scene = Scene { gateway, operator, state, client: client(false) };
    scene.publish(TableBuilder::new(1, 1).route("a").backend("r1", 1, &[pod.address])).await;
    let body = format!(r#"{{"prompt": "{}"}}"#, "x".repeat(2000));
    let (status, answer) =
        text(scene.client.request(post(scene.http(), "/v1/generate", body.clone())).await.unwrap()).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    assert!(json(&answer)["error"]["message"].as_str().unwrap().contains("1000"), "{answer}");
    // Without a length the limit is reached while reading.
    let stream = tokio::net::TcpStream::connect(scene.http()).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(hyper_util::rt::TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let (pieces, stream) = mpsc::channel(1);
    let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
    let request = Request::post("/v1/generate").body(http_body_util::StreamBody::new(stream)).unwrap();
    let answer = sender.send_request(request);
    let feed = async {
        let piece =
            || Ok::<_, std::convert::Infallible>(http_body::Frame::data(Bytes::from(vec![b' '; 300])));
        // The fourth exceeds the limit; the body stays open.
        for _ in 0..4 {
            pieces.send(piece()).await.unwrap();
        }
    };
    let (answer, ()) = soon("a refusal", async { tokio::join!(answer, feed) }).await;
    let answer = answer.unwrap();
    assert_eq!(answer.status(), StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(pod.requests(), 0);
    let short = scene.answer("a").await;
    assert_eq!(short.0, StatusCode::OK);
}

#[tokio::test]
async fn a_second_connection_opens_at_the_101st_stream() {
    let (writers, mut started) = mpsc::channel(256);
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
    let mut answers = Vec::new();
    let mut open = Vec::new();
    for _ in 0..100 {
        answers.push(scene.request("a").await);
        open.push(started.recv().await.unwrap());
    }
    assert_eq!(pod.connections(), 1);
    answers.push(scene.request("a").await);
    open.push(started.recv().await.unwrap());
    assert_eq!(pod.connections(), 2);
    drop(open);
    let ended = join_all(answers.into_iter().map(|answer| answer.into_body().collect())).await;
    assert!(ended.iter().all(Result::is_ok));
    let next = scene.request("a").await;
    drop(started.recv().await);
    assert_eq!(text(next).await.0, StatusCode::OK);
    assert_eq!(pod.connections(), 2);
}

#[tokio::test]
async fn callers_can_use_http2() {
    let pod = Pod::named("one").await;
    let scene = Scene::with_table(TableBuilder::new(1, 1).route("a").backend("r1", 1, &[pod.address])).await;
    let http2 = client(true);
    let answers = join_all((0..50).map(|_| async {
        let response = http2.request(post(scene.http(), "/v1/generate", r#"{"model": "a"}"#)).await.unwrap();
        assert_eq!(response.version(), http::Version::HTTP_2);
        text(response).await
    }))
    .await;
    let mut counts = HashMap::new();
    for answer in answers {
        *counts.entry(answer).or_insert(0) += 1;
    }
    assert_eq!(counts, HashMap::from([((StatusCode::OK, "one".to_owned()), 50)]));
}
