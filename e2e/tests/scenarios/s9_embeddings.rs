//! A checkpoint of several files in an image, applied like any other model, answers with vectors through the
//! gateway.

use anyhow::Result;
use serde_json::json;
use trustformers_e2e::{
    model::{MINILM, SMOLLM2, status_text},
    reference::{cosine, embedded},
    request::Request,
    scenario::run,
};

/// From apply to ready: the image is on the node, and the files take a second to read.
const READY_LIMIT_S: u64 = 60;

#[tokio::test]
async fn vectors_through_the_gateway_are_the_references() -> Result<()> {
    run("embeddings", async |scenario| {
        // Given: texts whose vectors an independent implementation has computed.
        let cases = embedded(&scenario.cluster.settings)?;
        let texts: Vec<&str> = cases.iter().map(|case| case.text.as_str()).collect();

        // When: the image is applied with every setting of batching, and becomes ready.
        let models = scenario.models();
        let batching =
            json!({"strategy": "priority", "maxBatchSize": 8, "maxWaitMs": 5, "maxQueue": 64, "priority": true});
        let spec = json!({
            "task": "embed",
            "source": {"uri": MINILM},
            "runtime": {"numerics": "exact", "batching": batching},
        });
        models.apply("minilm", spec).await?;
        let model = models.ready("minilm", READY_LIMIT_S).await?;
        assert_eq!(status_text(&model, "/digest").len(), 64, "no digest of the loaded files");

        // Then: by HTTP and gRPC alike, each text has the vector of the reference, and the answer names the
        // texts that were truncated.
        let gateway = scenario.gateway().await?;
        let name = models.full_name("minilm");
        let (vectors, answer) = gateway.embeddings(Some(&name), &texts).await?;
        assert_eq!(vectors.len(), cases.len());
        for (vector, case) in vectors.iter().zip(&cases) {
            let cosine = cosine(vector, &case.embedding);
            assert!(cosine >= 0.9999, "{:?}: cosine {cosine}", case.text);
        }
        assert_eq!(answer["pooling"], "mean");
        assert!(answer["truncated"].as_array().is_some_and(|cut| !cut.is_empty()), "{}", answer["truncated"]);
        for (over_grpc, over_http) in gateway.grpc_embeddings(&name, &texts).await?.iter().zip(&vectors) {
            let over_grpc: Vec<f64> = over_grpc.iter().map(|value| f64::from(*value)).collect();
            assert!(cosine(&over_grpc, over_http) > 0.999_999, "HTTP and gRPC differ");
        }

        // And: a request to generate is refused with the model's task and the right path.
        let refusal = gateway.http(&Request::new(&name, "Once upon a time", 2)).await.unwrap_err().to_string();
        assert!(refusal.contains("/v1/embeddings"), "{refusal}");

        // And: a request that names no model is answered while one model embeds, and refused while two do.
        models.apply("writes", json!({"source": {"uri": SMOLLM2}})).await?;
        models.ready("writes", READY_LIMIT_S).await?;
        let (unnamed, _) = gateway.embeddings(None, &texts[..1]).await?;
        assert!(cosine(&unnamed[0], &vectors[0]) > 0.999_999, "another model answered");
        models.apply("other", json!({"task": "embed", "source": {"uri": MINILM}})).await?;
        models.ready("other", READY_LIMIT_S).await?;
        let refusal = gateway.embeddings(None, &texts[..1]).await.unwrap_err().to_string();
        for name in [name, models.full_name("other")] {
            assert!(refusal.contains(&name), "{refusal} does not name {name}");
        }
        assert!(!refusal.contains(&models.full_name("writes")), "{refusal} names a model that generates");
        Ok(())
    })
    .await
}
