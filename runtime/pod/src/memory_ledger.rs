//! Who has how much of a device's memory: what models have reserved, and what their KV caches have grown by.
//!
//! A cache grows only by what is left, and a load that finds too little asks idle models to give back what
//! their caches have grown by.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use trustformers_plan::{
    Adapter, AdapterSlot, Backend, BackendError, Caps, EstimateSpec, Executable, LoadSpec, Loaded,
    MemoryReport, Plan,
};

/// How long a load waits for memory that idle models can give back. They look once a second.
const RELEASE_WAIT: Duration = Duration::from_secs(3);

/// The memory of a device that models share.
#[derive(Debug, Default)]
pub(crate) struct MemoryLedger {
    state: Mutex<LedgerState>,
    /// Notified when memory is given back.
    returned: Condvar,
}

#[derive(Debug, Default)]
struct LedgerState {
    /// In the order in which the models came.
    reserved: BTreeMap<u64, ReservedMemory>,
    /// How often memory was refused.
    refusals: u64,
}

/// What one model has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ReservedMemory {
    pub(crate) model: String,
    /// What it took when it was loaded.
    pub(crate) loaded_bytes: u64,
    /// What its KV cache has grown by since.
    pub(crate) grown_bytes: u64,
}

impl ReservedMemory {
    pub(crate) fn bytes(&self) -> u64 {
        self.loaded_bytes.saturating_add(self.grown_bytes)
    }
}

impl LedgerState {
    fn bytes(&self) -> u64 {
        self.reserved.values().fold(0, |sum, own| sum.saturating_add(own.bytes()))
    }

    fn grown_bytes(&self) -> u64 {
        self.reserved.values().map(|own| own.grown_bytes).sum()
    }
}

impl MemoryLedger {
    fn lock(&self) -> MutexGuard<'_, LedgerState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that models have now.
    pub(crate) fn bytes(&self) -> u64 {
        self.lock().bytes()
    }

    /// Who has what.
    pub(crate) fn holders(&self) -> Vec<ReservedMemory> {
        self.lock().reserved.values().cloned().collect()
    }

    /// Waits until models have given back enough for `bytes` more within `limit_bytes`, where they can, for a
    /// few seconds at most. Blocking.
    pub(crate) fn wait_for(&self, bytes: u64, limit_bytes: u64) {
        let mut state = self.lock();
        let fits = |state: &LedgerState| state.bytes().saturating_add(bytes) <= limit_bytes;
        if fits(&state) {
            return;
        }
        state.refusals += 1;
        let still = |state: &mut LedgerState| !fits(state) && state.grown_bytes() > 0;
        drop(self.returned.wait_timeout_while(state, RELEASE_WAIT, still));
    }

    /// Reserves the memory of a model that is loaded, until the reservation is dropped.
    pub(crate) fn reserve(self: &Arc<Self>, model: &str, bytes: u64, limit_bytes: u64) -> Reservation {
        let mut state = self.lock();
        let number = state.reserved.last_key_value().map_or(0, |(last, _)| last + 1);
        let own = ReservedMemory { model: model.to_owned(), loaded_bytes: bytes, grown_bytes: 0 };
        state.reserved.insert(number, own);
        Reservation { ledger: Arc::clone(self), number, limit_bytes }
    }
}

/// What a model has, until this is dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    ledger: Arc<MemoryLedger>,
    number: u64,
    limit_bytes: u64,
}

impl Reservation {
    /// Reserves `bytes` more for the cache. False where they are not left.
    fn grow(&self, bytes: u64) -> bool {
        let mut state = self.ledger.lock();
        if state.bytes().saturating_add(bytes) > self.limit_bytes {
            state.refusals += 1;
            return false;
        }
        if let Some(own) = state.reserved.get_mut(&self.number) {
            own.grown_bytes += bytes;
        }
        true
    }

    /// Gives back `bytes` of the cache.
    fn release(&self, bytes: u64) {
        if let Some(own) = self.ledger.lock().reserved.get_mut(&self.number) {
            own.grown_bytes = own.grown_bytes.saturating_sub(bytes);
        }
        self.ledger.returned.notify_all();
    }

    fn refusals(&self) -> u64 {
        self.ledger.lock().refusals
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.ledger.lock().reserved.remove(&self.number);
        self.ledger.returned.notify_all();
    }
}

/// A backend whose models have a reservation. The engine's thread owns it and them, so the memory is free
/// when the engine ends.
pub(crate) struct ReservedBackend {
    inner: Box<dyn Backend>,
    reservation: Arc<Reservation>,
}

impl ReservedBackend {
    pub(crate) fn new(inner: Box<dyn Backend>, reservation: Reservation) -> Self {
        Self { inner, reservation: Arc::new(reservation) }
    }
}

impl Backend for ReservedBackend {
    fn caps(&self) -> &Caps {
        self.inner.caps()
    }

    fn estimate(&self, spec: &EstimateSpec<'_>) -> Result<MemoryReport, BackendError> {
        self.inner.estimate(spec)
    }

    fn load(&mut self, spec: LoadSpec<'_>) -> Result<Box<dyn Loaded>, BackendError> {
        let (block_bytes, blocks) = (spec.plan.kv_block_bytes(spec.kv_type), spec.kv_blocks);
        let inner = self.inner.load(spec)?;
        let reservation = Arc::clone(&self.reservation);
        let seen_refusals = reservation.refusals();
        Ok(Box::new(ReservedModel { inner, reservation, block_bytes, blocks, seen_refusals }))
    }
}

/// A model whose cache grows only by what is left.
struct ReservedModel {
    inner: Box<dyn Loaded>,
    reservation: Arc<Reservation>,
    /// Bytes of a block of its cache.
    block_bytes: u64,
    blocks: usize,
    /// How often memory had been refused when the cache last shrank.
    seen_refusals: u64,
}

impl Loaded for ReservedModel {
    fn memory(&self) -> MemoryReport {
        self.inner.memory()
    }

    fn compile(&mut self, plan: &Plan) -> Result<Box<dyn Executable>, BackendError> {
        self.inner.compile(plan)
    }

    fn resize_kv(&mut self, blocks: usize) -> Result<(), BackendError> {
        let bytes = blocks.abs_diff(self.blocks) as u64 * self.block_bytes;
        let grows = blocks > self.blocks;
        if grows && !self.reservation.grow(bytes) {
            let what = "more blocks of the key/value cache";
            return Err(BackendError::OutOfMemory { what, needed_bytes: bytes });
        }
        let resized = self.inner.resize_kv(blocks);
        if grows == resized.is_err() {
            // It did not grow, or it shrank.
            self.reservation.release(bytes);
        }
        resized?;
        if !grows {
            self.seen_refusals = self.reservation.refusals();
        }
        self.blocks = blocks;
        Ok(())
    }

    fn kv_is_wanted(&self) -> bool {
        self.reservation.refusals() > self.seen_refusals || self.inner.kv_is_wanted()
    }

    fn put_adapter(&mut self, slot: AdapterSlot, adapter: &Adapter) -> Result<(), BackendError> {
        self.inner.put_adapter(slot, adapter)
    }

    fn drop_adapter(&mut self, slot: AdapterSlot) -> Result<(), BackendError> {
        self.inner.drop_adapter(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_grows_only_by_what_is_left() {
        let ledger = Arc::new(MemoryLedger::default());
        let (first, second) = (ledger.reserve("a", 40, 100), ledger.reserve("b", 30, 100));
        assert!(first.grow(25) && !first.grow(6) && second.grow(5));
        assert_eq!(ledger.bytes(), 100);
        let holders: Vec<(String, u64)> =
            ledger.holders().into_iter().map(|own| (own.model.clone(), own.bytes())).collect();
        assert_eq!(holders, [("a".to_owned(), 65), ("b".to_owned(), 35)]);
        first.release(25);
        assert!(second.grow(25));
        drop(first);
        drop(second);
        assert_eq!((ledger.bytes(), ledger.holders()), (0, Vec::new()));
    }

    #[test]
    fn a_load_waits_only_for_what_can_be_given_back() {
        let ledger = Arc::new(MemoryLedger::default());
        let first = ledger.reserve("a", 40, 100);
        // Nothing has grown, so that waiting would be for nothing.
        ledger.wait_for(70, 100);
        assert!(first.grow(30));
        let waiting = {
            let ledger = Arc::clone(&ledger);
            std::thread::spawn(move || {
                ledger.wait_for(60, 100);
                ledger.bytes()
            })
        };
        first.release(30);
        assert_eq!(waiting.join().unwrap(), 40, "it waited until there was room");
        assert!(first.refusals() >= 1, "the models see that memory was refused");
    }
}
