//! An adapter in an image, named in a model's spec, answers through the gateway under its own names, beside
//! the model itself; without it in the spec its names are gone and the model goes on.

use anyhow::{Context, Result};
use serde_json::{Value, json};
use trustformers_e2e::{
    gateway::Gateway,
    model::{ADAPTER, SMOLLM2},
    request::Request,
    scenario::run,
};

/// From apply to ready: the images are on the nodes, and loading takes a second or two.
const READY_LIMIT_S: u64 = 60;
const PROMPT: &str = "The capital of France is";

#[tokio::test]
async fn an_adapter_answers_under_its_own_names_beside_its_model() -> Result<()> {
    run("adapters", async |scenario| {
        // Given: a model with an adapter.
        let models = scenario.models();
        let spec = |adapters: Value| {
            json!({"source": {"uri": SMOLLM2}, "runtime": {"numerics": "exact", "adapters": adapters}})
        };
        models.apply("chat", spec(json!([{"name": "tone", "source": {"uri": ADAPTER}}]))).await?;

        // When: it is ready.
        models.ready("chat", READY_LIMIT_S).await?;

        // Then: the adapter answers to its full name and to its own, as clients of other servers write it, by
        // HTTP and gRPC alike, and it changes the answer.
        let gateway = scenario.gateway().await?;
        let full = models.full_name("chat");
        let of_adapter = format!("{full}:tone");
        let plain = gateway.http(&Request::new(&full, PROMPT, 16)).await?;
        let adapted = gateway.http(&Request::new(&of_adapter, PROMPT, 16)).await?;
        assert_ne!(adapted.tokens, plain.tokens, "the adapter changes nothing");
        let own = gateway.http(&Request::new("tone", PROMPT, 16)).await?;
        let over_grpc = gateway.grpc(&Request::new(&of_adapter, PROMPT, 16)).await?;
        assert_eq!((&own.tokens, &over_grpc.tokens), (&adapted.tokens, &adapted.tokens));

        // And: the list has it as a model with a parent.
        let listed = listed(&gateway, &of_adapter).await?.context("the adapter is not listed")?;
        assert_eq!(listed["parent"], json!(full), "{listed}");

        // When: the spec has it no more, and that is rolled out.
        models.apply("chat", spec(json!([]))).await?;
        models.ready("chat", READY_LIMIT_S).await?;

        // Then: its names are unknown, and the model answers as before.
        let gone = gateway.http(&Request::new(&of_adapter, PROMPT, 16)).await.unwrap_err();
        assert_eq!(gone.status(), Some(404), "{gone}");
        assert_eq!(gateway.http(&Request::new(&full, PROMPT, 16)).await?.tokens, plain.tokens);
        Ok(())
    })
    .await
}

/// The entry of a name in the gateway's list of models.
async fn listed(gateway: &Gateway, name: &str) -> Result<Option<Value>> {
    let (status, body) = gateway.get("/v1/models").await?;
    assert_eq!(status, 200, "{body}");
    let list: Value = serde_json::from_str(&body)?;
    let entries = list["data"].as_array().context("the list has no data")?;
    Ok(entries.iter().find(|one| one["id"] == name).cloned())
}
