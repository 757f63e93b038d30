//! What is read of an object when it arrives from the API server.
//!
//! Most of the text of an object is not read: managed fields are the larger half of many, and of a pod's spec
//! two fields matter. These types skip such text, and keep what is only compared as text. A burst of new
//! models brings some 20 events for each, so most of the operator's processor time would go into values that
//! are dropped at once.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use k8s_openapi::api::core::v1::{ConfigMapVolumeSource, Pod, PodSpec, PodStatus, Volume};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{
    FieldsV1, ManagedFieldsEntry, ObjectMeta, OwnerReference, Time,
};
use kube::Resource;
use kube::api::ApiResource;
use kube::core::error_boundary::InvalidObject;
use kube::core::{DeserializeGuard, DynamicResourceScope, NamespaceResourceScope};
use serde::de::{Error, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;
use trustformers_control::kinds::ChildKind;
use trustformers_control::names;
use trustformers_crds::{InferenceModel, InferenceModelSpec, InferenceModelStatus};

/// The metadata of an object. `M` is what is read of an entry of its managed fields.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct MetaText<M> {
    name: Option<String>,
    generate_name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    generation: Option<i64>,
    creation_timestamp: Option<Time>,
    deletion_timestamp: Option<Time>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
    owner_references: Option<Vec<OwnerReference>>,
    finalizers: Option<Vec<String>>,
    managed_fields: Option<Vec<M>>,
}

impl<M> MetaText<M> {
    /// The metadata, and the entries of its managed fields.
    fn split(self) -> (ObjectMeta, Vec<M>) {
        let metadata = ObjectMeta {
            name: self.name,
            generate_name: self.generate_name,
            namespace: self.namespace,
            uid: self.uid,
            resource_version: self.resource_version,
            generation: self.generation,
            creation_timestamp: self.creation_timestamp,
            deletion_timestamp: self.deletion_timestamp,
            labels: self.labels,
            annotations: self.annotations,
            owner_references: self.owner_references,
            finalizers: self.finalizers,
            ..ObjectMeta::default()
        };
        (metadata, self.managed_fields.unwrap_or_default())
    }

    fn metadata(self) -> ObjectMeta {
        self.split().0
    }
}

/// A stored model, or what can be read of one that this version cannot decode.
#[derive(Debug, Clone)]
pub struct StoredModel(pub DeserializeGuard<InferenceModel>);

#[derive(Deserialize)]
struct ModelText {
    metadata: MetaText<IgnoredAny>,
    spec: InferenceModelSpec,
    #[serde(default)]
    status: Option<InferenceModelStatus>,
}

#[derive(Deserialize)]
struct AnyText {
    metadata: MetaText<IgnoredAny>,
}

impl<'de> Deserialize<'de> for StoredModel {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // The text stays until it is known whether all of it can be decoded.
        let text = Box::<RawValue>::deserialize(deserializer)?;
        let model = match serde_json::from_str::<ModelText>(text.get()) {
            Ok(ModelText { metadata, spec, status }) => {
                Ok(InferenceModel { metadata: metadata.metadata(), spec, status })
            }
            Err(error) => {
                let object: AnyText = serde_json::from_str(text.get()).map_err(D::Error::custom)?;
                let error = without_position(&error.to_string()).to_owned();
                Err(InvalidObject { error, metadata: object.metadata.metadata() })
            }
        };
        Ok(Self(DeserializeGuard(model)))
    }
}

/// The words of an error. Its position in the text differs with every version of an object, and the same
/// error must have the same words.
fn without_position(error: &str) -> &str {
    error.rsplit_once(" at line ").map_or(error, |(words, _)| words)
}

impl Resource for StoredModel {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        InferenceModel::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        InferenceModel::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        InferenceModel::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        InferenceModel::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        self.0.meta()
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        self.0.meta_mut()
    }
}

/// A stored pod: its metadata, its node, the ConfigMaps that it mounts, and its status.
#[derive(Debug, Clone)]
pub struct StoredPod(pub Pod);

#[derive(Deserialize)]
struct PodText {
    metadata: MetaText<IgnoredAny>,
    #[serde(default)]
    spec: PodSpecText,
    #[serde(default)]
    status: Option<PodStatus>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PodSpecText {
    node_name: Option<String>,
    volumes: Option<Vec<VolumeText>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct VolumeText {
    config_map: Option<ConfigMapText>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ConfigMapText {
    name: String,
}

impl From<VolumeText> for Volume {
    fn from(volume: VolumeText) -> Self {
        let source = |one: ConfigMapText| ConfigMapVolumeSource { name: one.name, ..Default::default() };
        Self { config_map: volume.config_map.map(source), ..Self::default() }
    }
}

impl<'de> Deserialize<'de> for StoredPod {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let PodText { metadata, spec, status } = PodText::deserialize(deserializer)?;
        let volumes = spec.volumes.map(|volumes| volumes.into_iter().map(Volume::from).collect());
        let spec = PodSpec { node_name: spec.node_name, volumes, ..PodSpec::default() };
        Ok(Self(Pod { metadata: metadata.metadata(), spec: Some(spec), status }))
    }
}

impl Resource for StoredPod {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        Pod::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        Pod::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        Pod::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        Pod::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.0.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.0.metadata
    }
}

/// A stored child: its metadata, and the rest as text.
#[derive(Debug, Clone)]
pub struct StoredObject {
    /// Its metadata. The fields in its managed fields are there only where another manager than the operator
    /// has set some.
    pub metadata: ObjectMeta,
    /// The members beside `apiVersion`, `kind`, `metadata` and `status`, in their order.
    members: Vec<Member>,
    status: Option<Box<RawValue>>,
}

/// A member of an object.
#[derive(Debug, Clone)]
struct Member {
    key: String,
    value: Box<RawValue>,
}

/// An entry of the managed fields.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ManagerText {
    manager: Option<String>,
    operation: Option<String>,
    subresource: Option<String>,
    #[serde(rename = "fieldsV1")]
    fields: Option<Box<RawValue>>,
}

/// Whether managed fields are another manager's. What a subresource sets (status, scale) is not part of the
/// desired object.
pub(crate) fn is_foreign(entry: &ManagedFieldsEntry) -> bool {
    is_foreign_manager(entry.manager.as_deref(), entry.subresource.as_deref())
}

fn is_foreign_manager(manager: Option<&str>, subresource: Option<&str>) -> bool {
    manager != Some(names::MANAGER) && subresource.unwrap_or("").is_empty()
}

/// The entries of managed fields; their fields only where they are compared.
fn entries(managers: Vec<ManagerText>) -> Vec<ManagedFieldsEntry> {
    let with_fields =
        managers.iter().any(|one| is_foreign_manager(one.manager.as_deref(), one.subresource.as_deref()));
    let fields = |text: Option<Box<RawValue>>| {
        let text = text.filter(|_| with_fields)?;
        Some(FieldsV1(serde_json::from_str(text.get()).ok()?))
    };
    let entry = |one: ManagerText| ManagedFieldsEntry {
        manager: one.manager,
        operation: one.operation,
        subresource: one.subresource,
        fields_v1: fields(one.fields),
        ..ManagedFieldsEntry::default()
    };
    managers.into_iter().map(entry).collect()
}

impl StoredObject {
    /// The object as JSON, with this metadata and without its status.
    ///
    /// # Errors
    /// Only if the metadata cannot be written, which no stored object causes.
    pub fn text(&self, kind: &ChildKind, metadata: &ObjectMeta) -> Result<String, serde_json::Error> {
        // Items of a list come without `apiVersion` and `kind`.
        let mut text = format!(
            "{{\"apiVersion\":{},\"kind\":{},\"metadata\":{}",
            serde_json::to_string(&kind.api_version())?,
            serde_json::to_string(kind.kind)?,
            serde_json::to_string(metadata)?,
        );
        for Member { key, value } in &self.members {
            text.push(',');
            text.push_str(&serde_json::to_string(key)?);
            text.push(':');
            text.push_str(value.get());
        }
        text.push('}');
        Ok(text)
    }

    /// The object with its managed fields, without its status.
    ///
    /// # Errors
    /// As [`StoredObject::text`].
    pub fn value(&self, kind: &ChildKind) -> Result<Value, serde_json::Error> {
        serde_json::from_str(&self.text(kind, &self.metadata)?)
    }

    /// One of its members, as far as `T` reads it; none where there is none, or it is another type.
    #[must_use]
    pub fn member<T: for<'a> Deserialize<'a>>(&self, key: &str) -> Option<T> {
        let member = self.members.iter().find(|member| member.key == key)?;
        serde_json::from_str(member.value.get()).ok()
    }

    /// Its status, as far as `T` reads it; none where there is none, or it is another type.
    #[must_use]
    pub fn status<T: for<'a> Deserialize<'a>>(&self) -> Option<T> {
        serde_json::from_str(self.status.as_ref()?.get()).ok()
    }
}

struct ObjectVisitor;

impl<'de> Visitor<'de> for ObjectVisitor {
    type Value = StoredObject;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of the API server")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<StoredObject, A::Error> {
        let (mut metadata, mut members, mut status) = (None, Vec::new(), None);
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "apiVersion" | "kind" => {
                    let _: IgnoredAny = map.next_value()?;
                }
                "metadata" => metadata = Some(map.next_value::<MetaText<ManagerText>>()?),
                "status" => status = Some(map.next_value()?),
                _ => members.push(Member { key, value: map.next_value()? }),
            }
        }
        let (mut metadata, managers) = metadata.ok_or_else(|| A::Error::missing_field("metadata"))?.split();
        metadata.managed_fields = Some(entries(managers)).filter(|entries| !entries.is_empty());
        Ok(StoredObject { metadata, members, status })
    }
}

impl<'de> Deserialize<'de> for StoredObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ObjectVisitor)
    }
}

impl Resource for StoredObject {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(kind: &ApiResource) -> Cow<'_, str> {
        kind.kind.as_str().into()
    }

    fn group(kind: &ApiResource) -> Cow<'_, str> {
        kind.group.as_str().into()
    }

    fn version(kind: &ApiResource) -> Cow<'_, str> {
        kind.version.as_str().into()
    }

    fn api_version(kind: &ApiResource) -> Cow<'_, str> {
        kind.api_version.as_str().into()
    }

    fn plural(kind: &ApiResource) -> Cow<'_, str> {
        kind.plural.as_str().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// What is read of the response to a write whose object the operator knows already.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Receipt {
    #[serde(default)]
    metadata: ReceiptMeta,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ReceiptMeta {
    resource_version: Option<String>,
}

impl Receipt {
    /// The resource version after the write.
    pub(crate) fn version(&self) -> Option<u64> {
        self.metadata.resource_version.as_deref()?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::WatchEvent;
    use serde_json::json;
    use trustformers_control::kinds::{DEPLOYMENT, SERVICE};
    use trustformers_control::pods::PodView;

    fn event<T: for<'a> Deserialize<'a>>(object: &Value) -> T {
        let text = json!({"type": "MODIFIED", "object": object}).to_string();
        match serde_json::from_str(&text).unwrap() {
            WatchEvent::Modified(object) => object,
            other => panic!("{other:?}"),
        }
    }

    fn managed(manager: &str, fields: &Value) -> Value {
        json!({"manager": manager, "operation": "Update", "apiVersion": "v1", "time": "2026-01-01T00:00:00Z",
            "fieldsType": "FieldsV1", "fieldsV1": fields})
    }

    #[test]
    fn a_model_is_decoded_without_its_managed_fields() {
        let object = json!({"apiVersion": "serving.trustformers.dev/v1alpha1", "kind": "InferenceModel",
            "metadata": {"name": "chat", "namespace": "team", "uid": "u", "resourceVersion": "7", "generation": 2,
                "creationTimestamp": "2026-01-01T00:00:00Z", "managedFields": [managed("kubectl", &json!({"f:spec": {}}))]},
            "spec": {"source": {"uri": "oci://x"}}, "status": {"observedGeneration": 2}});
        let StoredModel(DeserializeGuard(model)) = event(&object);
        let model = model.unwrap();
        let mut expected: InferenceModel = serde_json::from_value(object).unwrap();
        expected.metadata.managed_fields = None;
        assert_eq!(serde_json::to_value(model).unwrap(), serde_json::to_value(expected).unwrap());
    }

    #[test]
    fn a_model_that_cannot_be_decoded_keeps_its_metadata_and_the_words_of_the_error() {
        let decode = |version: &str| {
            let object = json!({"metadata": {"name": "chat", "namespace": "team", "resourceVersion": version},
                "spec": {"source": {"uri": 7}}});
            let StoredModel(DeserializeGuard(model)) = event(&object);
            model.unwrap_err()
        };
        let invalid = decode("7");
        assert_eq!(invalid.metadata.name.as_deref(), Some("chat"));
        assert!(invalid.error.contains("invalid type: integer `7`"), "{}", invalid.error);
        assert_eq!(invalid.error, decode("70000").error, "another version has the same error");
    }

    #[test]
    fn all_that_is_read_of_a_pod_is_decoded() {
        let object = json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "p", "namespace": "team", "uid": "u", "resourceVersion": "7",
                "labels": {"serving.trustformers.dev/model": "chat", "serving.trustformers.dev/revision": "r"},
                "annotations": {"serving.trustformers.dev/weight": "3"}, "deletionTimestamp": "2026-01-01T00:00:00Z",
                "managedFields": [managed("kubelet", &json!({"f:status": {}}))]},
            "spec": {"nodeName": "n1", "containers": [{"name": "runtime", "image": "i"}],
                "volumes": [{"name": "config", "configMap": {"name": "c", "defaultMode": 420}}, {"name": "tmp", "emptyDir": {}}]},
            "status": {"phase": "Running", "podIP": "10.0.0.1",
                "conditions": [{"type": "ContainersReady", "status": "True"}],
                "containerStatuses": [{"name": "runtime", "image": "i", "imageID": "", "ready": true,
                    "restartCount": 2, "state": {"running": {}}}]}});
        let StoredPod(pod) = event(&object);
        let whole: Pod = serde_json::from_value(object).unwrap();
        assert_eq!(PodView::of(&pod).unwrap(), PodView::of(&whole).unwrap());
        let mounted = |pod: &Pod| {
            let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
            volumes.filter_map(|volume| Some(volume.config_map.as_ref()?.name.clone())).collect::<Vec<_>>()
        };
        assert_eq!(mounted(&pod), ["c"]);
    }

    #[test]
    fn the_rest_of_a_child_is_kept_as_it_is_written() {
        let object = json!({"kind": "Deployment", "apiVersion": "apps/v1", "metadata": {"name": "d",
            "managedFields": [managed(names::MANAGER, &json!({"f:spec": {}}))]},
            "spec": {"replicas": 2, "z": 1, "a": [1.50]}, "status": {"replicas": 1}});
        let stored: StoredObject = event(&object);
        let metadata = ObjectMeta { name: Some("d".to_owned()), ..ObjectMeta::default() };
        assert_eq!(
            stored.text(&DEPLOYMENT, &metadata).unwrap(),
            r#"{"apiVersion":"apps/v1","kind":"Deployment","metadata":{"name":"d"},"spec":{"replicas":2,"z":1,"a":[1.5]}}"#
        );
        assert_eq!(stored.status::<Value>(), Some(json!({"replicas": 1})));
        assert_eq!(stored.member::<Value>("spec").unwrap()["replicas"], 2);
        assert_eq!(stored.member::<Value>("data"), None);
        let managers = stored.metadata.managed_fields.unwrap();
        assert_eq!(managers[0].manager.as_deref(), Some(names::MANAGER));
        assert_eq!(managers[0].fields_v1, None, "only the operator has written to it");
    }

    #[test]
    fn fields_of_other_managers_are_kept() {
        let fields = json!({"f:spec": {"f:selector": {"f:a": {}}}});
        let object = json!({"metadata": {"name": "s", "managedFields":
            [managed(names::MANAGER, &json!({"f:spec": {}})), managed("kubectl-edit", &fields)]}, "spec": {}});
        let stored: StoredObject = event(&object);
        let value = stored.value(&SERVICE).unwrap();
        assert_eq!(value["metadata"]["managedFields"][1]["fieldsV1"], fields);
        assert_eq!(value["metadata"]["managedFields"][0]["fieldsV1"], json!({"f:spec": {}}));
    }

    #[test]
    fn an_object_without_metadata_is_refused() {
        let error = serde_json::from_str::<StoredObject>(r#"{"kind": "Service", "spec": {}}"#).unwrap_err();
        assert!(error.to_string().contains("missing field `metadata`"), "{error}");
    }

    #[test]
    fn a_receipt_has_the_version_of_the_write() {
        let version = |text: &str| serde_json::from_str::<Receipt>(text).unwrap().version();
        assert_eq!(
            version(r#"{"kind": "Pod", "metadata": {"resourceVersion": "12"}, "spec": {}}"#),
            Some(12)
        );
        assert_eq!(version("{}"), None);
    }
}
