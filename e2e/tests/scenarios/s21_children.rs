//! Every object that the operator makes comes back when it is deleted, and objects of others stay as they
//! are.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, ResourceExt, api::PostParams};
use serde_json::{Value, json};
use trustformers_e2e::{
    model::{SMOLLM2, status_text},
    scenario::{Scenario, run},
    wait::Until,
};

/// The kinds of a model's objects. Those that a model does not have are not listed.
const KINDS: &str = "deployments,services,configmaps,serviceaccounts,poddisruptionbudgets,networkpolicies,\
                     horizontalpodautoscalers";
const SELECTOR: &str =
    "serving.trustformers.dev/model=fixed,app.kubernetes.io/managed-by=trustformers-operator";

#[tokio::test]
async fn every_deleted_object_comes_back_and_objects_of_others_stay() -> Result<()> {
    run("children", async |scenario| {
        // Given: a stopped model, which has all its objects and no pod, and an object of somebody else with
        // the labels of the model's.
        let models = scenario.models();
        models.apply("fixed", json!({"source": {"uri": SMOLLM2}, "scaling": {"replicas": 0}})).await?;
        let stopped = Until::new("the model is stopped", 30);
        models
            .until("fixed", stopped, |model| (status_text(model, "/phase") == "Stopped").then_some(()))
            .await?;
        let before = uids(scenario).await?;
        ensure!(before.len() >= 3, "the model has only {before:?}");
        let maps = Api::<ConfigMap>::namespaced(scenario.cluster.client.clone(), &scenario.namespace);
        let foreign: ConfigMap = serde_json::from_value(json!({
            "metadata": {"name": "foreign", "labels": {
                "serving.trustformers.dev/model": "fixed", "app.kubernetes.io/managed-by": "trustformers-operator",
            }},
            "data": {"mine": "yes"},
        }))?;
        let foreign = maps.create(&PostParams::default(), &foreign).await?;

        // When: each of the model's objects is deleted. Then: each is there again, as another object.
        for name in before.keys() {
            let delete = ["--namespace", &scenario.namespace, "delete", name, "--wait=false"];
            scenario.cluster.kubectl(&delete).stdout().await?;
        }
        let all = Until::new("all objects are there again", 30);
        all.polled(|| async {
            let now = uids(scenario).await?;
            let again = before.iter().all(|(name, uid)| now.get(name).is_some_and(|new| new != uid));
            Ok(again.then_some(()))
        })
        .await?;

        // And: the object of somebody else is the same, unchanged.
        let after = maps.get("foreign").await?;
        ensure!(after.resource_version() == foreign.resource_version(), "the foreign object was changed: {after:?}");
        Ok(())
    })
    .await
}

/// The UIDs of the model's own objects, by `kind/name`.
async fn uids(scenario: &Scenario) -> Result<BTreeMap<String, String>> {
    let get = ["--namespace", &scenario.namespace, "get", KINDS, "--selector", SELECTOR, "--output=json"];
    let list: Value = serde_json::from_str(&scenario.cluster.kubectl(&get).stdout().await?)?;
    let items = list["items"].as_array().context("kubectl gave no list")?;
    let own = items.iter().filter(|object| object["metadata"]["ownerReferences"].is_array());
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let entry = |object: &Value| {
        let kind = text(&object["kind"]).to_lowercase();
        (format!("{kind}/{}", text(&object["metadata"]["name"])), text(&object["metadata"]["uid"]))
    };
    Ok(own.map(entry).collect())
}
