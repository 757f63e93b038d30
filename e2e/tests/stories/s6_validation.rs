//! A mistake in a spec is told at once, in words that help.

use anyhow::Result;
use serde_json::json;
use trustformers_e2e::{
    ask::Ask,
    command::Said,
    model::{Models, SMOLLM2, condition},
    story::{Story, tell},
    wait::Until,
};

#[tokio::test]
async fn mistakes_are_refused_by_name() -> Result<()> {
    tell("mistakes", async |story| {
        // A scheme that is not supported: the message lists those that are.
        let said = apply(story, "m", r#"{source: {uri: "hf://org/name"}}"#).await?;
        assert!(
            !said.success && said.stderr.contains("oci://") && said.stderr.contains("pvc://"),
            "{said:?}"
        );

        // A name that would be too long for the Service made of it.
        let long = "a".repeat(46);
        let said = apply(story, &long, &format!("{{source: {{uri: \"{SMOLLM2}\"}}}}")).await?;
        assert!(!said.success && said.stderr.contains("45"), "{said:?}");

        // A field that does not exist, which kubectl's own validation finds in the published schema.
        let said = apply(story, "m", &format!("{{source: {{uri: \"{SMOLLM2}\", digest: x}}}}")).await?;
        assert!(!said.success && said.stderr.contains("digest"), "{said:?}");

        // A number out of its range, with the range.
        let said =
            apply(story, "m", &format!("{{source: {{uri: \"{SMOLLM2}\"}}, scaling: {{replicas: -1}}}}"))
                .await?;
        assert!(!said.success && said.stderr.contains("spec.scaling.replicas"), "{said:?}");
        for (setting, field) in [("maxWaitMs: 1001", "maxWaitMs"), ("strategy: best", "strategy")] {
            let spec = format!("{{source: {{uri: \"{SMOLLM2}\"}}, runtime: {{batching: {{{setting}}}}}}}");
            let said = apply(story, "m", &spec).await?;
            assert!(
                !said.success && said.stderr.contains(&format!("spec.runtime.batching.{field}")),
                "{said:?}"
            );
        }
        Ok(())
    })
    .await
}

#[tokio::test]
async fn the_older_of_two_keeps_the_bare_name() -> Result<()> {
    tell("bare-name", async |story| {
        // Given: a model that serves under its bare name.
        let (older, gateway) = (story.models(), story.gateway().await?);
        older.apply("twin", json!({"source": {"uri": SMOLLM2}, "runtime": {"contextTokens": 256}})).await?;
        let ready = older.ready("twin", 60).await?;
        assert_eq!(condition(&ready, "BareName"), None);

        // When: a model of the same name appears in another namespace, some seconds younger.
        let namespace = story.new_namespace("bare-name-b").await?;
        let younger = Models::new(&story.cluster, &namespace);
        younger.apply("twin", json!({"source": {"uri": SMOLLM2}, "scaling": {"replicas": 0}})).await?;

        // Then: the younger says in a condition who has the name.
        let told = Until::new("the younger twin says that its bare name is taken", 15);
        let taken = |model: &_| condition(model, "BareName").filter(|it| it.status == "False");
        let condition = younger.until("twin", told, taken).await?;
        assert!(condition.message.contains(&older.full_name("twin")), "{condition:?}");

        // And: the bare name still answers, from the older one.
        gateway.http(&Ask::new("twin", "Hello", 2)).await?;
        Ok(())
    })
    .await
}

async fn apply(story: &Story, name: &str, spec: &str) -> Result<Said> {
    let object = format!(
        "apiVersion: serving.trustformers.dev/v1alpha1\nkind: InferenceModel\nmetadata: {{name: {name}}}\nspec: {spec}\n"
    );
    story
        .cluster
        .kubectl(&["--namespace", &story.namespace, "apply", "--filename=-"])
        .input(object)
        .output()
        .await
}
