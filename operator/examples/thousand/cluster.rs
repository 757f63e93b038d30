//! What Kubernetes' own controllers, a scheduler and a kubelet do for a Deployment of one pod, with the
//! writes that each of them makes.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::sleep;

use crate::api_server::{LoopbackServer, add_entry, entry, text};

const NODE: &str = "n1";
/// Nothing listens there: it is a loopback address, so an attempt to connect is refused at once.
const POD_ADDRESS: &str = "127.77.0.1";
/// The one pod of a Deployment has its name with this behind it.
const POD_SUFFIX: &str = "-0";
/// From one write to the next.
const STEP: Duration = Duration::from_millis(20);
const NOW: &str = "2026-01-01T00:00:00Z";

/// The node that all pods run on.
pub(crate) fn add_node(server: &LoopbackServer) {
    let ready = json!([{"type": "Ready", "status": "True"}]);
    server.put("nodes", json!({"metadata": {"name": NODE}, "status": {"conditions": ready}}));
}

/// Makes the pod of a Deployment and lets it run. It is ready once its readiness gates are open.
pub(crate) async fn start_pod(server: LoopbackServer, deployment: Value) {
    let (namespace, name) =
        (text(&deployment["metadata"]["namespace"]), text(&deployment["metadata"]["name"]));
    sleep(STEP).await;
    set_deployment(
        &server,
        &namespace,
        &name,
        &json!({"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "unavailableReplicas": 1}),
    );
    let template = &deployment["spec"]["template"];
    let pod_name = format!("{name}{POD_SUFFIX}");
    let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": template["metadata"], "spec": template["spec"],
        "status": {"phase": "Pending"}});
    pod["metadata"]["namespace"] = json!(namespace);
    pod["metadata"]["name"] = json!(pod_name);
    add_entry(&mut pod, entry("kube-controller-manager", "", &json!({"spec": template["spec"]})));
    server.put("pods", pod);
    sleep(STEP).await;
    server.change("pods", &namespace, &pod_name, |pod| {
        pod["spec"]["nodeName"] = json!(NODE);
        merge_conditions(pod, &json!([condition("PodScheduled", "True")]));
    });
    sleep(STEP).await;
    server.change("pods", &namespace, &pod_name, |pod| {
        let container = &pod["spec"]["containers"][0];
        let running = json!([{"name": container["name"], "image": container["image"], "imageID": "", "ready": true,
            "restartCount": 0, "state": {"running": {"startedAt": NOW}}}]);
        pod["status"]["phase"] = json!("Running");
        pod["status"]["podIP"] = json!(POD_ADDRESS);
        pod["status"]["containerStatuses"] = running;
        let conditions = [condition("Initialized", "True"), condition("ContainersReady", "True"), condition("Ready", "False")];
        merge_conditions(pod, &json!(conditions));
        let status = json!({"status": pod["status"]});
        add_entry(pod, entry("kubelet", "status", &status));
    });
}

/// Says of the Deployment of a pod that has become ready that it is available.
pub(crate) async fn complete_deployment(server: LoopbackServer, pod: Value) {
    let (namespace, pod_name) = (text(&pod["metadata"]["namespace"]), text(&pod["metadata"]["name"]));
    let name = pod_name.strip_suffix(POD_SUFFIX).unwrap_or(&pod_name);
    sleep(STEP).await;
    set_deployment(
        &server,
        &namespace,
        name,
        &json!({"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "readyReplicas": 1,
        "availableReplicas": 1}),
    );
}

fn set_deployment(server: &LoopbackServer, namespace: &str, name: &str, status: &Value) {
    server.change("deployments", namespace, name, |deployment| {
        deployment["status"] = status.clone();
        add_entry(deployment, entry("kube-controller-manager", "status", &json!({"status": status})));
    });
}

fn condition(kind: &str, status: &str) -> Value {
    json!({"type": kind, "status": status, "lastTransitionTime": NOW, "lastProbeTime": null})
}

/// Whether the condition `Ready` of an object is true.
pub(crate) fn is_ready(object: &Value) -> bool {
    is_true(object, "Ready")
}

fn is_true(object: &Value, kind: &str) -> bool {
    let conditions = object["status"]["conditions"].as_array();
    conditions.into_iter().flatten().any(|one| one["type"] == kind && one["status"] == "True")
}

/// Replaces the conditions of the same types.
pub(crate) fn merge_conditions(object: &mut Value, conditions: &Value) {
    let mut merged = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
    for condition in conditions.as_array().into_iter().flatten() {
        merged.retain(|one| one["type"] != condition["type"]);
        merged.push(condition.clone());
    }
    object["status"]["conditions"] = json!(merged);
}

/// As kubelet: a pod is ready when its readiness gates are open.
pub(crate) fn follow_gate(pod: &mut Value) {
    let gates = pod["spec"]["readinessGates"].as_array().cloned().unwrap_or_default();
    let is_open =
        gates.iter().all(|gate| gate["conditionType"].as_str().is_some_and(|kind| is_true(pod, kind)));
    let status = if is_open { "True" } else { "False" };
    merge_conditions(pod, &json!([condition("Ready", status)]));
}
