//! The ServiceMonitor: where the Prometheus Operator finds the metrics of the pods that serve.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::{DynamicObject, TypeMeta};
use serde_json::json;
use trustformers_crds::Monitoring;

use super::meta;
use crate::kinds::SERVICE_MONITOR;
use crate::names;
use crate::validate::ValidatedModel;

pub(super) fn service_monitor(model: &ValidatedModel, settings: &Monitoring) -> DynamicObject {
    let selector = json!({"matchLabels": names::model_labels(&model.name)});
    let endpoint = json!({"port": "http", "path": "/metrics", "interval": settings.interval});
    DynamicObject {
        types: Some(TypeMeta {
            api_version: SERVICE_MONITOR.api_version(),
            kind: SERVICE_MONITOR.kind.to_owned(),
        }),
        metadata: metadata(model, settings),
        data: json!({"spec": {"selector": selector, "endpoints": [endpoint]}}),
    }
}

/// Metadata of an object that a Prometheus selects by the labels of the settings.
pub(super) fn metadata(model: &ValidatedModel, settings: &Monitoring) -> ObjectMeta {
    let mut labels = settings.labels.clone();
    // By these the operator finds it again.
    labels.extend(names::model_labels(&model.name));
    ObjectMeta { labels: Some(labels), ..meta(model, &model.name) }
}
