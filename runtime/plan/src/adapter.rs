//! Low-rank adapters (LoRA): changes of a model's projections that each sequence of a step chooses for
//! itself.
//!
//! An adapter has, for some of the projections `W`, two matrices: `down` (rank × features in, the `A` of
//! LoRA) and `up` (features out × rank, its `B`). A row of a sequence that chose it gets
//! `W·x + scale · up · (down · x)`, one that chose none gets `W·x`. Every [`crate::Segment`] of every
//! [`Op::MatMul`] can be changed; embeddings, norms, biases and the vocabulary head cannot.
//!
//! A plan with an [`AdapterRoom`] ([`Plan::with_adapters`]) tells a backend how many adapters it will hold at
//! once and of which rank, so that tables and scratch memory have fixed addresses. In such a plan no
//! projection applies an activation: the change is added to the product before the activation. The change is
//! computed in f32 and added last, after bias and residual, and its sums depend on nothing but the row: in
//! [`crate::Numerics::Exact`] a row has the bits that it has alone, whatever the other rows chose.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::{BackendError, Op, Plan, StepError, StepInput, WeightId, Weights};

/// Room for adapters that a plan has. None by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AdapterRoom {
    /// Adapters that are on the device at once.
    pub slots: usize,
    /// The highest rank of an adapter.
    pub rank: usize,
}

impl AdapterRoom {
    /// No adapters.
    pub const NONE: Self = Self { slots: 0, rank: 0 };

    /// Whether it has no room.
    #[must_use]
    pub const fn is_none(&self) -> bool {
        self.slots == 0
    }
}

/// The number by which the sequences of a step choose an adapter, below [`AdapterRoom::slots`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterSlot(pub u32);

impl AdapterSlot {
    /// Position in a table of slots.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl std::fmt::Display for AdapterSlot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// The change of one projection.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
    /// Rows of `down`, and columns of `up`.
    pub rank: usize,
    /// Multiplies the change.
    pub scale: f32,
    /// Rank × features in, row after row.
    pub down: Vec<f32>,
    /// Features out × rank, row after row.
    pub up: Vec<f32>,
}

impl LowRank {
    /// Bytes of its values.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        ((self.down.len() + self.up.len()) * size_of::<f32>()) as u64
    }
}

/// An adapter of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    /// Its name, for messages.
    pub name: String,
    /// The changes, by the weight of the projection.
    pub changes: BTreeMap<WeightId, LowRank>,
}

impl Adapter {
    /// The highest rank of its changes.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.changes.values().map(|change| change.rank).max().unwrap_or(0)
    }

    /// Bytes of all of its values.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.changes.values().map(LowRank::bytes).sum()
    }
}

/// Why an adapter was not put on a device, or not dropped.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AdapterError {
    /// A slot that the plan does not have.
    #[error(
        "slot {slot} of {slots}: the model was loaded with room for {slots} adapters; load it with room for more"
    )]
    Slot {
        /// The slot.
        slot: AdapterSlot,
        /// Slots that there are.
        slots: usize,
    },
    /// A slot that holds an adapter.
    #[error("slot {0} holds an adapter already; drop that one first")]
    Occupied(AdapterSlot),
    /// A slot that holds none.
    #[error("slot {0} holds no adapter")]
    Empty(AdapterSlot),
    /// A rank above the room.
    #[error("adapter {adapter} has rank {rank}, and the model was loaded with room for rank {most}")]
    Rank {
        /// The adapter's name.
        adapter: String,
        /// Its rank.
        rank: usize,
        /// The rank that there is room for.
        most: usize,
    },
    /// A weight that no projection of the plan has.
    #[error("adapter {adapter} changes {weight}, which is no projection of the model")]
    NotAProjection {
        /// The adapter's name.
        adapter: String,
        /// The weight.
        weight: String,
    },
    /// Matrices that do not fit the projection, or hold numbers that are not finite.
    #[error("adapter {adapter}, its change of {weight}: {detail}")]
    Matrix {
        /// The adapter's name.
        adapter: String,
        /// The weight.
        weight: String,
        /// What is wrong.
        detail: String,
    },
}

/// The sizes of a projection that adapters may change.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Site {
    name: String,
    /// Features out.
    rows: usize,
    /// Features in.
    cols: usize,
}

/// The adapters that a backend holds for a model, each in the form `T` of the backend. It checks what is put
/// and what a step chooses, so that kernels need not.
#[derive(Debug)]
pub struct AdapterTable<T> {
    rank: usize,
    sites: BTreeMap<WeightId, Site>,
    slots: Vec<Option<Arc<T>>>,
}

impl<T> AdapterTable<T> {
    /// An empty table with the room of a plan.
    #[must_use]
    pub fn new(plan: &Plan, weights: &Weights) -> Self {
        let AdapterRoom { slots, rank } = plan.adapters();
        let mut sites = BTreeMap::new();
        for op in plan.ops().iter().filter(|_| slots > 0) {
            let Op::MatMul { segments, .. } = op else { continue };
            for segment in segments {
                let weight = weights.get(segment.weight);
                let (name, rows, cols) = (weight.name().to_owned(), weight.rows(), weight.cols());
                sites.insert(segment.weight, Site { name, rows, cols });
            }
        }
        Self { rank, sites, slots: (0..slots).map(|_| None).collect() }
    }

    /// Checks an adapter, brings it into the backend's form, and puts it into an empty slot. Returns what it
    /// put.
    ///
    /// # Errors
    /// [`AdapterError`], or why `make` failed; the slot is empty then.
    pub fn put(
        &mut self,
        slot: AdapterSlot,
        adapter: &Adapter,
        make: impl FnOnce(&Adapter) -> Result<T, BackendError>,
    ) -> Result<Arc<T>, BackendError> {
        let slots = self.slots.len();
        let Some(entry) = self.slots.get(slot.index()) else {
            return Err(AdapterError::Slot { slot, slots }.into());
        };
        if entry.is_some() {
            return Err(AdapterError::Occupied(slot).into());
        }
        self.check(adapter)?;
        let made = Arc::new(make(adapter)?);
        self.slots[slot.index()] = Some(Arc::clone(&made));
        Ok(made)
    }

    /// Takes the adapter out of a slot.
    ///
    /// # Errors
    /// [`AdapterError::Empty`] where it holds none.
    pub fn remove(&mut self, slot: AdapterSlot) -> Result<Arc<T>, AdapterError> {
        self.slots.get_mut(slot.index()).and_then(Option::take).ok_or(AdapterError::Empty(slot))
    }

    /// The adapter in a slot.
    #[must_use]
    pub fn get(&self, slot: AdapterSlot) -> Option<&Arc<T>> {
        self.slots.get(slot.index())?.as_ref()
    }

    /// The adapters on the device.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<T>> {
        self.slots.iter().flatten()
    }

    /// Writes the adapter of each sequence of a step. Nothing is written for a step whose sequences chose
    /// none, which is then computed as if there were no adapters.
    ///
    /// # Errors
    /// [`StepError::EmptySlot`] for a sequence that chose an empty slot.
    pub fn chosen(&self, input: &StepInput, chosen: &mut Vec<Option<Arc<T>>>) -> Result<(), StepError> {
        chosen.clear();
        if input.adapters.iter().all(Option::is_none) {
            return Ok(());
        }
        for (sequence, slot) in input.adapters.iter().enumerate() {
            chosen.push(match *slot {
                None => None,
                Some(slot) => {
                    let adapter = self.get(slot).ok_or(StepError::EmptySlot { sequence, slot })?;
                    Some(Arc::clone(adapter))
                }
            });
        }
        Ok(())
    }

    /// Checks that a plan has the room of the one that was loaded, or none.
    ///
    /// # Errors
    /// [`BackendError::Mismatch`].
    pub fn check_plan(&self, plan: &Plan) -> Result<(), BackendError> {
        let room = plan.adapters();
        if !room.is_none() && (room.slots > self.slots.len() || room.rank != self.rank) {
            return Err(BackendError::Mismatch("it has other room for adapters: load with the largest plan"));
        }
        Ok(())
    }

    fn check(&self, adapter: &Adapter) -> Result<(), AdapterError> {
        let (name, rank) = (|| adapter.name.clone(), adapter.rank());
        if rank > self.rank {
            return Err(AdapterError::Rank { adapter: name(), rank, most: self.rank });
        }
        for (id, change) in &adapter.changes {
            let Some(site) = self.sites.get(id) else {
                let weight = format!("weight {}", id.index());
                return Err(AdapterError::NotAProjection { adapter: name(), weight });
            };
            let LowRank { rank, scale, down, up } = change;
            let is_finite = scale.is_finite() && down.iter().chain(up).all(|value| value.is_finite());
            let checks = [
                (*rank > 0, "its rank is zero".to_owned()),
                (down.len() == rank * site.cols, format!("down must be {rank} x {} numbers", site.cols)),
                (up.len() == site.rows * rank, format!("up must be {} x {rank} numbers", site.rows)),
                (is_finite, "it has a number that is not finite".to_owned()),
            ];
            if let Some((_, detail)) = checks.into_iter().find(|(ok, _)| !ok) {
                return Err(AdapterError::Matrix { adapter: name(), weight: site.name.clone(), detail });
            }
        }
        Ok(())
    }
}
