//! Requests for reconciles: many of one model within a short time are one.
//!
//! A request is passed on a fixed time after the first one, however many follow. (A delay that starts again
//! with each request would postpone the reconcile of a model with more than one event per delay until its
//! events stop.)

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

use futures::{Stream, stream};
use kube::runtime::reflector::ObjectRef;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use trustformers_crds::InferenceModel;

/// From the first request for a model to its reconcile. Short, because every step of a pod's start passes
/// here.
pub const DELAY: Duration = Duration::from_millis(20);

type Model = ObjectRef<InferenceModel>;

/// Models that wait for the end of their delay. At most one entry for each model that exists.
struct Waiting {
    requests: mpsc::Receiver<Model>,
    in_order: VecDeque<(Instant, Model)>,
    models: HashSet<Model>,
}

impl Waiting {
    async fn next(&mut self) -> Option<Model> {
        loop {
            let first = self.in_order.front().map(|(at, _)| *at);
            let ripe = async {
                match first {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = ripe => {
                    let (_, model) = self.in_order.pop_front()?;
                    self.models.remove(&model);
                    return Some(model);
                }
                request = self.requests.recv() => {
                    let model = request?;
                    if self.models.insert(model.clone()) {
                        self.in_order.push_back((Instant::now() + DELAY, model));
                    }
                }
            }
        }
    }
}

/// The models to reconcile, each [`DELAY`] after the first of its requests.
pub fn coalesce(requests: mpsc::Receiver<Model>) -> impl Stream<Item = Model> {
    let waiting = Waiting { requests, in_order: VecDeque::new(), models: HashSet::new() };
    stream::unfold(waiting, async |mut waiting| waiting.next().await.map(|model| (model, waiting)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::StreamExt;
    use tokio::time::{sleep, timeout};

    fn model(name: &str) -> Model {
        ObjectRef::new(name).within("team")
    }

    #[tokio::test(start_paused = true)]
    async fn requests_of_one_model_within_the_delay_are_one() {
        let (sender, requests) = mpsc::channel(16);
        for name in ["a", "b", "a", "a"] {
            sender.send(model(name)).await.unwrap();
        }
        let mut queue = std::pin::pin!(coalesce(requests));
        assert_eq!(queue.next().await, Some(model("a")));
        assert_eq!(queue.next().await, Some(model("b")));
        assert!(timeout(DELAY * 5, queue.next()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_model_with_endless_events_is_still_reconciled() {
        let (sender, requests) = mpsc::channel(16);
        tokio::spawn(async move {
            while sender.send(model("busy")).await.is_ok() {
                sleep(DELAY / 4).await;
            }
        });
        let mut queue = std::pin::pin!(coalesce(requests));
        let started = Instant::now();
        for _ in 0..10 {
            queue.next().await.unwrap();
        }
        assert!(started.elapsed() <= DELAY * 2 * 10, "{:?}", started.elapsed());
    }
}
