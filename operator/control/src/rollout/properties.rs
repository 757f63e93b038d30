//! Invariants of rollouts, over random events in a simulated cluster: its pods load, serve, crash and end,
//! its nodes take a limited number of them, gateways acknowledge late, and anything may change at any time.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use proptest::collection::vec;
use proptest::prelude::*;

use super::analysis::{AnalysisLimits, RequestSample, StepSample};
use super::plan::WHOLE;
use super::*;
use crate::causes::Cause;

/// Seconds of one tick.
const TICK_S: i64 = 20;
/// Ticks with events; then nothing changes any more.
const EVENTS: usize = 40;
/// Ticks in which a rollout must end: every pod loads within three ticks, every step lasts three, every bake
/// six, and a placement that does not fit is given up after four. With 8 pods that move one by one, 300 are
/// more than enough.
const QUIET: usize = 300;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SimPod {
    Pending { ticks: u32 },
    Loading { ticks: u32 },
    Ready,
    Terminating { ticks: u32 },
}

#[derive(Debug, Clone, Copy)]
enum Incident {
    Nothing,
    Desire(u8),
    Scale(u32),
    Kill(u8),
    Budget(u32),
    Command(u8, u8),
}

/// What is wrong with a revision, by its number: 3 cannot be loaded, 4 answers with errors.
fn name(number: u8) -> String {
    format!("r{number}")
}

#[derive(Debug)]
struct Sim {
    state: RolloutState,
    policy: RolloutPolicy,
    desired: u8,
    replicas: u32,
    max_unavailable: u32,
    budget: u32,
    knows_budget: bool,
    asked: BTreeMap<String, u32>,
    pods: BTreeMap<String, Vec<SimPod>>,
    /// Shares by the last tables, the newest last.
    tables: Vec<BTreeMap<String, u32>>,
    commands: BTreeMap<Command, CommandText>,
    requests: u64,
    tick: i64,
}

impl Sim {
    fn new(setup: &Setup) -> Self {
        let steps = setup.steps.iter().map(|weight_percent| ShiftStep {
            weight_percent: *weight_percent,
            hold: Duration::from_secs(60),
        });
        let limits = AnalysisLimits { max_error_rate: Some(0.05), max_latency_ratio: None, min_requests: 20 };
        Self {
            state: RolloutState::default(),
            policy: RolloutPolicy {
                placement: setup.placement,
                steps: steps.collect(),
                analysis: setup.analysis.then_some(limits),
                bake: Duration::from_secs(120),
                on_failure: OnFailure::Rollback,
                history_limit: 10,
                golden_prompts: Vec::new(),
            },
            desired: 1,
            replicas: setup.replicas,
            max_unavailable: setup.max_unavailable,
            budget: setup.replicas + setup.spare,
            knows_budget: setup.knows_budget,
            asked: BTreeMap::new(),
            pods: BTreeMap::new(),
            tables: vec![BTreeMap::new(); 3],
            commands: BTreeMap::new(),
            requests: 0,
            tick: 0,
        }
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_second(1_000_000 + self.tick * TICK_S).unwrap()
    }

    fn happen(&mut self, incident: Incident) {
        match incident {
            Incident::Nothing => {}
            Incident::Desire(number) => self.desired = number,
            Incident::Scale(replicas) => self.replicas = replicas,
            Incident::Budget(spare) => self.budget = self.replicas + spare,
            Incident::Kill(number) => {
                if let Some(pod) = self.pods.get_mut(&name(number)).and_then(|pods| pods.first_mut()) {
                    *pod = SimPod::Pending { ticks: 0 };
                }
            }
            Incident::Command(command, number) => {
                let command = Command::ALL[usize::from(command) % Command::ALL.len()];
                let text = format!("{}/{}", name(number), self.tick);
                self.commands.insert(command, CommandText(text));
            }
        }
    }

    /// Deployments' controllers, the scheduler, kubelets and pods.
    fn cluster(&mut self) {
        for (pool, asked) in &self.asked {
            let pods = self.pods.entry(pool.clone()).or_default();
            let ends = |pod: &SimPod| matches!(pod, SimPod::Terminating { .. });
            // Pods that are not ready go first.
            pods.sort_by_key(|pod| match pod {
                SimPod::Pending { .. } => 0,
                SimPod::Loading { .. } => 1,
                SimPod::Ready => 2,
                SimPod::Terminating { .. } => 3,
            });
            let excess = pods.iter().filter(|pod| !ends(pod)).count().saturating_sub(*asked as usize);
            for pod in pods.iter_mut().take(excess) {
                *pod = SimPod::Terminating { ticks: 0 };
            }
            while pods.iter().filter(|pod| !ends(pod)).count() < *asked as usize {
                pods.push(SimPod::Pending { ticks: 0 });
            }
        }
        let scheduled = |pods: &BTreeMap<String, Vec<SimPod>>| {
            pods.values().flatten().filter(|pod| !matches!(pod, SimPod::Pending { .. })).count()
        };
        let mut used = scheduled(&self.pods);
        for (pool, pods) in &mut self.pods {
            let loads = pool != &name(3);
            for pod in pods.iter_mut() {
                *pod = match *pod {
                    SimPod::Pending { .. } if used < self.budget as usize => {
                        used += 1;
                        SimPod::Loading { ticks: 0 }
                    }
                    SimPod::Pending { ticks } => SimPod::Pending { ticks: ticks + 1 },
                    SimPod::Loading { ticks } if ticks >= 1 && loads => SimPod::Ready,
                    SimPod::Loading { ticks } => SimPod::Loading { ticks: ticks + 1 },
                    SimPod::Terminating { ticks } => SimPod::Terminating { ticks: ticks + 1 },
                    SimPod::Ready => SimPod::Ready,
                };
            }
            pods.retain(|pod| !matches!(pod, SimPod::Terminating { ticks } if *ticks >= 2));
        }
        self.pods.retain(|pool, pods| self.asked.contains_key(pool) || !pods.is_empty());
    }

    fn count(&self, pool: &str, of: impl Fn(&SimPod) -> bool) -> u32 {
        u32::try_from(self.pods.get(pool).map_or(0, |pods| pods.iter().filter(|pod| of(pod)).count()))
            .unwrap()
    }

    fn facts<'a>(&'a self, desired: &'a str, sample: Option<&'a StepSample>) -> RolloutFacts<'a> {
        let names: BTreeSet<&String> = self.asked.keys().chain(self.pods.keys()).collect();
        let pool = |name: &String| PoolFacts {
            replicas: self.asked.get(name).copied().unwrap_or(0),
            pods: self.count(name, |pod| !matches!(pod, SimPod::Terminating { .. })),
            terminating: self.count(name, |pod| matches!(pod, SimPod::Terminating { .. })),
        };
        let loads = |revision: &String| {
            let waits = self.pods.get(revision).into_iter().flatten().filter_map(|pod| match pod {
                SimPod::Pending { ticks } if *ticks > 0 => Some(i64::from(*ticks)),
                _ => None,
            });
            let failed =
                revision == &name(3) && self.count(revision, |pod| matches!(pod, SimPod::Loading { .. })) > 0;
            RevisionFacts {
                routable: self.count(revision, |pod| *pod == SimPod::Ready),
                loading: self.count(revision, |pod| matches!(pod, SimPod::Loading { .. })),
                unschedulable_since: waits
                    .max()
                    .and_then(|ticks| Timestamp::from_second(self.now().as_second() - ticks * TICK_S).ok()),
                failure: failed
                    .then(|| Cause { reason: "DigestMismatch".to_owned(), message: String::new() }),
                ..RevisionFacts::default()
            }
        };
        let is_silent =
            |table: &BTreeMap<String, u32>, name: &str| table.get(name).is_none_or(|share| *share == 0);
        let acknowledged = &self.tables[self.tables.len() - 3..];
        RolloutFacts {
            desired,
            replicas: self.replicas,
            max_unavailable: self.max_unavailable,
            policy: &self.policy,
            in_place: Err("not in this simulation".to_owned()),
            budget: self.knows_budget.then_some(self.budget),
            pools: names.iter().map(|one| ((*one).clone(), pool(one))).collect(),
            revisions: names.iter().map(|one| ((*one).clone(), loads(one))).collect(),
            unrouted: names
                .iter()
                .filter(|one| acknowledged.iter().all(|table| is_silent(table, one.as_str())))
                .map(|one| (*one).clone())
                .collect(),
            sample,
            commands: self.commands.clone(),
        }
    }

    /// One pass of the operator. Checks what must hold for every plan.
    fn operate(&mut self) -> Result<(), TestCaseError> {
        let desired = name(self.desired);
        let sample = self.state.sample_key().map(|key| {
            let errors = if key.revision == name(4) { self.requests } else { 0 };
            let candidate = RequestSample { requests: self.requests, errors, latency: Vec::new() };
            StepSample { key, candidate, stable: RequestSample::default() }
        });
        let facts = self.facts(&desired, sample.as_ref());
        let outcome = step(&self.state, &facts, self.now());
        check_split(&outcome, &facts)?;
        check_pools(&outcome, &facts)?;
        prop_assert!(outcome.state.history.len() <= state::LONGEST_HISTORY);
        let same_step = outcome.state.sample_key() == self.state.sample_key();
        self.requests = if same_step { self.requests + 10 } else { 0 };
        self.state = outcome.state;
        self.asked = outcome.pools.into_iter().map(|one| (one.pool, one.replicas)).collect();
        self.tables.push(outcome.split.into_iter().map(|one| (one.revision, one.weight)).collect());
        self.tick += 1;
        Ok(())
    }
}

fn check_split(outcome: &StepOutcome, facts: &RolloutFacts<'_>) -> Result<(), TestCaseError> {
    let state = &outcome.state;
    let serving: u32 = facts.revisions.values().map(|one| one.routable).sum();
    let sum: u32 = outcome.split.iter().map(|one| one.weight).sum();
    let named = |revision: &str| {
        let members = [&state.stable, &state.candidate, &state.previous].into_iter().flatten();
        members.chain(state.retiring.iter().map(|one| &one.member)).any(|one| one.revision == revision)
    };
    let any_named = facts.revisions.iter().any(|(name, one)| one.routable > 0 && named(name));
    prop_assert!(sum == WHOLE || (sum == 0 && !any_named), "{sum} {state:?} {facts:?}");
    prop_assert!(serving > 0 || sum == 0);
    let is =
        |member: &Option<state::Member>, name: &str| member.as_ref().is_some_and(|one| one.revision == name);
    let stable = state.stable.as_ref().map_or(0, |one| facts.routable(&one.revision));
    for one in &outcome.split {
        let routable = facts.routable(&one.revision);
        prop_assert!(routable > 0, "{} gets requests and has no pod: {outcome:?}", one.revision);
        if stable > 0 && !is(&state.stable, &one.revision) {
            let capacity = WHOLE * routable / facts.replicas.max(1);
            prop_assert!(one.weight <= capacity, "{one:?} is above {capacity}: {outcome:?}");
        }
        if stable > 0 && is(&state.candidate, &one.revision) {
            prop_assert!(one.weight <= state.weight * 100, "{one:?} is above the step: {outcome:?}");
        }
        let failed = state.retiring.iter().any(|other| other.failed && other.member.revision == one.revision);
        prop_assert!(!failed || stable == 0, "{one:?} failed: {outcome:?}");
    }
    Ok(())
}

fn check_pools(outcome: &StepOutcome, facts: &RolloutFacts<'_>) -> Result<(), TestCaseError> {
    let asked = |pool: &str| outcome.pools.iter().find(|one| one.pool == pool).map_or(0, |one| one.replicas);
    // What is deleted has no pod.
    for (pool, before) in &facts.pools {
        let exists = outcome.pools.iter().any(|one| one.pool == *pool);
        prop_assert!(
            exists || before.pods + before.terminating == 0,
            "{pool} is deleted with pods: {outcome:?}"
        );
    }
    let stable = outcome.state.stable.as_ref();
    let grows = |one: &&PoolSize| one.replicas > facts.pool(&one.pool).replicas;
    // Never over the budget, but for the replicas that the spec itself asks for.
    if let Some(budget) = facts.budget
        && outcome.pools.iter().any(|one| grows(&one) && stable.is_some_and(|member| member.pool != one.pool))
    {
        let total: u32 = outcome
            .pools
            .iter()
            .map(|one| one.replicas.max(facts.pool(&one.pool).pods) + facts.pool(&one.pool).terminating)
            .sum();
        prop_assert!(total <= budget, "{total} pods are over {budget}: {outcome:?} {facts:?}");
    }
    // Never below what disruption allows by the operator's own removal, but for a model that is scaled down.
    let serves = |revision: &String| outcome.split.iter().any(|one| one.revision == *revision);
    let serving = |left: bool| -> u32 {
        facts
            .revisions
            .iter()
            .filter(|(revision, _)| serves(revision))
            .map(|(revision, one)| if left { one.routable.min(asked(revision)) } else { one.routable })
            .sum()
    };
    let least = facts.replicas.saturating_sub(facts.max_unavailable);
    let (before, after) = (serving(false), serving(true));
    let pending = facts.pools.values().any(|pool| pool.pods > pool.replicas);
    // One pod at a time makes room for a stable revision that has none.
    let waits = stable.is_some_and(|member| {
        let loads = facts.revisions.get(&member.revision);
        facts.pool(&member.pool).pods < facts.replicas
            || loads.is_some_and(|loads| loads.unschedulable_since.is_some())
    });
    let makes_room = waits && after + 1 == before;
    prop_assert!(
        after >= before.min(least) || pending || makes_room,
        "{before} to {after} of {least}: {outcome:?} {facts:?}"
    );
    Ok(())
}

#[derive(Debug, Clone)]
struct Setup {
    steps: Vec<u32>,
    placement: Option<Placement>,
    analysis: bool,
    replicas: u32,
    max_unavailable: u32,
    spare: u32,
    knows_budget: bool,
}

fn setup() -> impl Strategy<Value = Setup> {
    let steps = prop_oneof![Just(vec![]), Just(vec![5, 50]), Just(vec![25, 50, 75]), Just(vec![100])];
    let (surge, drain_first) = (Some(Placement::Surge), Some(Placement::DrainFirst));
    let placement = prop_oneof![3 => Just(None), 1 => Just(surge), 1 => Just(drain_first)];
    (steps, placement, any::<bool>(), 1..6_u32, 0..3_u32, 0..8_u32, any::<bool>()).prop_map(
        |(steps, placement, analysis, replicas, max_unavailable, spare, knows_budget)| Setup {
            steps,
            placement,
            analysis,
            replicas,
            max_unavailable,
            spare,
            knows_budget,
        },
    )
}

fn incident() -> impl Strategy<Value = Incident> {
    prop_oneof![
        12 => Just(Incident::Nothing),
        4 => (1..5_u8).prop_map(Incident::Desire),
        1 => (0..6_u32).prop_map(Incident::Scale),
        2 => (1..5_u8).prop_map(Incident::Kill),
        1 => (0..6_u32).prop_map(Incident::Budget),
        2 => (0..3_u8, 1..5_u8).prop_map(|(command, number)| Incident::Command(command, number)),
    ]
}

/// A rollout may wait for ever only where it says why.
fn waits_with_a_reason(state: &RolloutState) -> bool {
    state.held
        || matches!(state.reason.as_str(), "NoCapacity" | "Stopped" | "Unschedulable" | "CannotLoadInPlace")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_rollout_keeps_its_invariants_and_ends(setup in setup(), incidents in vec(incident(), EVENTS)) {
        let mut sim = Sim::new(&setup);
        for _ in 0..8 {
            sim.operate()?;
            sim.cluster();
        }
        for incident in incidents {
            sim.happen(incident);
            sim.operate()?;
            sim.cluster();
        }
        // In the end there is room for the replicas that the spec asks for.
        sim.budget = sim.budget.max(sim.replicas);
        for _ in 0..QUIET {
            sim.operate()?;
            sim.cluster();
        }
        let desired = name(sim.desired);
        let state = &sim.state;
        let Some(stable) = &state.stable else {
            // The first revision cannot be loaded.
            prop_assert!(sim.desired == 3 || sim.replicas == 0, "{sim:?}");
            return Ok(());
        };
        prop_assert!(state.phase.is_final() || waits_with_a_reason(state), "{sim:?}");
        match state.phase {
            RolloutPhase::Done => {
                prop_assert_eq!(&stable.revision, &desired);
                let left: Vec<_> = sim.asked.iter().collect();
                prop_assert_eq!(left, vec![(&desired, &sim.replicas)], "{:?}", sim);
            }
            RolloutPhase::RolledBack => {
                prop_assert_ne!(&stable.revision, &desired);
                prop_assert_eq!(state.refused.as_ref(), Some(&desired));
            }
            _ => {}
        }
    }
}
