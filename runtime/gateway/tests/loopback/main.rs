//! The gateway between real servers on the loopback interface: a fake operator that feeds it tables, and pods
//! that the tests control step by step.
//!
//! No test sleeps: it waits for a condition, and fails if the condition does not come within a limit.

#![allow(clippy::unwrap_used, reason = "an unexpected value fails the test")]

mod ab_tests;
mod abuse;
mod counts;
mod drain;
mod feed;
mod grpc;
mod held;
mod hostile;
mod operator;
mod pods;
mod policies;
mod retry;
mod routing;
mod scripted;
mod shadow;
mod streams;
mod surfaces;
mod websockets;
mod weights;

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use clap::Parser;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use trustformers_gateway::{Running, Settings, start};

use operator::Operator;

/// The longest wait for a condition, sized for a busy machine.
const LIMIT: Duration = Duration::from_secs(30);

/// Waits for a future that must end.
async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(LIMIT, future).await {
        Ok(value) => value,
        Err(_elapsed) => panic!("timed out: {what}"),
    }
}

/// Checks a condition repeatedly until it is true.
async fn until<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    soon(what, async {
        while !condition().await {
            // The servers of the test run on the same thread.
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// A gateway under test, its operator and its state folder.
struct Scene {
    gateway: Running,
    operator: Operator,
    state: tempfile::TempDir,
    client: Client<HttpConnector, Full<Bytes>>,
}

/// The flags of a gateway that listens on ports of the system's choice.
fn settings(feed: SocketAddr, state: &std::path::Path, more: &[&str]) -> Settings {
    let feed = format!("http://{feed}");
    let state = state.to_str().unwrap();
    let fixed = [
        "trustformers-gateway",
        "--feed",
        &feed,
        "--state-dir",
        state,
        "--http-address",
        "127.0.0.1:0",
        "--grpc-address",
        "127.0.0.1:0",
        "--instance",
        "gateway-under-test",
        "--drain-timeout",
        "300ms",
    ];
    Settings::parse_from(fixed.iter().chain(more))
}

impl Scene {
    /// A gateway that has put the operator's table in force.
    async fn with_table(table: operator::TableBuilder) -> Self {
        let operator = Operator::start().await;
        let state = tempfile::tempdir().unwrap();
        let gateway = start(settings(operator.address(), state.path(), &[])).await.unwrap();
        let scene = Self { gateway, operator, state, client: client(false) };
        scene.publish(table).await;
        scene
    }

    /// Publishes a table and waits until it is acknowledged.
    async fn publish(&self, table: operator::TableBuilder) {
        let version = table.version();
        self.operator.publish(table);
        self.operator.acknowledged(version).await;
    }

    fn http(&self) -> SocketAddr {
        self.gateway.http_address()
    }

    fn grpc(&self) -> String {
        format!("http://{}", self.gateway.grpc_address())
    }

    /// Sends a prompt to a model and returns the head of the answer.
    async fn request(&self, model: &str) -> Response<Incoming> {
        let body = serde_json::json!({"model": model, "prompt": "p"}).to_string();
        soon("the head of an answer", self.client.request(post(self.http(), "/v1/generate", body)))
            .await
            .unwrap()
    }

    /// Sends a prompt and returns status and body.
    async fn answer(&self, model: &str) -> (StatusCode, String) {
        text(self.request(model).await).await
    }

    async fn get(&self, path: &str) -> (StatusCode, String) {
        get(&self.client, self.http(), path).await
    }

    /// The value of a line of the metrics; 0 where there is no such line.
    async fn metric(&self, line: &str) -> f64 {
        let (_, text) = self.get("/metrics").await;
        let value = text.lines().find_map(|found| found.strip_prefix(line)?.strip_prefix(' '));
        value.map_or(0.0, |value| value.parse().unwrap())
    }
}

fn client(http2: bool) -> Client<HttpConnector, Full<Bytes>> {
    let mut connector = HttpConnector::new();
    // Otherwise the frames of a request over HTTP/2 wait for each other's acknowledgement.
    connector.set_nodelay(true);
    Client::builder(TokioExecutor::new()).http2_only(http2).build(connector)
}

fn post(address: SocketAddr, path: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    Request::builder()
        .method(Method::POST)
        .uri(format!("http://{address}{path}"))
        .header("content-type", "application/json")
        .body(Full::new(body.into()))
        .unwrap()
}

async fn get(
    client: &Client<HttpConnector, Full<Bytes>>,
    address: SocketAddr,
    path: &str,
) -> (StatusCode, String) {
    let request = Request::get(format!("http://{address}{path}")).body(Full::default()).unwrap();
    text(soon("an answer", client.request(request)).await.unwrap()).await
}

async fn text(response: Response<Incoming>) -> (StatusCode, String) {
    let status = response.status();
    let body = soon("the end of an answer", response.into_body().collect()).await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}
