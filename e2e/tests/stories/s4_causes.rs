//! What is wrong with a model is told by `kubectl describe`, within seconds of anybody knowing it.

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
    story::{Story, tell},
    wait::{Until, changes},
};
use trustformers_proto::v1::{
    ModelState, ModelStatus, WatchModelsRequest, model_service_client::ModelServiceClient,
};

/// From the report of kubelet or pod to the model's condition.
const TOLD_WITHIN: Duration = Duration::from_secs(5);

#[tokio::test]
async fn a_wrong_digest_is_told() -> Result<()> {
    tell("wrong-digest", async |story| {
        // Given: a pin that the file in the image does not have.
        let pin = "0".repeat(64);

        // When: the model is applied. Then: the pod's own report is in `kubectl describe` in time, pin and all.
        let spec = json!({"source": {"uri": SMOLLM2, "sha256": pin}});
        story.models().apply("pinned", spec).await?;
        the_pod_s_report_is_told(story, "pinned", &["DigestMismatch", &pin]).await
    })
    .await
}

#[tokio::test]
async fn a_malformed_file_is_told() -> Result<()> {
    tell("malformed", async |story| {
        // Given: an image with the first megabyte of a real model.
        let nodes: Vec<String> = story.cluster.nodes().await?.into_iter().map(|(name, _)| name).collect();
        let registry = Registry::open(&nodes).await?;
        let whole = story.cluster.settings.cache.join("models/SmolLM2-135M-Instruct.Q4_1.gguf");
        let folder = tempfile::tempdir()?;
        let cut = folder.path().join("cut.gguf");
        let mut start = Vec::new();
        let file = std::fs::File::open(&whole).with_context(|| format!("{} is missing", whole.display()))?;
        file.take(1 << 20).read_to_end(&mut start)?;
        std::fs::write(&cut, start)?;
        let uri = registry.publish("cut", &cut).await?;

        // When: it is applied. Then: the pod's own report is in `kubectl describe` in time, with the file's name.
        story.models().apply("cut", json!({"source": {"uri": uri}})).await?;
        the_pod_s_report_is_told(story, "cut", &["MalformedModel", "cut.gguf"]).await
    })
    .await
}

#[tokio::test]
async fn a_missing_image_is_told() -> Result<()> {
    tell("missing-image", async |story| {
        // Given: the pods of the story are watched, and so is the model.
        let models = story.models();
        let kubelet = kubelet_reports(story, "localhost/none:1");
        let told = async {
            let told = Until::new("the model tells of the missing image", 60);
            let image = |text: &str| text.contains("localhost/none:1");
            let find = |model: &_| {
                conditions(model).into_iter().find(|it| it.status != "True" && image(&it.message))
            };
            let condition = models.until("lost", told, find).await?;
            anyhow::Ok((SystemTime::now(), condition))
        };

        // When: a model is applied whose image does not exist.
        models.apply("lost", json!({"source": {"uri": "oci://localhost/none:1"}})).await?;
        let (reported, told) = tokio::join!(kubelet, told);

        // Then: kubelet's report is in a condition in time, and `kubectl describe` shows it.
        let ((reported, by_kubelet), (told, condition)) = (reported?, told?);
        in_time(reported, told, &by_kubelet);
        let described = story.cluster.describe(&story.namespace, "imodel", "lost").await?;
        assert!(
            described.contains("localhost/none:1") && described.contains(&condition.reason),
            "{described}"
        );
        Ok(())
    })
    .await
}

/// The moment at which kubelet first says of a pod of this story that it cannot have `image`, and its words.
async fn kubelet_reports(story: &Story, image: &str) -> Result<(SystemTime, String)> {
    let mut pods = std::pin::pin!(changes(story.pods(), watcher::Config::default()));
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
        .context("kubelet says nothing of the image")?
}

fn waits_for(pod: &Pod, image: &str) -> Option<String> {
    let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
    let waiting = statuses.iter().find_map(|it| it.state.as_ref()?.waiting.as_ref())?;
    let words = format!("{} {}", waiting.reason.as_deref()?, waiting.message.as_deref().unwrap_or_default());
    (words.contains("Image") && words.contains(image)).then_some(words)
}

/// The pod says that its model failed; the InferenceModel says so too, in time, with these words, and
/// `kubectl describe` shows them.
async fn the_pod_s_report_is_told(story: &Story, name: &str, words: &[&str]) -> Result<()> {
    let all = |text: &str| words.iter().all(|word| text.contains(word));
    let told = Until::new("the model tells what the pod found", 60);
    let find = |model: &_| {
        let texts =
            conditions(model).into_iter().map(|it| (it.status, format!("{} {}", it.reason, it.message)));
        texts.into_iter().find(|(status, text)| status != "True" && all(text))
    };
    story.models().until(name, told, find).await?;
    let told = SystemTime::now();

    // The pod is asked itself when it knew: it stays up, so that it can be asked.
    let running = Until::new("the model has one pod", 10);
    let only = |pods: &[&Pod]| if let [pod] = pods { pod.metadata.name.clone() } else { None };
    let pod = running.watched(story.pods(), watcher::Config::default(), only).await?;
    let answer = Until::new("the pod tells the state of its model", 15);
    let state = answer.asked(|| async { own_report(story, &pod).await.map(Some) }).await?;
    assert_eq!(state.state(), ModelState::Failed, "{state:?}");
    let reported = UNIX_EPOCH + Duration::from_millis(state.since_unix_ms);
    in_time(reported, told, &state.message);

    let described = story.cluster.describe(&story.namespace, "imodel", name).await?;
    assert!(all(&described), "{described}");
    Ok(())
}

/// The state of its one model, as the pod tells it to anybody who asks.
async fn own_report(story: &Story, pod: &str) -> Result<ModelStatus> {
    let forward = Forward::grpc(&story.cluster, &story.namespace, pod).await?;
    let mut models = ModelServiceClient::new(forward.channel.clone());
    let first = models.watch_models(WatchModelsRequest {}).await?.into_inner().message().await?;
    first.context("the pod ended its report")?.models.into_iter().next().context("the pod knows no model")
}

fn in_time(reported: SystemTime, told: SystemTime, words: &str) {
    // Told a moment before it was seen reported: both were watched at the same time.
    let late = told.duration_since(reported).unwrap_or_default();
    eprintln!("told {} ms after the report: {words}", late.as_millis());
    assert!(late < TOLD_WITHIN, "told {late:?} after the report");
}
