//! An HTTPRoute and a PodMonitor of a model: each is made as soon as its definition is installed, and not
//! later than that of the other. No Gateway runs here: the test writes what one would report.

use anyhow::{Context, Result};
use kube::{
    Api,
    api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams},
};
use serde_json::{Value, json};
use trustformers_e2e::{
    model::{SMOLLM2, condition},
    scenario::{Scenario, run},
    wait::Until,
};

/// A kind that the cluster does not have yet.
struct OptionalKind {
    group: &'static str,
    kind: &'static str,
    plural: &'static str,
}

const POD_MONITOR: OptionalKind =
    OptionalKind { group: "monitoring.coreos.com", kind: "PodMonitor", plural: "podmonitors" };
const HTTP_ROUTE: OptionalKind =
    OptionalKind { group: "gateway.networking.k8s.io", kind: "HTTPRoute", plural: "httproutes" };

impl OptionalKind {
    fn definition(&self) -> String {
        format!("{}.{}", self.plural, self.group)
    }

    /// Installs no more of the definition than objects of the kind need.
    async fn install(&self, scenario: &Scenario) -> Result<()> {
        let definition = json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": self.definition(),
                // The API server takes definitions of its own projects only with a word about their review.
                "annotations": {"api-approved.kubernetes.io": "unapproved, for a test"}},
            "spec": {
                "group": self.group, "scope": "Namespaced",
                "names": {"kind": self.kind, "plural": self.plural, "singular": self.kind.to_lowercase()},
                "versions": [{"name": "v1", "served": true, "storage": true, "subresources": {"status": {}},
                    "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}],
            },
        });
        let apply = ["apply", "--filename=-"];
        scenario.cluster.kubectl(&apply).input(definition.to_string()).stdout().await?;
        Ok(())
    }

    async fn remove(&self, scenario: &Scenario) -> Result<()> {
        let name = self.definition();
        let remove = ["delete", "customresourcedefinition", "--ignore-not-found", &name];
        scenario.cluster.kubectl(&remove).stdout().await?;
        Ok(())
    }

    fn objects(&self, scenario: &Scenario) -> Api<DynamicObject> {
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(self.group, "v1", self.kind));
        Api::namespaced_with(scenario.cluster.client.clone(), &scenario.namespace, &resource)
    }
}

#[tokio::test]
async fn a_route_and_a_pod_monitor_are_made_when_their_definitions_are_installed() -> Result<()> {
    run("route-and-pod-monitor", async |scenario| {
        // Given: a model that asks for both, in a cluster that knows neither.
        let spec = json!({
            "source": {"uri": SMOLLM2},
            "scaling": {"replicas": 0},
            "monitoring": {"podMonitor": true, "interval": "15s"},
            "route": {"hostnames": ["chat.example.com"], "parentRefs": [{"name": "public", "namespace": "edge"}]},
        });
        scenario.models().apply("watched", spec).await?;
        let named = Until::new("a condition names the definitions that are missing", 15);
        let missing = |model: &_| condition(model, "Integrated").filter(|it| it.status == "False");
        let integrated = scenario.models().until("watched", named, missing).await?;
        for kind in [&POD_MONITOR, &HTTP_ROUTE] {
            assert!(integrated.message.contains(&kind.definition()), "{integrated:?}");
        }
        let outcome = installed(scenario).await;
        for kind in [&POD_MONITOR, &HTTP_ROUTE] {
            kind.remove(scenario).await?;
        }
        outcome?;

        // And: without the definitions the condition is back, and the one about Gateways is gone.
        let again = Until::new("the condition is back", 30);
        let is_back = |model: &_| missing(model).filter(|_| condition(model, "Exposed").is_none());
        scenario.models().until("watched", again, is_back).await?;
        Ok(())
    })
    .await
}

async fn installed(scenario: &Scenario) -> Result<()> {
    // When: the definition of HTTPRoutes is installed. Then: the route is made, though the other is missing.
    HTTP_ROUTE.install(scenario).await?;
    let routes = HTTP_ROUTE.objects(scenario);
    let made = Until::new("the HTTPRoute exists", 60);
    let route = made.object(routes.clone(), "watched", |found| found.cloned()).await?;
    let spec = &route.data["spec"];
    assert_eq!(spec["hostnames"], json!(["chat.example.com"]));
    assert_eq!(spec["parentRefs"], json!([{"name": "public", "namespace": "edge"}]));
    let rules = spec["rules"].as_array().context("the route has no rules")?;
    let backends: Vec<&Value> = rules.iter().map(|rule| &rule["backendRefs"][0]["name"]).collect();
    assert_eq!(backends, ["trustformers-gateway", "trustformers-gateway"]);
    let waits = Until::new("no Gateway has answered", 15);
    let waiting = |model: &_| condition(model, "Exposed").filter(|it| it.reason == "Waiting");
    scenario.models().until("watched", waits, waiting).await?;

    // When: a Gateway refuses the route, and then takes it. Then: the model says so.
    for (status, reason) in [("False", "RefNotPermitted"), ("True", "Accepted")] {
        let reported = json!({"status": {"parents": [{
            "parentRef": {"name": "public"}, "controllerName": "example.com/test",
            "conditions": [{"type": "ResolvedRefs", "status": status, "reason": reason, "message": "said the test"}],
        }]}});
        routes.patch_status("watched", &PatchParams::default(), &Patch::Merge(&reported)).await?;
        let told = Until::new("the model says what the Gateway reports", 15);
        let is_told =
            |model: &_| condition(model, "Exposed").filter(|it| it.status == status && it.reason == reason);
        scenario.models().until("watched", told, is_told).await?;
    }

    // When: the definition of PodMonitors is installed. Then: nothing is missing any more.
    POD_MONITOR.install(scenario).await?;
    let made = Until::new("the PodMonitor exists", 60);
    let monitor = made.object(POD_MONITOR.objects(scenario), "watched", |found| found.cloned()).await?;
    assert_eq!(
        monitor.data["spec"]["podMetricsEndpoints"],
        json!([{"port": "http", "path": "/metrics", "interval": "15s"}])
    );
    let gone = Until::new("the condition is gone", 15);
    let is_gone = |model: &_| condition(model, "Integrated").is_none().then_some(());
    scenario.models().until("watched", gone, is_gone).await?;
    Ok(())
}
