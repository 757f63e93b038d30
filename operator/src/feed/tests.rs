//! The feed over a real connection, and readiness gates over a mock API server under a paused clock.

use std::convert::Infallible;
use std::net::SocketAddr;

use http::{Request as HttpRequest, Response as HttpResponse};
use http_body_util::BodyExt;
use kube::Client;
use kube::client::Body;
use kube::runtime::watcher::Event;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};
use tower::service_fn;
use trustformers_control::gate::{LEFT_OUT, SETTLE};
use trustformers_proto::control::v1::route_service_client::RouteServiceClient;
use trustformers_proto::control::v1::route_service_server::RouteServiceServer;
use trustformers_proto::control::v1::{GatewayReport, TableVersion};

use super::identity::Doorkeeper;
use super::service::{Feed, Lead};
use super::*;
use crate::world::tests::{metrics, settings};
use crate::world::{NewWorld, World, Writers};

/// A client of an API server that answers every request with `answer`, and what it was asked.
fn api(answer: fn(&Value) -> Value) -> (Client, mpsc::Receiver<(String, Value)>) {
    // A test makes a handful of requests.
    let (asked, requests) = mpsc::channel(64);
    let service = service_fn(move |request: HttpRequest<Body>| {
        let asked = asked.clone();
        async move {
            let uri = format!("{} {}", request.method(), request.uri());
            let bytes = request.into_body().collect().await.unwrap().to_bytes();
            let body: Value = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
            let reply = serde_json::to_vec(&answer(&body)).unwrap();
            asked.send((uri, body)).await.unwrap();
            Ok::<_, Infallible>(HttpResponse::new(Body::from(reply)))
        }
    });
    (Client::new(service, "default"), requests)
}

fn world(client: Client) -> (Arc<World>, Writers) {
    let NewWorld { world, writers, queue: _ } = World::create(client, settings(), metrics());
    (world, writers)
}

/// A running feed, and the switch for its lead.
struct Running {
    address: SocketAddr,
    lead: watch::Sender<Option<Lead>>,
}

async fn serve(doorkeeper: Doorkeeper) -> Running {
    let (sender, lead) = watch::channel(None);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = RouteServiceServer::new(Feed::new(lead, doorkeeper));
    let incoming = TcpListenerStream::new(listener);
    tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
    Running { address, lead: sender }
}

async fn watch_routes(
    address: SocketAddr,
    token: Option<&str>,
) -> Result<(mpsc::Sender<GatewayReport>, Streaming<RouteTable>), Status> {
    let mut client = RouteServiceClient::connect(format!("http://{address}")).await.unwrap();
    let (reports, outgoing) = mpsc::channel(4);
    let mut request = tonic::Request::new(ReceiverStream::new(outgoing));
    if let Some(token) = token {
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    }
    Ok((reports, client.watch(request).await?.into_inner()))
}

fn report(acknowledged: Option<TableVersion>) -> GatewayReport {
    GatewayReport { instance: "g1".to_owned(), acknowledged, draining: false }
}

#[tokio::test]
async fn only_a_leader_serves_tables_and_its_end_ends_the_streams() {
    let running = serve(Doorkeeper::Open).await;
    let refused = watch_routes(running.address, None).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);

    let (client, _requests) = api(|_| json!({}));
    let (world, _writers) = world(client);
    let (hub, ended) = (Arc::new(Hub::new(4)), CancellationToken::new());
    let lead = Lead { hub: Arc::clone(&hub), world: Arc::clone(&world), ended: ended.clone() };
    running.lead.send_replace(Some(lead));
    hub.publish(Vec::new());
    let (reports, mut tables) = watch_routes(running.address, None).await.unwrap();
    let first = tables.message().await.unwrap().unwrap();
    assert_eq!(first.version, Some(TableVersion { term: 4, counter: 1 }));

    reports.send(report(first.version)).await.unwrap();
    world.gates_changed.notified().await;
    assert_eq!(hub.census(), Census { live: 1, ..Census::default() });

    hub.publish(Vec::new());
    assert_eq!(tables.message().await.unwrap().unwrap().version, Some(TableVersion { term: 4, counter: 2 }));

    running.lead.send_replace(None);
    ended.cancel();
    assert_eq!(tables.message().await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn a_gateway_is_let_in_by_its_token_alone() {
    let (client, mut requests) = api(|asked| {
        let good = asked["spec"]["token"] == "good";
        json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "metadata": {}, "spec": {"token": ""},
            "status": {"authenticated": good, "audiences": ["trustformers-feed"],
                "user": {"username": "system:serviceaccount:sys:gateway"}}})
    });
    let running = serve(Doorkeeper::for_account(client.clone(), "sys", "gateway")).await;
    let (world, _writers) = world(client);
    let hub = Arc::new(Hub::new(1));
    hub.can_be_found();
    hub.publish(Vec::new());
    running.lead.send_replace(Some(Lead { hub, world, ended: CancellationToken::new() }));

    let none = watch_routes(running.address, None).await.unwrap_err();
    assert_eq!(none.code(), Code::Unauthenticated);
    let bad = watch_routes(running.address, Some("bad")).await.unwrap_err();
    assert_eq!(bad.code(), Code::Unauthenticated);
    let (_reports, mut tables) = watch_routes(running.address, Some("good")).await.unwrap();
    assert!(tables.message().await.unwrap().is_some());
    let (uri, body) = requests.recv().await.unwrap();
    assert!(uri.contains("/tokenreviews"), "{uri}");
    assert_eq!(body["spec"]["audiences"], json!(["trustformers-feed"]));
}

fn pod(restarts: u32, ready: bool, gate: Value) -> k8s_openapi::api::core::v1::Pod {
    let ready = if ready { "True" } else { "False" };
    let mut conditions = vec![json!({"type": "ContainersReady", "status": ready})];
    conditions.extend((!gate.is_null()).then_some(gate));
    serde_json::from_value(json!({
        "metadata": {"name": "p", "namespace": "team", "uid": "p1",
            "labels": {"serving.trustformers.dev/model": "chat", "serving.trustformers.dev/revision": "r"}},
        "status": {"podIP": "10.0.0.1", "conditions": conditions, "containerStatuses": [{"name": "runtime",
            "image": "i", "imageID": "", "ready": true, "restartCount": restarts, "state": {"running": {}}}]},
    }))
    .unwrap()
}

const MODEL: &str = "apiVersion: serving.trustformers.dev/v1alpha1\nkind: InferenceModel\n\
                     metadata: {name: chat, namespace: team}\nspec: {source: {uri: 'oci://x'}}\n";

#[tokio::test(start_paused = true)]
async fn a_gate_opens_by_acknowledgement_and_closes_by_a_restart() {
    let (client, mut requests) = api(|_| json!({"metadata": {"name": "p"}}));
    let (world, mut writers) = world(client);
    let hub = Arc::new(Hub::new(1));
    hub.can_be_found();
    writers.models.apply_watcher_event(&Event::Apply(serde_yaml::from_str(MODEL).unwrap()));
    writers.pods.apply_watcher_event(&Event::Apply(pod(0, true, Value::Null)));
    tokio::spawn(publish::run(Arc::clone(&world), Arc::clone(&hub)));
    tokio::spawn(gates::run(Arc::clone(&world), Arc::clone(&hub)));

    let mut tables = hub.tables();
    let table = tables.wait_for(Option::is_some).await.unwrap().clone().unwrap();
    assert_eq!(table.routes[0].backends[0].endpoints[0].pod_uid, "p1");
    let began = Instant::now();
    let report = Report { instance: "g".to_owned(), acknowledged: None, draining: false };
    hub.report(report.clone());
    // The gateway says nothing more: it is waited for until it is left out.
    let (uri, body) = requests.recv().await.unwrap();
    assert!(uri.starts_with("PATCH ") && uri.contains("/namespaces/team/pods/p/status"), "{uri}");
    let condition = &body["status"]["conditions"][0];
    assert_eq!((&condition["status"], &condition["reason"]), (&json!("True"), &json!("Acknowledged")));
    assert_eq!(body["metadata"]["uid"], "p1");
    let (waited, due) = (began.elapsed(), LEFT_OUT.max(SETTLE));
    assert!((due..due + Duration::from_millis(500)).contains(&waited), "{waited:?}");

    // The container starts again: the gate closes, and opens once the gateway has acknowledged the new start.
    writers.pods.apply_watcher_event(&Event::Apply(pod(1, false, condition.clone())));
    world.routes_changed.notify_one();
    world.gates_changed.notify_one();
    let (_, body) = requests.recv().await.unwrap();
    let closed = body["status"]["conditions"][0].clone();
    assert_eq!(closed["status"], "False");
    hub.report(report.clone());
    writers.pods.apply_watcher_event(&Event::Apply(pod(1, true, closed)));
    world.routes_changed.notify_one();
    let restarted = |table: &Option<Arc<RouteTable>>| {
        let backends = table.as_ref().map(|table| table.routes[0].backends.clone()).unwrap_or_default();
        backends.first().is_some_and(|backend| backend.endpoints[0].restart_count == 1)
    };
    let version = tables.wait_for(restarted).await.unwrap().as_ref().unwrap().version;
    assert!(hub.report(Report { acknowledged: version, ..report }));
    let acknowledged = Instant::now();
    world.gates_changed.notify_one();
    let (_, body) = requests.recv().await.unwrap();
    assert_eq!(body["status"]["conditions"][0]["status"], "True");
    assert!(acknowledged.elapsed() < Duration::from_millis(10), "an acknowledgement is not waited for");
}
