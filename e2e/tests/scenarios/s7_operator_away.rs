//! The control plane goes away, and requests to models are not affected.

use std::time::Instant;

use anyhow::Result;
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;
use trustformers_e2e::{
    gateway::Gateway,
    leader,
    load::Steady,
    model::SMOLLM2,
    process,
    release::{self, GATEWAY, OPERATOR},
    request::Request,
    scenario::{Scenario, run},
    wait::Until,
};

#[tokio::test]
async fn the_gateway_serves_without_the_operator() -> Result<()> {
    run("operator-away", async |scenario| {
        // Given: a model that serves.
        let (models, gateway) = (scenario.models(), scenario.gateway().await?);
        models
            .apply("steady", json!({"source": {"uri": SMOLLM2}, "runtime": {"contextTokens": 256}}))
            .await?;
        models.ready("steady", 60).await?;
        let request = Request::new(&models.full_name("steady"), "Hello", 2);
        let expected = gateway.http(&request).await?.tokens;

        // When: the operator is gone.
        release::scale(&scenario.cluster, OPERATOR, 0).await?;
        let outcome = without_the_operator(scenario, &gateway, &request, &expected).await;
        // The operator is started again, also after a failure above: the scenarios after this one need it.
        release::scale(&scenario.cluster, OPERATOR, 1).await?;
        release::ready(&scenario.cluster, OPERATOR).await?;
        outcome?;

        // Then: it answers when the operator is back, and follows its feed again: a deleted model is unknown.
        assert_eq!(gateway.http(&request).await?.tokens, expected);
        models.delete("steady").await?;
        unknown(&gateway, &request).await
    })
    .await
}

async fn without_the_operator(
    scenario: &Scenario,
    gateway: &Gateway,
    request: &Request,
    expected: &[u32],
) -> Result<()> {
    let none = |pods: &[&Pod]| pods.is_empty().then_some(());
    let gone = Until::new("no operator pod is left", 45);
    gone.watched(release::pods(&scenario.cluster), release::pods_of("operator"), none).await?;

    // Then: the gateway answers from its last table.
    assert_eq!(gateway.http(request).await?.tokens, expected);

    // And: after every gateway's process was killed, from their copies on disk.
    let label = kube::api::ListParams::default().labels("app.kubernetes.io/component=gateway");
    let pods = release::pods(&scenario.cluster).list(&label).await?.items;
    assert!(!pods.is_empty(), "no gateway pod");
    for pod in &pods {
        process::kill_hard(process::container_pid(pod, "gateway")?).await?;
    }
    for pod in &pods {
        restarted(scenario, pod).await?;
    }
    release::ready(&scenario.cluster, GATEWAY).await?;
    let back = Until::new("the restarted gateway answers", 15);
    let tokens = back.polled(|| async { Ok(Some(gateway.http(request).await?.tokens)) }).await?;
    assert_eq!(tokens, expected);
    Ok(())
}

#[tokio::test]
async fn a_second_operator_takes_over() -> Result<()> {
    run("take-over", async |scenario| {
        // Given: two operators, of which one leads, and a model that serves.
        let (models, gateway) = (scenario.models(), scenario.gateway().await?);
        models
            .apply("handed", json!({"source": {"uri": SMOLLM2}, "runtime": {"contextTokens": 256}}))
            .await?;
        models.ready("handed", 60).await?;
        let request = Request::new(&models.full_name("handed"), "Hello", 2);
        release::scale(&scenario.cluster, OPERATOR, 2).await?;
        let outcome = the_leader_dies(scenario, &gateway, &request).await;
        release::scale(&scenario.cluster, OPERATOR, 1).await?;
        release::ready(&scenario.cluster, OPERATOR).await?;
        outcome
    })
    .await
}

async fn the_leader_dies(scenario: &Scenario, gateway: &Gateway, request: &Request) -> Result<()> {
    release::ready(&scenario.cluster, OPERATOR).await?;

    // When: the leader is killed. Then: another one leads, and no request failed meanwhile.
    let steady = Steady::start(gateway, request.clone(), 3)?;
    let lost = Instant::now();
    let name = leader::kill(&scenario.cluster).await?;
    leader::other_than(&scenario.cluster, Some(&name)).await?;
    eprintln!("another operator leads {} ms after the loss", lost.elapsed().as_millis());
    let requests = steady.stop().await?;
    let failed: Vec<_> = requests.iter().filter_map(|it| it.as_ref().err()).collect();
    assert!(failed.is_empty(), "{} of {} requests failed: {failed:?}", failed.len(), requests.len());

    // And: the feed continues: a model that is deleted now is unknown soon after.
    scenario.models().delete("handed").await?;
    unknown(gateway, request).await
}

async fn unknown(gateway: &Gateway, request: &Request) -> Result<()> {
    let unknown = Until::new("the gateway answers 404 for the deleted model", 30);
    unknown
        .polled(|| async {
            let status = gateway.http(request).await.err().and_then(|failure| failure.status());
            Ok((status == Some(404)).then_some(()))
        })
        .await
}

async fn restarted(scenario: &Scenario, pod: &Pod) -> Result<()> {
    let restarts = |pod: &Pod| {
        let statuses = pod.status.as_ref().and_then(|it| it.container_statuses.as_ref());
        statuses.into_iter().flatten().map(|it| it.restart_count).sum::<i32>()
    };
    let before = restarts(pod);
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let again = |found: Option<&Pod>| (restarts(found?) > before).then_some(());
    Until::new("the container is started again", 60)
        .object(release::pods(&scenario.cluster), name, again)
        .await
}
