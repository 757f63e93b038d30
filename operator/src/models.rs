//! The writing end of the cache of models, and which models share a name.
//!
//! Callers may use a model's bare name. The older of two namesakes keeps it, so that a new or deleted model
//! changes the routes of its namesakes, and of no others.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::jiff::Timestamp;
use kube::runtime::reflector::store::Writer;
use kube::runtime::watcher::Event;
use trustformers_control::routes::ModelKey;
use trustformers_crds::InferenceModel;

use crate::context::ChangeMarks;

/// The models of one name, each with its creation time.
type Namesakes = BTreeMap<ModelKey, Option<Timestamp>>;

#[derive(Debug, Default)]
struct NameIndex {
    by_name: HashMap<String, Namesakes>,
    /// The index of a list that is not complete yet.
    listed: HashMap<String, Namesakes>,
}

/// The models by their bare name. One entry for each model that exists.
#[derive(Debug, Default)]
pub struct ModelNames(Mutex<NameIndex>);

impl ModelNames {
    fn lock(&self) -> MutexGuard<'_, NameIndex> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The models with this bare name, each with its creation time.
    #[must_use]
    pub fn namesakes(&self, name: &str) -> BTreeMap<ModelKey, Option<Timestamp>> {
        self.lock().by_name.get(name).cloned().unwrap_or_default()
    }

    /// The model that owns this bare name.
    #[must_use]
    pub fn owner(&self, name: &str) -> Option<ModelKey> {
        self.lock().by_name.get(name).and_then(oldest)
    }

    fn insert(&self, model: &InferenceModel, is_listed: bool) -> bool {
        let Some(key) = key(model) else { return false };
        let created = model.metadata.creation_timestamp.as_ref().map(|time| time.0);
        let mut index = self.lock();
        let names = if is_listed { &mut index.listed } else { &mut index.by_name };
        names.entry(key.1.clone()).or_default().insert(key, created).is_none()
    }

    fn remove(&self, model: &InferenceModel) {
        let Some(key) = key(model) else { return };
        let mut index = self.lock();
        if let Some(namesakes) = index.by_name.get_mut(&key.1) {
            namesakes.remove(&key);
            if namesakes.is_empty() {
                index.by_name.remove(&key.1);
            }
        }
    }
}

/// The oldest of some namesakes, and of equally old ones the first by namespace: it owns their name.
#[must_use]
pub fn oldest(namesakes: &BTreeMap<ModelKey, Option<Timestamp>>) -> Option<ModelKey> {
    let ages = namesakes.iter().map(|(key, created)| (created.unwrap_or(Timestamp::MAX), key));
    ages.min().map(|(_, key)| key.clone())
}

fn key(model: &InferenceModel) -> Option<ModelKey> {
    Some((model.metadata.namespace.clone()?, model.metadata.name.clone()?))
}

/// Fills the cache of models and marks what depends on them.
pub struct ModelWriter {
    store: Writer<InferenceModel>,
    names: Arc<ModelNames>,
    marks: Arc<ChangeMarks>,
}

impl ModelWriter {
    pub(crate) fn new(
        store: Writer<InferenceModel>,
        names: Arc<ModelNames>,
        marks: Arc<ChangeMarks>,
    ) -> Self {
        Self { store, names, marks }
    }

    /// Updates the cache.
    pub fn apply_watcher_event(&mut self, event: &Event<InferenceModel>) {
        self.store.apply_watcher_event(event);
        match event {
            Event::Init => self.names.lock().listed.clear(),
            Event::InitApply(model) => {
                self.names.insert(model, true);
            }
            Event::InitDone => {
                let mut index = self.names.lock();
                index.by_name = std::mem::take(&mut index.listed);
                drop(index);
                self.marks.routes.mark_all();
                self.marks.pods.mark_all();
            }
            Event::Apply(model) => {
                let is_new = self.names.insert(model, false);
                self.mark(model, is_new);
            }
            Event::Delete(model) => {
                self.names.remove(model);
                self.mark(model, true);
            }
        }
    }

    fn mark(&self, model: &InferenceModel, with_namesakes: bool) {
        let Some(key) = key(model) else { return };
        if with_namesakes {
            for namesake in self.names.namesakes(&key.1).keys() {
                self.marks.routes.mark(namesake);
            }
        }
        self.marks.routes.mark(&key);
        self.marks.pods.mark(&key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::runtime::reflector::store;

    fn model(namespace: &str, created: &str) -> InferenceModel {
        serde_yaml::from_str(&format!(
            "apiVersion: serving.trustformers.dev/v1alpha1\nkind: InferenceModel\n\
             metadata: {{name: chat, namespace: {namespace}, creationTimestamp: '{created}'}}\n\
             spec: {{source: {{uri: 'oci://x'}}}}\n"
        ))
        .unwrap()
    }

    #[test]
    fn the_older_model_owns_the_name_until_it_is_deleted() {
        let (_store, writer) = store();
        let (names, marks) = (Arc::new(ModelNames::default()), Arc::new(ChangeMarks::default()));
        let mut writer = ModelWriter::new(writer, Arc::clone(&names), Arc::clone(&marks));
        let older = model("b", "2026-01-01T00:00:00Z");
        writer.apply_watcher_event(&Event::Apply(model("a", "2026-01-02T00:00:00Z")));
        writer.apply_watcher_event(&Event::Apply(older.clone()));
        assert_eq!(names.owner("chat"), Some(("b".to_owned(), "chat".to_owned())));
        writer.apply_watcher_event(&Event::Delete(older));
        assert_eq!(names.owner("chat"), Some(("a".to_owned(), "chat".to_owned())));
        // A list that lacks it removes it.
        for event in [Event::Init, Event::InitDone] {
            writer.apply_watcher_event(&event);
        }
        assert_eq!(names.owner("chat"), None);
    }
}
