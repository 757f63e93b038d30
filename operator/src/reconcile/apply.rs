//! Step four of a reconcile: send what differs, in an order that never shows a half-made model.
//!
//! Server-side apply with one field manager. The first apply of an object is not forced, so that an object of the same
//! name that somebody else made is a conflict, told to the user, and never taken over. An account has no field that
//! could be in conflict, so its first apply is tried on first, and refused where others have written to it. Later
//! applies are forced: drift is corrected. What the API server holds already is not sent again.

use std::fmt::Debug;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, ServiceAccount};
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::core::NamespaceResourceScope;
use kube::{Api, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use trustformers_control::build::Desired;
use trustformers_control::{names, status};

use super::fetch::Seen;
use crate::world::World;

/// Why an object could not be applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// Somebody else's object has the name.
    #[error(
        "{kind} {name} exists and is not made by this operator; delete it, or give the model another name ({said})"
    )]
    NotOurs {
        /// Kind of the object.
        kind: String,
        /// Its name.
        name: String,
        /// What the API server said.
        said: String,
    },
    /// The API server does not take the object: a quota, an admission rule, a bad value.
    #[error("the API server refuses {kind} {name}: {said}")]
    Refused {
        /// Kind of the object.
        kind: String,
        /// Its name.
        name: String,
        /// What the API server said.
        said: String,
    },
    /// The request failed.
    #[error("{kind} {name} could not be applied: {cause}")]
    Request {
        /// Kind of the object.
        kind: String,
        /// Its name.
        name: String,
        /// What failed.
        cause: Box<kube::Error>,
    },
    /// The object could not be written as JSON.
    #[error("an object of this model: {0}")]
    Json(#[from] serde_json::Error),
}

impl ApplyError {
    /// The variant's name, as metrics label it.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::NotOurs { .. } => "NotOurs",
            Self::Refused { .. } => "Refused",
            Self::Request { .. } => "Request",
            Self::Json(_) => "Json",
        }
    }

    fn of(kind: String, name: &str, first: bool, error: kube::Error) -> Self {
        let name = name.to_owned();
        match error {
            kube::Error::Api(said) if said.code == 409 && first => {
                Self::NotOurs { kind, name, said: said.message.clone() }
            }
            kube::Error::Api(said) if matches!(said.code, 400 | 403 | 422) => {
                Self::Refused { kind, name, said: said.message.clone() }
            }
            cause => Self::Request { kind, name, cause: Box::new(cause) },
        }
    }
}

/// What the API server holds after the step.
#[derive(Debug)]
pub struct Applied {
    /// Hash of what the pods load.
    pub revision: String,
    /// The Deployment, as new as it is known.
    pub deployment: Deployment,
}

/// Makes the desired objects so, and deletes configurations that nobody needs any more.
///
/// # Errors
/// The first object that the API server did not take.
pub async fn apply(world: &World, desired: Desired, seen: &Seen) -> Result<Applied, ApplyError> {
    let Desired { revision, service_account, config_map, service, deployment, budget } = desired;
    let wanted_map = config_map.name_any();
    let seen_map = seen.config_maps.iter().find(|map| map.name_any() == wanted_map);
    // What pods need comes before the pods, and the budget before there is anything to evict.
    if seen.service_account.is_none() {
        is_nobody_elses(world, &service_account).await?;
    }
    one(world, seen.service_account.as_deref(), &service_account).await?;
    one(world, seen_map.map(|map| &**map), &config_map).await?;
    one(world, seen.service.as_deref(), &service).await?;
    one(world, seen.budget.as_deref(), &budget).await?;
    let applied = one(world, seen.deployment.as_deref(), &deployment).await?;
    let deployment = applied.or_else(|| seen.deployment.as_deref().cloned()).unwrap_or(deployment);
    prune(world, seen, &wanted_map, &deployment).await?;
    Ok(Applied { revision, deployment })
}

/// Refuses an account that somebody else wrote to, by an apply that stores nothing.
async fn is_nobody_elses(world: &World, account: &ServiceAccount) -> Result<(), ApplyError> {
    let kind = ServiceAccount::kind(&()).into_owned();
    let name = account.name_any();
    let params = PatchParams { dry_run: true, ..PatchParams::apply(names::MANAGER) };
    let api =
        Api::<ServiceAccount>::namespaced(world.client.clone(), &account.namespace().unwrap_or_default());
    let tried = api
        .patch(&name, &params, &Patch::Apply(account))
        .await
        .map_err(|error| ApplyError::of(kind.clone(), &name, true, error))?;
    let managers = tried.managed_fields().iter().filter_map(|entry| entry.manager.as_deref());
    match managers.into_iter().find(|manager| *manager != names::MANAGER) {
        Some(other) => Err(ApplyError::NotOurs { kind, name, said: format!("{other} wrote to it") }),
        None => Ok(()),
    }
}

/// Applies one object unless it is there as it should be; returns what the API server then holds.
async fn one<K>(world: &World, seen: Option<&K>, desired: &K) -> Result<Option<K>, ApplyError>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + Serialize
        + DeserializeOwned
        + Debug,
{
    let kind = K::kind(&()).into_owned();
    let name = desired.name_any();
    let wanted = serde_json::to_value(desired)?;
    if let Some(seen) = seen
        && covers(&serde_json::to_value(seen)?, &wanted)
    {
        return Ok(None);
    }
    let mut params = PatchParams::apply(names::MANAGER);
    params.force = seen.is_some();
    let api = Api::<K>::namespaced(world.client.clone(), &desired.namespace().unwrap_or_default());
    let applied = api
        .patch(&name, &params, &Patch::Apply(&wanted))
        .await
        .map_err(|error| ApplyError::of(kind.clone(), &name, seen.is_none(), error))?;
    world.metrics.wrote(&kind);
    Ok(Some(applied))
}

/// Deletes configurations of earlier revisions once the rollout is complete and no pod has them mounted.
async fn prune(world: &World, seen: &Seen, wanted: &str, deployment: &Deployment) -> Result<(), ApplyError> {
    let replicas = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(0);
    if !status::is_rolled_out(deployment, replicas) {
        return Ok(());
    }
    let unused = |name: &str| name != wanted && !seen.mounted.contains(name);
    for map in seen.config_maps.iter().filter(|map| unused(&map.name_any())) {
        let name = map.name_any();
        let api = Api::<ConfigMap>::namespaced(world.client.clone(), &map.namespace().unwrap_or_default());
        let this_one = Preconditions { uid: map.uid(), ..Preconditions::default() };
        match api.delete(&name, &DeleteParams::default().preconditions(this_one)).await {
            Ok(_) => world.metrics.wrote("ConfigMap"),
            // It is gone already, or another object has its name: neither is ours to delete.
            Err(kube::Error::Api(said)) if matches!(said.code, 404 | 409) => {}
            Err(error) => return Err(ApplyError::of("ConfigMap".to_owned(), &name, false, error)),
        }
    }
    Ok(())
}

/// Whether the stored object has everything that is wanted. It may have more: what the API server fills in.
///
/// A field that is wanted no more is not found here; the hash in the annotation, which is part of what is wanted,
/// changes with it.
fn covers(stored: &Value, wanted: &Value) -> bool {
    match (stored, wanted) {
        (Value::Object(stored), Value::Object(wanted)) => {
            wanted.iter().all(|(key, value)| match stored.get(key) {
                Some(stored) => covers(stored, value),
                None => is_empty(value),
            })
        }
        (Value::Array(stored), Value::Array(wanted)) => {
            stored.len() == wanted.len() && stored.iter().zip(wanted).all(|(one, other)| covers(one, other))
        }
        (Value::String(stored), Value::String(wanted)) => {
            stored == wanted
                || quantity(stored).zip(quantity(wanted)).is_some_and(|(one, other)| same_amount(one, other))
        }
        _ => stored == wanted,
    }
}

/// What the API server leaves out of what it stores.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// Whether two amounts are one, but for the last digits of a product such as 300 × 0.001. Quantities have at most
/// 1e-9 of a unit as their finest step, and what is compared here is far below 1e6 of them apart.
fn same_amount(one: f64, other: f64) -> bool {
    (one - other).abs() <= 1e-12 * one.abs().max(other.abs())
}

/// The amount that a quantity stands for: the API server writes `1000m` as `1`.
fn quantity(text: &str) -> Option<f64> {
    const UNITS: [(&str, f64); 15] = [
        ("Ki", 1024.0),
        ("Mi", 1_048_576.0),
        ("Gi", 1_073_741_824.0),
        ("Ti", 1_099_511_627_776.0),
        ("Pi", 1_125_899_906_842_624.0),
        ("Ei", 1_152_921_504_606_846_976.0),
        ("n", 1e-9),
        ("u", 1e-6),
        ("m", 1e-3),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("P", 1e15),
        ("E", 1e18),
    ];
    let (digits, unit) = UNITS
        .iter()
        .find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, *unit)))
        .unwrap_or((text, 1.0));
    digits.starts_with(|c: char| c.is_ascii_digit() || c == '.' || c == '+').then_some(())?;
    digits.parse::<f64>().ok().map(|number| number * unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_the_api_server_adds_is_no_difference() {
        let stored = json!({"spec": {"replicas": 1, "paused": false, "list": [{"name": "a", "more": 1}]}});
        assert!(covers(&stored, &json!({"spec": {"replicas": 1, "list": [{"name": "a", "value": ""}]}})));
        assert!(!covers(&stored, &json!({"spec": {"replicas": 2}})));
        assert!(!covers(&stored, &json!({"spec": {"list": [{"name": "a"}, {"name": "b"}]}})));
        assert!(!covers(&stored, &json!({"spec": {"other": true}})));
    }

    #[test]
    fn quantities_are_equal_by_amount() {
        for (one, other) in
            [("1", "1000m"), ("1Gi", "1024Mi"), ("1k", "1000"), ("+2", "2"), ("1e3", "1k"), ("0.3", "300m")]
        {
            assert!(covers(&json!(one), &json!(other)), "{one} {other}");
        }
        assert!(!covers(&json!("1"), &json!("2")));
        assert!(!covers(&json!("one"), &json!("two")));
    }
}
