//! The feed over a real connection, and readiness gates with a mock API server under a paused clock.

use std::convert::Infallible;
use std::net::SocketAddr;

use http::{Request as HttpRequest, StatusCode};
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
use trustformers_control::counts::SeriesKey;
use trustformers_proto::control::v1::route_service_client::RouteServiceClient;
use trustformers_proto::control::v1::route_service_server::RouteServiceServer;
use trustformers_proto::control::v1::{GatewayReport, Outcome, OutcomeCount, RevisionCounts, TableVersion};

use super::identity::FeedAuthenticator;
use super::service::{Feed, Leadership};
use super::*;
use crate::context::tests::{metrics, settings};
use crate::context::{Context, NewContext, Writers};
use crate::testing::{read, respond};

/// A client of an API server that answers every request with `answer`, and the requests. Those about the pod
/// `hangs` get no response.
fn api(answer: fn(&Value) -> Value) -> (Client, mpsc::Receiver<(String, Value)>) {
    // A test makes a handful of requests.
    let (requested, requests) = mpsc::channel(64);
    let service = service_fn(move |request: HttpRequest<Body>| {
        let requested = requested.clone();
        async move {
            let request = read(request).await;
            let uri = format!("{} {}", request.method, request.uri);
            let response = answer(&request.body);
            requested.send((uri.clone(), request.body)).await.unwrap();
            if uri.contains("/pods/hangs/") {
                std::future::pending::<()>().await;
            }
            Ok::<_, Infallible>(respond(StatusCode::OK, &response))
        }
    });
    (Client::new(service, "default"), requests)
}

fn context(client: Client) -> (Arc<Context>, Writers) {
    let NewContext { context, writers, queue: _ } = Context::create(client, settings(), metrics());
    (context, writers)
}

/// A running feed, and its leadership.
struct Running {
    address: SocketAddr,
    leadership: watch::Sender<Option<Leadership>>,
}

async fn serve(authenticator: FeedAuthenticator) -> Running {
    let (sender, leadership) = watch::channel(None);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = RouteServiceServer::new(Feed::new(leadership, authenticator));
    let incoming = TcpListenerStream::new(listener);
    tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
    Running { address, leadership: sender }
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
    GatewayReport { instance: "g1".to_owned(), acknowledged, ..GatewayReport::default() }
}

#[tokio::test]
async fn only_a_leader_serves_tables_until_its_lead_ends() {
    let running = serve(FeedAuthenticator::Open).await;
    let refused = watch_routes(running.address, None).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);

    let (client, _requests) = api(|_| json!({}));
    let (context, _writers) = context(client);
    let (feed, ended) = (Arc::new(FeedState::new(4)), CancellationToken::new());
    let leadership =
        Leadership { feed: Arc::clone(&feed), context: Arc::clone(&context), ended: ended.clone() };
    running.leadership.send_replace(Some(leadership));
    feed.publish(Vec::new());
    let (reports, mut tables) = watch_routes(running.address, None).await.unwrap();
    let first = tables.message().await.unwrap().unwrap();
    assert_eq!(first.version, Some(TableVersion { term: 4, counter: 1 }));

    reports.send(report(first.version)).await.unwrap();
    context.gates_changed.notified().await;
    assert_eq!(feed.counts(), GatewayCounts { live: 1, ..GatewayCounts::default() });

    feed.publish(Vec::new());
    assert_eq!(tables.message().await.unwrap().unwrap().version, Some(TableVersion { term: 4, counter: 2 }));

    running.leadership.send_replace(None);
    ended.cancel();
    assert_eq!(tables.message().await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn reports_are_summed_over_processes_and_a_repeated_one_counts_once() {
    let running = serve(FeedAuthenticator::Open).await;
    let (client, _requests) = api(|_| json!({}));
    let (context, _writers) = context(client);
    let (feed, ended) = (Arc::new(FeedState::new(4)), CancellationToken::new());
    let leadership = Leadership { feed, context: Arc::clone(&context), ended };
    running.leadership.send_replace(Some(leadership));
    let counted = |attempts, answered| RevisionCounts {
        route: "team/chat".to_owned(),
        revision: "r1".to_owned(),
        series: 1,
        attempts,
        outcomes: vec![OutcomeCount { outcome: Outcome::Ok.into(), count: answered }],
        ..RevisionCounts::default()
    };
    // Each with its own stream: a container that restarts keeps the instance, and a stream that opens again
    // begins with what was reported before.
    let sent =
        [("one", counted(10, 8)), ("one", counted(10, 8)), ("two", counted(3, 3)), ("one", counted(12, 12))];
    for (stream, (process, counts)) in sent.into_iter().enumerate() {
        let (reports, _tables) = watch_routes(running.address, None).await.unwrap();
        let (instance, process) = (format!("g{stream}"), process.to_owned());
        let report = GatewayReport { instance, process, counts: vec![counts], ..GatewayReport::default() };
        reports.send(report).await.unwrap();
        context.gates_changed.notified().await;
    }
    let key = SeriesKey { route: "team/chat".to_owned(), revision: "r1".to_owned() };
    let sums = context.counts.of(&key);
    assert_eq!((sums.attempts, sums.outcomes.of(Outcome::Ok), context.counts.in_flight(&key)), (15, 15, 0));
}

#[tokio::test]
async fn a_gateway_is_accepted_by_its_token_only() {
    let (client, mut requests) = api(|request| {
        let good = request["spec"]["token"] == "good";
        json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "metadata": {}, "spec": {"token": ""},
            "status": {"authenticated": good, "audiences": ["trustformers-feed"],
                "user": {"username": "system:serviceaccount:sys:gateway"}}})
    });
    let running = serve(FeedAuthenticator::for_account(client.clone(), "sys", "gateway")).await;
    let (context, _writers) = context(client);
    let feed = Arc::new(FeedState::new(1));
    feed.set_reachable();
    feed.publish(Vec::new());
    let ended = CancellationToken::new();
    running.leadership.send_replace(Some(Leadership { feed, context, ended }));

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
    named_pod("p", restarts, ready, gate)
}

fn named_pod(name: &str, restarts: u32, ready: bool, gate: Value) -> k8s_openapi::api::core::v1::Pod {
    let ready = if ready { "True" } else { "False" };
    let mut conditions = vec![json!({"type": "ContainersReady", "status": ready})];
    conditions.extend((!gate.is_null()).then_some(gate));
    serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "team", "uid": format!("{name}1"),
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
    let (context, mut writers) = context(client);
    let feed = Arc::new(FeedState::new(1));
    feed.set_reachable();
    feed.set_gateway_pods([]);
    writers.models.apply_watcher_event(&Event::Apply(serde_yaml::from_str(MODEL).unwrap()));
    writers.pods.apply_watcher_event(&Event::Apply(pod(0, true, Value::Null)));
    tokio::spawn(publish::run(Arc::clone(&context), Arc::clone(&feed)));
    tokio::spawn(gates::run(Arc::clone(&context), Arc::clone(&feed)));

    let mut tables = feed.tables();
    let table = tables.wait_for(Option::is_some).await.unwrap().clone().unwrap();
    assert_eq!(table.routes[0].backends[0].endpoints[0].pod_uid, "p1");
    let report = Report { instance: "g".to_owned(), acknowledged: None, draining: false };
    feed.report(report.clone());
    // The gateway reports nothing more, and there is no other one: the gate stays closed.
    assert!(tokio::time::timeout(Duration::from_secs(60), requests.recv()).await.is_err());
    assert_eq!(feed.hold().unwrap().reason, "GatewaysSilent");
    assert!(feed.report(Report { acknowledged: table.version, ..report.clone() }));
    context.gates_changed.notify_one();
    let (uri, body) = requests.recv().await.unwrap();
    assert!(uri.starts_with("PATCH ") && uri.contains("/namespaces/team/pods/p/status"), "{uri}");
    let condition = &body["status"]["conditions"][0];
    assert_eq!((&condition["status"], &condition["reason"]), (&json!("True"), &json!("Acknowledged")));
    assert_eq!(body["metadata"]["uid"], "p1");

    // The container restarts: the gate closes, and opens when the gateway has acknowledged the new start.
    writers.pods.apply_watcher_event(&Event::Apply(pod(1, false, condition.clone())));
    context.routes_changed.notify_one();
    context.gates_changed.notify_one();
    let (_, body) = requests.recv().await.unwrap();
    let closed = body["status"]["conditions"][0].clone();
    assert_eq!(closed["status"], "False");
    feed.report(report.clone());
    writers.pods.apply_watcher_event(&Event::Apply(pod(1, true, closed)));
    context.routes_changed.notify_one();
    let restarted = |table: &Option<Arc<RouteTable>>| {
        let backends = table.as_ref().map(|table| table.routes[0].backends.clone()).unwrap_or_default();
        backends.first().is_some_and(|backend| backend.endpoints[0].restart_count == 1)
    };
    let version = tables.wait_for(restarted).await.unwrap().as_ref().unwrap().version;
    assert!(feed.report(Report { acknowledged: version, ..report }));
    let acknowledged = Instant::now();
    context.gates_changed.notify_one();
    let (_, body) = requests.recv().await.unwrap();
    assert_eq!(body["status"]["conditions"][0]["status"], "True");
    assert!(acknowledged.elapsed() < Duration::from_millis(10), "an acknowledgement opens the gate at once");
}

#[tokio::test(start_paused = true)]
async fn a_request_that_hangs_delays_no_other_gate() {
    let (client, mut requests) = api(|_| json!({"metadata": {"name": "p"}}));
    let (context, mut writers) = context(client);
    let feed = Arc::new(FeedState::new(1));
    feed.set_reachable();
    feed.set_gateway_pods([]);
    writers.models.apply_watcher_event(&Event::Apply(serde_yaml::from_str(MODEL).unwrap()));
    writers.pods.apply_watcher_event(&Event::Apply(named_pod("hangs", 0, true, Value::Null)));
    tokio::spawn(publish::run(Arc::clone(&context), Arc::clone(&feed)));
    tokio::spawn(gates::run(Arc::clone(&context), Arc::clone(&feed)));
    let (uri, _) = requests.recv().await.unwrap();
    assert!(uri.contains("/pods/hangs/status"), "{uri}");

    writers.pods.apply_watcher_event(&Event::Apply(pod(0, true, Value::Null)));
    context.routes_changed.notify_one();
    context.gates_changed.notify_one();
    let started = Instant::now();
    let (uri, _) = requests.recv().await.unwrap();
    assert!(uri.contains("/pods/p/status"), "{uri}");
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
}
