//! The states of all models, published to any number of watchers.
//!
//! One writer side, any number of readers, the latest value always: a watcher that is slow skips states and
//! does not delay the writer. Readiness is a function of the states, so the two can never contradict each
//! other. Models come and go while the process runs, so each has an id that no other model of the process
//! ever gets.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use tokio::sync::watch;
use trustformers_api::Verdict;
use trustformers_api::http::state_word;
use trustformers_api::inference::Models;
use trustformers_proto::Task;
use trustformers_proto::v1::{ModelState, ModelStatus};

use crate::failure::Failure;
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
    id: u64,
    /// The model whose place it took, which may still answer what it has begun.
    replaced: Option<u64>,
    /// Whether start-up waits for it. A model that is added later delays nothing: the others serve.
    at_start: bool,
    status: ModelStatus,
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
}

impl StatusEntry {
    fn pending(id: u64, spec: &ModelSpec, at_start: bool) -> Self {
        let mut status = ModelStatus {
            name: spec.name().to_owned(),
            names: spec.names.clone(),
            revision: spec.revision.clone(),
            task: Task::to_wire(spec.task),
            since_unix_ms: now_unix_ms(),
            ..ModelStatus::default()
        };
        status.set_state(ModelState::Pending);
        Self { id, replaced: None, at_start, status }
    }

    fn is_of(&self, id: u64) -> bool {
        self.id == id || self.replaced == Some(id)
    }

    fn blocks_startup(&self) -> bool {
        self.at_start && is_starting(self.status.state())
    }
}

impl ModelStatuses {
    /// All models Pending, with the ids 0, 1, 2, ...
    pub fn new(specs: &[ModelSpec]) -> Self {
        let entries = (0..).zip(specs).map(|(id, spec)| StatusEntry::pending(id, spec, true)).collect();
        Self::of(StatusTable { entries, ending: false })
    }

    /// The states of one model that is not published with the others, Pending.
    pub fn of_one(id: u64, spec: &ModelSpec) -> Self {
        Self::of(StatusTable { entries: vec![StatusEntry::pending(id, spec, true)], ending: false })
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

    /// The state of one model; without a name and Unloaded where no model has this id any more.
    pub fn status(&self, id: u64) -> ModelStatus {
        let table = self.table.load();
        table.entries.iter().find(|entry| entry.is_of(id)).map_or_else(unloaded, |entry| entry.status.clone())
    }

    /// Whether loading is over, one way or the other, for every model that start-up waits for.
    pub fn startup(&self) -> Verdict {
        let table = self.table.load();
        match table.entries.iter().find(|entry| entry.blocks_startup()) {
            Some(entry) => Verdict::no(describe(&entry.status)),
            None => Verdict::yes("start-up is over"),
        }
    }

    /// A model is added, Pending. It does not change the readiness of the others.
    pub fn add(&self, id: u64, spec: &ModelSpec) {
        self.write(|table| table.entries.push(StatusEntry::pending(id, spec, false)));
    }

    /// A model is gone.
    pub fn remove(&self, id: u64) {
        self.write(|table| table.entries.retain(|entry| !entry.is_of(id)));
    }

    /// A model takes the place of another one in the list, with its state, which then is the state of both.
    pub fn replace(&self, old: u64, id: u64, status: ModelStatus) {
        self.write(|table| {
            if let Some(entry) = table.entries.iter_mut().find(|entry| entry.is_of(old)) {
                *entry = StatusEntry { id, replaced: Some(old), at_start: entry.at_start, status };
            }
        });
    }

    /// A model enters a state; the cause of an earlier state is forgotten. Entering the state that it is in
    /// already, as another attempt to load does, forgets nothing, so that the cause does not flicker.
    pub fn enter(&self, id: u64, state: ModelState) {
        let news = self.status(id).state() != state;
        self.change(id, state, |model| {
            if news {
                model.reason.clear();
                model.message.clear();
            }
        });
    }

    /// The progress of loading. It does not change the state.
    pub fn progress(&self, id: u64, loaded_bytes: u64, total_bytes: u64) {
        self.publish(id, |model| {
            model.loaded_bytes = loaded_bytes;
            model.total_bytes = total_bytes;
        });
    }

    /// The model is on its device; what is known of it stays with it from now on.
    pub fn loaded(&self, id: u64, facts: &LoadedFacts) {
        self.publish(id, |model| {
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
        self.publish(id, |model| {
            model.reason = failure.reason.to_owned();
            model.message = message;
        });
    }

    /// Loading failed for good.
    pub fn failed(&self, id: u64, failure: &Failure) {
        self.change(id, ModelState::Failed, |model| {
            model.reason = failure.reason.to_owned();
            model.message.clone_from(&failure.message);
        });
    }

    /// The process was asked to end: no model is ready any more.
    pub fn draining(&self) {
        self.write(|table| table.ending = true);
        let entries: Vec<StatusEntry> = self.table.load().entries.clone();
        for StatusEntry { id, status, .. } in entries {
            if status.state() != ModelState::Failed {
                self.enter(id, ModelState::Draining);
            }
        }
    }

    fn change(&self, id: u64, state: ModelState, more: impl FnOnce(&mut ModelStatus)) {
        let changed = self.publish(id, |model| {
            if model.state() != state {
                model.since_unix_ms = now_unix_ms();
            }
            model.set_state(state);
            more(model);
        });
        let Some(model) = changed else { return };
        let (name, state) = (model.name.as_str(), state_word(state));
        if model.message.is_empty() {
            tracing::info!(model = name, state, "model state");
        } else {
            tracing::error!(model = name, state, reason = model.reason, "{}", model.message);
        }
    }

    /// Changes a model's state and gives the new one. None where the model is gone.
    fn publish(&self, id: u64, change: impl FnOnce(&mut ModelStatus)) -> Option<ModelStatus> {
        let mut changed = None;
        self.write(|table| {
            if let Some(entry) = table.entries.iter_mut().find(|entry| entry.is_of(id)) {
                change(&mut entry.status);
                changed = Some(entry.status.clone());
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
        self.entries.iter().map(|entry| entry.status.clone()).collect()
    }

    /// Ready means: the process is not ending, every model that start-up waits for has left its start-up, and
    /// at least one serves. One model that is unloaded or added while the others serve changes nothing.
    fn readiness(&self) -> Verdict {
        if self.ending {
            let draining = self.entries.iter().find(|entry| entry.status.state() == ModelState::Draining);
            let ending = || "the server is ending".to_owned();
            return Verdict::no(draining.map_or_else(ending, |entry| describe(&entry.status)));
        }
        if let Some(entry) = self.entries.iter().find(|entry| entry.blocks_startup()) {
            return Verdict::no(describe(&entry.status));
        }
        let states = || self.entries.iter().map(|entry| &entry.status);
        let failed: Vec<String> =
            states().filter(|model| model.state() == ModelState::Failed).map(describe).collect();
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
        statuses.enter(1, ModelState::Ready);
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
        statuses.enter(0, ModelState::Ready);
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
    fn a_replacement_takes_its_place_with_its_state() {
        let statuses = statuses(&["a", "b"]);
        statuses.enter(0, ModelState::Ready);
        statuses.enter(1, ModelState::Ready);
        let new = ModelStatuses::of_one(2, &ModelSpec::new("a", Source::from_path("/n")));
        new.loaded(2, &LoadedFacts { digest: "d2".into(), ..LoadedFacts::default() });
        new.enter(2, ModelState::Ready);
        statuses.replace(0, 2, new.status(2));
        let models = statuses.watch().borrow().clone();
        let listed: Vec<_> =
            models.iter().map(|model| (model.name.as_str(), model.digest.as_str())).collect();
        assert_eq!(listed, [("a", "d2"), ("b", "")]);
        assert_eq!(statuses.status(0), statuses.status(2), "the old one answers what it has begun");
        assert!(ready(&statuses));
    }
}
