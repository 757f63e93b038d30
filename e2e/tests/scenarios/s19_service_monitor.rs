//! A kind of object that the cluster does not have yet: it is made as soon as its definition is installed.

use anyhow::Result;
use kube::{
    Api,
    api::{ApiResource, DynamicObject, GroupVersionKind},
};
use serde_json::{Value, json};
use trustformers_e2e::{
    model::{SMOLLM2, condition},
    scenario::run,
    wait::Until,
};

const DEFINITION: &str = "servicemonitors.monitoring.coreos.com";

#[tokio::test]
async fn a_service_monitor_is_made_when_its_definition_is_installed() -> Result<()> {
    run("service-monitor", async |scenario| {
        // Given: a cluster without the Prometheus Operator, and a model that asks for a ServiceMonitor.
        let models = scenario.models();
        let spec = json!({
            "source": {"uri": SMOLLM2},
            "scaling": {"replicas": 0},
            "monitoring": {"serviceMonitor": true, "labels": {"release": "prometheus"}},
        });
        models.apply("watched", spec).await?;
        let named = Until::new("a condition names the definition that is missing", 15);
        let missing = |model: &_| condition(model, "Integrated").filter(|it| it.status == "False");
        let integrated = models.until("watched", named, missing).await?;
        assert!(integrated.message.contains(DEFINITION), "{integrated:?}");

        // When: the definition is installed.
        let definition = json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": DEFINITION},
            "spec": {
                "group": "monitoring.coreos.com", "scope": "Namespaced",
                "names": {"kind": "ServiceMonitor", "plural": "servicemonitors", "singular": "servicemonitor"},
                "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {
                    "type": "object", "x-kubernetes-preserve-unknown-fields": true}}}],
            },
        });
        let apply = ["apply", "--filename=-"];
        scenario.cluster.kubectl(&apply).input(definition.to_string()).stdout().await?;

        // Then: the object appears without a restart of the operator, and the condition is gone.
        let outcome = async {
            let kind = GroupVersionKind::gvk("monitoring.coreos.com", "v1", "ServiceMonitor");
            let client = scenario.cluster.client.clone();
            let monitors: Api<DynamicObject> =
                Api::namespaced_with(client, &scenario.namespace, &ApiResource::from_gvk(&kind));
            let made = Until::new("the ServiceMonitor exists", 60);
            let monitor = made.object(monitors, "watched", |found| found.cloned()).await?;
            let labels = monitor.metadata.labels.unwrap_or_default();
            assert_eq!(labels.get("release").map(String::as_str), Some("prometheus"));
            let path = monitor.data.pointer("/spec/endpoints/0/path").and_then(Value::as_str);
            assert_eq!(path, Some("/metrics"));
            let gone = Until::new("the condition is gone", 15);
            let is_gone = |model: &_| condition(model, "Integrated").is_none().then_some(());
            models.until("watched", gone, is_gone).await?;
            anyhow::Ok(())
        };
        let outcome = outcome.await;
        scenario.cluster.kubectl(&["delete", "customresourcedefinition", DEFINITION]).stdout().await?;
        outcome?;

        // And: when it is removed again, the condition is back.
        let again = Until::new("the condition is back", 30);
        models.until("watched", again, missing).await?;
        Ok(())
    })
    .await
}
