//! A parsed routing table, which is only read.
//!
//! A table from the operator is applied in full or not at all, because an acknowledgement tells the operator
//! that every pod in it can be reached through this gateway. There is one exception: if two routes claim the
//! same alias, the first gets it and the table is not refused, so that one ambiguous name does not stop all
//! routing.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use trustformers_proto::Task;
use trustformers_proto::control::v1 as wire;

use crate::ab_test::TestRule;
use crate::error::Choices;
use crate::policy::{Policy, PolicyError, SplitRule};
use crate::shadow::ShadowRule;

/// Orders tables: the lease term first, then the counter of that term's leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Transitions of the leader lease.
    pub term: u64,
    /// Counts the tables of one leader.
    pub counter: u64,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.term, self.counter)
    }
}

impl From<Version> for wire::TableVersion {
    fn from(version: Version) -> Self {
        Self { term: version.term, counter: version.counter }
    }
}

/// One container of one pod, as an acknowledgement identifies it: after a restart it is another endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct EndpointId {
    /// UID of the pod.
    pub pod_uid: String,
    /// Restarts of its container.
    pub restart_count: u32,
    /// Its address for HTTP.
    pub http: SocketAddr,
    /// Its address for gRPC.
    pub grpc: SocketAddr,
}

/// An endpoint and its name in logs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSpec {
    /// Name of the pod.
    pub pod_name: String,
    /// Identity and addresses.
    pub id: EndpointId,
    /// Capacity relative to the other endpoints of its backend.
    pub weight: u32,
    /// Whether the pod holds other revisions too, so that a request must name its backend's.
    pub by_revision: bool,
}

/// The pods of one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backend {
    /// Revision of the model.
    pub revision: String,
    /// sha256 of its weights.
    pub digest: String,
    /// Share of the route's requests, relative to the other backends'.
    pub weight: u32,
    /// Pods that serve requests.
    pub endpoints: Vec<EndpointSpec>,
    /// Whether its share is held while it has no pod, instead of going to the other backends.
    pub keeps_share: bool,
    /// The variant that it belongs to; empty where the route has no test.
    pub variant: String,
    /// The model that answers, where its pods have several; empty: the only one, or the one that is named.
    pub model: String,
}

/// One model that callers can name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// `namespace/name`.
    pub name: String,
    /// Every name that callers may use for it, without those that an earlier route has.
    pub aliases: Vec<String>,
    /// Revisions and their shares.
    pub backends: Vec<Backend>,
    /// Timeouts, retries and balancing.
    pub policy: Policy,
    /// Which request gets which revision.
    pub split: SplitRule,
    /// The A/B test whose variants share it.
    pub test: Option<TestRule>,
    /// Which requests another revision or model answers as well.
    pub shadow: Option<ShadowRule>,
    /// What the model does; `None` where the operator does not say, or says a task of a newer version.
    pub task: Option<Task>,
    /// Adapters that its pods hold.
    pub adapters: Vec<Adapter>,
}

/// An adapter of a route's model, which callers name instead of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adapter {
    /// `namespace/name:adapter`.
    pub name: String,
    /// Every name that callers may use for it.
    pub aliases: Vec<String>,
}

impl Route {
    /// Endpoints of all revisions together.
    #[must_use]
    pub fn endpoint_count(&self) -> usize {
        self.backends.iter().map(|backend| backend.endpoints.len()).sum()
    }
}

/// Why a table was not applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// It has no version.
    #[error("the table has no version")]
    NoVersion,
    /// A route has no name.
    #[error("route {index} of table {version} has no name")]
    UnnamedRoute {
        /// Version of the table.
        version: Version,
        /// Index in the list, from 0.
        index: usize,
    },
    /// Two routes have one name.
    #[error("table {version} has two routes with the name {route}")]
    DuplicateRoute {
        /// Version of the table.
        version: Version,
        /// The name.
        route: String,
    },
    /// The address of an endpoint can't be used.
    #[error("route {route}, pod {pod}: {field} is {value:?}, expected {expected}")]
    Endpoint {
        /// The route's name.
        route: String,
        /// The pod's name.
        pod: String,
        /// Which field is wrong.
        field: &'static str,
        /// Its value.
        value: String,
        /// The values that can be used.
        expected: &'static str,
    },
    /// The policy or the split of a route can't be used.
    #[error("route {route}: {cause}")]
    Policy {
        /// The route's name.
        route: String,
        /// Which field, and why.
        cause: PolicyError,
    },
}

/// No route has a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unknown;

/// A request has to name a model, because not exactly one can be meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NameRequired {
    /// The names to choose from: those of the task, or all where no route has the task.
    pub(crate) choices: Arc<Choices>,
}

/// The route that a request without a name goes to.
type Unnamed = Result<usize, NameRequired>;

/// A parsed table.
#[derive(Debug, Clone)]
pub struct Table {
    /// Which table this is.
    pub version: Version,
    /// The routes, in the operator's order.
    pub routes: Vec<Route>,
    names: HashMap<String, usize>,
    /// Length of the longest name, in bytes.
    longest_name: usize,
    /// All names, for errors.
    choices: Arc<Choices>,
    /// The route of a request that names no model, by task; a task that no route has is missing.
    unnamed: HashMap<Task, Unnamed>,
}

impl Table {
    /// Parses what the operator sent.
    ///
    /// # Errors
    /// Names the route, pod and field that can't be used. No part of such a table is used.
    pub fn parse(table: wire::RouteTable) -> Result<Self, TableError> {
        let version = table.version.ok_or(TableError::NoVersion)?;
        let version = Version { term: version.term, counter: version.counter };
        let mut names = HashMap::new();
        // Full names come first, so that no alias of another route shadows them.
        for (index, route) in table.routes.iter().enumerate() {
            if route.name.is_empty() {
                return Err(TableError::UnnamedRoute { version, index });
            }
            if names.insert(route.name.clone(), index).is_some() {
                return Err(TableError::DuplicateRoute { version, route: route.name.clone() });
            }
        }
        let mut routes = Vec::with_capacity(table.routes.len());
        for (index, route) in table.routes.into_iter().enumerate() {
            let aliases = route
                .aliases
                .into_iter()
                .filter(|alias| claim(&mut names, alias, index, &route.name))
                .collect();
            let backends = route
                .backends
                .into_iter()
                .map(|backend| parse_backend(backend, &route.name))
                .collect::<Result<_, _>>()?;
            let refused = |cause| TableError::Policy { route: route.name.clone(), cause };
            let policy = route.policy.as_ref().map_or_else(|| Ok(Policy::default()), Policy::parse);
            let policy = policy.map_err(refused)?;
            let split = route.split.map_or_else(|| Ok(SplitRule::default()), SplitRule::parse);
            let split = split.map_err(refused)?;
            let shadow = route.shadow.map(parse_shadow).transpose().map_err(refused)?;
            let task = Task::from_wire(&route.task);
            let test = route.test.and_then(TestRule::parse);
            let adapters = route.adapters.into_iter();
            // Their own names follow when all routes are known.
            let adapters = adapters.map(|name| Adapter { name, aliases: Vec::new() }).collect();
            let name = route.name;
            routes.push(Route { name, aliases, backends, policy, split, test, shadow, task, adapters });
        }
        name_adapters(&mut routes, &mut names);
        let longest_name = names.keys().map(String::len).max().unwrap_or(0);
        let choices = Arc::new(routes.iter().map(|route| route.name.as_str()).collect());
        let unnamed = unnamed(&routes);
        Ok(Self { version, routes, names, longest_name, choices, unnamed })
    }

    /// Finds the route for a model's name.
    ///
    /// # Errors
    /// No route has it.
    pub fn find(&self, model: &str) -> Result<usize, Unknown> {
        // A name of some megabytes costs nothing, not even its hash.
        if model.len() > self.longest_name {
            return Err(Unknown);
        }
        self.names.get(model).copied().ok_or(Unknown)
    }

    /// The adapter that has this name, and its route.
    pub(crate) fn adapter(&self, name: &str) -> Option<(&Route, &Adapter)> {
        let route = self.routes.get(self.find(name).ok()?)?;
        let is_named = |adapter: &&Adapter| adapter.aliases.iter().any(|alias| alias == name);
        route.adapters.iter().find(is_named).map(|adapter| (route, adapter))
    }

    /// Finds the route for a request that names no model: the only one there is, or the only one of the
    /// request's task. A route whose task is not known is not meant: it has never served, or its pods have
    /// not reported to a new operator yet.
    ///
    /// # Errors
    /// There is not exactly one.
    pub(crate) fn find_unnamed(&self, task: Option<Task>) -> Unnamed {
        if self.routes.len() == 1 {
            return Ok(0);
        }
        let of_task = task.and_then(|task| self.unnamed.get(&task).cloned());
        of_task.unwrap_or_else(|| Err(NameRequired { choices: self.choices() }))
    }

    /// The names of all routes, for an error that lists the choices.
    pub(crate) fn choices(&self) -> Arc<Choices> {
        Arc::clone(&self.choices)
    }
}

fn unnamed(routes: &[Route]) -> HashMap<Task, Unnamed> {
    let mut by_task: HashMap<Task, Vec<usize>> = HashMap::new();
    for (index, route) in routes.iter().enumerate() {
        if let Some(task) = route.task {
            by_task.entry(task).or_default().push(index);
        }
    }
    let route_of = |(task, indices): (Task, Vec<usize>)| match *indices {
        [only] => (task, Ok(only)),
        _ => {
            let names = indices.into_iter().map(|index| routes[index].name.as_str());
            (task, Err(NameRequired { choices: Arc::new(names.collect()) }))
        }
    };
    by_task.into_iter().map(route_of).collect()
}

/// Gives the alias to the route if no other route has it. An alias that equals the route's own name is valid
/// too.
fn claim(names: &mut HashMap<String, usize>, alias: &str, index: usize, route: &str) -> bool {
    let owner = *names.entry(alias.to_owned()).or_insert(index);
    if owner != index {
        tracing::warn!(alias, route, "two routes of the table claim the name; the first one gets it");
    }
    owner == index && !alias.is_empty()
}

/// Gives the adapters of all routes their names: each of the route's with theirs behind, and their own where
/// one route alone has such an adapter. Every name of a model comes before.
fn name_adapters(routes: &mut [Route], names: &mut HashMap<String, usize>) {
    let mut owners: HashMap<String, usize> = HashMap::new();
    for adapter in routes.iter().flat_map(|route| &route.adapters) {
        *owners.entry(adapter.name.clone()).or_default() += 1;
    }
    for (index, route) in routes.iter_mut().enumerate() {
        for adapter in &mut route.adapters {
            let own = std::mem::take(&mut adapter.name);
            adapter.name = format!("{}:{own}", route.name);
            let of_model = route.aliases.iter().filter(|alias| **alias != route.name);
            let mut wanted = vec![adapter.name.clone()];
            wanted.extend(of_model.map(|alias| format!("{alias}:{own}")));
            wanted.extend((owners.get(&own) == Some(&1)).then_some(own));
            let mut claim = |name: &String| {
                let is_free = !names.contains_key(name);
                if is_free {
                    names.insert(name.clone(), index);
                }
                is_free
            };
            wanted.retain(&mut claim);
            adapter.aliases = wanted;
        }
    }
}

fn parse_shadow(shadow: wire::Shadow) -> Result<ShadowRule, PolicyError> {
    let wire::Shadow { revision, percent, route, discard, variant } = shadow;
    let wrong =
        |field, value: String, expected: &str| PolicyError { field, value, expected: expected.to_owned() };
    if revision.is_empty() && route.is_empty() {
        return Err(wrong("shadow.revision", revision, "a revision of the route, or another route"));
    }
    if !(1..=100).contains(&percent) {
        return Err(wrong("shadow.percent", percent.to_string(), "1 to 100"));
    }
    Ok(ShadowRule { route, revision, percent, compare: !discard, variant })
}

fn parse_backend(backend: wire::Backend, route: &str) -> Result<Backend, TableError> {
    let endpoints = backend
        .endpoints
        .into_iter()
        .map(|endpoint| parse_endpoint(endpoint, route))
        .collect::<Result<_, _>>()?;
    Ok(Backend {
        revision: backend.revision,
        digest: backend.digest,
        weight: backend.weight,
        endpoints,
        keeps_share: backend.keeps_share,
        variant: backend.variant,
        model: backend.model,
    })
}

fn parse_endpoint(endpoint: wire::Endpoint, route: &str) -> Result<EndpointSpec, TableError> {
    let wrong = |field, value: &dyn fmt::Display, expected| TableError::Endpoint {
        route: route.to_owned(),
        pod: endpoint.pod_name.clone(),
        field,
        value: value.to_string(),
        expected,
    };
    let ip: IpAddr =
        endpoint.address.parse().map_err(|_| wrong("address", &endpoint.address, "an IP address"))?;
    let port = |field, value: u32| match u16::try_from(value) {
        Ok(port) if port > 0 => Ok(SocketAddr::new(ip, port)),
        _ => Err(wrong(field, &value, "a port from 1 to 65535")),
    };
    let http = port("http_port", endpoint.http_port)?;
    let grpc = port("grpc_port", endpoint.grpc_port)?;
    let id = EndpointId { pod_uid: endpoint.pod_uid, restart_count: endpoint.restart_count, http, grpc };
    let (weight, by_revision) = (endpoint.weight.max(1), endpoint.by_revision);
    Ok(EndpointSpec { pod_name: endpoint.pod_name, id, weight, by_revision })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(name: &str, aliases: &[&str]) -> wire::Route {
        wire::Route {
            name: name.to_owned(),
            aliases: aliases.iter().map(|alias| (*alias).to_owned()).collect(),
            backends: vec![wire::Backend {
                revision: "r1".to_owned(),
                digest: "d1".to_owned(),
                weight: 1,
                endpoints: vec![wire::Endpoint {
                    pod_name: "pod-a".to_owned(),
                    pod_uid: "uid-a".to_owned(),
                    restart_count: 2,
                    address: "10.0.0.7".to_owned(),
                    http_port: 8080,
                    grpc_port: 9090,
                    ..Default::default()
                }],
                ..Default::default()
            }],
            policy: Some(wire::Policy { first_byte_timeout_ms: 1500, retries: 2, ..Default::default() }),
            ..Default::default()
        }
    }

    fn table(routes: Vec<wire::Route>) -> wire::RouteTable {
        wire::RouteTable { version: Some(wire::TableVersion { term: 3, counter: 4 }), routes }
    }

    #[test]
    fn a_route_is_found_by_its_name_and_its_aliases() {
        let parsed = Table::parse(table(vec![
            route("default/a", &["default/a", "a"]),
            route("default/b", &["default/b", "b"]),
        ]))
        .unwrap();
        assert_eq!(parsed.version, Version { term: 3, counter: 4 });
        for (name, index) in [("default/a", 0), ("a", 0), ("default/b", 1), ("b", 1)] {
            assert_eq!(parsed.find(name), Ok(index), "{name}");
        }
        assert_eq!(parsed.find("c"), Err(Unknown));
        assert_eq!(parsed.find(""), Err(Unknown));
        assert_eq!(parsed.routes[0].policy.retries, 2);
        let endpoint = &parsed.routes[0].backends[0].endpoints[0];
        assert_eq!(endpoint.id.http, "10.0.0.7:8080".parse().unwrap());
        assert_eq!(endpoint.id.grpc, "10.0.0.7:9090".parse().unwrap());
        assert_eq!(endpoint.id.restart_count, 2);
    }

    #[test]
    fn the_only_route_needs_no_name() {
        let parsed = Table::parse(table(vec![route("default/a", &["a"])])).unwrap();
        for task in [None, Some(Task::Generate), Some(Task::Embed)] {
            assert_eq!(parsed.find_unnamed(task), Ok(0), "{task:?}");
        }
        let empty = Table::parse(table(Vec::new())).unwrap();
        assert_eq!(empty.find_unnamed(Some(Task::Embed)), Err(NameRequired { choices: Arc::default() }));
    }

    #[test]
    fn without_a_name_the_only_route_of_the_task_is_found() {
        let of = |name: &str, task: &str| wire::Route { task: task.to_owned(), ..route(name, &[]) };
        let routes =
            [("d/e", "embed"), ("d/g", "generate"), ("d/h", "generate"), ("d/u", ""), ("d/v", "newer")];
        let parsed = Table::parse(table(routes.map(|(name, task)| of(name, task)).to_vec())).unwrap();
        let choices = |task| parsed.find_unnamed(task).map_err(|required| required.choices.listed().to_vec());
        assert_eq!(choices(Some(Task::Embed)), Ok(0));
        assert_eq!(choices(Some(Task::Generate)), Err(vec!["d/g".to_owned(), "d/h".to_owned()]));
        // For a path that this gateway does not know, the error lists all.
        let all: Vec<String> = routes.map(|(name, _)| name.to_owned()).to_vec();
        assert_eq!(choices(None), Err(all.clone()));
        // So does it for a task that no route has.
        let generating = Table::parse(table(vec![of("d/g", "generate"), of("d/h", "generate")])).unwrap();
        let required = generating.find_unnamed(Some(Task::Embed)).unwrap_err();
        assert_eq!(required.choices, generating.choices());
    }

    #[test]
    fn an_unknown_name_is_refused_without_copying_the_names() {
        let routes: Vec<_> = (0..2000).map(|index| route(&format!("default/m{index}"), &[])).collect();
        let parsed = Table::parse(table(routes)).unwrap();
        assert_eq!(parsed.find(&"x".repeat(4 << 20)), Err(Unknown));
        assert!(Arc::ptr_eq(&parsed.choices(), &parsed.choices()));
        assert_eq!(parsed.choices().listed().len(), 32);
    }

    #[test]
    fn the_first_route_gets_a_doubled_alias_and_full_names_win() {
        let parsed =
            Table::parse(table(vec![route("one/a", &["a", "two/a"]), route("two/a", &["a"])])).unwrap();
        assert_eq!(parsed.find("a"), Ok(0));
        assert_eq!(parsed.find("two/a"), Ok(1));
        assert_eq!(parsed.routes[0].aliases, ["a"]);
        assert!(parsed.routes[1].aliases.is_empty());
    }

    #[test]
    fn an_adapter_has_the_names_of_its_model_and_its_own_where_no_other_has_it() {
        let with = |name: &str, aliases: &[&str], adapters: &[&str]| wire::Route {
            adapters: adapters.iter().map(|one| (*one).to_owned()).collect(),
            ..route(name, aliases)
        };
        let parsed = Table::parse(table(vec![
            with("d/a", &["d/a", "a"], &["sql", "tone"]),
            with("d/b", &["d/b", "b"], &["tone", "a"]),
        ]))
        .unwrap();
        assert_eq!(parsed.routes[0].adapters[0].aliases, ["d/a:sql", "a:sql", "sql"]);
        for (name, index) in
            [("d/a:sql", 0), ("a:tone", 0), ("sql", 0), ("d/b:tone", 1), ("a", 0), ("b:a", 1)]
        {
            assert_eq!(parsed.find(name), Ok(index), "{name}");
        }
        for name in ["tone", "a:a", "d/a:other", "other:sql"] {
            assert_eq!(parsed.find(name), Err(Unknown), "{name}");
        }
        assert_eq!(parsed.adapter("sql").map(|(_, one)| one.name.as_str()), Some("d/a:sql"));
        assert!(parsed.adapter("d/a").is_none());
    }

    #[test]
    fn an_unusable_address_refuses_the_table_by_name() {
        let mut bad = route("default/a", &[]);
        bad.backends[0].endpoints[0].address = "pod.example".to_owned();
        let text = Table::parse(table(vec![bad])).unwrap_err().to_string();
        assert!(text.contains("default/a") && text.contains("pod-a") && text.contains("address"), "{text}");
        let mut bad = route("default/a", &[]);
        bad.backends[0].endpoints[0].grpc_port = 70_000;
        let text = Table::parse(table(vec![bad])).unwrap_err().to_string();
        assert!(text.contains("grpc_port") && text.contains("70000"), "{text}");
        let mut bad = route("default/a", &[]);
        bad.split = Some(wire::Split { by: wire::SplitBy::User.into(), ..Default::default() });
        let text = Table::parse(table(vec![bad])).unwrap_err().to_string();
        assert!(text.contains("route default/a: user_header"), "{text}");
    }

    #[test]
    fn a_table_needs_a_version_and_unique_names() {
        let mut unversioned = table(Vec::new());
        unversioned.version = None;
        assert_eq!(Table::parse(unversioned).unwrap_err(), TableError::NoVersion);
        let twice = table(vec![route("default/a", &[]), route("default/a", &[])]);
        assert!(matches!(Table::parse(twice).unwrap_err(), TableError::DuplicateRoute { .. }));
        let unnamed = table(vec![route("", &[])]);
        assert!(matches!(Table::parse(unnamed).unwrap_err(), TableError::UnnamedRoute { index: 0, .. }));
    }

    #[test]
    fn versions_order_by_term_then_counter() {
        let version = |term, counter| Version { term, counter };
        assert!(version(1, 9) < version(2, 0));
        assert!(version(2, 0) < version(2, 1));
    }
}
