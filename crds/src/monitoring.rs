//! How the model's metrics are collected.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::scheduling::LabelValue;

/// How the model's metrics are collected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "!(has(self.serviceMonitor) && self.serviceMonitor && has(self.podMonitor) && self.podMonitor)",
    "message": "spec.monitoring: serviceMonitor and podMonitor would both read the pods that serve, so that everything counts twice; remove one of them"
}]))]
pub struct Monitoring {
    /// Whether the model has a ServiceMonitor, by which the Prometheus Operator finds its pods that serve. It
    /// is made as soon as the cluster has the definition of ServiceMonitors.
    #[serde(default)]
    pub service_monitor: bool,

    /// Whether the model has a PodMonitor, by which the Prometheus Operator finds all its pods, those that
    /// load included. It is made as soon as the cluster has the definition of PodMonitors.
    #[serde(default)]
    pub pod_monitor: bool,

    /// Time between two readings of a pod's `/metrics`.
    #[serde(default = "default_interval")]
    #[schemars(length(min = 2, max = 16), regex(pattern = r"^([0-9]{1,6}(s|m|h))+$"))]
    pub interval: String,

    /// Further labels of the ServiceMonitor or the PodMonitor: a Prometheus selects those that it reads by
    /// them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16), with = "BTreeMap<String, LabelValue>")]
    pub labels: BTreeMap<String, String>,
}

fn default_interval() -> String {
    "30s".to_owned()
}

impl Default for Monitoring {
    fn default() -> Self {
        Self {
            service_monitor: false,
            pod_monitor: false,
            interval: default_interval(),
            labels: BTreeMap::new(),
        }
    }
}
