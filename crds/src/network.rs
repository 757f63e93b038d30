//! Who may reach the model's pods.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Who may reach the model's pods, by a NetworkPolicy of Kubernetes. The cluster's network plugin must
/// enforce such policies.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "self.callers != 'Anywhere' || !has(self.namespaces) || size(self.namespaces) == 0",
    "message": "spec.networkPolicy.namespaces: callers Anywhere admits every namespace already; set callers to Gateways, or remove namespaces"
}]))]
pub struct NetworkPolicySettings {
    /// Whether the model has a policy. Without one, every pod of the cluster reaches all ports; the admin
    /// port still asks for the operator's token.
    #[serde(default)]
    pub enabled: bool,

    /// Who reaches the serving ports, 8080 and 9090. The admin port, 9092, is the operator's alone.
    #[serde(default)]
    pub callers: NetworkCallers,

    /// Namespaces whose pods reach the serving ports too, such as that of a Prometheus which reads
    /// `/metrics`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 16),
        inner(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")),
        extend("x-kubernetes-list-type" = "set")
    )]
    pub namespaces: Vec<String>,
}

/// Who reaches the serving ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum NetworkCallers {
    /// The gateways of the release, and the operator, which listens to reports.
    #[default]
    Gateways,
    /// Everybody.
    Anywhere,
}
