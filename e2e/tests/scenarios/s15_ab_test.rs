//! An A/B test divides users between two models, and its counts are those of its callers to the last request,
//! also behind a restart of the operator, the death of every gateway, and a change of the leader.

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    api::{DynamicObject, ListParams},
    runtime::watcher,
};
use serde_json::{Value, json};
use trustformers_e2e::{
    ab_test::{Counted, Tests, answers, visits},
    gateway::Gateway,
    model::{MINILM, condition, status_text},
    process,
    release::{self, GATEWAY, OPERATOR},
    scenario::{Scenario, run},
    wait::Until,
};

/// Users of the first round.
const USERS: usize = 400;
/// A checkpoint comes every 30 s.
const CHECKPOINT_LIMIT_S: u64 = 90;

/// A test over two models that serve, and what callers counted of it.
struct Divided {
    gateway: Gateway,
    tests: Tests,
    /// The name that callers use.
    route: String,
    counted: Counted,
}

impl Divided {
    async fn begin(scenario: &Scenario, spec: &Value) -> Result<Self> {
        let (models, gateway) = (scenario.models(), scenario.gateway().await?);
        for name in ["one", "two"] {
            models.apply(name, json!({"source": {"uri": MINILM}})).await?;
        }
        for name in ["one", "two"] {
            models.ready(name, 90).await?;
        }
        let tests = Tests::new(&scenario.cluster, &scenario.namespace);
        tests.apply("search", spec).await?;
        let route = models.full_name("search");
        let mut counted = Counted::default();
        counted.add(vec![answers(&gateway, &route).await?]);
        Ok(Self { gateway, tests, route, counted })
    }

    /// Each of these users sends one request.
    async fn send(&mut self, users: std::ops::Range<usize>) -> Result<()> {
        let users = users.map(|number| format!("user-{number}"));
        self.counted.add(visits(&self.gateway, &self.route, users).await?);
        Ok(())
    }

    /// Waits until the status has the callers' counts.
    async fn counts_are_equal(&self, when: &str) -> Result<()> {
        let what = format!("the status has the callers' counts {when}");
        let limit = Until::new(&what, CHECKPOINT_LIMIT_S);
        self.tests.until("search", limit, |test| self.counted.equals(test).then_some(())).await
    }
}

fn spec() -> Value {
    json!({
        "route": "search",
        "variants": [
            {"name": "control", "modelRef": {"name": "one"}, "weight": 90},
            {"name": "treatment", "modelRef": {"name": "two"}, "weight": 10},
        ],
        "goal": {"metric": "latencyP95Ms", "direction": "Lower"},
    })
}

#[tokio::test]
async fn the_counts_of_a_test_are_those_of_its_callers() -> Result<()> {
    run("ab-test", async |scenario| {
        // Given: two models that serve, and a test that shares a route between them.
        let mut test = Divided::begin(scenario, &spec()).await?;

        // Then: users are divided, and keep their variant.
        test.send(0..USERS).await?;
        test.send(0..USERS).await?;
        let (control, treatment) = (test.counted.users("control"), test.counted.users("treatment"));
        // 40 expected; five standard deviations are 30.
        assert!((10..=70).contains(&treatment.len()), "{} of {USERS} users", treatment.len());
        assert_eq!(treatment.intersection(&control).count(), 0, "a user got both variants");

        // And: the status has the callers' counts.
        test.counts_are_equal("at first").await?;
        let healthy = Until::new("the test runs", 10);
        let is_healthy = |test: &DynamicObject| (status_text(test, "/srm") == "ok").then_some(());
        test.tests.until("search", healthy, is_healthy).await?;

        // When: the operator is restarted, and users come again. Then: nothing is lost or counted twice.
        release::scale(&scenario.cluster, OPERATOR, 0).await?;
        release::scale(&scenario.cluster, OPERATOR, 1).await?;
        release::ready(&scenario.cluster, OPERATOR).await?;
        test.send(0..100).await?;
        test.counts_are_equal("behind a restart of the operator").await?;

        // When: another test wants the route. Then: it says so and who has it.
        test.tests.apply("younger", &spec()).await?;
        let refused = Until::new("the younger test is refused", 30);
        let message = |test: &DynamicObject| {
            let accepted = condition(test, "Accepted")?;
            (accepted.reason == "RouteInUse").then_some(accepted.message)
        };
        let message = test.tests.until("younger", refused, message).await?;
        assert!(message.contains("the older test search"), "{message}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn counts_outlive_gateways_and_leaders() -> Result<()> {
    run("ab-counts", async |scenario| {
        // Given: a test whose counts are stored, and two operators.
        let mut test = Divided::begin(scenario, &spec()).await?;
        test.send(0..200).await?;
        release::scale(&scenario.cluster, OPERATOR, 2).await?;
        let outcome = gateways_and_the_leader_die(scenario, &mut test).await;
        // Also after a failure: the scenarios after this one expect one operator.
        release::scale(&scenario.cluster, OPERATOR, 1).await?;
        release::ready(&scenario.cluster, OPERATOR).await?;
        outcome
    })
    .await
}

async fn gateways_and_the_leader_die(scenario: &Scenario, test: &mut Divided) -> Result<()> {
    release::ready(&scenario.cluster, OPERATOR).await?;
    test.counts_are_equal("at first").await?;

    // When: every gateway dies, users come, and then the leader dies and they come again.
    let label = ListParams::default().labels("app.kubernetes.io/component=gateway");
    let gateways = release::pods(&scenario.cluster).list(&label).await?.items;
    assert!(!gateways.is_empty(), "no gateway pod");
    for pod in &gateways {
        process::kill_hard(process::container_pid(pod, "gateway")?).await?;
    }
    for pod in &gateways {
        restarted(scenario, pod).await?;
    }
    release::ready(&scenario.cluster, GATEWAY).await?;
    test.counted.add(vec![answers(&test.gateway, &test.route).await?]);
    test.send(0..100).await?;
    let leads = watcher::Config::default().labels("serving.trustformers.dev/leader=true");
    let first = |pods: &[&Pod]| pods.first().map(|pod| (*pod).clone());
    let leader = Until::new("an operator leads", 60);
    let leader = leader.watched(release::pods(&scenario.cluster), leads, first).await?;
    process::kill_hard(process::container_pid(&leader, "operator")?).await?;
    test.send(50..150).await?;

    // Then: nothing is lost or counted twice.
    test.counts_are_equal("behind the death of gateways and the leader").await
}

/// Waits until the pod's container has been started once more.
async fn restarted(scenario: &Scenario, pod: &Pod) -> Result<()> {
    let restarts = |pod: &Pod| {
        let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
        statuses.iter().map(|one| one.restart_count).max()
    };
    let (name, before) = (pod.metadata.name.clone().context("a pod without a name")?, restarts(pod));
    let is_back = |found: Option<&Pod>| (restarts(found?) > before).then_some(());
    let what = format!("the container of {name} is restarted");
    Until::new(&what, 45).object(release::pods(&scenario.cluster), &name, is_back).await
}
