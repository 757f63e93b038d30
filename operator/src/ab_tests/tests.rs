//! Tests with a mock API server: what a look requests, and what it does not.

use std::sync::Mutex;

use http::{Method, StatusCode};
use kube::runtime::watcher::Event;
use serde_json::Value;
use trustformers_control::ab_test::assign::{RoutedTest, with_tests};
use trustformers_crds::ABTestPhase;
use trustformers_proto::control::v1::{UserBucketCounts, VariantCounts};

use super::*;
use crate::context::tests::{metrics, settings};
use crate::context::{NewContext, Writers};
use crate::testing::{MockRequest, mock_client};

/// Writes the status of a test.
pub(crate) async fn write_one(context: &Context) {
    let test = stored(1, Value::Null);
    let after = ABTestStatus { samples: 1, ..ABTestStatus::default() };
    let mut memory = TestMemory::default();
    write_status(context, &test, &ABTestStatus::default(), after, &mut memory).await.unwrap();
}

/// A stored test with this status.
fn stored(version: u64, status: Value) -> ABTest {
    let mut object = json!({
        "apiVersion": "serving.trustformers.dev/v1alpha1",
        "kind": "ABTest",
        "metadata": {"name": "t", "namespace": "team", "uid": "u1", "generation": 1,
                     "resourceVersion": version.to_string(), "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {
            "route": "chat",
            "variants": [
                {"name": "control", "modelRef": {"name": "a"}, "weight": 90},
                {"name": "treatment", "modelRef": {"name": "b"}, "weight": 10},
            ],
            "goal": {"metric": "errorRate", "direction": "Lower"},
        },
    });
    if !status.is_null() {
        object["status"] = status;
    }
    serde_json::from_value(object).unwrap()
}

fn model(name: &str) -> trustformers_crds::InferenceModel {
    let object = json!({
        "apiVersion": "serving.trustformers.dev/v1alpha1", "kind": "InferenceModel",
        "metadata": {"name": name, "namespace": "team", "uid": format!("uid-{name}")},
        "spec": {"source": {"uri": "oci://x"}},
    });
    serde_json::from_value(object).unwrap()
}

fn pod(model: &str) -> k8s_openapi::api::core::v1::Pod {
    let object = json!({
        "metadata": {"name": format!("{model}-0"), "namespace": "team", "uid": format!("pod-{model}"),
            "labels": {"serving.trustformers.dev/model": model, "serving.trustformers.dev/revision": "r1",
                       "app.kubernetes.io/managed-by": "trustformers-operator"}},
        "spec": {"containers": [{"name": "runtime"}]},
        "status": {"podIP": "10.0.0.1", "phase": "Running",
            "conditions": [{"type": "Ready", "status": "True"}, {"type": "ContainersReady", "status": "True"}],
            "containerStatuses": [{"name": "runtime", "ready": true, "restartCount": 0, "image": "i",
                "imageID": "i", "state": {"running": {}}}]},
    });
    serde_json::from_value(object).unwrap()
}

/// An API server that stores the ConfigMap of a test, and the requests that it got.
#[derive(Clone, Default)]
struct Server {
    requests: Arc<Mutex<Vec<MockRequest>>>,
    map: Arc<Mutex<Option<Value>>>,
}

impl Server {
    fn answer(&self, request: MockRequest) -> (StatusCode, Value) {
        self.requests.lock().unwrap().push(request.clone());
        let path = request.uri.path();
        let is_map = path.contains("/configmaps/");
        if request.method == Method::GET {
            assert!(is_map, "{request:?}");
            let missing = json!({"kind": "Status", "status": "Failure", "code": 404, "reason": "NotFound", "message": ""});
            return match self.map.lock().unwrap().clone() {
                Some(map) => (StatusCode::OK, map),
                None => (StatusCode::NOT_FOUND, missing),
            };
        }
        let mut object = request.body;
        if is_map {
            *self.map.lock().unwrap() = Some(object.clone());
        }
        object["metadata"]["resourceVersion"] = json!("9");
        (StatusCode::OK, object)
    }

    /// What was requested since the last call, in words.
    fn requested(&self) -> Vec<String> {
        let requests = std::mem::take(&mut *self.requests.lock().unwrap());
        let word = |request: &MockRequest| {
            let path = request.uri.path().rsplit("/namespaces/team/").next().unwrap().to_owned();
            match request.body["reason"].as_str() {
                Some(reason) => format!("{} {path} {reason}", request.method),
                None => format!("{} {path}", request.method),
            }
        };
        requests.iter().map(word).collect()
    }

    fn context(&self) -> (Arc<Context>, Writers) {
        let server = self.clone();
        let client = mock_client(move |request| server.answer(request));
        let NewContext { context, mut writers, queue: _ } = Context::create(client, settings(), metrics());
        for name in ["a", "b"] {
            writers.models.apply_watcher_event(&Event::Apply(model(name)));
            writers.pods.apply_watcher_event(&Event::Apply(pod(name)));
        }
        (context, writers)
    }
}

/// The last status that was written.
fn written(memories: &HashMap<ModelKey, TestMemory>) -> ABTestStatus {
    memories[&("team".to_owned(), "t".to_owned())].written.clone().unwrap().0
}

fn counts(epoch: i64, requests: u64) -> VariantCounts {
    VariantCounts {
        test: "u1".to_owned(),
        epoch: u64::try_from(epoch).unwrap(),
        variant: "control".to_owned(),
        buckets: vec![UserBucketCounts { bucket: 3, requests, ..UserBucketCounts::default() }],
        users: vec![5],
        ..VariantCounts::default()
    }
}

#[tokio::test(start_paused = true)]
async fn a_test_begins_counts_and_survives_another_operator() {
    let server = Server::default();
    let (context, mut writers) = server.context();
    writers.ab_tests.apply_watcher_event(&Event::Apply(stored(1, Value::Null)));
    let mut memories = HashMap::new();
    look_at_all(&context, &mut memories).await;
    assert_eq!(
        server.requested(),
        ["GET configmaps/t.abtest-samples", "PATCH abtests/t/status", "POST events Started"]
    );
    let first = written(&memories);
    assert_eq!(first.phase, Some(ABTestPhase::Running));

    // The cache shows it. A checkpoint without counts writes the figures, and then nothing more.
    let status = serde_json::to_value(&first).unwrap();
    writers.ab_tests.apply_watcher_event(&Event::Apply(stored(9, status)));
    let epoch = first.epochs[0].epoch;
    context.samples.record("gateway", &[counts(epoch, 7)]);
    look_at_all(&context, &mut memories).await;
    assert_eq!(
        server.requested(),
        ["GET configmaps/t.abtest-samples", "PATCH configmaps/t.abtest-samples", "PATCH abtests/t/status"]
    );
    let counted = written(&memories);
    assert_eq!((counted.variants[0].requests, counted.variants[0].users), (7, 1));
    let map = server.map.lock().unwrap().clone().unwrap();
    assert_eq!(map["metadata"]["ownerReferences"][0]["uid"], "u1");

    // The cache shows that, too: a look within the half minute makes no request.
    writers.ab_tests.apply_watcher_event(&Event::Apply(stored(10, serde_json::to_value(&counted).unwrap())));
    let wait = look_at_all(&context, &mut memories).await;
    assert!(wait <= CHECKPOINT_INTERVAL, "{wait:?}");
    assert_eq!(server.requested(), Vec::<String>::new());

    // Another operator, whose gateway ended meanwhile.
    let (context, mut writers) = server.context();
    writers.ab_tests.apply_watcher_event(&Event::Apply(stored(10, serde_json::to_value(&counted).unwrap())));
    context.samples.record("other", &[counts(epoch, 2)]);
    let mut memories = HashMap::new();
    look_at_all(&context, &mut memories).await;
    assert_eq!(written(&memories).variants[0].requests, 9);
}

#[tokio::test(start_paused = true)]
async fn a_config_map_of_somebody_else_is_not_taken_over() {
    let server = Server::default();
    *server.map.lock().unwrap() = Some(json!({"metadata": {"name": "t.abtest-samples", "uid": "x"}}));
    let (context, mut writers) = server.context();
    writers.ab_tests.apply_watcher_event(&Event::Apply(stored(1, Value::Null)));
    let mut memories = HashMap::new();
    look_at_all(&context, &mut memories).await;
    let status = written(&memories);
    writers.ab_tests.apply_watcher_event(&Event::Apply(stored(9, serde_json::to_value(&status).unwrap())));
    context.samples.record("gateway", &[counts(status.epochs[0].epoch, 7)]);
    server.requested();
    look_at_all(&context, &mut memories).await;
    let requested = server.requested();
    assert!(!requested.iter().any(|one| one.starts_with("PATCH configmaps")), "{requested:?}");
    let condition =
        written(&memories).conditions.into_iter().find(|one| one.type_ == "SamplesStored").unwrap();
    assert!(condition.status == "False" && condition.message.contains("delete it"), "{condition:?}");
}

#[tokio::test(start_paused = true)]
async fn a_conflict_is_a_condition_and_an_event_and_the_route_is_published_once_it_is_gone() {
    let server = Server::default();
    let (context, mut writers) = server.context();
    writers.models.apply_watcher_event(&Event::Apply(model("chat")));
    writers.ab_tests.apply_watcher_event(&Event::Apply(stored(1, Value::Null)));
    let mut memories = HashMap::new();
    look_at_all(&context, &mut memories).await;
    let requested = server.requested();
    assert_eq!(requested[1..], ["PATCH abtests/t/status", "POST events RouteIsModel"]);
    assert_eq!(written(&memories).phase, Some(ABTestPhase::Pending));
    writers.models.apply_watcher_event(&Event::Delete(model("chat")));
    look_at_all(&context, &mut memories).await;
    let status = written(&memories);
    assert_eq!(status.phase, Some(ABTestPhase::Running));
    writers.ab_tests.apply_watcher_event(&Event::Apply(stored(9, serde_json::to_value(&status).unwrap())));
    let tests: Vec<_> = context.ab_tests.state().iter().filter_map(|test| RoutedTest::of(test)).collect();
    let models = ["a", "b"].map(|name| ("team".to_owned(), name.to_owned()));
    let models = models.iter().filter_map(|key| publish::model_route(&context, key)).collect();
    let routes = with_tests(models, &tests);
    let route = routes.iter().find(|route| route.name == "team/chat").unwrap();
    assert_eq!(route.backends.len(), 2);
}
