//! Four lines of YAML become real tokens, by every protocol, and it is measured how soon.

use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::json;
use trustformers_e2e::{
    ask::Ask,
    model::{SMOLLM2, status_text},
    reference,
    registry::Registry,
    story::{Story, tell},
};

/// From the model's arrival in the cluster to ready: loading takes a second or two, the rest is patience.
const READY_LIMIT_S: u64 = 60;

#[tokio::test]
async fn four_lines_answer_by_every_protocol() -> Result<()> {
    tell("four-lines", async |story| {
        // Given: the four-line example, applied as a person would.
        let models = story.models();
        models.apply_file(&story.cluster, "examples/smollm2.yaml").await?;

        // When: it is ready.
        let model = models.ready("smollm2", READY_LIMIT_S).await?;

        // Then: `kubectl get imodel` says so, where it runs, what serves, and where to ask.
        let gateway = story.gateway().await?;
        let table = story
            .cluster
            .kubectl(&["--namespace", &story.namespace, "get", "imodel", "smollm2"])
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

        // And: the very first request after that is answered, by HTTP, SSE and gRPC alike, with the same tokens.
        let ask = Ask::new(&models.full_name("smollm2"), "The capital of France is", 16);
        let http = gateway.http(&ask).await?;
        let sse = gateway.sse(&ask, |_| ()).await?;
        let grpc = gateway.grpc(&ask).await?;
        let stream = gateway.grpc_stream(&ask, |_| ()).await?;
        assert_eq!(http.tokens.len(), 16, "{http:?}");
        assert!(http.text.contains("Paris"), "{http:?}");
        for (other, protocol) in [(&sse, "SSE"), (&grpc, "gRPC"), (&stream, "gRPC stream")] {
            assert_eq!(
                (&other.tokens, &other.text, &other.finish_reason),
                (&http.tokens, &http.text, &http.finish_reason),
                "HTTP and {protocol} differ"
            );
        }

        // And: callers may use the bare name.
        let bare = gateway.http(&Ask { model: "smollm2".to_owned(), ..ask }).await?;
        assert_eq!(bare.tokens, http.tokens);
        Ok(())
    })
    .await
}

#[tokio::test]
async fn exact_tokens_are_the_reference_s() -> Result<()> {
    tell("reference", async |story| {
        // Given: a prompt at which an independent implementation never hesitates between two tokens.
        let case = reference::clearest(&story.cluster.settings, 32)?;
        let models = story.models();

        // When: a model with exact numerics answers it.
        models.apply("exact", json!({"source": {"uri": SMOLLM2}, "runtime": {"numerics": "exact"}})).await?;
        models.ready("exact", READY_LIMIT_S).await?;
        let gateway = story.gateway().await?;
        let ask = Ask::new(&models.full_name("exact"), &case.prompt, 32);

        // Then: token for token it is what the reference says, by HTTP, SSE and gRPC.
        assert_eq!(gateway.http(&ask).await?.tokens, case.greedy[..32]);
        assert_eq!(gateway.sse(&ask, |_| ()).await?.tokens, case.greedy[..32]);
        assert_eq!(gateway.grpc(&ask).await?.tokens, case.greedy[..32]);
        assert_eq!(gateway.grpc_stream(&ask, |_| ()).await?.tokens, case.greedy[..32]);
        Ok(())
    })
    .await
}

#[tokio::test]
async fn the_first_token_comes_soon() -> Result<()> {
    tell("first-token", async |story| {
        // Given: an image that the nodes hold, and one that no node has ever seen, to be pulled from a registry.
        let nodes: Vec<String> = story.cluster.nodes().await?.into_iter().map(|(name, _)| name).collect();
        let registry = Registry::open(&nodes).await?;
        let weights = story.cluster.settings.cache.join("models/SmolLM2-135M-Instruct.Q4_1.gguf");
        let unseen = registry.publish("smollm2", &weights).await?;

        // When: each is applied, and asked the moment it says that it is ready.
        let cached_ms = first_token_ms(story, "cached", SMOLLM2).await?;
        story.models().delete("cached").await?;
        let uncached_ms = first_token_ms(story, "uncached", &unseen).await?;

        // Then: the time from apply to the first token is there for the report.
        let report = story.cluster.settings.report();
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

async fn first_token_ms(story: &Story, name: &str, uri: &str) -> Result<u64> {
    let (models, gateway) = (story.models(), story.gateway().await?);
    let ask = Ask::new(&models.full_name(name), "Once upon a time", 2);
    let applied = Instant::now();
    models.apply(name, json!({"source": {"uri": uri}})).await?;
    models.ready(name, READY_LIMIT_S).await?;
    let asked = Instant::now();
    let answer = gateway.sse(&ask, |_| ()).await?;
    Ok(u64::try_from((asked - applied + answer.first_token).as_millis())?)
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
