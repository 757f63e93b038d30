//! Scenarios about rollouts: what is stored before it is done, and what ends when.

use kube::runtime::watcher::Event;
use serde_json::{Value, json};
use trustformers_control::kinds::DEPLOYMENT;
use trustformers_control::names;
use trustformers_proto::control::v1::{Backend, Endpoint, Route, TableVersion};

use super::*;
use crate::feed::FeedState;
use trustformers_control::gate::{Report, SETTLE};

const NEXT: &str = "{source: {uri: 'oci://localhost/m:2'}, rollout: {steps: [{weight: 50}], bake: 1h}}";

/// A pod that serves a revision, acknowledged by all gateways.
pub(super) fn serving(name: &str, revision: &str) -> Pod {
    let conditions =
        ["PodScheduled", "ContainersReady", "Ready"].map(|one| json!({"type": one, "status": "True"}));
    let mut pod = pod(name, json!({"podIP": "10.0.0.1", "conditions": conditions}));
    pod.metadata.labels.as_mut().unwrap().insert(names::REVISION_LABEL.to_owned(), revision.to_owned());
    pod
}

/// What a scenario works with: a model whose first revision serves.
pub(super) struct Serving {
    pub(super) server: ScriptedServer,
    pub(super) context: Arc<Context>,
    pub(super) writers: Writers,
    pub(super) feed: Arc<FeedState>,
}

impl Serving {
    pub(super) async fn new() -> Self {
        let server = ScriptedServer::default();
        let (context, mut writers, model) = with_new_model(&server).await;
        let feed = Arc::new(FeedState::new(1));
        feed.set_reachable();
        feed.set_gateway_pods([]);
        context.feed.set(Arc::clone(&feed)).unwrap();
        let mut complete = cached(&context, &DEPLOYMENT);
        complete["status"] = json!({"replicas": 1, "updatedReplicas": 1});
        deliver(&context, &DEPLOYMENT, complete);
        writers.pods.apply_watcher_event(&Event::Apply(serving("old", &revision(SPEC))));
        server.expect([Expect::Status { phase: "Ready" }]);
        reconcile(model, Arc::clone(&context)).await.unwrap();
        server.is_done();
        Self { server, context, writers, feed }
    }

    /// Reconciles a model with this spec, as it is stored after the last write.
    pub(super) async fn reconcile(&self, spec: &str) -> Result<Action, ReconcileError> {
        let mut model = model(spec, self.server.statuses().pop().unwrap());
        model.metadata.resource_version = Some("1".to_owned());
        reconcile(Arc::new(model), Arc::clone(&self.context)).await
    }

    /// `status.rollout` as it was written last.
    pub(super) fn rollout(&self) -> Value {
        self.server.statuses().last().unwrap()["rollout"].clone()
    }

    pub(super) fn history(&self) -> Value {
        self.server.statuses().last().unwrap()["history"].clone()
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
        let version: TableVersion = self.feed.tables().borrow().as_ref().unwrap().version.unwrap();
        self.feed.report(Report { instance: "g".to_owned(), acknowledged: Some(version), draining: false });
    }
}

#[tokio::test(start_paused = true)]
async fn a_new_revision_is_stored_then_created_and_shifted_before_the_old_one_ends() {
    let mut case = Serving::new().await;
    let (old, new) = (revision(SPEC), revision(NEXT));
    case.route(&[&old]);
    tokio::time::advance(SETTLE).await;

    // The decision to roll out is stored; the Deployment is made, first without a pod, then with one.
    case.server.expect([
        Expect::Rollout { phase: "Pending" },
        Expect::Create { kind: "ConfigMap" },
        Expect::Create { kind: "Deployment" },
        Expect::Status { phase: "Updating" },
    ]);
    case.reconcile(NEXT).await.unwrap();
    case.server.is_done();
    case.server.expect([
        Expect::Rollout { phase: "Placing" },
        Expect::apply("Deployment", true),
        Expect::Status { phase: "Updating" },
        Expect::Event { reason: "RollingOut" },
    ]);
    case.reconcile(NEXT).await.unwrap();
    case.server.is_done();
    assert_eq!(case.server.applied("Deployment").last().unwrap()["spec"]["replicas"], 1);

    // The new pod serves: half of the requests, then all.
    let child = case.context.children.get(&DEPLOYMENT, "team", &deployment(NEXT)).unwrap();
    let mut complete = child.object();
    complete["status"] = json!({"replicas": 1, "updatedReplicas": 1});
    deliver(&case.context, &DEPLOYMENT, complete);
    case.writers.pods.apply_watcher_event(&Event::Apply(serving("new", &new)));
    case.server.expect([Expect::Status { phase: "Updating" }]);
    case.reconcile(NEXT).await.unwrap();
    assert_eq!(case.server.statuses().last().unwrap()["rollout"]["phase"], "Admitted");
    for phase in ["Shifting", "Verifying"] {
        case.server.expect([Expect::Rollout { phase }, Expect::Status { phase: "Updating" }]);
        case.reconcile(NEXT).await.unwrap();
        case.server.is_done();
    }
    // The promotion changes neither pods nor shares: it is stored with the rest of the status.
    case.server.expect([
        Expect::Status { phase: "Ready" },
        Expect::Event { reason: "Promoted" },
        Expect::Event { reason: "Ready" },
    ]);
    case.reconcile(NEXT).await.unwrap();
    case.server.is_done();
    let status = case.server.statuses().pop().unwrap();
    assert_eq!((&status["stable"]["revision"], &status["previous"]["revision"]), (&json!(new), &json!(old)));
    assert_eq!(case.history().as_array().unwrap().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_step_of_a_changed_model_is_not_acted_on() {
    let case = Serving::new().await;
    case.server.expect([Expect::RefuseRollout { phase: "Pending" }]);
    let error = case.reconcile(NEXT).await.unwrap_err();
    assert_eq!(error.label(), "Status/Changed");
    case.server.is_done();
}

#[tokio::test(start_paused = true)]
async fn a_rolled_back_revision_ends_after_gateways_acknowledge() {
    let mut case = Serving::new().await;
    let (old, new) = (revision(SPEC), revision(NEXT));
    case.route(&[&old, &new]);
    tokio::time::advance(SETTLE).await;
    case.server.expect([
        Expect::Rollout { phase: "Pending" },
        Expect::Create { kind: "ConfigMap" },
        Expect::Create { kind: "Deployment" },
        Expect::Status { phase: "Updating" },
        Expect::Rollout { phase: "Placing" },
        Expect::apply("Deployment", true),
        Expect::Status { phase: "Updating" },
        Expect::Event { reason: "RollingOut" },
    ]);
    case.reconcile(NEXT).await.unwrap();
    case.reconcile(NEXT).await.unwrap();
    // Its container crashes again and again.
    let mut crashing = serving("new", &new);
    crashing.status = serde_json::from_value(json!({"containerStatuses": [{"name": "runtime", "image": "i",
        "imageID": "", "ready": false, "restartCount": 3, "state": {"waiting": {"reason": "CrashLoopBackOff"}},
        "lastState": {"terminated": {"exitCode": 9}}}]}))
    .unwrap();
    case.writers.pods.apply_watcher_event(&Event::Apply(crashing.clone()));
    case.server.expect([
        Expect::Rollout { phase: "RollingBack" },
        Expect::Event { reason: "RolledBack" },
        // Its pod serves nothing, so it may end at once.
        Expect::apply("Deployment", true),
        Expect::Status { phase: "Degraded" },
        Expect::Event { reason: "CrashLoopBackOff" },
    ]);
    case.reconcile(NEXT).await.unwrap();
    case.server.is_done();
    assert_eq!(case.server.applied("Deployment").last().unwrap()["spec"]["replicas"], 0);
    assert_eq!(case.history()[0]["reason"], "CrashLoopBackOff");

    // Gateways still have the table with it; then they have another one.
    case.writers.pods.apply_watcher_event(&Event::Delete(crashing));
    case.route(&[&old]);
    case.server.expect([Expect::DeleteAny, Expect::DeleteAny, Expect::Status { phase: "Degraded" }]);
    case.reconcile(NEXT).await.unwrap();
    case.server.is_done();
    assert_eq!(case.server.statuses().last().unwrap()["rollout"]["phase"], "RolledBack");
    // Nothing more happens.
    case.reconcile(NEXT).await.unwrap();
    case.server.is_done();
}

#[tokio::test]
async fn a_first_revision_that_never_served_is_replaced_at_once() {
    let server = ScriptedServer::default();
    let (context, _writers, _model) = with_new_model(&server).await;
    let changed = Arc::new(model(NEXT, Value::Null));
    server.expect([
        Expect::Create { kind: "ConfigMap" },
        Expect::Create { kind: "Deployment" },
        Expect::Scale { revision: revision(SPEC), replicas: 0 },
        Expect::Status { phase: "Pending" },
    ]);
    reconcile(Arc::clone(&changed), Arc::clone(&context)).await.unwrap();
    server.is_done();
    assert_eq!(server.applied("Deployment").last().unwrap()["spec"]["replicas"], 1);
    // It has no pod.
    server.expect([Expect::Delete { name: deployment(SPEC) }]);
    reconcile(changed, context).await.unwrap();
    server.is_done();
}
