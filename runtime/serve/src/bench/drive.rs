//! Sends requests: a fixed number of clients in a closed loop, or arrivals at fixed times in an open loop.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use super::arrivals::{Arrivals, Spacing};
use super::client::{Failed, TimedAnswer};

/// Requests of an open loop that may be under way. A server that has fallen so far behind will not catch up,
/// and each takes a connection: 1,024 is what a process may open by default.
pub(super) const MAX_IN_FLIGHT: usize = 1_000;

/// The shape of a load.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Load {
    pub(super) pattern: Pattern,
    /// Requests in all, at most.
    pub(super) requests: usize,
    /// No request begins later than this.
    pub(super) duration: Duration,
}

/// The kind of load.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Pattern {
    /// So many clients, each of which asks again when it was answered.
    Closed { clients: usize },
    /// Requests at times of their own, this many a second.
    Open { rate: f64, spacing: Spacing, seed: u64 },
}

/// What became of one request.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Outcome {
    /// When it ended, from the start of the load.
    pub(super) ended: Duration,
    /// Its answer.
    pub(super) answer: Result<TimedAnswer, Failed>,
}

/// Runs the load; `ask` gets the number of each request and the moment at which it is due. Outcomes come in
/// no order.
pub(super) async fn drive<A, F>(load: Load, ask: A) -> Vec<Outcome>
where
    A: Fn(usize, Instant) -> F + Send + Sync + 'static,
    F: Future<Output = Result<TimedAnswer, Failed>> + Send + 'static,
{
    match load.pattern {
        Pattern::Closed { clients } => closed(load, clients, Arc::new(ask)).await,
        Pattern::Open { rate, spacing, seed } => open(load, Arrivals::new(spacing, rate, seed), ask).await,
    }
}

async fn closed<A, F>(load: Load, clients: usize, ask: Arc<A>) -> Vec<Outcome>
where
    A: Fn(usize, Instant) -> F + Send + Sync + 'static,
    F: Future<Output = Result<TimedAnswer, Failed>> + Send + 'static,
{
    let start = Instant::now();
    let next = Arc::new(AtomicUsize::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..clients {
        let (ask, next) = (Arc::clone(&ask), Arc::clone(&next));
        tasks.spawn(async move {
            let mut outcomes = Vec::new();
            while start.elapsed() < load.duration {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= load.requests {
                    break;
                }
                let answer = ask(index, Instant::now()).await;
                outcomes.push(Outcome { ended: start.elapsed(), answer });
            }
            outcomes
        });
    }
    tasks.join_all().await.into_iter().flatten().collect()
}

async fn open<A, F>(load: Load, arrivals: Arrivals, ask: A) -> Vec<Outcome>
where
    A: Fn(usize, Instant) -> F,
    F: Future<Output = Result<TimedAnswer, Failed>> + Send + 'static,
{
    let start = Instant::now();
    let mut tasks: JoinSet<Outcome> = JoinSet::new();
    let mut outcomes = Vec::new();
    for (index, due) in arrivals.take(load.requests).enumerate() {
        if due >= load.duration {
            break;
        }
        let due = start + due;
        tokio::time::sleep_until(due).await;
        while let Some(Ok(outcome)) = tasks.try_join_next() {
            outcomes.push(outcome);
        }
        if tasks.len() >= MAX_IN_FLIGHT {
            outcomes.push(Outcome { ended: start.elapsed(), answer: Err(Failed::NotSent) });
            continue;
        }
        let asked = ask(index, due);
        tasks.spawn(async move {
            let answer = asked.await;
            Outcome { ended: start.elapsed(), answer }
        });
    }
    outcomes.extend(tasks.join_all().await);
    outcomes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    const SECOND: Duration = Duration::from_secs(1);

    fn load(pattern: Pattern, requests: usize, duration_s: u64) -> Load {
        Load { pattern, requests, duration: Duration::from_secs(duration_s) }
    }

    fn answered(due: Instant) -> Result<TimedAnswer, Failed> {
        Ok(TimedAnswer { total: due.elapsed(), ..TimedAnswer::default() })
    }

    #[tokio::test(start_paused = true)]
    async fn closed_clients_ask_again_only_when_answered() {
        let under_way = Arc::new(AtomicUsize::new(0));
        let most = Arc::new(AtomicUsize::new(0));
        let (now, peak) = (under_way.clone(), most.clone());
        let outcomes = drive(load(Pattern::Closed { clients: 3 }, 10, 60), move |_, due| {
            let (now, peak) = (now.clone(), peak.clone());
            async move {
                peak.fetch_max(now.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
                tokio::time::sleep(SECOND).await;
                now.fetch_sub(1, Ordering::Relaxed);
                answered(due)
            }
        })
        .await;
        assert_eq!((outcomes.len(), most.load(Ordering::Relaxed)), (10, 3));
        let last = outcomes.iter().map(|outcome| outcome.ended).max();
        assert_eq!(last, Some(4 * SECOND), "ten seconds of work by three");
    }

    #[tokio::test(start_paused = true)]
    async fn time_ends_a_closed_load_before_its_requests_do() {
        let outcomes = drive(load(Pattern::Closed { clients: 1 }, 100, 3), |_, due| async move {
            tokio::time::sleep(SECOND).await;
            answered(due)
        });
        assert_eq!(outcomes.await.len(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn open_arrivals_do_not_wait_for_answers() {
        let start = Instant::now();
        let due = Arc::new(Mutex::new(Vec::new()));
        let seen = due.clone();
        let pattern = Pattern::Open { rate: 4.0, spacing: Spacing::Constant, seed: 0 };
        let outcomes = drive(load(pattern, 5, 60), move |_, due| {
            seen.lock().unwrap().push((due - start).as_millis());
            async move {
                tokio::time::sleep(10 * SECOND).await;
                answered(due)
            }
        })
        .await;
        assert_eq!(*due.lock().unwrap(), [0, 250, 500, 750, 1000]);
        assert!(outcomes.iter().all(|outcome| outcome.answer.as_ref().unwrap().total == 10 * SECOND));
    }

    #[tokio::test(start_paused = true)]
    async fn requests_beyond_the_limit_are_counted_and_not_sent() {
        let pattern = Pattern::Open { rate: 1000.0, spacing: Spacing::Constant, seed: 0 };
        let outcomes = drive(load(pattern, MAX_IN_FLIGHT + 7, 60), |_, due| async move {
            tokio::time::sleep(100 * SECOND).await;
            answered(due)
        })
        .await;
        let not_sent = outcomes.iter().filter(|outcome| outcome.answer == Err(Failed::NotSent)).count();
        assert_eq!((outcomes.len(), not_sent), (MAX_IN_FLIGHT + 7, 7));
    }

    #[tokio::test(start_paused = true)]
    async fn time_ends_an_open_load() {
        let pattern = Pattern::Open { rate: 2.0, spacing: Spacing::Constant, seed: 0 };
        let outcomes = drive(load(pattern, 100, 3), |_, due| async move { answered(due) }).await;
        assert_eq!(outcomes.len(), 6);
    }
}
