//! The models of a process: which there are, and how one is added and unloaded while the others serve.
//!
//! Requests read an immutable snapshot and wait for nothing. A change makes a new snapshot and puts it in
//! force at once; only then is the version that it leaves out told to end, so that a request that found it
//! meanwhile looks again. `version_table.rs` holds the changes of a model's versions.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use futures::future::join_all;
use tokio::task::JoinHandle;
use trustformers_proto::v1::{ModelState, ModelStatus, SlotRole};

use crate::adapters;
use crate::failure::Failure;
use crate::inflight::InflightRequests;
use crate::lifecycle::ManagedModel;
use crate::load::Loader;
use crate::slots::Refusal;
use crate::spec::{ModelSpec, SpecError};
use crate::status::ModelStatuses;

/// Why a model was not loaded, swapped or unloaded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// A name belongs to another model.
    #[error("{name:?} is the name of another model; choose another name, or unload that model first")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// No model has this name.
    #[error("no model answers to {name:?}")]
    Unknown {
        /// The name.
        name: String,
    },
    /// The model could not be loaded. Nothing of it is kept.
    #[error("model {name} could not be loaded ({}): {failure}", failure.reason)]
    NotLoaded {
        /// The model.
        name: String,
        /// Why.
        failure: Failure,
    },
    /// The model was unloaded while its load or its replacement was under way.
    #[error("model {name} was unloaded meanwhile")]
    Unloaded {
        /// The model.
        name: String,
    },
    /// The versions of the model do not allow it; they stay as they are.
    #[error("model {name}: {refusal}")]
    Refused {
        /// The model.
        name: String,
        /// Why.
        refusal: Refusal,
    },
    /// The server does not load models yet, or no more.
    #[error("the server is starting or ending, and loads no models now")]
    NotServing,
}

/// The models of a process.
pub(crate) struct ModelTable {
    current: ArcSwap<ModelSnapshot>,
    statuses: Arc<ModelStatuses>,
    pub(crate) inflight: Arc<InflightRequests>,
    loader: OnceLock<Arc<Loader>>,
    next_id: AtomicU64,
    /// Ids of the models that the process started with are below this one.
    first_later_id: u64,
    /// Held by whoever makes a new snapshot.
    changing: Mutex<()>,
}

/// A model: its names and its versions.
#[derive(Clone)]
pub(crate) struct ServedModel {
    /// The id of its first version. It stays when versions are swapped.
    pub(crate) id: u64,
    /// Names that callers may use; answers carry the first one. Not empty.
    pub(crate) names: Arc<[String]>,
    /// Answers requests that name no revision.
    pub(crate) current: Arc<ManagedModel>,
    /// The version in the second slot.
    pub(crate) second: Option<SecondVersion>,
    /// Held while a version leaves the second slot.
    pub(crate) leaving: Arc<tokio::sync::Mutex<()>>,
}

/// A version in the second slot.
#[derive(Clone)]
pub(crate) struct SecondVersion {
    pub(crate) version: Arc<ManagedModel>,
    pub(crate) role: SlotRole,
}

impl ServedModel {
    fn new(current: Arc<ManagedModel>) -> Self {
        let names = current.spec.names.clone().into();
        Self { id: current.id, names, current, second: None, leaving: Arc::default() }
    }

    /// The name that answers carry.
    pub(crate) fn name(&self) -> &str {
        self.names.first().map_or("", String::as_str)
    }

    /// Its versions, the current one first.
    pub(crate) fn versions(&self) -> impl Iterator<Item = &Arc<ManagedModel>> {
        std::iter::once(&self.current).chain(self.second.as_ref().map(|second| &second.version))
    }
}

/// The models at one moment, and the names that they answer to.
pub(crate) struct ModelSnapshot {
    models: Vec<Arc<ServedModel>>,
    by_name: HashMap<String, NamedModel>,
}

/// What a name stands for.
#[derive(Clone)]
pub(crate) struct NamedModel {
    pub(crate) model: Arc<ServedModel>,
    /// The version, where the name is that of one version alone: the name that it was loaded under before it
    /// was swapped in.
    pub(crate) version: Option<Arc<ManagedModel>>,
}

impl ModelSnapshot {
    /// # Errors
    /// The name that two models claim.
    fn new(models: Vec<Arc<ServedModel>>) -> Result<Self, ControlError> {
        let mut by_name: HashMap<String, NamedModel> = HashMap::new();
        let mut claim = |name: &String, named: NamedModel| match by_name.get(name) {
            Some(other) if !Arc::ptr_eq(&other.model, &named.model) => {
                Err(ControlError::NameTaken { name: name.clone() })
            }
            // A model's own names come before those of its versions.
            Some(_) => Ok(()),
            None => {
                by_name.insert(name.clone(), named);
                Ok(())
            }
        };
        for model in &models {
            for name in model.names.iter() {
                claim(name, NamedModel { model: Arc::clone(model), version: None })?;
            }
            for version in model.versions() {
                let named = NamedModel { model: Arc::clone(model), version: Some(Arc::clone(version)) };
                version.spec.names.iter().try_for_each(|name| claim(name, named.clone()))?;
            }
        }
        Ok(Self { models, by_name })
    }

    /// All models, in the order in which they were added.
    pub(crate) fn models(&self) -> &[Arc<ServedModel>] {
        &self.models
    }

    /// What answers to a name.
    pub(crate) fn named(&self, name: &str) -> Option<&NamedModel> {
        self.by_name.get(name)
    }

    /// What answers to a name: a model, or an adapter of one, whose name is beside it. An adapter's own name
    /// is enough where one model alone has it. A model's name comes before an adapter's.
    pub(crate) fn resolve(&self, name: &str) -> Option<(NamedModel, Option<String>)> {
        if let Some(named) = self.named(name) {
            return Some((named.clone(), None));
        }
        let of_model = || {
            let (model, adapter) = adapters::split_name(name)?;
            Some((self.named(model)?.clone(), Some(adapter.to_owned())))
        };
        of_model().or_else(|| Some((self.with_adapter(name)?, Some(name.to_owned()))))
    }

    /// The model that alone has a version with this adapter.
    fn with_adapter(&self, adapter: &str) -> Option<NamedModel> {
        let has = |version: &Arc<ManagedModel>| version.spec.adapters.iter().any(|own| own.name == adapter);
        let mut found = self.models.iter().filter(|model| model.versions().any(has));
        let model = found.next().filter(|_| found.next().is_none())?;
        Some(NamedModel { model: Arc::clone(model), version: None })
    }

    /// The first name of each model, and the names of its adapters.
    pub(crate) fn choices(&self) -> Vec<String> {
        let names = |model: &Arc<ServedModel>| {
            let name = model.name();
            let of_adapters =
                model.current.spec.adapters.iter().map(|own| adapters::full_name(name, &own.name));
            std::iter::once(name.to_owned()).chain(of_adapters).collect::<Vec<_>>()
        };
        self.models.iter().flat_map(names).collect()
    }

    fn versions(&self) -> impl Iterator<Item = &Arc<ManagedModel>> {
        self.models.iter().flat_map(|model| model.versions())
    }
}

impl ModelTable {
    /// The models of the configuration, Pending.
    ///
    /// # Errors
    /// When two claim one name.
    pub(crate) fn new(specs: Vec<ModelSpec>) -> Result<Self, SpecError> {
        let statuses = Arc::new(ModelStatuses::new(&specs));
        let inflight = InflightRequests::new();
        let served = |(id, spec)| ServedModel::new(Arc::new(ManagedModel::new(spec, id, inflight.part())));
        let models: Vec<Arc<ServedModel>> = (0..).zip(specs).map(served).map(Arc::new).collect();
        let first_later_id = models.len() as u64;
        let next_id = AtomicU64::new(first_later_id);
        let snapshot = ModelSnapshot::new(models).map_err(|error| match error {
            ControlError::NameTaken { name } => {
                SpecError::new("models", format!("{name:?} is the name of two models; give each its own"))
            }
            other => SpecError::new("models", other),
        })?;
        let current = ArcSwap::from_pointee(snapshot);
        Ok(Self {
            current,
            statuses,
            inflight,
            loader: OnceLock::new(),
            next_id,
            first_later_id,
            changing: Mutex::default(),
        })
    }

    /// The models now.
    pub(crate) fn snapshot(&self) -> Guard<Arc<ModelSnapshot>> {
        self.current.load()
    }

    pub(crate) fn statuses(&self) -> &Arc<ModelStatuses> {
        &self.statuses
    }

    /// Whether a model came while the process ran.
    pub(crate) fn joined_later(&self, model: &ServedModel) -> bool {
        model.id >= self.first_later_id
    }

    /// Begins to load the models of the configuration; further ones may be added from now on.
    pub(crate) fn start_loading(&self, loader: &Arc<Loader>) {
        let _changing = self.lock();
        if self.loader.set(Arc::clone(loader)).is_ok() {
            for managed in self.snapshot().versions() {
                managed.spawn(Arc::clone(managed).run(Arc::clone(&self.statuses), Arc::clone(loader)));
            }
        }
    }

    /// Stops loading and ends every engine; what they were answering ends with an error.
    pub(crate) async fn stop(&self) {
        let models = self.current.load_full();
        for version in models.versions() {
            version.stop().await;
        }
    }

    /// Adds a model and begins to load it, as one of the configuration: a failure is shown in its status, and
    /// one that may pass is tried again.
    ///
    /// # Errors
    /// [`ControlError::NameTaken`] and [`ControlError::NotServing`].
    pub(crate) fn add(&self, spec: ModelSpec) -> Result<(), ControlError> {
        let loader = self.loader()?;
        let managed = self.insert(spec)?;
        managed.spawn(Arc::clone(&managed).run(Arc::clone(&self.statuses), loader));
        Ok(())
    }

    /// Takes a model out and unloads its versions. The unloading goes on when the handle is dropped.
    ///
    /// # Errors
    /// None: fewer models cannot claim one name.
    pub(crate) fn unload_whole(
        self: &Arc<Self>,
        changing: &MutexGuard<'_, ()>,
        model: &Arc<ServedModel>,
        drain_timeout: Duration,
    ) -> Result<JoinHandle<ModelStatus>, ControlError> {
        self.put(changing, self.without(model.id), || ())?;
        let (table, model) = (Arc::clone(self), Arc::clone(model));
        Ok(tokio::spawn(async move {
            model.versions().for_each(|version| table.statuses.enter(version.id, ModelState::Draining));
            join_all(model.versions().map(|version| version.retire(drain_timeout))).await;
            let mut last = table.statuses.status(model.current.id);
            model.name().clone_into(&mut last.name);
            last.set_state(ModelState::Unloaded);
            table.statuses.remove(model.current.id);
            model.versions().for_each(|version| table.forget(version));
            tracing::info!(model = model.name(), "model unloaded");
            last
        }))
    }

    /// Takes the load times of a version out of the metrics, unless another one has its name.
    pub(crate) fn forget(&self, version: &ManagedModel) {
        let name = version.spec.name();
        let is_named = self.snapshot().versions().any(|other| other.spec.name() == name);
        if let Some(loader) = self.loader.get().filter(|_| !is_named) {
            loader.forget(&version.spec);
        }
    }

    pub(crate) fn loader(&self) -> Result<Arc<Loader>, ControlError> {
        self.loader.get().cloned().ok_or(ControlError::NotServing)
    }

    /// Adds a model, Pending. Its load is the caller's.
    pub(crate) fn insert(&self, spec: ModelSpec) -> Result<Arc<ManagedModel>, ControlError> {
        let changing = self.lock();
        self.insert_locked(&changing, spec)
    }

    pub(crate) fn insert_locked(
        &self,
        changing: &MutexGuard<'_, ()>,
        spec: ModelSpec,
    ) -> Result<Arc<ManagedModel>, ControlError> {
        let version = self.new_version(spec);
        let mut models = self.current.load().models.clone();
        models.push(Arc::new(ServedModel::new(Arc::clone(&version))));
        self.put(changing, models, || self.statuses.add(version.id, &version.spec))?;
        Ok(version)
    }

    pub(crate) fn new_version(&self, spec: ModelSpec) -> Arc<ManagedModel> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        Arc::new(ManagedModel::new(spec, id, self.inflight.part()))
    }

    /// Every model but this one.
    pub(crate) fn without(&self, id: u64) -> Vec<Arc<ServedModel>> {
        self.snapshot().models().iter().filter(|model| model.id != id).cloned().collect()
    }

    /// Takes the model of this version out, which could not be loaded.
    pub(crate) fn drop_failed(&self, version: &Arc<ManagedModel>) {
        let changing = self.lock();
        let is_meant = |model: &&Arc<ServedModel>| Arc::ptr_eq(&model.current, version);
        let found = self.snapshot().models().iter().find(is_meant).map(|model| model.id);
        if let Some(id) = found {
            // Fewer models cannot claim one name.
            let _ = self.put(&changing, self.without(id), || self.statuses.remove(version.id));
        }
    }

    /// Keeps others from changing the snapshot.
    pub(crate) fn lock(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts `changed` in the place of the model with the same id.
    pub(crate) fn put_model(
        &self,
        changing: &MutexGuard<'_, ()>,
        changed: ServedModel,
        publish: impl FnOnce(),
    ) -> Result<(), ControlError> {
        let mut models = self.current.load().models.clone();
        let present = models.iter_mut().find(|model| model.id == changed.id);
        let Some(present) = present else {
            return Err(ControlError::Unloaded { name: changed.name().to_owned() });
        };
        *present = Arc::new(changed);
        self.put(changing, models, publish)
    }

    /// Publishes the states that belong to a new snapshot and puts it in force; or leaves all as it is.
    pub(crate) fn put(
        &self,
        _changing: &MutexGuard<'_, ()>,
        models: Vec<Arc<ServedModel>>,
        publish: impl FnOnce(),
    ) -> Result<(), ControlError> {
        let snapshot = ModelSnapshot::new(models)?;
        publish();
        self.current.store(Arc::new(snapshot));
        Ok(())
    }
}
