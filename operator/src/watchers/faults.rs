//! Watches that fail: one whose version the API server has forgotten, and one that is silent while its
//! connection stays open.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::stream;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::time::{Instant, interval, timeout};
use tower::service_fn;

use super::watch_pods;
use crate::context::tests::{metrics, settings};
use crate::context::{Context, NewContext};

/// Longest time in which a watch that says nothing is started again.
const SILENCE_LIMIT: Duration = Duration::from_secs(300);

/// What the API server answers.
enum Answer {
    /// A list, or the events of a watch that ends.
    Whole(Value),
    /// A watch that never says anything and never ends.
    Silent,
}

/// An API server whose answers follow from the number of lists and watches so far.
fn server(answer: impl Fn(usize, usize) -> Answer + Clone + Send + Sync + 'static) -> Client {
    let (lists, watches) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let service = service_fn(move |request: Request<Body>| {
        let is_watch = request.uri().query().unwrap_or_default().contains("watch=true");
        let counter = if is_watch { &watches } else { &lists };
        counter.fetch_add(1, Ordering::Relaxed);
        let answer = answer(lists.load(Ordering::Relaxed), watches.load(Ordering::Relaxed));
        async move { Ok::<_, Infallible>(Response::new(body_of(answer))) }
    });
    Client::new(service, "default")
}

fn body_of(answer: Answer) -> UnsyncBoxBody<Bytes, Infallible> {
    match answer {
        Answer::Whole(value) => Full::new(Bytes::from(value.to_string())).boxed_unsync(),
        Answer::Silent => {
            StreamBody::new(stream::pending::<Result<Frame<Bytes>, Infallible>>()).boxed_unsync()
        }
    }
}

fn pod(version: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {
        "name": "p", "namespace": "team", "uid": "u", "resourceVersion": version,
        "labels": {"serving.trustformers.dev/model": "chat", "serving.trustformers.dev/revision": "r"}}})
}

fn list(version: &str, items: &[Value]) -> Answer {
    let metadata = json!({"resourceVersion": version});
    Answer::Whole(json!({"apiVersion": "v1", "kind": "PodList", "metadata": metadata, "items": items}))
}

/// Watches until the pod is in the cache, and says how long that took.
async fn until_observed(client: Client) -> Duration {
    let NewContext { context, writers, queue: _ } = Context::create(client, settings(), metrics());
    let started = Instant::now();
    let watch = tokio::spawn(watch_pods(Arc::clone(&context), writers.pods));
    let observed = async {
        let mut looks = interval(Duration::from_millis(100));
        while context.pods.is_empty() {
            looks.tick().await;
        }
    };
    timeout(2 * SILENCE_LIMIT, observed).await.expect("the pod is never observed");
    watch.abort();
    started.elapsed()
}

#[tokio::test(start_paused = true)]
async fn a_watch_whose_version_is_gone_lists_again() {
    // The first list has no pod. Its version is gone when the watch starts, and the pod is in the next list.
    let client = server(|lists, watches| match (lists, watches) {
        (1, 0) => list("5", &[]),
        (1, _) => Answer::Whole(json!({"type": "ERROR", "object": {
            "apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure",
            "message": "too old resource version: 5 (90)", "reason": "Expired", "code": 410}})),
        (_, _) if watches < lists => list("90", &[pod("80")]),
        _ => Answer::Silent,
    });
    assert!(until_observed(client).await < Duration::from_secs(30));
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_is_silent_on_an_open_connection_is_started_again() {
    let client = server(|_, watches| match watches {
        0 => list("5", &[]),
        2 => Answer::Whole(json!({"type": "ADDED", "object": pod("6")})),
        // The first, and the one after the pod: one that ended at once would start again without end.
        _ => Answer::Silent,
    });
    let took = until_observed(client).await;
    assert!(took <= SILENCE_LIMIT, "{took:?}");
}
