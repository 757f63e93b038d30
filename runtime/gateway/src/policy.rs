//! The policy of a route and its split rule, parsed from the operator's table.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderName};
use trustformers_proto::buckets::BucketOwners;
use trustformers_proto::control::v1 as wire;

use crate::balance::Algorithm;
use crate::breaker::BreakerRules;
use crate::health::HealthRules;
use crate::hedge::HedgeRules;
use crate::retry::RetryRules;
use crate::split::bucket_of;
use crate::user::UserRule;

/// Timeouts, retries and balancing of a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// From the request's arrival to the head of the answer; `None` is no limit.
    pub first_byte_timeout: Option<Duration>,
    /// From the begin of one attempt to the head of its answer; `None` is no limit but the one above.
    pub attempt_timeout: Option<Duration>,
    /// More attempts, each on another endpoint, while no byte of the answer has come.
    pub retries: u32,
    /// Delay and budget of retries; `None`: they have neither.
    pub retry: Option<RetryRules>,
    /// How long a request waits for a pod while the route has none; `None`: it is refused at once.
    pub hold: Option<Duration>,
    /// The most requests of the route that are held at a time; `None`: half of what the gateway holds.
    pub hold_requests: Option<u32>,
    /// Whether callers may name their tenant.
    pub accept_tenant: bool,
    /// Whether callers may choose their priority class.
    pub accept_priority: bool,
    /// How an endpoint is chosen.
    pub balance: BalanceRules,
    /// How its pods are checked; `None`: they are not.
    pub health: Option<HealthRules>,
    /// When a pod that fails gets no requests; `None`: always.
    pub breaker: Option<BreakerRules>,
    /// When a request that encodes is sent to a second pod; `None`: never.
    pub hedge: Option<HedgeRules>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            first_byte_timeout: None,
            attempt_timeout: None,
            retries: 1,
            retry: None,
            hold: None,
            hold_requests: None,
            accept_tenant: false,
            accept_priority: false,
            balance: BalanceRules::default(),
            health: None,
            breaker: None,
            hedge: None,
        }
    }
}

/// How an endpoint of a backend is chosen.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BalanceRules {
    /// The algorithm.
    pub algorithm: Algorithm,
    /// A new endpoint gets its whole share after this time.
    pub slow_start: Duration,
    /// What the consistent hash hashes.
    pub hash_on: HashOn,
}

/// What the consistent hash hashes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum HashOn {
    /// The first bytes of an HTTP request's body.
    #[default]
    PromptPrefix,
    /// The value of a header: a user or a session.
    Header(HeaderName),
}

/// Bytes of a body that the consistent hash looks at: some 50 of JSON and 200 of the prompt, less than most
/// system prompts. With more, requests with one system prompt would differ in what follows it.
pub const PREFIX_BYTES: usize = 256;

impl BalanceRules {
    /// The key of the consistent hash for a request with these headers and this beginning of its body; `None`
    /// where the route balances otherwise, or the request has no key.
    #[must_use]
    pub fn hash_of(&self, headers: &HeaderMap, prefix: Option<&[u8]>) -> Option<u64> {
        if self.algorithm != Algorithm::ConsistentHash {
            return None;
        }
        let key = match &self.hash_on {
            HashOn::Header(name) => headers.get(name)?.as_bytes(),
            HashOn::PromptPrefix => prefix.filter(|prefix| !prefix.is_empty())?,
        };
        // Without a random state: the same in every gateway.
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        Some(hasher.finish())
    }
}

/// Which request of a route gets which backend.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SplitRule {
    /// What decides.
    pub by: SplitBy,
    /// Revisions that a caller may name in a header, which then gets the request.
    pub forced: Option<ForcedRevisions>,
    /// By user the variant that the user gets whatever the bucket, where the route has a test.
    pub forced_users: BTreeMap<Vec<u8>, String>,
    /// Users that get the first variant of the route's test.
    pub excluded_users: Vec<UserRange>,
}

/// Users by a hash that has nothing to do with their variant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserRange {
    /// Hashed with the user.
    pub salt: String,
    /// Their buckets.
    pub buckets: Range<u32>,
}

/// What decides which backend a request gets.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum SplitBy {
    /// Its number: shares are exact.
    #[default]
    Request,
    /// A random number.
    Percentage,
    /// Its user.
    User {
        /// How the user is found.
        user: Arc<UserRule>,
        /// Who owns the buckets of users.
        owners: BucketOwners,
    },
}

/// Revisions that a caller may name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForcedRevisions {
    /// The header.
    pub header: HeaderName,
    /// The revisions.
    pub revisions: Vec<String>,
}

/// A field of a route's policy or split that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value:?}, expected {expected}")]
pub struct PolicyError {
    /// Which field.
    pub field: &'static str,
    /// Its value.
    pub value: String,
    /// What can be used.
    pub expected: String,
}

impl Policy {
    /// Parses a route's policy.
    pub(crate) fn parse(policy: &wire::Policy) -> Result<Self, PolicyError> {
        Ok(Self {
            first_byte_timeout: limit(policy.first_byte_timeout_ms),
            attempt_timeout: limit(policy.attempt_timeout_ms),
            retries: policy.retries,
            retry: policy.retry.as_ref().map(|retry| RetryRules {
                base_delay: Duration::from_millis(retry.base_delay_ms),
                budget_percent: retry.budget_percent,
                min_retries: retry.min_retries,
                window: Duration::from_millis(retry.window_ms),
            }),
            hold: limit(policy.hold_ms),
            hold_requests: Some(policy.hold_requests).filter(|&requests| requests > 0),
            accept_tenant: policy.accept_tenant,
            accept_priority: policy.accept_priority,
            balance: policy
                .load_balancing
                .as_ref()
                .map_or_else(|| Ok(BalanceRules::default()), parse_balance)?,
            health: policy.health_check.as_ref().map(|check| HealthRules {
                interval: Duration::from_millis(check.interval_ms).max(SHORTEST_INTERVAL),
                timeout: Duration::from_millis(check.timeout_ms),
                down_after: check.down_after,
                up_after: check.up_after,
            }),
            breaker: policy.circuit_breaker.as_ref().map(|breaker| BreakerRules {
                consecutive_failures: breaker.consecutive_failures,
                failure_percent: breaker.failure_percent,
                min_attempts: breaker.min_attempts,
                window: Duration::from_millis(breaker.window_ms),
                open: Duration::from_millis(breaker.open_ms),
            }),
            hedge: policy.hedge.as_ref().map(|hedge| HedgeRules {
                delay: limit(hedge.delay_ms),
                budget_percent: hedge.budget_percent,
            }),
        })
    }
}

/// More checks would be a load of their own.
const SHORTEST_INTERVAL: Duration = Duration::from_secs(1);

fn limit(limit_ms: u64) -> Option<Duration> {
    (limit_ms > 0).then(|| Duration::from_millis(limit_ms))
}

fn parse_balance(rules: &wire::LoadBalancing) -> Result<BalanceRules, PolicyError> {
    // An algorithm of a newer operator is no reason to refuse the whole table.
    let algorithm = match rules.by() {
        wire::BalanceBy::LeastRequests => Algorithm::LeastRequests,
        wire::BalanceBy::RoundRobin => Algorithm::RoundRobin,
        wire::BalanceBy::Weighted => Algorithm::Weighted,
        wire::BalanceBy::LatencyEwma => Algorithm::LatencyEwma,
        wire::BalanceBy::ConsistentHash => Algorithm::ConsistentHash,
    };
    let hash_on = match rules.hash_on() {
        wire::HashOn::PromptPrefix => HashOn::PromptPrefix,
        wire::HashOn::Header => HashOn::Header(header("hash_header", &rules.hash_header)?),
    };
    Ok(BalanceRules { algorithm, slow_start: Duration::from_millis(rules.slow_start_ms), hash_on })
}

impl SplitRule {
    /// Whether a user is outside the route's test.
    pub(crate) fn excludes(&self, user: &[u8]) -> bool {
        let outside = |range: &UserRange| range.buckets.contains(&u32::from(bucket_of(&range.salt, user)));
        self.excluded_users.iter().any(outside)
    }

    /// Parses a route's split.
    pub(crate) fn parse(split: wire::Split) -> Result<Self, PolicyError> {
        let by = match split.by() {
            wire::SplitBy::Request => SplitBy::Request,
            wire::SplitBy::Percentage => SplitBy::Percentage,
            wire::SplitBy::User => SplitBy::User {
                user: Arc::new(UserRule {
                    header: header("user_header", &split.user_header)?,
                    claim: Some(split.user_claim).filter(|claim| !claim.is_empty()),
                    salt: split.salt,
                }),
                owners: BucketOwners::of_ranges(&split.owners).map_err(|error| PolicyError {
                    field: "owners",
                    value: error.to_string(),
                    expected: "an owner for every bucket".to_owned(),
                })?,
            },
        };
        let forced = if split.forced_revisions.is_empty() {
            None
        } else {
            let header = header("forced_header", &split.forced_header)?;
            Some(ForcedRevisions { header, revisions: split.forced_revisions })
        };
        let forced_users = split.forced_users.into_iter().map(|one| (one.user.into_bytes(), one.variant));
        let excluded_users = split.excluded_users.into_iter();
        let excluded_users =
            excluded_users.map(|one| UserRange { salt: one.salt, buckets: one.start..one.end });
        Ok(Self {
            by,
            forced,
            forced_users: forced_users.collect(),
            excluded_users: excluded_users.collect(),
        })
    }
}

fn header(field: &'static str, name: &str) -> Result<HeaderName, PolicyError> {
    let expected = || "the name of a header".to_owned();
    name.parse().map_err(|_| PolicyError { field, value: name.to_owned(), expected: expected() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use trustformers_proto::buckets::RevisionWeight;

    /// A policy with every field.
    fn complete() -> wire::Policy {
        wire::Policy {
            first_byte_timeout_ms: 60_000,
            retries: 2,
            hold_ms: 30_000,
            accept_tenant: true,
            load_balancing: Some(wire::LoadBalancing {
                by: wire::BalanceBy::ConsistentHash.into(),
                slow_start_ms: 5000,
                hash_on: wire::HashOn::Header.into(),
                hash_header: "x-session-id".to_owned(),
            }),
            health_check: Some(wire::HealthCheck {
                interval_ms: 30_000,
                timeout_ms: 2000,
                down_after: 3,
                up_after: 2,
            }),
            circuit_breaker: Some(wire::CircuitBreaker {
                consecutive_failures: 5,
                failure_percent: 50,
                min_attempts: 20,
                window_ms: 10_000,
                open_ms: 60_000,
            }),
            retry: Some(wire::Retry {
                base_delay_ms: 100,
                budget_percent: 20,
                min_retries: 10,
                window_ms: 10_000,
            }),
            attempt_timeout_ms: 15_000,
            hold_requests: 64,
            hedge: Some(wire::Hedge { delay_ms: 0, budget_percent: 5 }),
            ..Default::default()
        }
    }

    #[test]
    fn every_field_of_a_policy_arrives() {
        let second = Duration::from_secs;
        let expected = Policy {
            first_byte_timeout: Some(second(60)),
            attempt_timeout: Some(second(15)),
            retries: 2,
            retry: Some(RetryRules {
                base_delay: Duration::from_millis(100),
                budget_percent: 20,
                min_retries: 10,
                window: second(10),
            }),
            hold: Some(second(30)),
            hold_requests: Some(64),
            accept_tenant: true,
            balance: BalanceRules {
                algorithm: Algorithm::ConsistentHash,
                slow_start: second(5),
                hash_on: HashOn::Header(HeaderName::from_static("x-session-id")),
            },
            health: Some(HealthRules {
                interval: second(30),
                timeout: second(2),
                down_after: 3,
                up_after: 2,
            }),
            breaker: Some(BreakerRules {
                consecutive_failures: 5,
                failure_percent: 50,
                min_attempts: 20,
                window: second(10),
                open: second(60),
            }),
            hedge: Some(HedgeRules { delay: None, budget_percent: 5 }),
            ..Policy::default()
        };
        assert_eq!(Policy::parse(&complete()).unwrap(), expected);
        let older = Policy { retries: 0, ..Policy::default() };
        assert_eq!(Policy::parse(&wire::Policy::default()).unwrap(), older);
    }

    #[test]
    fn a_split_that_cannot_be_used_names_its_field() {
        let weights = [RevisionWeight { revision: "r1".to_owned(), weight: 1 }];
        let owners = BucketOwners::with_weights(&weights).unwrap();
        let good = wire::Split {
            by: wire::SplitBy::User.into(),
            user_header: "x-user-id".to_owned(),
            salt: "s".to_owned(),
            owners: owners.to_ranges(),
            forced_header: "x-revision".to_owned(),
            forced_revisions: vec!["r1".to_owned()],
            ..Default::default()
        };
        assert!(SplitRule::parse(good.clone()).is_ok());
        let fault = |split| SplitRule::parse(split).unwrap_err().field;
        assert_eq!(fault(wire::Split { user_header: "two words".to_owned(), ..good.clone() }), "user_header");
        assert_eq!(fault(wire::Split { owners: Vec::new(), ..good.clone() }), "owners");
        assert_eq!(fault(wire::Split { forced_header: String::new(), ..good }), "forced_header");
    }
}
