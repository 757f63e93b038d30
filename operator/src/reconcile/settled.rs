//! What was desired of a model and found stored: a pass over an unchanged model builds and compares nothing.

use std::collections::BTreeSet;

use trustformers_control::build::{Desired, Platform};
use trustformers_control::hash;
use trustformers_control::kinds::ChildKind;
use trustformers_control::rollout::PoolSize;
use trustformers_control::validate::ValidatedModel;

use super::fetch::Observed;
use super::rollout::RolloutPlan;
use crate::context::Context;

/// One desired object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettledObject {
    /// Its kind.
    pub kind: &'static ChildKind,
    /// Its name.
    pub name: String,
    /// Its hash.
    pub hash: String,
}

/// A pool, and the revision that its pods start with.
#[derive(Debug, Clone, PartialEq, Eq)]
struct PoolStart {
    size: PoolSize,
    start: String,
}

/// What the desired objects of a model are built from. What is stored already is looked at apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildInputs {
    generation: i64,
    /// Hash of what the spec loads.
    revision: String,
    /// The pool whose pods hold it.
    pool: String,
    pools: Vec<PoolStart>,
    /// Hash of how pods recognise the operator.
    access: String,
    /// Optional kinds that the cluster has definitions of.
    optional_kinds: BTreeSet<&'static str>,
}

impl BuildInputs {
    /// What the objects of a model are built from.
    #[must_use]
    pub fn of(valid: &ValidatedModel, revision: &str, plan: &RolloutPlan, platform: &Platform) -> Self {
        let start = |size: &PoolSize| PoolStart {
            size: size.clone(),
            start: plan.state.start_revision(&size.pool).to_owned(),
        };
        Self {
            generation: valid.generation,
            revision: revision.to_owned(),
            pool: plan.state.pool_of(revision).to_owned(),
            pools: plan.pools.iter().map(start).collect(),
            access: hash::short(&format!("{:?}", platform.admin)),
            optional_kinds: platform.optional_kinds.clone(),
        }
    }
}

/// The desired objects of a model, and what they were built from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settled {
    /// What they were built from.
    pub inputs: BuildInputs,
    /// Hash of what the spec loads.
    pub revision: String,
    /// The pool whose pods hold it, if it should have any.
    pub pool: Option<String>,
    /// The objects.
    pub objects: Vec<SettledObject>,
}

impl Settled {
    /// What was built for a model.
    #[must_use]
    pub fn of(desired: &Desired, inputs: BuildInputs) -> Self {
        let objects = desired.objects.iter();
        let objects = objects.map(|one| SettledObject {
            kind: one.kind,
            name: one.name.clone(),
            hash: one.hash.clone(),
        });
        Self {
            inputs,
            revision: desired.revision.clone(),
            pool: desired.pool.clone(),
            objects: objects.collect(),
        }
    }

    /// Whether an object of this kind and name is desired.
    #[must_use]
    pub fn has(&self, kind: &ChildKind, name: &str) -> bool {
        self.objects.iter().any(|one| one.kind == kind && one.name == name)
    }

    /// Whether every object is stored as desired: it was compared with these hashes, it belongs to the model,
    /// and nothing else has changed it since.
    #[must_use]
    pub fn holds(&self, context: &Context, observed: &Observed) -> bool {
        self.objects.iter().all(|one| {
            let stored = context.children.get(one.kind, &observed.key.0, &one.name);
            stored.is_some_and(|child| {
                child.is_owned_by(&observed.uid)
                    && context.children.covers(&child, &one.hash)
                    && (child.foreign.is_empty() || context.children.is_tolerated(&child))
            })
        })
    }
}
