//! The gateway in front of the models, where other servers have some of them.
//!
//! It listens where the server would. The models that are loaded here are served by a process that listens on
//! free ports of the loopback, and are one endpoint each; the others have the endpoints of the configuration.
//! The routes are made again when the configuration or the state of a local model changes, and when the name
//! of an endpoint gets other addresses.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use futures::future::join_all;
use tokio::net::lookup_host;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use trustformers_api::inference::Models;
use trustformers_gateway::{EmbeddedSettings, Publisher, start_embedded};
use trustformers_proto::control::v1 as wire;
use trustformers_proto::v1::{ModelState, ModelStatus};
use trustformers_runtime::process::Process;

use crate::ab_test::ABTest;
use crate::config::ModelConfig;
use crate::remote::{EndpointConfig, RemoteConfig};
use crate::server::ServerError;

/// Time between two look-ups of the names of endpoints.
const LOOKUP_INTERVAL: Duration = Duration::from_secs(10);
/// A look-up that takes longer has failed; the addresses found before stay.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);

/// A running gateway, and the task that makes its routes.
pub(crate) struct Front {
    gateway: trustformers_gateway::Running,
    remote: watch::Sender<RemoteConfig>,
    follower: JoinHandle<()>,
}

impl Front {
    /// Starts the gateway in front of a process.
    ///
    /// # Errors
    /// An address that can't be listened on, or metrics that do not fit together.
    pub(crate) async fn start(
        settings: EmbeddedSettings,
        remote: RemoteConfig,
        local: LocalProcess,
        tests: Vec<ABTest>,
    ) -> Result<Self, ServerError> {
        let remote = watch::Sender::new(remote);
        let mut routes = Routes { remote: remote.subscribe(), local, found: Vec::new(), tests };
        routes.look_up().await;
        let first = routes.all();
        let gateway = start_embedded(settings, first.clone()).await?;
        let follower = tokio::spawn(routes.follow(gateway.publisher(), first));
        Ok(Self { gateway, remote, follower })
    }

    /// Where HTTP is served.
    pub(crate) fn http_address(&self) -> SocketAddr {
        self.gateway.http_address()
    }

    /// Where gRPC is served.
    pub(crate) fn grpc_address(&self) -> SocketAddr {
        self.gateway.grpc_address()
    }

    /// What was counted of a test.
    pub(crate) fn test_counts(&self, test: &ABTest) -> Vec<wire::VariantCounts> {
        self.gateway.test_counts(&test.uid())
    }

    /// What takes a changed configuration.
    pub(crate) fn remote(&self) -> watch::Sender<RemoteConfig> {
        self.remote.clone()
    }

    /// Ends; gives whether every answer in flight could be given.
    pub(crate) async fn drain(self) -> bool {
        self.follower.abort();
        self.gateway.finish().await == 0
    }
}

/// The process that has the models that are loaded here.
pub(crate) struct LocalProcess {
    http: SocketAddr,
    grpc: SocketAddr,
    models: watch::Receiver<Models>,
}

impl LocalProcess {
    /// The addresses and the models of a process.
    pub(crate) fn of(process: &Process) -> Self {
        let models = process.models().statuses().watch();
        Self { http: process.http_address(), grpc: process.grpc_address(), models }
    }
}

/// What the routes are made of.
struct Routes {
    remote: watch::Receiver<RemoteConfig>,
    local: LocalProcess,
    /// The addresses of the endpoints, as they were found last.
    found: Vec<FoundEndpoint>,
    /// Tests, each of which takes the route of its name.
    tests: Vec<ABTest>,
}

/// An endpoint of the configuration, and its addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
struct FoundEndpoint {
    endpoint: EndpointConfig,
    addresses: BTreeSet<IpAddr>,
}

impl Routes {
    /// Makes the routes again after each change, for ever.
    async fn follow(mut self, publisher: Publisher, mut in_force: Vec<wire::Route>) {
        let mut ticks = tokio::time::interval(LOOKUP_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // The first comes at once, and the names have just been looked up.
        ticks.tick().await;
        loop {
            let looks_up = tokio::select! {
                changed = self.remote.changed() => match changed {
                    Ok(()) => true,
                    Err(_the_server_has_ended) => return,
                },
                changed = self.local.models.changed() => match changed {
                    Ok(()) => false,
                    Err(_the_server_has_ended) => return,
                },
                _tick = ticks.tick() => true,
            };
            if looks_up {
                self.look_up().await;
            }
            let routes = self.all();
            if routes == in_force {
                continue;
            }
            match publisher.publish(routes.clone()) {
                Ok(()) => in_force = routes,
                Err(error) => tracing::error!(%error, "the routes to the models stay as they were"),
            }
        }
    }

    /// Looks up the names of all endpoints.
    async fn look_up(&mut self) {
        let endpoints: Vec<EndpointConfig> = {
            let remote = self.remote.borrow_and_update();
            remote.models.iter().flat_map(|model| model.endpoints.iter().cloned()).collect()
        };
        let before = std::mem::take(&mut self.found);
        let of_last_time = |endpoint: &EndpointConfig| {
            let found = before.iter().find(|found| found.endpoint == *endpoint);
            found.map(|found| found.addresses.clone()).unwrap_or_default()
        };
        let found = endpoints.into_iter().map(|endpoint| {
            let last = of_last_time(&endpoint);
            async move {
                let addresses = addresses(&endpoint).await.unwrap_or(last);
                FoundEndpoint { endpoint, addresses }
            }
        });
        self.found = join_all(found).await;
    }

    /// The routes of all models; those that other servers have come first.
    fn all(&mut self) -> Vec<wire::Route> {
        let remote = self.remote.borrow();
        let policy = remote.policy();
        let mut routes: Vec<wire::Route> =
            remote.models.iter().map(|model| self.remote_route(model, &policy)).collect();
        let local = self.local.models.borrow_and_update().clone();
        for model in local.iter() {
            if routes.iter().any(|route| route.name == model.name) {
                tracing::warn!(model = model.name, "a loaded model has the name of one with endpoints");
            } else {
                routes.push(local_route(model, self.local.http, self.local.grpc));
            }
        }
        for test in &self.tests {
            test.take_route(&mut routes);
        }
        routes
    }

    fn remote_route(&self, model: &ModelConfig, policy: &wire::Policy) -> wire::Route {
        let endpoints = model.endpoints.iter().flat_map(|endpoint| {
            let found = self.found.iter().find(|found| found.endpoint == *endpoint);
            let addresses = found.map(|found| &found.addresses).into_iter().flatten();
            addresses.map(move |address| remote_endpoint(endpoint, *address))
        });
        wire::Route {
            name: model.name.clone(),
            aliases: model.names().cloned().collect(),
            backends: vec![wire::Backend {
                revision: "remote".to_owned(),
                weight: 1,
                endpoints: endpoints.collect(),
                ..Default::default()
            }],
            policy: Some(policy.clone()),
            task: trustformers_proto::Task::to_wire(model.task),
            ..Default::default()
        }
    }
}

/// The addresses of an endpoint's host; none where they could not be found.
async fn addresses(endpoint: &EndpointConfig) -> Option<BTreeSet<IpAddr>> {
    if let Ok(address) = endpoint.host.parse() {
        return Some(BTreeSet::from([address]));
    }
    let why = match timeout(LOOKUP_TIMEOUT, lookup_host((endpoint.host.as_str(), endpoint.port))).await {
        Ok(Ok(found)) => return Some(found.map(|address| address.ip()).collect()),
        Ok(Err(error)) => error.to_string(),
        Err(_elapsed) => "the look-up took too long".to_owned(),
    };
    tracing::warn!(%endpoint, "the name of an endpoint could not be looked up: {why}");
    None
}

fn remote_endpoint(endpoint: &EndpointConfig, address: IpAddr) -> wire::Endpoint {
    let port = endpoint.port;
    wire::Endpoint {
        pod_name: endpoint.to_string(),
        // The same in every process that balances these endpoints, as the consistent hash needs it.
        pod_uid: SocketAddr::new(address, port).to_string(),
        address: address.to_string(),
        http_port: port.into(),
        grpc_port: endpoint.grpc_port.unwrap_or(port).into(),
        weight: endpoint.weight,
        ..Default::default()
    }
}

/// The route of a model that is loaded here. It has its endpoint once the model is ready.
fn local_route(model: &ModelStatus, http: SocketAddr, grpc: SocketAddr) -> wire::Route {
    let endpoint = wire::Endpoint {
        pod_name: "this process".to_owned(),
        pod_uid: http.to_string(),
        address: http.ip().to_string(),
        http_port: http.port().into(),
        grpc_port: grpc.port().into(),
        weight: 1,
        ..Default::default()
    };
    let is_ready = model.state() == ModelState::Ready;
    let revision = if model.revision.is_empty() { "local" } else { &model.revision };
    wire::Route {
        name: model.name.clone(),
        aliases: model.names.clone(),
        backends: vec![wire::Backend {
            revision: revision.to_owned(),
            digest: model.digest.clone(),
            weight: 1,
            endpoints: is_ready.then_some(endpoint).into_iter().collect(),
            ..Default::default()
        }],
        policy: Some(wire::Policy { accept_tenant: true, accept_priority: true, ..Default::default() }),
        task: model.task.clone(),
        adapters: model.adapters.clone(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn routes(config: &str, local: Vec<ModelStatus>) -> Routes {
        let config: Config = config.parse().unwrap();
        let models: Models = local.into();
        let local = LocalProcess {
            http: address("127.0.0.1:1"),
            grpc: address("127.0.0.1:2"),
            models: watch::Sender::new(models).subscribe(),
        };
        let remote = watch::Sender::new(RemoteConfig::of(&config)).subscribe();
        Routes { remote, local, found: Vec::new(), tests: Vec::new() }
    }

    #[tokio::test]
    async fn a_model_has_the_endpoints_of_its_configuration_or_this_process() {
        let status = |name: &str, state: ModelState| ModelStatus {
            name: name.to_owned(),
            names: vec![name.to_owned()],
            state: state.into(),
            task: "generate".to_owned(),
            ..Default::default()
        };
        let mut routes = routes(
            "models: [{name: far, aliases: [f], task: embed, endpoints: [{url: 'http://10.0.0.1:80', weight: 2}, \
             {url: 'http://[::1]:81', grpc_port: 82}]}]",
            vec![
                status("near", ModelState::Ready),
                status("soon", ModelState::Loading),
                status("far", ModelState::Ready),
            ],
        );
        routes.look_up().await;
        let all = routes.all();
        let names: Vec<_> = all.iter().map(|route| route.name.as_str()).collect();
        assert_eq!(names, ["far", "near", "soon"], "the configured endpoints come before a local model");
        assert_eq!((all[0].task.as_str(), all[0].aliases.len()), ("embed", 2));
        let endpoints = |index: usize| {
            let of = |endpoint: &wire::Endpoint| {
                (endpoint.address.clone(), endpoint.http_port, endpoint.grpc_port, endpoint.weight)
            };
            all[index].backends[0].endpoints.iter().map(of).collect::<Vec<_>>()
        };
        assert_eq!(endpoints(0), [("10.0.0.1".to_owned(), 80, 80, 2), ("::1".to_owned(), 81, 82, 1)]);
        assert_eq!(endpoints(1), [("127.0.0.1".to_owned(), 1, 2, 1)]);
        assert!(endpoints(2).is_empty());
        assert_eq!(all[0].policy.as_ref().unwrap().retries, 3);
        assert_eq!(all[1].policy.as_ref().unwrap().retries, 0);
    }

    #[tokio::test]
    async fn a_name_that_is_not_found_keeps_the_addresses_of_before() {
        let mut routes =
            routes("models: [{name: a, endpoints: [{url: 'http://no-such-host.invalid:80'}]}]", Vec::new());
        routes.look_up().await;
        assert!(routes.all()[0].backends[0].endpoints.is_empty());
        routes.found[0].addresses.insert(IpAddr::from([10, 0, 0, 1]));
        routes.look_up().await;
        assert_eq!(routes.all()[0].backends[0].endpoints.len(), 1);
    }
}
