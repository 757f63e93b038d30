//! Load that is bounded in number and time, with a record of what became of every single request.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::{
    sync::{oneshot, watch},
    task::{JoinHandle, JoinSet},
};

use crate::{
    ask::{Answer, Ask, Failure},
    gateway::Gateway,
};

/// More streams at once than this would measure the two cores and not the system.
const MOST_STREAMS: usize = 16;

/// The most requests of a steady load in all: two minutes at five a second.
const MOST_REQUESTS: usize = 600;

/// How one request went.
pub type Outcome = Result<Answer, Failure>;

/// Streams that run at the same time.
pub struct Streams {
    tasks: JoinSet<(usize, Outcome)>,
    begun: watch::Receiver<usize>,
    number: usize,
}

impl Streams {
    /// Opens one SSE stream for each ask.
    ///
    /// # Errors
    /// When there are more than this machine should carry.
    pub fn open(gateway: &Gateway, asks: Vec<Ask>) -> Result<Self> {
        ensure!(asks.len() <= MOST_STREAMS, "{} streams at once are more than {MOST_STREAMS}", asks.len());
        let (sender, begun) = watch::channel(0);
        let mut tasks = JoinSet::new();
        let number = asks.len();
        for (index, ask) in asks.into_iter().enumerate() {
            let (gateway, sender) = (gateway.clone(), sender.clone());
            tasks.spawn(async move {
                let on_token = |count| {
                    if count == 1 {
                        sender.send_modify(|begun| *begun += 1);
                    }
                };
                (index, gateway.sse(&ask, on_token).await)
            });
        }
        Ok(Self { tasks, begun, number })
    }

    /// Waits until every stream has brought its first token.
    ///
    /// # Errors
    /// When one has not within `limit`.
    pub async fn all_begun(&mut self, limit: Duration) -> Result<()> {
        let number = self.number;
        let begun = self.begun.wait_for(|begun| *begun == number);
        let begun = tokio::time::timeout(limit, begun).await.map(|it| it.map(|_| ()));
        begun.with_context(|| format!("not every one of {number} streams began within {limit:?}"))??;
        Ok(())
    }

    /// Waits for the end of every stream; outcomes are in the order of the asks.
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
    /// Starts to ask `per_second` times a second, by HTTP and gRPC in turn.
    ///
    /// # Errors
    /// When the rate is above what the shared machine should carry.
    pub fn start(gateway: &Gateway, ask: Ask, per_second: u32) -> Result<Self> {
        ensure!((1..=5).contains(&per_second), "{per_second} requests a second are not between 1 and 5");
        let (stop, stopped) = oneshot::channel();
        let gateway = gateway.clone();
        let task = tokio::spawn(run(gateway, ask, Duration::from_secs(1) / per_second, stopped));
        Ok(Self { stop, task })
    }

    /// Asks no more, waits for what is under way and returns every outcome.
    ///
    /// # Errors
    /// When the task was ended from outside.
    pub async fn stop(self) -> Result<Vec<Outcome>> {
        // The task may have reached its last request: then nobody listens, and that is fine.
        let _ = self.stop.send(());
        Ok(self.task.await?)
    }
}

async fn run(
    gateway: Gateway,
    ask: Ask,
    period: Duration,
    mut stopped: oneshot::Receiver<()>,
) -> Vec<Outcome> {
    let mut ticks = tokio::time::interval(period);
    let mut requests = JoinSet::new();
    for turn in 0..MOST_REQUESTS {
        tokio::select! {
            _ = &mut stopped => break,
            _ = ticks.tick() => {}
        }
        let (gateway, ask) = (gateway.clone(), ask.clone());
        requests.spawn(async move {
            if turn % 2 == 0 { gateway.http(&ask).await } else { gateway.grpc(&ask).await }
        });
    }
    let mut outcomes = Vec::new();
    while let Some(ended) = requests.join_next().await {
        outcomes.push(ended.unwrap_or_else(|error| Err(Failure::connection(&error))));
    }
    outcomes
}
