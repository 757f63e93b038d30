//! Observes every running pod of every model by one `WatchModels` stream each, so that a state that a pod
//! reports is in the model's status within a second, without a request to the API server in between.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use k8s_openapi::api::core::v1::Pod;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep};
use tonic::transport::{Channel, Endpoint, Uri};
use trustformers_control::names;
use trustformers_control::pods::PodView;
use trustformers_proto::v1::WatchModelsRequest;
use trustformers_proto::v1::model_service_client::ModelServiceClient;

use crate::context::Context;
use crate::reconcile::status::PROGRESS_INTERVAL;

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Limit on one attempt to connect to a pod.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// One start of one pod: a restart or a new address is a new stream.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Target {
    namespace: String,
    model: String,
    uid: String,
    restarts: u32,
    address: IpAddr,
}

impl Target {
    fn of(pod: &Pod) -> Option<Self> {
        let view = PodView::of(pod).filter(|view| view.running && !view.ended)?;
        Some(Self {
            address: view.address?.parse().ok()?,
            namespace: view.namespace,
            model: view.model,
            uid: view.uid,
            restarts: view.restarts,
        })
    }

    fn uri(&self) -> Option<Uri> {
        let host = match self.address {
            IpAddr::V4(address) => address.to_string(),
            IpAddr::V6(address) => format!("[{address}]"),
        };
        format!("http://{host}:{}", names::GRPC_PORT).parse().ok()
    }
}

/// Keeps one stream open for each running pod, without end.
pub async fn run(context: Arc<Context>) {
    let mut streams: HashMap<Target, AbortHandle> = HashMap::new();
    // Dropping the set ends every stream with this task.
    let mut tasks = JoinSet::new();
    loop {
        context.pods_changed.notified().await;
        let running: HashSet<Target> =
            context.pods.state().iter().filter_map(|pod| Target::of(pod)).collect();
        streams.retain(|target, stream| {
            let runs = running.contains(target);
            if !runs {
                stream.abort();
            }
            runs
        });
        // A report that a stream recorded while it was aborted is dropped in the next pass.
        context.retain_pods(&running.iter().map(|target| target.uid.as_str()).collect());
        for target in running {
            streams
                .entry(target)
                .or_insert_with_key(|target| tasks.spawn(observe(Arc::clone(&context), target.clone())));
        }
        while tasks.try_join_next().is_some() {}
        context.metrics.observed_pods.set(i64::try_from(streams.len()).unwrap_or(i64::MAX));
    }
}

/// Observes one pod, and connects again when the stream ends.
async fn observe(context: Arc<Context>, target: Target) {
    let Some(uri) = target.uri() else { return };
    let channel = Endpoint::from(uri)
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(5))
        .keep_alive_while_idle(true)
        .connect_lazy();
    let backoff = ExponentialBuilder::default()
        .with_min_delay(FIRST_PAUSE)
        .with_max_delay(LONGEST_PAUSE)
        .without_max_times();
    let mut pauses = backoff.build();
    loop {
        match follow(&context, &target, channel.clone()).await {
            Ok(()) => pauses = backoff.build(),
            Err(status) => tracing::debug!(pod = target.uid, %status, "no stream from the pod"),
        }
        sleep(pauses.next().unwrap_or(LONGEST_PAUSE)).await;
    }
}

/// Follows one stream to its end. An error is returned only if no message arrived before.
async fn follow(context: &Context, target: &Target, channel: Channel) -> Result<(), tonic::Status> {
    let mut client = ModelServiceClient::new(channel);
    let mut stream = client.watch_models(WatchModelsRequest {}).await?.into_inner();
    let mut requested = None::<Instant>;
    let mut received_any = false;
    loop {
        let message = match stream.message().await {
            Ok(Some(message)) => message,
            Ok(None) => return Ok(()),
            Err(_) if received_any => return Ok(()),
            Err(status) => return Err(status),
        };
        received_any = true;
        // A pod has one model.
        let Some(report) = message.models.into_iter().next() else { continue };
        let changed = context.record_report(&target.uid, target.restarts, report);
        // Progress alone is written at most this often.
        if changed || requested.is_none_or(|at| at.elapsed() >= PROGRESS_INTERVAL) {
            requested = Some(Instant::now());
            context.request_reconcile(&target.namespace, &target.model).await;
        }
        if changed {
            // The table contains the digest.
            context.routes_changed.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(status: &str) -> Pod {
        serde_yaml::from_str(&format!(
            "metadata: {{name: p, namespace: team, uid: u, labels: {{serving.trustformers.dev/model: chat, serving.trustformers.dev/revision: r}}}}\nstatus: {status}\n"
        ))
        .unwrap()
    }

    #[test]
    fn only_running_pods_with_an_address_are_observed() {
        let running = "containerStatuses: [{name: runtime, ready: false, restartCount: 0, image: i, imageID: '', state: {running: {}}}]";
        let target = Target::of(&pod(&format!("{{podIP: 'fd00::1', {running}}}"))).unwrap();
        assert_eq!(target.uri().unwrap().to_string(), "http://[fd00::1]:9090/");
        assert_eq!(Target::of(&pod(&format!("{{{running}}}"))), None);
        assert_eq!(Target::of(&pod("{podIP: 10.0.0.1}")), None);
        assert_eq!(Target::of(&pod(&format!("{{podIP: 10.0.0.1, phase: Failed, {running}}}"))), None);
    }
}
