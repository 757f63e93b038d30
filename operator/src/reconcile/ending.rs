//! Before a pool is made smaller: tells Kubernetes which of its pods to end first.
//!
//! Pods are asked how many requests they answer, and those that are to end get an annotation. It is written
//! by the subresource `status`, which the operator may write anyway because of readiness gates. Nothing of it
//! stops a scale-down: without it Kubernetes chooses by itself.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use futures::{StreamExt, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use tokio::time::timeout;
use tonic::Request;
use tonic::metadata::MetadataValue;
use tonic::transport::Endpoint;
use trustformers_control::ending::{DELETION_COST, ServingPod, cost, first_to_end, serving_excess};
use trustformers_control::kinds::DEPLOYMENT;
use trustformers_control::names;
use trustformers_control::pods::PodView;
use trustformers_control::rollout::PoolSize;
use trustformers_proto::v1::ListModelsRequest;
use trustformers_proto::v1::model_service_client::ModelServiceClient;
use trustformers_proto::{LOAD_HEADER, REPORT_HEADER};

use super::fetch::Observed;
use super::status::now;
use crate::children::Child;
use crate::context::Context;
use crate::pod_admin;
use crate::requests::patch_status;

/// Pods of one model that are asked at the same time. An answer is waited for 1 s: 1,000 pods take 8 s.
const CONCURRENCY: usize = 128;
/// A pod that does not say within this time how many requests it has counts as busy.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);

/// Marks the pods to end of each pool that is about to get fewer replicas, and some.
pub async fn mark(context: &Context, observed: &Observed, pools: &[PoolSize]) {
    for size in pools.iter().filter(|size| size.replicas > 0 && is_larger(observed, size)) {
        let number = serving_excess(&observed.pods, &size.pool, size.replicas);
        if number == 0 {
            continue;
        }
        let serves = |pod: &&PodView| pod.counts() && pod.ready && pod.revision == size.pool;
        let asked: Vec<_> =
            observed.pods.iter().filter(serves).map(|pod| ask(context, observed, pod)).collect();
        let serving: Vec<ServingPod<'_>> = stream::iter(asked).buffer_unordered(CONCURRENCY).collect().await;
        let cost = cost(now()).to_string();
        let writes: Vec<_> =
            first_to_end(serving, number).into_iter().map(|pod| write(context, pod, &cost)).collect();
        join_all(writes).await;
    }
}

/// Whether the stored Deployment of a pool has more replicas than it should.
fn is_larger(observed: &Observed, size: &PoolSize) -> bool {
    let of_pool = |child: &&Arc<Child>| {
        child.kind == &DEPLOYMENT && child.label(names::REVISION_LABEL) == Some(size.pool.as_str())
    };
    let stored = observed.children.iter().find(of_pool).and_then(|child| child.deployment.as_ref());
    let replicas = stored.and_then(|deployment| deployment.spec.as_ref()?.replicas);
    replicas
        .and_then(|replicas| u32::try_from(replicas).ok())
        .is_some_and(|replicas| replicas > size.replicas)
}

async fn ask<'a>(context: &Context, observed: &'a Observed, pod: &'a PodView) -> ServingPod<'a> {
    let report = observed.reports.get(&pod.uid).map(|report| &report.model);
    ServingPod { pod, report, load: load(context, pod).await }
}

/// How many requests of gateways a pod answers now; none if it does not say.
async fn load(context: &Context, pod: &PodView) -> Option<u32> {
    let address = pod.address.as_deref()?.parse().ok()?;
    let uri = pod_admin::uri(address, context.settings.grpc_port)?;
    let channel = Endpoint::from(uri).connect_timeout(ANSWER_LIMIT).connect_lazy();
    let mut request = Request::new(ListModelsRequest {});
    request.metadata_mut().insert(REPORT_HEADER, MetadataValue::from_static("1"));
    let mut client = ModelServiceClient::new(channel);
    let answer = timeout(ANSWER_LIMIT, client.list_models(request)).await.ok()?.ok()?;
    answer.metadata().get(LOAD_HEADER)?.to_str().ok()?.parse().ok()
}

async fn write(context: &Context, pod: &PodView, cost: &str) {
    // With the UID, the API server refuses a patch for an earlier pod of the name.
    let body = json!({"metadata": {"uid": pod.uid, "annotations": {DELETION_COST: cost}}});
    let (params, patch) = (PatchParams::default(), Patch::Strategic(body));
    match patch_status::<Pod, _>(&context.client, &pod.namespace, &pod.name, &params, &patch).await {
        Ok(_) => context.metrics.count_write("PodStatus"),
        // It is gone, or another pod has its name.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
        Err(error) => tracing::warn!(pod = pod.name, %error, "Kubernetes is not told to end this pod first"),
    }
}
