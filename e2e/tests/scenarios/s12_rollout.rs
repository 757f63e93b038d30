//! A rollout shifts requests step by step without a failed one, and returns by itself from a revision that
//! cannot be loaded, and says why.

use anyhow::{Context, Result};
use kube::api::DynamicObject;
use serde_json::{Value, json};
use trustformers_e2e::{
    load::{Outcome, Steady},
    model::{SMOLLM2, condition, is_ready, status_text},
    request::Request,
    scenario::run,
    wait::Until,
};

#[tokio::test]
async fn a_good_revision_is_promoted_step_by_step() -> Result<()> {
    run("rollout", async |scenario| {
        // Given: a model that serves and rolls out in steps, and clients that send it requests.
        let (models, gateway) = (scenario.models(), scenario.gateway().await?);
        let spec = json!({
            "source": {"uri": SMOLLM2},
            "runtime": {"contextTokens": 512},
            "rollout": {"steps": [{"weight": 25, "hold": "3s"}, {"weight": 50, "hold": "3s"}], "bake": "3s"},
        });
        models.apply("moving", spec).await?;
        let old = revision(&models.ready("moving", 60).await?);
        let steady = Steady::start(&gateway, Request::new(&models.full_name("moving"), "Hello", 2), 4)?;

        // When: a setting of the engine is changed. Then: another revision gets a quarter of the requests,
        // and the first one is still the stable one.
        models.change("moving", json!({"runtime": {"contextTokens": 256}})).await?;
        let shifting = Until::new("the candidate gets a quarter of the requests", 90);
        let quarter = |model: &DynamicObject| {
            let weight = model.data.pointer("/status/candidate/weight").and_then(Value::as_i64);
            (weight == Some(25)).then(|| revision(model))
        };
        assert_eq!(models.until("moving", shifting, quarter).await?, old);

        // And: it becomes the stable one, and the model is ready.
        let moved = Until::new("the rollout is done", 90);
        let done = |model: &DynamicObject| {
            (is_ready(model) && revision(model) != old && status_text(model, "/rollout/phase") == "Done")
                .then(|| model.clone())
        };
        let model = models.until("moving", moved, done).await?;
        assert_eq!(decisions(&model), ["Passed", "Passed", "Promoted"]);

        // And: its pod is the only one that is left, and no request failed.
        let only_new = Until::new("the pod of the old revision is gone", 60);
        let one = |pods: &[&k8s_openapi::api::core::v1::Pod]| (pods.len() == 1).then_some(());
        only_new.watched(scenario.pods(), kube::runtime::watcher::Config::default(), one).await?;
        none_failed(&steady.stop().await?);
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_revision_that_cannot_be_loaded_is_rolled_back_with_the_reason() -> Result<()> {
    run("rollback", async |scenario| {
        // Given: a model that serves, and clients that send it requests.
        let (models, gateway) = (scenario.models(), scenario.gateway().await?);
        models.apply("staying", json!({"source": {"uri": SMOLLM2}})).await?;
        let old = revision(&models.ready("staying", 60).await?);
        let steady = Steady::start(&gateway, Request::new(&models.full_name("staying"), "Hello", 2), 4)?;

        // When: the spec asks for a digest that the file does not have.
        models.change("staying", json!({"source": {"sha256": "0".repeat(64)}})).await?;

        // Then: the revision is rolled back, and status and history say why.
        let returned = Until::new("the revision is rolled back", 90);
        let rolled_back = |model: &DynamicObject| {
            (status_text(model, "/rollout/phase") == "RolledBack").then(|| model.clone())
        };
        let model = models.until("staying", returned, rolled_back).await?;
        assert_eq!(revision(&model), old);
        assert_eq!(decisions(&model), ["RolledBack"]);
        let healthy = condition(&model, "RolloutHealthy").context("no condition RolloutHealthy")?;
        assert_eq!((healthy.status.as_str(), healthy.reason.as_str()), ("False", "DigestMismatch"));
        let serving = condition(&model, "Serving").context("no condition Serving")?;
        assert_eq!(serving.status, "True");

        // When: the spec is changed back. Then: the model is ready, with the pod that it had all the time.
        models.change("staying", json!({"source": {"sha256": null}})).await?;
        let model = models.ready("staying", 30).await?;
        assert_eq!(revision(&model), old);
        none_failed(&steady.stop().await?);
        Ok(())
    })
    .await
}

/// The revision that is the stable one.
fn revision(model: &DynamicObject) -> String {
    status_text(model, "/stable/revision").to_owned()
}

fn decisions(model: &DynamicObject) -> Vec<String> {
    let history = model.data.pointer("/status/history").and_then(Value::as_array);
    let word = |one: &Value| one["decision"].as_str().unwrap_or_default().to_owned();
    history.into_iter().flatten().map(word).collect()
}

fn none_failed(requests: &[Outcome]) {
    let failed: Vec<_> = requests.iter().filter_map(|it| it.as_ref().err()).collect();
    assert!(failed.is_empty(), "{} of {} requests failed: {failed:?}", failed.len(), requests.len());
    eprintln!("{} requests, none failed", requests.len());
}
