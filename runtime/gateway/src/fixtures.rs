//! Routing tables for the tests of this crate.

use trustformers_proto::control::v1 as wire;

/// Builds a table.
#[derive(Debug, Clone)]
pub(crate) struct TableText(wire::RouteTable);

impl TableText {
    pub(crate) fn new(term: u64, counter: u64) -> Self {
        Self(wire::RouteTable { version: Some(wire::TableVersion { term, counter }), routes: Vec::new() })
    }

    pub(crate) fn route(mut self, name: &str, aliases: &[&str]) -> Self {
        self.0.routes.push(wire::Route {
            name: name.to_owned(),
            aliases: aliases.iter().map(|alias| (*alias).to_owned()).collect(),
            backends: Vec::new(),
            policy: Some(wire::Policy { retries: 1, ..Default::default() }),
            ..Default::default()
        });
        self
    }

    /// Adds a backend to the last route.
    pub(crate) fn backend(mut self, revision: &str, weight: u32, endpoints: &[wire::Endpoint]) -> Self {
        self.0.routes.last_mut().unwrap().backends.push(wire::Backend {
            revision: revision.to_owned(),
            digest: format!("digest of {revision}"),
            weight,
            endpoints: endpoints.to_vec(),
            ..Default::default()
        });
        self
    }

    pub(crate) fn wire(&self) -> wire::RouteTable {
        self.0.clone()
    }
}

/// A pod at an address that is never connected to; the number makes it unique.
pub(crate) fn endpoint_at(pod: &str, number: u8) -> wire::Endpoint {
    wire::Endpoint {
        pod_name: pod.to_owned(),
        pod_uid: format!("uid-{pod}"),
        restart_count: 0,
        address: format!("192.0.2.{number}"),
        http_port: 8080,
        grpc_port: 9090,
        ..Default::default()
    }
}
