//! The children of all models as the API server holds them, as far as the operator knows.
//!
//! Watches fill this cache, and every write of the operator puts the response into it. So a reconcile reads
//! its own writes before the watch delivers them, and an older watch event never replaces a newer response:
//! Kubernetes resource versions are ordered. Children are indexed by the UID of their owner. The label only
//! selects what is watched.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::DynamicObject;
use serde_json::Value;
use tokio::sync::watch;
use trustformers_control::drift::{FieldPath, foreign_fields};
use trustformers_control::kinds::{CHILDREN, ChildKind};
use trustformers_crds::GROUP;

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
    /// The object without its managed fields.
    pub object: Value,
    /// What other field managers set in the part that belongs to the operator alone.
    pub foreign: Vec<FieldPath>,
}

impl Child {
    /// Reads a stored object; `None` if it lacks metadata that every stored object has.
    #[must_use]
    pub fn of(kind: &'static ChildKind, object: DynamicObject) -> Option<Self> {
        let meta = &object.metadata;
        let is_model = |owner: &&OwnerReference| {
            owner.controller == Some(true)
                && owner.kind == "InferenceModel"
                && owner.api_version.split('/').next() == Some(GROUP)
        };
        let owner = meta.owner_references.iter().flatten().find(is_model).cloned();
        let (namespace, name) = (meta.namespace.clone()?, meta.name.clone()?);
        let (uid, version) = (meta.uid.clone()?, meta.resource_version.clone()?);
        let mut object = serde_json::to_value(object).ok()?;
        // Items of a list come without them.
        object["apiVersion"] = Value::String(kind.api_version());
        object["kind"] = Value::String(kind.kind.to_owned());
        let foreign = foreign_fields(&object, kind);
        // Managed fields are the larger half of an object and are not read again.
        object["metadata"].as_object_mut()?.remove("managedFields");
        Some(Self { kind, namespace, name, uid, version, owner, object, foreign })
    }

    /// Whether the model with this UID owns it.
    #[must_use]
    pub fn is_owned_by(&self, uid: &str) -> bool {
        self.owner.as_ref().is_some_and(|owner| owner.uid == uid)
    }

    /// The value of one of its labels.
    #[must_use]
    pub fn label(&self, key: &str) -> Option<&str> {
        self.object["metadata"]["labels"].get(key)?.as_str()
    }

    fn key(&self) -> ChildKey {
        ChildKey { kind: self.kind.kind, namespace: self.namespace.clone(), name: self.name.clone() }
    }

    /// Resource versions are numbers; one that is not is older than all others.
    fn ordinal(&self) -> u64 {
        self.version.parse().unwrap_or(0)
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

    fn insert(&mut self, child: Child) -> Arc<Child> {
        let key = child.key();
        let listed = self.lists.get(child.kind.kind).copied().unwrap_or(0);
        match self.entries.get_mut(&key) {
            Some(entry) if entry.child.uid == child.uid && entry.child.ordinal() >= child.ordinal() => {
                entry.listed = listed;
                return Arc::clone(&entry.child);
            }
            _ => {}
        }
        if let Some(replaced) = self.entries.get(&key).filter(|entry| entry.child.uid != child.uid) {
            self.irremovable.remove(&replaced.child.uid);
        }
        self.remove(&key);
        if let Some(owner) = &child.owner {
            self.by_owner.entry(owner.uid.clone()).or_default().insert(key.clone());
        }
        let child = Arc::new(child);
        self.entries.insert(key, Entry { child: Arc::clone(&child), listed });
        child
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

    /// Adds what the API server returned or a watch delivered, unless a newer version is there; returns the
    /// newest.
    pub fn insert(&self, child: Child) -> Arc<Child> {
        self.lock().insert(child)
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

    /// Waits until every kind has been listed.
    pub async fn complete(&self) {
        let all = |kinds: &BTreeSet<&'static str>| CHILDREN.iter().all(|kind| kinds.contains(kind.kind));
        // The sender lives as long as `self`, so the wait cannot fail.
        let _ = self.complete.subscribe().wait_for(all).await;
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
