//! A mistake in a spec is refused at once, with a message that names it.

use anyhow::Result;
use serde_json::json;
use trustformers_e2e::{
    command::Output,
    model::{Models, SMOLLM2, condition},
    request::Request,
    scenario::{Scenario, run},
    wait::Until,
};

#[tokio::test]
async fn mistakes_are_refused_by_name() -> Result<()> {
    run("mistakes", async |scenario| {
        // A scheme that is not supported: the message lists those that are.
        let output = apply(scenario, "m", r#"{source: {uri: "ftp://org/name"}}"#).await?;
        assert!(
            !output.success && output.stderr.contains("oci://") && output.stderr.contains("pvc://"),
            "{output:?}"
        );

        // A name that would be too long for the Service made of it.
        let long = "a".repeat(46);
        let output = apply(scenario, &long, &format!("{{source: {{uri: \"{SMOLLM2}\"}}}}")).await?;
        assert!(!output.success && output.stderr.contains("45"), "{output:?}");

        // A field that does not exist, which kubectl's own validation finds in the published schema.
        let output = apply(scenario, "m", &format!("{{source: {{uri: \"{SMOLLM2}\", digest: x}}}}")).await?;
        assert!(!output.success && output.stderr.contains("digest"), "{output:?}");

        // A number out of its range, with the range.
        let output =
            apply(scenario, "m", &format!("{{source: {{uri: \"{SMOLLM2}\"}}, scaling: {{replicas: -1}}}}"))
                .await?;
        assert!(!output.success && output.stderr.contains("spec.scaling.replicas"), "{output:?}");
        for (setting, field) in [("maxWaitMs: 1001", "maxWaitMs"), ("strategy: best", "strategy")] {
            let spec = format!("{{source: {{uri: \"{SMOLLM2}\"}}, runtime: {{batching: {{{setting}}}}}}}");
            let output = apply(scenario, "m", &spec).await?;
            assert!(
                !output.success && output.stderr.contains(&format!("spec.runtime.batching.{field}")),
                "{output:?}"
            );
        }

        // Traffic settings that contradict each other, with the way out.
        for (traffic, expected) in [
            ("timeout: 5s, attemptTimeout: 6s", "make it shorter"),
            ("hashOn: {header: x-user-id}", "ConsistentHash"),
            ("circuitBreaker: {consecutiveFailures: 0}", "set consecutiveFailures or failurePercent"),
            ("healthCheck: {interval: 1s, timeout: 2s}", "spec.traffic.healthCheck"),
            ("hedge: {delay: 90s}", "make it shorter"),
            ("hedge: {}", "set spec.task to embed"),
            ("shadow: {modelRef: {name: next}, percent: 0}", "spec.traffic.shadow.percent"),
            ("loadBalancing: Best", "spec.traffic.loadBalancing"),
        ] {
            let spec = format!("{{source: {{uri: \"{SMOLLM2}\"}}, traffic: {{{traffic}}}}}");
            let output = apply(scenario, "m", &spec).await?;
            assert!(!output.success && output.stderr.contains(expected), "{traffic}: {output:?}");
        }

        // Adapters of a model that generates no text, of an unknown scheme, and two of one name.
        let adapter = |uri: &str| format!("{{name: a, source: {{uri: \"{uri}\"}}}}");
        let (good, wrong) = (adapter("oci://x/y:z"), adapter("ftp://x/y"));
        for (task, adapters, expected) in [
            ("task: embed, ", good.clone(), "adapters are for models that generate text"),
            ("", wrong, "source.uri is none of oci://IMAGE"),
            ("", format!("{good}, {good}"), "Duplicate value"),
        ] {
            let spec =
                format!("{{{task}source: {{uri: \"{SMOLLM2}\"}}, runtime: {{adapters: [{adapters}]}}}}");
            let output = apply(scenario, "m", &spec).await?;
            assert!(!output.success && output.stderr.contains(expected), "{adapters}: {output:?}");
        }

        // Labels and annotations by which Services select pods of the release.
        for (field, key) in [
            ("labels", "app.kubernetes.io/component"),
            ("labels", "serving.trustformers.dev/leader"),
            ("annotations", "serving.trustformers.dev/pool"),
        ] {
            let spec = format!("{{source: {{uri: \"{SMOLLM2}\"}}, pod: {{{field}: {{{key}: gateway}}}}}}");
            let output = apply(scenario, "m", &spec).await?;
            let expected = format!("spec.pod.{field}: keys that start with app.kubernetes.io/");
            assert!(!output.success && output.stderr.contains(&expected), "{output:?}");
        }
        Ok(())
    })
    .await
}

#[tokio::test]
async fn the_older_of_two_models_keeps_the_bare_name() -> Result<()> {
    run("bare-name", async |scenario| {
        // Given: a model that serves under its bare name.
        let (older, gateway) = (scenario.models(), scenario.gateway().await?);
        older.apply("twin", json!({"source": {"uri": SMOLLM2}, "runtime": {"contextTokens": 256}})).await?;
        let ready = older.ready("twin", 60).await?;
        assert_eq!(condition(&ready, "BareName"), None);

        // When: a model of the same name appears in another namespace, some seconds younger.
        let namespace = scenario.new_namespace("bare-name-b").await?;
        let younger = Models::new(&scenario.cluster, &namespace);
        younger.apply("twin", json!({"source": {"uri": SMOLLM2}, "scaling": {"replicas": 0}})).await?;

        // Then: a condition of the younger names the model that has the name.
        let limit = Until::new("the younger twin reports that its bare name is used", 15);
        let refused = |model: &_| condition(model, "BareName").filter(|it| it.status == "False");
        let condition = younger.until("twin", limit, refused).await?;
        assert!(condition.message.contains(&older.full_name("twin")), "{condition:?}");

        // And: the bare name still answers, from the older one.
        gateway.http(&Request::new("twin", "Hello", 2)).await?;
        Ok(())
    })
    .await
}

async fn apply(scenario: &Scenario, name: &str, spec: &str) -> Result<Output> {
    let object = format!(
        "apiVersion: serving.trustformers.dev/v1alpha1\nkind: InferenceModel\nmetadata: {{name: {name}}}\nspec: {spec}\n"
    );
    scenario
        .cluster
        .kubectl(&["--namespace", &scenario.namespace, "apply", "--filename=-"])
        .input(object)
        .output()
        .await
}
