//! `kubectl describe` shows what is wrong with a model within seconds of the first report of it.

use std::{
    io::Read,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::watcher;
use serde_json::json;
use trustformers_e2e::{
    forward::Forward,
    model::{SMOLLM2, conditions},
    registry::Registry,
    scenario::{Scenario, run},
    wait::{Until, changes},
};
use trustformers_proto::v1::{
    ModelState, ModelStatus, WatchModelsRequest, model_service_client::ModelServiceClient,
};

/// From the report of kubelet or pod to the model's condition.
const SHOWN_WITHIN: Duration = Duration::from_secs(5);

#[tokio::test]
async fn a_wrong_digest_is_described() -> Result<()> {
    run("wrong-digest", async |scenario| {
        // Given: a pin that the file in the image does not have.
        let pin = "0".repeat(64);

        // When: the model is applied. Then: the pod's own report is in `kubectl describe` in time, pin and
        // all.
        let spec = json!({"source": {"uri": SMOLLM2, "sha256": pin}});
        scenario.models().apply("pinned", spec).await?;
        is_described(scenario, "pinned", &["DigestMismatch", &pin]).await
    })
    .await
}

#[tokio::test]
async fn a_malformed_file_is_described() -> Result<()> {
    run("malformed", async |scenario| {
        // Given: an image with the first megabyte of a real model.
        let nodes: Vec<String> = scenario.cluster.nodes().await?.into_iter().map(|(name, _)| name).collect();
        let registry = Registry::open(&nodes).await?;
        let whole = scenario.cluster.settings.cache.join("models/SmolLM2-135M-Instruct.Q4_1.gguf");
        let folder = tempfile::tempdir()?;
        let cut = folder.path().join("cut.gguf");
        let mut start = Vec::new();
        let file = std::fs::File::open(&whole).with_context(|| format!("{} is missing", whole.display()))?;
        file.take(1 << 20).read_to_end(&mut start)?;
        std::fs::write(&cut, start)?;
        let uri = registry.publish("cut", &cut).await?;

        // When: it is applied. Then: the pod's own report is in `kubectl describe` in time, with the file's
        // name.
        scenario.models().apply("cut", json!({"source": {"uri": uri}})).await?;
        is_described(scenario, "cut", &["MalformedModel", "cut.gguf"]).await
    })
    .await
}

#[tokio::test]
async fn a_missing_image_is_described() -> Result<()> {
    run("missing-image", async |scenario| {
        // Given: the pods of the scenario are watched, and so is the model.
        let models = scenario.models();
        let kubelet = kubelet_reports(scenario, "localhost/none:1");
        let shown = async {
            let limit = Until::new("the model reports the missing image", 60);
            let image = |text: &str| text.contains("localhost/none:1");
            let find = |model: &_| {
                conditions(model).into_iter().find(|it| it.status != "True" && image(&it.message))
            };
            let condition = models.until("lost", limit, find).await?;
            anyhow::Ok((SystemTime::now(), condition))
        };

        // When: a model is applied whose image does not exist.
        models.apply("lost", json!({"source": {"uri": "oci://localhost/none:1"}})).await?;
        let (reported, shown) = tokio::join!(kubelet, shown);

        // Then: kubelet's report is in a condition in time, and `kubectl describe` shows it.
        let ((reported, by_kubelet), (shown, condition)) = (reported?, shown?);
        in_time(reported, shown, &by_kubelet);
        let described = scenario.cluster.describe(&scenario.namespace, "imodel", "lost").await?;
        assert!(
            described.contains("localhost/none:1") && described.contains(&condition.reason),
            "{described}"
        );
        Ok(())
    })
    .await
}

/// When kubelet first reports that a pod of this scenario cannot have `image`, and its message.
async fn kubelet_reports(scenario: &Scenario, image: &str) -> Result<(SystemTime, String)> {
    let mut pods = std::pin::pin!(changes(scenario.pods(), watcher::Config::default()));
    let search = async {
        loop {
            let pod = pods.next().await.context("the watch of the pods ended")?;
            if let Some(words) = waits_for(&pod, image) {
                return anyhow::Ok((SystemTime::now(), words));
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), search)
        .await
        .context("kubelet reports nothing about the image")?
}

fn waits_for(pod: &Pod, image: &str) -> Option<String> {
    let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
    let waiting = statuses.iter().find_map(|it| it.state.as_ref()?.waiting.as_ref())?;
    let words = format!("{} {}", waiting.reason.as_deref()?, waiting.message.as_deref().unwrap_or_default());
    (words.contains("Image") && words.contains(image)).then_some(words)
}

/// The pod reports that its model failed; a condition of the InferenceModel has these words in time, and
/// `kubectl describe` shows them.
async fn is_described(scenario: &Scenario, name: &str, words: &[&str]) -> Result<()> {
    let all = |text: &str| words.iter().all(|word| text.contains(word));
    let limit = Until::new("the model reports what the pod found", 60);
    let find = |model: &_| {
        let texts =
            conditions(model).into_iter().map(|it| (it.status, format!("{} {}", it.reason, it.message)));
        texts.into_iter().find(|(status, text)| status != "True" && all(text))
    };
    scenario.models().until(name, limit, find).await?;
    let shown = SystemTime::now();

    // The pod itself says when it found the fault: it stays up.
    let running = Until::new("the model has one pod", 10);
    let only = |pods: &[&Pod]| if let [pod] = pods { pod.metadata.name.clone() } else { None };
    let pod = running.watched(scenario.pods(), watcher::Config::default(), only).await?;
    let answer = Until::new("the pod reports the state of its model", 15);
    let state = answer.polled(|| async { own_report(scenario, &pod).await.map(Some) }).await?;
    assert_eq!(state.state(), ModelState::Failed, "{state:?}");
    let reported = UNIX_EPOCH + Duration::from_millis(state.since_unix_ms);
    in_time(reported, shown, &state.message);

    let described = scenario.cluster.describe(&scenario.namespace, "imodel", name).await?;
    assert!(all(&described), "{described}");
    Ok(())
}

/// The state of its one model, as the pod reports it.
async fn own_report(scenario: &Scenario, pod: &str) -> Result<ModelStatus> {
    let forward = Forward::grpc(&scenario.cluster, &scenario.namespace, pod).await?;
    let mut models = ModelServiceClient::new(forward.channel.clone());
    let first = models.watch_models(WatchModelsRequest {}).await?.into_inner().message().await?;
    first.context("the pod ended its report")?.models.into_iter().next().context("the pod knows no model")
}

fn in_time(reported: SystemTime, shown: SystemTime, words: &str) {
    // Both were watched at the same time: the order of the two is not certain.
    let late = shown.duration_since(reported).unwrap_or_default();
    eprintln!("shown {} ms after the report: {words}", late.as_millis());
    assert!(late < SHOWN_WITHIN, "shown {late:?} after the report");
}
