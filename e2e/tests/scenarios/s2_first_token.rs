//! Four lines of YAML become real tokens, by every protocol, and the time to the first of them is measured.

use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::json;
use trustformers_e2e::{
    model::{SMOLLM2, status_text},
    reference,
    registry::Registry,
    request::Request,
    scenario::{Scenario, run},
};

/// From the model's arrival in the cluster to ready: loading takes a second or two; the rest is a margin.
const READY_LIMIT_S: u64 = 60;

#[tokio::test]
async fn four_lines_answer_by_every_protocol() -> Result<()> {
    run("four-lines", async |scenario| {
        // Given: the four-line example, applied as a user would.
        let models = scenario.models();
        models.apply_file(&scenario.cluster, "examples/smollm2.yaml").await?;

        // When: it is ready.
        let model = models.ready("smollm2", READY_LIMIT_S).await?;

        // Then: `kubectl get imodel` shows it, where it runs, what serves, and the address.
        let gateway = scenario.gateway().await?;
        let table = scenario
            .cluster
            .kubectl(&["--namespace", &scenario.namespace, "get", "imodel", "smollm2"])
            .stdout()
            .await?;
        let row = row(&table)?;
        assert_eq!(row["READY"], "True", "{table}");
        assert_eq!(row["DEVICE"], "cpu", "{table}");
        assert_eq!(row["REVISION"], status_text(&model, "/stable/revision"), "{table}");
        assert_eq!(row["PHASE"], "Ready", "{table}");
        assert!(row["REVISION"].len() >= 8, "{table}");
        assert!(row["URL"].starts_with("http://trustformers-gateway.trustformers-system"), "{table}");
        assert_eq!(status_text(&model, "/digest").len(), 64, "no digest of the loaded file");

        // And: the very first request after that is answered, by HTTP, SSE and gRPC alike, with the same
        // tokens.
        let request = Request::new(&models.full_name("smollm2"), "The capital of France is", 16);
        let http = gateway.http(&request).await?;
        let sse = gateway.sse(&request, |_| ()).await?;
        let grpc = gateway.grpc(&request).await?;
        let stream = gateway.grpc_stream(&request, |_| ()).await?;
        assert_eq!(http.tokens.len(), 16, "{http:?}");
        assert!(http.text.contains("Paris"), "{http:?}");
        for (other, protocol) in [(&sse, "SSE"), (&grpc, "gRPC"), (&stream, "gRPC stream")] {
            assert_eq!(
                (&other.tokens, &other.text, &other.finish_reason),
                (&http.tokens, &http.text, &http.finish_reason),
                "HTTP and {protocol} differ"
            );
        }

        // And: clients may use the bare name.
        let bare = gateway.http(&Request { model: "smollm2".to_owned(), ..request }).await?;
        assert_eq!(bare.tokens, http.tokens);
        Ok(())
    })
    .await
}

#[tokio::test]
async fn exact_numerics_give_the_tokens_of_the_reference() -> Result<()> {
    run("reference", async |scenario| {
        // Given: a prompt at which the two best tokens of an independent implementation are never close.
        let case = reference::clearest(&scenario.cluster.settings, 32)?;
        let models = scenario.models();

        // When: a model with exact numerics answers it.
        models.apply("exact", json!({"source": {"uri": SMOLLM2}, "runtime": {"numerics": "exact"}})).await?;
        models.ready("exact", READY_LIMIT_S).await?;
        let gateway = scenario.gateway().await?;
        let request = Request::new(&models.full_name("exact"), &case.prompt, 32);

        // Then: its tokens are those of the reference, by HTTP, SSE and gRPC.
        assert_eq!(gateway.http(&request).await?.tokens, case.greedy[..32]);
        assert_eq!(gateway.sse(&request, |_| ()).await?.tokens, case.greedy[..32]);
        assert_eq!(gateway.grpc(&request).await?.tokens, case.greedy[..32]);
        assert_eq!(gateway.grpc_stream(&request, |_| ()).await?.tokens, case.greedy[..32]);
        Ok(())
    })
    .await
}

#[tokio::test]
async fn the_time_to_the_first_token_is_reported() -> Result<()> {
    run("first-token", async |scenario| {
        // Given: an image that the nodes hold, and one that a node must pull from a registry.
        let nodes: Vec<String> = scenario.cluster.nodes().await?.into_iter().map(|(name, _)| name).collect();
        let registry = Registry::open(&nodes).await?;
        let weights = scenario.cluster.settings.cache.join("models/SmolLM2-135M-Instruct.Q4_1.gguf");
        let unseen = registry.publish("smollm2", &weights).await?;

        // When: each is applied, and receives a request as soon as it is ready.
        let cached_ms = first_token_ms(scenario, "cached", SMOLLM2).await?;
        scenario.models().delete("cached").await?;
        let uncached_ms = first_token_ms(scenario, "uncached", &unseen).await?;

        // Then: the time from apply to the first token is there for the report.
        let report = scenario.cluster.settings.report();
        std::fs::create_dir_all(&report)?;
        let figures = json!({"cached_ms": cached_ms, "uncached_ms": uncached_ms});
        std::fs::write(report.join("first_token.json"), format!("{figures}\n"))?;
        eprintln!(
            "apply to first token: {cached_ms} ms with the image on the node, {uncached_ms} ms with a pull"
        );
        Ok(())
    })
    .await
}

async fn first_token_ms(scenario: &Scenario, name: &str, uri: &str) -> Result<u64> {
    let (models, gateway) = (scenario.models(), scenario.gateway().await?);
    let request = Request::new(&models.full_name(name), "Once upon a time", 2);
    let applied = Instant::now();
    models.apply(name, json!({"source": {"uri": uri}})).await?;
    models.ready(name, READY_LIMIT_S).await?;
    let sent = Instant::now();
    let answer = gateway.sse(&request, |_| ()).await?;
    Ok(u64::try_from((sent - applied + answer.first_token).as_millis())?)
}

/// The one row of a table of kubectl, by column. No value has a space in it.
fn row(table: &str) -> Result<std::collections::HashMap<&str, &str>> {
    let mut lines = table.lines();
    let columns = lines.next().context("an empty table")?;
    let values = lines.next().with_context(|| format!("a table without a row: {columns}"))?;
    let (columns, values): (Vec<_>, Vec<_>) =
        (columns.split_whitespace().collect(), values.split_whitespace().collect());
    anyhow::ensure!(columns.len() == values.len(), "a column is empty:\n{table}");
    for column in ["NAME", "READY", "DEVICE", "REVISION", "PHASE", "URL"] {
        anyhow::ensure!(columns.contains(&column), "no column {column}:\n{table}");
    }
    Ok(columns.into_iter().zip(values).collect())
}
