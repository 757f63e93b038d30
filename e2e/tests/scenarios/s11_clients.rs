//! Clients of other projects, unchanged from their packages, against a pod and through the gateway: the same
//! programs that `make test-clients` runs against one process.

use std::time::Duration;

use anyhow::{Context, Result};
use kube::{ResourceExt, api::ListParams};
use serde_json::json;
use trustformers_e2e::{
    command::Invocation,
    forward::Forward,
    model::{MINILM, QWEN},
    scenario::{Scenario, run},
};

/// From apply to ready: the image is on the node, and 400 MB are read twice and repacked.
const READY_LIMIT_S: u64 = 90;

/// The ports of a pod.
const POD_PORTS: [u16; 2] = [8080, 9090];

/// Clients that speak every protocol once: OpenAI's, gRPC, a WebSocket and plain HTTP.
const THROUGH_THE_GATEWAY: &str = "openai-python,grpcio,websocket,curl";

/// What a pod answers itself, without the gateway's own answers.
const OF_A_POD: &str = "curl,grpcio,grpc-web";

/// Where a server listens and which of its models are asked.
struct ClientsRun<'a> {
    base_url: &'a str,
    grpc_address: &'a str,
    model: &'a str,
    embed_model: &'a str,
    clients: &'a str,
}

#[tokio::test]
async fn clients_of_other_projects_work_against_a_pod() -> Result<()> {
    run("pod-clients", async |scenario| {
        // Given: a model that calls functions.
        let models = scenario.models();
        models.apply("qwen", json!({"source": {"uri": QWEN}})).await?;
        models.ready("qwen", READY_LIMIT_S).await?;
        let pods = scenario.pods().list(&ListParams::default()).await?;
        let pod = pods.items.first().context("no pod of qwen")?.name_any();

        // When: the clients ask its pod at the pod's own ports. Then: every check passes.
        let forward = Forward::open(&scenario.cluster, &scenario.namespace, &pod, &POD_PORTS).await?;
        let [http, grpc] = forward.addresses.as_slice() else { anyhow::bail!("two ports are forwarded") };
        let of_pod = ClientsRun {
            base_url: &format!("http://{http}"),
            grpc_address: grpc,
            model: &models.full_name("qwen"),
            embed_model: "none",
            clients: OF_A_POD,
        };
        clients_pass(scenario, of_pod).await
    })
    .await
}

#[tokio::test]
async fn clients_of_other_projects_work_through_the_gateway() -> Result<()> {
    run("gateway-clients", async |scenario| {
        // Given: a model that calls functions and one that embeds.
        let models = scenario.models();
        models.apply("qwen", json!({"source": {"uri": QWEN}})).await?;
        models.apply("minilm", json!({"task": "embed", "source": {"uri": MINILM}})).await?;
        models.ready("qwen", READY_LIMIT_S).await?;
        models.ready("minilm", READY_LIMIT_S).await?;

        // When: the clients ask both through the gateway. Then: every check passes.
        let gateway = scenario.gateway().await?;
        let by_gateway = ClientsRun {
            base_url: gateway.url(),
            grpc_address: gateway.grpc_address(),
            model: &models.full_name("qwen"),
            embed_model: &models.full_name("minilm"),
            clients: THROUGH_THE_GATEWAY,
        };
        clients_pass(scenario, by_gateway).await
    })
    .await
}

/// Runs the clients; an error holds all that they printed.
async fn clients_pass(scenario: &Scenario, asked: ClientsRun<'_>) -> Result<()> {
    let ClientsRun { base_url, grpc_address, model, embed_model, clients } = asked;
    let program = scenario.cluster.settings.repository.join("e2e/clients/run.sh");
    let arguments =
        [base_url, grpc_address, "--model", model, "--embed-model", embed_model, "--only", clients];
    let printed = Invocation::new(&program, arguments).limit(Duration::from_secs(120)).stdout().await?;
    let summary = printed.lines().last().unwrap_or_default();
    eprintln!("{base_url}: {summary}");
    anyhow::ensure!(summary.contains(" 0 failed"), "{printed}");
    Ok(())
}
