//! How many requests models cost: from their creation until they serve, and when nothing changes any more.
//! The tasks of a leader run as they do in a cluster, under a paused clock.

use std::collections::{BTreeMap, HashSet};

use kube::core::DeserializeGuard;
use kube::runtime::watcher::Event;
use serde_json::{Value, json};
use tokio::time::sleep;
use trustformers_control::gate::SETTLE;
use trustformers_control::names;
use trustformers_proto::v1::{ModelState, ModelStatus};

use super::*;
use crate::feed::{FeedState, gates, publish};
use crate::watchers;

const TEAM: &str = "team";

/// An API server that accepts everything, and its log.
#[derive(Clone, Default)]
struct RecordingServer(Arc<Mutex<Recording>>);

#[derive(Default)]
struct Recording {
    /// Method, resource and object of each request.
    requests: Vec<String>,
    version: u64,
    /// The children as they are stored, by kind and name.
    children: BTreeMap<(String, String), Value>,
    /// The last status of each model.
    statuses: BTreeMap<String, Value>,
}

impl RecordingServer {
    fn client(&self) -> Client {
        let server = self.clone();
        mock_client(move |request| server.answer(&request))
    }

    fn answer(&self, request: &MockRequest) -> (StatusCode, Value) {
        let mut recording = self.0.lock().unwrap();
        recording.version += 1;
        let version = recording.version;
        let path: Vec<&str> = request.uri.path().split('/').collect();
        let after_namespace = path.iter().position(|one| *one == TEAM).unwrap() + 1;
        recording.requests.push(format!("{} {}", request.method, path[after_namespace..].join("/")));
        let mut body = request.body.clone();
        if request.uri.path().ends_with("/status") {
            let name = path[after_namespace + 1].to_owned();
            if body["kind"] == "InferenceModel" {
                let mut model = serde_json::to_value(named(&name, Value::Null)).unwrap();
                model["metadata"]["resourceVersion"] = json!(version.to_string());
                model["status"] = body["status"].clone();
                recording.statuses.insert(name, body["status"].clone());
                return (StatusCode::OK, model);
            }
            body["metadata"]["name"] = json!(name);
            return (StatusCode::OK, body);
        }
        let object = stored(&body, version);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        recording.children.insert((text(&object["kind"]), text(&object["metadata"]["name"])), object.clone());
        (StatusCode::OK, object)
    }

    fn requests(&self) -> Vec<String> {
        self.0.lock().unwrap().requests.clone()
    }
}

fn named(name: &str, status: Value) -> InferenceModel {
    let mut model = model(SPEC, status);
    model.metadata.name = Some(name.to_owned());
    model.metadata.uid = Some(format!("uid-of-{name}"));
    model
}

/// A leader with its tasks.
struct RunningLeader {
    server: RecordingServer,
    context: Arc<Context>,
    writers: Writers,
}

impl RunningLeader {
    fn start() -> Self {
        let server = RecordingServer::default();
        let NewContext { context, writers, queue } = Context::create(server.client(), settings(), metrics());
        let feed = Arc::new(FeedState::new(1));
        feed.set_reachable();
        feed.set_gateway_pods([]);
        context.feed.set(Arc::clone(&feed)).unwrap();
        context.start();
        tokio::spawn(run(Arc::clone(&context), queue));
        tokio::spawn(publish::run(Arc::clone(&context), Arc::clone(&feed)));
        tokio::spawn(gates::run(Arc::clone(&context), feed));
        Self { server, context, writers }
    }

    fn deliver(&mut self, events: impl IntoIterator<Item = Event<InferenceModel>>) {
        let mut listed = HashSet::new();
        for event in events {
            let event = match event {
                Event::Init => Event::Init,
                Event::InitDone => Event::InitDone,
                Event::InitApply(model) => Event::InitApply(DeserializeGuard(Ok(model))),
                Event::Apply(model) => Event::Apply(DeserializeGuard(Ok(model))),
                Event::Delete(model) => Event::Delete(DeserializeGuard(Ok(model))),
            };
            watchers::apply_model_event(&self.context, &mut self.writers.models, &mut listed, event);
        }
    }

    fn deliver_pod(&mut self, model: &str, status: Value) {
        let pod = pod_of(model, status);
        for (namespace, name) in self.writers.pods.apply_watcher_event(&Event::Apply(pod)) {
            self.context.request(&namespace, &name, Lane::Child);
        }
    }

    /// The pod of a model starts, loads, serves, and is admitted by the operator.
    async fn start_pod(&mut self, model: &str) {
        let deployment = ("Deployment".to_owned(), deployment_of(model));
        let mut created = self.server.0.lock().unwrap().children[&deployment].clone();
        created["status"] = json!({"replicas": 1, "updatedReplicas": 1});
        created["metadata"]["resourceVersion"] = json!("100000");
        self.server.0.lock().unwrap().children.insert(deployment, created.clone());
        self.deliver_child(Event::Apply(serde_json::from_value(created).unwrap()), "Deployment");
        self.deliver_pod(model, running(0));
        sleep(Duration::from_millis(500)).await;
        for (state, loaded_bytes, duration_ms) in
            [(ModelState::Loading, 1, 3000), (ModelState::Warming, 100, 400), (ModelState::Ready, 100, 400)]
        {
            let report =
                ModelStatus { state: state as i32, loaded_bytes, total_bytes: 100, ..Default::default() };
            self.context.record_report(&format!("uid-p-{model}"), 0, report);
            self.context.request(TEAM, model, Lane::Child);
            sleep(Duration::from_millis(duration_ms)).await;
        }
        self.deliver_pod(model, serves(&["PodScheduled", "ContainersReady"], None));
        // The gate is written, and the watch shows it.
        sleep(Duration::from_millis(500)).await;
        let gate = json!({"type": names::ROUTABLE_GATE, "status": "True",
            "message": "every gateway has this pod in its table; restarts of the container: 0"});
        self.deliver_pod(model, serves(&["PodScheduled", "ContainersReady", "Ready"], Some(gate)));
        sleep(Duration::from_secs(10)).await;
    }

    /// From now on some other models always wait for a pass. They do not exist, so their passes do nothing.
    async fn keep_queue_busy(&self) {
        let context = Arc::clone(&self.context);
        tokio::spawn(async move {
            for number in 0_u64.. {
                context.request(TEAM, &format!("other-{}", number % 8), Lane::Child);
                sleep(Duration::from_millis(3)).await;
            }
        });
        sleep(Duration::from_millis(50)).await;
    }

    fn deliver_child(&self, event: Event<StoredObject>, kind: &str) {
        let kind = CHILDREN.iter().find(|one| one.kind == kind).unwrap();
        watchers::apply_child_event(&self.context, kind, event);
    }
}

fn deployment_of(model: &str) -> String {
    format!("{model}-{}", revision(SPEC))
}

fn pod_of(model: &str, status: Value) -> Pod {
    let mut pod = pod(&format!("p-{model}"), status);
    let labels = pod.metadata.labels.as_mut().unwrap();
    labels.insert(names::MODEL_LABEL.to_owned(), model.to_owned());
    labels.insert(names::REVISION_LABEL.to_owned(), revision(SPEC));
    pod
}

/// The status of a running pod with these conditions.
fn serves(conditions: &[&str], gate: Option<Value>) -> Value {
    let mut status = running(0);
    let conditions = conditions.iter().map(|one| json!({"type": one, "status": "True"}));
    status["conditions"] = conditions.chain(gate).collect();
    status["podIP"] = json!("10.0.0.1");
    status
}

#[tokio::test(start_paused = true)]
async fn a_new_model_costs_eight_requests_until_it_serves() {
    let mut leader = RunningLeader::start();
    leader.deliver([Event::Apply(named("chat", Value::Null))]);
    sleep(SETTLE).await;
    leader.start_pod("chat").await;
    assert_eq!(
        leader.server.requests(),
        [
            "POST serviceaccounts",
            "POST configmaps",
            "POST deployments",
            "POST services",
            "PATCH inferencemodels/chat/status",
            "PATCH inferencemodels/chat/status",
            "PATCH pods/p-chat/status",
            "PATCH inferencemodels/chat/status",
        ]
    );
    assert_eq!(leader.server.0.lock().unwrap().statuses["chat"]["phase"], "Ready");
}

#[tokio::test(start_paused = true)]
async fn the_launch_of_a_model_is_one_status_while_others_wait() {
    let mut leader = RunningLeader::start();
    leader.keep_queue_busy().await;
    leader.deliver([Event::Apply(named("chat", Value::Null))]);
    sleep(SETTLE).await;
    leader.start_pod("chat").await;
    let requests = leader.server.requests();
    assert_eq!(requests.iter().filter(|one| *one == "PATCH inferencemodels/chat/status").count(), 1);
    assert_eq!(requests.len(), 6, "{requests:?}");
    assert_eq!(leader.server.0.lock().unwrap().statuses["chat"]["phase"], "Ready");
}

#[tokio::test(start_paused = true)]
async fn a_cause_of_a_problem_never_waits_for_others() {
    let mut leader = RunningLeader::start();
    leader.keep_queue_busy().await;
    leader.deliver([Event::Apply(named("chat", Value::Null))]);
    sleep(Duration::from_secs(1)).await;
    let waiting = json!({"reason": "ErrImagePull", "message": "no such image"});
    let mut status = running(0);
    status["containerStatuses"][0]["state"] = json!({"waiting": waiting});
    leader.deliver_pod("chat", status);
    sleep(Duration::from_secs(1)).await;
    let stored = leader.server.0.lock().unwrap().statuses["chat"].clone();
    let conditions = stored["conditions"].as_array().unwrap().iter();
    let degraded = conditions.filter(|one| one["type"] == "Degraded").collect::<Vec<_>>();
    assert_eq!((&degraded[0]["status"], &degraded[0]["reason"]), (&json!("True"), &json!("ErrImagePull")));
}

#[tokio::test(start_paused = true)]
async fn models_that_serve_cost_no_request_when_everything_is_listed_again() {
    let mut leader = RunningLeader::start();
    let models: Vec<String> = (0..20).map(|number| format!("m{number}")).collect();
    leader.deliver(models.iter().map(|name| Event::Apply(named(name, Value::Null))));
    sleep(SETTLE).await;
    for name in &models {
        leader.start_pod(name).await;
    }
    sleep(Duration::from_secs(60)).await;
    let before = leader.server.requests().len();
    assert!(before <= 8 * models.len(), "{before} requests");

    // Every watch starts again with a list.
    let (children, statuses) = {
        let recording = leader.server.0.lock().unwrap();
        (recording.children.clone(), recording.statuses.clone())
    };
    for kind in CHILDREN {
        leader.deliver_child(Event::Init, kind.kind);
        for ((_, _), object) in children.iter().filter(|((of, _), _)| of == kind.kind) {
            leader
                .deliver_child(Event::InitApply(serde_json::from_value(object.clone()).unwrap()), kind.kind);
        }
        leader.deliver_child(Event::InitDone, kind.kind);
    }
    let stored = models.iter().map(|name| {
        let mut model = named(name, statuses[name].clone());
        model.metadata.resource_version = Some("200000".to_owned());
        Event::InitApply(model)
    });
    let events: Vec<_> = [Event::Init].into_iter().chain(stored).chain([Event::InitDone]).collect();
    leader.deliver(events);
    // An hour without a change.
    sleep(Duration::from_secs(3600)).await;
    assert_eq!(leader.server.requests()[before..], [] as [String; 0]);
}

#[tokio::test(start_paused = true)]
async fn deployments_of_new_models_come_before_the_rest_of_each() {
    let mut leader = RunningLeader::start();
    leader.deliver((0..12).map(|number| Event::Apply(named(&format!("m{number}"), Value::Null))));
    sleep(Duration::from_secs(5)).await;
    let requests = leader.server.requests();
    let last_deployment = requests.iter().rposition(|one| one == "POST deployments").unwrap();
    let first_service = requests.iter().position(|one| one == "POST services").unwrap();
    assert!(last_deployment < first_service, "{requests:?}");
    assert_eq!(requests.iter().filter(|one| *one == "POST services").count(), 12);
}

#[tokio::test(start_paused = true)]
async fn an_invalid_edit_of_one_model_costs_requests_for_that_model_alone() {
    let mut leader = RunningLeader::start();
    leader.deliver(["a", "b"].map(|name| Event::Apply(named(name, Value::Null))));
    sleep(Duration::from_secs(5)).await;
    let before = leader.server.requests().len();
    let mut invalid = model("{source: {uri: 'ftp://a/b'}}", Value::Null);
    invalid.metadata.name = Some("a".to_owned());
    invalid.metadata.uid = Some("uid-of-a".to_owned());
    leader.deliver([Event::Apply(invalid)]);
    sleep(Duration::from_secs(60)).await;
    let requests = leader.server.requests();
    assert_eq!(requests[before..], ["PATCH inferencemodels/a/status", "POST events"]);
}
