//! Adapters in the layout of the kernels.

use std::collections::HashMap;

use trustformers_plan::{Adapter, BackendError, LowRank, WeightId};

/// An adapter on the processor.
pub(crate) struct CpuAdapter {
    changes: HashMap<WeightId, CpuChange>,
}

/// The change of one projection.
pub(crate) struct CpuChange {
    pub(crate) rank: usize,
    pub(crate) scale: f32,
    /// Rank × features in.
    pub(crate) down: Vec<f32>,
    /// Rank × features out, so that a thread reads its columns side by side.
    pub(crate) up: Vec<f32>,
}

impl CpuAdapter {
    /// # Errors
    /// [`BackendError::OutOfMemory`].
    pub(crate) fn new(adapter: &Adapter) -> Result<Self, BackendError> {
        let changes = adapter.changes.iter().map(|(id, change)| Ok((*id, CpuChange::new(change)?)));
        Ok(Self { changes: changes.collect::<Result<_, BackendError>>()? })
    }

    /// The change of a projection, if it has one.
    pub(crate) fn change(&self, weight: WeightId) -> Option<&CpuChange> {
        self.changes.get(&weight)
    }

    /// Bytes that it takes.
    pub(crate) fn bytes(&self) -> u64 {
        let values: usize = self.changes.values().map(|change| change.down.len() + change.up.len()).sum();
        (values * size_of::<f32>()) as u64
    }
}

impl CpuChange {
    fn new(change: &LowRank) -> Result<Self, BackendError> {
        let LowRank { rank, scale, down, up } = change;
        let (rank, features) = (*rank, up.len() / rank);
        let mut own = Self { rank, scale: *scale, down: room(down.len())?, up: room(up.len())? };
        own.down.extend_from_slice(down);
        own.up.extend((0..rank * features).map(|at| up[at % features * rank + at / features]));
        Ok(own)
    }
}

fn room(len: usize) -> Result<Vec<f32>, BackendError> {
    let mut values = Vec::new();
    let needed_bytes = (len * size_of::<f32>()) as u64;
    let failed = |_| BackendError::OutOfMemory { what: "an adapter", needed_bytes };
    values.try_reserve_exact(len).map_err(failed)?;
    Ok(values)
}
