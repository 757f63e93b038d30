//! The routing table, made from models and pods.
//!
//! A model is in the table as soon as it exists, with no endpoint at first: a gateway can then tell "not ready yet"
//! from "unknown". An invalid edit never takes a route away. The table is a pure function of what is stored, so a new
//! leader's first table equals the last one of its predecessor.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use trustformers_crds::InferenceModel;
use trustformers_proto::control::v1::{Backend, Endpoint, Policy, Route};

use crate::pods::PodView;
use crate::{names, span};

/// Namespace and name of a model.
pub type ModelKey = (String, String);

/// What the table needs to know of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteModel {
    /// Namespace and name.
    pub key: ModelKey,
    /// When it was created: the older of two models keeps a bare name.
    pub created: Option<Timestamp>,
    /// From a request's arrival to the first byte of its answer.
    pub first_byte_timeout: Duration,
    /// More attempts while no byte of the answer has come.
    pub retries: u32,
    /// The digest that its status names, and the revision it belongs to.
    pub known_digest: Option<(String, String)>,
    /// The task that its spec or else its status names.
    pub known_task: Option<String>,
}

/// What a pod reported that its route tells.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Loaded {
    /// The digest of what it loaded.
    pub digest: String,
    /// What that does, such as `generate`; empty where the pod did not say so.
    pub task: String,
}

/// Used where a stored timeout cannot be read; the schema refuses such a value today.
const FALLBACK_TIMEOUT: Duration = Duration::from_secs(60);

impl RouteModel {
    /// Reads a stored model; `None` where it lacks a name or namespace.
    #[must_use]
    pub fn of(model: &InferenceModel) -> Option<Self> {
        let stable = model.status.as_ref().and_then(|status| status.stable.as_ref());
        Some(Self {
            key: (model.metadata.namespace.clone()?, model.metadata.name.clone()?),
            created: model.metadata.creation_timestamp.as_ref().map(|time| time.0),
            first_byte_timeout: span::parse(&model.spec.traffic.timeout).unwrap_or(FALLBACK_TIMEOUT),
            retries: model.spec.traffic.retries,
            known_digest: stable.and_then(|stable| Some((stable.revision.clone(), stable.digest.clone()?))),
            known_task: model
                .spec
                .task
                .map(|task| task.as_str().to_owned())
                .or_else(|| model.status.as_ref()?.task.clone()),
        })
    }
}

/// Who holds each bare name: the older model, and of two equally old ones the first by namespace.
#[must_use]
pub fn bare_names<'a>(models: impl IntoIterator<Item = &'a RouteModel>) -> BTreeMap<String, ModelKey> {
    let mut holders: BTreeMap<String, &RouteModel> = BTreeMap::new();
    for model in models {
        holders
            .entry(model.key.1.clone())
            .and_modify(|holder| {
                if age(model) < age(holder) {
                    *holder = model;
                }
            })
            .or_insert(model);
    }
    holders.into_iter().map(|(name, model)| (name, model.key.clone())).collect()
}

fn age(model: &RouteModel) -> (Timestamp, &ModelKey) {
    (model.created.unwrap_or(Timestamp::MAX), &model.key)
}

/// All routes, sorted, so that equal inputs give equal tables. `loaded` is what pods reported, by UID.
#[must_use]
pub fn routes(models: &[RouteModel], pods: &[PodView], loaded: &BTreeMap<String, Loaded>) -> Vec<Route> {
    let holders = bare_names(models);
    let mut by_model: BTreeMap<(&str, &str), Vec<&PodView>> = BTreeMap::new();
    for pod in pods.iter().filter(|pod| pod.routable()) {
        by_model.entry((&pod.namespace, &pod.model)).or_default().push(pod);
    }
    let mut routes: Vec<Route> = models
        .iter()
        .map(|model| {
            let (namespace, name) = &model.key;
            let full = format!("{namespace}/{name}");
            let mut aliases = vec![full.clone()];
            if holders.get(name) == Some(&model.key) {
                aliases.push(name.clone());
            }
            let pods = by_model.remove(&(namespace.as_str(), name.as_str())).unwrap_or_default();
            let mut reported = pods.iter().filter_map(|pod| Some(&loaded.get(&pod.uid)?.task));
            let task = reported.find(|task| !task.is_empty()).or(model.known_task.as_ref());
            Route {
                name: full,
                aliases,
                task: task.cloned().unwrap_or_default(),
                backends: backends(model, pods, loaded),
                policy: Some(Policy {
                    first_byte_timeout_ms: u64::try_from(model.first_byte_timeout.as_millis()).unwrap_or(0),
                    retries: model.retries,
                }),
            }
        })
        .collect();
    routes.sort_by(|one, other| one.name.cmp(&other.name));
    routes
}

/// One backend for each revision; each pod gets the same share, whatever revision it is of.
fn backends(model: &RouteModel, pods: Vec<&PodView>, loaded: &BTreeMap<String, Loaded>) -> Vec<Backend> {
    let mut by_revision: BTreeMap<&str, Vec<&PodView>> = BTreeMap::new();
    for pod in pods {
        by_revision.entry(&pod.revision).or_default().push(pod);
    }
    let backend = |(revision, mut pods): (&str, Vec<&PodView>)| {
        pods.sort_by(|one, other| one.name.cmp(&other.name));
        let reported = pods.iter().find_map(|pod| loaded.get(&pod.uid)).map(|loaded| &loaded.digest);
        let known = model.known_digest.as_ref().filter(|(of, _)| of == revision).map(|(_, digest)| digest);
        Backend {
            revision: revision.to_owned(),
            digest: reported.or(known).cloned().unwrap_or_default(),
            weight: u32::try_from(pods.len()).unwrap_or(u32::MAX),
            endpoints: pods.into_iter().map(endpoint).collect(),
        }
    };
    by_revision.into_iter().map(backend).collect()
}

fn endpoint(pod: &PodView) -> Endpoint {
    Endpoint {
        pod_name: pod.name.clone(),
        pod_uid: pod.uid.clone(),
        restart_count: pod.restarts,
        address: pod.address.clone().unwrap_or_default(),
        http_port: u32::from(names::HTTP_PORT),
        grpc_port: u32::from(names::GRPC_PORT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::tests::view;

    fn model(namespace: &str, name: &str, created: i64) -> RouteModel {
        RouteModel {
            key: (namespace.to_owned(), name.to_owned()),
            created: Timestamp::from_second(created).ok(),
            first_byte_timeout: Duration::from_secs(60),
            retries: 2,
            known_digest: None,
            known_task: None,
        }
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
        assert_eq!(routes[0].policy, Some(Policy { first_byte_timeout_ms: 60_000, retries: 2 }));
        assert!(routes[0].backends.is_empty());
    }

    #[test]
    fn only_routable_pods_are_endpoints_and_each_pod_weighs_the_same() {
        let mut old = view("chat", "old");
        old.revision = "r0".to_owned();
        let loading = PodView { containers_ready: false, ..view("chat", "loading") };
        let ending = PodView { deleting: true, ..view("chat", "ending") };
        let pods = [view("chat", "b"), view("chat", "a"), old, loading, ending, view("other", "x")];
        let loaded = Loaded { digest: "d1".to_owned(), ..Loaded::default() };
        let loaded = BTreeMap::from([("uid-a".to_owned(), loaded)]);
        let routes = routes(&[model("team", "chat", 1)], &pods, &loaded);
        let seen: Vec<_> = routes[0]
            .backends
            .iter()
            .map(|one| {
                let names: Vec<_> = one.endpoints.iter().map(|end| end.pod_name.as_str()).collect();
                (one.revision.as_str(), one.digest.as_str(), one.weight, names)
            })
            .collect();
        assert_eq!(seen, [("r0", "", 1, vec!["old"]), ("r1", "d1", 2, vec!["a", "b"])]);
    }

    #[test]
    fn a_new_leader_takes_the_digest_from_the_status() {
        let known =
            RouteModel { known_digest: Some(("r1".to_owned(), "d9".to_owned())), ..model("team", "chat", 1) };
        let routes = routes(&[known], &[view("chat", "a")], &BTreeMap::new());
        assert_eq!(routes[0].backends[0].digest, "d9");
    }

    #[test]
    fn a_route_tells_its_task_from_its_pods_or_else_from_what_is_stored() {
        let read = |text: &str| RouteModel::of(&serde_yaml::from_str(text).unwrap()).unwrap();
        let head = "apiVersion: serving.trustformers.dev/v1alpha1\nkind: InferenceModel\n\
                    metadata: {name: chat, namespace: team}\n";
        let stored = |task: &str, status: &str| {
            read(&format!("{head}spec: {{{task}source: {{uri: 'oci://x'}}}}\nstatus: {{{status}}}\n"))
        };
        let loaded = Loaded { digest: "d".to_owned(), task: "embed".to_owned() };
        let loaded = BTreeMap::from([("uid-a".to_owned(), loaded)]);
        let pods = [view("chat", "a")];
        let none = BTreeMap::new();
        let task = |model, loaded| routes(&[model], &pods, loaded)[0].task.clone();
        assert_eq!(task(stored("", ""), &none), "");
        assert_eq!(task(stored("", ""), &loaded), "embed");
        assert_eq!(task(stored("", "task: generate"), &none), "generate");
        assert_eq!(task(stored("task: embed, ", "task: generate"), &none), "embed");
        // Of a model without pods it is known as well.
        assert_eq!(routes(&[stored("", "task: embed")], &[], &none)[0].task, "embed");
    }
}
