//! Reports stored models that this version cannot decode, in their status and by an Event.
//!
//! They were stored by a newer version, for example with a value that this version does not have. Their pods
//! go on serving, and other models are not affected.

use std::sync::Arc;
use std::time::Duration;

use kube::Api;
use kube::api::{Patch, PatchParams};
use kube::core::DeserializeGuard;
use serde_json::json;
use tokio::time::{Instant, sleep};
use trustformers_control::causes::Cause;
use trustformers_control::pods::PodView;
use trustformers_control::routes::ModelKey;
use trustformers_control::status::{Refusal, refused};
use trustformers_control::{events, names};
use trustformers_crds::{InferenceModel, InferenceModelStatus};

use crate::context::{Context, Unreadable, WrittenStatus};
use crate::reconcile::status::now;
use crate::recorder;

/// A pause after a write that failed.
const RETRY: Duration = Duration::from_secs(5);

/// Reports models that cannot be decoded, without end.
pub async fn run(context: Arc<Context>) {
    loop {
        context.unreadable_changed.notified().await;
        for (key, model) in context.unreadable() {
            if let Err(error) = report(&context, &key, &model).await {
                tracing::warn!(model = ?key, %error, "its status could not be written; it is tried again");
                sleep(RETRY).await;
                context.unreadable_changed.notify_one();
            }
        }
    }
}

/// Writes the status of one model, unless it was written already.
pub(crate) async fn report(context: &Context, key: &ModelKey, model: &Unreadable) -> Result<(), kube::Error> {
    let uid = model.metadata.uid.as_deref().unwrap_or_default();
    let message = format!(
        "this version of the operator cannot read the object ({}); upgrade the operator, or correct the field",
        model.error
    );
    let cause = Cause { reason: "Unreadable".to_owned(), message };
    let pods: Vec<PodView> = context.pods.of_model(key).iter().map(|pod| pod.view.clone()).collect();
    let generation = model.metadata.generation.unwrap_or(0);
    let previous = context.memory(key, uid).written.map(|written| written.status).unwrap_or_default();
    let refusal = Refusal { generation, cause: &cause, pods: &pods, now: now() };
    let status = refused(refusal, &previous);
    if status == previous {
        return Ok(());
    }
    tracing::warn!(model = ?key, error = model.error, "a stored InferenceModel cannot be decoded");
    // A merge patch of these fields only: the others are not known and stay.
    let InferenceModelStatus { observed_generation, phase, replicas, ready_replicas, conditions, .. } =
        &status;
    let patch = json!({"metadata": {"uid": uid}, "status": {
        "observedGeneration": observed_generation,
        "phase": phase,
        "replicas": replicas,
        "readyReplicas": ready_replicas,
        "conditions": conditions,
    }});
    let api = Api::<DeserializeGuard<InferenceModel>>::namespaced(context.client.clone(), &key.0);
    let params = PatchParams { field_manager: Some(names::MANAGER.to_owned()), ..PatchParams::default() };
    match api.patch_status(&key.1, &params, &Patch::Merge(patch)).await {
        Ok(_) => context.metrics.count_write("InferenceModelStatus"),
        // It was deleted meanwhile.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => return Ok(()),
        Err(error) => return Err(error),
    }
    let notes = events::between(&previous, &status);
    context.remember(key, uid, |memory| {
        memory.written = Some(WrittenStatus { status, version: None, at: Instant::now() });
    });
    recorder::publish(context, &recorder::about(key, uid), &notes).await;
    Ok(())
}
