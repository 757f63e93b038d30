//! What a state asks for: the replicas of each pool, the share of each revision, and commands to pods.
//!
//! Two limits hold for every plan. Pods are added for a rollout only within the budget, and pods that serve
//! are removed only while enough others serve. A pool whose revision still gets requests is not made smaller
//! while others can take them.

use std::collections::BTreeMap;

use super::state::{Member, RolloutPhase, RolloutState};
use super::{Placement, PodCommand, PoolSize, RevisionWeight, RolloutFacts};

/// All of a model's requests.
pub const WHOLE: u32 = 10_000;

/// Pods that a revision needs for its share: rounded up, and at least one.
#[must_use]
pub fn pods_for(weight_percent: u32, base: u32) -> u32 {
    (base * weight_percent).div_ceil(100).clamp(1, base.max(1))
}

/// What a pool is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Stable,
    Candidate,
    Previous,
    Retiring,
}

/// One pool, and the replicas that it should have in the end.
#[derive(Debug)]
struct Wanted<'a> {
    role: Role,
    pool: &'a str,
    /// The revision whose requests its pods answer.
    revision: &'a str,
    goal: u32,
}

/// Replicas of every pool that should exist, in the order of their names.
#[must_use]
pub fn pools(state: &RolloutState, facts: &RolloutFacts<'_>) -> Vec<PoolSize> {
    let wanted = wanted(state, facts);
    let mut sizes: Vec<PoolSize> = wanted
        .iter()
        .map(|one| PoolSize { pool: one.pool.to_owned(), replicas: facts.pool(one.pool).replicas })
        .collect();
    shrink(state, facts, &wanted, &mut sizes);
    grow(state, facts, &wanted, &mut sizes);
    // A pool that is about to go disappears when its last pod has ended.
    let empty = |one: &PoolSize| {
        let pool = facts.pool(&one.pool);
        one.replicas == 0 && pool.pods + pool.terminating + pool.replicas == 0
    };
    let goes = |pool: &str| wanted.iter().any(|one| one.pool == pool && one.role == Role::Retiring);
    sizes.retain(|one| !(goes(&one.pool) && empty(one)));
    sizes.sort_by(|one, other| one.pool.cmp(&other.pool));
    sizes
}

/// The pools in the order in which they may grow, each one time.
fn wanted<'a>(state: &'a RolloutState, facts: &'a RolloutFacts<'_>) -> Vec<Wanted<'a>> {
    let mut wanted: Vec<Wanted<'a>> = Vec::new();
    let mut add = |role, member: &'a Member, goal| {
        if wanted.iter().all(|one| one.pool != member.pool) {
            wanted.push(Wanted { role, pool: &member.pool, revision: &member.revision, goal });
        }
    };
    let base = facts.replicas;
    let needed = state.candidate_pods(facts);
    let stable = match state.placement {
        Placement::DrainFirst if state.candidate.is_some() => base.saturating_sub(needed),
        _ => base,
    };
    // Pods beyond the budget are the spare ones of the previous revision.
    let overflow = facts.physical().saturating_sub(facts.budget.unwrap_or(u32::MAX));
    if let Some(member) = &state.stable {
        add(Role::Stable, member, stable);
    }
    // A candidate that running pods are to load gets no pool of its own.
    let waits_in_place = state.phase == RolloutPhase::Pending
        && match facts.policy.placement {
            Some(placement) => placement == Placement::InPlace,
            None => facts.in_place.is_ok(),
        };
    let exists = |member: &&Member| !waits_in_place || facts.pools.contains_key(&member.pool);
    if let Some(member) = state.candidate.as_ref().filter(exists) {
        add(Role::Candidate, member, needed);
    }
    if let Some(member) = state.previous.as_ref().filter(|_| state.phase == RolloutPhase::Promoted) {
        let spare = facts.pool(&member.pool).replicas.min(base);
        add(Role::Previous, member, spare.saturating_sub(overflow));
    }
    for one in &state.retiring {
        add(Role::Retiring, &one.member, 0);
    }
    // Pools that the state does not name go too.
    for pool in facts.pools.keys() {
        if wanted.iter().all(|one| one.pool != pool) {
            wanted.push(Wanted { role: Role::Retiring, pool, revision: pool, goal: 0 });
        }
    }
    wanted
}

/// Serving pods that may be removed now, over all revisions. Pods of a revision without requests do not
/// serve.
fn removable(state: &RolloutState, facts: &RolloutFacts<'_>, shares: &[RevisionWeight]) -> u32 {
    // A pod that serves two revisions counts once.
    let mut by_pool: BTreeMap<&str, u32> = BTreeMap::new();
    for share in shares {
        let serving = by_pool.entry(state.pool_of(&share.revision)).or_default();
        *serving = facts.routable(&share.revision).max(*serving);
    }
    let serving: u32 = by_pool.values().sum();
    // Removals that were decided and have not happened yet.
    let pending: u32 = facts.pools.values().map(|pool| pool.pods.saturating_sub(pool.replicas)).sum();
    let least = facts.replicas.saturating_sub(facts.max_unavailable);
    serving.saturating_sub(pending).saturating_sub(least)
}

fn shrink(state: &RolloutState, facts: &RolloutFacts<'_>, wanted: &[Wanted<'_>], sizes: &mut [PoolSize]) {
    let shares = split(state, facts.replicas, &|revision| facts.routable(revision));
    let mut removable = removable(state, facts, &shares);
    // One pod ends whatever disruption allows, and no more.
    let mut may_force = is_stuck(state, facts);
    // Whoever asks for fewer replicas gets them at once. Those pods are not there to be removed again.
    if let Some(at) = wanted.iter().position(|one| one.role == Role::Stable) {
        let by_user = sizes[at].replicas.saturating_sub(facts.replicas);
        sizes[at].replicas -= by_user;
        removable = removable.saturating_sub(by_user);
    }
    for (one, size) in wanted.iter().zip(sizes.iter_mut()).rev() {
        if facts.replicas == 0 {
            size.replicas = 0;
        }
        let excess = size.replicas.saturating_sub(one.goal);
        let pool = facts.pool(one.pool);
        // Its pods may hold several revisions that are named.
        let named = state.members().filter(|member| member.pool == one.pool);
        let held: Vec<&str> = named.map(|member| member.revision.as_str()).chain([one.revision]).collect();
        let routable = held.iter().map(|revision| facts.routable(revision)).max().unwrap_or(0).min(pool.pods);
        // The Deployment's controller removes pods that are not ready first.
        let pending = pool.pods.saturating_sub(pool.replicas);
        let removed = pending + pool.replicas.saturating_sub(size.replicas);
        let idle = pool.pods.max(pool.replicas).saturating_sub(routable).saturating_sub(removed);
        let has_share = shares.iter().any(|share| held.contains(&share.revision.as_str()));
        let is_unrouted = !has_share && held.iter().all(|revision| facts.unrouted.contains(*revision));
        let cut = match one.role {
            Role::Candidate => 0,
            // It makes room pod by pod, as the candidate needs it.
            Role::Stable => (idle + removable).min(missing(facts, wanted)),
            Role::Previous | Role::Retiring if is_unrouted => excess,
            Role::Previous | Role::Retiring if has_share && may_force => idle + removable.max(1),
            Role::Previous | Role::Retiring if has_share => idle + removable,
            Role::Previous | Role::Retiring => idle,
        };
        let cut = cut.min(excess);
        size.replicas -= cut;
        if has_share {
            removable = removable.saturating_sub(cut.saturating_sub(idle));
            may_force &= cut <= idle;
        }
    }
}

/// Whether the stable revision waits for the room that pods of others have, and nothing else happens: one of
/// those must end, whatever disruption allows, or nothing ever happens again.
fn is_stuck(state: &RolloutState, facts: &RolloutFacts<'_>) -> bool {
    let Some(stable) = &state.stable else { return false };
    let waits = facts.pool(&stable.pool).pods < facts.replicas
        || facts.revisions.get(&stable.revision).is_some_and(|one| one.unschedulable_since.is_some());
    let moves = facts.pools.values().any(|pool| pool.terminating > 0 || pool.pods != pool.replicas)
        || facts.revisions.values().any(|one| one.loading + one.warming > 0);
    waits && !moves
}

/// Pods that the candidate needs and that there is no room for, so that the stable revision must make some.
fn missing(facts: &RolloutFacts<'_>, wanted: &[Wanted<'_>]) -> u32 {
    let candidate = wanted.iter().find(|one| one.role == Role::Candidate);
    let needed = candidate.map_or(0, |one| one.goal.saturating_sub(facts.pool(one.pool).replicas));
    let limit = facts.budget.unwrap_or(u32::MAX).min(facts.replicas);
    (facts.physical() + needed).saturating_sub(limit)
}

/// Adds pods: those of the stable revision first, then the candidate's, as far as the budget goes.
fn grow(state: &RolloutState, facts: &RolloutFacts<'_>, wanted: &[Wanted<'_>], sizes: &mut [PoolSize]) {
    let budget = facts.budget.unwrap_or(u32::MAX);
    let limit = match state.placement {
        // Pods that end must have ended first.
        Placement::DrainFirst => budget.min(facts.replicas),
        Placement::Surge | Placement::InPlace => budget,
    };
    let mut physical = facts.physical();
    for (one, size) in wanted.iter().zip(sizes.iter_mut()) {
        let growth = one.goal.saturating_sub(size.replicas);
        // A model that is not rolled out has the replicas that its spec asks for: those that do not fit are
        // pending, and the scheduler says why.
        let alone = one.role == Role::Stable && wanted.len() == 1;
        let room = if alone { growth } else { limit.saturating_sub(physical) };
        let growth = growth.min(room);
        size.replicas += growth;
        physical += growth;
    }
}

/// The share of each revision that gets requests. A share is never above what the revision's pods can take,
/// except that of the stable revision, which takes what remains. `replicas` are those of the model,
/// `routable` the pods of a revision that every gateway can route to.
#[must_use]
pub fn split(state: &RolloutState, replicas: u32, routable: &dyn Fn(&str) -> u32) -> Vec<RevisionWeight> {
    let capacity = |member: &Member| {
        let share = u64::from(routable(&member.revision)) * u64::from(WHOLE) / u64::from(replicas.max(1));
        u32::try_from(share).unwrap_or(u32::MAX).min(WHOLE)
    };
    let serves = |member: &&Member| routable(&member.revision) > 0;
    let stable = state.stable.as_ref().filter(serves);
    let candidate = state.candidate.as_ref().filter(serves);
    let good = state.retiring.iter().filter(|one| !one.failed).map(|one| &one.member);
    let others: Vec<&Member> = state.previous.iter().chain(good).filter(serves).collect();
    let mut weights: Vec<RevisionWeight> = Vec::new();
    let mut give = |member: &Member, weight: u32| {
        if weight == 0 {
            return;
        }
        match weights.iter_mut().find(|one| one.revision == member.revision) {
            Some(one) => one.weight += weight,
            None => weights.push(RevisionWeight { revision: member.revision.clone(), weight }),
        }
    };
    let Some(stable) = stable else {
        let mut failed = state.retiring.iter().map(|one| &one.member).filter(serves);
        if let Some(member) = candidate.or(others.first().copied()).or_else(|| failed.next()) {
            give(member, WHOLE);
        }
        return weights;
    };
    let mut rest = WHOLE;
    if let Some(member) = candidate {
        let weight = (state.weight * 100).min(capacity(member));
        give(member, weight);
        rest -= weight;
    }
    let mut excess = rest.saturating_sub(capacity(stable));
    for member in others.iter().filter(|other| other.revision != stable.revision) {
        let weight = capacity(member).min(excess);
        give(member, weight);
        excess -= weight;
        rest -= weight;
    }
    give(stable, rest);
    weights
}

/// What pods must do where the candidate is loaded in place.
#[must_use]
pub fn commands(state: &RolloutState, facts: &RolloutFacts<'_>) -> Vec<PodCommand> {
    let mut commands = Vec::new();
    let Some(stable) = &state.stable else { return commands };
    let (pool, shares_pool) = (stable.pool.clone(), |member: &&Member| member.pool == stable.pool);
    if let Some(candidate) = state.candidate.as_ref().filter(shares_pool) {
        commands.push(PodCommand::Load { pool: pool.clone(), revision: candidate.revision.clone() });
    }
    let gone: Vec<&Member> = state.retiring.iter().map(|one| &one.member).filter(shares_pool).collect();
    let was_swapped = stable.pool != stable.revision
        || gone.iter().copied().chain(&state.previous).any(|one| shares_pool(&one));
    if was_swapped {
        commands.push(PodCommand::Swap { pool: pool.clone(), revision: stable.revision.clone() });
    }
    // What the present share gives requests to stays, whatever the tables so far say.
    let shares = split(state, facts.replicas, &|revision| facts.routable(revision));
    let is_silent = |member: &Member| {
        facts.unrouted.contains(&member.revision)
            && shares.iter().all(|share| share.revision != member.revision)
    };
    for member in gone.into_iter().filter(|member| member.revision != stable.revision) {
        if is_silent(member) {
            commands.push(PodCommand::Unload { pool: pool.clone(), revision: member.revision.clone() });
        }
    }
    commands
}
