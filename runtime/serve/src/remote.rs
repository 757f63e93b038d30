//! Models that other servers have: `models[].endpoints`, `load_balancing` and `high_availability` of a
//! `config.yaml`, and the same for the library.
//!
//! Such a server is a gateway: it forwards the requests for these models, and what happens to them is what
//! happens in the gateway of a cluster. So the sections become the policy of a route (`control.proto`).

use std::fmt;
use std::str::FromStr;

use hyper::Uri;
use serde::{Deserialize, Serialize};
use trustformers_proto::control::v1 as wire;

use crate::config::{Config, ConfigError, ModelConfig, wrong};

/// Longest time between two checks of an endpoint, and longest time that a circuit breaker stays open.
const LONGEST_SEC: u32 = 3600;
/// Most checks in a row that are needed for a change.
const MOST_CHECKS: u32 = 100;
/// Most failures in a row that open a circuit breaker.
const MOST_FAILURES: u32 = 1000;
/// Most retries of a request.
const MOST_RETRIES: u32 = 10;
/// Longest first delay of a retry.
const LONGEST_BACKOFF_MS: u64 = 10_000;
/// An endpoint that does not answer a check for this long fails it.
const CHECK_TIMEOUT_MS: u64 = 2000;
/// Retries are at most this share of the requests of the window, and always a few: the gateway's defaults.
const RETRY_BUDGET_PERCENT: u32 = 20;
const MIN_RETRIES: u32 = 10;
const WINDOW_MS: u64 = 10_000;
/// Greatest weight of an endpoint.
const MOST_WEIGHT: u32 = 1000;

/// A server that has a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointConfig {
    /// A name or an address, without brackets. A name may have several addresses; each is an endpoint.
    pub host: String,
    /// The port for HTTP, which takes gRPC too.
    pub port: u16,
    /// The port for gRPC; none: the same.
    pub grpc_port: Option<u16>,
    /// Capacity relative to the other endpoints of the model, 1 to 1000.
    pub weight: u32,
}

impl fmt::Display for EndpointConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port, .. } = self;
        if host.contains(':') {
            write!(f, "http://[{host}]:{port}")
        } else {
            write!(f, "http://{host}:{port}")
        }
    }
}

impl FromStr for EndpointConfig {
    type Err = String;

    /// Reads `http://HOST:PORT`.
    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("{text:?} is not an endpoint; give http://HOST:PORT");
        let uri: Uri = text.parse().map_err(|_| expected())?;
        if uri.scheme_str() == Some("https") {
            return Err("TLS to endpoints is not available in this version; give http://HOST:PORT".to_owned());
        }
        let (Some("http"), Some(host), Some(port), "" | "/") =
            (uri.scheme_str(), uri.host(), uri.port_u16().filter(|port| *port > 0), uri.path())
        else {
            return Err(expected());
        };
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        Ok(Self { host, port, grpc_port: None, weight: 1 })
    }
}

/// How an endpoint is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoadBalancingAlgorithm {
    /// Of two drawn endpoints, the one with fewer requests for its weight.
    #[default]
    LeastConnections,
    /// One after the other.
    RoundRobin,
    /// Drawn with the weights as odds.
    Weighted,
    /// Of two drawn endpoints, the one that is expected to answer first.
    Latency,
    /// Prompts that begin alike meet the same endpoint.
    ConsistentHash,
}

impl LoadBalancingAlgorithm {
    const ALL: [Self; 5] =
        [Self::LeastConnections, Self::RoundRobin, Self::Weighted, Self::Latency, Self::ConsistentHash];

    /// The word in a `config.yaml`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::LeastConnections => "least_connections",
            Self::RoundRobin => "round_robin",
            Self::Weighted => "weighted",
            Self::Latency => "latency",
            Self::ConsistentHash => "consistent_hash",
        }
    }

    fn to_wire(self) -> wire::BalanceBy {
        match self {
            Self::LeastConnections => wire::BalanceBy::LeastRequests,
            Self::RoundRobin => wire::BalanceBy::RoundRobin,
            Self::Weighted => wire::BalanceBy::Weighted,
            Self::Latency => wire::BalanceBy::LatencyEwma,
            Self::ConsistentHash => wire::BalanceBy::ConsistentHash,
        }
    }
}

impl FromStr for LoadBalancingAlgorithm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|algorithm| algorithm.as_str() == text).ok_or_else(|| {
            let words: Vec<&str> = Self::ALL.into_iter().map(Self::as_str).collect();
            format!("{text:?} is not an algorithm; use one of {}", words.join(", "))
        })
    }
}

/// How the endpoints of a model are chosen and checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadBalancerConfig {
    /// How an endpoint is chosen.
    pub algorithm: LoadBalancingAlgorithm,
    /// Time between two checks (`GET /health/ready`) of an endpoint, 1 to 3600 s.
    pub health_check_interval_sec: u32,
    /// Failed checks in a row after which an endpoint is left out, 1 to 100.
    pub unhealthy_threshold: u32,
    /// Good checks in a row after which it is back, 1 to 100.
    pub healthy_threshold: u32,
}

impl Default for LoadBalancerConfig {
    fn default() -> Self {
        Self {
            algorithm: LoadBalancingAlgorithm::LeastConnections,
            health_check_interval_sec: 30,
            unhealthy_threshold: 3,
            healthy_threshold: 2,
        }
    }
}

/// What happens when endpoints fail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HighAvailabilityConfig {
    /// Whether an endpoint that fails gets no requests for a while.
    pub enable_circuit_breaker: bool,
    /// Failures in a row after which it gets none, 1 to 1000.
    pub circuit_breaker_threshold: u32,
    /// Time until one request is let through as a probe, 1 to 3600 s.
    pub circuit_breaker_timeout_sec: u32,
    /// Retries of a request, each on another endpoint and before the first byte of its answer, 0 to 10.
    pub retry_max_attempts: u32,
    /// Delays in front of the retries in milliseconds; each is twice the one before. Half of it up or down is
    /// random.
    pub retry_backoff_ms: Vec<u64>,
}

impl Default for HighAvailabilityConfig {
    fn default() -> Self {
        Self {
            enable_circuit_breaker: true,
            circuit_breaker_threshold: 5,
            circuit_breaker_timeout_sec: 60,
            retry_max_attempts: 3,
            retry_backoff_ms: vec![100, 200, 400],
        }
    }
}

/// # Errors
/// A figure below 1 or above `most`.
fn within(path: &str, value: u32, most: u32) -> Result<(), ConfigError> {
    if (1..=most).contains(&value) {
        return Ok(());
    }
    Err(wrong(path, format!("{value} is not within 1 to {most}")))
}

impl LoadBalancerConfig {
    /// # Errors
    /// The figure that is out of its range.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        let Self { algorithm: _, health_check_interval_sec, unhealthy_threshold, healthy_threshold } = *self;
        within("load_balancing.health_check_interval_sec", health_check_interval_sec, LONGEST_SEC)?;
        within("load_balancing.unhealthy_threshold", unhealthy_threshold, MOST_CHECKS)?;
        within("load_balancing.healthy_threshold", healthy_threshold, MOST_CHECKS)
    }
}

impl HighAvailabilityConfig {
    /// # Errors
    /// The figure that is out of its range, or delays that do not double.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        within("high_availability.circuit_breaker_threshold", self.circuit_breaker_threshold, MOST_FAILURES)?;
        within(
            "high_availability.circuit_breaker_timeout_sec",
            self.circuit_breaker_timeout_sec,
            LONGEST_SEC,
        )?;
        if self.retry_max_attempts > MOST_RETRIES {
            let message = format!("{} is not within 0 to {MOST_RETRIES}", self.retry_max_attempts);
            return Err(wrong("high_availability.retry_max_attempts", message));
        }
        self.check_backoff()
    }

    fn check_backoff(&self) -> Result<(), ConfigError> {
        let path = "high_availability.retry_backoff_ms";
        let delays = &self.retry_backoff_ms;
        let Some(&first) = delays.first() else {
            return Err(wrong(path, "is empty: give the delay in front of the first retry, such as [100]"));
        };
        if !(1..=LONGEST_BACKOFF_MS).contains(&first) {
            return Err(wrong(path, format!("{first} is not within 1 to {LONGEST_BACKOFF_MS} ms")));
        }
        let doubled = (0..delays.len()).map(|retry| first << retry.min(16));
        if !doubled.clone().eq(delays.iter().copied()) {
            let list: Vec<u64> = doubled.collect();
            return Err(wrong(path, format!("each delay is twice the one before: write {list:?}")));
        }
        Ok(())
    }
}

/// What a server forwards, and how.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct RemoteConfig {
    /// The models that other servers have.
    pub(crate) models: Vec<ModelConfig>,
    load_balancing: LoadBalancerConfig,
    high_availability: HighAvailabilityConfig,
}

impl RemoteConfig {
    /// What of a configuration is forwarded.
    pub(crate) fn of(config: &Config) -> Self {
        Self {
            models: config.models.iter().filter(|model| model.is_remote()).cloned().collect(),
            load_balancing: config.load_balancing.unwrap_or_default(),
            high_availability: config.high_availability.clone().unwrap_or_default(),
        }
    }

    /// The policy of the routes.
    pub(crate) fn policy(&self) -> wire::Policy {
        let Self { load_balancing, high_availability, .. } = self;
        let breaker = high_availability.enable_circuit_breaker.then(|| wire::CircuitBreaker {
            consecutive_failures: high_availability.circuit_breaker_threshold,
            window_ms: WINDOW_MS,
            open_ms: u64::from(high_availability.circuit_breaker_timeout_sec) * 1000,
            ..Default::default()
        });
        wire::Policy {
            retries: high_availability.retry_max_attempts,
            // As in one process without endpoints: its callers are trusted with both.
            accept_tenant: true,
            accept_priority: true,
            load_balancing: Some(wire::LoadBalancing {
                by: load_balancing.algorithm.to_wire().into(),
                ..Default::default()
            }),
            health_check: Some(wire::HealthCheck {
                interval_ms: u64::from(load_balancing.health_check_interval_sec) * 1000,
                timeout_ms: CHECK_TIMEOUT_MS,
                down_after: load_balancing.unhealthy_threshold,
                up_after: load_balancing.healthy_threshold,
            }),
            circuit_breaker: breaker,
            retry: Some(wire::Retry {
                base_delay_ms: high_availability.retry_backoff_ms.first().copied().unwrap_or_default(),
                budget_percent: RETRY_BUDGET_PERCENT,
                min_retries: MIN_RETRIES,
                window_ms: WINDOW_MS,
            }),
            ..Default::default()
        }
    }
}

impl Config {
    /// # Errors
    /// What does not fit to models that other servers have, or to none.
    pub(crate) fn check_remote(&self) -> Result<(), ConfigError> {
        if let Some(balancing) = &self.load_balancing {
            balancing.check()?;
        }
        if let Some(availability) = &self.high_availability {
            availability.check()?;
        }
        if self.models.iter().any(ModelConfig::is_remote) {
            if self.server.allowed_origins != trustformers_api::browser::AllowedOrigins::Any {
                let message = "cannot be narrowed where a model has endpoints, since their servers answer pages; \
                               set it there, and remove it here";
                return Err(wrong("server.allowed_origins", message));
            }
            return Ok(());
        }
        let sections = [
            ("load_balancing", self.load_balancing.is_some()),
            ("high_availability", self.high_availability.is_some()),
        ];
        match sections.into_iter().find(|(_, given)| *given) {
            Some((section, _)) => Err(wrong(
                section,
                "there is nothing to balance: give a model endpoints ([{url: \"http://HOST:PORT\"}]), or remove it",
            )),
            None => Ok(()),
        }
    }
}

/// `load_balancing` as it is written.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(expecting = "keys and values")]
pub(crate) struct LoadBalancingSection {
    algorithm: Option<String>,
    health_check_interval_sec: Option<u32>,
    unhealthy_threshold: Option<u32>,
    healthy_threshold: Option<u32>,
}

impl LoadBalancingSection {
    /// The section of a configuration.
    pub(crate) fn of(config: &LoadBalancerConfig) -> Self {
        let LoadBalancerConfig {
            algorithm,
            health_check_interval_sec,
            unhealthy_threshold,
            healthy_threshold,
        } = *config;
        Self {
            algorithm: Some(algorithm.as_str().to_owned()),
            health_check_interval_sec: Some(health_check_interval_sec),
            unhealthy_threshold: Some(unhealthy_threshold),
            healthy_threshold: Some(healthy_threshold),
        }
    }

    /// What it means.
    ///
    /// # Errors
    /// A word that is none of the algorithms.
    pub(crate) fn read(self) -> Result<LoadBalancerConfig, ConfigError> {
        let default = LoadBalancerConfig::default();
        let algorithm = self.algorithm.map(|text| text.parse::<LoadBalancingAlgorithm>()).transpose();
        Ok(LoadBalancerConfig {
            algorithm: algorithm
                .map_err(|error| wrong("load_balancing.algorithm", error))?
                .unwrap_or_default(),
            health_check_interval_sec: self
                .health_check_interval_sec
                .unwrap_or(default.health_check_interval_sec),
            unhealthy_threshold: self.unhealthy_threshold.unwrap_or(default.unhealthy_threshold),
            healthy_threshold: self.healthy_threshold.unwrap_or(default.healthy_threshold),
        })
    }
}

/// `high_availability` as it is written.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(expecting = "keys and values")]
pub(crate) struct HighAvailabilitySection {
    enable_circuit_breaker: Option<bool>,
    circuit_breaker_threshold: Option<u32>,
    circuit_breaker_timeout_sec: Option<u32>,
    retry_max_attempts: Option<u32>,
    retry_backoff_ms: Option<Vec<u64>>,
}

impl HighAvailabilitySection {
    /// The section of a configuration.
    pub(crate) fn of(config: &HighAvailabilityConfig) -> Self {
        Self {
            enable_circuit_breaker: Some(config.enable_circuit_breaker),
            circuit_breaker_threshold: Some(config.circuit_breaker_threshold),
            circuit_breaker_timeout_sec: Some(config.circuit_breaker_timeout_sec),
            retry_max_attempts: Some(config.retry_max_attempts),
            retry_backoff_ms: Some(config.retry_backoff_ms.clone()),
        }
    }

    /// What it means.
    pub(crate) fn read(self) -> HighAvailabilityConfig {
        let default = HighAvailabilityConfig::default();
        HighAvailabilityConfig {
            enable_circuit_breaker: self.enable_circuit_breaker.unwrap_or(default.enable_circuit_breaker),
            circuit_breaker_threshold: self
                .circuit_breaker_threshold
                .unwrap_or(default.circuit_breaker_threshold),
            circuit_breaker_timeout_sec: self
                .circuit_breaker_timeout_sec
                .unwrap_or(default.circuit_breaker_timeout_sec),
            retry_max_attempts: self.retry_max_attempts.unwrap_or(default.retry_max_attempts),
            retry_backoff_ms: self.retry_backoff_ms.unwrap_or(default.retry_backoff_ms),
        }
    }
}

/// An endpoint as it is written.
#[derive(Debug, Serialize, Deserialize)]
#[serde(expecting = "keys and values, such as {url: http://HOST:PORT}")]
pub(crate) struct EndpointSection {
    url: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    grpc_port: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    weight: Option<u32>,
}

impl EndpointSection {
    /// The section of an endpoint.
    pub(crate) fn of(endpoint: &EndpointConfig) -> Self {
        Self { url: Some(endpoint.to_string()), grpc_port: endpoint.grpc_port, weight: Some(endpoint.weight) }
    }

    fn read(self, path: &str) -> Result<EndpointConfig, ConfigError> {
        let at = |key: &str| format!("{path}.{key}");
        let url = self.url.ok_or_else(|| wrong(&at("url"), "is missing: give http://HOST:PORT"))?;
        let mut endpoint = url.parse::<EndpointConfig>().map_err(|error| wrong(&at("url"), error))?;
        if self.grpc_port == Some(0) {
            return Err(wrong(&at("grpc_port"), "0 is no port; leave it out where gRPC has HTTP's port"));
        }
        endpoint.grpc_port = self.grpc_port;
        endpoint.weight = self.weight.unwrap_or(1);
        within(&at("weight"), endpoint.weight, MOST_WEIGHT)?;
        Ok(endpoint)
    }
}

/// The endpoints of a model, whose place in its file is `place`.
///
/// # Errors
/// There is none, one is written wrongly, or one is there twice.
pub(crate) fn endpoints(
    place: &str,
    sections: Vec<EndpointSection>,
) -> Result<Vec<EndpointConfig>, ConfigError> {
    let path = format!("{place}.endpoints");
    if sections.is_empty() {
        return Err(wrong(
            &path,
            "is empty: give at least one {url: \"http://HOST:PORT\"}, or a path instead",
        ));
    }
    let mut found: Vec<EndpointConfig> = Vec::with_capacity(sections.len());
    for (index, section) in sections.into_iter().enumerate() {
        let path = format!("{path}[{index}]");
        let endpoint = section.read(&path)?;
        if found.iter().any(|other| (&other.host, other.port) == (&endpoint.host, endpoint.port)) {
            return Err(wrong(&format!("{path}.url"), format!("{endpoint} is given twice; remove one")));
        }
        found.push(endpoint);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = "models: [{name: chat, aliases: [c], task: generate, endpoints: [{url: 'http://gpu-1:8080'}, \
                       {url: 'http://[::1]:8081', grpc_port: 9090, weight: 3}]}]\n";

    fn config(text: &str) -> Result<Config, ConfigError> {
        text.parse()
    }

    #[test]
    fn endpoints_and_their_sections_mean_a_policy() {
        let read = config(TWO).unwrap();
        let endpoints = &read.models[0].endpoints;
        assert_eq!((endpoints[0].host.as_str(), endpoints[0].port), ("gpu-1", 8080));
        assert_eq!((endpoints[1].host.as_str(), endpoints[1].weight), ("::1", 3));
        assert!(read.specs(None).unwrap().is_empty(), "nothing is loaded here");
        let policy = RemoteConfig::of(&read).policy();
        assert_eq!((policy.retries, policy.retry.unwrap().base_delay_ms), (3, 100));
        assert_eq!(policy.circuit_breaker.unwrap().open_ms, 60_000);
        let check = policy.health_check.unwrap();
        assert_eq!((check.interval_ms, check.down_after, check.up_after), (30_000, 3, 2));
        let text = format!(
            "{TWO}load_balancing: {{algorithm: consistent_hash, health_check_interval_sec: 5, unhealthy_threshold: 1, healthy_threshold: 1}}\n\
             high_availability: {{enable_circuit_breaker: false, retry_max_attempts: 1, retry_backoff_ms: [50, 100]}}"
        );
        let policy = RemoteConfig::of(&config(&text).unwrap()).policy();
        assert_eq!(policy.load_balancing.unwrap().by(), wire::BalanceBy::ConsistentHash);
        assert_eq!((policy.circuit_breaker, policy.retries), (None, 1));
        assert_eq!(policy.health_check.unwrap().interval_ms, 5000);
    }

    #[test]
    fn what_is_printed_is_read_back() {
        for text in [
            TWO.to_owned(),
            format!("{TWO}load_balancing: {{algorithm: latency}}\nhigh_availability: {{}}\n"),
        ] {
            let read = config(&text).unwrap().effective();
            let printed = read.to_yaml().unwrap();
            assert_eq!(config(&printed).unwrap(), read, "{printed}");
        }
    }

    #[test]
    fn every_error_names_its_key_and_says_what_to_write() {
        let model = |more: &str| format!("models: [{{name: a, {more}}}]");
        for (text, says) in [
            (model("endpoints: []"), "models[0].endpoints: is empty"),
            (model("endpoints: [{}]"), "models[0].endpoints[0].url: is missing: give http://HOST:PORT"),
            (model("endpoints: [{url: 'https://a:1'}]"), "models[0].endpoints[0].url: TLS to endpoints"),
            (model("endpoints: [{url: 'a:1'}]"), "models[0].endpoints[0].url: \"a:1\" is not an endpoint"),
            (model("endpoints: [{url: 'http://a'}]"), "models[0].endpoints[0].url: \"http://a\" is not"),
            (model("endpoints: [{url: 'http://a:1', wight: 1}]"), "models[0].endpoints[0].wight: "),
            (model("endpoints: [{url: 'http://a:1', weight: 0}]"), "models[0].endpoints[0].weight: 0 is not"),
            (model("endpoints: [{url: 'http://a:1', grpc_port: 0}]"), "models[0].endpoints[0].grpc_port: 0"),
            (
                model("endpoints: [{url: 'http://a:1'}, {url: 'http://a:1'}]"),
                "models[0].endpoints[1].url: http://a:1 is given twice",
            ),
            (model("path: /a, endpoints: [{url: 'http://a:1'}]"), "models[0].path: belongs to the servers"),
            (
                model("max_batch_size: 4, endpoints: [{url: 'http://a:1'}]"),
                "models[0].max_batch_size: belongs to the servers",
            ),
            (format!("{}\nload_balancing: {{}}", model("path: /a")), "load_balancing: there is nothing"),
            (format!("{}\nhigh_availability: {{}}", model("path: /a")), "high_availability: there is"),
            (format!("{TWO}load_balancing: {{algorithm: random}}"), "load_balancing.algorithm: \"random\""),
            (
                format!("{TWO}load_balancing: {{healthy_threshold: 0}}"),
                "load_balancing.healthy_threshold: 0 is not within 1 to 100",
            ),
            (
                format!("{TWO}high_availability: {{retry_backoff_ms: [100, 150]}}"),
                "high_availability.retry_backoff_ms: each delay is twice the one before: write [100, 200]",
            ),
            (
                format!("{TWO}high_availability: {{retry_max_attempts: 11}}"),
                "high_availability.retry_max_attempts: 11",
            ),
            (
                format!("{TWO}high_availability: {{circut_breaker_threshold: 1}}"),
                "high_availability.circut_breaker_threshold: there is no such key",
            ),
            (
                format!("{TWO}server: {{allowed_origins: ['https://a.example']}}"),
                "server.allowed_origins: cannot be narrowed",
            ),
        ] {
            let error = config(&text).unwrap_err().to_string();
            assert!(error.starts_with(says), "{error}");
        }
    }
}
