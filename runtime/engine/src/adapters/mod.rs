//! The adapters of an engine: their names, and the life of a slot on the device.
//!
//! A request that names an adapter holds it until the request ends. An adapter that is removed takes no new
//! requests; it leaves the device once the last request that holds it has ended and no step in flight has
//! rows of it. Only then is its slot free. Each adapter has a root of its own in the prefix cache, which is
//! never used again: keys and values that were computed with an adapter are valid for it alone, even where a
//! later adapter has its name or its slot.

use crate::prefix_cache::PrefixRoot;
use crate::request::SubmitError;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use thiserror::Error;
use tokio::sync::oneshot;
use trustformers_plan::{Adapter, AdapterSlot};

/// Most adapters of one engine.
pub(crate) const MAX_ADAPTERS: usize = 256;

/// The highest rank of an adapter.
pub(crate) const MAX_ADAPTER_RANK: usize = 1024;

/// Longest name of an adapter in bytes.
pub const MAX_ADAPTER_NAME_BYTES: usize = 128;

/// Why an adapter was not added or not removed. Those that there are stay as they are.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AdapterChangeError {
    /// A name that no request could use.
    #[error("{name:?} is no name of an adapter: give 1 to {MAX_ADAPTER_NAME_BYTES} bytes without a colon")]
    Name {
        /// The name.
        name: String,
    },
    /// The name is in use, perhaps by an adapter that is being added or that leaves.
    #[error("there is an adapter {name:?} already; remove it first, or choose another name")]
    Exists {
        /// The name.
        name: String,
    },
    /// No adapter has that name.
    #[error("there is no adapter {name:?}")]
    Unknown {
        /// The name.
        name: String,
    },
    /// All slots are in use.
    #[error(
        "the model was loaded with room for {slots} adapters, and all of it is in use; remove one, or load the model \
         with room for more"
    )]
    Full {
        /// Slots that there are.
        slots: usize,
    },
    /// The device refused it.
    #[error("{message}")]
    Refused {
        /// The device's message.
        message: String,
    },
    /// The engine is stopping or stopped.
    #[error("the engine of this model is stopping or stopped")]
    Stopped,
}

/// An adapter that requests can choose.
#[derive(Debug)]
pub(crate) struct ServedAdapter {
    pub(crate) name: String,
    pub(crate) slot: AdapterSlot,
    pub(crate) root: PrefixRoot,
}

/// Asks the device thread to put an adapter into a slot that was reserved for it.
#[derive(Debug)]
pub(crate) struct PutAdapter {
    pub(crate) slot: AdapterSlot,
    pub(crate) adapter: Adapter,
    pub(crate) reply: oneshot::Sender<Result<(), AdapterChangeError>>,
}

/// Asks the device thread to drop an adapter that takes no new requests.
#[derive(Debug)]
pub(crate) struct DropAdapter {
    pub(crate) adapter: Arc<ServedAdapter>,
    pub(crate) reply: oneshot::Sender<()>,
}

/// The adapters of an engine, shared by its callers and the device thread.
#[derive(Debug)]
pub(crate) struct AdapterRegistry {
    slots: usize,
    state: Mutex<RegistryState>,
}

#[derive(Debug)]
struct RegistryState {
    /// Those that requests may choose.
    served: BTreeMap<String, Arc<ServedAdapter>>,
    /// Names that are being added or that leave.
    changing: BTreeSet<String>,
    free: BTreeSet<AdapterSlot>,
}

impl RegistryState {
    fn unknown(&self, name: &str) -> SubmitError {
        let names: Vec<&str> = self.served.keys().map(String::as_str).collect();
        let there = if names.is_empty() { "there is none".to_owned() } else { names.join(", ") };
        let why = format!("the model has no adapter {name:?}; choose one of those that it has: {there}");
        SubmitError::Invalid { field: "adapter", why }
    }
}

impl AdapterRegistry {
    /// With `slots` free slots, at most [`MAX_ADAPTERS`].
    pub(crate) fn new(slots: usize) -> Self {
        let free = (0..u32::try_from(slots).unwrap_or(0)).map(AdapterSlot).collect();
        let state = RegistryState { served: BTreeMap::new(), changing: BTreeSet::new(), free };
        Self { slots, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, RegistryState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The names that requests may choose.
    pub(crate) fn names(&self) -> Vec<String> {
        self.lock().served.keys().cloned().collect()
    }

    /// The adapter of a request.
    ///
    /// # Errors
    /// [`SubmitError::Invalid`] with the names that there are.
    pub(crate) fn find(&self, name: &str) -> Result<Arc<ServedAdapter>, SubmitError> {
        let state = self.lock();
        state.served.get(name).map(Arc::clone).ok_or_else(|| state.unknown(name))
    }

    /// Whether requests may choose an adapter. It is not held by this, not even for a moment: the device
    /// thread may be waiting for the last request that holds it.
    ///
    /// # Errors
    /// As [`Self::find`].
    pub(crate) fn check(&self, name: &str) -> Result<(), SubmitError> {
        let state = self.lock();
        if state.served.contains_key(name) { Ok(()) } else { Err(state.unknown(name)) }
    }

    /// Reserves a slot and the name for an adapter that is to be put.
    pub(crate) fn reserve(&self, name: &str) -> Result<AdapterSlot, AdapterChangeError> {
        let is_name = (1..=MAX_ADAPTER_NAME_BYTES).contains(&name.len()) && !name.contains(':');
        if !is_name {
            return Err(AdapterChangeError::Name { name: name.to_owned() });
        }
        let mut state = self.lock();
        if state.served.contains_key(name) || state.changing.contains(name) {
            return Err(AdapterChangeError::Exists { name: name.to_owned() });
        }
        let slot = state.free.pop_first().ok_or(AdapterChangeError::Full { slots: self.slots })?;
        state.changing.insert(name.to_owned());
        Ok(slot)
    }

    /// The adapter is on the device: requests may choose it.
    pub(crate) fn serve(&self, adapter: ServedAdapter) {
        let mut state = self.lock();
        state.changing.remove(&adapter.name);
        state.served.insert(adapter.name.clone(), Arc::new(adapter));
    }

    /// Lets no further request choose an adapter.
    pub(crate) fn withdraw(&self, name: &str) -> Result<Arc<ServedAdapter>, AdapterChangeError> {
        let mut state = self.lock();
        let adapter = state.served.remove(name);
        let adapter = adapter.ok_or_else(|| AdapterChangeError::Unknown { name: name.to_owned() })?;
        state.changing.insert(name.to_owned());
        Ok(adapter)
    }

    /// The device holds no adapter of that name and slot: both are free.
    pub(crate) fn release(&self, name: &str, slot: AdapterSlot) {
        let mut state = self.lock();
        state.changing.remove(name);
        state.free.insert(slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn served(registry: &AdapterRegistry, name: &str) {
        let slot = registry.reserve(name).unwrap();
        registry.serve(ServedAdapter { name: name.to_owned(), slot, root: PrefixRoot::MODEL });
    }

    #[test]
    fn a_slot_is_free_only_after_it_was_released() {
        let registry = AdapterRegistry::new(1);
        served(&registry, "a");
        assert_eq!(registry.reserve("b"), Err(AdapterChangeError::Full { slots: 1 }));
        let leaving = registry.withdraw("a").unwrap();
        assert!(registry.find("a").is_err(), "it takes no new requests");
        assert_eq!(registry.reserve("b"), Err(AdapterChangeError::Full { slots: 1 }));
        assert_eq!(registry.reserve("a"), Err(AdapterChangeError::Exists { name: "a".to_owned() }));
        registry.release(&leaving.name, leaving.slot);
        assert_eq!(registry.reserve("a"), Ok(AdapterSlot(0)));
    }

    #[test]
    fn an_unknown_adapter_is_refused_with_the_names_that_there_are() {
        let registry = AdapterRegistry::new(2);
        assert!(registry.find("x").unwrap_err().to_string().ends_with("there is none"));
        served(&registry, "b");
        served(&registry, "a");
        let error = registry.find("x").unwrap_err().to_string();
        assert_eq!(error, "adapter: the model has no adapter \"x\"; choose one of those that it has: a, b");
        assert_eq!(registry.names(), ["a", "b"]);
        let unknown = registry.withdraw("x").unwrap_err();
        assert_eq!(unknown, AdapterChangeError::Unknown { name: "x".to_owned() });
    }

    #[test]
    fn a_name_that_no_request_could_use_is_refused() {
        let registry = AdapterRegistry::new(2);
        for name in ["", "a:b", "x".repeat(MAX_ADAPTER_NAME_BYTES + 1).as_str()] {
            assert!(matches!(registry.reserve(name), Err(AdapterChangeError::Name { .. })), "{name}");
        }
        served(&registry, &"x".repeat(MAX_ADAPTER_NAME_BYTES));
    }
}
