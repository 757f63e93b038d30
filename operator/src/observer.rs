//! Observes pods of models by one `WatchModels` stream each, while something about them is expected to
//! change: a model loads, a rollout goes on, or the pod has not said yet what it serves. So a state that a
//! pod reports is in the model's status within a second, without a request to the API server in between, and
//! a pod that serves costs nothing.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;
use trustformers_control::names;
use trustformers_control::pods::PodView;
use trustformers_control::routes::ModelKey;
use trustformers_control::status::PodReport;
use trustformers_crds::InferenceModel;
use trustformers_proto::v1::model_service_client::ModelServiceClient;
use trustformers_proto::v1::{ModelSlot, ModelState, WatchModelsRequest};

use crate::changes::Marked;
use crate::context::Context;
use crate::pod_admin;
use crate::queue::Lane;
use crate::reconcile::status::PROGRESS_INTERVAL;

const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause while a container starts: its state is known within a second.
const START_PAUSE: Duration = Duration::from_secs(1);
/// Attempts with [`START_PAUSE`] at most. After them the pod is expected to answer late or never.
const START_ATTEMPTS: u32 = 20;
/// The longest pause between attempts to reach a pod that does not serve.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// The longest pause for a pod that serves and whose stream cannot be opened.
const SERVING_PAUSE: Duration = Duration::from_secs(600);
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
    fn of(view: &PodView) -> Option<Self> {
        if !view.running || view.ended {
            return None;
        }
        Some(Self {
            address: view.address.as_ref()?.parse().ok()?,
            namespace: view.namespace.clone(),
            model: view.model.clone(),
            uid: view.uid.clone(),
            restarts: view.restarts,
        })
    }

    fn uri(&self) -> Option<Uri> {
        pod_admin::uri(self.address, names::GRPC_PORT)
    }
}

/// Keeps the streams open that are needed, without end.
pub async fn run(context: Arc<Context>) {
    let mut streams: HashMap<ModelKey, HashMap<Target, AbortHandle>> = HashMap::new();
    let mut open_streams = 0_usize;
    // Dropping the set ends every stream with this task.
    let mut tasks = JoinSet::new();
    loop {
        context.pods_changed.notified().await;
        let models: Vec<ModelKey> = match context.pods_changed.drain() {
            Marked::Models(models) => models.into_iter().collect(),
            Marked::All => streams.keys().cloned().chain(context.pods.models()).collect(),
        };
        for key in models {
            let wanted = wanted(&context, &key);
            let open = streams.entry(key.clone()).or_default();
            open_streams = open_streams.saturating_sub(open.len());
            open.retain(|target, stream| {
                let stays = wanted.contains(target);
                if !stays {
                    stream.abort();
                }
                stays
            });
            for target in wanted {
                open.entry(target)
                    .or_insert_with_key(|target| tasks.spawn(observe(Arc::clone(&context), target.clone())));
            }
            open_streams += open.len();
            if open.is_empty() {
                streams.remove(&key);
            }
        }
        while tasks.try_join_next().is_some() {}
        context.metrics.observed_pods.set(i64::try_from(open_streams).unwrap_or(i64::MAX));
    }
}

/// The pods of a model to observe now.
fn wanted(context: &Context, key: &ModelKey) -> HashSet<Target> {
    let changes = context.pods.is_asked(key) || context.model(key).is_some_and(|model| is_changing(&model));
    let pods = context.pods.of_model(key);
    let wanted = pods.iter().map(|pod| &pod.view).filter(|pod| {
        let report = context.pods.report(pod);
        changes || !is_settled(pod, report.as_ref())
    });
    wanted.filter_map(Target::of).collect()
}

/// Whether what the pods of a model load is about to change.
fn is_changing(model: &InferenceModel) -> bool {
    let Some(status) = &model.status else { return true };
    status.observed_generation != model.metadata.generation
        || status.candidate.is_some()
        || status.rollout.as_ref().is_some_and(|rollout| !rollout.retiring.is_empty())
}

/// Whether a pod serves, has said what, and loads or ends nothing beside it.
fn is_settled(pod: &PodView, report: Option<&PodReport>) -> bool {
    let rests = |slot: &ModelSlot| matches!(slot.state(), ModelState::Ready | ModelState::Failed);
    pod.ready
        && report.is_some_and(|report| {
            report.model.state() == ModelState::Ready && report.model.slots.iter().all(rests)
        })
}

/// Observes one pod, and connects again when the stream ends.
async fn observe(context: Arc<Context>, target: Target) {
    let Some(uri) = target.uri() else { return };
    let key = (target.namespace.clone(), target.model.clone());
    let mut attempt = 0;
    loop {
        // Boxed, so that a task that waits is small: there may be one for each pod.
        match Box::pin(follow(&context, &target, uri.clone())).await {
            Ok(()) => attempt = 0,
            Err(status) => tracing::debug!(pod = target.uid, %status, "no stream from the pod"),
        }
        let pods = context.pods.of_model(&key);
        let serves = pods.iter().any(|pod| pod.view.uid == target.uid && pod.view.ready);
        sleep(pause(attempt, serves)).await;
        attempt = attempt.saturating_add(1);
    }
}

/// The pause after this many failed attempts: at first short, because a container that starts is about to
/// answer, then twice as long each time. A pod that serves and does not answer is looked at less: four times
/// as long each time.
fn pause(attempt: u32, serves: bool) -> Duration {
    let doubled =
        |from: Duration, times: u32| from.saturating_mul(1_u32.checked_shl(times).unwrap_or(u32::MAX));
    if serves {
        return doubled(START_PAUSE, attempt.saturating_mul(2)).min(SERVING_PAUSE);
    }
    match attempt.checked_sub(START_ATTEMPTS) {
        None => doubled(FIRST_PAUSE, attempt).min(START_PAUSE),
        Some(late) => doubled(START_PAUSE, late).min(LONGEST_PAUSE),
    }
}

/// A channel over one new connection. A pod that cannot be reached costs one connection attempt and no
/// channel: while many models start, most attempts are made before the container listens.
async fn channel(address: SocketAddr, uri: Uri) -> Result<Channel, tonic::Status> {
    let unavailable = |error: &dyn std::error::Error| tonic::Status::unavailable(error.to_string());
    let connection = timeout(CONNECT_TIMEOUT, TcpStream::connect(address))
        .await
        .map_err(|late| unavailable(&late))?
        .map_err(|error| unavailable(&error))?;
    connection.set_nodelay(true).map_err(|error| unavailable(&error))?;
    let mut connection = Some(TokioIo::new(connection));
    // A channel that has lost its connection is not used again: `observe` makes another one.
    let connect_once = service_fn(move |_: Uri| {
        let connected = connection.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
        async move { connected }
    });
    Endpoint::from(uri)
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(5))
        .keep_alive_while_idle(true)
        .connect_with_connector(connect_once)
        .await
        .map_err(|error| unavailable(&error))
}

/// Follows one stream to its end. An error is returned only if no message arrived before.
async fn follow(context: &Context, target: &Target, uri: Uri) -> Result<(), tonic::Status> {
    let channel = channel(SocketAddr::new(target.address, names::GRPC_PORT), uri).await?;
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
            context.request(&target.namespace, &target.model, Lane::Child);
        }
        if changed {
            let key = (target.namespace.clone(), target.model.clone());
            // The table contains the digest.
            context.routes_changed.mark(&key);
            // A pod that has said what it serves needs no stream.
            context.pods_changed.mark(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::Pod;
    use trustformers_proto::v1::ModelStatus;

    fn pod(status: &str) -> PodView {
        let pod: Pod = serde_yaml::from_str(&format!(
            "metadata: {{name: p, namespace: team, uid: u, labels: {{serving.trustformers.dev/model: chat, serving.trustformers.dev/revision: r}}}}\nstatus: {status}\n"
        ))
        .unwrap();
        PodView::of(&pod).unwrap()
    }

    const RUNNING: &str = "containerStatuses: [{name: runtime, ready: false, restartCount: 0, image: i, imageID: '', state: {running: {}}}]";

    #[test]
    fn only_running_pods_with_an_address_are_observed() {
        let target = Target::of(&pod(&format!("{{podIP: 'fd00::1', {RUNNING}}}"))).unwrap();
        assert_eq!(target.uri().unwrap().to_string(), "http://[fd00::1]:9090/");
        assert_eq!(Target::of(&pod(&format!("{{{RUNNING}}}"))), None);
        assert_eq!(Target::of(&pod("{podIP: 10.0.0.1}")), None);
        assert_eq!(Target::of(&pod(&format!("{{podIP: 10.0.0.1, phase: Failed, {RUNNING}}}"))), None);
    }

    #[test]
    fn a_pod_that_serves_and_has_said_what_needs_no_stream() {
        let ready =
            pod(&format!("{{podIP: 10.0.0.1, {RUNNING}, conditions: [{{type: Ready, status: 'True'}}]}}"));
        let report = |state: ModelState| PodReport {
            model: ModelStatus { state: state as i32, ..ModelStatus::default() },
            ..PodReport::default()
        };
        assert!(is_settled(&ready, Some(&report(ModelState::Ready))));
        assert!(!is_settled(&ready, None), "a new leader does not know yet what it serves");
        assert!(!is_settled(&ready, Some(&report(ModelState::Loading))));
        let unready = PodView { ready: false, ..ready };
        assert!(!is_settled(&unready, Some(&report(ModelState::Ready))));
    }

    #[test]
    fn pods_are_observed_while_their_model_changes() {
        let model = |status: &str| -> InferenceModel {
            serde_yaml::from_str(&format!(
                "apiVersion: serving.trustformers.dev/v1alpha1\nkind: InferenceModel\n\
                 metadata: {{name: chat, namespace: team, generation: 2}}\n\
                 spec: {{source: {{uri: 'oci://x'}}}}\n{status}\n"
            ))
            .unwrap()
        };
        assert!(is_changing(&model("")));
        assert!(is_changing(&model("status: {observedGeneration: 1}")));
        assert!(!is_changing(&model("status: {observedGeneration: 2}")));
        let candidate = "{revision: r, weight: 0, step: 0, since: '2026-01-01T00:00:00Z'}";
        assert!(is_changing(&model(&format!("status: {{observedGeneration: 2, candidate: {candidate}}}"))));
    }

    #[tokio::test]
    async fn a_pod_that_refuses_connections_is_unavailable() {
        // Nobody listens there: the port is free again.
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let uri = pod_admin::uri(address.ip(), address.port()).unwrap();
        let status = channel(address, uri).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");
    }

    #[test]
    fn a_pod_that_never_answers_is_tried_less_and_less() {
        let pauses = |serves| (0..60).map(|attempt| pause(attempt, serves)).collect::<Vec<_>>();
        let starting = pauses(false);
        assert!(starting[..20].iter().all(|pause| *pause <= START_PAUSE), "{starting:?}");
        assert_eq!((starting[0], starting[59]), (FIRST_PAUSE, LONGEST_PAUSE));
        assert_eq!(pauses(true)[..4], [1, 4, 16, 64].map(Duration::from_secs));
        assert_eq!(pauses(true)[59], SERVING_PAUSE);
        assert!(starting.is_sorted() && pauses(true).is_sorted());
    }
}
