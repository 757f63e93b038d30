//! Scenarios about the status: its causes, its repair, and how often it is written.

use std::collections::HashSet;

use kube::core::DeserializeGuard;
use kube::runtime::watcher::Event;
use serde_json::{Value, json};
use trustformers_control::{hash, names};
use trustformers_crds::Phase;
use trustformers_proto::v1::{ModelState, ModelStatus};

use super::*;
use crate::context::Unreadable;
use crate::{unreadable, watchers};

#[tokio::test]
async fn an_invalid_spec_is_reported_and_waits_for_an_edit() {
    let server = ScriptedServer::expecting([
        Expect::Status { phase: "Failed" },
        Expect::Event { reason: "InvalidSpec" },
    ]);
    let (context, _writers) = context(&server);
    let model = Arc::new(model("{source: {uri: 'ftp://a/b'}}", Value::Null));
    let error = reconcile(Arc::clone(&model), Arc::clone(&context)).await.unwrap_err();
    assert_eq!(error.label(), "Validate/Source");
    assert_eq!(pause(&model, &error, &context), Action::await_change());
    server.is_done();
}

#[tokio::test]
async fn the_pods_of_an_invalid_model_are_still_reported() {
    let server = ScriptedServer::expecting([
        Expect::Status { phase: "Degraded" },
        Expect::Event { reason: "InvalidSpec" },
    ]);
    let (context, mut writers) = context(&server);
    let ready = json!({"conditions": [{"type": "Ready", "status": "True"}]});
    writers.pods.apply_watcher_event(&Event::Apply(pod("p", ready.clone())));
    let model = Arc::new(model("{source: {uri: 'oci://x'}, traffic: {timeout: 900h}}", Value::Null));
    reconcile(Arc::clone(&model), Arc::clone(&context)).await.unwrap_err();
    // All pods are killed.
    writers.pods.apply_watcher_event(&Event::Delete(pod("p", ready)));
    server.expect([Expect::Status { phase: "Failed" }]);
    reconcile(model, context).await.unwrap_err();
    server.is_done();
    let statuses = server.statuses();
    assert_eq!((&statuses[0]["readyReplicas"], &statuses[1]["readyReplicas"]), (&json!(1), &json!(0)));
    assert_eq!(statuses[1]["conditions"][0]["status"], "False");
}

#[tokio::test]
async fn a_failing_api_server_is_no_change_of_the_model() {
    let server = ScriptedServer::expecting([
        Expect::Refuse { kind: "ServiceAccount", code: 500, message: "etcd is slow" },
        Expect::Create { kind: "ConfigMap" },
        Expect::Create { kind: "Deployment" },
    ]);
    let (context, _writers) = context(&server);
    let error = reconcile(Arc::new(model(SPEC, Value::Null)), context).await.unwrap_err();
    assert_eq!(error.label(), "Apply/Request");
    server.is_done();
}

#[tokio::test]
async fn a_pods_report_reaches_the_status_and_an_event() {
    let server = ScriptedServer::expecting(
        create()
            .into_iter()
            .chain([Expect::Status { phase: "Failed" }, Expect::Event { reason: "DigestMismatch" }]),
    );
    let (context, mut writers) = context(&server);
    writers.pods.apply_watcher_event(&Event::Apply(pod("p", running(0))));
    let report = ModelStatus {
        state: ModelState::Failed as i32,
        reason: "DigestMismatch".to_owned(),
        message: "m.gguf has another digest".to_owned(),
        ..Default::default()
    };
    assert!(context.record_report("uid-p", 0, report.clone()));
    assert!(!context.record_report("uid-p", 0, report), "an equal report is no change");
    let model = Arc::new(model(SPEC, Value::Null));
    reconcile(Arc::clone(&model), Arc::clone(&context)).await.unwrap();
    reconcile(Arc::clone(&model), Arc::clone(&context)).await.unwrap();
    server.is_done();

    // The container is killed for its memory and runs again: its old report does not hide that.
    let mut killed = running(1);
    killed["containerStatuses"][0]["lastState"] =
        json!({"terminated": {"exitCode": 137, "reason": "OOMKilled"}});
    writers.pods.apply_watcher_event(&Event::Apply(pod("p", killed)));
    server.expect([Expect::Status { phase: "Failed" }, Expect::Event { reason: "OOMKilled" }]);
    reconcile(model, context).await.unwrap();
    server.is_done();
}

#[tokio::test(start_paused = true)]
async fn the_progress_of_a_load_is_written_every_5_s_at_most() {
    let server = ScriptedServer::expecting(created("Loading"));
    let (context, mut writers) = context(&server);
    let model = Arc::new(model(SPEC, Value::Null));
    let mut loads = pod("p", running(0));
    let revision = hash::revision(&validate(&model).unwrap());
    loads.metadata.labels.as_mut().unwrap().insert(names::REVISION_LABEL.to_owned(), revision);
    writers.pods.apply_watcher_event(&Event::Apply(loads));
    let loading = |loaded_bytes: u64| ModelStatus {
        state: ModelState::Loading as i32,
        loaded_bytes,
        total_bytes: 1000,
        since_unix_ms: 1_800_000_000_000,
        ..Default::default()
    };
    context.record_report("uid-p", 0, loading(1));
    reconcile(Arc::clone(&model), Arc::clone(&context)).await.unwrap();
    // A minute of progress, with ten wake-ups a second.
    let mut writes = 0;
    for tick in 0..600_u64 {
        tokio::time::advance(Duration::from_millis(100)).await;
        context.record_report("uid-p", 0, loading(2 + tick));
        server.0.lock().unwrap().expected = VecDeque::from([Expect::Status { phase: "Loading" }]);
        reconcile(Arc::clone(&model), Arc::clone(&context)).await.unwrap();
        writes += usize::from(server.0.lock().unwrap().expected.is_empty());
    }
    assert_eq!(writes, 12, "one write in 5 s");
    // The load stalls: no request is expected any more.
    server.0.lock().unwrap().expected.clear();
    for _ in 0..100 {
        tokio::time::advance(Duration::from_secs(1)).await;
        reconcile(Arc::clone(&model), Arc::clone(&context)).await.unwrap();
    }
}

/// Delivers a model by the watch.
fn deliver_model(context: &Context, writers: &mut Writers, model: &InferenceModel) {
    let event = Event::Apply(DeserializeGuard(Ok(model.clone())));
    let mut listed = HashSet::new();
    watchers::apply_model_event(context, &mut writers.models, &mut listed, event);
}

#[tokio::test(start_paused = true)]
async fn an_edited_status_is_repaired_and_the_own_write_wakes_nothing() {
    let server = ScriptedServer::default();
    server.expect(created("Pending"));
    let NewContext { context, mut writers, queue } = Context::create(server.client(), settings(), metrics());
    let stored = Arc::new(model(SPEC, Value::Null));
    let key = ("team".to_owned(), "chat".to_owned());
    context.start();
    reconcile(Arc::clone(&stored), Arc::clone(&context)).await.unwrap();

    // The watch delivers the status that the operator wrote.
    let mut echo = model(SPEC, server.statuses()[0].clone());
    echo.metadata.resource_version = Some("7".to_owned());
    deliver_model(&context, &mut writers, &echo);
    assert!(queue.is_empty(), "the operator's own write woke the model");

    // Somebody edits the status.
    let mut edited = echo.clone();
    edited.status.as_mut().unwrap().phase = Some(Phase::Ready);
    edited.status.as_mut().unwrap().ready_replicas = 5;
    edited.metadata.resource_version = Some("8".to_owned());
    deliver_model(&context, &mut writers, &edited);
    assert!(queue.has_waiting(Lane::Status), "an edited status wakes the model");
    assert_eq!(queue.next().await, key);
    queue.finish(&key);
    server.expect([Expect::Status { phase: "Pending" }]);
    reconcile(Arc::new(edited), Arc::clone(&context)).await.unwrap();
    server.is_done();
    assert_eq!(server.statuses()[1], server.statuses()[0]);

    // Somebody edits the spec.
    let mut spec = model(SPEC, server.statuses()[1].clone());
    spec.metadata.generation = Some(3);
    deliver_model(&context, &mut writers, &spec);
    assert!(queue.has_waiting(Lane::Spec), "an edited spec wakes the model");
}

#[tokio::test]
async fn an_undecodable_model_is_reported_and_others_are_followed() {
    let server = ScriptedServer::expecting([
        Expect::Status { phase: "Failed" },
        Expect::Event { reason: "Unreadable" },
    ]);
    let (context, mut writers) = context(&server);
    let newer = json!({"apiVersion": "serving.trustformers.dev/v1alpha1", "kind": "InferenceModel",
        "metadata": {"name": "chat", "namespace": "team", "uid": "u9", "generation": 4},
        "spec": {"source": {"uri": "oci://x"}, "runtime": {"device": "quantum"}}});
    let mut other = model(SPEC, Value::Null);
    other.metadata.name = Some("other".to_owned());
    let list = [newer, serde_json::to_value(&other).unwrap()];
    let mut listed = HashSet::new();
    let mut events = vec![Event::Init];
    events.extend(list.map(|one| Event::InitApply(serde_json::from_value(one).unwrap())));
    events.push(Event::InitDone);
    for event in events {
        watchers::apply_model_event(&context, &mut writers.models, &mut listed, event);
    }
    assert_eq!(context.models.len(), 1, "the other model is followed");
    let unreadable_models = context.unreadable();
    let (key, model): (_, &Unreadable) = unreadable_models.iter().next().unwrap();
    for _ in 0..3 {
        unreadable::report(&context, key, model).await.unwrap();
    }
    server.is_done();
    let status = &server.statuses()[0];
    let message = status["conditions"][3]["message"].as_str().unwrap();
    assert!(message.contains("quantum") && message.contains("upgrade the operator"), "{message}");
}

#[tokio::test]
async fn a_failed_mount_is_the_cause_in_the_status() {
    let server = ScriptedServer::expecting(
        create()
            .into_iter()
            .chain([Expect::Status { phase: "Failed" }, Expect::Event { reason: "FailedMount" }]),
    );
    let (context, mut writers) = context(&server);
    let waiting = json!({"containerStatuses": [{"name": "runtime", "image": "i", "imageID": "", "ready": false,
        "restartCount": 0, "state": {"waiting": {"reason": "ContainerCreating"}}}]});
    writers.pods.apply_watcher_event(&Event::Apply(pod("p", waiting)));
    let event = serde_json::from_value(json!({"metadata": {},
        "involvedObject": {"kind": "Pod", "name": "p", "namespace": "team", "uid": "uid-p"},
        "reason": "FailedMount", "count": 3, "message": "hostPath type check failed: /x is not a directory"}))
    .unwrap();
    watchers::apply_pod_event(&context, &event);
    let model = Arc::new(model(SPEC, Value::Null));
    reconcile(Arc::clone(&model), Arc::clone(&context)).await.unwrap();
    server.is_done();
    let message = server.statuses()[0]["conditions"][3]["message"].clone();
    assert!(message.as_str().unwrap().contains("/x is not a directory"), "{message}");
}
