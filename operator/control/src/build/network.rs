//! The headless Service and the ServiceAccount of a model's pods.

use k8s_openapi::api::core::v1::{Service, ServiceAccount, ServicePort, ServiceSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::meta;
use crate::names;
use crate::validate::ValidatedModel;

/// Each model has its own account, without a token: the pods make no requests to the API server.
pub(super) fn service_account(model: &ValidatedModel) -> ServiceAccount {
    ServiceAccount {
        metadata: meta(model, &names::service_account(&model.name)),
        automount_service_account_token: Some(false),
        ..ServiceAccount::default()
    }
}

/// A Service without a cluster address: its DNS name resolves to every ready pod.
pub(super) fn headless_service(model: &ValidatedModel) -> Service {
    let port = |name: &str, number: u16, protocol: &str| ServicePort {
        name: Some(name.to_owned()),
        port: i32::from(number),
        target_port: Some(IntOrString::String(name.to_owned())),
        protocol: Some("TCP".to_owned()),
        app_protocol: Some(protocol.to_owned()),
        ..ServicePort::default()
    };
    Service {
        metadata: meta(model, &model.name),
        spec: Some(ServiceSpec {
            cluster_ip: Some("None".to_owned()),
            selector: Some(names::model_labels(&model.name)),
            ports: Some(vec![
                port("http", names::HTTP_PORT, "http"),
                port("grpc", names::GRPC_PORT, "kubernetes.io/h2c"),
            ]),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}
