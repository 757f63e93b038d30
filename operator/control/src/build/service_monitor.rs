//! The ServiceMonitor: where the Prometheus Operator finds the metrics of the pods.

use kube::core::{DynamicObject, TypeMeta};
use serde_json::json;
use trustformers_crds::Monitoring;

use super::meta;
use crate::kinds::SERVICE_MONITOR;
use crate::names;
use crate::validate::ValidatedModel;

pub(super) fn service_monitor(model: &ValidatedModel, settings: &Monitoring) -> DynamicObject {
    let own = names::model_labels(&model.name);
    let mut metadata = meta(model, &model.name);
    let mut labels = settings.labels.clone();
    // By these the operator finds it again.
    labels.extend(own.clone());
    metadata.labels = Some(labels);
    let endpoint = json!({"port": "http", "path": "/metrics", "interval": settings.interval});
    DynamicObject {
        types: Some(TypeMeta {
            api_version: SERVICE_MONITOR.api_version(),
            kind: SERVICE_MONITOR.kind.to_owned(),
        }),
        metadata,
        data: json!({"spec": {"selector": {"matchLabels": own}, "endpoints": [endpoint]}}),
    }
}
