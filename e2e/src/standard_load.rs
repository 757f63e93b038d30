//! The standard load of the bars, scaled to the test cluster: requests that embed at a steady rate, and
//! streams of a small model; every request with the time in which it ran.

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use serde_json::json;
use tokio::{
    sync::watch,
    task::{JoinHandle, JoinSet},
    time::MissedTickBehavior,
};

use crate::{
    gateway::Gateway,
    model::{MINILM, SMOLLM2},
    request::{Failure, Request},
    scenario::Scenario,
};

/// A fifth of the 190 requests a second of the whole load: the cluster, the pods and the clients share two
/// cores.
pub const EMBEDS_PER_SECOND: u32 = 38;

/// A fifth of its ten streams at a time.
pub const STREAMS: usize = 2;

/// In each place of a stream one begins a second, or when the last one has ended: streams without a pause
/// take both cores for themselves.
const STREAM_PERIOD: Duration = Duration::from_secs(1);

/// Tokens of a stream: about half a second.
const STREAM_TOKENS: u32 = 48;

/// The longest load: two minutes without an operator, and as much again for pods that start slowly.
const LONGEST_S: usize = 240;

/// The most requests that embed.
const MOST_EMBEDS: usize = LONGEST_S * EMBEDS_PER_SECOND as usize;

/// The most streams of one place.
const MOST_STREAMS: usize = LONGEST_S;

/// The most requests that embed at a time: what comes in 6 s, which is longer than [`VECTORS_TIMEOUT`].
const MOST_AT_ONCE: usize = 6 * EMBEDS_PER_SECOND as usize;

/// The model that embeds.
pub const VECTORS: &str = "vectors";

/// The model that generates.
pub const WORDS: &str = "words";

/// The time to the first byte that a request of [`VECTORS`] has.
pub const VECTORS_TIMEOUT: Duration = Duration::from_secs(4);

/// The most requests that a message lists.
const LISTED: usize = 12;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// A vector.
    Embedding,
    /// A stream of tokens.
    Stream,
}

/// One request: when it ran, and why it has no whole answer.
#[derive(Debug, Clone)]
pub struct TimedRequest {
    /// What it asked for.
    pub asked: Asked,
    /// When it was sent.
    pub started: Instant,
    /// When its answer had come, or its failure.
    pub ended: Instant,
    /// Whether it was sent by gRPC, and not by HTTP.
    pub by_grpc: bool,
    /// What went wrong.
    pub failure: Option<Failure>,
}

impl TimedRequest {
    /// How long it took.
    #[must_use]
    pub fn took(&self) -> Duration {
        self.ended.duration_since(self.started)
    }
}

/// Every request of a load.
#[derive(Debug, Default)]
pub struct LoadOutcomes {
    /// Those that embed.
    pub embeds: Vec<TimedRequest>,
    /// The streams.
    pub streams: Vec<TimedRequest>,
}

impl LoadOutcomes {
    /// Those without a whole answer.
    #[must_use]
    pub fn failed(&self) -> Vec<&TimedRequest> {
        self.embeds.iter().chain(&self.streams).filter(|one| one.failure.is_some()).collect()
    }

    /// When the first request was sent; now, where there is none.
    #[must_use]
    pub fn began(&self) -> Instant {
        let all = self.embeds.iter().chain(&self.streams);
        all.map(|one| one.started).min().unwrap_or_else(Instant::now)
    }

    /// Requests of this load for a message, one a line, the first ones where they are many. Times count from
    /// the load's begin.
    #[must_use]
    pub fn described(&self, requests: &[&TimedRequest]) -> String {
        let began = self.began();
        let mut text = format!("{} of {}:", requests.len(), self.summary());
        for TimedRequest { asked, started, ended, by_grpc, failure } in requests.iter().take(LISTED) {
            let (at, took) = (started.duration_since(began), ended.duration_since(*started));
            let protocol = if *by_grpc { "gRPC" } else { "HTTP" };
            let why = failure.as_ref().map_or_else(|| "answered".to_owned(), ToString::to_string);
            let _ =
                write!(text, "\n  {asked:?} by {protocol}, sent at {at:.3?}, ended after {took:.3?}: {why}");
        }
        if requests.len() > LISTED {
            let _ = write!(text, "\n  and {} more", requests.len() - LISTED);
        }
        text
    }

    /// How many of those that embed took longer.
    #[must_use]
    pub fn slower_than(&self, limit: Duration) -> usize {
        self.embeds.iter().filter(|one| one.took() > limit).count()
    }

    /// The time within which this share of those that embed ended.
    #[must_use]
    pub fn percentile(&self, percent: usize) -> Duration {
        let mut took: Vec<Duration> = self.embeds.iter().map(TimedRequest::took).collect();
        took.sort_unstable();
        let index = (took.len() * percent / 100).min(took.len().saturating_sub(1));
        took.get(index).copied().unwrap_or_default()
    }

    /// Numbers for the log of a scenario.
    #[must_use]
    pub fn summary(&self) -> String {
        format!(
            "{} embeddings and {} streams, {} failed; embeddings p50 {} ms, p90 {} ms, p99 {} ms",
            self.embeds.len(),
            self.streams.len(),
            self.failed().len(),
            self.percentile(50).as_millis(),
            self.percentile(90).as_millis(),
            self.percentile(99).as_millis()
        )
    }
}

/// What the load is sent to.
#[derive(Clone)]
pub struct LoadTargets {
    gateway: Gateway,
    vectors: String,
    stream: Request,
}

impl LoadTargets {
    /// Applies two models with two pods each, and waits until they serve.
    ///
    /// # Errors
    /// When one does not become ready.
    pub async fn deploy(scenario: &Scenario) -> Result<Self> {
        let models = scenario.models();
        let breaker = json!({"consecutiveFailures": 2, "open": "3s"});
        // Without the reserved processor time, streams take what embeddings need.
        let vectors = json!({
            "task": "embed",
            "source": {"uri": MINILM},
            "runtime": {"resources": {"requests": {"cpu": "200m"}}},
            "scaling": {"replicas": 2},
            "traffic": {
                "timeout": format!("{}s", VECTORS_TIMEOUT.as_secs()), "attemptTimeout": "1s",
                "loadBalancing": "LatencyEwma", "circuitBreaker": breaker,
            },
        });
        let words = json!({
            "source": {"uri": SMOLLM2},
            "runtime": {"contextTokens": 256},
            "scaling": {"replicas": 2},
            "traffic": {"timeout": "10s", "attemptTimeout": "3s", "circuitBreaker": breaker},
        });
        models.apply(VECTORS, vectors).await?;
        models.apply(WORDS, words).await?;
        for name in [VECTORS, WORDS] {
            models.ready(name, 90).await?;
        }
        let stream = Request::new(&models.full_name(WORDS), "1, 2, 3, 4, 5, 6, 7, 8, 9,", STREAM_TOKENS);
        Ok(Self { gateway: scenario.gateway().await?, vectors: models.full_name(VECTORS), stream })
    }
}

/// The pods of one of the models, by name.
///
/// # Errors
/// When the API server does not list them.
pub async fn pods_of(scenario: &Scenario, model: &str) -> Result<Vec<Pod>> {
    let label = format!("serving.trustformers.dev/model={model}");
    let mut pods = scenario.pods().list(&ListParams::default().labels(&label)).await?.items;
    pods.sort_by(|one, other| one.metadata.name.cmp(&other.metadata.name));
    Ok(pods)
}

/// The load, until it is stopped. Where the value is dropped instead, no further request is sent.
pub struct StandardLoad {
    stop: watch::Sender<bool>,
    sent: watch::Receiver<usize>,
    embeds: JoinHandle<Vec<TimedRequest>>,
    streams: JoinSet<Vec<TimedRequest>>,
}

impl StandardLoad {
    /// Starts to send.
    #[must_use]
    pub fn start(targets: &LoadTargets) -> Self {
        let (stop, stopped) = watch::channel(false);
        let (sending, sent) = watch::channel(0);
        let embeds = tokio::spawn(embeds(targets.clone(), sending, stopped.clone()));
        let mut streams = JoinSet::new();
        for place in 0..STREAMS {
            streams.spawn(streams_of_place(targets.clone(), place, stopped.clone()));
        }
        Self { stop, sent, embeds, streams }
    }

    /// Waits until the requests of this many more seconds were sent.
    ///
    /// # Errors
    /// When the load has ended.
    pub async fn seconds(&mut self, seconds: u32) -> Result<()> {
        let target = *self.sent.borrow() + (seconds * EMBEDS_PER_SECOND) as usize;
        self.until_sent(target).await
    }

    /// Waits until the requests of the load's first seconds were sent.
    ///
    /// # Errors
    /// When the load has ended.
    pub async fn until_second(&mut self, second: u32) -> Result<()> {
        self.until_sent((second * EMBEDS_PER_SECOND) as usize).await
    }

    async fn until_sent(&mut self, target: usize) -> Result<()> {
        ensure!(target <= MOST_EMBEDS, "a load has at most {MOST_EMBEDS} requests");
        self.sent.wait_for(|sent| *sent >= target).await.context("the load has ended")?;
        Ok(())
    }

    /// Waits for the requests in flight and returns every one.
    ///
    /// # Errors
    /// When a task was ended from outside.
    pub async fn stop(mut self) -> Result<LoadOutcomes> {
        self.stop.send_replace(true);
        let mut outcomes = LoadOutcomes { embeds: self.embeds.await?, streams: Vec::new() };
        while let Some(ended) = self.streams.join_next().await {
            outcomes.streams.extend(ended?);
        }
        Ok(outcomes)
    }
}

async fn embeds(
    targets: LoadTargets,
    sending: watch::Sender<usize>,
    mut stopped: watch::Receiver<bool>,
) -> Vec<TimedRequest> {
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / EMBEDS_PER_SECOND);
    let mut running = JoinSet::new();
    let mut outcomes = Vec::new();
    for number in 0..MOST_EMBEDS {
        tokio::select! {
            _ = stopped.changed() => break,
            _ = ticks.tick() => {}
        }
        while let Some(ended) = running.try_join_next() {
            outcomes.extend(ended);
        }
        sending.send_replace(number + 1);
        if running.len() == MOST_AT_ONCE {
            let now = Instant::now();
            let failure = Failure::connection(&format!("{MOST_AT_ONCE} requests wait already"));
            let (asked, by_grpc) = (Asked::Embedding, false);
            outcomes.push(TimedRequest { asked, started: now, ended: now, by_grpc, failure: Some(failure) });
            continue;
        }
        let targets = targets.clone();
        running.spawn(async move { embed(&targets, number).await });
    }
    outcomes.extend(running.join_all().await);
    outcomes
}

/// By HTTP and gRPC in turn.
async fn embed(LoadTargets { gateway, vectors, .. }: &LoadTargets, number: usize) -> TimedRequest {
    let text = format!("a short text with the number {number}");
    let by_grpc = number % 2 == 1;
    let started = Instant::now();
    let failure = if by_grpc {
        gateway.grpc_embeddings(vectors, &[text.as_str()]).await.err()
    } else {
        gateway.embeddings(Some(vectors), &[text.as_str()]).await.err()
    };
    TimedRequest { asked: Asked::Embedding, started, ended: Instant::now(), by_grpc, failure }
}

/// One place has its streams by HTTP, the next one by gRPC.
async fn streams_of_place(
    targets: LoadTargets,
    place: usize,
    mut stopped: watch::Receiver<bool>,
) -> Vec<TimedRequest> {
    let LoadTargets { gateway, stream, .. } = targets;
    let mut ticks = tokio::time::interval(STREAM_PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let by_grpc = place % 2 == 1;
    let mut outcomes = Vec::new();
    while outcomes.len() < MOST_STREAMS {
        tokio::select! {
            _ = stopped.changed() => break,
            _ = ticks.tick() => {}
        }
        let started = Instant::now();
        let failure = if by_grpc {
            gateway.grpc_stream(&stream, |_| ()).await.err()
        } else {
            gateway.sse(&stream, |_| ()).await.err()
        };
        let (asked, ended) = (Asked::Stream, Instant::now());
        outcomes.push(TimedRequest { asked, started, ended, by_grpc, failure });
    }
    outcomes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(took_ms: u64, failure: Option<Failure>) -> TimedRequest {
        let started = Instant::now();
        let ended = started + Duration::from_millis(took_ms);
        TimedRequest { asked: Asked::Embedding, started, ended, by_grpc: false, failure }
    }

    #[test]
    fn percentiles_and_failures_are_those_of_the_requests() {
        let mut outcomes = LoadOutcomes::default();
        assert_eq!(outcomes.percentile(99), Duration::ZERO);
        outcomes.embeds = (1..=100).map(|took_ms| request(took_ms, None)).collect();
        outcomes.streams = vec![request(1, Some(Failure::connection(&"broken")))];
        assert_eq!(outcomes.percentile(50), Duration::from_millis(51));
        assert_eq!(outcomes.percentile(100), Duration::from_millis(100));
        assert_eq!(outcomes.slower_than(Duration::from_millis(98)), 2);
        assert_eq!(outcomes.failed().len(), 1);
    }

    #[test]
    fn a_message_says_of_each_request_when_it_ran_and_what_it_got() {
        let mut outcomes = LoadOutcomes { embeds: vec![request(7, None)], streams: Vec::new() };
        let failure = Failure::Refused { status: 502, message: "no pod".to_owned() };
        outcomes.streams = (0..20).map(|_| request(30, Some(failure.clone()))).collect();
        for one in &mut outcomes.streams {
            one.asked = Asked::Stream;
            one.started = outcomes.embeds[0].started + Duration::from_millis(1500);
            one.ended = one.started + Duration::from_millis(30);
        }
        let text = outcomes.described(&outcomes.failed());
        assert!(text.starts_with("20 of 1 embeddings and 20 streams, 20 failed"), "{text}");
        let line = "\n  Stream by HTTP, sent at 1.500s, ended after 30.000ms: refused with 502: no pod";
        assert_eq!(text.matches(line).count(), LISTED, "{text}");
        assert!(text.ends_with("\n  and 8 more"), "{text}");
    }
}
