//! Users of one name are divided between two models of one process.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use serde_json::{Value, json};
use trustformers_model::seeded::SeededModel;
use trustformers_serve::{ABTestConfig, Config, RoutingKey, TrustformersServer, Variant};

/// An answer, as far as the test reads it.
struct Answer {
    status: u16,
    variant: String,
    request_id: String,
    body: Value,
}

/// `POST path` of a user.
fn post(address: SocketAddr, path: &str, user: &str, body: &Value) -> Answer {
    let body = body.to_string();
    let mut stream = TcpStream::connect(address).unwrap();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\nx-user-id: {user}\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let header = |name: &str| {
        let line = head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.unwrap_or_default().to_owned()
    };
    let object = body.find('{').zip(body.rfind('}')).map_or("null", |(from, to)| &body[from..=to]);
    Answer {
        status: head.split(' ').nth(1).unwrap().parse().unwrap(),
        variant: header("x-trustformers-variant"),
        request_id: header("x-request-id"),
        body: serde_json::from_str(object).unwrap(),
    }
}

#[test]
fn users_keep_their_model_and_the_report_has_the_callers_counts() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tiny.gguf");
    std::fs::write(&file, SeededModel::default().gguf()).unwrap();
    let config: Config =
        "server: {host: 127.0.0.1, port: 0, grpc_port: 0}\nmodels: [{name: unused, path: x}]"
            .parse()
            .unwrap();
    let mut server = TrustformersServer::new(config).with_threads(1);
    server.unload_model("unused").unwrap();
    for name in ["chat", "chat-v2"] {
        server.load_model(name, &file).unwrap();
    }
    let variant = |model: &str, weight| Variant { model: model.to_owned(), weight };
    let test = ABTestConfig {
        variants: vec![variant("chat", 0.5), variant("chat-v2", 0.5)],
        routing_key: RoutingKey::UserId,
    };
    server.enable_ab_test("chat", test.clone()).unwrap();
    assert!(server.enable_ab_test("chat", test).is_err(), "a name has one test");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(async {
        let server = server.start().await.unwrap();
        server.until_ready().await;
        server
    });
    let address = server.http_address();
    let request = json!({"model": "chat", "prompt": "Hello", "max_tokens": 2, "temperature": 0});
    // The route follows the state of the models. Requests without a user do not count.
    let direct = json!({"model": "chat-v2", "prompt": "Hello", "max_tokens": 1});
    let serves = |request: &Value| post(address, "/v1/generate", "", request).status == 200;
    let both_serve = (0..10_000).any(|_| serves(&direct) && serves(&request));
    assert!(both_serve, "the models are not routed to");

    let mut counted: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for user in 0..20 {
        let user = format!("user-{user}");
        let first = post(address, "/v1/generate", &user, &request);
        let again = post(address, "/v1/generate", &user, &request);
        assert_eq!((first.status, again.status, &first.variant), (200, 200, &again.variant));
        assert_eq!(first.body["model"], first.variant.as_str(), "the variant's own model answers");
        let counts = counted.entry(first.variant).or_default();
        *counts = (counts.0 + 1, counts.1 + 2);
        let score = json!({"request_id": first.request_id, "score": 1});
        assert_eq!(post(address, "/v1/feedback", "somebody", &score).status, 404);
        assert_eq!(post(address, "/v1/feedback", &user, &score).status, 200);
    }
    assert_eq!(counted.len(), 2, "both models got users: {counted:?}");
    // A request counts a moment behind its last byte.
    let mut reports = (0..10_000).map(|_| server.ab_test_report("chat").unwrap());
    let whole = reports.find(|report| report.variants.iter().map(|one| one.requests).sum::<u64>() == 40);
    for variant in &whole.unwrap().variants {
        assert_eq!(((variant.users, variant.requests), variant.errors), (counted[&variant.model], 0));
        assert!(variant.score.is_some_and(|score| (score.value - 1.0).abs() < 1e-9));
    }
    assert!(server.ab_test_report("chat-v2").is_none());
    runtime.block_on(server.drain());
}
