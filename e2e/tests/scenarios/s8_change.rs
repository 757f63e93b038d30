//! A changed setting rolls out under traffic without one failed request.

use anyhow::Result;
use serde_json::json;
use trustformers_e2e::{
    load::Steady,
    model::{SMOLLM2, is_ready, status_text},
    request::Request,
    scenario::run,
    wait::Until,
};

#[tokio::test]
async fn a_changed_setting_rolls_out_without_a_failed_request() -> Result<()> {
    run("change", async |scenario| {
        // Given: a model that serves, and clients that send it a few requests a second.
        let (models, gateway) = (scenario.models(), scenario.gateway().await?);
        models
            .apply("moving", json!({"source": {"uri": SMOLLM2}, "runtime": {"contextTokens": 512}}))
            .await?;
        let before = models.ready("moving", 60).await?;
        let old = status_text(&before, "/stable/revision").to_owned();
        let steady = Steady::start(&gateway, Request::new(&models.full_name("moving"), "Hello", 2), 4)?;

        // When: a setting of the engine is changed.
        models.change("moving", json!({"runtime": {"contextTokens": 256}})).await?;

        // Then: another revision serves.
        let moved = Until::new("the new revision is the stable one, and the model is ready", 90);
        let new = |model: &_| {
            let revision = status_text(model, "/stable/revision");
            (is_ready(model) && !revision.is_empty() && revision != old).then(|| revision.to_owned())
        };
        models.until("moving", moved, new).await?;

        // And: its pod is the only one that is left.
        let only_new = Until::new("the pod of the old revision is gone", 60);
        let one = |pods: &[&k8s_openapi::api::core::v1::Pod]| (pods.len() == 1).then_some(());
        only_new.watched(scenario.pods(), kube::runtime::watcher::Config::default(), one).await?;

        // And: no request failed, before, while or after.
        let requests = steady.stop().await?;
        let failed: Vec<_> = requests.iter().filter_map(|it| it.as_ref().err()).collect();
        assert!(failed.is_empty(), "{} of {} requests failed: {failed:?}", failed.len(), requests.len());
        eprintln!("{} requests, none failed", requests.len());
        Ok(())
    })
    .await
}
