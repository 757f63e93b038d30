//! The states of all models, published to any number of watchers.
//!
//! One writer side, any number of readers, the latest value always: a watcher that is slow skips states and
//! does not delay the writer. Readiness is a function of the states, so the two can never contradict each
//! other. Models come and go while the process runs, and a model has up to two versions; each version has an
//! id that no other version of the process ever gets.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tokio::time::Instant;
use trustformers_api::Verdict;
use trustformers_api::http::state_word;
use trustformers_api::inference::Models;
use trustformers_proto::Task;
use trustformers_proto::v1::{ModelSlot, ModelState, ModelStatus, SlotRole};

use crate::failure::Failure;
use crate::load_rate::LoadRate;
use crate::slots::may_follow;
use crate::spec::ModelSpec;

/// Publishes the states.
#[derive(Debug)]
pub struct ModelStatuses {
    table: ArcSwap<StatusTable>,
    models: watch::Sender<Models>,
    ready: watch::Sender<Verdict>,
    /// Held by whoever changes the table.
    writing: Mutex<()>,
}

/// The states at one moment.
#[derive(Debug, Clone)]
struct StatusTable {
    entries: Vec<StatusEntry>,
    /// The process was asked to end.
    ending: bool,
}

/// One model.
#[derive(Debug, Clone)]
struct StatusEntry {
    /// Every name that it answers to.
    names: Vec<String>,
    /// Whether start-up waits for it. A model that is added later delays nothing: the others serve.
    at_start: bool,
    /// Its current version.
    current: VersionEntry,
    /// The version in its second slot.
    second: Option<VersionEntry>,
}

/// One version of a model.
#[derive(Debug, Clone)]
struct VersionEntry {
    id: u64,
    role: SlotRole,
    status: ModelStatus,
    memory_bytes: u64,
    rate: LoadRate,
}

/// What is known of a model once it is loaded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadedFacts {
    /// The task that the model serves.
    pub task: Option<Task>,
    /// sha256 of its files.
    pub digest: String,
    /// The device, in its own words.
    pub device: String,
    /// Longest sequence in tokens.
    pub context_tokens: u32,
    /// Values of a vector, of a model that embeds; else 0.
    pub embedding_dimensions: u32,
    /// Bytes that it takes on its device.
    pub memory_bytes: u64,
}

impl VersionEntry {
    fn pending(id: u64, role: SlotRole, spec: &ModelSpec) -> Self {
        let mut status = ModelStatus {
            name: spec.name().to_owned(),
            revision: spec.revision.clone(),
            task: Task::to_wire(spec.task),
            since_unix_ms: now_unix_ms(),
            adapters: spec.adapters.iter().map(|adapter| adapter.name.clone()).collect(),
            ..ModelStatus::default()
        };
        status.set_state(ModelState::Pending);
        Self { id, role, status, memory_bytes: 0, rate: LoadRate::default() }
    }

    fn published(&self) -> ModelSlot {
        let status = &self.status;
        let loads = status.state() == ModelState::Loading;
        let left = status.total_bytes.saturating_sub(status.loaded_bytes);
        ModelSlot {
            role: self.role.into(),
            state: status.state,
            revision: status.revision.clone(),
            digest: status.digest.clone(),
            reason: status.reason.clone(),
            message: status.message.clone(),
            loaded_bytes: status.loaded_bytes,
            total_bytes: status.total_bytes,
            bytes_per_second: if loads { self.rate.bytes_per_second() } else { 0 },
            eta_ms: if loads { self.rate.eta_ms(left) } else { None },
            memory_bytes: self.memory_bytes,
            since_unix_ms: status.since_unix_ms,
        }
    }
}

impl StatusEntry {
    fn pending(id: u64, spec: &ModelSpec, at_start: bool) -> Self {
        let current = VersionEntry::pending(id, SlotRole::Current, spec);
        Self { names: spec.names.clone(), at_start, current, second: None }
    }

    fn versions(&self) -> impl Iterator<Item = &VersionEntry> {
        std::iter::once(&self.current).chain(&self.second)
    }

    fn version_mut(&mut self, id: u64) -> Option<&mut VersionEntry> {
        std::iter::once(&mut self.current).chain(&mut self.second).find(|version| version.id == id)
    }

    fn blocks_startup(&self) -> bool {
        self.at_start && is_starting(self.current.status.state())
    }

    /// The status of a version under the model's names.
    fn named(&self, version: &VersionEntry) -> ModelStatus {
        let name = self.names.first().cloned().unwrap_or_default();
        ModelStatus { name, names: self.names.clone(), ..version.status.clone() }
    }

    fn published(&self) -> ModelStatus {
        let slots = self.versions().map(VersionEntry::published).collect();
        ModelStatus { slots, ..self.named(&self.current) }
    }
}

impl ModelStatuses {
    /// All models Pending, their versions with the ids 0, 1, 2, ...
    pub fn new(specs: &[ModelSpec]) -> Self {
        let entries = (0..).zip(specs).map(|(id, spec)| StatusEntry::pending(id, spec, true)).collect();
        Self::of(StatusTable { entries, ending: false })
    }

    fn of(table: StatusTable) -> Self {
        Self {
            models: watch::Sender::new(table.published()),
            ready: watch::Sender::new(table.readiness()),
            table: ArcSwap::from_pointee(table),
            writing: Mutex::default(),
        }
    }

    /// The states now and after each change.
    pub fn watch(&self) -> watch::Receiver<Models> {
        self.models.subscribe()
    }

    /// Readiness now and after each change.
    pub fn watch_readiness(&self) -> watch::Receiver<Verdict> {
        self.ready.subscribe()
    }

    /// The state of one version; without a name and Unloaded where no version has this id any more.
    pub fn status(&self, id: u64) -> ModelStatus {
        let table = self.table.load();
        let found = table.entries.iter().find_map(|entry| {
            entry.versions().find(|version| version.id == id).map(|version| entry.named(version))
        });
        found.unwrap_or_else(unloaded)
    }

    /// The state of the model that has this version, with its slots. Unloaded where there is none any more.
    pub fn model(&self, id: u64) -> ModelStatus {
        let table = self.table.load();
        let has = |entry: &&StatusEntry| entry.versions().any(|version| version.id == id);
        table.entries.iter().find(has).map_or_else(unloaded, StatusEntry::published)
    }

    /// Whether loading is over, one way or the other, for every model that start-up waits for.
    pub fn startup(&self) -> Verdict {
        let table = self.table.load();
        match table.entries.iter().find(|entry| entry.blocks_startup()) {
            Some(entry) => Verdict::no(describe(&entry.named(&entry.current))),
            None => Verdict::yes("start-up is over"),
        }
    }

    /// A model is added, Pending. It does not change the readiness of the others.
    pub fn add(&self, id: u64, spec: &ModelSpec) {
        self.write(|table| table.entries.push(StatusEntry::pending(id, spec, false)));
    }

    /// A version is gone, and its model with it where it was the current one.
    pub fn remove(&self, id: u64) {
        self.write(|table| {
            table.entries.retain(|entry| entry.current.id != id);
            for entry in &mut table.entries {
                if entry.second.as_ref().is_some_and(|version| version.id == id) {
                    entry.second = None;
                }
            }
        });
    }

    /// A version is loaded into the second slot of the model with the version `current`, Pending. What the
    /// slot held is published no more.
    pub fn add_beside(&self, current: u64, id: u64, spec: &ModelSpec) {
        self.write(|table| {
            if let Some(entry) = table.entries.iter_mut().find(|entry| entry.current.id == current) {
                entry.second = Some(VersionEntry::pending(id, SlotRole::Candidate, spec));
            }
        });
    }

    /// The two versions of a model change their slots; the one that answered so far has this role then.
    pub fn swap(&self, current: u64, role: SlotRole) {
        self.write(|table| {
            let entry = table.entries.iter_mut().find(|entry| entry.current.id == current);
            if let Some(StatusEntry { current, second: Some(second), .. }) = entry {
                std::mem::swap(current, second);
                current.role = SlotRole::Current;
                second.role = role;
            }
        });
    }

    /// The model with the version `current` has these names from now on.
    pub fn rename(&self, current: u64, names: &[String]) {
        self.write(|table| {
            if let Some(entry) = table.entries.iter_mut().find(|entry| entry.current.id == current) {
                entry.names = names.to_vec();
            }
        });
    }

    /// The current version of one model becomes that of another one, whose own goes into its second slot.
    pub fn take_over(&self, current: u64, from: u64) {
        self.write(|table| {
            let Some(at) = table.entries.iter().position(|entry| entry.current.id == from) else { return };
            let donor = table.entries.remove(at);
            if let Some(entry) = table.entries.iter_mut().find(|entry| entry.current.id == current) {
                let mut before = std::mem::replace(&mut entry.current, donor.current);
                before.role = SlotRole::Previous;
                entry.second = Some(before);
            }
        });
    }

    /// A version enters a state; the cause of an earlier state is forgotten. Entering the state that it is in
    /// already, as another attempt to load does, forgets nothing, so that the cause does not flicker. A state
    /// that may not follow the present one changes nothing.
    pub fn enter(&self, id: u64, state: ModelState) {
        let news = self.status(id).state() != state;
        self.change(id, state, |model| {
            if news {
                model.reason.clear();
                model.message.clear();
            }
        });
    }

    /// What a version that is Pending waits for.
    pub fn waits(&self, id: u64, message: &str) {
        self.publish(id, |version| version.status.message = message.to_owned());
    }

    /// The progress of loading. It does not change the state.
    pub fn progress(&self, id: u64, loaded_bytes: u64, total_bytes: u64) {
        self.publish(id, |version| {
            version.rate.record(Instant::now(), loaded_bytes);
            version.status.loaded_bytes = loaded_bytes;
            version.status.total_bytes = total_bytes;
        });
    }

    /// The model is on its device; what is known of it stays with it from now on.
    pub fn loaded(&self, id: u64, facts: &LoadedFacts) {
        self.publish(id, |version| {
            version.memory_bytes = facts.memory_bytes;
            let model = &mut version.status;
            model.digest.clone_from(&facts.digest);
            model.device.clone_from(&facts.device);
            model.context_tokens = facts.context_tokens;
            model.embedding_dimensions = facts.embedding_dimensions;
            model.task = Task::to_wire(facts.task);
        });
    }

    /// Loading failed but is tried again; the state stays and the cause shows. The words are the same for
    /// every attempt: each change would be one more Event.
    pub fn will_retry(&self, id: u64, failure: &Failure) {
        let message = format!("{failure}; it is tried again");
        self.publish(id, |version| {
            version.status.reason = failure.reason.to_owned();
            version.status.message = message;
        });
    }

    /// Loading failed for good.
    pub fn failed(&self, id: u64, failure: &Failure) {
        self.publish(id, |version| version.memory_bytes = 0);
        self.change(id, ModelState::Failed, |model| {
            model.reason = failure.reason.to_owned();
            model.message.clone_from(&failure.message);
        });
    }

    /// The process was asked to end: no model is ready any more.
    pub fn draining(&self) {
        self.write(|table| table.ending = true);
        let table = self.table.load_full();
        for version in table.entries.iter().flat_map(StatusEntry::versions) {
            if version.status.state() != ModelState::Failed {
                self.enter(version.id, ModelState::Draining);
            }
        }
    }

    fn change(&self, id: u64, state: ModelState, more: impl FnOnce(&mut ModelStatus)) {
        let mut entered = false;
        let changed = self.publish(id, |version| {
            let model = &mut version.status;
            entered = may_follow(model.state(), state);
            if !entered {
                return;
            }
            if model.state() != state {
                model.since_unix_ms = now_unix_ms();
            }
            model.set_state(state);
            more(model);
        });
        let Some(model) = changed.filter(|_| entered) else { return };
        let (name, state) = (model.name.as_str(), state_word(state));
        let revision = model.revision.as_str();
        if model.message.is_empty() {
            tracing::info!(model = name, revision, state, "model state");
        } else {
            tracing::error!(model = name, revision, state, reason = model.reason, "{}", model.message);
        }
    }

    /// Changes a version's state and gives the new one. None where the version is gone.
    fn publish(&self, id: u64, change: impl FnOnce(&mut VersionEntry)) -> Option<ModelStatus> {
        let mut changed = None;
        self.write(|table| {
            if let Some(version) = table.entries.iter_mut().find_map(|entry| entry.version_mut(id)) {
                change(version);
                changed = Some(version.status.clone());
            }
        });
        changed
    }

    fn write(&self, change: impl FnOnce(&mut StatusTable)) {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut table = StatusTable::clone(&self.table.load());
        change(&mut table);
        let verdict = table.readiness();
        self.models.send_modify(|models| {
            *models = table.published();
            self.table.store(Arc::new(table));
            // Within the change, so that no watcher sees a state whose readiness is not published yet.
            self.ready.send_if_modified(|present| {
                let differs = *present != verdict;
                *present = verdict;
                differs
            });
        });
    }
}

impl StatusTable {
    fn published(&self) -> Models {
        self.entries.iter().map(StatusEntry::published).collect()
    }

    /// Ready means: the process is not ending, every model that start-up waits for has left its start-up, and
    /// at least one serves. One model that is unloaded or added while the others serve changes nothing.
    fn readiness(&self) -> Verdict {
        if self.ending {
            let mut states = self.entries.iter().map(|entry| entry.named(&entry.current));
            let draining = states.find(|model| model.state() == ModelState::Draining);
            let ending = || "the server is ending".to_owned();
            return Verdict::no(draining.as_ref().map_or_else(ending, describe));
        }
        if let Some(entry) = self.entries.iter().find(|entry| entry.blocks_startup()) {
            return Verdict::no(describe(&entry.named(&entry.current)));
        }
        let states = || self.entries.iter().map(|entry| entry.named(&entry.current));
        let failed: Vec<String> = states()
            .filter(|model| model.state() == ModelState::Failed)
            .map(|model| describe(&model))
            .collect();
        if states().any(|model| model.state() == ModelState::Ready) {
            let but = if failed.is_empty() { String::new() } else { format!(", but {}", failed.join("; ")) };
            return Verdict::yes(format!("ready{but}"));
        }
        Verdict::no(if failed.is_empty() { "no model is loaded".to_owned() } else { failed.join("; ") })
    }
}

fn is_starting(state: ModelState) -> bool {
    matches!(state, ModelState::Pending | ModelState::Loading | ModelState::Warming)
}

fn unloaded() -> ModelStatus {
    let mut status = ModelStatus::default();
    status.set_state(ModelState::Unloaded);
    status
}

/// One clause about a model's state, with its cause. Without byte counts: readiness must not change with each
/// of them.
pub fn describe(model: &ModelStatus) -> String {
    let state = format!("model {} is {}", model.name, state_word(model.state()));
    if model.message.is_empty() { state } else { format!("{state} ({}): {}", model.reason, model.message) }
}

fn now_unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use trustformers_store::Source;

    fn statuses(names: &[&str]) -> ModelStatuses {
        let specs: Vec<ModelSpec> =
            names.iter().map(|name| ModelSpec::new(*name, Source::from_path("/m"))).collect();
        ModelStatuses::new(&specs)
    }

    fn path() -> Source {
        Source::from_path("/m")
    }

    fn make_ready(statuses: &ModelStatuses, id: u64) {
        for state in [ModelState::Loading, ModelState::Warming, ModelState::Ready] {
            statuses.enter(id, state);
        }
    }

    fn ready(statuses: &ModelStatuses) -> bool {
        statuses.watch_readiness().borrow().ok
    }

    #[test]
    fn readiness_and_startup_follow_the_states() {
        let statuses = statuses(&["a"]);
        for state in [ModelState::Pending, ModelState::Loading, ModelState::Warming] {
            statuses.enter(0, state);
            assert_eq!((ready(&statuses), statuses.startup().ok), (false, false), "{state:?}");
        }
        statuses.enter(0, ModelState::Ready);
        assert_eq!((ready(&statuses), statuses.startup().ok), (true, true));
        statuses.draining();
        assert_eq!((ready(&statuses), statuses.startup().ok), (false, true));
    }

    #[test]
    fn a_failed_model_keeps_its_cause_and_the_other_serves() {
        let statuses = statuses(&["a", "b"]);
        statuses.failed(0, &Failure::permanent("DigestMismatch", "wrong bytes"));
        assert!(!ready(&statuses), "b is still starting");
        make_ready(&statuses, 1);
        let verdict = statuses.watch_readiness().borrow().clone();
        assert!(verdict.ok && verdict.message.contains("wrong bytes"), "{verdict:?}");
        statuses.draining();
        assert_eq!(
            (statuses.status(0).state(), statuses.status(0).reason.as_str()),
            (ModelState::Failed, "DigestMismatch")
        );
    }

    #[test]
    fn a_server_whose_only_model_failed_is_not_ready() {
        let statuses = statuses(&["a"]);
        statuses.failed(0, &Failure::permanent("MalformedModel", "not a model"));
        let verdict = statuses.watch_readiness().borrow().clone();
        assert!(!verdict.ok && verdict.message.contains("(MalformedModel): not a model"), "{verdict:?}");
    }

    #[tokio::test]
    async fn progress_changes_model_states_and_not_readiness() {
        let statuses = statuses(&["a"]);
        let (mut models, mut readiness) = (statuses.watch(), statuses.watch_readiness());
        models.mark_unchanged();
        readiness.mark_unchanged();
        statuses.progress(0, 3, 9);
        assert!(models.has_changed().unwrap() && !readiness.has_changed().unwrap());
        let status = models.borrow_and_update()[0].clone();
        assert_eq!((status.loaded_bytes, status.total_bytes), (3, 9));
    }

    #[test]
    fn a_retry_shows_its_cause_until_the_next_state() {
        let statuses = statuses(&["a"]);
        statuses.enter(0, ModelState::Loading);
        let failure = Failure { reason: "SourceUnreadable", message: "slow disk".into(), transient: true };
        statuses.will_retry(0, &failure);
        let status = statuses.status(0);
        assert_eq!((status.state(), status.reason.as_str()), (ModelState::Loading, "SourceUnreadable"));
        assert_eq!(status.message, "slow disk; it is tried again");
        statuses.enter(0, ModelState::Loading);
        assert_eq!(statuses.status(0).message, status.message, "another attempt is no news");
        statuses.enter(0, ModelState::Warming);
        assert_eq!(statuses.status(0).message, "");
    }

    #[test]
    fn a_model_that_comes_or_goes_later_does_not_change_readiness() {
        let statuses = statuses(&["a"]);
        make_ready(&statuses, 0);
        statuses.add(7, &ModelSpec::new("b", Source::from_path("/m")));
        for state in [ModelState::Loading, ModelState::Warming, ModelState::Ready, ModelState::Draining] {
            statuses.enter(7, state);
            assert_eq!((ready(&statuses), statuses.startup().ok), (true, true), "{state:?}");
        }
        statuses.remove(7);
        assert_eq!(statuses.watch().borrow().len(), 1);
        assert_eq!(statuses.status(7).state(), ModelState::Unloaded);
        statuses.enter(7, ModelState::Ready);
        assert_eq!(statuses.watch().borrow().len(), 1, "the state of a model that is gone is not published");
        statuses.remove(0);
        let verdict = statuses.watch_readiness().borrow().clone();
        assert_eq!((verdict.ok, verdict.message.as_str()), (false, "no model is loaded"));
    }

    #[test]
    fn two_versions_change_their_slots_and_readiness_follows_the_current_one() {
        let statuses = statuses(&["a", "b"]);
        make_ready(&statuses, 0);
        make_ready(&statuses, 1);
        let spec = |revision: &str| ModelSpec { revision: revision.into(), ..ModelSpec::new("a", path()) };
        statuses.add_beside(0, 2, &spec("r2"));
        statuses.failed(2, &Failure::permanent("MalformedModel", "not a model"));
        assert!(ready(&statuses), "a candidate that fails changes nothing");
        assert_eq!(statuses.model(0).slots[1].reason, "MalformedModel");
        statuses.add_beside(0, 3, &spec("r3"));
        let facts = LoadedFacts { digest: "d3".into(), memory_bytes: 7, ..LoadedFacts::default() };
        statuses.loaded(3, &facts);
        make_ready(&statuses, 3);
        statuses.swap(0, SlotRole::Previous);
        let models = statuses.watch().borrow().clone();
        let listed: Vec<_> =
            models.iter().map(|model| (model.name.as_str(), model.digest.as_str())).collect();
        assert_eq!(listed, [("a", "d3"), ("b", "")]);
        let slots: Vec<_> = models[0]
            .slots
            .iter()
            .map(|slot| (slot.role(), slot.revision.as_str(), slot.memory_bytes))
            .collect();
        assert_eq!(slots, [(SlotRole::Current, "r3", 7), (SlotRole::Previous, "", 0)]);
        statuses.remove(0);
        assert_eq!(statuses.model(3).slots.len(), 1);
        statuses.take_over(3, 1);
        let models = statuses.watch().borrow().clone();
        assert_eq!((models.len(), models[0].name.as_str(), models[0].slots.len()), (1, "a", 2));
        assert_eq!(models[0].slots[1].revision, "r3");
        assert!(ready(&statuses));
    }

    #[test]
    fn what_comes_too_late_changes_no_state() {
        let statuses = statuses(&["a"]);
        statuses.draining();
        for late in [ModelState::Loading, ModelState::Warming, ModelState::Ready] {
            statuses.enter(0, late);
        }
        statuses.failed(0, &Failure::permanent("MalformedModel", "not a model"));
        assert_eq!(
            (statuses.status(0).state(), statuses.status(0).reason.as_str()),
            (ModelState::Draining, "")
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_load_shows_its_rate_and_its_estimated_end() {
        let statuses = statuses(&["a"]);
        statuses.enter(0, ModelState::Loading);
        for second in 0..=4_u64 {
            statuses.progress(0, second * 100, 1000);
            tokio::time::advance(std::time::Duration::from_secs(1)).await;
        }
        let slot = statuses.model(0).slots[0].clone();
        assert_eq!((slot.bytes_per_second, slot.eta_ms), (100, Some(6000)));
        statuses.enter(0, ModelState::Warming);
        let slot = statuses.model(0).slots[0].clone();
        assert_eq!((slot.bytes_per_second, slot.eta_ms), (0, None), "there is nothing to load any more");
    }
}
