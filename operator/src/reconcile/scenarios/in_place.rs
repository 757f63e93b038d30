//! A rollout within running pods, over real connections to pods that only remember what they were asked for.

use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;

use futures::Stream;
use futures::stream;
use kube::runtime::watcher::Event;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};
use trustformers_control::ending::DELETION_COST;
use trustformers_control::gate::{Report, SETTLE};
use trustformers_control::kinds::{CONFIG_MAP, DEPLOYMENT};
use trustformers_control::names;
use trustformers_proto::control::v1::{Backend, Endpoint, Route};
use trustformers_proto::pod_config::PodConfig;
use trustformers_proto::v1::model_service_server::{ModelService, ModelServiceServer};
use trustformers_proto::v1::{
    ListModelsRequest, ListModelsResponse, LoadModelRequest, LoadModelResponse, ModelSlot, ModelState,
    ModelStatus, RollbackModelRequest, RollbackModelResponse, SwapModelRequest, SwapModelResponse,
    UnloadModelRequest, UnloadModelResponse, WatchModelsRequest, WatchModelsResponse,
};
use trustformers_proto::{LOAD_HEADER, REPORT_HEADER};

use super::*;
use crate::context::Settings;
use crate::context::tests::identity;
use crate::feed::FeedState;
use crate::pod_tokens::tests::issued;

const FIRST: &str = "{source: {uri: 'pvc://weights/a'}, scaling: {replicas: 2}}";
const SECOND: &str =
    "{source: {uri: 'pvc://weights/b'}, scaling: {replicas: 2}, rollout: {steps: [{weight: 50}], bake: 1h}}";
const TOKEN: &str = "Bearer the-operators-token";

/// An API server that stores the status and what was applied.
#[derive(Clone, Default)]
struct StoringServer(Arc<Mutex<Stored>>);

#[derive(Default)]
struct Stored {
    /// The token that the operator gets for the pods of this namespace.
    token: &'static str,
    version: u64,
    status: Value,
    applied: Vec<Value>,
    /// Pods that Kubernetes is to end first, with their costs.
    marked: Vec<(String, String)>,
}

impl StoringServer {
    fn client(&self) -> Client {
        let server = self.clone();
        mock_client(move |request| server.answer(request))
    }

    fn answer(&self, request: MockRequest) -> (StatusCode, Value) {
        let mut stored_objects = self.0.lock().unwrap();
        stored_objects.version += 1;
        let version = stored_objects.version;
        let not_found =
            json!({"kind": "Status", "status": "Failure", "code": 404, "reason": "NotFound", "message": ""});
        match request.method {
            Method::GET => (StatusCode::NOT_FOUND, not_found),
            Method::DELETE => (StatusCode::OK, json!({"kind": "Status", "status": "Success"})),
            Method::PATCH if request.uri.path().contains("/pods/") => {
                let pod = request.uri.path().trim_end_matches("/status").rsplit('/').next().unwrap();
                let cost = &request.body["metadata"]["annotations"][DELETION_COST];
                stored_objects.marked.push((pod.to_owned(), cost.as_str().unwrap().to_owned()));
                (StatusCode::OK, request.body)
            }
            Method::PATCH if request.uri.path().ends_with("/status") => {
                stored_objects.status = request.body["status"].clone();
                let mut model = serde_json::to_value(model(FIRST, Value::Null)).unwrap();
                model["metadata"]["resourceVersion"] = json!(version.to_string());
                model["status"] = stored_objects.status.clone();
                (StatusCode::OK, model)
            }
            Method::POST if request.uri.path().ends_with("/token") => {
                assert_eq!(request.body["spec"]["audiences"], json!(["trustformers-pods.team"]));
                (StatusCode::CREATED, issued(&request, stored_objects.token))
            }
            Method::POST | Method::PATCH if !request.uri.path().contains("/events") => {
                stored_objects.applied.push(request.body.clone());
                (StatusCode::OK, stored(&request.body, version))
            }
            _ => (StatusCode::OK, request.body),
        }
    }

    fn status(&self) -> Value {
        self.0.lock().unwrap().status.clone()
    }

    fn applied(&self, kind: &str) -> Vec<Value> {
        let objects = self.0.lock().unwrap();
        objects.applied.iter().filter(|object| object["kind"] == kind).cloned().collect()
    }
}

/// A pod with two slots and no model.
#[derive(Clone)]
struct FakePod {
    name: &'static str,
    address: Ipv4Addr,
    state: Arc<Mutex<FakeState>>,
}

#[derive(Default)]
struct FakeState {
    slots: Vec<ModelSlot>,
    /// Requests that it answers.
    load: u32,
    /// What it was asked for.
    log: Vec<String>,
}

fn slot(revision: &str) -> ModelSlot {
    let mut slot =
        ModelSlot { revision: revision.to_owned(), digest: format!("d-{revision}"), ..ModelSlot::default() };
    slot.set_state(ModelState::Ready);
    slot
}

type Watched = Pin<Box<dyn Stream<Item = Result<WatchModelsResponse, Status>> + Send>>;

impl FakePod {
    fn new(name: &'static str, address: Ipv4Addr, revision: &str) -> Self {
        let state = FakeState { slots: vec![slot(revision)], ..FakeState::default() };
        Self { name, address, state: Arc::new(Mutex::new(state)) }
    }

    async fn serve(&self, port: u16) -> u16 {
        let listener = TcpListener::bind(SocketAddr::from((self.address, port))).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let service = ModelServiceServer::new(self.clone());
        let incoming = TcpListenerStream::new(listener);
        tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
        port
    }

    fn check<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let token = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
        if token == Some(TOKEN) { Ok(()) } else { Err(Status::unauthenticated("not the operator")) }
    }

    fn held(&self) -> Vec<String> {
        self.state.lock().unwrap().slots.iter().map(|slot| slot.revision.clone()).collect()
    }

    fn log(&self) -> Vec<String> {
        self.state.lock().unwrap().log.clone()
    }

    fn pod(&self, revision: &str) -> Pod {
        let conditions =
            ["PodScheduled", "ContainersReady", "Ready"].map(|one| json!({"type": one, "status": "True"}));
        let mut status = running(0);
        status["podIP"] = json!(self.address.to_string());
        status["conditions"] = json!(conditions);
        let mut pod = pod(self.name, status);
        let labels = pod.metadata.labels.as_mut().unwrap();
        labels.insert(names::REVISION_LABEL.to_owned(), revision.to_owned());
        pod
    }
}

#[tonic::async_trait]
impl ModelService for FakePod {
    type WatchModelsStream = Watched;

    async fn list_models(
        &self,
        request: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        let mut response = Response::new(ListModelsResponse::default());
        if request.metadata().contains_key(REPORT_HEADER) {
            let load = self.state.lock().unwrap().load.to_string();
            response.metadata_mut().insert(LOAD_HEADER, load.parse().unwrap());
        }
        Ok(response)
    }

    async fn watch_models(&self, _: Request<WatchModelsRequest>) -> Result<Response<Watched>, Status> {
        Ok(Response::new(Box::pin(stream::empty())))
    }

    async fn load_model(
        &self,
        request: Request<LoadModelRequest>,
    ) -> Result<Response<LoadModelResponse>, Status> {
        self.check(&request)?;
        let request = request.into_inner();
        let mut state = self.state.lock().unwrap();
        state.log.push(format!("load {} of {}", request.path, request.name));
        state.slots.push(slot(&request.revision));
        Ok(Response::new(LoadModelResponse::default()))
    }

    async fn unload_model(
        &self,
        request: Request<UnloadModelRequest>,
    ) -> Result<Response<UnloadModelResponse>, Status> {
        self.check(&request)?;
        let revision = request.into_inner().revision;
        let mut state = self.state.lock().unwrap();
        state.log.push("unload".to_owned());
        state.slots.retain(|slot| slot.revision != revision);
        Ok(Response::new(UnloadModelResponse::default()))
    }

    async fn swap_model(
        &self,
        request: Request<SwapModelRequest>,
    ) -> Result<Response<SwapModelResponse>, Status> {
        self.check(&request)?;
        let request = request.into_inner();
        let mut state = self.state.lock().unwrap();
        state.log.push("swap".to_owned());
        if state.slots[0].digest != request.expected_digest || state.slots[1].revision != request.revision {
            return Err(Status::aborted("another version answers"));
        }
        state.slots.swap(0, 1);
        Ok(Response::new(SwapModelResponse::default()))
    }

    async fn rollback_model(
        &self,
        _: Request<RollbackModelRequest>,
    ) -> Result<Response<RollbackModelResponse>, Status> {
        Err(Status::unimplemented("the operator swaps"))
    }
}

/// A model that two pods serve.
struct Served {
    server: StoringServer,
    context: Arc<Context>,
    /// Keeps the caches.
    _writers: Writers,
    feed: Arc<FeedState>,
    pods: Vec<FakePod>,
    annotations: Value,
}

impl Served {
    async fn new(token: &'static str) -> Self {
        let revision = revision(FIRST);
        let first = FakePod::new("a", Ipv4Addr::LOCALHOST, &revision);
        let second = FakePod::new("b", Ipv4Addr::new(127, 0, 0, 2), &revision);
        let port = first.serve(0).await;
        second.serve(port).await;
        let server = StoringServer::default();
        server.0.lock().unwrap().token = token;
        let settings =
            Settings { identity: Some(identity()), admin_port: port, grpc_port: port, ..settings() };
        let NewContext { context, mut writers, queue: _ } =
            Context::create(server.client(), settings, metrics());
        let feed = Arc::new(FeedState::new(1));
        feed.set_reachable();
        feed.set_gateway_pods([]);
        context.feed.set(Arc::clone(&feed)).unwrap();
        let pods = vec![first, second];
        for pod in &pods {
            writers.pods.apply_watcher_event(&Event::Apply(pod.pod(&revision)));
        }
        let case = Self { server, context, _writers: writers, feed, pods, annotations: json!({}) };
        case.route(&[&revision]);
        // Connections need the real clock.
        tokio::time::pause();
        tokio::time::advance(SETTLE).await;
        tokio::time::resume();
        case.reconcile_until(FIRST, "/stable/revision", &revision).await;
        case
    }

    /// What pods report reaches the operator, and it reconciles.
    async fn reconcile(&self, spec: &str) {
        for pod in &self.pods {
            let slots = pod.state.lock().unwrap().slots.clone();
            let mut report = ModelStatus { slots, digest: "d".to_owned(), ..ModelStatus::default() };
            report.set_state(ModelState::Ready);
            self.context.record_report(&format!("uid-{}", pod.name), 0, report);
        }
        if let Some(child) = self.context.children.of_owner("u1").iter().find(|one| one.kind == &DEPLOYMENT) {
            let mut object = child.object();
            object["status"] = json!({"replicas": 2, "updatedReplicas": 2});
            deliver(&self.context, &DEPLOYMENT, object);
        }
        let mut model = model(spec, self.server.status());
        model.metadata.resource_version = Some("1".to_owned());
        model.metadata.annotations = serde_json::from_value(self.annotations.clone()).unwrap();
        reconcile(Arc::new(model), Arc::clone(&self.context)).await.unwrap();
    }

    /// Reconciles until the status has a value.
    async fn reconcile_until(&self, spec: &str, pointer: &str, value: &str) {
        for _ in 0..40 {
            self.reconcile(spec).await;
            if self.server.status().pointer(pointer).and_then(Value::as_str) == Some(value) {
                return;
            }
        }
        panic!("{pointer} is not {value}: {}", self.server.status());
    }

    /// Gateways have a table in which these revisions get requests.
    fn route(&self, revisions: &[&str]) {
        let backends = revisions.iter().map(|revision| Backend {
            revision: (*revision).to_owned(),
            weight: 1,
            endpoints: vec![Endpoint::default()],
            ..Backend::default()
        });
        self.feed.publish(vec![Route {
            name: "team/chat".to_owned(),
            backends: backends.collect(),
            ..Route::default()
        }]);
        let acknowledged = self.feed.tables().borrow().as_ref().unwrap().version;
        self.feed.report(Report { instance: "g".to_owned(), acknowledged, draining: false });
    }

    fn held(&self) -> Vec<Vec<String>> {
        self.pods.iter().map(FakePod::held).collect()
    }

    /// The revision that pods start with.
    fn file(&self) -> String {
        let text = cached(&self.context, &CONFIG_MAP)["data"]["pod.yaml"].as_str().unwrap().to_owned();
        PodConfig::parse(&text).unwrap().model.revision
    }
}

#[tokio::test]
async fn pods_load_a_revision_beside_the_other_answer_with_it_and_take_it_back() {
    let mut case = Served::new("the-operators-token").await;
    let (old, new) = (revision(FIRST), revision(SECOND));
    assert_eq!(case.held(), [[old.clone()], [old.clone()]]);

    case.reconcile_until(SECOND, "/rollout/phase", "Shifting").await;
    case.route(&[&old, &new]);
    case.reconcile_until(SECOND, "/rollout/phase", "Promoted").await;
    case.reconcile(SECOND).await;
    case.reconcile(SECOND).await;
    let load = "load /models/b of team/chat".to_owned();
    for pod in &case.pods {
        assert_eq!(pod.log(), [load.clone(), "swap".to_owned()]);
    }
    assert_eq!(case.held(), [[new.clone(), old.clone()], [new.clone(), old.clone()]]);
    assert_eq!(case.file(), new);
    let status = case.server.status();
    assert_eq!(status["rollout"]["placement"], "InPlace");
    assert_eq!(status["stable"], json!({"revision": new, "pool": old, "digest": format!("d-{new}")}));
    assert_eq!((&status["replicas"], &status["readyReplicas"]), (&json!(2), &json!(2)));
    // One Deployment, whose template has never changed.
    let deployments = case.server.applied("Deployment");
    assert!(deployments.iter().all(|one| one["spec"]["template"] == deployments[0]["spec"]["template"]));
    assert!(deployments.iter().all(|one| one["metadata"]["name"] == format!("chat-{old}")));

    case.annotations = json!({names::UNDO_ANNOTATION: new});
    case.reconcile(SECOND).await;
    case.route(&[&old]);
    case.reconcile_until(SECOND, "/rollout/phase", "RolledBack").await;
    case.reconcile(SECOND).await;
    case.reconcile(SECOND).await;
    assert_eq!(case.held(), [[old.clone()], [old.clone()]]);
    assert_eq!(case.file(), old);
    assert_eq!(case.server.status()["stable"]["revision"], old);
}

#[tokio::test]
async fn the_pod_with_the_fewest_requests_is_marked_before_the_deployment_is_scaled_down() {
    let case = Served::new("the-operators-token").await;
    for (pod, load) in case.pods.iter().zip([9, 2]) {
        pod.state.lock().unwrap().load = load;
    }
    let marked = || case.server.0.lock().unwrap().marked.clone();
    case.reconcile(FIRST).await;
    assert_eq!(marked(), []);
    for _ in 0..3 {
        case.reconcile("{source: {uri: 'pvc://weights/a'}}").await;
    }
    assert_eq!(case.server.applied("Deployment").last().unwrap()["spec"]["replicas"], 1);
    // The Deployment that is written here is not what the caches have, so each pass marks again.
    let marks = marked();
    let is_right = |pod: &str, cost: &str| pod == "b" && cost.parse::<i32>().unwrap() < 0;
    assert!(!marks.is_empty() && marks.iter().all(|(pod, cost)| is_right(pod, cost)), "marked: {marks:?}");
}

#[tokio::test]
async fn a_pod_that_does_not_know_the_operator_keeps_what_it_has_and_the_status_says_why() {
    let case = Served::new("another-token").await;
    for _ in 0..6 {
        case.reconcile(SECOND).await;
    }
    // What only a message says is written when the interval of progress has passed.
    tokio::time::pause();
    tokio::time::advance(status::PROGRESS_INTERVAL).await;
    tokio::time::resume();
    case.reconcile(SECOND).await;
    assert_eq!(case.held(), [[revision(FIRST)], [revision(FIRST)]]);
    let message = case.server.status()["rollout"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("not the operator") && message.starts_with("pod a: "), "{message}");
}
