//! Custom resources of one kind as any client of the API receives them.

use anyhow::{Context, Result};
use kube::{
    Api,
    api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams},
};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{cluster::Cluster, wait::Until};

/// The objects of one kind in one namespace.
#[derive(Clone)]
pub struct CustomObjects {
    /// The API for them.
    pub api: Api<DynamicObject>,
    resource: ApiResource,
}

impl CustomObjects {
    /// The objects of `kind` in `namespace`.
    #[must_use]
    pub fn new(cluster: &Cluster, namespace: &str, kind: &str) -> Self {
        let kind = GroupVersionKind::gvk("serving.trustformers.dev", "v1alpha1", kind);
        let resource = ApiResource::from_gvk(&kind);
        Self { api: Api::namespaced_with(cluster.client.clone(), namespace, &resource), resource }
    }

    /// Applies an object with this spec, as `kubectl apply --server-side` would.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub async fn apply(&self, name: &str, spec: impl Serialize) -> Result<DynamicObject> {
        let object = json!({
            "apiVersion": self.resource.api_version, "kind": self.resource.kind,
            "metadata": {"name": name}, "spec": spec,
        });
        let applied = self.api.patch(name, &PatchParams::apply("scenarios"), &Patch::Apply(object)).await;
        applied.with_context(|| format!("could not apply {} {name}", self.resource.kind))
    }

    /// Merges a change into an object's spec.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub async fn change(&self, name: &str, spec: Value) -> Result<()> {
        let patch = Patch::Merge(json!({"spec": spec}));
        let changed = self.api.patch(name, &PatchParams::default(), &patch).await;
        changed.map(drop).with_context(|| format!("could not change {} {name}", self.resource.kind))
    }

    /// Deletes an object.
    ///
    /// # Errors
    /// When there is no such object.
    pub async fn delete(&self, name: &str) -> Result<()> {
        self.api.delete(name, &DeleteParams::default()).await?;
        Ok(())
    }

    /// Waits until `look` finds something in the object.
    ///
    /// # Errors
    /// When the limit passes.
    pub async fn until<T>(
        &self,
        name: &str,
        until: Until<'_>,
        look: impl Fn(&DynamicObject) -> Option<T>,
    ) -> Result<T> {
        until.object(self.api.clone(), name, |found| found.and_then(&look)).await
    }
}
