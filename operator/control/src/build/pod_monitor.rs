//! The PodMonitor: where the Prometheus Operator finds the metrics of the pods, those that do not serve yet
//! included.

use kube::core::{DynamicObject, TypeMeta};
use serde_json::json;
use trustformers_crds::Monitoring;

use super::service_monitor::metadata;
use crate::kinds::POD_MONITOR;
use crate::names;
use crate::validate::ValidatedModel;

pub(super) fn pod_monitor(model: &ValidatedModel, settings: &Monitoring) -> DynamicObject {
    let selector = json!({"matchLabels": names::model_labels(&model.name)});
    let endpoint = json!({"port": "http", "path": "/metrics", "interval": settings.interval});
    DynamicObject {
        types: Some(TypeMeta { api_version: POD_MONITOR.api_version(), kind: POD_MONITOR.kind.to_owned() }),
        metadata: metadata(model, settings),
        data: json!({"spec": {"selector": selector, "podMetricsEndpoints": [endpoint]}}),
    }
}
