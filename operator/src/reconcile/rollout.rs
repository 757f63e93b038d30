//! The rollout of a model: what it is now, and what follows from it.
//!
//! The state is in the status. A step that changes pods or shares is stored there before it is acted on, so
//! that another operator goes on from it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use trustformers_control::counts::SeriesKey;
use trustformers_control::kinds::DEPLOYMENT;
use trustformers_control::names;
use trustformers_control::rollout::room::{self, GpuDemand};
use trustformers_control::rollout::window::SampleWindow;
use trustformers_control::rollout::{PodCommand, PoolSize, RolloutFacts, RolloutState, observe, step};
use trustformers_control::validate::ValidatedModel;
use trustformers_crds::InferenceModel;

use super::fetch::{self, Observed};
use super::in_place;
use super::status::now;
use crate::context::Context;

/// How often acknowledgements of gateways are looked at while pods wait for them to end.
const LOOK_AT_TABLES: Duration = Duration::from_secs(1);

/// How often the GPUs of nodes are looked at while a rollout waits for some: other models' pods that end, and
/// nodes that come, wake no model.
const LOOK_AT_GPUS: Duration = Duration::from_secs(30);

/// What follows from the rollout of a model.
#[derive(Debug)]
pub struct RolloutPlan {
    /// The next state.
    pub state: RolloutState,
    /// Whether it must be stored before it is acted on.
    pub store_first: bool,
    /// Every pool that should exist.
    pub pools: Vec<PoolSize>,
    /// What pods must do.
    pub commands: Vec<PodCommand>,
    /// Revisions that get no request by any gateway's table.
    pub unrouted: BTreeSet<String>,
    /// When to look again without a change.
    pub wait: Option<Duration>,
}

/// The next step of the model's rollout.
#[must_use]
pub fn plan(
    context: &Context,
    model: &InferenceModel,
    valid: &ValidatedModel,
    observed: &Observed,
    revision: &str,
) -> RolloutPlan {
    let deployments = deployments(observed);
    let pools = observe::pools(&deployments, &observed.pods);
    // Not the stored one: somebody may have edited it.
    let state = RolloutState::of(&observed.previous);
    let revisions = observe::revisions(&deployments, &observed.pods, &observed.reports, &state);
    let named = state.members().map(|member| &member.revision);
    let unrouted = unrouted(context, observed, pools.keys().chain(revisions.keys()).chain(named));
    // Asked only of a revision that is not there yet.
    let in_place = match &state.stable {
        Some(stable) if stable.revision == revision => Err("it serves already".to_owned()),
        _ => in_place::check(context, valid, observed, &state),
    };
    let route = format!("{}/{}", observed.key.0, observed.key.1);
    let counts = |revision: &str| {
        let key = SeriesKey { route: route.clone(), revision: revision.to_owned() };
        context.counts.by_process(&key)
    };
    let window = SampleWindow::next(state.window.as_ref(), &state, &valid.rollout, &counts);
    let sample = window.as_ref().map(SampleWindow::sample);
    let is_settled =
        state.candidate.is_none() && state.stable.as_ref().is_some_and(|stable| stable.revision == revision);
    let budget = if is_settled { None } else { budget(context, valid, observed, &state) };
    let facts = RolloutFacts {
        desired: revision,
        replicas: u32::try_from(valid.replicas).unwrap_or(0),
        max_unavailable: u32::try_from(valid.max_unavailable).unwrap_or(0),
        policy: &valid.rollout,
        in_place,
        budget,
        revisions,
        pools,
        unrouted: unrouted.clone(),
        sample: sample.as_ref(),
        commands: observe::commands(model.metadata.annotations.as_ref()),
    };
    let now = now();
    let mut outcome = step(&state, &facts, now);
    // The sums at the start of a step are stored with the step.
    outcome.state.window = SampleWindow::next(window.as_ref(), &outcome.state, &valid.rollout, &counts);
    let wake = outcome.wake_at.map(|at| Duration::try_from(at.duration_since(now)).unwrap_or_default());
    let tables = (!outcome.state.retiring.is_empty()).then_some(LOOK_AT_TABLES);
    let gpus = (valid.runtime.gpus > 0 && outcome.state.reason == "NoCapacity").then_some(LOOK_AT_GPUS);
    RolloutPlan {
        store_first: outcome.store_first,
        pools: outcome.pools,
        commands: outcome.commands,
        unrouted,
        state: outcome.state,
        wait: wake.into_iter().chain(tables).chain(gpus).min(),
    }
}

/// The pods for which the cluster has GPUs, where a rollout has to choose by that. Elsewhere, and where the
/// spec itself chooses, the scheduler decides: an autoscaler of nodes may add some.
fn budget(
    context: &Context,
    valid: &ValidatedModel,
    observed: &Observed,
    state: &RolloutState,
) -> Option<u32> {
    let runtime = &valid.runtime;
    if runtime.gpus == 0 || valid.rollout.placement.is_some() || state.stable.is_none() {
        return None;
    }
    let nodes = context.extended.of(&runtime.gpu_resource);
    let mut others: BTreeMap<String, u32> = BTreeMap::new();
    for model in context.models.state() {
        let other = &model.spec.runtime;
        let key = fetch::key(&model).filter(|key| *key != observed.key);
        let Some(key) = key.filter(|_| other.gpus > 0 && other.gpu_resource == runtime.gpu_resource) else {
            continue;
        };
        for pod in context.pods.of_model(&key).iter().filter(|pod| !pod.view.ended) {
            if let Some(node) = &pod.view.node {
                *others.entry(node.clone()).or_default() += other.gpus;
            }
        }
    }
    let demand = GpuDemand { gpus: runtime.gpus, nodes: &nodes, others: &others, own: &observed.pods };
    room::budget(&demand)
}

/// The Deployments of the model, by the revision that each was made for.
fn deployments(observed: &Observed) -> BTreeMap<String, Deployment> {
    let children = observed.children.iter().filter(|child| child.kind == &DEPLOYMENT);
    children
        .filter_map(|child| {
            let revision = child.label(names::REVISION_LABEL)?.to_owned();
            Some((revision, child.deployment.as_deref()?.clone()))
        })
        .collect()
}

/// The revisions to which no gateway sends requests any more. Before the feed starts, that is not certain of
/// any.
fn unrouted<'a>(
    context: &Context,
    observed: &Observed,
    revisions: impl Iterator<Item = &'a String>,
) -> BTreeSet<String> {
    let Some(feed) = context.feed.get() else { return BTreeSet::new() };
    let (namespace, name) = &observed.key;
    let route = format!("{namespace}/{name}");
    revisions.filter(|revision| feed.is_unrouted(&route, revision)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{Node, Pod};
    use kube::runtime::watcher::Event;
    use serde_json::json;
    use trustformers_control::rollout::state::Member;
    use trustformers_control::validate::validate;

    use crate::context::NewContext;
    use crate::context::tests::{metrics, settings};
    use crate::testing::mock_client;

    fn model(name: &str, spec: &str) -> InferenceModel {
        let text = format!(
            "apiVersion: serving.trustformers.dev/v1alpha1\nkind: InferenceModel\n\
             metadata: {{name: {name}, namespace: team, uid: uid-{name}, generation: 1}}\nspec: {spec}\n"
        );
        serde_yaml::from_str(&text).unwrap()
    }

    fn pod(model: &str, node: &str) -> Pod {
        let labels =
            json!({"serving.trustformers.dev/model": model, "serving.trustformers.dev/revision": "r"});
        let name = format!("{model}-{node}");
        serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "team", "uid": name, "labels": labels},
            "spec": {"nodeName": node, "containers": []},
        }))
        .unwrap()
    }

    fn node(name: &str) -> Node {
        serde_json::from_value(json!({"metadata": {"name": name}, "status": {
            "allocatable": {"nvidia.com/gpu": "4"}, "conditions": [{"type": "Ready", "status": "True"}]}}))
        .unwrap()
    }

    #[tokio::test]
    async fn a_rollout_counts_the_gpus_that_other_models_leave() {
        let client = mock_client(|request| panic!("{request:?}"));
        let NewContext { context, mut writers, queue: _ } = Context::create(client, settings(), metrics());
        for name in ["a", "b"] {
            context.extended.apply(&Event::Apply(node(name)));
        }
        let source = "source: {uri: 'oci://x'}";
        let models = [
            model("chat", &format!("{{{source}, runtime: {{gpus: 2}}}}")),
            model("same", &format!("{{{source}, runtime: {{gpus: 1}}}}")),
            model("other", &format!("{{{source}, runtime: {{gpus: 4, gpuResource: amd.com/gpu}}}}")),
            model("none", &format!("{{{source}}}")),
        ];
        for model in &models {
            writers.models.apply_watcher_event(&Event::Apply(model.clone()));
            let name = model.metadata.name.as_deref().unwrap();
            writers.pods.apply_watcher_event(&Event::Apply(pod(name, "a")));
        }
        let stable = Some(Member { revision: "r".to_owned(), pool: "r".to_owned() });
        let state = RolloutState { stable, ..RolloutState::default() };
        let budget = |model: &InferenceModel, state: &RolloutState| {
            let observed = fetch::fetch(&context, model).unwrap();
            budget(&context, &validate(model).unwrap(), &observed, state)
        };
        assert_eq!(budget(&models[0], &state), Some(3), "one of a, where one GPU is taken, and two of b");
        assert_eq!(budget(&models[1], &state), Some(6));
        assert_eq!(budget(&models[2], &state), None, "no node has its kind");
        assert_eq!(budget(&models[3], &state), None, "it needs none");
        assert_eq!(budget(&models[0], &RolloutState::default()), None, "it is no rollout yet");
        let surge = format!("{{{source}, runtime: {{gpus: 2}}, rollout: {{placement: Surge}}}}");
        assert_eq!(budget(&model("chat", &surge), &state), None, "the spec chooses");
    }
}
