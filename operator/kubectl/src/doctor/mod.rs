//! `doctor`: reads what an installation consists of, checks it, and says what to do about what is wrong.
//!
//! Requests are here; what they show is decided by the pure functions of [`checks`] and [`definitions`].

pub mod checks;
pub mod definitions;

use std::future::Future;
use std::process::ExitCode;

use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Event, Pod};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ListParams, PostParams};
use kube::{Api, CustomResourceExt, ResourceExt};
use serde_json::json;
use trustformers_crds::names::{GATEWAY_SELECTOR, MANAGED_SELECTOR, OPERATOR_LEASE, OPERATOR_SELECTOR};
use trustformers_crds::{ABTest, GROUP, InferenceModel};

use crate::args::DoctorArgs;
use crate::cluster::{Cluster, CommandError, answered};
use crate::output;
use checks::{Facts, GatewayEvent, ImageVolumes, LeaseFacts, RightFacts};
use definitions::DefinitionFacts;

/// What the commands of the plugin do: group, resource, subresource, verb and namespace of each.
const RIGHTS: [RightNeeded; 12] = [
    right(GROUP, "inferencemodels", "", "get", Where::Models),
    right(GROUP, "inferencemodels", "", "list", Where::Models),
    right(GROUP, "inferencemodels", "", "watch", Where::Models),
    right(GROUP, "inferencemodels", "", "patch", Where::Models),
    right(GROUP, "abtests", "", "get", Where::Models),
    right("", "configmaps", "", "get", Where::Models),
    right("", "pods", "", "list", Where::Models),
    right("", "pods", "", "watch", Where::Models),
    right("", "pods", "log", "get", Where::Models),
    right("", "pods", "", "list", Where::System),
    right("", "events", "", "list", Where::System),
    right("coordination.k8s.io", "leases", "", "get", Where::System),
];

/// The namespace of a right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Where {
    /// That of the command.
    Models,
    /// That of the operator.
    System,
}

/// A right that a command needs.
#[derive(Debug, Clone, Copy)]
struct RightNeeded {
    group: &'static str,
    resource: &'static str,
    subresource: &'static str,
    verb: &'static str,
    namespace: Where,
}

const fn right(
    group: &'static str,
    resource: &'static str,
    subresource: &'static str,
    verb: &'static str,
    namespace: Where,
) -> RightNeeded {
    RightNeeded { group, resource, subresource, verb, namespace }
}

/// Runs the command.
///
/// # Errors
/// When the API server cannot be reached at all. What a person may not read is a check that says so.
pub async fn run(cluster: &Cluster, args: &DoctorArgs) -> Result<ExitCode, CommandError> {
    let server = answered("the version of the API server", cluster.client.apiserver_version()).await?;
    let facts = Facts { server: server.git_version, ..gather(cluster, &args.system_namespace).await };
    let found = checks::checks(&facts);
    output::print(args.format.output, &found, |found| checks::text(found))?;
    Ok(if checks::failed(&found) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// A result whose error is shown.
async fn readable<T>(what: &str, request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, String> {
    answered(what, request).await.map_err(|error| error.to_string())
}

async fn gather(cluster: &Cluster, system: &str) -> Facts {
    let client = || cluster.client.clone();
    let pods = Api::<Pod>::namespaced(client(), system);
    let by = |selector: &str| ListParams::default().labels(selector);
    let operators = readable("pods of the operator", pods.list(&by(OPERATOR_SELECTOR))).await;
    let gateways = readable("pods of the gateways", pods.list(&by(GATEWAY_SELECTOR))).await;
    let lease = Api::<Lease>::namespaced(client(), system);
    let lease = readable("the operator's Lease", lease.get_opt(OPERATOR_LEASE)).await;
    let of_gateways = ListParams::default().fields("reason=GatewayLeftOut");
    let events = Api::<Event>::namespaced(client(), system);
    let events = readable("Events of gateways", events.list(&of_gateways)).await;
    // A person who may not list every namespace sees those of the command.
    let everywhere = Api::<InferenceModel>::all(client());
    let models = match readable("InferenceModels", everywhere.list(&ListParams::default())).await {
        Ok(models) => Ok(models),
        Err(_) => {
            let own = cluster.api::<InferenceModel>();
            readable("InferenceModels", own.list(&ListParams::default())).await
        }
    };
    let model_pods = Api::<Pod>::all(client());
    let model_pods = match readable("pods of models", model_pods.list(&by(MANAGED_SELECTOR))).await {
        Ok(pods) => Ok(pods),
        Err(_) => readable("pods of models", cluster.api::<Pod>().list(&by(MANAGED_SELECTOR))).await,
    };
    Facts {
        server: String::new(),
        system_namespace: system.to_owned(),
        definitions: vec![
            definition(cluster, InferenceModel::crd()).await,
            definition(cluster, ABTest::crd()).await,
        ],
        lease: lease.map(|lease| lease.map(|lease| LeaseFacts::of(&lease))),
        operators: operators.map(|list| list.items),
        gateways: gateways.map(|list| list.items),
        gateway_events: events.map(|list| list.items.iter().map(GatewayEvent::of).collect()),
        rights: rights(cluster, system).await,
        models: models.map(|list| list.items),
        model_pods: model_pods.map(|list| list.items),
        image_volumes: image_volumes(cluster).await,
        now: Timestamp::now(),
    }
}

async fn definition(cluster: &Cluster, own: CustomResourceDefinition) -> DefinitionFacts {
    let api = Api::<CustomResourceDefinition>::all(cluster.client.clone());
    let name = own.name_any();
    let installed = readable(&format!("CustomResourceDefinition {name}"), api.get_opt(&name)).await;
    DefinitionFacts { name, own: Box::new(own), installed: installed.map(|found| found.map(Box::new)) }
}

async fn rights(cluster: &Cluster, system: &str) -> Vec<RightFacts> {
    let reviews = Api::<SelfSubjectAccessReview>::all(cluster.client.clone());
    let mut rights = Vec::new();
    for needed in RIGHTS {
        let namespace = match needed.namespace {
            Where::Models => cluster.namespace.as_str(),
            Where::System => system,
        };
        let text = |value: &str| Some(value.to_owned()).filter(|value| !value.is_empty());
        let attributes = ResourceAttributes {
            group: text(needed.group),
            resource: text(needed.resource),
            subresource: text(needed.subresource),
            verb: text(needed.verb),
            namespace: text(namespace),
            ..ResourceAttributes::default()
        };
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(attributes),
                ..SelfSubjectAccessReviewSpec::default()
            },
            ..SelfSubjectAccessReview::default()
        };
        let answer = readable("your rights", reviews.create(&PostParams::default(), &review)).await;
        let resource = [needed.resource, needed.subresource].join("/");
        rights.push(RightFacts {
            verb: needed.verb,
            resource: resource.trim_end_matches('/').to_owned(),
            namespace: namespace.to_owned(),
            allowed: answer.map(|answer| answer.status.is_some_and(|status| status.allowed)),
        });
    }
    rights
}

/// Whether the API server keeps an image volume: without the feature gate it drops the field. Nothing is
/// created.
async fn image_volumes(cluster: &Cluster) -> ImageVolumes {
    let pod = json!({
        "metadata": {"generateName": "trustformers-doctor-"},
        "spec": {
            "automountServiceAccountToken": false,
            "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "none", "image": "localhost/none",
                "resources": {"requests": {"cpu": "1m", "memory": "1Mi"}, "limits": {"cpu": "1m", "memory": "1Mi"}},
                "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": [{"name": "model", "mountPath": "/model", "readOnly": true}],
            }],
            "volumes": [{"name": "model", "image": {"reference": "localhost/none"}}],
        },
    });
    let pod: Pod = match serde_json::from_value(pod) {
        Ok(pod) => pod,
        Err(error) => return ImageVolumes::Unknown(error.to_string()),
    };
    let params = PostParams { dry_run: true, ..PostParams::default() };
    match readable("a trial of an image volume", cluster.api::<Pod>().create(&params, &pod)).await {
        Ok(answer) => ImageVolumes::of(&answer),
        Err(error) => ImageVolumes::of_refusal(error),
    }
}
