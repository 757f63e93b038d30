//! The route table, made from models and pods.
//!
//! A model is in the table as soon as it exists, with no endpoint at first: a gateway can then distinguish
//! "not ready yet" from "unknown". An invalid edit never removes a route. The table is a pure function of
//! what is stored, so a new leader's first table equals its predecessor's last one.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use trustformers_crds::InferenceModel;
use trustformers_proto::control::v1::{Backend, Endpoint, Policy, Route, Shadow};
use trustformers_proto::v1::{ModelSlot, ModelState, ModelStatus};

use crate::pods::PodView;
use crate::rollout::{RolloutState, observe, plan};
use crate::{names, traffic, versions};

/// Namespace and name of a model.
pub type ModelKey = (String, String);

/// What the table needs to know of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct RouteModel {
    /// Namespace and name.
    pub key: ModelKey,
    /// Creation time: the older of two models keeps a bare name.
    pub created: Option<Timestamp>,
    /// How gateways handle its requests.
    pub policy: Policy,
    /// Who answers a share of them as well.
    pub shadow: Option<Shadow>,
    /// The digest in its status, with the revision that the digest belongs to.
    pub stored_digest: Option<(String, String)>,
    /// The task of its spec, or else of its status.
    pub stored_task: Option<String>,
    /// The names of the adapters in its spec.
    pub adapters: Vec<String>,
    /// Its stored rollout, with the model's replicas; none before a revision has served.
    pub rollout: Option<(RolloutState, u32)>,
}

/// What a pod reported that its route shows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Loaded {
    /// The digest of what it loaded.
    pub digest: String,
    /// The model's task, such as `generate`; empty if the pod did not report it.
    pub task: String,
    /// The names of the adapters that it can answer with.
    pub adapters: Vec<String>,
    /// The versions that it holds, the one that answers first.
    pub versions: Vec<LoadedVersion>,
}

/// One version that a pod holds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LoadedVersion {
    /// Its revision.
    pub revision: String,
    /// Its digest; empty until known.
    pub digest: String,
    /// Whether it can answer.
    pub is_ready: bool,
}

impl Loaded {
    /// What the report of a pod says.
    #[must_use]
    pub fn of(pod: &PodView, report: &ModelStatus) -> Self {
        let version = |slot: ModelSlot| LoadedVersion {
            is_ready: slot.state() == ModelState::Ready,
            revision: slot.revision,
            digest: slot.digest,
        };
        Self {
            digest: report.digest.clone(),
            task: report.task.clone(),
            adapters: report.adapters.clone(),
            versions: versions::slots(pod, report).into_iter().map(version).collect(),
        }
    }
}

/// A pod that can answer for a revision.
struct Holder<'a> {
    pod: &'a PodView,
    /// Whether it can answer for others too.
    by_revision: bool,
}

/// Timeout of a model whose stored settings cannot be read, or that cannot be read at all. It has no retries.
const FALLBACK_TIMEOUT_MS: u64 = 60_000;

fn fallback_policy() -> Policy {
    Policy { first_byte_timeout_ms: FALLBACK_TIMEOUT_MS, ..Policy::default() }
}

impl RouteModel {
    /// The route of a stored model whose spec cannot be read: its pods go on serving.
    #[must_use]
    pub fn of_unreadable(metadata: &ObjectMeta) -> Option<Self> {
        Some(Self {
            key: (metadata.namespace.clone()?, metadata.name.clone()?),
            created: metadata.creation_timestamp.as_ref().map(|time| time.0),
            policy: fallback_policy(),
            shadow: None,
            stored_digest: None,
            stored_task: None,
            adapters: Vec::new(),
            rollout: None,
        })
    }

    /// Reads a stored model; `None` if it has no name or namespace.
    #[must_use]
    pub fn of(model: &InferenceModel) -> Option<Self> {
        let stable = model.status.as_ref().and_then(|status| status.stable.as_ref());
        let (namespace, name) = (model.metadata.namespace.clone()?, model.metadata.name.clone()?);
        let traffic = &model.spec.traffic;
        let shadow = traffic.shadow.as_ref().filter(|_| traffic::check_shadow(&name, traffic).is_ok());
        Some(Self {
            shadow: shadow.map(|shadow| traffic::shadow(&namespace, shadow)),
            key: (namespace, name),
            created: model.metadata.creation_timestamp.as_ref().map(|time| time.0),
            policy: traffic::policy(traffic).unwrap_or_else(|_| fallback_policy()),
            stored_digest: stable.and_then(|stable| Some((stable.revision.clone(), stable.digest.clone()?))),
            stored_task: model
                .spec
                .task
                .map(|task| task.as_str().to_owned())
                .or_else(|| model.status.as_ref()?.task.clone()),
            adapters: model.spec.runtime.adapters.iter().map(|adapter| adapter.name.clone()).collect(),
            rollout: model.status.as_ref().filter(|status| status.stable.is_some()).map(|status| {
                (RolloutState::of(status), u32::try_from(model.spec.scaling.replicas).unwrap_or(0))
            }),
        })
    }
}

/// The model that owns each bare name: the oldest, and of equally old ones the first by namespace.
#[must_use]
pub fn bare_names<'a>(models: impl IntoIterator<Item = &'a RouteModel>) -> BTreeMap<String, ModelKey> {
    let mut owners: BTreeMap<String, &RouteModel> = BTreeMap::new();
    for model in models {
        owners
            .entry(model.key.1.clone())
            .and_modify(|owner| {
                if age(model) < age(owner) {
                    *owner = model;
                }
            })
            .or_insert(model);
    }
    owners.into_iter().map(|(name, model)| (name, model.key.clone())).collect()
}

fn age(model: &RouteModel) -> (Timestamp, &ModelKey) {
    (model.created.unwrap_or(Timestamp::MAX), &model.key)
}

/// All routes, sorted, so that equal inputs give equal tables. `loaded` is what pods reported, by UID.
#[must_use]
pub fn routes(models: &[RouteModel], pods: &[PodView], loaded: &BTreeMap<String, Loaded>) -> Vec<Route> {
    let owners = bare_names(models);
    let mut by_model: BTreeMap<(&str, &str), Vec<&PodView>> = BTreeMap::new();
    for pod in pods.iter().filter(|pod| pod.routable()) {
        by_model.entry((&pod.namespace, &pod.model)).or_default().push(pod);
    }
    let mut routes: Vec<Route> = models
        .iter()
        .map(|model| {
            let (namespace, name) = &model.key;
            let pods = by_model.remove(&(namespace.as_str(), name.as_str())).unwrap_or_default();
            route(model, owners.get(name) == Some(&model.key), &pods, loaded)
        })
        .collect();
    routes.sort_by(|one, other| one.name.cmp(&other.name));
    routes
}

/// The route of one model, from its own pods. `owns_name`: it has its bare name as an alias.
#[must_use]
pub fn route(
    model: &RouteModel,
    owns_name: bool,
    pods: &[&PodView],
    loaded: &BTreeMap<String, Loaded>,
) -> Route {
    let (namespace, name) = &model.key;
    let full = format!("{namespace}/{name}");
    let mut aliases = vec![full.clone()];
    if owns_name {
        aliases.push(name.clone());
    }
    let pods: Vec<&PodView> = pods.iter().filter(|pod| pod.routable()).copied().collect();
    let mut reported = pods.iter().filter_map(|pod| Some(&loaded.get(&pod.uid)?.task));
    let task = reported.find(|task| !task.is_empty()).or(model.stored_task.as_ref());
    Route {
        name: full,
        aliases,
        task: task.cloned().unwrap_or_default(),
        adapters: adapters(model, &pods, loaded),
        backends: backends(model, pods, loaded),
        policy: Some(model.policy.clone()),
        shadow: model.shadow.clone(),
        ..Route::default()
    }
}

/// The adapters of the spec that every pod has: while one is rolled out, a request for it could meet a pod
/// that does not have it. A pod that has not reported yet counts as having them, so that the first table of a
/// new leader equals the last one of its predecessor.
fn adapters(model: &RouteModel, pods: &[&PodView], loaded: &BTreeMap<String, Loaded>) -> Vec<String> {
    let lacks = |pod: &&PodView, name: &String| {
        loaded.get(&pod.uid).is_some_and(|loaded| !loaded.adapters.contains(name))
    };
    let is_everywhere = |name: &&String| !pods.iter().any(|pod| lacks(pod, name));
    model.adapters.iter().filter(is_everywhere).cloned().collect()
}

/// The share of each revision by the stored rollout; empty if pods share the requests evenly.
fn shares(model: &RouteModel, by_revision: &BTreeMap<&str, Vec<Holder<'_>>>) -> BTreeMap<String, u32> {
    let Some((state, replicas)) = &model.rollout else { return BTreeMap::new() };
    let routable = |revision: &str| {
        let holders = by_revision.get(revision).into_iter().flatten();
        u32::try_from(holders.filter(|one| observe::is_routable(one.pod)).count()).unwrap_or(u32::MAX)
    };
    let split = plan::split(state, *replicas, &routable);
    split.into_iter().map(|one| (one.revision, one.weight)).collect()
}

/// One backend for each revision. Without a rollout every pod gets the same share.
fn backends(model: &RouteModel, pods: Vec<&PodView>, loaded: &BTreeMap<String, Loaded>) -> Vec<Backend> {
    let mut by_revision: BTreeMap<&str, Vec<Holder<'_>>> = BTreeMap::new();
    for pod in pods {
        let held = held(model, pod, loaded);
        let by_revision_only = held.len() > 1;
        for revision in held {
            by_revision.entry(revision).or_default().push(Holder { pod, by_revision: by_revision_only });
        }
    }
    // A single revision takes all requests, whatever its rollout says.
    let shares = if by_revision.len() > 1 { shares(model, &by_revision) } else { BTreeMap::new() };
    let weight = |revision: &str, pods: usize| match shares.get(revision) {
        Some(share) => *share,
        None if shares.is_empty() => u32::try_from(pods).unwrap_or(u32::MAX),
        None => 0,
    };
    let backend = |(revision, mut pods): (&str, Vec<Holder<'_>>)| {
        pods.sort_by(|one, other| one.pod.name.cmp(&other.pod.name));
        let reported = pods.iter().find_map(|one| digest(loaded.get(&one.pod.uid)?, revision));
        let stored = model.stored_digest.as_ref().filter(|(of, _)| of == revision).map(|(_, digest)| digest);
        Backend {
            revision: revision.to_owned(),
            digest: reported.or(stored).cloned().unwrap_or_default(),
            weight: weight(revision, pods.len()),
            endpoints: pods.iter().map(endpoint).collect(),
            ..Backend::default()
        }
    };
    by_revision.into_iter().map(backend).collect()
}

/// The revisions that a pod can answer for. One that has not reported yet counts for what it was asked to
/// hold, so that the first table of a new leader equals the last one of its predecessor.
fn held<'a>(model: &'a RouteModel, pod: &'a PodView, loaded: &'a BTreeMap<String, Loaded>) -> Vec<&'a str> {
    let versions = loaded.get(&pod.uid).map(|loaded| loaded.versions.as_slice()).unwrap_or_default();
    if let Some((first, others)) = versions.split_first() {
        let ready = others.iter().filter(|one| one.is_ready).map(|one| one.revision.as_str());
        return std::iter::once(first.revision.as_str()).chain(ready).collect();
    }
    let Some((state, _)) = &model.rollout else { return vec![pod.revision.as_str()] };
    let first = std::iter::once(state.start_revision(&pod.revision));
    first.chain(state.held_besides(&pod.revision)).collect()
}

/// The digest of a revision that a pod reported.
fn digest<'a>(loaded: &'a Loaded, revision: &str) -> Option<&'a String> {
    let version = loaded.versions.iter().find(|one| one.revision == revision);
    let digest = if loaded.versions.is_empty() { &loaded.digest } else { &version?.digest };
    (!digest.is_empty()).then_some(digest)
}

fn endpoint(holder: &Holder<'_>) -> Endpoint {
    let Holder { pod, by_revision } = holder;
    Endpoint {
        pod_name: pod.name.clone(),
        pod_uid: pod.uid.clone(),
        restart_count: pod.restarts,
        address: pod.address.clone().unwrap_or_default(),
        http_port: u32::from(names::HTTP_PORT),
        grpc_port: u32::from(names::GRPC_PORT),
        weight: pod.weight,
        by_revision: *by_revision,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::tests::view;
    use trustformers_proto::control::v1::BalanceBy;

    fn model(namespace: &str, name: &str, created: i64) -> RouteModel {
        RouteModel {
            key: (namespace.to_owned(), name.to_owned()),
            created: Timestamp::from_second(created).ok(),
            policy: fallback_policy(),
            shadow: None,
            stored_digest: None,
            stored_task: None,
            adapters: Vec::new(),
            rollout: None,
        }
    }

    #[test]
    fn an_adapter_is_routed_while_every_pod_has_it() {
        let text = "apiVersion: serving.trustformers.dev/v1alpha1\nkind: InferenceModel\n\
                    metadata: {name: chat, namespace: team}\n\
                    spec: {source: {uri: 'oci://x'}, runtime: {adapters: [{name: sql, source: {uri: 'oci://a'}}, \
                    {name: tone, source: {uri: 'oci://b'}}]}}\n";
        let model = RouteModel::of(&serde_yaml::from_str(text).unwrap()).unwrap();
        let pods = [view("chat", "a"), view("chat", "b")];
        let has = |names: &[&str]| Loaded {
            adapters: names.iter().map(|name| (*name).to_owned()).collect(),
            ..Loaded::default()
        };
        let routed = |loaded: BTreeMap<String, Loaded>| {
            routes(std::slice::from_ref(&model), &pods, &loaded).remove(0).adapters
        };
        assert_eq!(routed(BTreeMap::new()), ["sql", "tone"], "no pod has reported yet");
        let before = BTreeMap::from([
            ("uid-a".to_owned(), has(&["sql", "tone"])),
            ("uid-b".to_owned(), has(&["sql"])),
        ]);
        assert_eq!(routed(before), ["sql"]);
        let removed = BTreeMap::from([("uid-a".to_owned(), has(&["sql", "tone", "old"]))]);
        assert_eq!(routed(removed), ["sql", "tone"], "the spec has it no more");
    }

    #[test]
    fn the_older_model_keeps_the_bare_name() {
        let models = [model("b", "chat", 5), model("a", "chat", 9), model("c", "chat", 5)];
        let routes = routes(&models, &[], &BTreeMap::new());
        let aliases: Vec<_> = routes.iter().map(|route| route.aliases.clone()).collect();
        assert_eq!(aliases, [vec!["a/chat"], vec!["b/chat", "chat"], vec!["c/chat"]]);
    }

    #[test]
    fn a_model_without_pods_has_a_route_without_backends() {
        let routes = routes(&[model("team", "chat", 1)], &[], &BTreeMap::new());
        assert_eq!(routes[0].policy, Some(fallback_policy()));
        assert!(routes[0].backends.is_empty());
    }

    #[test]
    fn only_routable_pods_are_endpoints_of_equal_weight() {
        let mut old = view("chat", "old");
        old.revision = "r0".to_owned();
        let loading = PodView { containers_ready: false, ..view("chat", "loading") };
        let ending = PodView { deleting: true, ..view("chat", "ending") };
        let pods = [view("chat", "b"), view("chat", "a"), old, loading, ending, view("other", "x")];
        let loaded = Loaded { digest: "d1".to_owned(), ..Loaded::default() };
        let loaded = BTreeMap::from([("uid-a".to_owned(), loaded)]);
        let routes = routes(&[model("team", "chat", 1)], &pods, &loaded);
        let backends: Vec<_> = routes[0]
            .backends
            .iter()
            .map(|one| {
                let names: Vec<_> = one.endpoints.iter().map(|end| end.pod_name.as_str()).collect();
                (one.revision.as_str(), one.digest.as_str(), one.weight, names)
            })
            .collect();
        assert_eq!(backends, [("r0", "", 1, vec!["old"]), ("r1", "d1", 2, vec!["a", "b"])]);
    }

    #[test]
    fn a_pod_that_holds_two_revisions_is_an_endpoint_of_both_and_asked_by_revision() {
        use crate::rollout::state::Member;
        use crate::rollout::{Placement, RolloutPhase};
        let in_r1 = |revision: &str| Some(Member { revision: revision.to_owned(), pool: "r1".to_owned() });
        let state = RolloutState {
            phase: RolloutPhase::Shifting,
            placement: Placement::InPlace,
            stable: in_r1("r1"),
            candidate: in_r1("r2"),
            weight: 25,
            ..RolloutState::default()
        };
        let model = RouteModel { rollout: Some((state, 2)), ..model("team", "chat", 1) };
        let version = |revision: &str, is_ready| LoadedVersion {
            revision: revision.to_owned(),
            digest: format!("d-{revision}"),
            is_ready,
        };
        let loaded = |is_ready| Loaded {
            versions: vec![version("r1", true), version("r2", is_ready)],
            ..Loaded::default()
        };
        let pods = [view("chat", "a"), view("chat", "b")];
        let backends = |loaded: BTreeMap<String, Loaded>| -> Vec<_> {
            let route = routes(std::slice::from_ref(&model), &pods, &loaded).remove(0);
            let flags = |one: &Backend| one.endpoints.iter().map(|end| end.by_revision).collect::<Vec<_>>();
            route.backends.iter().map(|one| (one.revision.clone(), one.weight, flags(one))).collect()
        };
        let of = |revision: &str, weight, flags: &[bool]| (revision.to_owned(), weight, flags.to_vec());
        let one = BTreeMap::from([("uid-a".to_owned(), loaded(true)), ("uid-b".to_owned(), loaded(false))]);
        assert_eq!(backends(one), [of("r1", 7500, &[true, false]), of("r2", 2500, &[true])]);
        // A new leader has no reports yet: its first table says what the last one did.
        assert_eq!(backends(BTreeMap::new()), [of("r1", 7500, &[true, true]), of("r2", 2500, &[true, true])]);
    }

    #[test]
    fn a_model_whose_traffic_cannot_be_read_keeps_a_route_without_retries() {
        let read = |traffic: &str| {
            let text = format!(
                "apiVersion: serving.trustformers.dev/v1alpha1\nkind: InferenceModel\n\
                 metadata: {{name: chat, namespace: team}}\n\
                 spec: {{source: {{uri: 'oci://x'}}, traffic: {traffic}}}\n"
            );
            RouteModel::of(&serde_yaml::from_str(&text).unwrap()).unwrap().policy
        };
        assert_eq!(read("{timeout: 900h}"), fallback_policy());
        let good = read("{timeout: 5s, loadBalancing: RoundRobin}");
        assert_eq!((good.first_byte_timeout_ms, good.retries), (5000, 2));
        assert_eq!(good.load_balancing.unwrap().by(), BalanceBy::RoundRobin);
    }

    #[test]
    fn a_shadow_is_in_the_route_unless_it_is_the_model_itself() {
        let shadow = |name: &str| {
            let text = format!(
                "apiVersion: serving.trustformers.dev/v1alpha1\nkind: InferenceModel\n\
                 metadata: {{name: chat, namespace: team}}\n\
                 spec: {{source: {{uri: 'oci://x'}}, traffic: {{shadow: {{modelRef: {{name: {name}}}, percent: 5}}}}}}\n"
            );
            let model = RouteModel::of(&serde_yaml::from_str(&text).unwrap()).unwrap();
            routes(&[model], &[], &BTreeMap::new()).remove(0).shadow
        };
        let next = shadow("next").unwrap();
        assert_eq!((next.route.as_str(), next.revision.as_str(), next.percent), ("team/next", "", 5));
        assert_eq!(shadow("chat"), None);
    }

    #[test]
    fn a_stored_rollout_gives_the_shares() {
        let stored = |candidate: &str| {
            let text = format!(
                "apiVersion: serving.trustformers.dev/v1alpha1\nkind: InferenceModel\n\
                 metadata: {{name: chat, namespace: team}}\n\
                 spec: {{source: {{uri: 'oci://x'}}, scaling: {{replicas: 2}}}}\n\
                 status: {{stable: {{revision: r0}}, {candidate}}}\n"
            );
            RouteModel::of(&serde_yaml::from_str(&text).unwrap()).unwrap()
        };
        let candidate = "candidate: {revision: r1, weight: 5, step: 0, since: '2026-01-01T00:00:00Z'}, rollout: \
                         {phase: Shifting, placement: Surge, since: '2026-01-01T00:00:00Z', base: 2, attempt: 1}";
        let old = |name: &str| PodView { revision: "r0".to_owned(), ..view("chat", name) };
        let weights = |model: &RouteModel, pods: &[PodView]| {
            let routes = routes(std::slice::from_ref(model), pods, &BTreeMap::new());
            let backends = routes[0].backends.iter();
            backends.map(|one| (one.revision.clone(), one.weight)).collect::<Vec<_>>()
        };
        let pods = [old("a"), old("b"), view("chat", "c")];
        let pair = |old: u32, new: u32| vec![("r0".to_owned(), old), ("r1".to_owned(), new)];
        assert_eq!(weights(&stored(candidate), &pods), pair(9_500, 500));
        // Gateways have not acknowledged the candidate's pod yet: they list it, and send it nothing.
        let waits = PodView { ready: false, ..view("chat", "c") };
        assert_eq!(weights(&stored(candidate), &[old("a"), old("b"), waits]), pair(10_000, 0));
        // Nothing is rolled out: a pod of another revision, which is about to end, gets nothing.
        assert_eq!(weights(&stored(""), &pods), pair(10_000, 0));
    }

    #[test]
    fn a_route_without_reports_has_the_stored_digest() {
        let model = RouteModel {
            stored_digest: Some(("r1".to_owned(), "d9".to_owned())),
            ..model("team", "chat", 1)
        };
        let routes = routes(&[model], &[view("chat", "a")], &BTreeMap::new());
        assert_eq!(routes[0].backends[0].digest, "d9");
    }

    #[test]
    fn a_routes_task_comes_from_pods_or_the_stored_model() {
        let read = |text: &str| RouteModel::of(&serde_yaml::from_str(text).unwrap()).unwrap();
        let head = "apiVersion: serving.trustformers.dev/v1alpha1\nkind: InferenceModel\n\
                    metadata: {name: chat, namespace: team}\n";
        let stored = |task: &str, status: &str| {
            read(&format!("{head}spec: {{{task}source: {{uri: 'oci://x'}}}}\nstatus: {{{status}}}\n"))
        };
        let loaded = Loaded { digest: "d".to_owned(), task: "embed".to_owned(), ..Loaded::default() };
        let loaded = BTreeMap::from([("uid-a".to_owned(), loaded)]);
        let pods = [view("chat", "a")];
        let none = BTreeMap::new();
        let task = |model, loaded| routes(&[model], &pods, loaded)[0].task.clone();
        assert_eq!(task(stored("", ""), &none), "");
        assert_eq!(task(stored("", ""), &loaded), "embed");
        assert_eq!(task(stored("", "task: generate"), &none), "generate");
        assert_eq!(task(stored("task: embed, ", "task: generate"), &none), "embed");
        // Also for a model without pods.
        assert_eq!(routes(&[stored("", "task: embed")], &[], &none)[0].task, "embed");
    }
}
