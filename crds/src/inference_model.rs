//! `InferenceModel`: one model and how it is served.
#![allow(unreachable_pub, reason = "the derive repeats the struct inside a function")]

use kube::{CustomResource, CustomResourceExt, KubeSchema};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use trustformers_proto::Task;
use trustformers_proto::yaml::{self, YamlError};

use crate::{
    InferenceModelStatus, Monitoring, NetworkPolicySettings, PodSettings, Rollout, RouteSettings, Runtime,
    Scaling, Source, Traffic,
};

/// Longest name of an InferenceModel. Names of its children add at most 18 characters, and the name of a
/// Service has at most 63: 45 + 18 = 63.
pub const MAX_NAME_CHARS: usize = 45;

/// One model and how it is served.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[kube(
    group = "serving.trustformers.dev",
    version = "v1alpha1",
    kind = "InferenceModel",
    plural = "inferencemodels",
    shortname = "imodel",
    category = "trustformers",
    namespaced,
    doc = "One model and how it is served.",
    status = "InferenceModelStatus",
    derive = "PartialEq",
    scale(
        spec_replicas_path = ".spec.scaling.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    validation = Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]{0,43}[a-z0-9])?$')").message(
        "metadata.name: at most 45 characters, lower-case letters, digits and '-', starting with a letter, because a Service gets this name"
    ),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status",
        description = "Whether the desired revision serves with all its replicas"
    ),
    printcolumn(
        name = "Device",
        type_ = "string",
        json_path = ".status.device",
        description = "The device that the model runs on"
    ),
    printcolumn(
        name = "Revision",
        type_ = "string",
        json_path = ".status.stable.revision",
        description = "The revision that serves"
    ),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(
        name = "Candidate",
        type_ = "string",
        json_path = ".status.candidate.revision",
        description = "The revision that is rolled out",
        priority = 1
    ),
    printcolumn(
        name = "Weight",
        type_ = "integer",
        json_path = ".status.candidate.weight",
        description = "Percent of the requests that the candidate gets",
        priority = 1
    ),
    printcolumn(
        name = "Rollout",
        type_ = "string",
        json_path = ".status.rollout.phase",
        description = "Where the rollout is",
        priority = 1
    ),
    printcolumn(name = "URL", type_ = "string", json_path = ".status.url"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "Replicas",
        type_ = "integer",
        json_path = ".status.readyReplicas",
        description = "Pods that serve",
        priority = 1
    ),
    printcolumn(
        name = "Digest",
        type_ = "string",
        json_path = ".status.digest",
        description = "sha256 of the loaded file",
        priority = 1
    )
)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "!has(self.traffic) || !has(self.traffic.hedge) || (has(self.task) && self.task != 'generate')",
    "message": "spec.traffic.hedge: only requests that encode are sent twice; set spec.task to embed, or remove hedge"
}, {
    "rule": "!has(self.scaling) || !has(self.scaling.metrics) || !self.scaling.metrics.exists(one, has(one.cpu)) || has(self.runtime) && has(self.runtime.resources) && (has(self.runtime.resources.requests) && 'cpu' in self.runtime.resources.requests || has(self.runtime.resources.limits) && 'cpu' in self.runtime.resources.limits)",
    "message": "spec.scaling.metrics: cpu is in percent of a request that the pods do not have; set spec.runtime.resources.requests.cpu"
}, {
    "rule": "!has(self.scaling) || !has(self.scaling.metrics) || !self.scaling.metrics.exists(one, has(one.memory)) || has(self.runtime) && has(self.runtime.resources) && (has(self.runtime.resources.requests) && 'memory' in self.runtime.resources.requests || has(self.runtime.resources.limits) && 'memory' in self.runtime.resources.limits)",
    "message": "spec.scaling.metrics: memory is in percent of a request that the pods do not have; set spec.runtime.resources.requests.memory"
}, {
    "rule": "!has(self.task) || self.task == 'generate' || !has(self.runtime) || !has(self.runtime.adapters) || self.runtime.adapters.size() == 0",
    "message": "spec.runtime.adapters: adapters are for models that generate text; remove them"
}]))]
pub struct InferenceModelSpec {
    /// The model's task: `generate` continues texts, `embed` turns texts into vectors, `classify` gives texts
    /// the scores of labels, `rerank` orders documents by a query. Default: the task that its files state.
    /// Files for another task are refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "task_schema")]
    pub task: Option<Task>,

    /// Where the model's files come from.
    pub source: Source,

    /// How the model is run.
    #[serde(default)]
    pub runtime: Runtime,

    /// How many pods serve it.
    #[serde(default)]
    pub scaling: Scaling,

    /// How it moves to another source or to other settings of the engine.
    #[serde(default)]
    pub rollout: Rollout,

    /// How gateways handle its requests.
    #[serde(default)]
    pub traffic: Traffic,

    /// Where callers outside of the cluster reach it.
    #[serde(default)]
    pub route: RouteSettings,

    /// How many of its pods may be evicted at the same time.
    #[serde(default)]
    pub disruption: Disruption,

    /// Who may reach its pods.
    #[serde(default)]
    pub network_policy: NetworkPolicySettings,

    /// How its metrics are collected.
    #[serde(default)]
    pub monitoring: Monitoring,

    /// Where its pods run, and their labels and annotations.
    #[serde(default)]
    pub pod: PodSettings,
}

/// The tasks of this version, each with its word.
fn task_schema(_: &mut SchemaGenerator) -> Schema {
    let words: Vec<&str> = Task::ALL.iter().map(|task| task.as_str()).collect();
    json_schema!({"type": "string", "nullable": true, "enum": words})
}

/// How many of the model's pods may be evicted at the same time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Disruption {
    /// Serving pods that node drains may evict at the same time. Pods that do not serve may always be
    /// evicted.
    #[serde(default = "default_max_unavailable")]
    #[schemars(range(min = 0, max = 1000))]
    pub max_unavailable: i32,
}

fn default_max_unavailable() -> i32 {
    1
}

impl Default for Disruption {
    fn default() -> Self {
        Self { max_unavailable: default_max_unavailable() }
    }
}

/// The CustomResourceDefinition as YAML, as the committed copies hold it.
///
/// # Errors
/// Only if the schema cannot be written as YAML, which the tests rule out.
pub fn crd_yaml() -> Result<String, YamlError> {
    yaml::write(&InferenceModel::crd())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn schema() -> Value {
        let crd = serde_json::to_value(InferenceModel::crd()).unwrap();
        crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone()
    }

    /// Calls `visit` with the dotted path of every schema node below `node`.
    fn walk(node: &Value, path: &str, visit: &mut dyn FnMut(&str, &Value)) {
        visit(path, node);
        for (name, property) in node["properties"].as_object().into_iter().flatten() {
            walk(property, &format!("{path}.{name}"), visit);
        }
        if node["items"].is_object() {
            walk(&node["items"], &format!("{path}[]"), visit);
        }
        if node["additionalProperties"].is_object() {
            walk(&node["additionalProperties"], &format!("{path}{{}}"), visit);
        }
    }

    #[test]
    fn a_four_line_model_has_every_default() {
        let model: InferenceModel = serde_yaml::from_str(
            "apiVersion: serving.trustformers.dev/v1alpha1\nkind: InferenceModel\nmetadata: {name: chat}\nspec: {source: {uri: 'oci://x/y:z'}}\n",
        )
        .unwrap();
        insta::assert_yaml_snapshot!(model.spec);
    }

    #[test]
    fn the_schema_has_the_defaults_of_the_types() {
        let spec = &schema()["properties"]["spec"]["properties"];
        assert_eq!(spec["scaling"]["default"], serde_json::to_value(Scaling::default()).unwrap());
        assert_eq!(spec["runtime"]["default"], serde_json::to_value(Runtime::default()).unwrap());
        assert_eq!(spec["rollout"]["default"], serde_json::to_value(Rollout::default()).unwrap());
        assert_eq!(spec["traffic"]["default"], serde_json::to_value(Traffic::default()).unwrap());
        let network = serde_json::to_value(NetworkPolicySettings::default()).unwrap();
        assert_eq!(spec["networkPolicy"]["default"], network);
        assert_eq!(spec["scaling"]["properties"]["minReplicas"]["default"], 1);
        assert_eq!(spec["monitoring"]["default"], serde_json::to_value(Monitoring::default()).unwrap());
        let behavior = &spec["scaling"]["properties"]["behavior"]["properties"];
        assert_eq!(behavior["scaleDown"]["default"]["stabilization"], "5m");
        assert_eq!(spec["scaling"]["properties"]["replicas"]["default"], 1);
        assert_eq!(spec["runtime"]["properties"]["batching"]["properties"]["maxQueue"]["default"], 512);
    }

    #[test]
    fn all_fields_of_the_spec_are_bounded_and_documented() {
        let mut faults = Vec::new();
        walk(&schema()["properties"]["spec"], "spec", &mut |path, node| {
            let bounded = match node["type"].as_str() {
                Some("string") => node["maxLength"].is_u64() || node["enum"].is_array(),
                Some("array") => node["maxItems"].is_u64() && node["x-kubernetes-list-type"].is_string(),
                Some("object") if node["additionalProperties"].is_object() => node["maxProperties"].is_u64(),
                _ => true,
            };
            if !bounded {
                faults.push(format!("{path} is not bounded: {node}"));
            }
            let is_field = !path.ends_with(']') && !path.ends_with('}');
            if is_field && !node["description"].is_string() {
                faults.push(format!("{path} has no description"));
            }
        });
        assert!(faults.is_empty(), "{faults:#?}");
    }

    #[test]
    fn the_rule_on_the_uri_lists_the_supported_schemes() {
        let rules = schema()["properties"]["spec"]["properties"]["source"]["properties"]["uri"]
            ["x-kubernetes-validations"]
            .to_string();
        assert!(rules.contains("oci://IMAGE") && rules.contains("pvc://CLAIM[/PATH]"), "{rules}");
    }

    #[test]
    fn adapters_are_keyed_by_name_and_for_models_that_generate() {
        let spec = &schema()["properties"]["spec"];
        let adapters = &spec["properties"]["runtime"]["properties"]["adapters"];
        assert_eq!(adapters["x-kubernetes-list-map-keys"], serde_json::json!(["name"]));
        let source = &adapters["items"]["properties"]["source"]["properties"]["uri"];
        let rules = source["x-kubernetes-validations"].to_string();
        assert!(rules.contains("oci://IMAGE") && !rules.contains("https"), "{rules}");
        assert!(spec["x-kubernetes-validations"].to_string().contains("spec.runtime.adapters: "), "{spec}");
    }

    #[test]
    fn reserved_keys_are_refused_by_the_schema() {
        let pod = &schema()["properties"]["spec"]["properties"]["pod"]["properties"];
        for field in ["labels", "annotations"] {
            let rules = pod[field]["x-kubernetes-validations"].to_string();
            assert!(
                rules.contains("app.kubernetes.io/") && rules.contains("serving.trustformers.dev/"),
                "{rules}"
            );
            assert!(rules.contains(&format!("spec.pod.{field}: ")), "{rules}");
        }
    }

    #[test]
    fn the_task_has_the_words_of_the_protocol() {
        let task = &schema()["properties"]["spec"]["properties"]["task"];
        assert_eq!(task["enum"], serde_json::json!(["generate", "embed", "classify", "rerank"]));
    }

    #[test]
    fn the_definition_names_the_group_and_version_of_this_crate() {
        let crd = InferenceModel::crd();
        assert_eq!(crd.spec.group, crate::GROUP);
        assert_eq!(crd.spec.versions[0].name, crate::VERSION);
        assert!(crd_yaml().unwrap().contains("specReplicasPath: .spec.scaling.replicas"));
    }
}
