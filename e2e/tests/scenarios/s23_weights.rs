//! Models that share requests: one is the shadow of another, and then two share a route.
//!
//! The weights of a route change while requests go on: in force within a second, and no user moves who need
//! not.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use kube::{
    Api,
    api::{ApiResource, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use trustformers_e2e::{
    gateway::Gateway,
    metrics,
    model::MINILM,
    release,
    request::Failure,
    scenario::{Scenario, run},
    wait::Until,
};

/// Users whose variant is compared before and after a change.
const USERS: usize = 150;

/// From the answer of the API server to the first request by the new weights.
const IN_FORCE: Duration = Duration::from_secs(1);

/// Requests of other users, one after the other, until it is stopped.
struct Load {
    stop: Arc<AtomicBool>,
    task: JoinHandle<Vec<Failure>>,
}

impl Load {
    /// The most requests: the limit of a scenario at 100 a second.
    const MOST: usize = 15_000;

    fn start(gateway: &Gateway, route: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (gateway, route, stopped) = (gateway.clone(), route.to_owned(), Arc::clone(&stop));
        let task = tokio::spawn(async move {
            let mut failures = Vec::new();
            for number in 0..Self::MOST {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                let user = format!("other-{number}");
                failures.extend(gateway.embed_as(&user, &route, "a short text").await.err());
            }
            failures
        });
        Self { stop, task }
    }

    async fn stop(self) -> Result<Vec<Failure>> {
        self.stop.store(true, Ordering::Relaxed);
        Ok(self.task.await?)
    }
}

fn spec(control: u32, treatment: u32) -> Value {
    json!({
        "route": "search",
        "variants": [
            {"name": "control", "modelRef": {"name": "one"}, "weight": control},
            {"name": "treatment", "modelRef": {"name": "two"}, "weight": treatment},
        ],
        "goal": {"metric": "latencyP95Ms", "direction": "Lower"},
    })
}

async fn variant_of(gateway: &Gateway, route: &str, user: &str) -> Result<String> {
    let variant = gateway.embed_as(user, route, "a short text").await?;
    variant.context("the answer names no variant")
}

async fn users_of_treatment(gateway: &Gateway, route: &str) -> Result<BTreeSet<usize>> {
    let mut users = BTreeSet::new();
    for user in 0..USERS {
        if variant_of(gateway, route, &format!("user-{user}")).await? == "treatment" {
            users.insert(user);
        }
    }
    Ok(users)
}

#[tokio::test]
async fn a_change_of_weights_is_in_force_within_a_second() -> Result<()> {
    run("weights", async |scenario| {
        // Given: a route that two models share, 90 to 10, and requests on it.
        let (models, gateway) = (scenario.models(), scenario.gateway().await?);
        for name in ["one", "two"] {
            models.apply(name, json!({"source": {"uri": MINILM}})).await?;
        }
        for name in ["one", "two"] {
            models.ready(name, 90).await?;
        }
        a_shadow_answers_as_well(scenario, &gateway).await?;
        let route = models.full_name("search");
        let kind = GroupVersionKind::gvk("serving.trustformers.dev", "v1alpha1", "ABTest");
        let (client, resource) = (scenario.cluster.client.clone(), ApiResource::from_gvk(&kind));
        let tests = Api::<DynamicObject>::namespaced_with(client, &scenario.namespace, &resource);
        apply(&tests, spec(90, 10)).await?;
        let answers = Until::new("the route answers", 30);
        answers.polled(|| async { Ok(variant_of(&gateway, &route, "user-0").await.ok()) }).await?;
        let load = Load::start(&gateway, &route);
        let mut treated = users_of_treatment(&gateway, &route).await?;
        ensure!(!treated.is_empty() && treated.len() < USERS / 2, "{} of {USERS} users", treated.len());

        for (control, treatment) in [(50, 50), (0, 100)] {
            // When: the weights change. Then: within a second every gateway has them.
            apply(&tests, spec(control, treatment)).await?;
            let took = in_force(&gateway, &route, &treated, treatment).await?;
            eprintln!("{control}/{treatment} is in force {} ms after apply", took.as_millis());
            assert!(took < IN_FORCE, "{control}/{treatment} was in force after {took:?}");
            // And: nobody who had the treatment has lost it.
            let after = users_of_treatment(&gateway, &route).await?;
            let lost: Vec<_> = treated.difference(&after).collect();
            assert!(lost.is_empty(), "users {lost:?} lost the treatment at {control}/{treatment}");
            assert!(after.len() > treated.len(), "no user moved at {control}/{treatment}");
            treated = after;
        }
        assert_eq!(treated.len(), USERS);
        let failures = load.stop().await?;
        assert!(failures.is_empty(), "{} requests failed: {:?}", failures.len(), failures.first());
        Ok(())
    })
    .await
}

/// Model `two` is the shadow of `one`. Then: it answers requests of `one` too, and the answers are compared.
async fn a_shadow_answers_as_well(scenario: &Scenario, gateway: &Gateway) -> Result<()> {
    let models = scenario.models();
    let shadow = json!({"modelRef": {"name": "two"}, "percent": 100});
    models.change("one", json!({"traffic": {"shadow": shadow}})).await?;
    let (asked, other) = (models.full_name("one"), models.full_name("two"));
    let counted = Until::new("five requests were answered by the shadow too", 20);
    counted
        .polled(|| async {
            gateway.embeddings(Some(&asked), &["a short text"]).await?;
            Ok((mirrored(scenario, &asked, &other).await? >= 5.0).then_some(()))
        })
        .await?;
    models.change("one", json!({"traffic": {"shadow": null}})).await
}

/// Requests that were answered by another model too, by the counts of all gateways.
async fn mirrored(scenario: &Scenario, asked: &str, other: &str) -> Result<f64> {
    let label = ListParams::default().labels("app.kubernetes.io/component=gateway");
    let mut sum = 0.0;
    for pod in release::pods(&scenario.cluster).list(&label).await? {
        let name = pod.metadata.name.context("a pod without a name")?;
        let scrape = scenario.cluster.pod_get(release::NAMESPACE, &name, "/metrics").await?;
        let samples = metrics::parse(&scrape).into_iter().filter(|sample| {
            let answered = ["same", "different"].map(|result| format!("result=\"{result}\""));
            sample.name == "trustformers_gateway_shadow_total"
                && sample.labels.contains(&format!("route=\"{asked}\""))
                && sample.labels.contains(&format!("revision=\"{other}\""))
                && answered.iter().any(|result| sample.labels.contains(result))
        });
        sum += samples.map(|sample| sample.value).sum::<f64>();
    }
    Ok(sum)
}

async fn apply(tests: &Api<DynamicObject>, spec: Value) -> Result<()> {
    let object = json!({
        "apiVersion": "serving.trustformers.dev/v1alpha1", "kind": "ABTest",
        "metadata": {"name": "search"}, "spec": spec,
    });
    tests.patch("search", &PatchParams::apply("scenarios"), &Patch::Apply(object)).await?;
    Ok(())
}

/// The time until users that did not have the treatment get it. At 0/100 every gateway must have the weights:
/// a run of 20 answers, which alternate between the nodes, has no other variant.
async fn in_force(
    gateway: &Gateway,
    route: &str,
    treated: &BTreeSet<usize>,
    treatment: u32,
) -> Result<Duration> {
    let started = Instant::now();
    let mut first = None;
    let mut in_a_row = 0;
    let candidates = (0..USERS).filter(|user| !treated.contains(user)).cycle();
    for user in candidates.take(100 * USERS) {
        let moved = variant_of(gateway, route, &format!("user-{user}")).await? == "treatment";
        let asked_at = started.elapsed();
        if moved {
            first.get_or_insert(asked_at);
            in_a_row += 1;
        } else if treatment == 100 {
            (first, in_a_row) = (None, 0);
        }
        if let Some(first) = first
            && in_a_row == 20
        {
            return Ok(first);
        }
    }
    anyhow::bail!("the weights are not in force after {:?}", started.elapsed())
}
