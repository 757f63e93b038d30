//! An A/B test divides users between two models, and its counts are those of its callers to the last request,
//! also behind a restart of the operator.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use kube::{
    Api,
    api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams},
};
use serde_json::{Value, json};
use trustformers_e2e::{
    gateway::Gateway,
    model::{MINILM, condition, status_text},
    release::{self, OPERATOR},
    request::Failure,
    scenario::run,
    wait::Until,
};

/// Users of the first round.
const USERS: usize = 400;
/// A checkpoint comes every 30 s.
const CHECKPOINT_LIMIT_S: u64 = 90;

/// What callers counted.
#[derive(Default)]
struct Counted {
    requests: BTreeMap<String, i64>,
    users: BTreeMap<String, BTreeSet<String>>,
}

impl Counted {
    /// Each of these users sends one request.
    async fn send(&mut self, gateway: &Gateway, model: &str, users: std::ops::Range<usize>) -> Result<()> {
        for number in users {
            let user = format!("user-{number}");
            let variant = gateway.embed_as(&user, model, "a short text").await?;
            let variant = variant.context("the answer names no variant")?;
            *self.requests.entry(variant.clone()).or_default() += 1;
            self.users.entry(variant).or_default().insert(user);
        }
        Ok(())
    }

    /// Whether the status has the same.
    fn equals(&self, test: &DynamicObject) -> bool {
        let variants = test.data.pointer("/status/variants").and_then(Value::as_array);
        variants.is_some_and(|variants| {
            variants.iter().all(|one| {
                let name = one["name"].as_str().unwrap_or_default();
                one["requests"].as_i64() == self.requests.get(name).copied()
                    && one["users"].as_u64() == self.users.get(name).map(|users| users.len() as u64)
                    && one["errors"].as_i64() == Some(0)
            })
        })
    }
}

#[tokio::test]
async fn the_counts_of_a_test_are_those_of_its_callers() -> Result<()> {
    run("ab-test", async |scenario| {
        // Given: two models that serve, and a test that shares a route between them.
        let (models, gateway) = (scenario.models(), scenario.gateway().await?);
        for name in ["one", "two"] {
            models.apply(name, json!({"source": {"uri": MINILM}})).await?;
        }
        for name in ["one", "two"] {
            models.ready(name, 90).await?;
        }
        let full = models.full_name("search");
        let namespace = full.split('/').next().unwrap_or_default();
        let kind = GroupVersionKind::gvk("serving.trustformers.dev", "v1alpha1", "ABTest");
        let tests = Api::<DynamicObject>::namespaced_with(
            scenario.cluster.client.clone(),
            namespace,
            &ApiResource::from_gvk(&kind),
        );
        let spec = json!({
            "route": "search",
            "variants": [
                {"name": "control", "modelRef": {"name": "one"}, "weight": 90},
                {"name": "treatment", "modelRef": {"name": "two"}, "weight": 10},
            ],
            "goal": {"metric": "latencyP95Ms", "direction": "Lower"},
        });
        let object = json!({
            "apiVersion": "serving.trustformers.dev/v1alpha1", "kind": "ABTest",
            "metadata": {"name": "search"}, "spec": spec,
        });
        tests.patch("search", &PatchParams::apply("scenarios"), &Patch::Apply(object)).await?;

        // Then: the route answers, and users are divided.
        let mut counted = Counted::default();
        let answers = Until::new("the route of the test answers", 30);
        let first = answers
            .polled(|| async {
                match gateway.embed_as("user-0", &full, "a short text").await {
                    Ok(variant) => Ok(Some(variant.context("the answer names no variant")?)),
                    Err(Failure::Refused { status: 404 | 503, .. }) => Ok(None),
                    Err(failure) => Err(failure.into()),
                }
            })
            .await?;
        *counted.requests.entry(first.clone()).or_default() += 1;
        counted.users.entry(first).or_default().insert("user-0".to_owned());
        counted.send(&gateway, &full, 1..USERS).await?;
        counted.send(&gateway, &full, 0..USERS).await?;
        let of_treatment = counted.users["treatment"].len();
        // 40 expected; five standard deviations are 30.
        assert!((10..=70).contains(&of_treatment), "{of_treatment} of {USERS} users");
        let both = counted.users["treatment"].intersection(&counted.users["control"]).count();
        assert_eq!(both, 0, "a user got both variants");

        // And: the status has the callers' counts.
        let equal = Until::new("the status has the callers' counts", CHECKPOINT_LIMIT_S);
        let test = equal
            .object(tests.clone(), "search", |found| found.filter(|one| counted.equals(one)).cloned())
            .await?;
        assert_eq!(status_text(&test, "/phase"), "Running");
        assert_eq!(status_text(&test, "/srm"), "ok");

        // When: the operator is restarted, and users come again. Then: nothing is lost or counted twice.
        release::scale(&scenario.cluster, OPERATOR, 0).await?;
        release::scale(&scenario.cluster, OPERATOR, 1).await?;
        release::ready(&scenario.cluster, OPERATOR).await?;
        counted.send(&gateway, &full, 0..100).await?;
        let again = Until::new("the status has all counts again", CHECKPOINT_LIMIT_S);
        again
            .object(tests.clone(), "search", |found| found.filter(|one| counted.equals(one)).map(|_| ()))
            .await?;

        // When: another test wants the route. Then: it says so and who has it.
        let mut younger = json!({
            "apiVersion": "serving.trustformers.dev/v1alpha1", "kind": "ABTest",
            "metadata": {"name": "younger"},
        });
        younger["spec"] = test.data["spec"].clone();
        tests.patch("younger", &PatchParams::apply("scenarios"), &Patch::Apply(younger)).await?;
        let refused = Until::new("the younger test is refused", 30);
        let message = refused
            .object(tests, "younger", |found| {
                let accepted = condition(found?, "Accepted")?;
                (accepted.reason == "RouteInUse").then_some(accepted.message)
            })
            .await?;
        assert!(message.contains("the older test search"), "{message}");
        Ok(())
    })
    .await
}
