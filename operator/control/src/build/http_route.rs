//! The HTTPRoute: by which host names callers outside of the cluster reach the model.
//!
//! It leads to the gateways of the release and not to the pods, so that shares, retries and holding are the
//! same for every caller. The gateways' Service is in another namespace: a ReferenceGrant there has to allow
//! it, which whoever runs the release gives.

use kube::core::{DynamicObject, TypeMeta};
use serde_json::{Value, json};
use trustformers_crds::{GatewayRef, RouteSettings};
use trustformers_proto::MODEL_HEADER;

use super::{GatewayService, Platform, meta};
use crate::kinds::HTTP_ROUTE;
use crate::validate::ValidatedModel;

/// The services of gRPC that gateways offer. Their paths begin with the name of the service, and proxies
/// speak HTTP/2 to a port only where its Service says so.
const GRPC_SERVICES: [&str; 7] = [
    "trustformers.v1.InferenceService",
    "trustformers.v1.ModelService",
    "trustformers.v1.HealthService",
    "inference.GRPCInferenceService",
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
];

pub(super) fn http_route(
    model: &ValidatedModel,
    settings: &RouteSettings,
    platform: &Platform,
) -> DynamicObject {
    let GatewayService { name, http_port, grpc_port } = &platform.gateway;
    let parents: Vec<Value> = settings.parent_refs.iter().map(parent).collect();
    let named = format!("{}/{}", model.namespace, model.name);
    let header = json!({"name": MODEL_HEADER, "value": named});
    let filter = json!({"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [header]}});
    let rule = |prefixes: &[String], port: u16| {
        let path = |prefix: &String| json!({"path": {"type": "PathPrefix", "value": prefix}});
        let matches: Vec<Value> = prefixes.iter().map(path).collect();
        let backend = json!({"name": name, "namespace": platform.namespace, "port": port});
        json!({"matches": matches, "filters": [filter], "backendRefs": [backend]})
    };
    let services: Vec<String> = GRPC_SERVICES.iter().map(|service| format!("/{service}")).collect();
    let rules = [rule(&services, *grpc_port), rule(&["/".to_owned()], *http_port)];
    DynamicObject {
        types: Some(TypeMeta { api_version: HTTP_ROUTE.api_version(), kind: HTTP_ROUTE.kind.to_owned() }),
        metadata: meta(model, &model.name),
        data: json!({"spec": {"parentRefs": parents, "hostnames": settings.hostnames, "rules": rules}}),
    }
}

fn parent(one: &GatewayRef) -> Value {
    let mut parent = json!({"name": one.name});
    for (field, value) in [("namespace", &one.namespace), ("sectionName", &one.section_name)] {
        if let Some(value) = value {
            parent[field] = json!(value);
        }
    }
    parent
}
