//! Conversations with the API server: each scenario lists the requests that a reconcile must make, in order, with the
//! answers, and fails on one more or one fewer. Caches are filled by hand, as watches would.

use std::collections::VecDeque;
use std::sync::Mutex;

use http::{Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use kube::Client;
use kube::client::Body;
use kube::runtime::watcher::Event;
use serde_json::{Value, json};
use tower::service_fn;

use super::*;
use crate::world::tests::{metrics, settings};
use crate::world::{NewWorld, World, Writers};
use trustformers_control::names;

/// What the API server is expected to be asked, and answers.
#[derive(Debug)]
enum Expect {
    /// Server-side apply of a child; answered with what was sent.
    Apply { kind: &'static str, force: bool },
    /// The trial of the account before its first apply; answered with what was sent and these managers.
    Trial { managers: &'static [&'static str] },
    /// Server-side apply of a child, refused.
    Refuse { kind: &'static str, code: u16, message: &'static str },
    /// A status with this phase.
    Status { phase: &'static str },
    /// An Event of this reason.
    Event { reason: &'static str },
    /// The deletion of a ConfigMap of this name.
    Delete { name: String },
}

/// The API server of a scenario.
#[derive(Clone)]
struct Server {
    expected: Arc<Mutex<VecDeque<Expect>>>,
    applied: Arc<Mutex<Vec<Value>>>,
}

impl Server {
    fn expecting(expected: impl IntoIterator<Item = Expect>) -> Self {
        Self { expected: Arc::new(Mutex::new(expected.into_iter().collect())), applied: Arc::default() }
    }

    fn client(&self) -> Client {
        let server = self.clone();
        let service = service_fn(move |request: Request<Body>| {
            let server = server.clone();
            async move { Ok::<_, std::convert::Infallible>(server.answer(request).await) }
        });
        Client::new(service, "default")
    }

    async fn answer(&self, request: Request<Body>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        let body: Value =
            if bytes.is_empty() { Value::Null } else { serde_json::from_slice(&bytes).unwrap() };
        let uri = parts.uri.to_string();
        let asked = format!("{} {uri} {body}", parts.method);
        let expected = self.expected.lock().unwrap().pop_front();
        let expected = expected.unwrap_or_else(|| panic!("one request too many: {asked}"));
        let fits = match &expected {
            Expect::Apply { kind, force } => {
                parts.method == Method::PATCH && body["kind"] == *kind && uri.contains("force=true") == *force
            }
            Expect::Trial { .. } => body["kind"] == "ServiceAccount" && uri.contains("dryRun=All"),
            Expect::Refuse { kind, .. } => parts.method == Method::PATCH && body["kind"] == *kind,
            Expect::Status { phase } => uri.contains("/status?") && body["status"]["phase"] == *phase,
            Expect::Event { reason } => parts.method == Method::POST && body["reason"] == *reason,
            Expect::Delete { name } => parts.method == Method::DELETE && uri.contains(&format!("/{name}?")),
        };
        assert!(fits, "{expected:?} was expected, but asked was {asked}");
        let (code, answer) = match expected {
            Expect::Refuse { code, message, .. } => (
                code,
                json!({"kind": "Status", "status": "Failure", "code": code, "message": message, "reason": "x"}),
            ),
            Expect::Status { .. } => (
                200,
                json!({"apiVersion": "serving.trustformers.dev/v1alpha1",
                "kind": "InferenceModel", "metadata": {"name": "chat"}, "spec": {"source": {"uri": "oci://x"}}}),
            ),
            Expect::Trial { managers } => {
                let mut answer = body;
                answer["metadata"]["managedFields"] =
                    managers.iter().map(|manager| json!({"manager": manager})).collect();
                (200, answer)
            }
            Expect::Delete { .. } => (200, json!({"kind": "Status", "status": "Success"})),
            Expect::Apply { .. } | Expect::Event { .. } => {
                self.applied.lock().unwrap().push(body.clone());
                (200, body)
            }
        };
        let body = Body::from(serde_json::to_vec(&answer).unwrap());
        Response::builder().status(StatusCode::from_u16(code).unwrap()).body(body).unwrap()
    }

    /// The applied objects of a kind.
    fn applied(&self, kind: &str) -> Vec<Value> {
        self.applied.lock().unwrap().iter().filter(|object| object["kind"] == kind).cloned().collect()
    }

    fn is_done(&self) {
        let left = self.expected.lock().unwrap();
        assert!(left.is_empty(), "these requests were expected and not made: {left:?}");
    }
}

fn model(spec: &str, status: Value) -> InferenceModel {
    let mut model: InferenceModel = serde_yaml::from_str(&format!(
        "apiVersion: serving.trustformers.dev/v1alpha1\nkind: InferenceModel\n\
         metadata: {{name: chat, namespace: team, uid: u1, generation: 2}}\nspec: {spec}\n"
    ))
    .unwrap();
    model.status = serde_json::from_value(status).unwrap();
    model
}

const SPEC: &str = "{source: {uri: 'oci://localhost/m:1'}}";

fn create() -> Vec<Expect> {
    let objects = ["ServiceAccount", "ConfigMap", "Service", "PodDisruptionBudget", "Deployment"];
    let applies = objects.map(|kind| Expect::Apply { kind, force: false });
    [Expect::Trial { managers: &[names::MANAGER] }].into_iter().chain(applies).collect()
}

fn world(server: &Server) -> (Arc<World>, Writers) {
    let NewWorld { world, writers, queue: _ } = World::create(server.client(), settings(), metrics());
    (world, writers)
}

/// Puts what was applied into the caches, as the watches would, with the Deployment's status as its controller would
/// write it.
fn cache_applied(server: &Server, writers: &mut Writers, rolled_out: bool) {
    fn put<K>(writer: &mut kube::runtime::reflector::store::Writer<K>, object: &Value)
    where
        K: kube::runtime::reflector::Lookup<DynamicType = ()> + Clone + serde::de::DeserializeOwned,
    {
        writer.apply_watcher_event(&Event::Apply(serde_json::from_value(object.clone()).unwrap()));
    }
    for object in server.applied.lock().unwrap().iter() {
        match object["kind"].as_str().unwrap() {
            "ServiceAccount" => put(&mut writers.service_accounts, object),
            "ConfigMap" => put(&mut writers.config_maps, object),
            "Service" => put(&mut writers.services, object),
            "PodDisruptionBudget" => put(&mut writers.budgets, object),
            "Deployment" => {
                let mut object = object.clone();
                if rolled_out {
                    object["status"] = json!({"replicas": 1, "updatedReplicas": 1});
                }
                put(&mut writers.deployments, &object);
            }
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_new_model_gets_its_objects_in_order_and_a_status() {
    let server = Server::expecting(create().into_iter().chain([Expect::Status { phase: "Pending" }]));
    let (world, _writers) = world(&server);
    reconcile(Arc::new(model(SPEC, Value::Null)), world).await.unwrap();
    server.is_done();
    for object in server.applied("Deployment") {
        assert_eq!(object["metadata"]["ownerReferences"][0]["uid"], "u1");
    }
}

#[tokio::test]
async fn in_steady_state_nothing_is_asked() {
    let server = Server::expecting(create().into_iter().chain([Expect::Status { phase: "Pending" }]));
    let (world, mut writers) = world(&server);
    let model = Arc::new(model(SPEC, Value::Null));
    reconcile(Arc::clone(&model), Arc::clone(&world)).await.unwrap();
    cache_applied(&server, &mut writers, true);
    // One more request of any kind would fail the scenario. The cached model has no status yet: what was written counts.
    reconcile(model, world).await.unwrap();
    server.is_done();
}

#[tokio::test]
async fn drift_is_corrected_by_force_and_nothing_else_is_sent() {
    let server = Server::expecting(
        create()
            .into_iter()
            .chain([Expect::Status { phase: "Pending" }, Expect::Apply { kind: "Deployment", force: true }]),
    );
    let (world, mut writers) = world(&server);
    let model = Arc::new(model(SPEC, Value::Null));
    reconcile(Arc::clone(&model), Arc::clone(&world)).await.unwrap();
    cache_applied(&server, &mut writers, true);
    let mut drifted = server.applied("Deployment").remove(0);
    drifted["spec"]["replicas"] = json!(7);
    writers.deployments.apply_watcher_event(&Event::Apply(serde_json::from_value(drifted).unwrap()));
    reconcile(model, world).await.unwrap();
    server.is_done();
    assert_eq!(server.applied("Deployment")[1]["spec"]["replicas"], 1);
}

#[tokio::test]
async fn an_old_configuration_goes_when_no_pod_has_it_and_the_rollout_is_complete() {
    let changed = "{source: {uri: 'oci://localhost/m:2'}}";
    let first = Server::expecting(create().into_iter().chain([Expect::Status { phase: "Pending" }]));
    let (world, _writers) = world(&first);
    reconcile(Arc::new(model(SPEC, Value::Null)), world).await.unwrap();
    let old = first.applied("ConfigMap").remove(0);
    let name = old["metadata"]["name"].as_str().unwrap().to_owned();

    let second = Server::expecting(
        create()
            .into_iter()
            .chain([Expect::Status { phase: "Pending" }, Expect::Delete { name: name.clone() }]),
    );
    let (world, mut writers) = self::world(&second);
    writers.config_maps.apply_watcher_event(&Event::Apply(serde_json::from_value(old).unwrap()));
    let model = Arc::new(model(changed, Value::Null));
    // The rollout has only begun: the old configuration stays.
    reconcile(Arc::clone(&model), Arc::clone(&world)).await.unwrap();
    cache_applied(&second, &mut writers, true);
    // A pod still has it mounted: it stays as well.
    let pod = json!({
        "metadata": {"name": "p", "namespace": "team", "uid": "p1", "deletionTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"serving.trustformers.dev/model": "chat", "serving.trustformers.dev/revision": "r"}},
        "spec": {"containers": [], "volumes": [{"name": "config", "configMap": {"name": name}}]},
    });
    let pod: k8s_openapi::api::core::v1::Pod = serde_json::from_value(pod).unwrap();
    writers.pods.apply_watcher_event(&Event::Apply(pod.clone()));
    reconcile(Arc::clone(&model), Arc::clone(&world)).await.unwrap();
    writers.pods.apply_watcher_event(&Event::Delete(pod));
    reconcile(model, world).await.unwrap();
    second.is_done();
}

#[tokio::test]
async fn an_invalid_spec_is_told_and_waits_for_an_edit() {
    let server =
        Server::expecting([Expect::Status { phase: "Failed" }, Expect::Event { reason: "InvalidSpec" }]);
    let (world, _writers) = world(&server);
    let model = Arc::new(model("{source: {uri: 'hf://a/b'}}", Value::Null));
    let error = reconcile(Arc::clone(&model), Arc::clone(&world)).await.unwrap_err();
    assert_eq!(error.label(), "Validate/Source");
    assert_eq!(pause(&model, &error, &world), Action::await_change());
    server.is_done();
}

#[tokio::test]
async fn somebody_elses_object_is_never_taken_over() {
    let conflict = "Apply failed with 1 conflict: conflict with \"kubectl\": .spec.clusterIP";
    let server = Server::expecting([
        Expect::Trial { managers: &[names::MANAGER] },
        Expect::Apply { kind: "ServiceAccount", force: false },
        Expect::Apply { kind: "ConfigMap", force: false },
        Expect::Refuse { kind: "Service", code: 409, message: conflict },
        Expect::Status { phase: "Failed" },
        Expect::Event { reason: "NameTaken" },
    ]);
    let (world, _writers) = world(&server);
    let model = Arc::new(model(SPEC, Value::Null));
    let error = reconcile(Arc::clone(&model), Arc::clone(&world)).await.unwrap_err();
    assert_eq!(error.label(), "Apply/NotOurs");
    assert!(error.to_string().contains("Service chat exists"), "{error}");
    assert_eq!(pause(&model, &error, &world), Action::requeue(Duration::from_secs(1)));
    assert_eq!(pause(&model, &error, &world), Action::requeue(Duration::from_secs(2)));
    server.is_done();
}

#[tokio::test]
async fn somebody_elses_account_is_not_taken_over_though_nothing_is_in_conflict() {
    let server = Server::expecting([
        Expect::Trial { managers: &["kubectl-create", names::MANAGER] },
        Expect::Status { phase: "Failed" },
        Expect::Event { reason: "NameTaken" },
    ]);
    let (world, _writers) = world(&server);
    let error = reconcile(Arc::new(model(SPEC, Value::Null)), world).await.unwrap_err();
    assert!(error.to_string().contains("kubectl-create wrote to it"), "{error}");
    server.is_done();
}

#[tokio::test]
async fn trouble_of_the_api_server_is_no_news_about_the_model() {
    let server =
        Server::expecting([Expect::Refuse { kind: "ServiceAccount", code: 500, message: "etcd is slow" }]);
    let (world, _writers) = world(&server);
    let error = reconcile(Arc::new(model(SPEC, Value::Null)), world).await.unwrap_err();
    assert_eq!(error.label(), "Apply/Request");
    server.is_done();
}

#[tokio::test]
async fn a_pods_own_words_reach_the_status_and_an_event() {
    let server = Server::expecting(
        create()
            .into_iter()
            .chain([Expect::Status { phase: "Failed" }, Expect::Event { reason: "DigestMismatch" }]),
    );
    let (world, mut writers) = world(&server);
    let pod = json!({
        "metadata": {"name": "p", "namespace": "team", "uid": "p1",
            "labels": {"serving.trustformers.dev/model": "chat", "serving.trustformers.dev/revision": "r"}},
    });
    writers.pods.apply_watcher_event(&Event::Apply(serde_json::from_value(pod).unwrap()));
    let report = trustformers_proto::v1::ModelStatus {
        state: trustformers_proto::v1::ModelState::Failed as i32,
        reason: "DigestMismatch".to_owned(),
        message: "m.gguf has another digest".to_owned(),
        ..Default::default()
    };
    assert!(world.heard("p1", report.clone()));
    assert!(!world.heard("p1", report), "the same words again are no news");
    let model = Arc::new(model(SPEC, Value::Null));
    reconcile(Arc::clone(&model), Arc::clone(&world)).await.unwrap();
    cache_applied(&server, &mut writers, false);
    reconcile(model, world).await.unwrap();
    server.is_done();
}

#[tokio::test]
async fn a_model_that_is_being_deleted_is_left_alone() {
    let server = Server::expecting([]);
    let (world, _writers) = world(&server);
    let mut model = model(SPEC, Value::Null);
    model.metadata.deletion_timestamp = Some(serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap());
    reconcile(Arc::new(model), world).await.unwrap();
    server.is_done();
}
