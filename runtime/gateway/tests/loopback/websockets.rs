//! WebSockets through the gateway, before pods with the real codecs.

use std::time::Duration;

use futures::{SinkExt, StreamExt};
use http::StatusCode;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

use crate::operator::TableBuilder;
use crate::pods::Pod;
use crate::{Scene, json, scripted, soon, until};

async fn websocket(scene: &Scene, query: &str) -> Result<WebSocketStream<TcpStream>, Error> {
    let stream = TcpStream::connect(scene.http()).await.unwrap();
    let url = format!("ws://{}/v1/stream{query}", scene.http());
    soon("the handshake", client_async(url, stream)).await.map(|(socket, _)| socket)
}

/// Sends a request and gives the messages up to its last one.
async fn asked(socket: &mut WebSocketStream<TcpStream>, request: &str) -> Vec<Value> {
    socket.send(Message::text(request)).await.unwrap();
    let mut messages = Vec::new();
    loop {
        let Message::Text(text) = soon("a message", socket.next()).await.unwrap().unwrap() else { continue };
        messages.push(json(&text));
        if messages.last().unwrap()["type"] != "token" {
            return messages;
        }
    }
}

#[tokio::test]
async fn a_websocket_goes_where_its_first_message_or_its_query_says() {
    let words = scripted::start(&["default/words", "words"], "generate").await;
    let table = TableBuilder::new(1, 1).route("words").task("generate").backend("r1", 1, &[words]);
    let scene = Scene::with_table(table.route("other").task("generate").backend("r1", 1, &[])).await;
    let mut socket = websocket(&scene, "").await.unwrap();
    for (request, error) in [
        (r#"{"id": "a", "type": "generate", "prompt": "Hi", "model": "none"}"#, "unknown_model"),
        (r#"{"id": "a", "type": "generate", "prompt": "Hi"}"#, "model_required"),
        (r#"{"id": "a", "type": "generate", "prompt": "Hi", "model": "other"}"#, "unavailable"),
    ] {
        let refused = asked(&mut socket, request).await;
        assert_eq!((&refused[0]["id"], &refused[0]["error"]["type"]), (&"a".into(), &error.into()));
    }
    let request = r#"{"id": "a", "type": "generate", "prompt": "Hi", "model": "words"}"#;
    for _ in 0..2 {
        let answer = asked(&mut socket, request).await;
        assert_eq!(answer.len(), 3, "{answer:?}");
        assert_eq!(answer[2]["type"], "finished");
    }
    socket.close(None).await.unwrap();
    let ended = r#"trustformers_gateway_requests_total{code="2xx",protocol="http",revision="r1",route="default/words"}"#;
    until("it to be counted", || async { scene.metric(ended).await > 0.5 }).await;
    // The connection, and both requests over it.
    let attempts = r#"trustformers_gateway_attempts_total{outcome="ok",revision="r1",route="default/words"}"#;
    assert!((scene.metric(attempts).await - 3.0).abs() < 1e-9);

    let mut named = websocket(&scene, "?model=default%2Fwords").await.unwrap();
    let answer = asked(&mut named, r#"{"id": "b", "type": "generate", "prompt": "Hi"}"#).await;
    assert_eq!(answer[2]["type"], "finished", "{answer:?}");
    let Err(Error::Http(refused)) = websocket(&scene, "?model=none").await else { panic!("it was accepted") };
    assert_eq!(refused.status(), StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_websocket_to_a_pod_that_is_absent_is_told_and_lives() {
    let gone = Pod::absent().await;
    let scene = Scene::with_table(TableBuilder::new(1, 1).route("a").backend("r1", 1, &[gone])).await;
    let mut socket = websocket(&scene, "").await.unwrap();
    let request = r#"{"id": "a", "type": "generate", "prompt": "Hi"}"#;
    assert_eq!(asked(&mut socket, request).await[0]["error"]["type"], "unreachable");
    let pod = scripted::start(&["default/a", "a"], "generate").await;
    scene.publish(TableBuilder::new(1, 2).route("a").backend("r1", 1, &[pod])).await;
    assert_eq!(asked(&mut socket, request).await.len(), 3);
    // Without a request nothing runs, so the drain does not wait for it.
    let mut idle = websocket(&scene, "").await.unwrap();
    scene.gateway.start_drain();
    // A load balancer may not know yet: whoever connects now is answered, too.
    let mut late = websocket(&scene, "").await.unwrap();
    assert_eq!(asked(&mut late, request).await.len(), 3);
    let closed = tokio::time::timeout(Duration::from_secs(30), idle.next()).await.unwrap();
    assert!(matches!(closed, Some(Ok(Message::Close(Some(_))))), "{closed:?}");
}
