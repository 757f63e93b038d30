//! A classifier in an image, applied like any other model, gives scores of its labels through the gateway.

use anyhow::{Context, Result};
use serde_json::{Value, json};
use trustformers_e2e::{
    model::{CLASSIFIER, status_text},
    reference::classified,
    request::Request,
    scenario::run,
};

/// From apply to ready: the image is on the node, and the files have 350 KB.
const READY_LIMIT_S: u64 = 60;

/// The labels of the model, in the order of its logits.
const LABELS: [&str; 3] = ["animal", "greeting", "other"];

/// Largest difference of a score to the sigmoid of the reference's logit.
const TOLERANCE: f64 = 1e-3;

#[tokio::test]
async fn scores_through_the_gateway_are_the_references() -> Result<()> {
    run("classify", async |scenario| {
        // Given: texts whose logits an independent implementation has computed.
        let cases = classified(&scenario.cluster.settings)?;
        let texts: Vec<&str> = cases.iter().map(|case| case.text.as_str()).collect();

        // When: the image is applied without a task, and becomes ready.
        let models = scenario.models();
        let spec = json!({"source": {"uri": CLASSIFIER}, "runtime": {"numerics": "exact"}});
        models.apply("labels", spec).await?;
        let model = models.ready("labels", READY_LIMIT_S).await?;

        // Then: the status has the task of its files.
        assert_eq!(status_text(&model, "/task"), "classify");

        // And: by HTTP and gRPC alike, each text has the scores of the reference, best first.
        let gateway = scenario.gateway().await?;
        let name = models.full_name("labels");
        let answer = gateway.classify(&name, &texts).await?;
        let results = answer["results"].as_array().context("the answer has no results")?;
        let over_grpc = gateway.grpc_classify(&name, &texts).await?;
        assert_eq!((results.len(), over_grpc.len()), (cases.len(), cases.len()));
        for ((result, over_grpc), case) in results.iter().zip(&over_grpc).zip(&cases) {
            let scores = result["scores"].as_array().context("a result has no scores")?;
            assert_eq!(scores.len(), LABELS.len());
            for (score, other) in scores.iter().zip(&over_grpc.scores) {
                let label = score["label"].as_str().context("a score has no label")?;
                let logit = LABELS.iter().position(|known| *known == label).map(|index| case.logits[index]);
                let wanted = 1.0 / (1.0 + (-logit.context("an unknown label")?).exp());
                let value = score["score"].as_f64().context("a score is no number")?;
                assert!(
                    (value - wanted).abs() < TOLERANCE,
                    "{:?}, {label}: {value}, not {wanted}",
                    case.text
                );
                assert_eq!(other.label, label, "HTTP and gRPC differ");
                assert!((f64::from(other.score) - value).abs() < 1e-6, "HTTP and gRPC differ");
            }
            let falls = |one: &Value, other: &Value| one["score"].as_f64() >= other["score"].as_f64();
            assert!(scores.is_sorted_by(falls), "{scores:?}");
        }

        // And: a request to generate is refused with the right path.
        let refusal =
            gateway.http(&Request::new(&name, "Once upon a time", 2)).await.unwrap_err().to_string();
        assert!(refusal.contains("/v1/classify"), "{refusal}");
        Ok(())
    })
    .await
}
