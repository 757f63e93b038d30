//! Rollouts within running pods: a pod holds the stable revision and the candidate in its two slots.
//!
//! A pool keeps the name of the revision that it was made for, and its pods keep their template. What they
//! load when they start is in the pool's ConfigMap; what they hold beside it they are asked for over their
//! admin port. Every request is made again until the pods' reports show that it is done, so that nothing
//! has to be remembered.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use serde_json::Value;
use trustformers_proto::pod_config::{PodAdapter, PodConfig, PodGoldenPrompt};
use trustformers_proto::v1::{AdapterFiles, GoldenProbe, LoadModelRequest, ModelSlot, ModelState};

use super::machine::{Machine, RESTARTS_TO_FAIL, later};
use super::state::{Member, RolloutPhase, RolloutState};
use super::{Placement, PodCommand, RevisionFacts};
use crate::build::Platform;
use crate::drift::covers;
use crate::kinds::DEPLOYMENT;
use crate::pods::PodView;
use crate::validate::{Mount, ValidatedModel};

/// Restarts of containers, since the rollout started, that fail a candidate in pods that serve another
/// revision: each of them also costs that one a pod.
const RESTARTS_IN_PLACE: u32 = 2;
/// A candidate that no pod has begun to load for this long is loaded by new pods, where the placement is a
/// choice.
const REFUSED_AFTER: Duration = Duration::from_secs(60);

impl RolloutState {
    /// Every revision that the rollout names, the stable one first.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        let named = [&self.stable, &self.candidate, &self.previous].into_iter().flatten();
        named.chain(self.retiring.iter().map(|one| &one.member))
    }

    /// The pool whose pods hold a revision: its own where the rollout does not name it.
    #[must_use]
    pub fn pool_of<'a>(&'a self, revision: &'a str) -> &'a str {
        self.members().find(|one| one.revision == revision).map_or(revision, |one| one.pool.as_str())
    }

    /// The name of a pool for new pods of a revision: the revision, unless pods of a pool of that name hold
    /// another one by now.
    pub(super) fn new_pool(&self, revision: &str) -> String {
        match self.members().any(|one| one.pool == revision && one.revision != revision) {
            true => format!("{revision}-{}", self.attempt),
            false => revision.to_owned(),
        }
    }

    /// The revision that the pods of a pool load when they start.
    #[must_use]
    pub fn start_revision<'a>(&'a self, pool: &'a str) -> &'a str {
        self.members().find(|one| one.pool == pool).map_or(pool, |one| one.revision.as_str())
    }

    /// Revisions that a pod of the pool holds besides the one that it starts with, as far as it was last
    /// asked to: what counts until it reports itself.
    pub fn held_besides<'a>(&'a self, pool: &'a str) -> impl Iterator<Item = &'a str> {
        let candidate = self.candidate.as_ref().filter(|_| self.weight > 0);
        let previous = self.previous.as_ref().filter(|_| self.phase == RolloutPhase::Promoted);
        let first = self.start_revision(pool);
        let named = candidate.into_iter().chain(previous).filter(move |one| one.pool == pool);
        named.map(|one| one.revision.as_str()).filter(move |revision| *revision != first)
    }

    /// Revisions that a pod of the pool may hold besides those, or not yet, or not any more.
    pub fn doubtful<'a>(&'a self, pool: &'a str) -> impl Iterator<Item = &'a str> {
        let first = self.start_revision(pool);
        let others = self.members().filter(move |one| one.pool == pool).map(|one| one.revision.as_str());
        others
            .filter(move |revision| *revision != first && self.held_besides(pool).all(|one| one != *revision))
    }
}

/// Whether the pods of the stable revision can load the spec's revision beside it. `template` is the pool as
/// the spec asks for it, `stored` its Deployment.
///
/// # Errors
/// Why they cannot, for people.
pub fn check(
    model: &ValidatedModel,
    platform: &Platform,
    template: &Value,
    stored: Option<&Value>,
) -> Result<(), String> {
    if platform.admin.is_none() {
        return Err(
            "the operator has no token for the admin port of pods; start it with --pod-auth token".into()
        );
    }
    if let Mount::Image { .. } = model.mount {
        return Err("the image volume of a running pod is fixed; set spec.source.oci: Pull, or use another \
                    source or placement"
            .into());
    }
    let Some(stored) = stored else {
        return Err("the stable revision has no Deployment whose pods could load another one".into());
    };
    if !covers(&DEPLOYMENT, stored, template) {
        return Err(
            "the change is also one of the pod (image, resources, volumes, settings of spec.pod), which \
                    needs new pods; use another placement, or change the revision alone"
                .into(),
        );
    }
    Ok(())
}

/// The request for what a pod's configuration names. Names and cache are the pod's own.
#[must_use]
pub fn load_request(config: &PodConfig) -> LoadModelRequest {
    let (model, engine) = (&config.model, &config.engine);
    let revision = model.fetch.as_ref().and_then(|fetch| fetch.revision.as_deref());
    let path = match revision {
        Some(revision) => format!("{}@{revision}", model.path),
        None => model.path.clone(),
    };
    LoadModelRequest {
        path,
        files: model.files.clone(),
        sha256: model.sha256.clone().unwrap_or_default(),
        task: model.task.map(|task| task.as_str().to_owned()).unwrap_or_default(),
        name: model.names.first().cloned().unwrap_or_default(),
        device: engine.device.clone().unwrap_or_default(),
        numerics: engine.numerics.clone().unwrap_or_default(),
        context_tokens: engine.context_tokens.unwrap_or(0),
        max_batch_size: engine.max_batch_size.unwrap_or(0),
        revision: model.revision.clone(),
        kv_cache: engine.kv_cache.clone().unwrap_or_default(),
        max_queue: engine.max_queue.unwrap_or(0),
        batch_strategy: engine.batch_strategy.clone().unwrap_or_default(),
        max_wait_ms: engine.max_wait_ms.unwrap_or(0),
        priority: engine.priority,
        probe: None,
        probes: model.golden_prompts.iter().map(probe).collect(),
        adapters: model.adapters.iter().map(adapter).collect(),
    }
}

fn adapter(one: &PodAdapter) -> AdapterFiles {
    let path = match &one.revision {
        Some(revision) => format!("{}@{revision}", one.path),
        None => one.path.clone(),
    };
    AdapterFiles { name: one.name.clone(), path, sha256: one.sha256.clone().unwrap_or_default() }
}

fn probe(one: &PodGoldenPrompt) -> GoldenProbe {
    GoldenProbe { prompt: one.prompt.clone(), begins_with: one.expect.clone(), ..GoldenProbe::default() }
}

/// The slots of a pod that reports.
#[derive(Debug, Clone, PartialEq)]
pub struct PodSlots<'a> {
    /// The pod.
    pub pod: &'a PodView,
    /// Its versions, the one that answers first.
    pub slots: Vec<ModelSlot>,
}

/// The next thing that a pod is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodAction {
    /// Load the revision into the second slot.
    Load {
        /// The revision.
        revision: String,
    },
    /// Let the revision answer, if the version of this digest answers now.
    Swap {
        /// The revision.
        revision: String,
        /// The digest that must answer now.
        expected_digest: String,
    },
    /// Unload the revision, which does not answer.
    Unload {
        /// The revision.
        revision: String,
    },
}

/// What one pod is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodTask {
    /// UID of the pod.
    pub uid: String,
    /// What it is asked for.
    pub action: PodAction,
}

/// What pods must be asked for, at most one thing each. A candidate is loaded by one pod first, so that one
/// that breaks its pod breaks no other. A version that may still get requests by some gateway's table stays,
/// and so does every one that the state names.
#[must_use]
pub fn tasks(
    commands: &[PodCommand],
    pods: &[PodSlots<'_>],
    state: &RolloutState,
    unrouted: &BTreeSet<String>,
) -> Vec<PodTask> {
    let is_free = |slot: &ModelSlot| {
        unrouted.contains(&slot.revision) && state.members().all(|one| one.revision != slot.revision)
    };
    let mut tasks = Vec::new();
    for pod in pods {
        let of_pool = PoolCommands::of(commands, &pod.pod.revision);
        let may_load = |revision: &str| {
            let others = pods.iter().filter(|other| other.pod.revision == pod.pod.revision);
            is_allowed(revision, pod, others)
        };
        if let Some(action) = of_pool.next(pod, &is_free, &may_load) {
            tasks.push(PodTask { uid: pod.pod.uid.clone(), action });
        }
    }
    tasks
}

/// Whether a pod may load a candidate now: another pod holds it ready, or this pod is the first one.
fn is_allowed<'a, 'b: 'a>(
    revision: &str,
    pod: &PodSlots<'_>,
    pool: impl Iterator<Item = &'a PodSlots<'b>> + Clone,
) -> bool {
    let slot = |one: &PodSlots<'_>| one.slots.iter().find(|slot| slot.revision == revision).cloned();
    let states: Vec<ModelState> = pool.clone().filter_map(slot).map(|slot| slot.state()).collect();
    if states.is_empty() {
        let first = pool.filter(|one| answers(one)).map(|one| one.pod.name.as_str()).min();
        return first == Some(pod.pod.name.as_str());
    }
    states.contains(&ModelState::Ready)
}

fn answers(pod: &PodSlots<'_>) -> bool {
    pod.slots.first().is_some_and(|slot| slot.state() == ModelState::Ready)
}

/// The commands for one pool.
#[derive(Debug, Default)]
struct PoolCommands<'a> {
    load: Vec<&'a str>,
    swap: Option<&'a str>,
    unload: Vec<&'a str>,
}

impl<'a> PoolCommands<'a> {
    fn of(commands: &'a [PodCommand], of_pool: &str) -> Self {
        let mut all = Self::default();
        for command in commands {
            match command {
                PodCommand::Load { pool, revision } if pool == of_pool => all.load.push(revision.as_str()),
                PodCommand::Swap { pool, revision } if pool == of_pool => {
                    all.swap = Some(revision.as_str());
                }
                PodCommand::Unload { pool, revision } if pool == of_pool => {
                    all.unload.push(revision.as_str());
                }
                PodCommand::Load { .. } | PodCommand::Swap { .. } | PodCommand::Unload { .. } => {}
            }
        }
        all
    }

    fn next(
        &self,
        pod: &PodSlots<'_>,
        is_free: &dyn Fn(&ModelSlot) -> bool,
        may_load: &dyn Fn(&str) -> bool,
    ) -> Option<PodAction> {
        // A pod that still starts is asked for nothing.
        let current = pod.slots.first().filter(|slot| slot.state() == ModelState::Ready)?;
        let second = pod.slots.get(1);
        let holds = |revision: &str| pod.slots.iter().any(|slot| slot.revision == revision);
        if let (Some(target), Some(slot)) = (self.swap, second)
            && slot.revision == target
            && slot.state() == ModelState::Ready
        {
            return Some(PodAction::Swap {
                revision: target.to_owned(),
                expected_digest: current.digest.clone(),
            });
        }
        let is_leaving = second.is_some_and(|slot| slot.state() == ModelState::Draining);
        if let Some(slot) = second.filter(|slot| self.unload.contains(&slot.revision.as_str())) {
            return (!is_leaving).then(|| PodAction::Unload { revision: slot.revision.clone() });
        }
        // What a container that restarted loaded from an older file, or an earlier rollout left.
        if let Some(slot) = second.filter(|slot| !is_leaving && !self.is_wanted(slot) && is_free(slot)) {
            return Some(PodAction::Unload { revision: slot.revision.clone() });
        }
        // The revision that must answer first, then the candidate, which one pod tries before the others.
        let missing = self.swap.filter(|revision| !holds(revision));
        let candidate = || self.load.iter().copied().find(|revision| !holds(revision) && may_load(revision));
        let revision = missing.or_else(candidate).filter(|_| second.is_none())?;
        Some(PodAction::Load { revision: revision.to_owned() })
    }

    fn is_wanted(&self, slot: &ModelSlot) -> bool {
        self.swap == Some(slot.revision.as_str()) || self.load.contains(&slot.revision.as_str())
    }
}

impl Machine<'_, '_> {
    /// Whether the revision runs in pods that served another one when the rollout started.
    fn runs_in_place(&self, member: &Member) -> bool {
        self.state.placement == Placement::InPlace && self.is_host(&member.pool)
    }

    /// Restarts of the pods of the stable revision, which hold any of the revisions that are in place, by
    /// pod.
    pub(super) fn host_restarts(&self) -> BTreeMap<String, u32> {
        let here = self.state.members().filter(|one| self.is_host(&one.pool));
        let loads = here.filter_map(|one| self.facts.revisions.get(&one.revision));
        loads.flat_map(|loads| loads.restarts.clone()).collect()
    }

    fn is_host(&self, pool: &str) -> bool {
        self.state.stable.as_ref().is_some_and(|one| one.pool == pool)
    }

    /// Restarts that speak against a revision: of the pod that has most. Restarts of different pods are no
    /// crash loop. Pods that served before it came have restarts of their own, and one that it ended does not
    /// hold it any more.
    pub(super) fn restarts_of(&self, member: &Member, loads: Option<&RevisionFacts>) -> u32 {
        let most = |restarts: Option<u32>| restarts.unwrap_or(0);
        if !self.runs_in_place(member) {
            return most(loads.and_then(|loads| loads.restarts.values().max().copied()));
        }
        let before = |pod: &str| self.state.restarts.get(pod).copied().unwrap_or(0);
        let since = self.host_restarts().into_iter();
        most(since.map(|(pod, restarts)| restarts.saturating_sub(before(&pod))).max())
    }

    /// Restarts that fail a revision.
    pub(super) fn restarts_to_fail(&self, member: &Member) -> u32 {
        if self.runs_in_place(member) { RESTARTS_IN_PLACE } else { RESTARTS_TO_FAIL }
    }

    /// Until when pods may take to begin a load in place, where new pods are the other choice.
    pub(super) fn refused_at(&self) -> Option<Timestamp> {
        let waits = self.state.phase == RolloutPhase::Placing && self.state.placement == Placement::InPlace;
        let is_choice = self.facts.policy.placement.is_none();
        (waits && is_choice).then(|| later(self.state.since, REFUSED_AFTER))
    }

    /// Loads the candidate by new pods where the placement is a choice and its pods turn out not to be able
    /// to: both revisions do not fit in their memory, or none of them begins. True if it does.
    pub(super) fn leave_in_place(&mut self) -> bool {
        if self.state.placement != Placement::InPlace || self.facts.policy.placement.is_some() {
            return false;
        }
        let loads = self.candidate_loads();
        let is_idle = loads.routable + loads.warming + loads.loading == 0;
        let (reason, message) = match &loads.failure {
            Some(cause) if cause.reason == "InsufficientMemory" => {
                ("InsufficientMemory", cause.message.clone())
            }
            None if is_idle && self.refused_at().is_some_and(|at| self.now >= at) => {
                ("NotStarted", "no pod began to load it within a minute".to_owned())
            }
            _ => return false,
        };
        self.use_placement(Placement::Surge);
        self.record_candidate("Replaced", reason, format!("Surge instead of InPlace: {message}"));
        self.enter(RolloutPhase::Placing, Placement::Surge.as_str(), message);
        true
    }
}

#[cfg(test)]
mod tests;
