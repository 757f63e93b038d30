//! Adapters on the device thread: putting one beside steps in flight, and dropping one that no step uses.

use super::device::GenerationDevice;
use crate::adapters::{AdapterChangeError, DropAdapter, PutAdapter, ServedAdapter};
use std::sync::Arc;

/// An adapter that takes no new requests.
#[derive(Debug)]
pub(super) struct LeavingAdapter {
    asked: DropAdapter,
    /// The number of the first step that cannot have rows of it. None while a sequence holds it.
    first_step_without: Option<u64>,
}

impl From<DropAdapter> for LeavingAdapter {
    fn from(asked: DropAdapter) -> Self {
        Self { asked, first_step_without: None }
    }
}

impl GenerationDevice {
    /// Puts an adapter into its slot, and lets requests choose it.
    pub(super) fn put_adapter(&mut self, put: PutAdapter) {
        let PutAdapter { slot, adapter, reply } = put;
        let name = adapter.name.clone();
        let outcome = self.loaded.put_adapter(slot, &adapter).map_err(|error| {
            self.adapters.release(&name, slot);
            AdapterChangeError::Refused { message: error.to_string() }
        });
        if outcome.is_ok() {
            self.adapters.serve(ServedAdapter { name, slot, root: self.pool.new_root() });
        }
        // The caller may be gone; the adapter is served all the same.
        let _ignored = reply.send(outcome);
    }

    /// Drops the adapters that no sequence and no step in flight uses any more.
    pub(super) fn drop_unused_adapters(&mut self) {
        for mut leaving in std::mem::take(&mut self.leaving) {
            if self.still_in_use(&mut leaving) {
                self.leaving.push(leaving);
            } else {
                // The caller may be gone.
                let _ignored = leaving.asked.reply.send(());
            }
        }
    }

    fn still_in_use(&mut self, leaving: &mut LeavingAdapter) -> bool {
        let LeavingAdapter { asked: DropAdapter { adapter, .. }, first_step_without } = leaving;
        if first_step_without.is_none() && Arc::strong_count(adapter) == 1 {
            *first_step_without = Some(self.steps);
        }
        let Some(first) = *first_step_without else { return true };
        // A sequence that has ended may have a row too many in a step in flight.
        if self.launched.front().is_some_and(|step| step.number() < first) {
            return true;
        }
        if let Err(error) = self.loaded.drop_adapter(adapter.slot) {
            tracing::error!(adapter = adapter.name, %error, "the device did not drop an adapter");
        }
        self.adapters.release(&adapter.name, adapter.slot);
        false
    }
}
