//! Load that is bounded in number and time, with the outcome of every request.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::{
    sync::{oneshot, watch},
    task::{JoinHandle, JoinSet},
};

use crate::{
    gateway::Gateway,
    request::{Answer, Failure, Request},
};

/// The most streams at a time: more would measure the two cores and not the system.
const MOST_STREAMS: usize = 16;

/// The fewest requests of a steady load, so that none passes for having made no requests.
pub const FEWEST_REQUESTS: usize = 5;

/// The most requests of a steady load in all: two minutes at five a second.
const MOST_REQUESTS: usize = 600;

/// The result of one request.
pub type Outcome = Result<Answer, Failure>;

/// Streams that run at the same time.
pub struct Streams {
    tasks: JoinSet<(usize, Outcome)>,
    started: watch::Receiver<usize>,
    number: usize,
}

impl Streams {
    /// Opens one SSE stream for each request.
    ///
    /// # Errors
    /// When there are more than this machine should carry.
    pub fn open(gateway: &Gateway, requests: Vec<Request>) -> Result<Self> {
        ensure!(
            requests.len() <= MOST_STREAMS,
            "{} streams at once are more than {MOST_STREAMS}",
            requests.len()
        );
        let (sender, started) = watch::channel(0);
        let mut tasks = JoinSet::new();
        let number = requests.len();
        for (index, request) in requests.into_iter().enumerate() {
            let (gateway, sender) = (gateway.clone(), sender.clone());
            tasks.spawn(async move {
                let on_token = |count| {
                    if count == 1 {
                        sender.send_modify(|started| *started += 1);
                    }
                };
                (index, gateway.sse(&request, on_token).await)
            });
        }
        Ok(Self { tasks, started, number })
    }

    /// Waits until every stream has brought its first token.
    ///
    /// # Errors
    /// When one has not within `limit`.
    pub async fn all_started(&mut self, limit: Duration) -> Result<()> {
        let number = self.number;
        let started = self.started.wait_for(|started| *started == number);
        let started = tokio::time::timeout(limit, started).await.map(|it| it.map(|_| ()));
        started.with_context(|| format!("not every one of {number} streams began within {limit:?}"))??;
        Ok(())
    }

    /// Waits for the end of every stream; outcomes are in the order of the requests.
    ///
    /// # Errors
    /// When a task was ended from outside.
    pub async fn ended(mut self) -> Result<Vec<Outcome>> {
        let mut outcomes = Vec::new();
        while let Some(ended) = self.tasks.join_next().await {
            outcomes.push(ended?);
        }
        outcomes.sort_by_key(|(index, _)| *index);
        Ok(outcomes.into_iter().map(|(_, outcome)| outcome).collect())
    }
}

/// Requests at a steady rate, each on its own, until stopped.
pub struct Steady {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Vec<Outcome>>,
}

impl Steady {
    /// Starts to send `per_second` requests a second, by HTTP and gRPC in turn.
    ///
    /// # Errors
    /// When the rate is above what the shared machine should carry.
    pub fn start(gateway: &Gateway, request: Request, per_second: u32) -> Result<Self> {
        ensure!((1..=5).contains(&per_second), "{per_second} requests a second are not between 1 and 5");
        let (stop, stopped) = oneshot::channel();
        let gateway = gateway.clone();
        let task = tokio::spawn(run(gateway, request, Duration::from_secs(1) / per_second, stopped));
        Ok(Self { stop, task })
    }

    /// Sends the rest of the first [`FEWEST_REQUESTS`], waits for those in flight and returns every outcome.
    ///
    /// # Errors
    /// When the task was ended from outside.
    pub async fn stop(self) -> Result<Vec<Outcome>> {
        // The task may have sent its last request already: then the channel is closed, and that is no error.
        let _ = self.stop.send(());
        Ok(self.task.await?)
    }
}

async fn run(
    gateway: Gateway,
    request: Request,
    period: Duration,
    mut stopped: oneshot::Receiver<()>,
) -> Vec<Outcome> {
    let mut ticks = tokio::time::interval(period);
    let mut requests = JoinSet::new();
    let mut stopping = false;
    for index in 0..MOST_REQUESTS {
        tokio::select! {
            _ = &mut stopped, if !stopping => stopping = true,
            _ = ticks.tick() => {}
        }
        if stopping && index >= FEWEST_REQUESTS {
            break;
        }
        let (gateway, request) = (gateway.clone(), request.clone());
        requests.spawn(async move {
            if index % 2 == 0 { gateway.http(&request).await } else { gateway.grpc(&request).await }
        });
    }
    let mut outcomes = Vec::new();
    while let Some(ended) = requests.join_next().await {
        outcomes.push(ended.unwrap_or_else(|error| Err(Failure::connection(&error))));
    }
    outcomes
}
