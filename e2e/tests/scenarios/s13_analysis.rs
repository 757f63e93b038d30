//! A revision is compared with limits by real traffic, and must give the answers that are fixed.

use anyhow::{Context, Result, bail};
use futures::future::try_join_all;
use kube::api::DynamicObject;
use serde_json::{Value, json};
use trustformers_e2e::{
    gateway::Gateway,
    load::Steady,
    model::{MINILM, SMOLLM2, condition, status_text},
    request::Request,
    scenario::run,
    wait::Until,
};

const PROMPT: &str = "The capital of France is";

#[tokio::test]
async fn a_revision_is_promoted_by_its_requests_and_refused_by_its_answers() -> Result<()> {
    run("analysis", async |scenario| {
        // Given: a model that serves, its greedy answer to a prompt, and clients that send it requests.
        let (models, gateway) = (scenario.models(), scenario.gateway().await?);
        models.apply("compared", json!({"source": {"uri": SMOLLM2}})).await?;
        let old = revision(&models.ready("compared", 60).await?);
        let name = models.full_name("compared");
        let answer = gateway.http(&Request::new(&name, PROMPT, 8)).await?.text;
        let steady = Steady::start(&gateway, Request::new(&name, "Hello", 2), 4)?;

        // When: a new revision must give this answer, and must answer ten requests in each step.
        let analysis = |expect: &str| {
            json!({"minRequests": 10, "goldenPrompts": [{"prompt": PROMPT, "expect": expect}]})
        };
        let rollout =
            json!({"steps": [{"weight": 50, "hold": "1s"}], "bake": "1s", "analysis": analysis(&answer)});
        models.change("compared", json!({"rollout": rollout})).await?;

        // Then: it is promoted, and the history has the figures.
        let promoted = Until::new("the revision is promoted", 120);
        let done = |model: &DynamicObject| {
            (revision(model) != old && status_text(model, "/rollout/phase") == "Done").then(|| model.clone())
        };
        let model = models.until("compared", promoted, done).await?;
        let new = revision(&model);
        assert_eq!(decisions(&model), ["Passed", "Promoted"]);
        for message in messages(&model) {
            assert!(message.contains("of 10 requests; 0 of "), "{message}");
        }

        // When: a revision must give another answer. Then: it gets no request and is rolled back.
        models.change("compared", json!({"rollout": {"analysis": analysis(" a village in Wales")}})).await?;
        let returned = Until::new("the revision is rolled back", 90);
        let rolled_back = |model: &DynamicObject| {
            (status_text(model, "/rollout/phase") == "RolledBack").then(|| model.clone())
        };
        let model = models.until("compared", returned, rolled_back).await?;
        assert_eq!(revision(&model), new);
        let healthy = condition(&model, "RolloutHealthy").context("no condition RolloutHealthy")?;
        assert_eq!((healthy.status.as_str(), healthy.reason.as_str()), ("False", "WrongAnswer"));
        let serving = condition(&model, "Serving").context("no condition Serving")?;
        assert_eq!(serving.status, "True");

        // And: no request failed.
        let requests = steady.stop().await?;
        let failed: Vec<_> = requests.iter().filter_map(|it| it.as_ref().err()).collect();
        assert!(failed.is_empty(), "{} of {} requests failed: {failed:?}", failed.len(), requests.len());
        Ok(())
    })
    .await
}

/// What the candidate's pods wait before each request: far above what a text takes, also on a busy machine.
const DELAY_MS: &str = "1200";
/// Requests at the same time. Half of them go to the candidate, so that some 150 of each revision, as a
/// comparison of latencies needs, take 20 rounds of 1.2 s.
const AT_A_TIME: usize = 16;

#[tokio::test]
async fn a_candidate_that_became_slow_is_rolled_back_and_no_request_fails() -> Result<()> {
    run("slow-candidate", async |scenario| {
        // Given: a model that serves, and a limit on the latency of a new revision.
        let (models, gateway) = (scenario.models(), scenario.gateway().await?);
        let analysis = json!({"minRequests": 20, "maxLatencyRatio": 1.5});
        let rollout = json!({"steps": [{"weight": 50, "hold": "1s"}], "analysis": analysis});
        let spec = json!({"task": "embed", "source": {"uri": MINILM}, "rollout": rollout});
        models.apply("judged", spec).await?;
        let old = revision(&models.ready("judged", 60).await?);

        // When: a new revision comes, and each request to its pods waits by a fault of the runtime.
        let fault = json!([{"name": "TRUSTFORMERS_FAULT_DELAY_MS", "value": DELAY_MS}]);
        models.change("judged", json!({"runtime": {"contextTokens": 128, "env": fault}})).await?;
        let returned = Until::new("the slow revision is rolled back", 100);
        let rolled_back = |model: &DynamicObject| {
            (status_text(model, "/rollout/phase") == "RolledBack").then(|| model.clone())
        };
        // Then: it is rolled back because of its latency, and no request has failed until then.
        let name = models.full_name("judged");
        let model = tokio::select! {
            failed = requests_without_end(&gateway, &name) => bail!("a request failed: {failed:?}"),
            model = models.until("judged", returned, rolled_back) => model?,
        };
        assert_eq!(revision(&model), old);
        let healthy = condition(&model, "RolloutHealthy").context("no condition RolloutHealthy")?;
        assert_eq!((healthy.status.as_str(), healthy.reason.as_str()), ("False", "Latency"));
        let messages = messages(&model);
        assert!(messages.iter().any(|it| it.contains("times the stable revision's p95")), "{messages:?}");
        let serving = condition(&model, "Serving").context("no condition Serving")?;
        assert_eq!(serving.status, "True");
        Ok(())
    })
    .await
}

/// Sends requests until one fails.
async fn requests_without_end(gateway: &Gateway, model: &str) -> Result<()> {
    loop {
        let round = (0..AT_A_TIME).map(|_| gateway.embeddings(Some(model), &["Hello, world!"]));
        try_join_all(round).await?;
    }
}

/// The revision that is the stable one.
fn revision(model: &DynamicObject) -> String {
    status_text(model, "/stable/revision").to_owned()
}

fn decisions(model: &DynamicObject) -> Vec<String> {
    history(model, "decision")
}

fn messages(model: &DynamicObject) -> Vec<String> {
    history(model, "message")
}

fn history(model: &DynamicObject, field: &str) -> Vec<String> {
    let history = model.data.pointer("/status/history").and_then(Value::as_array);
    let text = |one: &Value| one[field].as_str().unwrap_or_default().to_owned();
    history.into_iter().flatten().map(text).collect()
}
