//! What a status keeps of earlier checkpoints, and how the load of the variants compares.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use trustformers_crds::{ABTestStatus, TestLook};

use super::super::assess::EpochSample;
use super::super::figures::{decimals, effects, signed};
use super::TestFacts;

/// Most entries of the history: each has some 100 bytes for each variant, 15 KB together.
const MAX_LOOKS: usize = 48;
/// A test of any age has about so many entries before every second one is dropped.
const LOOKS_OF_AGE: u32 = 24;
/// Requests of each variant below which their load is not compared.
const MIN_REQUESTS: u64 = 200;
/// The load per pod of one variant by that of another above which the comparison is unfair.
const MAX_LOAD_RATIO: f64 = 1.2;

fn elapsed(since: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(since)).unwrap_or_default()
}

/// Adds the effects that the status shows to its history, if the last entry is old enough.
pub(super) fn remember(status: &mut ABTestStatus, now: Timestamp) {
    let effects = effects(&status.variants);
    let age = status.started_at.as_ref().map_or(Duration::ZERO, |since| elapsed(since.0, now));
    let is_early = status.history.last().is_some_and(|last| elapsed(last.at.0, now) < age / LOOKS_OF_AGE);
    if effects.is_empty() || is_early {
        return;
    }
    status.history.push(TestLook { at: Time(now), samples: status.samples, effects });
    if status.history.len() > MAX_LOOKS {
        let mut number = 0;
        status.history.retain(|_| {
            number += 1;
            number % 2 == 1
        });
    }
}

/// How the load per pod compares.
pub(super) struct Load {
    /// Whether it is about the same.
    pub(super) matched: bool,
    /// For people.
    pub(super) message: String,
}

/// Writes pods and load of each variant into the status. Gives how they compare; none with too few requests.
pub(super) fn load(
    status: &mut ABTestStatus,
    epoch: &EpochSample,
    facts: &TestFacts,
    now: Timestamp,
) -> Option<Load> {
    let since = status.epochs.last()?.since.0;
    let seconds = elapsed(since, now).as_secs_f64().max(1.0);
    let mut loads = Vec::new();
    for (index, variant) in status.variants.iter_mut().enumerate() {
        let replicas = facts.replicas.get(index).copied().unwrap_or(0);
        let requests = epoch.variants.get(index)?.requests();
        variant.replicas = signed(u64::from(replicas));
        let per_replica = requests as f64 / seconds / f64::from(replicas.max(1));
        variant.load_per_replica = (requests > 0).then(|| decimals(per_replica, 3));
        if epoch.weights.get(index).is_some_and(|weight| *weight > 0) {
            loads.push((requests, per_replica, variant.name.clone()));
        }
    }
    if loads.len() < 2 || loads.iter().any(|(requests, ..)| *requests < MIN_REQUESTS) {
        return None;
    }
    let least = loads.iter().map(|(_, load, _)| *load).fold(f64::INFINITY, f64::min);
    let most = loads.iter().map(|(_, load, _)| *load).fold(0.0, f64::max);
    let matched = most <= MAX_LOAD_RATIO * least;
    let of = |(_, load, name): &(u64, f64, String)| format!("{name} {load:.2}");
    let each = loads.iter().map(of).collect::<Vec<_>>().join(", ");
    let message = if matched {
        format!("requests per second and pod: {each}")
    } else {
        format!(
            "requests per second and pod: {each}; a variant with more load is slower for that alone: give the variants pods in proportion to their weights"
        )
    };
    Some(Load { matched, message })
}
