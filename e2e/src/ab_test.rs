//! A/B tests as their callers and their owners see them: requests of many users, and the status of a test.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Deref,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt, stream};
use kube::api::DynamicObject;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{cluster::Cluster, gateway::Gateway, objects::CustomObjects, request::Failure, wait::Until};

/// Requests of users at a time: enough that a variant that waits does not set the pace, and few for two
/// cores.
const CONCURRENT_VISITS: usize = 12;
/// Buckets of users, of which each belongs to one variant.
const BUCKETS: u64 = 10_000;

/// The tests of one namespace.
#[derive(Clone)]
pub struct Tests(CustomObjects);

/// One request of a user that was answered.
#[derive(Debug, Clone)]
pub struct Visit {
    /// Who sent it.
    pub user: String,
    /// The variant that the answer names.
    pub variant: String,
    /// The id with which the answer can be scored.
    pub request_id: String,
    /// What lets any gateway count the score.
    pub token: Option<String>,
    /// From the request to the end of its answer.
    pub took: Duration,
}

impl Tests {
    /// The tests of `namespace`.
    #[must_use]
    pub fn new(cluster: &Cluster, namespace: &str) -> Self {
        Self(CustomObjects::new(cluster, namespace, "ABTest"))
    }
}

impl Deref for Tests {
    type Target = CustomObjects;

    fn deref(&self) -> &CustomObjects {
        &self.0
    }
}

/// Waits until the route of a test answers.
///
/// # Errors
/// When it does not within 30 s, or an answer names no variant.
pub async fn answers(gateway: &Gateway, model: &str) -> Result<Visit> {
    let until = Until::new("the route of the test answers", 30);
    until
        .polled(|| async {
            match visit(gateway, model, "first".to_owned()).await {
                Ok(visit) => Ok(Some(visit)),
                Err(error) => match error.downcast_ref::<Failure>().and_then(Failure::status) {
                    Some(404 | 503) => Ok(None),
                    _ => Err(error),
                },
            }
        })
        .await
}

/// Each of these users asks for one vector.
///
/// # Errors
/// When one gets no whole answer, or one that names no variant.
pub async fn visits(
    gateway: &Gateway,
    model: &str,
    users: impl IntoIterator<Item = String>,
) -> Result<Vec<Visit>> {
    let visits = users.into_iter().map(|user| visit(gateway, model, user));
    stream::iter(visits).buffer_unordered(CONCURRENT_VISITS).try_collect().await
}

/// This user asks for one vector.
///
/// # Errors
/// When there is no whole answer, or one that names no variant.
pub async fn visit(gateway: &Gateway, model: &str, user: String) -> Result<Visit> {
    let body = json!({"model": model, "input": ["a short text"]});
    let began = Instant::now();
    let answer = gateway.post_as(&user, "/v1/embeddings", &body).await?;
    let variant = answer.variant.context("the answer names no variant")?;
    Ok(Visit { user, variant, request_id: answer.request_id, token: answer.token, took: began.elapsed() })
}

/// Each of these answers is scored by its user. A score follows from the visit alone, not from its place
/// among the visits: those are in the order of their answers, in which two pods of equal speed alternate.
///
/// # Errors
/// When a score is not taken.
pub async fn score(gateway: &Gateway, visits: &[Visit], score_of: impl Fn(&Visit) -> f64) -> Result<()> {
    let scores = visits.iter().map(|visit| {
        let body = json!({"request_id": visit.request_id, "score": score_of(visit), "token": visit.token});
        async move {
            let scored = gateway.post_as(&visit.user, "/v1/feedback", &body).await;
            scored.map(drop).with_context(|| format!("the score of {visit:?} was not taken"))
        }
    });
    stream::iter(scores).buffer_unordered(CONCURRENT_VISITS).try_collect().await
}

/// The status of a test as YAML, for messages.
#[must_use]
pub fn seen(test: &DynamicObject) -> String {
    let status = test.data.get("status").cloned().unwrap_or_default();
    serde_yaml::to_string(&status).unwrap_or_else(|_| status.to_string())
}

/// The bucket of a user in the test with this UID, as gateways hash it.
#[must_use]
pub fn bucket_of(uid: &str, user: &str) -> u64 {
    let mut hash = Sha256::new();
    hash.update((uid.len() as u64).to_be_bytes());
    hash.update(uid.as_bytes());
    hash.update(user.as_bytes());
    let digest = hash.finalize();
    digest.iter().take(8).fold(0_u64, |number, byte| number << 8 | u64::from(*byte)) % BUCKETS
}

/// A number of a variant's status, whose names are texts; none where it is absent.
#[must_use]
pub fn figure(test: &DynamicObject, variant: &str, pointer: &str) -> Option<f64> {
    let variants = test.data.pointer("/status/variants").and_then(Value::as_array)?;
    let one = variants.iter().find(|one| one["name"] == variant)?;
    let value = one.pointer(pointer)?;
    value.as_f64().or_else(|| value.as_str()?.parse().ok())
}

/// What callers counted of a test.
#[derive(Debug, Default)]
pub struct Counted {
    requests: BTreeMap<String, i64>,
    users: BTreeMap<String, BTreeSet<String>>,
}

impl Counted {
    /// Adds answers.
    pub fn add(&mut self, visits: Vec<Visit>) {
        for visit in visits {
            *self.requests.entry(visit.variant.clone()).or_default() += 1;
            self.users.entry(visit.variant).or_default().insert(visit.user);
        }
    }

    /// The users of a variant.
    #[must_use]
    pub fn users(&self, variant: &str) -> BTreeSet<String> {
        self.users.get(variant).cloned().unwrap_or_default()
    }

    /// Whether a status has the same counts, and no errors.
    #[must_use]
    pub fn equals(&self, test: &DynamicObject) -> bool {
        let variants = test.data.pointer("/status/variants").and_then(Value::as_array);
        variants.is_some_and(|variants| {
            variants.iter().all(|one| {
                let name = one["name"].as_str().unwrap_or_default();
                one["requests"].as_i64() == self.requests.get(name).copied()
                    && one["users"].as_u64() == self.users.get(name).map(|users| users.len() as u64)
                    && one["errors"].as_i64() == Some(0)
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_of_users_are_spread_over_the_whole() {
        let buckets: BTreeSet<u64> =
            (0..1000).map(|number| bucket_of("uid", &format!("user-{number}"))).collect();
        assert!(buckets.len() > 900 && buckets.iter().all(|bucket| *bucket < BUCKETS));
        assert_ne!(bucket_of("uid", "ann"), bucket_of("other", "ann"));
    }

    #[test]
    fn figures_of_a_variant_are_numbers_or_texts() {
        let test: DynamicObject = serde_json::from_value(json!({
            "metadata": {"name": "t"},
            "status": {"variants": [{"name": "a", "requests": 3, "metrics": [{"low": "-0.5"}]}]},
        }))
        .unwrap();
        assert_eq!(figure(&test, "a", "/requests"), Some(3.0));
        assert_eq!(figure(&test, "a", "/metrics/0/low"), Some(-0.5));
        assert_eq!(figure(&test, "b", "/requests"), None);
        let mut counted = Counted::default();
        assert!(!counted.equals(&test));
        counted.add(Vec::new());
        assert!(counted.users("a").is_empty());
    }
}
