//! Scenarios about children: creation, drift, ownership and pruning.

use kube::runtime::watcher::Event;
use serde_json::{Value, json};
use trustformers_control::kinds::{
    AUTOSCALER, CONFIG_MAP, DEPLOYMENT, NETWORK_POLICY, SERVICE, SERVICE_ACCOUNT,
};
use trustformers_control::names;

use super::*;
use crate::watchers;

/// What the API server says about a POST of a name that is in use.
const EXISTS: &str = "already exists";

#[tokio::test]
async fn a_new_model_gets_its_objects_in_order_and_a_status() {
    let server = ScriptedServer::default();
    with_new_model(&server).await;
    for object in server.applied("Deployment") {
        assert_eq!(object["metadata"]["ownerReferences"][0]["uid"], "u1");
    }
}

#[tokio::test]
async fn a_reconcile_reads_the_writes_of_the_last_one() {
    let server = ScriptedServer::default();
    let (context, _writers, model) = with_new_model(&server).await;
    // No watch has delivered anything, and the cached model has no status: one more request fails the
    // scenario.
    reconcile(model, context).await.unwrap();
    server.is_done();
}

#[tokio::test]
async fn drift_is_corrected_by_force_and_nothing_else_is_sent() {
    let server = ScriptedServer::default();
    let (context, _writers, model) = with_new_model(&server).await;
    let mut drifted = cached(&context, &DEPLOYMENT);
    drifted["spec"]["replicas"] = json!(7);
    deliver(&context, &DEPLOYMENT, drifted);
    server.expect([Expect::apply("Deployment", true)]);
    reconcile(model, context).await.unwrap();
    server.is_done();
    assert_eq!(server.applied("Deployment")[1]["spec"]["replicas"], 1);
    assert_eq!(server.applied("Deployment")[1]["metadata"]["uid"], format!("uid-of-{}", deployment(SPEC)));
}

#[tokio::test]
async fn what_was_created_is_claimed_before_its_first_correction() {
    let server = ScriptedServer::default();
    let (context, _writers, model) = with_new_model(&server).await;
    // A field of a POST stays when an apply no longer sets it, unless the apply is its manager.
    let managed =
        |operation: &str| json!([{"manager": names::MANAGER, "operation": operation, "fieldsV1": {}}]);
    let mut drifted = cached(&context, &DEPLOYMENT);
    drifted["spec"]["replicas"] = json!(7);
    drifted["metadata"]["managedFields"] = managed("Update");
    deliver(&context, &DEPLOYMENT, drifted.clone());
    let mut claimed = drifted;
    claimed["metadata"]["managedFields"] = managed("Apply");
    claimed["metadata"]["resourceVersion"] = json!("3000");
    server.expect([
        Expect::JsonPatch { kind: "Deployment", patched: claimed },
        Expect::apply("Deployment", true),
    ]);
    reconcile(model, context).await.unwrap();
    server.is_done();
    let patch = server.0.lock().unwrap().requests.iter().rev().nth(1).unwrap().body.clone();
    assert_eq!(
        patch[3],
        json!({"op": "replace", "path": "/metadata/managedFields/0/operation", "value": "Apply"})
    );
}

#[tokio::test]
async fn an_injected_sidecar_is_tolerated() {
    let server = ScriptedServer::default();
    let (context, _writers, model) = with_new_model(&server).await;
    let mut injected = cached(&context, &DEPLOYMENT);
    let containers = injected["spec"]["template"]["spec"]["containers"].as_array_mut().unwrap();
    containers.insert(0, json!({"name": "proxy", "image": "p"}));
    deliver(&context, &DEPLOYMENT, injected);
    reconcile(model, context).await.unwrap();
    server.is_done();
}

/// The Deployment after `kubectl set env deploy/chat A=B`.
fn with_foreign_variable(mut deployment: Value) -> Value {
    deployment["spec"]["template"]["spec"]["containers"][0]["env"] = json!([{"name": "A", "value": "B"}]);
    let container = |fields: Value| json!({"f:spec": {"f:template": {"f:spec": {"f:containers": {"k:{\"name\":\"runtime\"}": fields}}}}});
    deployment["metadata"]["managedFields"] = json!([
        {"manager": names::MANAGER, "operation": "Apply", "fieldsV1": container(json!({"f:image": {}}))},
        {"manager": "kubectl-set", "operation": "Update", "fieldsV1":
            container(json!({"f:env": {".": {}, "k:{\"name\":\"A\"}": {".": {}, "f:name": {}, "f:value": {}}}}))},
    ]);
    deployment
}

#[tokio::test]
async fn a_variable_that_kubectl_set_env_added_is_removed() {
    let server = ScriptedServer::default();
    let (context, _writers, model) = with_new_model(&server).await;
    let before = cached(&context, &DEPLOYMENT);
    deliver(&context, &DEPLOYMENT, with_foreign_variable(before.clone()));
    let mut patched = before;
    patched["metadata"]["resourceVersion"] = json!("5000");
    server.expect([Expect::JsonPatch { kind: "Deployment", patched }]);
    reconcile(Arc::clone(&model), Arc::clone(&context)).await.unwrap();
    reconcile(model, context).await.unwrap();
    server.is_done();
    let patch = server.0.lock().unwrap().requests.last().unwrap().body.clone();
    assert_eq!(patch[1], json!({"op": "remove", "path": "/spec/template/spec/containers/0/env"}));
}

#[tokio::test]
async fn a_variable_that_comes_back_is_removed_one_time_only() {
    let server = ScriptedServer::default();
    let (context, _writers, model) = with_new_model(&server).await;
    let changed = with_foreign_variable(cached(&context, &DEPLOYMENT));
    deliver(&context, &DEPLOYMENT, changed.clone());
    // An admission webhook adds the variable to the response again.
    let mut patched = changed;
    patched["metadata"]["resourceVersion"] = json!("5000");
    server.expect([Expect::JsonPatch { kind: "Deployment", patched }]);
    for _ in 0..3 {
        reconcile(Arc::clone(&model), Arc::clone(&context)).await.unwrap();
    }
    server.is_done();
}

#[tokio::test]
async fn a_relabelled_child_is_repaired() {
    let server = ScriptedServer::default();
    let (context, _writers, model) = with_new_model(&server).await;
    // `kubectl label service chat app.kubernetes.io/managed-by=x --overwrite`: the watch reports it as
    // deleted.
    let mut relabelled = cached(&context, &SERVICE);
    let gone: StoredObject = serde_json::from_value(relabelled.clone()).unwrap();
    watchers::apply_child_event(&context, &SERVICE, Event::Delete(gone));
    relabelled["metadata"]["labels"][names::MANAGED_BY] = json!("x");
    server.expect([
        Expect::Refuse { kind: "Service", code: 409, message: EXISTS },
        Expect::Get { kind: "Service", found: Some(relabelled) },
        Expect::apply("Service", true),
    ]);
    reconcile(model, context).await.unwrap();
    server.is_done();
}

#[tokio::test]
async fn a_relabelled_account_is_repaired() {
    let server = ScriptedServer::default();
    let (context, _writers, model) = with_new_model(&server).await;
    let kind = &SERVICE_ACCOUNT;
    let child = context.children.get(kind, "team", "chat-pod").unwrap();
    context.children.remove(&child);
    let mut relabelled = child.object();
    relabelled["metadata"]["labels"][names::MANAGED_BY] = json!("x");
    server.expect([
        Expect::Refuse { kind: "ServiceAccount", code: 409, message: EXISTS },
        Expect::Get { kind: "ServiceAccount", found: Some(relabelled) },
        Expect::apply("ServiceAccount", true),
    ]);
    reconcile(model, context).await.unwrap();
    server.is_done();
}

#[tokio::test]
async fn an_object_of_another_owner_is_never_taken_over() {
    let other = json!({"metadata": {"name": "chat", "namespace": "team", "uid": "s", "resourceVersion": "3",
        "managedFields": [{"manager": "kubectl", "operation": "Update"}]}});
    let server = ScriptedServer::expecting([
        Expect::Create { kind: "ServiceAccount" },
        Expect::Create { kind: "ConfigMap" },
        Expect::Create { kind: "Deployment" },
        Expect::Refuse { kind: "Service", code: 409, message: EXISTS },
        Expect::Get { kind: "Service", found: Some(other) },
        Expect::Status { phase: "Failed" },
        Expect::Event { reason: "NameTaken" },
    ]);
    let (context, _writers) = context(&server);
    let model = Arc::new(model(SPEC, Value::Null));
    let error = reconcile(Arc::clone(&model), Arc::clone(&context)).await.unwrap_err();
    assert_eq!(error.label(), "Apply/NotOurs");
    assert!(error.to_string().contains("Service chat exists"), "{error}");
    assert_eq!(pause(&model, &error, &context), Action::requeue(Duration::from_secs(1)));
    assert_eq!(pause(&model, &error, &context), Action::requeue(Duration::from_secs(2)));
    server.is_done();
}

#[tokio::test]
async fn an_account_of_another_owner_is_never_taken_over() {
    let account = json!({"metadata": {"name": "chat-pod", "namespace": "team", "uid": "a", "resourceVersion": "3",
        "managedFields": [{"manager": "kubectl-create", "operation": "Update"}]}});
    let server = ScriptedServer::expecting([
        Expect::Refuse { kind: "ServiceAccount", code: 409, message: EXISTS },
        Expect::Create { kind: "ConfigMap" },
        Expect::Create { kind: "Deployment" },
        Expect::Get { kind: "ServiceAccount", found: Some(account) },
        Expect::Status { phase: "Failed" },
        Expect::Event { reason: "NameTaken" },
    ]);
    let (context, _writers) = context(&server);
    let error = reconcile(Arc::new(model(SPEC, Value::Null)), context).await.unwrap_err();
    assert!(error.to_string().contains("kubectl-create wrote to it"), "{error}");
    server.is_done();
}

#[tokio::test]
async fn children_of_a_deleted_model_of_the_name_are_waited_for() {
    let server = ScriptedServer::default();
    let (context, _writers, _model) = with_new_model(&server).await;
    // The model is created again before the children of the first one are deleted.
    let mut again = model(SPEC, Value::Null);
    again.metadata.uid = Some("u2".to_owned());
    server.expect([]);
    let error = reconcile(Arc::new(again), context).await.unwrap_err();
    assert_eq!(error.label(), "Apply/NotDeletedYet");
    server.is_done();
}

/// Names of the ConfigMaps in the cache, the oldest first.
fn config_maps(context: &Context) -> Vec<String> {
    let children = context.children.of_owner("u1");
    let mut maps: Vec<_> = children.iter().filter(|one| one.kind == &CONFIG_MAP).collect();
    maps.sort_by_key(|one| one.version.parse::<u64>().unwrap());
    maps.iter().map(|one| one.name.clone()).collect()
}

#[tokio::test]
async fn a_configuration_of_a_pool_that_is_gone_is_deleted_when_no_pod_has_it_mounted() {
    let server = ScriptedServer::default();
    let (context, mut writers, model) = with_new_model(&server).await;
    let mut old = cached(&context, &CONFIG_MAP);
    old["metadata"]["name"] = json!("chat-pod-gone");
    old["metadata"]["uid"] = json!("uid-of-gone");
    old["metadata"]["labels"][names::REVISION_LABEL] = json!("gone");
    deliver(&context, &CONFIG_MAP, old);
    let mut complete = cached(&context, &DEPLOYMENT);
    complete["status"] = json!({"replicas": 1, "updatedReplicas": 1});
    deliver(&context, &DEPLOYMENT, complete);
    // A pod that is being deleted has it mounted: it stays.
    let mut ending = pod("p", json!({}));
    ending.metadata.deletion_timestamp = Some(serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap());
    ending.spec = serde_json::from_value(json!({"containers": [],
        "volumes": [{"name": "config", "configMap": {"name": "chat-pod-gone"}}]}))
    .unwrap();
    writers.pods.apply_watcher_event(&Event::Apply(ending.clone()));
    reconcile(Arc::clone(&model), Arc::clone(&context)).await.unwrap();
    server.is_done();

    // A pod that was evicted does not need it.
    ending.status = serde_json::from_value(json!({"phase": "Failed", "reason": "Evicted"})).unwrap();
    writers.pods.apply_watcher_event(&Event::Apply(ending));
    server.expect([Expect::Delete { name: "chat-pod-gone".to_owned() }]);
    reconcile(model, context).await.unwrap();
    server.is_done();
}

#[tokio::test]
async fn a_change_of_the_pod_changes_the_configuration_of_its_pool_and_makes_no_other() {
    let server = ScriptedServer::default();
    let (context, _writers, _model) = with_new_model(&server).await;
    let before = config_maps(&context);
    for edit in 2..5 {
        let spec = format!("{{source: {{uri: 'oci://localhost/m:1'}}, traffic: {{drainTimeout: {edit}s}}}}");
        server.expect([
            Expect::apply("ConfigMap", true),
            Expect::apply("Deployment", true),
            Expect::Status { phase: "Pending" },
        ]);
        reconcile(Arc::new(model(&spec, Value::Null)), Arc::clone(&context)).await.unwrap();
        server.is_done();
        assert_eq!(config_maps(&context), before);
    }
}

#[tokio::test]
async fn a_model_that_is_being_deleted_is_not_reconciled() {
    let server = ScriptedServer::expecting([]);
    let (context, _writers) = context(&server);
    let mut model = model(SPEC, Value::Null);
    model.metadata.deletion_timestamp = Some(serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap());
    reconcile(Arc::new(model), context).await.unwrap();
    server.is_done();
}

/// A model with an autoscaler and a NetworkPolicy.
fn scaled(replicas: u32) -> String {
    format!(
        "{{source: {{uri: 'oci://localhost/m:1'}}, runtime: {{resources: {{requests: {{cpu: 1}}}}}}, \
         scaling: {{replicas: {replicas}, maxReplicas: 3, metrics: [{{cpu: 70}}]}}, networkPolicy: {{enabled: true}}}}"
    )
}

async fn with_scaled_model(server: &ScriptedServer) -> (Arc<Context>, Writers, Arc<InferenceModel>) {
    let kinds =
        ["ServiceAccount", "ConfigMap", "NetworkPolicy", "Deployment", "Service", "HorizontalPodAutoscaler"];
    server.expect(kinds.map(|kind| Expect::Create { kind }));
    server.expect([Expect::Status { phase: "Pending" }]);
    let (context, writers) = context(server);
    let model = Arc::new(model(&scaled(1), Value::Null));
    reconcile(Arc::clone(&model), Arc::clone(&context)).await.unwrap();
    server.is_done();
    (context, writers, model)
}

#[tokio::test]
async fn replicas_that_an_autoscaler_writes_are_honoured_and_it_ends_with_its_metrics() {
    let server = ScriptedServer::default();
    let (context, _writers, _model) = with_scaled_model(&server).await;
    // It writes by /scale: the spec has another number.
    server.expect([
        Expect::apply("Deployment", true),
        Expect::Create { kind: "PodDisruptionBudget" },
        Expect::Status { phase: "Pending" },
    ]);
    reconcile(Arc::new(model(&scaled(3), Value::Null)), Arc::clone(&context)).await.unwrap();
    server.is_done();
    assert_eq!(server.applied("Deployment").last().unwrap()["spec"]["replicas"], 3);
    assert_eq!(server.applied("HorizontalPodAutoscaler").len(), 1, "it is written one time");

    let fixed = "{source: {uri: 'oci://localhost/m:1'}, runtime: {resources: {requests: {cpu: 1}}}, scaling: {replicas: 3}}";
    let delete = || Expect::Delete { name: "chat".to_owned() };
    server.expect([delete(), delete(), Expect::Status { phase: "Pending" }]);
    reconcile(Arc::new(model(fixed, Value::Null)), Arc::clone(&context)).await.unwrap();
    server.is_done();
    let remaining = context.children.of_owner("u1");
    let is_gone = |kind| remaining.iter().all(|child| child.kind != kind);
    assert!(is_gone(&AUTOSCALER) && is_gone(&NETWORK_POLICY));
}

#[tokio::test]
async fn an_edited_autoscaler_and_an_opened_policy_are_corrected() {
    let server = ScriptedServer::default();
    let (context, _writers, model) = with_scaled_model(&server).await;
    let mut edited = cached(&context, &AUTOSCALER);
    edited["spec"]["maxReplicas"] = json!(9);
    deliver(&context, &AUTOSCALER, edited);
    let mut opened = cached(&context, &NETWORK_POLICY);
    opened["spec"]["ingress"].as_array_mut().unwrap().push(json!({}));
    deliver(&context, &NETWORK_POLICY, opened);
    server.expect([Expect::apply("NetworkPolicy", true), Expect::apply("HorizontalPodAutoscaler", true)]);
    reconcile(model, context).await.unwrap();
    server.is_done();
}

#[tokio::test]
async fn what_an_autoscaler_reports_is_in_the_status() {
    let server = ScriptedServer::default();
    let (context, _writers, model) = with_scaled_model(&server).await;
    let mut reported = cached(&context, &AUTOSCALER);
    reported["status"] = json!({"conditions": [{"type": "ScalingActive", "status": "False",
        "reason": "FailedGetContainerResourceMetric", "message": "no metrics"}]});
    deliver(&context, &AUTOSCALER, reported);
    // While the model starts, another reason waits for more news.
    tokio::time::pause();
    reconcile(Arc::clone(&model), Arc::clone(&context)).await.unwrap();
    tokio::time::advance(status::LAUNCH_WAIT).await;
    server.expect([Expect::Status { phase: "Pending" }]);
    reconcile(model, context).await.unwrap();
    server.is_done();
    let conditions = server.statuses().pop().unwrap()["conditions"].clone();
    let autoscaled = conditions.as_array().unwrap().iter().find(|one| one["type"] == "Autoscaled").unwrap();
    assert_eq!(autoscaled["reason"], "FailedGetContainerResourceMetric");
}
