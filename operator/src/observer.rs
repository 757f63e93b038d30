//! Listens to every running pod of every model: one `WatchModels` stream each, so that a state that a pod reports is in
//! the model's status within a second, with no request to the API server in between.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep};
use tonic::transport::{Channel, Endpoint, Uri};
use trustformers_control::names;
use trustformers_control::pods::PodView;
use trustformers_proto::v1::WatchModelsRequest;
use trustformers_proto::v1::model_service_client::ModelServiceClient;

use crate::world::World;

/// Progress alone wakes a reconcile at most this often.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// A connection to a pod that takes longer is tried again.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// One start of one pod: a new address is a new stream.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Target {
    namespace: String,
    model: String,
    uid: String,
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

/// Keeps one stream open for each running pod, for ever.
pub async fn run(world: Arc<World>) {
    let mut streams: HashMap<Target, AbortHandle> = HashMap::new();
    // Dropping the set ends every stream with this task.
    let mut tasks = JoinSet::new();
    loop {
        world.pods_changed.notified().await;
        let wanted: HashSet<Target> =
            world.caches.pods.state().iter().filter_map(|pod| Target::of(pod)).collect();
        streams.retain(|target, stream| {
            let keep = wanted.contains(target);
            if !keep {
                stream.abort();
            }
            keep
        });
        for target in wanted {
            streams
                .entry(target)
                .or_insert_with_key(|target| tasks.spawn(listen(Arc::clone(&world), target.clone())));
        }
        while tasks.try_join_next().is_some() {}
        world.metrics.observed_pods.set(i64::try_from(streams.len()).unwrap_or(i64::MAX));
    }
}

/// Listens to one pod, and connects again whenever the stream ends.
async fn listen(world: Arc<World>, target: Target) {
    let Some(uri) = target.uri() else { return };
    let channel = Endpoint::from(uri)
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(5))
        .keep_alive_while_idle(true)
        .connect_lazy();
    let mut pause = FIRST_PAUSE;
    loop {
        match follow(&world, &target, channel.clone()).await {
            Ok(()) => pause = FIRST_PAUSE,
            Err(status) => {
                tracing::debug!(pod = target.uid, %status, "no stream from the pod");
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
        sleep(pause).await;
    }
}

/// Follows one stream to its end. An error is one that came before any message.
async fn follow(world: &World, target: &Target, channel: Channel) -> Result<(), tonic::Status> {
    let mut client = ModelServiceClient::new(channel);
    let mut stream = client.watch_models(WatchModelsRequest {}).await?.into_inner();
    let mut told = None::<Instant>;
    let mut heard_any = false;
    loop {
        let message = match stream.message().await {
            Ok(Some(message)) => message,
            Ok(None) => return Ok(()),
            Err(_) if heard_any => return Ok(()),
            Err(status) => return Err(status),
        };
        heard_any = true;
        // A pod holds one model.
        let Some(report) = message.models.into_iter().next() else { continue };
        let news = world.heard(&target.uid, report);
        if news || told.is_none_or(|told| told.elapsed() >= PROGRESS_EVERY) {
            told = Some(Instant::now());
            world.reconcile_soon(&target.namespace, &target.model).await;
            // The table names the digest.
            world.routes_changed.notify_one();
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
    fn only_running_pods_with_an_address_are_listened_to() {
        let running = "containerStatuses: [{name: runtime, ready: false, restartCount: 0, image: i, imageID: '', state: {running: {}}}]";
        let target = Target::of(&pod(&format!("{{podIP: 'fd00::1', {running}}}"))).unwrap();
        assert_eq!(target.uri().unwrap().to_string(), "http://[fd00::1]:9090/");
        assert_eq!(Target::of(&pod(&format!("{{{running}}}"))), None);
        assert_eq!(Target::of(&pod("{podIP: 10.0.0.1}")), None);
        assert_eq!(Target::of(&pod(&format!("{{podIP: 10.0.0.1, phase: Failed, {running}}}"))), None);
    }
}
