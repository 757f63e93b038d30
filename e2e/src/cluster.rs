//! The test cluster: a client for its API, and the tools that people use on it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};

use crate::{command::Invocation, settings::Settings};

/// The test cluster's network: the only one besides loopback that a scenario sends anything to.
const CLUSTER_NETWORK: &str = "198.18.0.";

/// A connection to the test cluster.
#[derive(Clone)]
pub struct Cluster {
    /// Paths and versions of this run.
    pub settings: Settings,
    /// Client with the administrator's rights.
    pub client: Client,
}

impl Cluster {
    /// Connects to the cluster that the environment names.
    ///
    /// # Errors
    /// When the environment is incomplete, or names a cluster that is not the test cluster.
    pub async fn connect() -> Result<Self> {
        let settings = Settings::from_env()?;
        let kubeconfig = Kubeconfig::read_from(&settings.kubeconfig)
            .with_context(|| format!("could not read {}", settings.kubeconfig.display()))?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        let host = config.cluster_url.host().unwrap_or_default().to_owned();
        ensure!(
            is_test_address(&host),
            "the scenarios install and delete things, and {host} is not the test cluster's address ({CLUSTER_NETWORK}0/24)"
        );
        Ok(Self { settings, client: Client::try_from(config)? })
    }

    /// Prepares `kubectl ARGUMENTS`.
    #[must_use]
    pub fn kubectl(&self, arguments: &[&str]) -> Invocation {
        self.tool("kubectl", arguments)
    }

    /// Prepares `helm ARGUMENTS`. Helm waits on its own for what it installs, hence the longer limit.
    #[must_use]
    pub fn helm(&self, arguments: &[&str]) -> Invocation {
        self.tool("helm", arguments).limit(Duration::from_secs(150))
    }

    fn tool(&self, name: &str, arguments: &[&str]) -> Invocation {
        let tool = Invocation::new(&self.settings.bin.join(name), arguments);
        tool.env("KUBECONFIG", &self.settings.kubeconfig)
    }

    /// The output of `kubectl describe` for an object.
    ///
    /// # Errors
    /// When there is no such object.
    pub async fn describe(&self, namespace: &str, kind: &str, name: &str) -> Result<String> {
        self.kubectl(&["--namespace", namespace, "describe", kind, name]).stdout().await
    }

    /// Names and internal addresses of the nodes that run containers, sorted by name. Nodes that are only
    /// objects have no address.
    ///
    /// # Errors
    /// When there is no such node, or one has an address outside the test cluster's network.
    pub async fn nodes(&self) -> Result<Vec<(String, String)>> {
        let list = Api::<Node>::all(self.client.clone()).list(&kube::api::ListParams::default()).await?;
        let mut nodes = Vec::new();
        for node in list {
            let name = node.metadata.name.unwrap_or_default();
            let addresses = node.status.and_then(|it| it.addresses).unwrap_or_default();
            let Some(address) = addresses.into_iter().find(|it| it.type_ == "InternalIP") else { continue };
            let address = address.address;
            ensure!(
                is_test_address(&address),
                "node {name} has {address}, which is outside {CLUSTER_NETWORK}0/24"
            );
            nodes.push((name, address));
        }
        ensure!(!nodes.is_empty(), "the cluster has no node that runs containers");
        nodes.sort();
        Ok(nodes)
    }

    /// What a pod answers to `GET path` on its HTTP port, fetched through the API server.
    ///
    /// # Errors
    /// When the pod does not answer with a success.
    pub async fn pod_get(&self, namespace: &str, pod: &str, path: &str) -> Result<String> {
        let uri = format!("/api/v1/namespaces/{namespace}/pods/{pod}:8080/proxy{path}");
        let request = hyper::http::Request::get(&uri).body(Vec::new())?;
        self.client.request_text(request).await.with_context(|| format!("GET {uri}"))
    }
}

/// True for loopback and for the test cluster's own network.
#[must_use]
pub fn is_test_address(host: &str) -> bool {
    let loopback = host.parse::<std::net::IpAddr>().is_ok_and(|it| it.is_loopback());
    loopback || (host.starts_with(CLUSTER_NETWORK) && host.parse::<std::net::Ipv4Addr>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::is_test_address;

    #[test]
    fn only_the_test_network_and_loopback_are_allowed() {
        assert!(is_test_address("198.18.0.11") && is_test_address("127.0.0.1") && is_test_address("::1"));
        assert!(!is_test_address("10.0.0.1") && !is_test_address("198.18.0.1.example.org"));
    }
}
