//! The models of a process: which there are, and how one is added, replaced and unloaded while the others
//! serve.
//!
//! Requests read an immutable snapshot and wait for nothing. A change makes a new snapshot and puts it in
//! force at once; only then is the model that it leaves out told to end, so that a request that found it
//! meanwhile looks again.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use tokio::task::JoinHandle;
use trustformers_proto::v1::{ModelState, ModelStatus};

use crate::failure::Failure;
use crate::inflight::InflightRequests;
use crate::lifecycle::ManagedModel;
use crate::load::Loader;
use crate::spec::{ModelSpec, SpecError};
use crate::status::ModelStatuses;

/// Why a model was not loaded, replaced or unloaded.
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
    /// The server does not load models yet, or no more.
    #[error("the server is starting or ending, and loads no models now")]
    NotServing,
}

/// The models of a process.
pub(crate) struct ModelTable {
    current: ArcSwap<ModelSnapshot>,
    statuses: Arc<ModelStatuses>,
    inflight: Arc<InflightRequests>,
    loader: OnceLock<Arc<Loader>>,
    next_id: AtomicU64,
    /// Ids of the models that the process started with are below this one.
    first_later_id: u64,
    /// Held by whoever makes a new snapshot.
    changing: Mutex<()>,
}

/// The models at one moment, and the names that they answer to.
#[derive(Clone)]
pub(crate) struct ModelSnapshot {
    models: Vec<Arc<ManagedModel>>,
    by_name: HashMap<String, usize>,
}

impl ModelSnapshot {
    /// # Errors
    /// The name that two models claim.
    fn new(models: Vec<Arc<ManagedModel>>) -> Result<Self, ControlError> {
        let mut by_name = HashMap::new();
        for (index, managed) in models.iter().enumerate() {
            for name in &managed.spec.names {
                if by_name.insert(name.clone(), index).is_some_and(|other| other != index) {
                    return Err(ControlError::NameTaken { name: name.clone() });
                }
            }
        }
        Ok(Self { models, by_name })
    }

    /// All models, in the order in which they were added.
    pub(crate) fn models(&self) -> &[Arc<ManagedModel>] {
        &self.models
    }

    /// The model that answers to a name.
    pub(crate) fn named(&self, name: &str) -> Option<&Arc<ManagedModel>> {
        self.by_name.get(name).map(|index| &self.models[*index])
    }

    /// The first name of each model.
    pub(crate) fn choices(&self) -> Vec<String> {
        self.models.iter().map(|managed| managed.spec.name().to_owned()).collect()
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
        let models: Vec<Arc<ManagedModel>> = (0..)
            .zip(specs)
            .map(|(id, spec)| Arc::new(ManagedModel::new(spec, id, inflight.part())))
            .collect();
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
    pub(crate) fn joined_later(&self, managed: &ManagedModel) -> bool {
        managed.id >= self.first_later_id
    }

    pub(crate) fn inflight(&self) -> &Arc<InflightRequests> {
        &self.inflight
    }

    /// Begins to load the models of the configuration; further ones may be added from now on.
    pub(crate) fn start_loading(&self, loader: &Arc<Loader>) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.loader.set(Arc::clone(loader)).is_ok() {
            for managed in self.snapshot().models() {
                managed.spawn(Arc::clone(managed).run(Arc::clone(&self.statuses), Arc::clone(loader)));
            }
        }
    }

    /// Stops loading and ends every engine; what they were answering ends with an error.
    pub(crate) async fn stop(&self) {
        let models = self.current.load_full();
        for managed in models.models() {
            managed.stop().await;
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

    /// Adds a model and waits until it is ready. The load goes on when the future is dropped.
    ///
    /// # Errors
    /// As [`ModelTable::add`], and [`ControlError::NotLoaded`], after which the model is gone.
    pub(crate) async fn load(self: &Arc<Self>, spec: ModelSpec) -> Result<ModelStatus, ControlError> {
        let loader = self.loader()?;
        let managed = self.insert(spec)?;
        let (table, name) = (Arc::clone(self), managed.spec.name().to_owned());
        // One result, sent once.
        let (done, outcome) = tokio::sync::oneshot::channel();
        let loading = Arc::clone(&managed);
        managed.spawn(async move {
            let result = loading.run_once(&table.statuses, &loader).await.map_err(|failure| {
                let name = loading.spec.name().to_owned();
                tracing::warn!(model = name, reason = failure.reason, "{failure}");
                table.take_out(&loading);
                table.statuses.remove(loading.id);
                ControlError::NotLoaded { name, failure }
            });
            // Nobody waits any more where the caller has left.
            let _ = done.send(result.map(|()| table.statuses.status(loading.id)));
        });
        outcome.await.unwrap_or(Err(ControlError::Unloaded { name }))
    }

    /// Loads a model beside the one of the same name and lets it take that one's place; then the old one
    /// answers what it has begun and is unloaded in the background. The old one stays where the new one
    /// cannot be loaded, for example because both do not fit in memory.
    ///
    /// # Errors
    /// Why the old one stays.
    pub(crate) async fn replace(
        self: &Arc<Self>,
        spec: ModelSpec,
        drain_timeout: Duration,
    ) -> Result<(), ControlError> {
        let loader = self.loader()?;
        let name = spec.name().to_owned();
        let old = self.snapshot().named(&name).cloned();
        let old = old.ok_or_else(|| ControlError::Unknown { name: name.clone() })?;
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let own = Arc::new(ModelStatuses::of_one(id, &spec));
        let new = Arc::new(ManagedModel::new(spec, id, self.inflight.part()));
        new.run_once(&own, &loader)
            .await
            .map_err(|failure| ControlError::NotLoaded { name: name.clone(), failure })?;
        let swap = |models: &mut Vec<Arc<ManagedModel>>| {
            let present = models.iter_mut().find(|managed| Arc::ptr_eq(managed, &old));
            *present.ok_or(ControlError::Unloaded { name })? = Arc::clone(&new);
            Ok(())
        };
        let swapped = self.change(swap, || self.statuses.replace(old.id, id, own.status(id)));
        if let Err(error) = swapped {
            new.stop().await;
            return Err(error);
        }
        tokio::spawn(async move { old.retire(drain_timeout).await });
        Ok(())
    }

    /// Takes a model out and unloads it. The unloading goes on when the handle is dropped.
    ///
    /// # Errors
    /// [`ControlError::Unknown`].
    pub(crate) fn unload(
        self: &Arc<Self>,
        name: &str,
        drain_timeout: Duration,
    ) -> Result<JoinHandle<ModelStatus>, ControlError> {
        let unknown = || ControlError::Unknown { name: name.to_owned() };
        let managed = self.snapshot().named(name).cloned().ok_or_else(unknown)?;
        if !self.take_out(&managed) {
            return Err(unknown());
        }
        let table = Arc::clone(self);
        Ok(tokio::spawn(async move {
            table.statuses.enter(managed.id, ModelState::Draining);
            managed.retire(drain_timeout).await;
            let mut last = table.statuses.status(managed.id);
            managed.spec.name().clone_into(&mut last.name);
            last.set_state(ModelState::Unloaded);
            table.statuses.remove(managed.id);
            if let Some(loader) = table.loader.get() {
                loader.forget(&managed.spec);
            }
            tracing::info!(model = managed.spec.name(), "model unloaded");
            last
        }))
    }

    fn loader(&self) -> Result<Arc<Loader>, ControlError> {
        self.loader.get().cloned().ok_or(ControlError::NotServing)
    }

    pub(crate) fn insert(&self, spec: ModelSpec) -> Result<Arc<ManagedModel>, ControlError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let managed = Arc::new(ManagedModel::new(spec, id, self.inflight.part()));
        let push = |models: &mut Vec<Arc<ManagedModel>>| {
            models.push(Arc::clone(&managed));
            Ok(())
        };
        self.change(push, || self.statuses.add(id, &managed.spec))?;
        Ok(managed)
    }

    /// Whether the model was there.
    fn take_out(&self, managed: &Arc<ManagedModel>) -> bool {
        let gone = ControlError::Unloaded { name: managed.spec.name().to_owned() };
        let take = |models: &mut Vec<Arc<ManagedModel>>| {
            let index = models.iter().position(|other| Arc::ptr_eq(other, managed)).ok_or(gone)?;
            models.remove(index);
            Ok(())
        };
        self.change(take, || ()).is_ok()
    }

    /// Makes a new snapshot, publishes the states that belong to it and puts it in force; or leaves all as it
    /// is.
    fn change(
        &self,
        change: impl FnOnce(&mut Vec<Arc<ManagedModel>>) -> Result<(), ControlError>,
        publish: impl FnOnce(),
    ) -> Result<(), ControlError> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut models = self.current.load().models.clone();
        change(&mut models)?;
        let snapshot = ModelSnapshot::new(models)?;
        publish();
        self.current.store(Arc::new(snapshot));
        Ok(())
    }
}
