//! Rollouts within running pods: what pods are asked for, and what must hold whatever happens to them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use proptest::collection::vec;
use proptest::prelude::*;
use trustformers_proto::v1::{ModelState, ModelStatus, SlotRole};

use super::*;
use crate::build::{GatewayService, PodAccess, pod_config, pod_template};
use crate::pods::tests::view;
use crate::rollout::plan::WHOLE;
use crate::rollout::{
    Command, CommandText, PoolFacts, RolloutFacts, RolloutPolicy, ShiftStep, StepOutcome, observe, step,
};
use crate::status::PodReport;
use crate::validate::tests::valid;

const TICK_S: i64 = 20;

fn slot(revision: &str, state: ModelState) -> ModelSlot {
    let mut slot =
        ModelSlot { revision: revision.to_owned(), digest: format!("d-{revision}"), ..ModelSlot::default() };
    slot.set_state(state);
    slot
}

fn platform() -> Platform {
    Platform {
        runtime_image: "image".to_owned(),
        namespace: "sys".to_owned(),
        gateway: GatewayService { name: "gateway".to_owned(), http_port: 8080, grpc_port: 9090 },
        optional_kinds: std::collections::BTreeSet::new(),
        pull_policy: "Never".to_owned(),
        admin: Some(PodAccess { subject: "s".to_owned(), issuer: None, keys: None }),
    }
}

#[test]
fn only_a_change_of_the_revision_alone_can_be_loaded_by_running_pods() {
    let template = |spec: &str| pod_template(&valid("chat", spec), &platform(), "r1").unwrap();
    let stored = template("{source: {uri: 'pvc://weights/a'}}");
    let why = |spec: &str| {
        check(&valid("chat", spec), &platform(), &template(spec), Some(&stored)).err().unwrap_or_default()
    };
    assert_eq!(why("{source: {uri: 'pvc://weights/b'}, runtime: {contextTokens: 64}}"), "");
    for (spec, word) in [
        ("{source: {uri: 'oci://x'}}", "oci: Pull"),
        ("{source: {uri: 'pvc://other/b'}}", "new pods"),
        ("{source: {uri: 'hf://a/b'}}", "new pods"),
        ("{source: {uri: 'pvc://weights/b'}, runtime: {image: other}}", "new pods"),
        ("{source: {uri: 'pvc://weights/b'}, runtime: {resources: {limits: {cpu: 1}}}}", "new pods"),
    ] {
        assert!(why(spec).contains(word), "{spec}: {}", why(spec));
    }
    let model = valid("chat", "{source: {uri: 'pvc://weights/b'}}");
    let blind = Platform { admin: None, ..platform() };
    assert!(check(&model, &blind, &stored, Some(&stored)).unwrap_err().contains("--pod-auth token"));
    assert!(check(&model, &platform(), &stored, None).unwrap_err().contains("no Deployment"));
}

#[test]
fn a_load_asks_for_what_the_pods_file_says() {
    let model = valid(
        "chat",
        "{task: generate, source: {uri: 'hf://a/b', revision: v1, files: ['*.gguf'], sha256: aa}, \
         rollout: {analysis: {goldenPrompts: [{prompt: '2 + 2 =', expect: ' 4'}]}}, \
         runtime: {numerics: exact, contextTokens: 64, batching: {maxBatchSize: 2, maxQueue: 3, priority: true}}}",
    );
    let request = load_request(&pod_config(&model, "r2", None));
    assert_eq!((request.path.as_str(), request.revision.as_str()), ("hf://a/b@v1", "r2"));
    assert_eq!((request.name.as_str(), request.task.as_str()), ("team/chat", "generate"));
    assert_eq!((request.sha256.as_str(), request.files), ("aa", vec!["*.gguf".to_owned()]));
    assert_eq!((request.context_tokens, request.max_batch_size, request.max_queue), (64, 2, 3));
    assert_eq!(
        (request.probes[0].prompt.as_str(), request.probes[0].begins_with.as_str()),
        ("2 + 2 =", " 4")
    );
    assert_eq!((request.numerics.as_str(), request.priority), ("exact", Some(true)));
    let claim = valid("chat", "{source: {uri: 'pvc://weights/a/b'}}");
    assert_eq!(load_request(&pod_config(&claim, "r2", None)).path, "/models/a/b");
    let adapters = "[{name: sql, source: {uri: 'pvc://w/s', sha256: bb}}, {name: far, source: {uri: 'hf://o/n', revision: v2}}]";
    let adapted =
        valid("chat", &format!("{{source: {{uri: 'pvc://w/a'}}, runtime: {{adapters: {adapters}}}}}"));
    let adapters = load_request(&pod_config(&adapted, "r2", None)).adapters;
    assert_eq!((adapters[0].path.as_str(), adapters[0].sha256.as_str()), ("/adapters/sql/s", "bb"));
    assert_eq!((adapters[1].name.as_str(), adapters[1].path.as_str()), ("far", "hf://o/n@v2"));
}

/// The commands for pool `r1`.
fn commands(load: &[&str], swap: Option<&str>, unload: &[&str]) -> Vec<PodCommand> {
    let (pool, text) = (|| "r1".to_owned(), |revision: &&str| (*revision).to_owned());
    let load = load.iter().map(|one| PodCommand::Load { pool: pool(), revision: text(one) });
    let swap = swap.iter().map(|one| PodCommand::Swap { pool: pool(), revision: text(one) });
    let unload = unload.iter().map(|one| PodCommand::Unload { pool: pool(), revision: text(one) });
    load.chain(swap).chain(unload).collect()
}

/// What pods named `a`, `b` … with these slots are asked for.
fn asked(commands: &[PodCommand], pods: &[&[ModelSlot]], unrouted: &[&str]) -> Vec<String> {
    let views: Vec<PodView> =
        (b'a'..).zip(pods).map(|(name, _)| view("chat", &char::from(name).to_string())).collect();
    let pods: Vec<PodSlots<'_>> =
        views.iter().zip(pods).map(|(pod, slots)| PodSlots { pod, slots: slots.to_vec() }).collect();
    let unrouted: BTreeSet<String> = unrouted.iter().map(|one| (*one).to_owned()).collect();
    let text = |task: PodTask| match task.action {
        PodAction::Load { revision } => format!("{} load {revision}", task.uid),
        PodAction::Swap { revision, expected_digest } => {
            format!("{} swap {revision} for {expected_digest}", task.uid)
        }
        PodAction::Unload { revision } => format!("{} unload {revision}", task.uid),
    };
    tasks(commands, &pods, &RolloutState::default(), &unrouted).into_iter().map(text).collect()
}

#[test]
fn one_pod_loads_a_candidate_first_and_the_others_when_it_is_ready() {
    use ModelState::{Failed, Loading, Ready};
    let load = commands(&["r2"], None, &[]);
    let (stable, loading) = (slot("r1", Ready), slot("r2", Loading));
    let alone = std::slice::from_ref(&stable);
    assert_eq!(asked(&load, &[alone, alone], &[]), ["uid-a load r2"]);
    assert_eq!(asked(&load, &[&[stable.clone(), loading], alone], &[]), Vec::<String>::new());
    let both = [stable.clone(), slot("r2", Ready)];
    assert_eq!(asked(&load, &[&both, alone], &[]), ["uid-b load r2"]);
    // What failed is not tried again by itself, and a pod that starts is left alone.
    assert!(asked(&load, &[&[stable.clone(), slot("r2", Failed)], alone], &[]).is_empty());
    assert_eq!(asked(&load, &[&[slot("r1", Loading)], alone], &[]), ["uid-b load r2"]);
}

#[test]
fn a_version_leaves_its_slot_only_when_no_gateway_may_ask_for_it() {
    use ModelState::{Draining, Ready};
    let load = commands(&["r3"], None, &[]);
    let old = [slot("r1", Ready), slot("r2", Ready)];
    assert!(asked(&load, &[&old], &[]).is_empty());
    assert_eq!(asked(&load, &[&old], &["r2"]), ["uid-a unload r2"]);
    assert!(asked(&load, &[&[slot("r1", Ready), slot("r2", Draining)]], &["r2"]).is_empty());
    let promoted = commands(&[], Some("r2"), &["r1"]);
    assert_eq!(asked(&promoted, &[&old], &["r1"]), ["uid-a swap r2 for d-r1"]);
    assert_eq!(asked(&promoted, &[&[slot("r2", Ready), slot("r1", Ready)]], &["r1"]), ["uid-a unload r1"]);
    // A container that restarted with an older file loads what must answer, whatever others do.
    let restarted = [slot("r1", Ready)];
    assert_eq!(asked(&commands(&[], Some("r2"), &[]), &[&restarted, &restarted], &[]).len(), 2);
}

#[derive(Debug, Clone, Copy)]
enum PodIncident {
    Nothing,
    /// The spec names another revision.
    Desire(u8),
    /// A container restarts.
    Restart(u8),
    /// The operator is killed: nothing but the stored state is left, and pods have not reported yet.
    Kill,
    /// A command about a revision.
    Command(u8, u8),
}

/// A pod of the simulation.
#[derive(Debug, Clone)]
struct SlotPod {
    view: PodView,
    slots: Vec<ModelSlot>,
}

#[derive(Debug)]
struct PodSim {
    state: RolloutState,
    policy: RolloutPolicy,
    desired: u8,
    pods: Vec<SlotPod>,
    /// What the ConfigMap says.
    file: String,
    tables: Vec<BTreeMap<String, u32>>,
    commands: BTreeMap<Command, CommandText>,
    reported: bool,
    tick: i64,
}

/// Revision 3 cannot be loaded.
fn name(number: u8) -> String {
    format!("r{number}")
}

impl PodSim {
    fn new(replicas: u8, steps: &[u32]) -> Self {
        let pod = |number: u8| {
            let view = view("chat", &format!("p{number}"));
            SlotPod { view, slots: vec![slot("r1", ModelState::Ready)] }
        };
        let steps = steps.iter().map(|weight_percent| ShiftStep {
            weight_percent: *weight_percent,
            hold: Duration::from_secs(40),
        });
        Self {
            state: RolloutState {
                stable: Some(Member { revision: name(1), pool: name(1) }),
                ..RolloutState::default()
            },
            policy: RolloutPolicy {
                placement: Some(Placement::InPlace),
                steps: steps.collect(),
                bake: Duration::from_secs(100),
                history_limit: 10,
                ..RolloutPolicy::default()
            },
            desired: 1,
            pods: (0..replicas).map(pod).collect(),
            file: name(1),
            tables: vec![BTreeMap::from([(name(1), WHOLE)]); 3],
            commands: BTreeMap::new(),
            reported: true,
            tick: 0,
        }
    }

    fn happen(&mut self, incident: PodIncident) {
        match incident {
            PodIncident::Nothing => {}
            PodIncident::Desire(number) => self.desired = number,
            PodIncident::Restart(number) => {
                let index = usize::from(number) % self.pods.len();
                let pod = &mut self.pods[index];
                pod.view.restarts += 1;
                (pod.view.ready, pod.view.containers_ready) = (false, false);
                pod.slots = vec![slot(&self.file, ModelState::Loading)];
            }
            PodIncident::Kill => self.reported = false,
            PodIncident::Command(command, number) => {
                let command = Command::ALL[usize::from(command) % Command::ALL.len()];
                let text = format!("{}/{}", name(number), self.tick);
                self.commands.insert(command, CommandText(text));
            }
        }
    }

    /// Pods load and end what they were asked to.
    fn cluster(&mut self) {
        for pod in &mut self.pods {
            for slot in &mut pod.slots {
                let next = match (slot.state(), slot.revision.as_str()) {
                    (ModelState::Loading, "r3") => ModelState::Failed,
                    (ModelState::Loading, _) => ModelState::Ready,
                    (state, _) => state,
                };
                slot.set_state(next);
            }
            pod.slots.retain(|slot| slot.state() != ModelState::Draining);
            let serves = pod.slots[0].state() == ModelState::Ready;
            (pod.view.ready, pod.view.containers_ready) = (serves, serves);
        }
    }

    fn is_silent(&self, revision: &str) -> bool {
        let newest = &self.tables[self.tables.len() - 3..];
        newest.iter().all(|table| table.get(revision).is_none_or(|share| *share == 0))
    }

    fn step(&self, desired: &str) -> StepOutcome {
        let report = |pod: &SlotPod| {
            let model = ModelStatus { slots: pod.slots.clone(), ..ModelStatus::default() };
            let report =
                PodReport { model, restarts: pod.view.restarts, progressed_at: Timestamp::default() };
            (pod.view.uid.clone(), report)
        };
        let views: Vec<PodView> = self.pods.iter().map(|pod| pod.view.clone()).collect();
        let reports = if self.reported { self.pods.iter().map(report).collect() } else { BTreeMap::new() };
        let replicas = u32::try_from(self.pods.len()).unwrap();
        let revisions = observe::revisions(&BTreeMap::new(), &views, &reports, &self.state);
        let facts = RolloutFacts {
            desired,
            replicas,
            max_unavailable: 1,
            policy: &self.policy,
            in_place: Ok(()),
            budget: None,
            pools: BTreeMap::from([(name(1), PoolFacts { replicas, pods: replicas, terminating: 0 })]),
            unrouted: (1..5).map(name).filter(|revision| self.is_silent(revision)).collect(),
            revisions,
            sample: None,
            commands: self.commands.clone(),
        };
        step(&self.state, &facts, Timestamp::from_second(1_000_000 + self.tick * TICK_S).unwrap())
    }

    /// One pass of the operator, and what must hold after it.
    fn operate(&mut self) -> Result<(), TestCaseError> {
        let outcome = self.step(&name(self.desired));
        let sizes: Vec<_> = outcome.pools.iter().map(|one| (one.pool.clone(), one.replicas)).collect();
        prop_assert_eq!(&sizes, &vec![(name(1), u32::try_from(self.pods.len()).unwrap())]);
        self.state = outcome.state;
        self.file = self.state.start_revision("r1").to_owned();
        let table: BTreeMap<String, u32> =
            outcome.split.into_iter().map(|one| (one.revision, one.weight)).collect();
        for (revision, share) in &table {
            let holds = |pod: &SlotPod| pod.slots.iter().any(|slot| slot.revision == *revision);
            let can = self.pods.iter().any(holds) || !self.reported;
            prop_assert!(*share == 0 || can, "{revision} gets requests and no pod holds it: {self:?}");
        }
        self.tables.push(table);
        let slots: Vec<PodSlots<'_>> =
            self.pods.iter().map(|pod| PodSlots { pod: &pod.view, slots: pod.slots.clone() }).collect();
        let unrouted = (1..5).map(name).filter(|revision| self.is_silent(revision)).collect();
        let tasks =
            if self.reported { tasks(&outcome.commands, &slots, &self.state, &unrouted) } else { Vec::new() };
        for task in tasks {
            self.obey(&task)?;
        }
        self.reported = true;
        self.tick += 1;
        Ok(())
    }

    /// What a pod does with a request, as its own decisions allow it.
    fn obey(&mut self, task: &PodTask) -> Result<(), TestCaseError> {
        let silent = |revision: &str| {
            let newest = &self.tables[self.tables.len() - 3..];
            newest.iter().all(|table| table.get(revision).is_none_or(|share| *share == 0))
        };
        let unloads = matches!(&task.action, PodAction::Unload { revision } if silent(revision));
        let pod = self.pods.iter_mut().find(|pod| pod.view.uid == task.uid).unwrap();
        match &task.action {
            PodAction::Load { revision } => {
                prop_assert!(pod.slots.len() == 1, "there is no free slot: {pod:?}");
                pod.slots.push(slot(revision, ModelState::Loading));
            }
            PodAction::Swap { revision, expected_digest } => {
                prop_assert_eq!(&pod.slots[0].digest, expected_digest);
                pod.slots.swap(0, 1);
                prop_assert_eq!(&pod.slots[0].revision, revision);
                prop_assert_eq!(pod.slots[0].state(), ModelState::Ready);
                pod.slots[1].role = SlotRole::Previous as i32;
            }
            PodAction::Unload { revision } => {
                prop_assert!(unloads, "{revision} may still be asked for");
                prop_assert!(pod.slots[0].revision != *revision, "it answers");
                pod.slots[1].set_state(ModelState::Draining);
            }
        }
        Ok(())
    }
}

/// A rollout of `r2` whose placement is chosen, until pods are asked to load it.
fn placed(placement: Option<Placement>) -> PodSim {
    let mut sim = PodSim::new(2, &[]);
    (sim.policy.placement, sim.desired) = (placement, 2);
    for pod in &mut sim.pods {
        // What happened before the rollout does not count.
        pod.view.restarts = 7;
    }
    while sim.state.phase != RolloutPhase::Placing {
        sim.state = sim.step("r2").state;
    }
    assert_eq!(sim.state.placement, Placement::InPlace);
    sim
}

/// The next state, and the pools with their replicas.
fn next_pools(sim: &mut PodSim) -> Vec<(String, u32)> {
    let outcome = sim.step("r2");
    sim.state = outcome.state;
    outcome.pools.into_iter().map(|one| (one.pool, one.replicas)).collect()
}

#[test]
fn a_revision_that_does_not_fit_beside_the_other_gets_pods_of_its_own_if_that_is_a_choice() {
    let mut failed = slot("r2", ModelState::Failed);
    failed.reason = "InsufficientMemory".to_owned();
    let mut sim = placed(None);
    sim.pods[0].slots.push(failed.clone());
    assert_eq!(next_pools(&mut sim), [("r1".to_owned(), 2), ("r2".to_owned(), 2)]);
    assert_eq!(
        (sim.state.placement, sim.state.history[0].reason.as_str()),
        (Placement::Surge, "InsufficientMemory")
    );
    // The slot of a pod that could not load it says nothing about the new pods.
    next_pools(&mut sim);
    assert_eq!((sim.state.phase, sim.state.placement), (RolloutPhase::Placing, Placement::Surge));

    let mut sim = placed(Some(Placement::InPlace));
    sim.pods[0].slots.push(failed);
    assert_eq!(next_pools(&mut sim), [("r1".to_owned(), 2)]);
    assert_eq!(
        (sim.state.phase, sim.state.reason.as_str()),
        (RolloutPhase::RollingBack, "InsufficientMemory")
    );
}

#[test]
fn pods_that_do_not_begin_within_a_minute_are_not_waited_for_if_there_is_a_choice() {
    let mut sim = placed(None);
    sim.tick += 2;
    assert_eq!(next_pools(&mut sim), [("r1".to_owned(), 2)]);
    sim.tick += 1;
    next_pools(&mut sim);
    assert_eq!((sim.state.placement, sim.state.history[0].reason.as_str()), (Placement::Surge, "NotStarted"));
}

#[test]
fn restarts_since_the_rollout_started_fail_the_candidate() {
    let mut sim = placed(Some(Placement::InPlace));
    sim.pods[0].view.restarts += 1;
    next_pools(&mut sim);
    assert_eq!(sim.state.phase, RolloutPhase::Placing);
    sim.pods[0].slots.push(slot("r2", ModelState::Loading));
    sim.pods[1].slots.push(slot("r2", ModelState::Loading));
    sim.pods[0].view.restarts += 1;
    next_pools(&mut sim);
    assert_eq!((sim.state.phase, sim.state.reason.as_str()), (RolloutPhase::RollingBack, "Crashing"));
}

#[test]
fn one_restart_of_each_pod_is_no_crash_loop() {
    let mut sim = placed(Some(Placement::InPlace));
    next_pools(&mut sim);
    for pod in &mut sim.pods {
        pod.slots.push(slot("r2", ModelState::Loading));
        pod.view.restarts += 1;
    }
    next_pools(&mut sim);
    assert!(!matches!(sim.state.phase, RolloutPhase::RollingBack), "{:?}", sim.state);
}

fn incident() -> impl Strategy<Value = PodIncident> {
    prop_oneof![
        8 => Just(PodIncident::Nothing),
        3 => (1..5_u8).prop_map(PodIncident::Desire),
        1 => (0..4_u8).prop_map(PodIncident::Restart),
        2 => Just(PodIncident::Kill),
        1 => (0..3_u8, 1..5_u8).prop_map(|(command, number)| PodIncident::Command(command, number)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn pods_keep_what_is_asked_for_and_end_with_one_version(
        replicas in 1..4_u8,
        steps in prop_oneof![Just(vec![]), Just(vec![5, 50]), Just(vec![50])],
        incidents in vec(incident(), 40),
    ) {
        let mut sim = PodSim::new(replicas, &steps);
        for incident in incidents {
            sim.happen(incident);
            sim.operate()?;
            sim.cluster();
        }
        for _ in 0..100 {
            sim.operate()?;
            sim.cluster();
        }
        let stable = sim.state.stable.clone().unwrap();
        prop_assert!(sim.state.phase.is_final() || sim.state.held, "{sim:?}");
        prop_assert_eq!(&stable.pool, &name(1));
        match sim.state.phase {
            RolloutPhase::Done => prop_assert_eq!(&stable.revision, &name(sim.desired)),
            _ => prop_assert_eq!(sim.state.refused.as_ref(), Some(&name(sim.desired))),
        }
        for pod in &sim.pods {
            let held: Vec<_> = pod.slots.iter().map(|slot| slot.revision.as_str()).collect();
            prop_assert_eq!(held, vec![stable.revision.as_str()], "{:?}", &sim);
        }
        prop_assert_eq!(&sim.file, &stable.revision);
    }
}
