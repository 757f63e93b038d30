//! `kubectl trustformers` as a person uses it: a change is taken back in the middle, two changes come at
//! once, and the last one is promoted, undone and looked at.

use anyhow::{Context, Result, ensure};
use kube::api::DynamicObject;
use serde_json::{Value, json};
use trustformers_e2e::{
    command::Output,
    load::Steady,
    model::{Models, SMOLLM2, is_ready, status_text},
    plugin::plugin,
    request::Request,
    scenario::{Scenario, run},
    wait::Until,
};

#[tokio::test]
async fn a_person_follows_and_decides_rollouts_with_the_plugin() -> Result<()> {
    run("plugin", async |scenario| {
        // Given: a model that serves, whose rollouts stop at half of the requests, and clients.
        let (models, gateway) = (scenario.models(), scenario.gateway().await?);
        let spec = json!({
            "source": {"uri": SMOLLM2}, "runtime": {"contextTokens": 512},
            "rollout": {"steps": [{"weight": 50, "hold": "30m"}], "bake": "30m"},
        });
        models.apply("chat", spec).await?;
        let first = stable(&models.ready("chat", 60).await?);
        let steady = Steady::start(&gateway, Request::new(&models.full_name("chat"), "Hello", 2), 3)?;

        // When: a change is taken back while it has half of the requests. Then: the first revision stays.
        models.change("chat", json!({"runtime": {"contextTokens": 256}})).await?;
        shifting(&models).await?;
        models.change("chat", json!({"runtime": {"contextTokens": 512}})).await?;
        let back = Until::new("the first revision has all requests again", 60);
        let alone = |model: &DynamicObject| {
            (is_ready(model) && model.data.pointer("/status/candidate").is_none()).then(|| stable(model))
        };
        assert_eq!(models.until("chat", back, alone).await?, first);

        // When: two changes come at once. Then: the last one is rolled out.
        models.change("chat", json!({"runtime": {"contextTokens": 256}})).await?;
        models.change("chat", json!({"runtime": {"contextTokens": 128}})).await?;
        let candidate = shifting(&models).await?;
        let page: Value =
            serde_json::from_str(&run_plugin(scenario, &["status", "chat", "-o", "json"]).await?)?;
        assert_eq!(page["candidate"]["revision"], candidate.as_str());
        assert_eq!(page["status"]["rollout"]["phase"], "Shifting");
        decide(scenario, &models, &first, &candidate).await?;

        // And: no request failed.
        let requests = steady.stop().await?;
        let failed: Vec<_> = requests.iter().filter_map(|it| it.as_ref().err()).collect();
        assert!(failed.is_empty(), "{} of {} requests failed: {failed:?}", failed.len(), requests.len());
        Ok(())
    })
    .await
}

async fn decide(scenario: &Scenario, models: &Models, first: &str, candidate: &str) -> Result<()> {
    // A command that does not apply is refused with the reason.
    let refused = output(scenario, &["rollout", "undo", "chat"]).await?;
    ensure!(!refused.success && refused.stderr.contains("previous revision"), "{refused:?}");

    // When: the candidate is promoted. Then: it becomes the stable one.
    let promoted = run_plugin(scenario, &["rollout", "promote", "chat"]).await?;
    ensure!(promoted.starts_with(&format!("promote of revision {candidate}")), "{promoted}");
    let is_promoted = |model: &DynamicObject| {
        (status_text(model, "/rollout/phase") == "Promoted" && stable(model) == candidate).then_some(())
    };
    models.until("chat", Until::new("the candidate is promoted", 60), is_promoted).await?;

    // And: the checks find nothing that is wrong, and the table has the model.
    let doctor = output(scenario, &["doctor", "-o", "json"]).await?;
    let checks: Vec<Value> = serde_json::from_str(&doctor.stdout)?;
    let failed: Vec<_> = checks.iter().filter(|check| check["level"] == "Failed").collect();
    ensure!(doctor.success && failed.is_empty(), "{failed:?}\n{}", doctor.stderr);
    for name in ["leader", "your rights", "image volumes"] {
        let check = checks.iter().find(|check| check["name"] == name);
        ensure!(check.is_some_and(|check| check["level"] == "Ok"), "{name}: {check:?}");
    }
    let table = run_plugin(scenario, &["status"]).await?;
    ensure!(table.contains("chat") && table.contains(candidate), "{table}");

    // When: it is undone during the bake. Then: the first revision is the stable one, a watch ends with 1.
    run_plugin(scenario, &["rollout", "undo", "chat"]).await?;
    let watch = output(scenario, &["rollout", "status", "chat", "--watch"]).await?;
    ensure!(!watch.success && watch.stdout.contains("RolledBack"), "{watch:?}");
    ensure!(stable(&models.api.get("chat").await?) == first, "the first revision is not the stable one");
    let history = run_plugin(scenario, &["rollout", "history", "chat"]).await?;
    let newest = history.lines().nth(1).context("an empty history")?;
    ensure!(newest.contains("RolledBack") && newest.contains("Undone"), "{history}");

    // And: the log of its pod names the pod in each line.
    let logs = run_plugin(scenario, &["logs", "chat", "--revision", first, "--tail", "3"]).await?;
    ensure!(logs.lines().count() > 0 && logs.lines().all(|line| line.starts_with("[chat-")), "{logs}");
    Ok(())
}

async fn output(scenario: &Scenario, arguments: &[&str]) -> Result<Output> {
    let all = [arguments, &["--namespace", scenario.namespace.as_str()]].concat();
    plugin(&scenario.cluster, &all)?.output().await
}

async fn run_plugin(scenario: &Scenario, arguments: &[&str]) -> Result<String> {
    let all = [arguments, &["--namespace", scenario.namespace.as_str()]].concat();
    plugin(&scenario.cluster, &all)?.stdout().await
}

/// Waits until the candidate of the present spec has half of the requests, and returns it.
async fn shifting(models: &Models) -> Result<String> {
    let half = |model: &DynamicObject| {
        let revision = status_text(model, "/candidate/revision");
        let weight = model.data.pointer("/status/candidate/weight").and_then(Value::as_i64);
        let is_current = model.data.pointer("/status/observedGeneration").and_then(Value::as_i64)
            == model.metadata.generation;
        (is_current && weight == Some(50)).then(|| revision.to_owned())
    };
    models.until("chat", Until::new("the candidate has half of the requests", 90), half).await
}

/// The revision that is the stable one.
fn stable(model: &DynamicObject) -> String {
    status_text(model, "/stable/revision").to_owned()
}
