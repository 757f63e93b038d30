//! InferenceModels as any client of the API receives them: the scenarios read the JSON and not the operator's
//! types, so that a field that is renamed by accident fails here.

use std::ops::Deref;

use anyhow::{Context, Result};
use kube::api::DynamicObject;
use serde_json::Value;

use crate::{cluster::Cluster, objects::CustomObjects, wait::Until};

/// The image with a model that generates, one file, that the test nodes hold.
pub const SMOLLM2: &str = "oci://localhost/smollm2-135m-instruct:q4_1";

/// The image with a model that calls functions, one file, that the test nodes hold.
pub const QWEN: &str = "oci://localhost/qwen2.5-coder-0.5b-instruct:q4_k_m";

/// The image with a checkpoint that embeds, several files, that the test nodes hold.
pub const MINILM: &str = "oci://localhost/all-minilm-l6-v2:f32";

/// The image with a classifier of seeded values, several files, that the test nodes hold.
pub const CLASSIFIER: &str = "oci://localhost/seeded-classifier:f32";

/// The image with an adapter of [`SMOLLM2`] of seeded values, two files, that the test nodes hold.
pub const ADAPTER: &str = "oci://localhost/seeded-adapter:f32";

/// The InferenceModels of one namespace.
#[derive(Clone)]
pub struct Models {
    objects: CustomObjects,
    namespace: String,
}

impl Deref for Models {
    type Target = CustomObjects;

    fn deref(&self) -> &CustomObjects {
        &self.objects
    }
}

/// One condition of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// Which one.
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// Machine-readable cause.
    pub reason: String,
    /// The message for people.
    pub message: String,
}

impl Models {
    /// The InferenceModels of `namespace`.
    #[must_use]
    pub fn new(cluster: &Cluster, namespace: &str) -> Self {
        let objects = CustomObjects::new(cluster, namespace, "InferenceModel");
        Self { objects, namespace: namespace.to_owned() }
    }

    /// The full name of model `name`: it is unambiguous, whatever models other namespaces have.
    #[must_use]
    pub fn full_name(&self, name: &str) -> String {
        format!("{}/{name}", self.namespace)
    }

    /// Applies the model of a file, as a user would.
    ///
    /// # Errors
    /// When kubectl refuses it.
    pub async fn apply_file(&self, cluster: &Cluster, file: &str) -> Result<()> {
        let path = cluster.settings.repository.join(file);
        let path = path.to_str().context("the checkout's path is not UTF-8")?;
        cluster.kubectl(&["--namespace", &self.namespace, "apply", "--filename", path]).stdout().await?;
        Ok(())
    }

    /// Waits until the model is ready with every replica, and its status is about its present spec.
    ///
    /// # Errors
    /// When that takes more than `limit_s`.
    pub async fn ready(&self, name: &str, limit_s: u64) -> Result<DynamicObject> {
        let what = format!("InferenceModel {name} is ready");
        self.until(name, Until::new(&what, limit_s), |model| is_ready(model).then(|| model.clone())).await
    }
}

/// True where the status is about the present spec, and every replica is ready.
#[must_use]
pub fn is_ready(model: &DynamicObject) -> bool {
    let observed = model.data.pointer("/status/observedGeneration").and_then(Value::as_i64);
    let wanted = model.data.pointer("/spec/scaling/replicas").and_then(Value::as_i64).unwrap_or(1);
    let ready = model.data.pointer("/status/readyReplicas").and_then(Value::as_i64).unwrap_or(0);
    observed == model.metadata.generation
        && ready == wanted
        && condition(model, "Ready").is_some_and(|it| it.status == "True")
}

/// The model's conditions.
#[must_use]
pub fn conditions(model: &DynamicObject) -> Vec<Condition> {
    let list = model.data.pointer("/status/conditions").and_then(Value::as_array);
    let text =
        |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let one = |it: &Value| Condition {
        kind: text(it, "type"),
        status: text(it, "status"),
        reason: text(it, "reason"),
        message: text(it, "message"),
    };
    list.into_iter().flatten().map(one).collect()
}

/// One condition of the model.
#[must_use]
pub fn condition(model: &DynamicObject, kind: &str) -> Option<Condition> {
    conditions(model).into_iter().find(|it| it.kind == kind)
}

/// A text of the model's status, by JSON pointer; empty where there is none.
#[must_use]
pub fn status_text<'a>(model: &'a DynamicObject, pointer: &str) -> &'a str {
    model.data.pointer(&format!("/status{pointer}")).and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn model(generation: i64, ready: i64, condition: &str) -> DynamicObject {
        serde_json::from_value(json!({
            "metadata": {"name": "m", "generation": generation},
            "spec": {"scaling": {"replicas": 2}},
            "status": {
                "observedGeneration": 3, "readyReplicas": ready, "stable": {"revision": "r"},
                "conditions": [{"type": "Ready", "status": condition, "reason": "R", "message": "m"}],
            },
        }))
        .unwrap()
    }

    #[test]
    fn ready_means_all_replicas_of_the_present_spec() {
        assert!(is_ready(&model(3, 2, "True")));
        assert!(!is_ready(&model(4, 2, "True")), "the status is about an older spec");
        assert!(!is_ready(&model(3, 1, "True")), "a replica is missing");
        assert!(!is_ready(&model(3, 2, "False")), "the condition is False");
        assert_eq!(status_text(&model(3, 2, "True"), "/stable/revision"), "r");
    }
}
