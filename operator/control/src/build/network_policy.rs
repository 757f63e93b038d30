//! The NetworkPolicy: who reaches the pods of a model.
//!
//! The admin port admits the operator alone. The operator also reads reports at the serving ports. What pods
//! themselves connect to is not limited: they fetch their files. Kubelet's probes come from the pod's own
//! node, which Kubernetes always admits.

use std::collections::BTreeMap;

use k8s_openapi::api::networking::v1::{
    NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use trustformers_crds::{NetworkCallers, NetworkPolicySettings};

use super::{Platform, meta};
use crate::names;
use crate::validate::ValidatedModel;

/// Label with the name of a namespace, which the API server sets.
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

pub(super) fn network_policy(
    model: &ValidatedModel,
    settings: &NetworkPolicySettings,
    platform: &Platform,
) -> NetworkPolicy {
    let serving = vec![port(names::HTTP_PORT), port(names::GRPC_PORT)];
    let mut own = serving.clone();
    own.extend(platform.admin.as_ref().map(|_| port(names::ADMIN_PORT)));
    let rule =
        |from: Option<Vec<NetworkPolicyPeer>>, ports| NetworkPolicyIngressRule { from, ports: Some(ports) };
    let mut ingress = vec![rule(Some(vec![of_release(platform, "operator")]), own)];
    match settings.callers {
        NetworkCallers::Anywhere => ingress.push(rule(None, serving)),
        NetworkCallers::Gateways => {
            let mut callers = vec![of_release(platform, "gateway")];
            if !settings.namespaces.is_empty() {
                callers.push(of_namespaces(&settings.namespaces));
            }
            ingress.push(rule(Some(callers), serving));
        }
    }
    NetworkPolicy {
        metadata: meta(model, &model.name),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(labels(names::model_labels(&model.name))),
            policy_types: Some(vec!["Ingress".to_owned()]),
            ingress: Some(ingress),
            egress: None,
        }),
    }
}

fn port(number: u16) -> NetworkPolicyPort {
    NetworkPolicyPort {
        port: Some(IntOrString::Int(i32::from(number))),
        protocol: Some("TCP".to_owned()),
        end_port: None,
    }
}

fn labels(labels: BTreeMap<String, String>) -> LabelSelector {
    LabelSelector { match_labels: Some(labels), ..LabelSelector::default() }
}

/// The pods of a component of the release, in its namespace.
fn of_release(platform: &Platform, component: &str) -> NetworkPolicyPeer {
    let pods = [("app.kubernetes.io/name", "trustformers"), ("app.kubernetes.io/component", component)];
    let pods = pods.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let namespace = BTreeMap::from([(NAMESPACE_NAME.to_owned(), platform.namespace.clone())]);
    NetworkPolicyPeer {
        namespace_selector: Some(labels(namespace)),
        pod_selector: Some(labels(BTreeMap::from(pods))),
        ip_block: None,
    }
}

fn of_namespaces(namespaces: &[String]) -> NetworkPolicyPeer {
    let any = LabelSelectorRequirement {
        key: NAMESPACE_NAME.to_owned(),
        operator: "In".to_owned(),
        values: Some(namespaces.to_vec()),
    };
    NetworkPolicyPeer {
        namespace_selector: Some(LabelSelector {
            match_expressions: Some(vec![any]),
            ..LabelSelector::default()
        }),
        ..NetworkPolicyPeer::default()
    }
}
