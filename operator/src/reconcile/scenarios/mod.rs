//! Conversations with the API server: each scenario lists the requests that reconciles must make, in order,
//! with the responses, and fails on one more or one fewer. Caches of models and pods are filled by hand, as
//! watches would.

mod analysis;
mod children;
mod faults;
mod gateways;
mod in_place;
mod requests;
mod rollouts;
mod statuses;

use std::collections::VecDeque;
use std::sync::Mutex;

use http::{Method, StatusCode};
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use serde_json::{Value, json};
use trustformers_control::kinds::{CHILDREN, ChildKind};

use super::*;
use crate::children::Child;
use crate::context::tests::{metrics, settings};
use crate::context::{NewContext, Writers};
use crate::decode::StoredObject;
use crate::testing::{MockRequest, mock_client};

/// An expected request, and its response.
#[derive(Debug, Clone)]
enum Expect {
    /// POST of a child. The response is the created object.
    Create { kind: &'static str },
    /// Server-side apply of a child. The response is the applied object.
    Apply { kind: &'static str, force: bool },
    /// POST or server-side apply of a child, refused.
    Refuse { kind: &'static str, code: u16, message: &'static str },
    /// Read of a child. The response is this object, or 404.
    Get { kind: &'static str, found: Option<Value> },
    /// JSON patch of a child. The response is this object.
    JsonPatch { kind: &'static str, patched: Value },
    /// A Deployment of another revision gets this number of replicas. The response is the scaled object.
    Scale { revision: String, replicas: u32 },
    /// A status with this phase.
    Status { phase: &'static str },
    /// A step of the rollout is stored, with this phase, under the condition that nothing else changed.
    Rollout { phase: &'static str },
    /// The same, refused because the model has changed.
    RefuseRollout { phase: &'static str },
    /// An Event with this reason.
    Event { reason: &'static str },
    /// Deletion of the object with this name.
    Delete { name: String },
    /// Deletion of any object.
    DeleteAny,
}

impl Expect {
    fn apply(kind: &'static str, force: bool) -> Self {
        Self::Apply { kind, force }
    }

    fn matches(&self, request: &MockRequest) -> bool {
        let MockRequest { method, uri, body } = request;
        let (path, query) = (uri.path(), uri.query().unwrap_or_default());
        let is_status = path.ends_with("/status");
        let plural = |kind: &str| {
            let found = CHILDREN.iter().find(|one| one.kind == kind).unwrap();
            path.contains(&format!("/{}/", found.plural))
        };
        match self {
            Self::Apply { kind, force } => {
                method == Method::PATCH && body["kind"] == *kind && query.contains("force=true") == *force
            }
            Self::Create { kind } => method == Method::POST && body["kind"] == *kind,
            Self::Refuse { kind, .. } => body["kind"] == *kind,
            Self::Get { kind, .. } => method == Method::GET && plural(kind),
            Self::JsonPatch { kind, .. } => method == Method::PATCH && body.is_array() && plural(kind),
            Self::Scale { revision, replicas } => {
                method == Method::PATCH
                    && path.ends_with(&format!("/deployments/chat-{revision}"))
                    && body["spec"] == json!({"replicas": replicas})
            }
            Self::Status { phase } => {
                is_status
                    && body["status"]["phase"] == *phase
                    && !body["metadata"]["resourceVersion"].is_string()
            }
            Self::Rollout { phase } | Self::RefuseRollout { phase } => {
                is_status
                    && body["status"]["rollout"]["phase"] == *phase
                    && body["metadata"]["resourceVersion"].is_string()
            }
            Self::Event { reason } => method == Method::POST && body["reason"] == *reason,
            Self::Delete { name } => method == Method::DELETE && path.ends_with(&format!("/{name}")),
            Self::DeleteAny => method == Method::DELETE,
        }
    }
}

/// The API server of a scenario.
#[derive(Clone, Default)]
struct ScriptedServer(Arc<Mutex<Conversation>>);

#[derive(Default)]
struct Conversation {
    expected: VecDeque<Expect>,
    requests: Vec<MockRequest>,
    version: u64,
}

impl ScriptedServer {
    fn expecting(expected: impl IntoIterator<Item = Expect>) -> Self {
        let server = Self::default();
        server.expect(expected);
        server
    }

    fn expect(&self, expected: impl IntoIterator<Item = Expect>) {
        self.0.lock().unwrap().expected.extend(expected);
    }

    fn client(&self) -> Client {
        let server = self.clone();
        mock_client(move |request| server.answer(request))
    }

    fn answer(&self, request: MockRequest) -> (StatusCode, Value) {
        let mut inner = self.0.lock().unwrap();
        let expected = inner.expected.pop_front();
        let expected = expected.unwrap_or_else(|| panic!("one request too many: {request:?}"));
        assert!(expected.matches(&request), "expected: {expected:?}\nreceived: {request:?}");
        inner.version += 1;
        let version = inner.version;
        inner.requests.push(request.clone());
        let reason = |code: u16| if code == 404 { "NotFound" } else { "x" };
        let failure = |code: u16, message: &str| json!({"kind": "Status", "status": "Failure", "code": code, "message": message, "reason": reason(code)});
        let (code, body) = match expected {
            Expect::Refuse { code, message, .. } => (code, failure(code, message)),
            Expect::RefuseRollout { .. } => (409, failure(409, "the object has been modified")),
            Expect::Scale { revision, replicas } => {
                let name = format!("chat-{revision}");
                let of_name = |one: &&MockRequest| one.body["metadata"]["name"] == name.as_str();
                let applied = inner.requests.iter().rev().filter(|one| one.body["kind"] == "Deployment");
                let mut object = applied.clone().find(of_name).map(|one| one.body.clone()).unwrap();
                object["spec"]["replicas"] = json!(replicas);
                (200, stored(&object, version))
            }
            Expect::Get { found: None, .. } => (404, failure(404, "not found")),
            Expect::Get { found: Some(object), .. } | Expect::JsonPatch { patched: object, .. } => {
                (200, object)
            }
            Expect::Status { .. } | Expect::Rollout { .. } => {
                let mut model = serde_json::to_value(model(SPEC, Value::Null)).unwrap();
                model["metadata"]["resourceVersion"] = json!(version.to_string());
                model["status"] = request.body["status"].clone();
                (200, model)
            }
            Expect::Delete { .. } | Expect::DeleteAny => {
                (200, json!({"kind": "Status", "status": "Success"}))
            }
            Expect::Event { .. } => (200, request.body),
            Expect::Create { .. } | Expect::Apply { .. } => (200, stored(&request.body, version)),
        };
        (StatusCode::from_u16(code).unwrap(), body)
    }

    /// The applied objects of a kind.
    fn applied(&self, kind: &str) -> Vec<Value> {
        let inner = self.0.lock().unwrap();
        inner.requests.iter().filter(|one| one.body["kind"] == kind).map(|one| one.body.clone()).collect()
    }

    /// The statuses that were written.
    fn statuses(&self) -> Vec<Value> {
        let inner = self.0.lock().unwrap();
        let statuses = inner.requests.iter().filter(|one| one.uri.path().ends_with("/chat/status"));
        statuses.map(|one| one.body["status"].clone()).collect()
    }

    fn is_done(&self) {
        let remaining = &self.0.lock().unwrap().expected;
        assert!(remaining.is_empty(), "these requests were expected and not made: {remaining:?}");
    }
}

/// An applied object as the API server stores it.
fn stored(applied: &Value, version: u64) -> Value {
    let mut object = applied.clone();
    let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    object["metadata"]["uid"] = json!(format!("uid-of-{name}"));
    object["metadata"]["resourceVersion"] = json!(version.to_string());
    object["metadata"]["creationTimestamp"] = json!("2026-01-01T00:00:00Z");
    object
}

/// A model. Another spec has another generation, as the API server counts.
fn model(spec: &str, status: Value) -> InferenceModel {
    let generation = if spec == SPEC { 2 } else { 3 + spec.bytes().map(u64::from).sum::<u64>() };
    let mut model: InferenceModel = serde_yaml::from_str(&format!(
        "apiVersion: serving.trustformers.dev/v1alpha1\nkind: InferenceModel\n\
         metadata: {{name: chat, namespace: team, uid: u1, generation: {generation}}}\nspec: {spec}\n"
    ))
    .unwrap();
    model.status = serde_json::from_value(status).unwrap();
    model
}

const SPEC: &str = "{source: {uri: 'oci://localhost/m:1'}}";

/// The requests for the children of a new model: first what its pods need.
fn create() -> Vec<Expect> {
    ["ServiceAccount", "ConfigMap", "Deployment", "Service"].map(|kind| Expect::Create { kind }).into()
}

fn created(phase: &'static str) -> Vec<Expect> {
    create().into_iter().chain([Expect::Status { phase }]).collect()
}

fn context(server: &ScriptedServer) -> (Arc<Context>, Writers) {
    let NewContext { context, writers, queue: _ } = Context::create(server.client(), settings(), metrics());
    (context, writers)
}

/// A context whose model was just created.
async fn with_new_model(server: &ScriptedServer) -> (Arc<Context>, Writers, Arc<InferenceModel>) {
    server.expect(created("Pending"));
    let (context, writers) = context(server);
    let model = Arc::new(model(SPEC, Value::Null));
    reconcile(Arc::clone(&model), Arc::clone(&context)).await.unwrap();
    server.is_done();
    (context, writers, model)
}

/// The present object of the cache, for a change by somebody else.
fn cached(context: &Context, kind: &'static ChildKind) -> Value {
    let child = context.children.of_owner("u1").into_iter().find(|child| child.kind == kind);
    child.unwrap().object()
}

/// The revision of a spec.
fn revision(spec: &str) -> String {
    hash::revision(&validate(&model(spec, Value::Null)).unwrap())
}

/// The name of the Deployment of a spec.
fn deployment(spec: &str) -> String {
    format!("chat-{}", revision(spec))
}

/// Delivers an object by the watch, with a new version.
fn deliver(context: &Context, kind: &'static ChildKind, mut object: Value) {
    let version: u64 = object["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
    object["metadata"]["resourceVersion"] = json!((version + 1000).to_string());
    let object: StoredObject = serde_json::from_value(object).unwrap();
    context.children.insert(Child::of(kind, object).unwrap());
}

fn pod(name: &str, status: Value) -> Pod {
    let mut pod = json!({"metadata": {"name": name, "namespace": "team", "uid": format!("uid-{name}"),
        "labels": {"serving.trustformers.dev/model": "chat", "serving.trustformers.dev/revision": "r"}}});
    pod["status"] = status;
    serde_json::from_value(pod).unwrap()
}

fn running(restarts: u32) -> Value {
    json!({"containerStatuses": [{"name": "runtime", "image": "i", "imageID": "", "ready": false,
        "restartCount": restarts, "state": {"running": {}}}]})
}
