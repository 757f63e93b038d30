//! The children of all models as the API server holds them, as far as the operator knows.
//!
//! Of a child its text is kept without status and managed fields, and the hash of the desired object that it
//! was compared with. A change of its status alone, or the echo of a write, compares nothing again.
//!
//! Watches fill this cache, and every write of the operator puts the response into it. So a reconcile reads
//! its own writes before the watch delivers them, and an older watch event never replaces a newer response:
//! Kubernetes resource versions are ordered. Children are indexed by the UID of their owner. The label only
//! selects what is watched.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::apps::v1::{Deployment, DeploymentCondition, DeploymentSpec, DeploymentStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ManagedFieldsEntry, ObjectMeta, OwnerReference};
use k8s_openapi::jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::watch;
use trustformers_control::drift::{FieldPath, foreign_fields};
use trustformers_control::exposure::RouteReport;
use trustformers_control::kinds::{AUTOSCALER, CHILDREN, ChildKind, DEPLOYMENT, HTTP_ROUTE};
use trustformers_control::names;
use trustformers_control::scaling::AutoscalerReport;
use trustformers_crds::GROUP;

use crate::decode::{StoredObject, is_foreign};

/// One stored child.
#[derive(Debug)]
pub struct Child {
    /// Its kind.
    pub kind: &'static ChildKind,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// Its resource version.
    pub version: String,
    /// The model in its controller reference.
    pub owner: Option<OwnerReference>,
    /// When it was created.
    pub created: Option<Timestamp>,
    /// Its labels.
    labels: BTreeMap<String, String>,
    /// The object as JSON, without what changes when nothing is edited: status, versions, managed fields. A
    /// tree of values takes several times as much memory.
    text: Box<str>,
    /// What is read of a Deployment; none for other kinds.
    pub deployment: Option<Arc<Deployment>>,
    /// What an autoscaler reports of itself; none for other kinds, and before its first report.
    pub autoscaler: Option<AutoscalerReport>,
    /// What Gateways report of an HTTPRoute; none for other kinds, and before the first of them does.
    pub exposure: Option<RouteReport>,
    /// What other field managers set in the part that belongs to the operator alone.
    pub foreign: Vec<FieldPath>,
    /// Index of the managed fields that a POST of the operator left, while it has applied nothing.
    pub posted: Option<usize>,
}

impl Child {
    /// Reads a stored object; `None` if it lacks metadata that every stored object has.
    #[must_use]
    pub fn of(kind: &'static ChildKind, mut object: StoredObject) -> Option<Self> {
        let meta = &object.metadata;
        let is_model = |owner: &&OwnerReference| {
            owner.controller == Some(true)
                && owner.kind == "InferenceModel"
                && owner.api_version.split('/').next() == Some(GROUP)
        };
        let owner = meta.owner_references.iter().flatten().find(is_model).cloned();
        let (namespace, name) = (meta.namespace.clone()?, meta.name.clone()?);
        let (uid, version) = (meta.uid.clone()?, meta.resource_version.clone()?);
        let created = meta.creation_timestamp.as_ref().map(|time| time.0);
        let labels = meta.labels.clone().unwrap_or_default();
        let managers = meta.managed_fields.as_deref().unwrap_or_default();
        let posted = posted(managers);
        let foreign = match managers.iter().any(is_foreign) {
            true => foreign_fields(&object.value(kind).ok()?, kind),
            false => Vec::new(),
        };
        let status = |of: &ChildKind| (kind == of).then(|| object.status::<Value>()).flatten();
        let autoscaler = status(&AUTOSCALER).as_ref().and_then(AutoscalerReport::of);
        let exposure = status(&HTTP_ROUTE).as_ref().and_then(RouteReport::of);
        let deployment = (kind == &DEPLOYMENT).then(|| Arc::new(trimmed(&object)));
        let mut metadata = std::mem::take(&mut object.metadata);
        metadata.managed_fields = None;
        metadata.resource_version = None;
        metadata.generation = None;
        let text = object.text(kind, &metadata).ok()?.into_boxed_str();
        Some(Self {
            kind,
            namespace,
            name,
            uid,
            version,
            owner,
            created,
            labels,
            text,
            deployment,
            autoscaler,
            exposure,
            foreign,
            posted,
        })
    }

    /// The object with its resource version, without its status.
    #[must_use]
    pub fn object(&self) -> Value {
        // The text was written from an object, so it can be read.
        let mut object: Value = serde_json::from_str(&self.text).unwrap_or_default();
        object["metadata"]["resourceVersion"] = json!(self.version);
        object
    }

    /// Whether two versions of a child differ in nothing that is read.
    fn is_same(&self, other: &Self) -> bool {
        self.uid == other.uid
            && self.text == other.text
            && self.deployment == other.deployment
            && self.autoscaler == other.autoscaler
            && self.exposure == other.exposure
            && self.foreign == other.foreign
            && self.posted == other.posted
    }

    /// Whether the model with this UID owns it.
    #[must_use]
    pub fn is_owned_by(&self, uid: &str) -> bool {
        self.owner.as_ref().is_some_and(|owner| owner.uid == uid)
    }

    /// The value of one of its labels.
    #[must_use]
    pub fn label(&self, key: &str) -> Option<&str> {
        self.labels.get(key).map(String::as_str)
    }

    fn key(&self) -> ChildKey {
        ChildKey { kind: self.kind.kind, namespace: self.namespace.clone(), name: self.name.clone() }
    }

    /// Resource versions are numbers; one that is not is older than all others.
    fn ordinal(&self) -> u64 {
        self.version.parse().unwrap_or(0)
    }
}

/// The managed fields of a POST: the operator's, while it has applied nothing.
fn posted(managers: &[ManagedFieldsEntry]) -> Option<usize> {
    let is_own = |entry: &ManagedFieldsEntry, operation: &str| {
        entry.manager.as_deref() == Some(names::MANAGER)
            && entry.operation.as_deref() == Some(operation)
            && entry.subresource.as_deref().unwrap_or("").is_empty()
    };
    if managers.iter().any(|entry| is_own(entry, "Apply")) {
        return None;
    }
    managers.iter().position(|entry| is_own(entry, "Update"))
}

/// What is read of a Deployment: how many pods it should have, and how many of them are as its template says.
fn trimmed(object: &StoredObject) -> Deployment {
    #[derive(Deserialize)]
    struct Replicas {
        replicas: Option<i32>,
    }
    let status: DeploymentStatus = object.status().unwrap_or_default();
    let failures = |conditions: Vec<DeploymentCondition>| {
        conditions.into_iter().filter(|one| one.type_ == "ReplicaFailure").collect::<Vec<_>>()
    };
    let replicas = object.member::<Replicas>("spec").and_then(|spec| spec.replicas);
    Deployment {
        metadata: ObjectMeta { generation: object.metadata.generation, ..ObjectMeta::default() },
        spec: Some(DeploymentSpec { replicas, ..DeploymentSpec::default() }),
        status: Some(DeploymentStatus {
            conditions: status.conditions.map(failures).filter(|conditions| !conditions.is_empty()),
            observed_generation: status.observed_generation,
            replicas: status.replicas,
            updated_replicas: status.updated_replicas,
            ..DeploymentStatus::default()
        }),
    }
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct ChildKey {
    kind: &'static str,
    namespace: String,
    name: String,
}

#[derive(Debug)]
struct Entry {
    child: Arc<Child>,
    /// The last list in which it was found, or the number of lists when the operator wrote it.
    listed: u64,
    /// Hash of the desired object that it was found to cover.
    covers: Option<String>,
}

/// A child that was added to the cache.
struct Inserted {
    /// The newest version.
    child: Arc<Child>,
    /// Whether anything differs that is read.
    is_news: bool,
}

#[derive(Debug, Default)]
struct Index {
    entries: BTreeMap<ChildKey, Entry>,
    by_owner: HashMap<String, BTreeSet<ChildKey>>,
    /// Number of lists of each kind that have started.
    lists: HashMap<&'static str, u64>,
    /// Foreign fields, by UID of the child, that came back when they were removed: an admission webhook adds
    /// them.
    irremovable: HashMap<String, Vec<FieldPath>>,
}

impl Index {
    fn remove(&mut self, key: &ChildKey) {
        let Some(entry) = self.entries.remove(key) else { return };
        if let Some(owner) = &entry.child.owner
            && let Some(keys) = self.by_owner.get_mut(&owner.uid)
        {
            keys.remove(key);
            if keys.is_empty() {
                self.by_owner.remove(&owner.uid);
            }
        }
    }

    fn insert(&mut self, child: Child) -> Inserted {
        let key = child.key();
        let listed = self.lists.get(child.kind.kind).copied().unwrap_or(0);
        let (mut covers, mut is_news) = (None, true);
        if let Some(entry) = self.entries.get_mut(&key) {
            if entry.child.uid == child.uid && entry.child.ordinal() >= child.ordinal() {
                entry.listed = listed;
                return Inserted { child: Arc::clone(&entry.child), is_news: false };
            }
            is_news = !entry.child.is_same(&child);
            if entry.child.uid == child.uid && entry.child.text == child.text {
                covers = entry.covers.take();
            }
            if entry.child.uid != child.uid {
                self.irremovable.remove(&entry.child.uid);
            }
        }
        self.remove(&key);
        if let Some(owner) = &child.owner {
            self.by_owner.entry(owner.uid.clone()).or_default().insert(key.clone());
        }
        let child = Arc::new(child);
        self.entries.insert(key, Entry { child: Arc::clone(&child), listed, covers });
        Inserted { child, is_news }
    }
}

/// The cache.
#[derive(Debug)]
pub struct Children {
    index: Mutex<Index>,
    /// Kinds that were listed at least one time.
    complete: watch::Sender<BTreeSet<&'static str>>,
}

impl Default for Children {
    fn default() -> Self {
        Self { index: Mutex::default(), complete: watch::Sender::new(BTreeSet::new()) }
    }
}

impl Children {
    fn lock(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One child.
    #[must_use]
    pub fn get(&self, kind: &'static ChildKind, namespace: &str, name: &str) -> Option<Arc<Child>> {
        let key = ChildKey { kind: kind.kind, namespace: namespace.to_owned(), name: name.to_owned() };
        self.lock().entries.get(&key).map(|entry| Arc::clone(&entry.child))
    }

    /// All children of the model with this UID.
    #[must_use]
    pub fn of_owner(&self, uid: &str) -> Vec<Arc<Child>> {
        let index = self.lock();
        let keys = index.by_owner.get(uid).into_iter().flatten();
        keys.filter_map(|key| index.entries.get(key)).map(|entry| Arc::clone(&entry.child)).collect()
    }

    /// Adds what the API server returned, unless a newer version is there; returns the newest.
    pub fn insert(&self, child: Child) -> Arc<Child> {
        self.lock().insert(child).child
    }

    /// Adds what a watch delivered, unless a newer version is there; returns it if something differs that is
    /// read. The echo of a write differs in nothing.
    pub fn insert_watched(&self, child: Child) -> Option<Arc<Child>> {
        let inserted = self.lock().insert(child);
        inserted.is_news.then_some(inserted.child)
    }

    /// Records that a child has everything that the desired object with this hash sets.
    pub fn set_covers(&self, child: &Child, desired_hash: &str) {
        if let Some(entry) = self.lock().entries.get_mut(&child.key())
            && entry.child.version == child.version
        {
            entry.covers = Some(desired_hash.to_owned());
        }
    }

    /// Whether a child was found to have everything that the desired object with this hash sets.
    #[must_use]
    pub fn covers(&self, child: &Child, desired_hash: &str) -> bool {
        let index = self.lock();
        let entry = index.entries.get(&child.key()).filter(|entry| entry.child.uid == child.uid);
        entry.is_some_and(|entry| {
            entry.child.text == child.text && entry.covers.as_deref() == Some(desired_hash)
        })
    }

    /// Removes a child that is gone or no longer selected, unless a newer version is there.
    pub fn remove(&self, child: &Child) {
        let mut index = self.lock();
        let key = child.key();
        let older = |entry: &Entry| entry.child.uid == child.uid && entry.child.ordinal() <= child.ordinal();
        if index.entries.get(&key).is_some_and(older) {
            index.remove(&key);
            index.irremovable.remove(&child.uid);
        }
    }

    /// Records that a list of this kind starts.
    pub fn start_list(&self, kind: &'static ChildKind) {
        *self.lock().lists.entry(kind.kind).or_default() += 1;
    }

    /// Records that a list of this kind is complete: children that are neither in it nor written since are
    /// gone.
    pub fn finish_list(&self, kind: &'static ChildKind) {
        let mut index = self.lock();
        let list = index.lists.get(kind.kind).copied().unwrap_or(0);
        let gone: Vec<ChildKey> = index
            .entries
            .iter()
            .filter(|(key, entry)| key.kind == kind.kind && entry.listed < list)
            .map(|(key, _)| key.clone())
            .collect();
        for key in &gone {
            index.remove(key);
        }
        drop(index);
        self.complete.send_modify(|kinds| {
            kinds.insert(kind.kind);
        });
    }

    /// Waits until every kind that is a part of Kubernetes has been listed.
    pub async fn complete(&self) {
        let own = CHILDREN.iter().filter(|kind| !kind.needs_definition).map(|kind| kind.kind).collect();
        self.listed(&own).await;
    }

    /// Waits until these kinds have been listed.
    pub async fn listed(&self, kinds: &BTreeSet<&'static str>) {
        let all = |listed: &BTreeSet<&'static str>| kinds.is_subset(listed);
        // The sender lives as long as `self`, so the wait cannot fail.
        let _ = self.complete.subscribe().wait_for(all).await;
    }

    /// Whether a kind has been listed, so that all objects of it are known.
    #[must_use]
    pub fn is_listed(&self, kind: &ChildKind) -> bool {
        self.complete.borrow().contains(kind.kind)
    }

    /// Removes all children of a kind that the cluster does not have any more.
    pub fn forget(&self, kind: &ChildKind) {
        self.complete.send_modify(|kinds| {
            kinds.remove(kind.kind);
        });
        let mut index = self.lock();
        let gone: Vec<ChildKey> = index.entries.keys().filter(|key| key.kind == kind.kind).cloned().collect();
        for key in &gone {
            index.remove(key);
        }
    }

    /// Records that these foreign fields of a child came back after their removal.
    pub fn tolerate(&self, child: &Child) {
        self.lock().irremovable.insert(child.uid.clone(), child.foreign.clone());
    }

    /// Whether the foreign fields of a child came back after their removal.
    #[must_use]
    pub fn is_tolerated(&self, child: &Child) -> bool {
        self.lock().irremovable.get(&child.uid) == Some(&child.foreign)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use trustformers_control::kinds::SERVICE;

    fn child(name: &str, uid: &str, version: u64) -> Child {
        let object = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": "team", "uid": uid, "resourceVersion": version.to_string(),
                "ownerReferences": [{"apiVersion": "serving.trustformers.dev/v1alpha1", "kind": "InferenceModel",
                    "name": "chat", "uid": "u1", "controller": true}]},
        });
        Child::of(&SERVICE, serde_json::from_value(object).unwrap()).unwrap()
    }

    fn version(children: &Children, name: &str) -> Option<String> {
        children.get(&SERVICE, "team", name).map(|child| child.version.clone())
    }

    #[test]
    fn older_events_never_replace_or_remove_newer_objects() {
        let children = Children::default();
        children.insert(child("chat", "a", 9));
        children.insert(child("chat", "a", 7));
        children.remove(&child("chat", "a", 8));
        assert_eq!(version(&children, "chat").as_deref(), Some("9"));
        // A new object of the name replaces the old one, and a late deletion of the old one does not remove
        // it.
        children.insert(child("chat", "b", 12));
        children.remove(&child("chat", "a", 13));
        assert_eq!(version(&children, "chat").as_deref(), Some("12"));
        assert_eq!(children.of_owner("u1").len(), 1);
    }

    #[test]
    fn an_echo_is_no_news_and_what_was_compared_stays_compared() {
        let children = Children::default();
        let written = children.insert(child("chat", "a", 9));
        children.set_covers(&written, "h1");
        assert!(children.insert_watched(child("chat", "a", 9)).is_none(), "the echo");
        // Another version with the same content: a controller wrote its status.
        assert!(children.insert_watched(child("chat", "a", 10)).is_none());
        assert!(children.covers(&children.get(&SERVICE, "team", "chat").unwrap(), "h1"));
        assert!(!children.covers(&written, "h2"));
        // It was deleted and created again.
        let again = children.insert_watched(child("chat", "b", 11)).unwrap();
        assert!(!children.covers(&again, "h1"));
    }

    #[test]
    fn what_gateways_report_of_a_route_is_news() {
        let route = |version: u64, status: Value| {
            let object = json!({
                "metadata": {"name": "chat", "namespace": "team", "uid": "r", "resourceVersion": version.to_string()},
                "spec": {"hostnames": ["a.example.com"]}, "status": status,
            });
            Child::of(&HTTP_ROUTE, serde_json::from_value(object).unwrap()).unwrap()
        };
        let refused = |time: &str| {
            let condition = json!({"type": "Accepted", "status": "False", "reason": "NotAllowedByListeners",
                "message": "no", "lastTransitionTime": time});
            json!({"parents": [{"parentRef": {"name": "public"}, "conditions": [condition]}]})
        };
        let children = Children::default();
        let first = children.insert(route(1, json!({})));
        assert_eq!(first.exposure, None);
        let news = children.insert_watched(route(2, refused("a"))).unwrap();
        let problem = news.exposure.clone().unwrap().problem.unwrap();
        assert_eq!(problem.reason, "NotAllowedByListeners");
        assert!(children.insert_watched(route(3, refused("b"))).is_none(), "nothing differs that is read");
    }

    #[test]
    fn fields_of_a_post_are_found_until_something_is_applied() {
        let entry = |operation: &str, subresource: Option<&str>| ManagedFieldsEntry {
            manager: Some(names::MANAGER.to_owned()),
            operation: Some(operation.to_owned()),
            subresource: subresource.map(str::to_owned),
            ..ManagedFieldsEntry::default()
        };
        assert_eq!(posted(&[entry("Update", Some("status")), entry("Update", None)]), Some(1));
        assert_eq!(posted(&[entry("Update", None), entry("Apply", None)]), None);
        assert_eq!(posted(&[]), None);
    }

    #[test]
    fn a_list_removes_what_it_lacks_unless_it_was_just_written() {
        let children = Children::default();
        children.insert(child("gone", "a", 1));
        children.insert(child("stays", "b", 2));
        children.start_list(&SERVICE);
        children.insert(child("stays", "b", 2));
        children.insert(child("written", "c", 3));
        children.finish_list(&SERVICE);
        let names: Vec<_> = children.of_owner("u1").iter().map(|child| child.name.clone()).collect();
        assert_eq!(names, ["stays", "written"]);
    }
}
