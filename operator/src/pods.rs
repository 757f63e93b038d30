//! The pods of all models, by model, and what is reported about them.
//!
//! Only what is read of a pod is kept. A stored pod is several times as large.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::watcher::Event;
use tokio::sync::watch;
use trustformers_control::causes::Cause;
use trustformers_control::pods::PodView;
use trustformers_control::routes::ModelKey;
use trustformers_control::status::PodReport;
use trustformers_proto::v1::ModelStatus;

use crate::context::ChangeMarks;

/// One pod of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedPod {
    /// What is read of it.
    pub view: PodView,
    /// Names of the ConfigMaps that it mounts.
    pub config_maps: Vec<String>,
}

impl CachedPod {
    fn of(pod: &Pod) -> Option<Self> {
        let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
        let config_maps = volumes.filter_map(|volume| Some(volume.config_map.as_ref()?.name.clone()));
        Some(Self { view: PodView::of(pod)?, config_maps: config_maps.collect() })
    }

    fn model(&self) -> ModelKey {
        (self.view.namespace.clone(), self.view.model.clone())
    }
}

/// Namespace and name of a pod.
type PodName = (String, String);

#[derive(Debug, Default)]
struct PodIndex {
    by_model: HashMap<ModelKey, BTreeMap<String, Arc<CachedPod>>>,
    models: HashMap<PodName, ModelKey>,
    /// Pods of a list that is not complete yet.
    listed: HashSet<PodName>,
}

impl PodIndex {
    fn get(&self, name: &PodName) -> Option<&Arc<CachedPod>> {
        self.by_model.get(self.models.get(name)?)?.get(&name.1)
    }

    fn insert(&mut self, name: PodName, pod: CachedPod) {
        let model = pod.model();
        self.by_model.entry(model.clone()).or_default().insert(name.1.clone(), Arc::new(pod));
        self.models.insert(name, model);
    }

    fn remove(&mut self, name: &PodName) -> Option<Arc<CachedPod>> {
        let model = self.models.remove(name)?;
        let pods = self.by_model.get_mut(&model)?;
        let removed = pods.remove(&name.1);
        if pods.is_empty() {
            self.by_model.remove(&model);
        }
        removed
    }
}

/// The cache.
#[derive(Debug)]
pub struct Pods {
    index: Mutex<PodIndex>,
    /// Reports of pods, by UID of the pod.
    reports: Mutex<HashMap<String, PodReport>>,
    /// Causes from Events about pods, by UID of the pod.
    causes: Mutex<HashMap<String, Cause>>,
    /// The nodes that are ready; none until they are listed.
    ready_nodes: Mutex<Option<BTreeSet<String>>>,
    /// Models whose pods were asked for something that they have not done yet.
    asked: Mutex<HashSet<ModelKey>>,
    complete: watch::Sender<bool>,
}

impl Default for Pods {
    fn default() -> Self {
        Self {
            index: Mutex::default(),
            reports: Mutex::default(),
            causes: Mutex::default(),
            ready_nodes: Mutex::default(),
            asked: Mutex::default(),
            complete: watch::Sender::new(false),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pods {
    /// The pods of a model, by name, with the state of their nodes.
    #[must_use]
    pub fn of_model(&self, key: &ModelKey) -> Vec<Arc<CachedPod>> {
        let pods: Vec<Arc<CachedPod>> =
            lock(&self.index).by_model.get(key).into_iter().flat_map(BTreeMap::values).cloned().collect();
        let nodes = lock(&self.ready_nodes);
        let with_node = |pod: Arc<CachedPod>| match (&*nodes, &pod.view.node) {
            (Some(ready), Some(node)) if !ready.contains(node) => Arc::new(CachedPod {
                view: pod.view.clone().on_lost_node(),
                config_maps: pod.config_maps.clone(),
            }),
            _ => pod,
        };
        pods.into_iter().map(with_node).collect()
    }

    /// Records which nodes are ready; returns the models with pods on those of which that changed.
    pub fn set_ready_nodes(&self, ready: &BTreeSet<String>) -> BTreeSet<ModelKey> {
        let before = lock(&self.ready_nodes).replace(ready.clone()).unwrap_or_default();
        let changed = |pod: &CachedPod| {
            pod.view.node.as_ref().is_some_and(|node| before.contains(node) != ready.contains(node))
        };
        let index = lock(&self.index);
        let models = index.by_model.iter().filter(|(_, pods)| pods.values().any(|pod| changed(pod)));
        models.map(|(key, _)| key.clone()).collect()
    }

    /// Records whether pods of a model are asked for something. True if that changed.
    pub fn set_asked(&self, key: &ModelKey, is_asked: bool) -> bool {
        let mut asked = lock(&self.asked);
        if is_asked { asked.insert(key.clone()) } else { asked.remove(key) }
    }

    /// Whether pods of a model are asked for something that they have not done yet.
    #[must_use]
    pub fn is_asked(&self, key: &ModelKey) -> bool {
        lock(&self.asked).contains(key)
    }

    /// One pod, without the state of its node.
    #[must_use]
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<CachedPod>> {
        lock(&self.index).get(&(namespace.to_owned(), name.to_owned())).cloned()
    }

    /// The models that have pods.
    #[must_use]
    pub fn models(&self) -> Vec<ModelKey> {
        lock(&self.index).by_model.keys().cloned().collect()
    }

    /// Number of pods.
    #[must_use]
    pub fn len(&self) -> usize {
        lock(&self.index).models.len()
    }

    /// Whether there is no pod.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Waits until the pods were listed.
    pub async fn complete(&self) {
        // The sender lives as long as `self`, so the wait cannot fail.
        let _ = self.complete.subscribe().wait_for(|complete| *complete).await;
    }

    /// Updates the cache; returns the models whose pods changed in something that is read.
    fn apply(&self, event: &Event<Pod>) -> Vec<ModelKey> {
        match event {
            Event::Init => {
                lock(&self.index).listed.clear();
                Vec::new()
            }
            Event::InitApply(pod) => {
                if let Some(name) = name_of(pod) {
                    lock(&self.index).listed.insert(name);
                }
                self.update(pod)
            }
            Event::Apply(pod) => self.update(pod),
            Event::Delete(pod) => name_of(pod).map(|name| self.remove(&name)).unwrap_or_default(),
            Event::InitDone => {
                let mut index = lock(&self.index);
                let listed = std::mem::take(&mut index.listed);
                let gone = index.models.keys().filter(|name| !listed.contains(*name)).cloned();
                let gone: Vec<PodName> = gone.collect();
                drop(index);
                let changed = gone.iter().flat_map(|name| self.remove(name)).collect();
                self.complete.send_replace(true);
                changed
            }
        }
    }

    fn update(&self, pod: &Pod) -> Vec<ModelKey> {
        let Some(name) = name_of(pod) else { return Vec::new() };
        // It is no pod of a model any more.
        let Some(pod) = CachedPod::of(pod) else { return self.remove(&name) };
        let mut index = lock(&self.index);
        let earlier = index.get(&name).cloned();
        if earlier.as_deref() == Some(&pod) {
            return Vec::new();
        }
        let mut changed = vec![pod.model()];
        if let Some(earlier) = &earlier {
            if earlier.model() != pod.model() {
                index.remove(&name);
                changed.push(earlier.model());
            }
            if earlier.view.uid != pod.view.uid {
                self.drop_reports(&earlier.view.uid);
            }
        }
        index.insert(name, pod);
        changed
    }

    fn remove(&self, name: &PodName) -> Vec<ModelKey> {
        let Some(removed) = lock(&self.index).remove(name) else { return Vec::new() };
        self.drop_reports(&removed.view.uid);
        vec![removed.model()]
    }

    /// Drops what is reported about a pod that is gone.
    fn drop_reports(&self, uid: &str) {
        lock(&self.reports).remove(uid);
        lock(&self.causes).remove(uid);
    }

    /// Records a pod's report. True if more than the progress changed.
    pub fn record_report(&self, uid: &str, restarts: u32, model: ModelStatus) -> bool {
        let mut reports = lock(&self.reports);
        let previous = reports.get(uid).filter(|previous| previous.restarts == restarts);
        let progressed_at = previous
            .filter(|previous| previous.model.loaded_bytes == model.loaded_bytes)
            .map_or_else(Timestamp::now, |previous| previous.progressed_at);
        let without_progress = |model: &ModelStatus| {
            let mut model = ModelStatus { loaded_bytes: 0, total_bytes: 0, ..model.clone() };
            for slot in &mut model.slots {
                (slot.loaded_bytes, slot.total_bytes) = (0, 0);
                (slot.bytes_per_second, slot.eta_ms) = (0, None);
            }
            model
        };
        let changed =
            previous.is_none_or(|previous| without_progress(&previous.model) != without_progress(&model));
        reports.insert(uid.to_owned(), PodReport { model, restarts, progressed_at });
        changed
    }

    /// The last report of a pod's running container.
    #[must_use]
    pub fn report(&self, pod: &PodView) -> Option<PodReport> {
        lock(&self.reports).get(&pod.uid).filter(|report| report.is_current(pod)).cloned()
    }

    /// Records the cause that an Event about a pod names. True if it is new.
    pub fn record_cause(&self, uid: &str, cause: Cause) -> bool {
        lock(&self.causes).insert(uid.to_owned(), cause.clone()) != Some(cause)
    }

    /// The cause that an Event about a pod names.
    #[must_use]
    pub fn cause(&self, uid: &str) -> Option<Cause> {
        lock(&self.causes).get(uid).cloned()
    }
}

fn name_of(pod: &Pod) -> Option<PodName> {
    Some((pod.metadata.namespace.clone()?, pod.metadata.name.clone()?))
}

/// Fills the cache of pods and marks what depends on them.
#[derive(Debug)]
pub struct PodWriter {
    pods: Arc<Pods>,
    marks: Arc<ChangeMarks>,
}

impl PodWriter {
    pub(crate) fn new(pods: Arc<Pods>, marks: Arc<ChangeMarks>) -> Self {
        Self { pods, marks }
    }

    /// Updates the cache; returns the models whose pods changed in something that is read.
    pub fn apply_watcher_event(&mut self, event: &Event<Pod>) -> Vec<ModelKey> {
        let changed = self.pods.apply(event);
        for key in &changed {
            self.marks.routes.mark(key);
            self.marks.gates.mark(key);
            self.marks.pods.mark(key);
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::changes::Marked;
    use serde_json::json;

    fn pod(name: &str, model: &str, uid: &str) -> Pod {
        let labels =
            json!({"serving.trustformers.dev/model": model, "serving.trustformers.dev/revision": "r"});
        serde_json::from_value(json!({"metadata": {"name": name, "namespace": "team", "uid": uid,
            "labels": labels}, "spec": {"containers": [], "volumes": [{"name": "config", "configMap": {"name": "c"}}]}}))
        .unwrap()
    }

    fn key(model: &str) -> ModelKey {
        ("team".to_owned(), model.to_owned())
    }

    #[test]
    fn an_event_that_changes_nothing_that_is_read_marks_nothing() {
        let (pods, marks) = (Arc::new(Pods::default()), Arc::new(ChangeMarks::default()));
        let mut writer = PodWriter::new(Arc::clone(&pods), Arc::clone(&marks));
        assert_eq!(writer.apply_watcher_event(&Event::Apply(pod("p", "chat", "u"))), [key("chat")]);
        let _ = marks.routes.drain();
        let mut same = pod("p", "chat", "u");
        same.metadata.resource_version = Some("77".to_owned());
        assert_eq!(writer.apply_watcher_event(&Event::Apply(same)), []);
        assert_eq!(marks.routes.drain(), Marked::Models([].into()));
        assert_eq!(pods.of_model(&key("chat"))[0].config_maps, ["c"]);
    }

    #[test]
    fn reports_and_causes_end_with_their_pod() {
        let pods = Arc::new(Pods::default());
        let mut writer = PodWriter::new(Arc::clone(&pods), Arc::default());
        for name in ["p", "q"] {
            writer.apply_watcher_event(&Event::Apply(pod(name, "chat", name)));
            pods.record_report(name, 0, ModelStatus::default());
            pods.record_cause(name, Cause { reason: "FailedMount".to_owned(), message: String::new() });
        }
        writer.apply_watcher_event(&Event::Delete(pod("q", "chat", "q")));
        // A new list lacks the other one too.
        assert_eq!(lock(&pods.reports).keys().collect::<Vec<_>>(), ["p"]);
        writer.apply_watcher_event(&Event::Init);
        assert_eq!(writer.apply_watcher_event(&Event::InitDone), [key("chat")]);
        assert!(lock(&pods.reports).is_empty() && lock(&pods.causes).is_empty() && pods.is_empty());
    }

    #[test]
    fn a_pod_that_is_relabelled_changes_both_models() {
        let mut writer = PodWriter::new(Arc::default(), Arc::default());
        writer.apply_watcher_event(&Event::Apply(pod("p", "chat", "u")));
        let changed = writer.apply_watcher_event(&Event::Apply(pod("p", "other", "u")));
        assert_eq!(changed, [key("other"), key("chat")]);
        assert_eq!(writer.pods.of_model(&key("chat")), []);
        assert_eq!(writer.pods.of_model(&key("other")).len(), 1);
    }

    #[test]
    fn only_progress_is_no_other_change() {
        let pods = Pods::default();
        let loading = |loaded_bytes| ModelStatus { loaded_bytes, total_bytes: 100, ..ModelStatus::default() };
        assert!(pods.record_report("p", 0, loading(1)));
        assert!(!pods.record_report("p", 0, loading(2)));
        assert!(pods.record_report("p", 1, loading(2)), "another container started");
    }
}
