//! Where callers outside of the cluster reach the model.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where callers outside of the cluster reach the model: by an HTTPRoute of the Gateway API, which is made as
/// soon as the cluster has the definition of HTTPRoutes. It leads to the gateways of the release, which
/// choose the pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "(has(self.hostnames) && size(self.hostnames) > 0) == (has(self.parentRefs) && size(self.parentRefs) > 0)",
    "message": "spec.route: the Gateways of parentRefs take the requests for hostnames, so each needs the other; give both, or remove both"
}, {
    "rule": "!has(self.parentRefs) || self.parentRefs.all(one, self.parentRefs.exists_one(other, one.name == other.name && has(one.__namespace__) == has(other.__namespace__) && (!has(one.__namespace__) || one.__namespace__ == other.__namespace__) && has(one.sectionName) == has(other.sectionName) && (!has(one.sectionName) || one.sectionName == other.sectionName)))",
    "message": "spec.route.parentRefs: a listener occurs twice; remove one of them"
}]))]
pub struct RouteSettings {
    /// Host names at which the model is reached, such as `chat.example.com` or `*.chat.example.com`. A
    /// request there that names no model is one for this model.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 16),
        inner(
            length(min = 1, max = 253),
            regex(
                pattern = r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
            )
        ),
        extend("x-kubernetes-list-type" = "set")
    )]
    pub hostnames: Vec<String>,

    /// Gateways of the Gateway API that take these requests.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), extend("x-kubernetes-list-type" = "atomic"))]
    pub parent_refs: Vec<GatewayRef>,
}

/// A Gateway of the Gateway API, or one of its listeners.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GatewayRef {
    /// Name of the Gateway.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Its namespace. Default: the model's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub namespace: Option<String>,
    /// Name of its listener. Default: every listener that allows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub section_name: Option<String>,
}
