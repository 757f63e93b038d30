//! The states of all models, published to any number of watchers.
//!
//! One writer side, any number of readers, the latest value always: a watcher that is slow skips states and
//! does not delay the writer. Readiness is a function of the states, so the two can never contradict each
//! other.

use std::time::{SystemTime, UNIX_EPOCH};

use std::sync::Arc;
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
    models: watch::Sender<Models>,
    ready: watch::Sender<Verdict>,
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

impl ModelStatuses {
    /// All models Pending.
    pub fn new(specs: &[ModelSpec]) -> Self {
        let models: Vec<ModelStatus> = specs
            .iter()
            .map(|spec| ModelStatus {
                name: spec.name().to_owned(),
                revision: spec.revision.clone(),
                task: Task::to_wire(spec.task),
                state: ModelState::Pending as i32,
                since_unix_ms: now_unix_ms(),
                ..ModelStatus::default()
            })
            .collect();
        let ready = watch::Sender::new(readiness(&models));
        Self { models: watch::Sender::new(models.into()), ready }
    }

    /// The states now and after each change.
    pub fn watch(&self) -> watch::Receiver<Models> {
        self.models.subscribe()
    }

    /// Readiness now and after each change.
    pub fn watch_readiness(&self) -> watch::Receiver<Verdict> {
        self.ready.subscribe()
    }

    /// The state of one model.
    pub fn status(&self, index: usize) -> ModelStatus {
        self.models.borrow()[index].clone()
    }

    /// Whether loading is over, one way or the other, for every model.
    pub fn startup(&self) -> Verdict {
        let models = self.models.borrow();
        match models.iter().find(|model| is_starting(model.state())) {
            Some(model) => Verdict::no(describe(model)),
            None => Verdict::yes("start-up is over"),
        }
    }

    /// A model enters a state; the cause of an earlier state is forgotten. Entering the state that it is in
    /// already, as another attempt to load does, forgets nothing, so that the cause does not flicker.
    pub fn enter(&self, index: usize, state: ModelState) {
        let news = self.status(index).state() != state;
        self.change(index, state, |model| {
            if news {
                model.reason.clear();
                model.message.clear();
            }
        });
    }

    /// The progress of loading. It does not change the state.
    pub fn progress(&self, index: usize, loaded_bytes: u64, total_bytes: u64) {
        self.publish(index, |model| {
            model.loaded_bytes = loaded_bytes;
            model.total_bytes = total_bytes;
        });
    }

    /// The model is on its device; what is known of it stays with it from now on.
    pub fn loaded(&self, index: usize, facts: &LoadedFacts) {
        self.publish(index, |model| {
            model.digest.clone_from(&facts.digest);
            model.device.clone_from(&facts.device);
            model.context_tokens = facts.context_tokens;
            model.embedding_dimensions = facts.embedding_dimensions;
            model.task = Task::to_wire(facts.task);
        });
    }

    /// Loading failed but is tried again; the state stays and the cause shows. The words are the same for
    /// every attempt: each change would be one more Event.
    pub fn will_retry(&self, index: usize, failure: &Failure) {
        let message = format!("{failure}; it is tried again");
        self.publish(index, |model| {
            model.reason = failure.reason.to_owned();
            model.message = message;
        });
    }

    /// Loading failed for good.
    pub fn failed(&self, index: usize, failure: &Failure) {
        self.change(index, ModelState::Failed, |model| {
            model.reason = failure.reason.to_owned();
            model.message.clone_from(&failure.message);
        });
    }

    /// The process was asked to end: no model is ready any more.
    pub fn draining(&self) {
        let count = self.models.borrow().len();
        for index in 0..count {
            if self.status(index).state() != ModelState::Failed {
                self.enter(index, ModelState::Draining);
            }
        }
    }

    fn change(&self, index: usize, state: ModelState, more: impl FnOnce(&mut ModelStatus)) {
        self.publish(index, |model| {
            if model.state() != state {
                model.since_unix_ms = now_unix_ms();
            }
            model.set_state(state);
            more(model);
        });
        let model = self.status(index);
        let (name, state) = (model.name.as_str(), state_word(state));
        if model.message.is_empty() {
            tracing::info!(model = name, state, "model state");
        } else {
            tracing::error!(model = name, state, reason = model.reason, "{}", model.message);
        }
    }

    fn publish(&self, index: usize, change: impl FnOnce(&mut ModelStatus)) {
        self.models.send_modify(|models| {
            change(&mut Arc::make_mut(models)[index]);
            // Within the change, so that no watcher sees a state whose readiness is not published yet.
            let verdict = readiness(models);
            self.ready.send_if_modified(|present| {
                let differs = *present != verdict;
                *present = verdict;
                differs
            });
        });
    }
}

/// Ready means: every model has left its start-up, none drains, and at least one serves.
fn readiness(models: &[ModelStatus]) -> Verdict {
    let blocking = |model: &&ModelStatus| is_starting(model.state()) || model.state() == ModelState::Draining;
    if let Some(model) = models.iter().find(blocking) {
        return Verdict::no(describe(model));
    }
    let failed: Vec<String> =
        models.iter().filter(|model| model.state() == ModelState::Failed).map(describe).collect();
    if models.iter().any(|model| model.state() == ModelState::Ready) {
        let but = if failed.is_empty() { String::new() } else { format!(", but {}", failed.join("; ")) };
        return Verdict::yes(format!("ready{but}"));
    }
    Verdict::no(if failed.is_empty() { "no model is loaded".to_owned() } else { failed.join("; ") })
}

fn is_starting(state: ModelState) -> bool {
    matches!(state, ModelState::Pending | ModelState::Loading | ModelState::Warming)
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
}
