//! Tests of the status, from pods and reports written by hand.

use super::*;
use crate::pods::tests::view;
use crate::rollout::state::{Decision, Member};
use crate::validate::tests::valid;
use trustformers_crds::StableRevision;

const NOW: i64 = 1_800_000_000;

fn deployment(replicas: i32, updated: i32) -> Deployment {
    serde_yaml::from_str(&format!(
        "metadata: {{name: chat, generation: 2}}\nspec: {{selector: {{}}, template: {{}}}}\nstatus: {{observedGeneration: 2, replicas: {replicas}, updatedReplicas: {updated}}}\n"
    ))
    .unwrap()
}

fn report(state: ModelState) -> ModelStatus {
    ModelStatus {
        state: state as i32,
        digest: "d1".to_owned(),
        device: "cpu".to_owned(),
        ..ModelStatus::default()
    }
}

struct Case {
    replicas: i32,
    deployment: Deployment,
    pods: Vec<PodView>,
    reports: BTreeMap<String, PodReport>,
    name_owner: Option<ModelKey>,
    rollout: RolloutState,
    gate_hold: Option<Cause>,
    autoscaler: Option<AutoscalerReport>,
    exposure: Option<RouteReport>,
    undefined: &'static [&'static ChildKind],
    scaling: &'static str,
    previous: InferenceModelStatus,
    at: i64,
}

impl Case {
    fn new(replicas: i32) -> Self {
        Self {
            replicas,
            deployment: deployment(replicas, replicas),
            pods: Vec::new(),
            reports: BTreeMap::new(),
            name_owner: None,
            rollout: RolloutState { stable: Some(member("r1")), ..RolloutState::default() },
            gate_hold: None,
            autoscaler: None,
            exposure: None,
            undefined: &[],
            scaling: "",
            previous: InferenceModelStatus::default(),
            at: NOW,
        }
    }

    fn pod(mut self, pod: PodView, report: Option<ModelStatus>) -> Self {
        if let Some(report) = report {
            let restarts = pod.restarts;
            let progressed_at = Timestamp::from_second(NOW).unwrap();
            self.reports.insert(pod.uid.clone(), PodReport { model: report, restarts, progressed_at });
        }
        self.pods.push(pod);
        self
    }

    fn status(&self) -> InferenceModelStatus {
        let spec = format!(
            "{{source: {{uri: 'oci://x'}}, runtime: {{resources: {{requests: {{cpu: 1}}}}}}, \
             scaling: {{replicas: {}{}}}}}",
            self.replicas, self.scaling
        );
        let inputs = StatusInputs {
            deployment: Some(&self.deployment),
            pods: &self.pods,
            reports: &self.reports,
            name_owner: self.name_owner.as_ref(),
            rollout: &self.rollout,
            gate_hold: self.gate_hold.as_ref(),
            autoscaler: self.autoscaler.as_ref(),
            exposure: self.exposure.as_ref(),
            undefined: self.undefined,
            url: "http://gateway",
            now: Timestamp::from_second(self.at).unwrap(),
        };
        status(&valid("chat", &spec), "r1", inputs, &self.previous)
    }
}

fn member(revision: &str) -> Member {
    Member { revision: revision.to_owned(), pool: revision.to_owned() }
}

fn not_ready(name: &str) -> PodView {
    PodView { ready: false, containers_ready: false, ..view("chat", name) }
}

fn condition<'a>(status: &'a InferenceModelStatus, kind: &str) -> (&'a str, &'a str) {
    let one = status.conditions.iter().find(|one| one.type_ == kind).unwrap();
    (one.status.as_str(), one.reason.as_str())
}

#[test]
fn all_replicas_of_the_revision_make_it_ready() {
    let case = Case::new(2)
        .pod(view("chat", "a"), Some(report(ModelState::Ready)))
        .pod(view("chat", "b"), Some(report(ModelState::Ready)));
    insta::assert_yaml_snapshot!(case.status());
}

#[test]
fn the_reported_task_stays_when_no_pod_runs() {
    let embeds = ModelStatus { task: "embed".to_owned(), ..report(ModelState::Ready) };
    let mut case = Case::new(1);
    assert_eq!(case.status().task, None);
    case = case.pod(view("chat", "a"), Some(embeds));
    let status = case.status();
    assert_eq!(status.task.as_deref(), Some("embed"));
    let mut stopped = Case::new(0);
    stopped.previous = status;
    assert_eq!(stopped.status().task.as_deref(), Some("embed"));
}

#[test]
fn nothing_yet_is_pending() {
    let status = Case::new(1).status();
    assert_eq!(status.phase, Some(Phase::Pending));
    assert_eq!(condition(&status, "Progressing"), ("True", "Starting"));
    assert_eq!(condition(&status, "Degraded"), ("False", "AsExpected"));
}

#[test]
fn loading_has_bytes_and_the_remaining_time() {
    let loading = ModelStatus {
        loaded_bytes: 25,
        total_bytes: 100,
        since_unix_ms: u64::try_from((NOW - 10) * 1000).unwrap(),
        ..report(ModelState::Loading)
    };
    let status = Case::new(1).pod(not_ready("a"), Some(loading)).status();
    assert_eq!(status.phase, Some(Phase::Loading));
    assert_eq!(status.loading, Some(Loading { bytes: 25, total_bytes: 100, eta_seconds: Some(30) }));
    assert_eq!(condition(&status, "Serving"), ("False", "Loading"));
}

#[test]
fn a_failed_load_has_the_pods_reason() {
    let failed = ModelStatus {
        reason: "DigestMismatch".to_owned(),
        message: "model.gguf has sha256 aa, spec.source.sha256 wants bb".to_owned(),
        ..report(ModelState::Failed)
    };
    let status = Case::new(1).pod(not_ready("a"), Some(failed)).status();
    assert_eq!(status.phase, Some(Phase::Failed));
    for (kind, value) in
        [("Ready", "False"), ("Progressing", "False"), ("Degraded", "True"), ("Serving", "False")]
    {
        assert_eq!(condition(&status, kind), (value, "DigestMismatch"), "{kind}");
    }
    assert_eq!(status.digest, None, "a file that failed to load is not the model's digest");
}

#[test]
fn a_failed_update_is_degraded_and_the_old_revision_serves() {
    let mut broken = not_ready("new");
    broken.cause = Some(Cause { reason: "ErrImagePull".to_owned(), message: "no image".to_owned() });
    let old = PodView { revision: "r0".to_owned(), ..view("chat", "old") };
    let mut case = Case::new(1).pod(old, Some(report(ModelState::Ready))).pod(broken, None);
    case.rollout = RolloutState {
        phase: RolloutPhase::Placing,
        stable: Some(member("r0")),
        candidate: Some(member("r1")),
        attempt: 1,
        reason: "Surge".to_owned(),
        ..RolloutState::default()
    };
    case.previous.stable = Some(StableRevision {
        revision: "r0".to_owned(),
        digest: Some("d0".to_owned()),
        ..StableRevision::default()
    });
    case.reports.clear();
    let status = case.status();
    assert_eq!((status.replicas, status.ready_replicas), (1, 1), "/scale shows the stable revision only");
    assert_eq!(condition(&status, "RolloutHealthy"), ("True", "Surge"));
    assert_eq!(status.phase, Some(Phase::Degraded));
    assert_eq!(condition(&status, "Serving"), ("True", "PodsServe"));
    assert_eq!(condition(&status, "Degraded"), ("True", "ErrImagePull"));
    assert_eq!(status.stable.unwrap().revision, "r0");
    assert_eq!(status.digest.as_deref(), Some("d0"));
}

#[test]
fn a_rolled_back_revision_is_the_cause_and_the_stable_one_serves() {
    let mut case = Case::new(1).pod(PodView { revision: "r0".to_owned(), ..view("chat", "old") }, None);
    let at = Timestamp::from_second(NOW).unwrap();
    case.rollout = RolloutState {
        phase: RolloutPhase::RolledBack,
        stable: Some(member("r0")),
        refused: Some("r1".to_owned()),
        attempt: 1,
        reason: "ErrorRate".to_owned(),
        history: vec![Decision {
            at,
            revision: "r1".to_owned(),
            decision: "RolledBack".to_owned(),
            reason: "ErrorRate".to_owned(),
            message: "9 of 10 requests failed".to_owned(),
        }],
        ..RolloutState::default()
    };
    let status = case.status();
    assert_eq!(status.phase, Some(Phase::Degraded));
    assert_eq!(condition(&status, "Serving").0, "True");
    for kind in ["Ready", "Progressing", "RolloutHealthy"] {
        assert_eq!(condition(&status, kind), ("False", "ErrorRate"), "{kind}");
    }
    assert_eq!(condition(&status, "Degraded"), ("True", "ErrorRate"));
    assert_eq!(status.history[0].message, "9 of 10 requests failed");
}

#[test]
fn ready_waits_for_the_deployments_controller() {
    let mut case = Case::new(1).pod(view("chat", "a"), Some(report(ModelState::Ready)));
    case.deployment.metadata.generation = Some(3);
    let status = case.status();
    assert_eq!(status.phase, Some(Phase::Updating));
    assert_eq!(condition(&status, "Ready"), ("False", "RollingOut"));
}

#[test]
fn warm_pods_wait_for_gateways() {
    let status = Case::new(1)
        .pod(PodView { ready: false, ..view("chat", "a") }, Some(report(ModelState::Ready)))
        .status();
    assert_eq!(condition(&status, "Progressing"), ("True", "WaitingForGateways"));
}

#[test]
fn zero_replicas_are_stopped_and_not_degraded() {
    let status = Case::new(0).status();
    assert_eq!(status.phase, Some(Phase::Stopped));
    assert_eq!(condition(&status, "Ready"), ("False", "Stopped"));
    assert_eq!(condition(&status, "Degraded").0, "False");
}

#[test]
fn pods_that_could_not_be_created_are_a_cause() {
    let mut case = Case::new(1);
    case.deployment = serde_yaml::from_str(
        "metadata: {generation: 1}\nspec: {selector: {}, template: {}}\nstatus: {conditions: [{type: ReplicaFailure, status: 'True', reason: FailedCreate, message: exceeded quota}]}\n",
    )
    .unwrap();
    assert_eq!(condition(&case.status(), "Degraded"), ("True", "FailedCreate"));
}

#[test]
fn the_bare_name_condition_ends_with_its_cause() {
    let mut case = Case::new(1).pod(view("chat", "a"), Some(report(ModelState::Ready)));
    case.name_owner = Some(("older".to_owned(), "chat".to_owned()));
    let status = case.status();
    assert_eq!(condition(&status, "BareName"), ("False", "Taken"));
    assert_eq!(status.phase, Some(Phase::Ready));
    case.name_owner = None;
    case.previous = status;
    assert!(case.status().conditions.iter().all(|one| one.type_ != "BareName"));
}

#[test]
fn an_unchanged_state_gives_an_equal_status_later() {
    let mut case = Case::new(1).pod(view("chat", "a"), Some(report(ModelState::Ready)));
    case.previous = case.status();
    case.at += 60;
    assert_eq!(case.status(), case.previous);
}

fn refusal<'a>(cause: &'a Cause, pods: &'a [PodView]) -> Refusal<'a> {
    Refusal { generation: 9, cause, pods, now: Timestamp::from_second(NOW + 1).unwrap() }
}

#[test]
fn a_refused_edit_keeps_the_serving_pods() {
    let case = Case::new(1).pod(view("chat", "a"), Some(report(ModelState::Ready)));
    let before = case.status();
    let cause = Cause { reason: "InvalidSpec".to_owned(), message: "spec.source.uri: no".to_owned() };
    let after = refused(refusal(&cause, &case.pods), &before);
    assert_eq!(after.phase, Some(Phase::Degraded));
    assert_eq!(after.observed_generation, Some(9));
    assert_eq!(after.stable, before.stable);
    assert_eq!(condition(&after, "Serving"), ("True", "PodsServe"));
    assert_eq!(condition(&after, "Degraded"), ("True", "InvalidSpec"));
}

#[test]
fn a_refused_model_without_serving_pods_does_not_serve() {
    let case = Case::new(1).pod(view("chat", "a"), Some(report(ModelState::Ready)));
    let cause = Cause { reason: "InvalidSpec".to_owned(), message: "spec.traffic.timeout: no".to_owned() };
    let before = refused(refusal(&cause, &case.pods), &case.status());
    let after = refused(refusal(&cause, &[not_ready("a")]), &before);
    assert_eq!((after.phase, after.ready_replicas, after.replicas), (Some(Phase::Failed), 0, 1));
    assert_eq!(condition(&after, "Serving"), ("False", "InvalidSpec"));
}

#[test]
fn a_stalled_load_has_a_constant_status() {
    let loading = ModelStatus {
        loaded_bytes: 1,
        total_bytes: 100,
        since_unix_ms: u64::try_from((NOW - 10) * 1000).unwrap(),
        ..report(ModelState::Loading)
    };
    let mut case = Case::new(1).pod(not_ready("a"), Some(loading));
    case.previous = case.status();
    assert_eq!(case.previous.loading.as_ref().unwrap().eta_seconds, Some(990));
    case.at += 600;
    assert_eq!(case.status(), case.previous);
}

#[test]
fn a_report_does_not_outlive_its_container() {
    let pod = view("chat", "a");
    let report = PodReport { restarts: 0, ..PodReport::default() };
    assert!(report.is_current(&pod));
    assert!(!report.is_current(&PodView { restarts: 1, ..pod.clone() }));
    assert!(!report.is_current(&PodView { running: false, ..pod }));
}

#[test]
fn a_pod_that_waits_for_silent_gateways_says_so() {
    let waits = PodView { ready: false, ..view("chat", "a") };
    let mut case = Case::new(1).pod(waits, Some(report(ModelState::Ready)));
    let message = "gateway pods that are ready do not report: gateway-0".to_owned();
    case.gate_hold = Some(Cause { reason: "GatewaysSilent".to_owned(), message: message.clone() });
    let status = case.status();
    assert_eq!(condition(&status, "Ready"), ("False", "GatewaysSilent"));
    assert!(status.conditions.iter().any(|one| one.type_ == "Progressing" && one.message == message));
    // A model whose pods are acknowledged does not depend on gateways.
    let mut case = Case::new(1).pod(view("chat", "a"), Some(report(ModelState::Ready)));
    case.gate_hold = Some(Cause { reason: "GatewaysSilent".to_owned(), message });
    assert_eq!(condition(&case.status(), "Ready"), ("True", "AllPodsServe"));
}

#[test]
fn a_pod_on_a_lost_node_has_the_node_as_the_cause() {
    let lost = PodView { ready: false, node: Some("n1".to_owned()), ..view("chat", "a") }.on_lost_node();
    let status = Case::new(1).pod(lost, None).status();
    assert_eq!(condition(&status, "Degraded"), ("True", "NodeNotReady"));
}

#[test]
fn an_autoscaler_is_reported_while_it_is_configured() {
    let autoscaled = |case: &Case| {
        let found = case.status().conditions.into_iter().find(|one| one.type_ == "Autoscaled");
        found.map(|one| (one.status, one.reason, one.message))
    };
    let mut case = Case::new(1);
    case.autoscaler = Some(AutoscalerReport { problem: None });
    assert_eq!(autoscaled(&case), None, "the spec has no metrics");
    case.scaling = ", maxReplicas: 3, metrics: [{cpu: 70}]";
    let (status, _, message) = autoscaled(&case).unwrap();
    assert_eq!((status.as_str(), message.as_str()), ("True", "1 to 3 pods keep cpu 70 % of the request"));
    let problem = Cause { reason: "FailedGetContainerResourceMetric".to_owned(), message: "none".to_owned() };
    case.autoscaler = Some(AutoscalerReport { problem: Some(problem) });
    let (status, reason, _) = autoscaled(&case).unwrap();
    assert_eq!((status.as_str(), reason.as_str()), ("False", "FailedGetContainerResourceMetric"));
    case.autoscaler = None;
    assert_eq!(autoscaled(&case).unwrap().1, "Starting");
    case.replicas = 0;
    assert_eq!(autoscaled(&case).unwrap().1, "Stopped");
}

#[test]
fn a_kind_that_the_cluster_does_not_define_is_named_and_changes_nothing_else() {
    let mut case = Case::new(1);
    assert!(case.status().conditions.iter().all(|one| one.type_ != "Integrated"));
    case.undefined = &[&crate::kinds::SERVICE_MONITOR];
    let status = case.status();
    let integrated = status.conditions.iter().find(|one| one.type_ == "Integrated").unwrap();
    assert_eq!((integrated.status.as_str(), integrated.reason.as_str()), ("False", "NotDefined"));
    assert!(integrated.message.contains("servicemonitors.monitoring.coreos.com"), "{integrated:?}");
    assert_eq!(condition(&status, "Degraded").0, "False");
}

#[test]
fn whether_gateways_take_requests_is_reported_while_a_route_is_asked_for() {
    let exposed = |case: &Case| {
        let found = case.status().conditions.into_iter().find(|one| one.type_ == "Exposed");
        found.map(|one| (one.status, one.reason, one.message))
    };
    let mut case = Case::new(1);
    case.exposure = Some(RouteReport { problem: None });
    assert_eq!(exposed(&case), None, "the spec has no route");
    // It ends the section that it stands in.
    case.scaling = "}, route: {hostnames: [a.example.com], parentRefs: [{name: public}]";
    let (status, _, message) = exposed(&case).unwrap();
    assert_eq!((status.as_str(), message.as_str()), ("True", "Gateways take requests for a.example.com"));
    let problem = Cause { reason: "RefNotPermitted".to_owned(), message: "Gateway public: none".to_owned() };
    case.exposure = Some(RouteReport { problem: Some(problem) });
    let (status, reason, _) = exposed(&case).unwrap();
    assert_eq!((status.as_str(), reason.as_str()), ("False", "RefNotPermitted"));
    case.exposure = None;
    let (_, reason, message) = exposed(&case).unwrap();
    assert_eq!((reason.as_str(), message.ends_with("asked: public")), ("Waiting", true));
    case.undefined = &[&HTTP_ROUTE];
    assert_eq!(exposed(&case), None, "Integrated says why");
}
