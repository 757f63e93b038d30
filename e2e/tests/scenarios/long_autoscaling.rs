//! An autoscaler follows the load of a model, by the model's own `/scale`.

use anyhow::Result;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use kube::{Api, api::DynamicObject};
use serde_json::{Value, json};
use trustformers_e2e::{
    load::Steady,
    model::{SMOLLM2, condition, is_ready},
    request::Request,
    scenario::run,
    wait::Until,
};

#[tokio::test]
async fn a_model_gets_pods_while_it_has_load_and_loses_them_afterwards() -> Result<()> {
    run("autoscaling", async |scenario| {
        // Given: one pod, and an autoscaler that keeps the processors of the pods at 70 % of their request.
        let (models, gateway) = (scenario.models(), scenario.gateway().await?);
        let spec = json!({
            "source": {"uri": SMOLLM2},
            "runtime": {"contextTokens": 256, "resources": {"requests": {"cpu": "100m"}}},
            "scaling": {
                "maxReplicas": 3,
                "metrics": [{"cpu": 70}],
                "behavior": {"scaleUp": {"stabilization": "0s"}, "scaleDown": {"stabilization": "0s"}},
            },
        });
        models.apply("busy", spec.clone()).await?;
        let ready = models.ready("busy", 60).await?;
        assert_eq!(replicas(&ready), Some(1));
        let autoscalers: Api<HorizontalPodAutoscaler> =
            Api::namespaced(scenario.cluster.client.clone(), &scenario.namespace);
        let target = autoscalers.get("busy").await?.spec.scale_target_ref.kind;
        assert_eq!(target, "InferenceModel");

        // When: it has load. Then: it gets three pods, all of which serve, and nothing fails.
        let request = Request::new(&models.full_name("busy"), "Once upon a time", 24);
        let load = Steady::start(&gateway, request, 5)?;
        let scaled = Until::new("three pods serve the model under load", 75);
        let full = models.until("busy", scaled, |model| with_pods(model, 3)).await?;
        let autoscaled = condition(&full, "Autoscaled");
        assert!(autoscaled.as_ref().is_some_and(|it| it.status == "True"), "{autoscaled:?}");

        // And: applying the same manifest again, which names no number, changes nothing.
        let again = models.apply("busy", spec).await?;
        assert_eq!((replicas(&again), again.metadata.generation), (Some(3), full.metadata.generation));
        let outcomes = load.stop().await?;
        let failed: Vec<_> = outcomes.iter().filter_map(|it| it.as_ref().err()).collect();
        assert!(failed.is_empty(), "{} of {} requests failed: {failed:?}", failed.len(), outcomes.len());

        // When: the load ends. Then: one pod remains, and it answers.
        let idle = Until::new("one pod serves the model without load", 60);
        models.until("busy", idle, |model| with_pods(model, 1)).await?;
        gateway.http(&Request::new(&models.full_name("busy"), "Once upon a time", 2)).await?;
        Ok(())
    })
    .await
}

fn replicas(model: &DynamicObject) -> Option<i64> {
    model.data.pointer("/spec/scaling/replicas").and_then(Value::as_i64)
}

/// The model, if its spec asks for this many pods and all of them serve.
fn with_pods(model: &DynamicObject, number: i64) -> Option<DynamicObject> {
    (replicas(model) == Some(number) && is_ready(model)).then(|| model.clone())
}
