//! The versions of a model: one is loaded beside the one that answers, swapped in, rolled back and unloaded.
//!
//! Every operation belongs to the process and not to the call that asked for it. A call that breaks off
//! changes nothing about it, and one that is sent again joins it or finds it done.

use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use futures::future::join_all;
use tokio::task::JoinHandle;
use trustformers_proto::v1::{ModelState, ModelStatus, SlotRole};

use crate::failure::Failure;
use crate::lifecycle::ManagedModel;
use crate::load::Loader;
use crate::model_table::{ControlError, ModelTable, NamedModel, SecondVersion, ServedModel};
use crate::slots::{
    LoadDecision, Refusal, RollbackDecision, SlotFacts, SwapDecision, SwapTarget, UnloadDecision,
    VersionFilter, check_take_over, decide_beside, decide_load, decide_rollback, decide_swap, decide_unload,
    find_version,
};
use crate::spec::ModelSpec;

/// What stands in a snapshot of one version, with the texts that [`SlotFacts`] borrows.
struct VersionFacts {
    role: SlotRole,
    status: ModelStatus,
    same_settings: bool,
}

impl ModelTable {
    /// Loads a model, or another revision of one, and waits until it is ready. The load goes on when the
    /// future is dropped, and the same request joins it.
    ///
    /// # Errors
    /// A name or a slot that is in use, or why it could not be loaded. A new model that could not be loaded
    /// is gone then; a version of a model stays Failed in its slot until another load.
    pub(crate) async fn load(
        self: &Arc<Self>,
        spec: ModelSpec,
        drain_timeout: Duration,
    ) -> Result<ModelStatus, ControlError> {
        let name = spec.name().to_owned();
        let version = self.begin_load(spec, drain_timeout)?;
        self.loaded(&version, name).await?;
        Ok(self.statuses().model(version.id))
    }

    /// Loads a model beside the one of the same name and lets it take that one's place, its names included;
    /// then the old one answers what it has begun and is unloaded in the background. The old one stays where
    /// the new one cannot be loaded, for example because both do not fit in memory.
    ///
    /// # Errors
    /// Why the old one stays.
    pub(crate) async fn replace(
        self: &Arc<Self>,
        spec: ModelSpec,
        drain_timeout: Duration,
    ) -> Result<(), ControlError> {
        let name = spec.name().to_owned();
        let version = {
            let changing = self.lock();
            let model = self.find(&name)?.model;
            let decision = decide(&name, || decide_beside(&slots(&self.facts(&model, None))))?;
            self.load_beside(&changing, &model, NewVersion { spec, decision, drain_timeout })?
        };
        self.loaded(&version, name.clone()).await?;
        let changing = self.lock();
        let model = self.find(&name)?.model;
        let is_there = model.second.as_ref().is_some_and(|second| Arc::ptr_eq(&second.version, &version));
        if !is_there {
            return Err(ControlError::Unloaded { name });
        }
        let old = Arc::clone(&model.current);
        let (version_id, new_names) = (version.id, version.spec.names.clone());
        let names = new_names.as_slice().into();
        let changed = ServedModel { current: version, names, second: None, ..ServedModel::clone(&model) };
        let publish = || {
            self.statuses().swap(old.id, SlotRole::Previous);
            self.statuses().rename(version_id, &new_names);
        };
        self.put_model(&changing, changed, publish)?;
        drop(self.release(&model, old, drain_timeout));
        Ok(())
    }

    /// Lets another version answer for a model.
    ///
    /// # Errors
    /// The version is not loaded, or another one answers than is expected.
    pub(crate) fn swap(
        self: &Arc<Self>,
        name: &str,
        target: &SwapTarget,
        expected_digest: Option<&str>,
        drain_timeout: Duration,
    ) -> Result<ModelStatus, ControlError> {
        let swapped = self.try_swap(name, target, expected_digest, drain_timeout);
        self.note_refused(swapped)
    }

    fn try_swap(
        self: &Arc<Self>,
        name: &str,
        target: &SwapTarget,
        expected_digest: Option<&str>,
        drain_timeout: Duration,
    ) -> Result<ModelStatus, ControlError> {
        let changing = self.lock();
        let model = self.find(name)?.model;
        let facts = self.facts(&model, None);
        let index = match target {
            SwapTarget::Version(wanted) => decide(name, || find_version(&slots(&facts), wanted))?,
            SwapTarget::OtherModel(other) => {
                let NamedModel { model: found, version } = self.find(other)?;
                if found.id != model.id {
                    let swap = TakeOver { model, other: found, expected_digest, drain_timeout };
                    return self.take_over(&changing, &swap);
                }
                let second = model.second.as_ref();
                usize::from(second.is_some_and(|second| {
                    version.as_ref().is_some_and(|version| Arc::ptr_eq(version, &second.version))
                }))
            }
        };
        match decide(name, || decide_swap(&slots(&facts), index, expected_digest))? {
            SwapDecision::Already => {}
            SwapDecision::Swap => self.change_slots(&changing, &model, SlotRole::Previous)?,
        }
        Ok(self.statuses().model(model.current.id))
    }

    /// Lets the version before the last swap answer again.
    ///
    /// # Errors
    /// There is none, or another version answers than is expected.
    pub(crate) fn rollback(
        &self,
        name: &str,
        expected_digest: Option<&str>,
    ) -> Result<ModelStatus, ControlError> {
        self.note_refused(self.try_rollback(name, expected_digest))
    }

    fn try_rollback(&self, name: &str, expected_digest: Option<&str>) -> Result<ModelStatus, ControlError> {
        let changing = self.lock();
        let model = self.find(name)?.model;
        let facts = self.facts(&model, None);
        match decide(name, || decide_rollback(&slots(&facts), expected_digest))? {
            RollbackDecision::Already => {}
            RollbackDecision::Swap => self.change_slots(&changing, &model, SlotRole::RolledBack)?,
        }
        Ok(self.statuses().model(model.current.id))
    }

    /// Unloads a model, or one version of it. The unloading goes on when the handle is dropped.
    ///
    /// # Errors
    /// No model has this name, or the version answers for the model.
    pub(crate) fn unload(
        self: &Arc<Self>,
        name: &str,
        meant: &VersionFilter,
        drain_timeout: Duration,
    ) -> Result<JoinHandle<ModelStatus>, ControlError> {
        let changing = self.lock();
        let NamedModel { model, version } = self.find(name)?;
        let facts = self.facts(&model, None);
        let decision = match version.filter(|_| meant.is_empty()) {
            // The name is that of one version alone.
            Some(version) if model.second.is_none() && Arc::ptr_eq(&version, &model.current) => {
                UnloadDecision::Model
            }
            Some(version) if Arc::ptr_eq(&version, &model.current) => {
                return Err(refused(name, Refusal::Answers));
            }
            Some(_) => UnloadDecision::Second,
            None => decide(name, || decide_unload(&slots(&facts), meant))?,
        };
        match (decision, &model.second) {
            (UnloadDecision::Model, _) => self.unload_whole(&changing, &model, drain_timeout),
            (UnloadDecision::Second, Some(second)) => {
                self.empty_second_slot(&changing, &model)?;
                self.statuses().enter(second.version.id, ModelState::Draining);
                Ok(self.release(&model, Arc::clone(&second.version), drain_timeout))
            }
            (UnloadDecision::Gone | UnloadDecision::Second, _) => {
                let mut gone = ModelStatus { name: model.name().to_owned(), ..ModelStatus::default() };
                gone.digest = meant.digest.clone().unwrap_or_default();
                gone.revision = meant.revision.clone().unwrap_or_default();
                gone.set_state(ModelState::Unloaded);
                Ok(tokio::spawn(async move { gone }))
            }
        }
    }

    /// Begins a load, or finds the one that is asked for.
    fn begin_load(
        self: &Arc<Self>,
        spec: ModelSpec,
        drain_timeout: Duration,
    ) -> Result<Arc<ManagedModel>, ControlError> {
        let loader = self.loader()?;
        let changing = self.lock();
        let name = spec.name().to_owned();
        let Ok(NamedModel { model, .. }) = self.find(&name) else {
            let version = self.insert_locked(&changing, spec)?;
            let (table, loading) = (Arc::clone(self), Arc::clone(&version));
            version.spawn(async move {
                let outcome = table.attempt(&loading, &loader, drain_timeout).await;
                if let Err(failure) = &outcome {
                    tracing::warn!(model = loading.spec.name(), reason = failure.reason, "{failure}");
                    table.drop_failed(&loading);
                }
                loading.settle(outcome);
            });
            return Ok(version);
        };
        if spec.revision.is_empty() {
            return Err(ControlError::NameTaken { name });
        }
        let facts = self.facts(&model, Some(&spec));
        match decide(&name, || decide_load(&slots(&facts), &spec.revision))? {
            LoadDecision::Join(0) => Ok(Arc::clone(&model.current)),
            LoadDecision::Join(_) => {
                let second = model.second.as_ref().map(|second| Arc::clone(&second.version));
                second.ok_or(ControlError::Unloaded { name })
            }
            decision => {
                let names = model.names.to_vec();
                let spec = ModelSpec { names, ..spec };
                self.load_beside(&changing, &model, NewVersion { spec, decision, drain_timeout })
            }
        }
    }

    /// Puts a version into the second slot and begins to load it, once what the slot held has ended.
    fn load_beside(
        self: &Arc<Self>,
        changing: &MutexGuard<'_, ()>,
        model: &Arc<ServedModel>,
        new: NewVersion,
    ) -> Result<Arc<ManagedModel>, ControlError> {
        let NewVersion { mut spec, decision, drain_timeout } = new;
        let loader = self.loader()?;
        if let Some(serving) = model.current.answering() {
            // Callers of a model that does something else would be refused.
            spec.task.get_or_insert(serving.runner.task());
        }
        let version = self.new_version(spec);
        let second = SecondVersion { version: Arc::clone(&version), role: SlotRole::Candidate };
        let changed = ServedModel { second: Some(second), ..ServedModel::clone(model) };
        let publish = || self.statuses().add_beside(model.current.id, version.id, &version.spec);
        self.put_model(changing, changed, publish)?;
        let before = model.second.as_ref().filter(|_| decision == LoadDecision::Replace);
        let leaves = before.map(|before| self.release(model, Arc::clone(&before.version), drain_timeout));
        let (table, loading, leaving) = (Arc::clone(self), Arc::clone(&version), Arc::clone(&model.leaving));
        version.spawn(async move {
            if leaves.is_some() || leaving.try_lock().is_err() {
                let why = "waits until the version that its slot held has answered what it began";
                table.statuses().waits(loading.id, why);
            }
            let free = async {
                if let Some(leaves) = leaves {
                    // It ends even if its answers take too long; an error means that the process ends.
                    let _ = leaves.await;
                }
                drop(leaving.lock().await);
            };
            tokio::select! {
                () = free => table.statuses().waits(loading.id, ""),
                () = loading.until_retired() => return,
            }
            let outcome = table.attempt(&loading, &loader, drain_timeout).await;
            if let Err(failure) = &outcome {
                table.statuses().failed(loading.id, failure);
            }
            loading.settle(outcome);
        });
        Ok(version)
    }

    /// Loads a version. Where memory does not suffice, the versions that are only kept for a rollback end,
    /// those of other models too, and it is tried once more.
    async fn attempt(
        self: &Arc<Self>,
        version: &Arc<ManagedModel>,
        loader: &Arc<Loader>,
        drain_timeout: Duration,
    ) -> Result<(), Failure> {
        match version.run_once(self.statuses(), loader).await {
            Err(failure) if failure.reason == "InsufficientMemory" => {
                if !self.release_kept(drain_timeout).await {
                    return Err(failure);
                }
                version.run_once(self.statuses(), loader).await
            }
            outcome => outcome,
        }
    }

    /// Ends the versions that are kept for a rollback. Returns whether there were any.
    async fn release_kept(self: &Arc<Self>, drain_timeout: Duration) -> bool {
        let leaving: Vec<JoinHandle<ModelStatus>> = {
            let changing = self.lock();
            let models = self.snapshot().models().to_vec();
            let kept = models.iter().filter_map(|model| {
                let second = model.second.as_ref()?;
                let is_kept = matches!(second.role, SlotRole::Previous | SlotRole::RolledBack);
                is_kept.then_some((model, second))
            });
            kept.filter_map(|(model, second)| {
                self.empty_second_slot(&changing, model).ok()?;
                tracing::info!(
                    model = model.name(),
                    "the kept version ends, because another load needs its memory"
                );
                Some(self.release(model, Arc::clone(&second.version), drain_timeout))
            })
            .collect()
        };
        let any = !leaving.is_empty();
        join_all(leaving).await;
        any
    }

    /// Waits for a load that was begun or joined.
    async fn loaded(&self, version: &ManagedModel, name: String) -> Result<(), ControlError> {
        match version.outcome().await {
            Ok(()) => Ok(()),
            Err(_) if version.is_retired() => Err(ControlError::Unloaded { name }),
            Err(failure) => Err(ControlError::NotLoaded { name, failure }),
        }
    }

    /// The only version of another model becomes the current one; the other model is one no more.
    fn take_over(
        self: &Arc<Self>,
        changing: &MutexGuard<'_, ()>,
        swap: &TakeOver<'_>,
    ) -> Result<ModelStatus, ControlError> {
        let TakeOver { model, other, expected_digest, drain_timeout } = swap;
        let name = model.name();
        if other.second.is_some() {
            return Err(refused(name, Refusal::OtherModelHasTwo { name: other.name().to_owned() }));
        }
        let (facts, of_other) = (self.facts(model, None), self.facts(other, None));
        decide(name, || check_take_over(&slots(&facts), &slots(&of_other)[0], *expected_digest))?;
        let task = |model: &ServedModel| model.current.answering().map(|serving| serving.runner.task());
        if let (Some(task), Some(found)) = (task(model), task(other))
            && task != found
        {
            let (task, found) = (task.as_str(), found.as_str());
            return Err(refused(name, Refusal::OtherTask { name: other.name().to_owned(), found, task }));
        }
        let before = SecondVersion { version: Arc::clone(&model.current), role: SlotRole::Previous };
        let changed = ServedModel {
            current: Arc::clone(&other.current),
            second: Some(before),
            ..ServedModel::clone(model)
        };
        let mut models = self.without(other.id);
        let present = models.iter_mut().find(|present| present.id == model.id);
        *present.ok_or_else(|| ControlError::Unloaded { name: name.to_owned() })? = Arc::new(changed);
        let publish = || self.statuses().take_over(model.current.id, other.current.id);
        self.put(changing, models, publish)?;
        if let Some(second) = &model.second {
            drop(self.release(model, Arc::clone(&second.version), *drain_timeout));
        }
        self.note_swap(name, "swapped");
        tracing::info!(model = name, from = other.name(), "the model is answered by another version");
        Ok(self.statuses().model(other.current.id))
    }

    /// The two versions of a model change their slots; the one that answered so far gets `role`.
    fn change_slots(
        &self,
        changing: &MutexGuard<'_, ()>,
        model: &Arc<ServedModel>,
        role: SlotRole,
    ) -> Result<(), ControlError> {
        let Some(SecondVersion { version, .. }) = &model.second else { return Ok(()) };
        let before = SecondVersion { version: Arc::clone(&model.current), role };
        let (current, second) = (Arc::clone(version), Some(before));
        let changed = ServedModel { current, second, ..ServedModel::clone(model) };
        self.put_model(changing, changed, || self.statuses().swap(model.current.id, role))?;
        self.note_swap(model.name(), if role == SlotRole::RolledBack { "rolled_back" } else { "swapped" });
        let (revision, digest) = (version.spec.revision.as_str(), version.digest());
        tracing::info!(model = model.name(), revision, digest, "the model is answered by another version");
        Ok(())
    }

    fn empty_second_slot(
        &self,
        changing: &MutexGuard<'_, ()>,
        model: &Arc<ServedModel>,
    ) -> Result<(), ControlError> {
        self.put_model(changing, ServedModel { second: None, ..ServedModel::clone(model) }, || ())
    }

    /// Ends a version that no request finds any more. The next version of this model is loaded only
    /// afterwards. Gives the last state of the version.
    fn release(
        self: &Arc<Self>,
        model: &ServedModel,
        version: Arc<ManagedModel>,
        drain_timeout: Duration,
    ) -> JoinHandle<ModelStatus> {
        // At once, so that a load that begins after this call cannot overtake it.
        let leaving = Arc::clone(&model.leaving).try_lock_owned().ok();
        let (table, turn) = (Arc::clone(self), Arc::clone(&model.leaving));
        tokio::spawn(async move {
            let _leaving = match leaving {
                Some(leaving) => leaving,
                None => turn.lock_owned().await,
            };
            let mut last = table.statuses().status(version.id);
            version.retire(drain_timeout).await;
            table.statuses().remove(version.id);
            table.forget(&version);
            version.spec.name().clone_into(&mut last.name);
            last.revision.clone_from(&version.spec.revision);
            last.set_state(ModelState::Unloaded);
            last
        })
    }

    /// Counts a swap or a rollback that was refused.
    fn note_refused(&self, result: Result<ModelStatus, ControlError>) -> Result<ModelStatus, ControlError> {
        if let Err(ControlError::Refused { name, .. }) = &result {
            self.note_swap(name, "refused");
        }
        result
    }

    fn note_swap(&self, name: &str, result: &str) {
        if let Ok(loader) = self.loader() {
            loader.note_swap(name, result);
        }
    }

    fn find(&self, name: &str) -> Result<NamedModel, ControlError> {
        let unknown = || ControlError::Unknown { name: name.to_owned() };
        self.snapshot().named(name).cloned().ok_or_else(unknown)
    }

    /// What decides about the versions of a model; `asked` is the version of a load.
    fn facts(&self, model: &ServedModel, asked: Option<&ModelSpec>) -> Vec<VersionFacts> {
        let fact = |version: &Arc<ManagedModel>, role| VersionFacts {
            role,
            status: self.statuses().status(version.id),
            same_settings: asked.is_some_and(|asked| version.spec.same_settings(asked)),
        };
        let second = model.second.as_ref().map(|second| fact(&second.version, second.role));
        std::iter::once(fact(&model.current, SlotRole::Current)).chain(second).collect()
    }
}

/// A version that is to be loaded into the second slot of a model.
struct NewVersion {
    spec: ModelSpec,
    decision: LoadDecision,
    /// How long what the slot holds may answer.
    drain_timeout: Duration,
}

/// A swap to the version of another model.
struct TakeOver<'a> {
    model: Arc<ServedModel>,
    other: Arc<ServedModel>,
    expected_digest: Option<&'a str>,
    drain_timeout: Duration,
}

fn slots(facts: &[VersionFacts]) -> Vec<SlotFacts<'_>> {
    let slots = facts.iter().map(|facts| SlotFacts {
        role: facts.role,
        state: facts.status.state(),
        revision: &facts.status.revision,
        digest: &facts.status.digest,
        same_settings: facts.same_settings,
    });
    slots.collect()
}

fn decide<T>(name: &str, decision: impl FnOnce() -> Result<T, Refusal>) -> Result<T, ControlError> {
    decision().map_err(|refusal| refused(name, refusal))
}

fn refused(name: &str, refusal: Refusal) -> ControlError {
    ControlError::Refused { name: name.to_owned(), refusal }
}

#[cfg(test)]
mod tests;
