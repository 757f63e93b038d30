//! What the control plane needs of a pod, read from the stored object.

use k8s_openapi::api::core::v1::{Pod, PodCondition};
use k8s_openapi::jiff::Timestamp;

use crate::causes::{self, Cause};
use crate::names;

/// One pod of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodView {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// Its model.
    pub model: String,
    /// The revision that it loads.
    pub revision: String,
    /// Its address, if it has one.
    pub address: Option<String>,
    /// Its capacity relative to the other pods of its model.
    pub weight: u32,
    /// How often kubelet restarted its container.
    pub restarts: u32,
    /// Whether its container runs, ready or not.
    pub running: bool,
    /// Whether its containers are ready. The runtime passes its readiness probe only after its warm-up.
    pub containers_ready: bool,
    /// Whether Kubernetes counts it as ready: containers and readiness gate.
    pub ready: bool,
    /// Since when no node takes it.
    pub unschedulable_since: Option<Timestamp>,
    /// Whether it is being deleted.
    pub deleting: bool,
    /// Whether it ended and does not run again.
    pub ended: bool,
    /// The node that it runs on, once it has one.
    pub node: Option<String>,
    /// Whether that node is ready. The conditions of a pod are those that its kubelet wrote last: of a node
    /// that is lost they say nothing.
    pub node_ready: bool,
    /// Its readiness gate, as stored.
    pub gate: Option<StoredGate>,
    /// Why it does not serve, from kubelet and the scheduler.
    pub cause: Option<Cause>,
}

/// The readiness gate of a pod as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredGate {
    /// Whether it is true.
    pub open: bool,
    /// The container's restart count when it was opened.
    pub restarts: Option<u32>,
}

impl PodView {
    /// Reads a pod; `None` if it does not belong to a model.
    #[must_use]
    pub fn of(pod: &Pod) -> Option<Self> {
        let label = |key: &str| pod.metadata.labels.as_ref()?.get(key).cloned();
        let status = pod.status.as_ref();
        let phase = status.and_then(|status| status.phase.as_deref()).unwrap_or_default();
        Some(Self {
            namespace: pod.metadata.namespace.clone()?,
            name: pod.metadata.name.clone()?,
            uid: pod.metadata.uid.clone()?,
            model: label(names::MODEL_LABEL)?,
            revision: label(names::REVISION_LABEL)?,
            address: status.and_then(|status| status.pod_ip.clone()).filter(|ip| !ip.is_empty()),
            weight: weight(pod),
            restarts: causes::restarts(pod),
            running: causes::runs(pod),
            containers_ready: is_true(pod, "ContainersReady"),
            ready: is_true(pod, "Ready"),
            unschedulable_since: condition(pod, "PodScheduled")
                .filter(|one| one.status == "False" && one.reason.as_deref() != Some("SchedulingGated"))
                .and_then(|one| one.last_transition_time.as_ref().map(|time| time.0)),
            deleting: pod.metadata.deletion_timestamp.is_some(),
            ended: matches!(phase, "Succeeded" | "Failed"),
            node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
            node_ready: true,
            gate: condition(pod, names::ROUTABLE_GATE).map(|gate| StoredGate {
                open: gate.status == "True",
                restarts: acknowledged_restarts(gate),
            }),
            cause: causes::of_pod(pod),
        })
    }

    /// Whether gateways may send requests to it. `Ready` is not required: it depends on the gateways.
    #[must_use]
    pub fn routable(&self) -> bool {
        self.containers_ready && self.node_ready && !self.deleting && !self.ended && self.address.is_some()
    }

    /// The pod on a node that is not ready.
    #[must_use]
    pub fn on_lost_node(self) -> Self {
        let message = format!(
            "node {} of pod {} is not ready, so the pod gets no requests; check the node, or delete the pod",
            self.node.as_deref().unwrap_or_default(),
            self.name
        );
        let lost = Cause { reason: "NodeNotReady".to_owned(), message };
        Self { node_ready: false, cause: self.cause.or(Some(lost)), ..self }
    }

    /// Whether it counts as one of the model's pods.
    #[must_use]
    pub fn counts(&self) -> bool {
        !self.deleting && !self.ended
    }
}

/// Message of an open gate. `acknowledged_restarts` reads the number back, so that a new leader knows which
/// start of the container the gate was opened for.
#[must_use]
pub fn open_message(restarts: u32) -> String {
    format!("every gateway has this pod in its table; restarts of the container: {restarts}")
}

fn acknowledged_restarts(gate: &PodCondition) -> Option<u32> {
    gate.message.as_deref()?.rsplit_once(": ")?.1.parse().ok()
}

/// The weight that the pod's annotation says; 1 where it says nothing that can be read.
fn weight(pod: &Pod) -> u32 {
    let annotation = pod.metadata.annotations.as_ref().and_then(|all| all.get(names::WEIGHT_ANNOTATION));
    let weight = annotation.and_then(|weight| weight.parse().ok());
    weight.filter(|weight| (1..=1000).contains(weight)).unwrap_or(1)
}

fn condition<'a>(pod: &'a Pod, kind: &str) -> Option<&'a PodCondition> {
    pod.status.as_ref()?.conditions.as_ref()?.iter().find(|one| one.type_ == kind)
}

fn is_true(pod: &Pod, kind: &str) -> bool {
    condition(pod, kind).is_some_and(|one| one.status == "True")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A serving pod: its containers are ready, its gate is not set.
    pub(crate) fn view(model: &str, name: &str) -> PodView {
        PodView {
            namespace: "team".to_owned(),
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            model: model.to_owned(),
            revision: "r1".to_owned(),
            address: Some("10.0.0.1".to_owned()),
            weight: 1,
            restarts: 0,
            running: true,
            containers_ready: true,
            ready: true,
            unschedulable_since: None,
            deleting: false,
            ended: false,
            node: None,
            node_ready: true,
            gate: None,
            cause: None,
        }
    }

    fn read(status: &str) -> PodView {
        let text = format!(
            "metadata: {{name: p, namespace: team, uid: u, labels: {{serving.trustformers.dev/model: chat, serving.trustformers.dev/revision: r}}}}\nstatus: {status}\n"
        );
        PodView::of(&serde_yaml::from_str(&text).unwrap()).unwrap()
    }

    #[test]
    fn routable_needs_ready_containers_but_not_pod_readiness() {
        let pod = read(
            "{podIP: 10.0.0.1, conditions: [{type: ContainersReady, status: 'True'}, {type: Ready, status: 'False'}]}",
        );
        assert!(pod.routable() && !pod.ready);
        assert!(!read("{podIP: 10.0.0.1, conditions: [{type: Ready, status: 'True'}]}").routable());
        assert!(!read("{conditions: [{type: ContainersReady, status: 'True'}]}").routable());
        assert!(!PodView { deleting: true, ..pod.clone() }.routable());
        let lost = PodView { node: Some("n1".to_owned()), ..pod }.on_lost_node();
        assert!(!lost.routable() && lost.cause.unwrap().message.contains("node n1 of pod p is not ready"));
    }

    #[test]
    fn the_gates_message_is_read_back() {
        let gate = |message: &str| {
            read(&format!(
                "{{conditions: [{{type: serving.trustformers.dev/routable, status: 'True', message: '{message}'}}]}}"
            ))
            .gate
        };
        assert_eq!(gate(&open_message(3)), Some(StoredGate { open: true, restarts: Some(3) }));
        assert_eq!(gate("words"), Some(StoredGate { open: true, restarts: None }));
    }

    #[test]
    fn the_weight_is_a_number_in_an_annotation() {
        let weight_of = |text: &str| {
            let pod = format!("metadata: {{annotations: {{serving.trustformers.dev/weight: '{text}'}}}}");
            weight(&serde_yaml::from_str(&pod).unwrap())
        };
        assert_eq!(["3", "1000", "0", "1001", "much"].map(weight_of), [3, 1000, 1, 1, 1]);
    }

    #[test]
    fn a_pod_without_our_labels_is_ignored() {
        let pod: Pod = serde_yaml::from_str("metadata: {name: p, namespace: n, uid: u}").unwrap();
        assert_eq!(PodView::of(&pod), None);
    }
}
