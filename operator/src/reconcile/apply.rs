//! Step four of a reconcile: write what differs, in the order of `kinds::CHILDREN`.
//!
//! The operator uses server-side apply with one field manager. A child belongs to the model by the UID in its
//! owner reference. Applies of a child are forced: they correct drift. The first apply of an object is not
//! forced, so that an object of the same name with another owner is a conflict, which the status reports, and
//! is never taken over.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::Deployment;
use kube::Api;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, Preconditions};
use serde_json::{Value, json};
use trustformers_control::build::{Desired, DesiredObject};
use trustformers_control::drift::{FieldPath, covers, removal};
use trustformers_control::kinds::{CONFIG_MAP, ChildKind, DEPLOYMENT};
use trustformers_control::rollout::PoolSize;
use trustformers_control::{names, status};

use super::fetch::Observed;
use crate::children::Child;
use crate::context::Context;
use crate::watchers::resource;

/// Earlier ConfigMaps that stay while a Deployment replaces its pods, besides those that pods have mounted: a
/// pod that an old ReplicaSet replaces needs its ConfigMap again.
const SPARE_CONFIG_MAPS: usize = 2;

/// Why an object could not be applied. Metrics use the variant's name.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr)]
pub enum ApplyError {
    /// An object of another owner has the name.
    #[error(
        "{object} exists and does not belong to this model ({detail}); delete it, or give the model another name"
    )]
    NotOurs {
        /// Kind and name of the object.
        object: String,
        /// Its owner, or the conflict.
        detail: String,
    },
    /// The object belongs to a deleted model of the same name and is about to be deleted too.
    #[error("{object} of a deleted model of the same name is not deleted yet")]
    NotDeletedYet {
        /// Kind and name of the object.
        object: String,
    },
    /// The API server refuses the object: a quota, an admission rule, an invalid value.
    #[error("the API server refuses {object}: {detail}")]
    Refused {
        /// Kind and name of the object.
        object: String,
        /// The message of the API server.
        detail: String,
    },
    /// The request failed.
    #[error("{object} could not be written: {cause}")]
    Request {
        /// Kind and name of the object.
        object: String,
        /// What failed.
        cause: Box<kube::Error>,
    },
    /// The API server returned something that is not such an object.
    #[error("{object}: the API server returned an object without UID or resource version")]
    Incomplete {
        /// Kind and name of the object.
        object: String,
    },
}

impl ApplyError {
    fn of(object: String, error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) if matches!(status.code, 400 | 403 | 422) => {
                Self::Refused { object, detail: status.message.clone() }
            }
            cause => Self::Request { object, cause: Box::new(cause) },
        }
    }
}

/// What is stored after the step.
#[derive(Debug)]
pub struct Applied {
    /// Hash of what the pods load.
    pub revision: String,
    /// The Deployment of that revision, if it should exist.
    pub deployment: Option<Deployment>,
}

/// Applies the desired objects, scales the pods of other revisions, and deletes children that are no longer
/// needed.
///
/// # Errors
/// The first object that the API server did not accept.
pub async fn apply(
    context: &Context,
    desired: &Desired,
    observed: &Observed,
    pools: &[PoolSize],
) -> Result<Applied, ApplyError> {
    let mut deployment = None;
    for object in &desired.objects {
        let writer = ChildWriter::new(context, observed, object);
        let child = writer.apply().await?;
        writer.remove_foreign(&child).await?;
        if object.kind == &DEPLOYMENT {
            deployment = serde_json::from_value(child.object.clone()).ok();
        }
    }
    for pool in pools.iter().filter(|pool| pool.pool != desired.revision) {
        scale(context, observed, pool).await?;
    }
    prune(context, desired, observed, pools, deployment.as_ref()).await?;
    Ok(Applied { revision: desired.revision.clone(), deployment })
}

/// One desired object, and where it is written.
struct ChildWriter<'a> {
    context: &'a Context,
    observed: &'a Observed,
    desired: &'a DesiredObject,
    api: Api<DynamicObject>,
}

/// What an object of the desired name is to the model.
enum Ownership {
    /// The model owns it; with its UID.
    Own(String),
    /// It does not exist.
    Absent,
    /// It exists and has no owner: an apply that is not forced succeeds only if the operator made it.
    Unowned,
}

impl<'a> ChildWriter<'a> {
    fn new(context: &'a Context, observed: &'a Observed, desired: &'a DesiredObject) -> Self {
        let api = api(context, desired.kind, &observed.key.0);
        Self { context, observed, desired, api }
    }

    fn describe(&self) -> String {
        format!("{} {}", self.desired.kind.kind, self.desired.name)
    }

    /// Applies the object unless it is stored as desired; returns the stored object.
    async fn apply(&self) -> Result<Arc<Child>, ApplyError> {
        let DesiredObject { kind, name, object } = self.desired;
        let cached = self.context.children.get(kind, &self.observed.key.0, name);
        let ownership = match &cached {
            Some(child) => self.ownership(child)?,
            // The operator may have lost sight of it: somebody changed its labels.
            None if !kind.conflicts => self.look_up().await?,
            None => Ownership::Absent,
        };
        match (ownership, cached) {
            (Ownership::Own(_), Some(child)) if covers(kind, &child.object, object) => Ok(child),
            (Ownership::Own(uid), _) => self.patch(Some(&uid)).await,
            (Ownership::Absent | Ownership::Unowned, _) => match self.patch(None).await {
                Err(ApplyError::Request { cause, .. }) if is_conflict(&cause) => self.resolve(&cause).await,
                outcome => outcome,
            },
        }
    }

    /// After a conflict: the object is forced if the model owns it.
    async fn resolve(&self, conflict: &kube::Error) -> Result<Arc<Child>, ApplyError> {
        match self.look_up().await? {
            Ownership::Own(uid) => self.patch(Some(&uid)).await,
            Ownership::Unowned => {
                Err(ApplyError::NotOurs { object: self.describe(), detail: message(conflict) })
            }
            // It was deleted since.
            Ownership::Absent => self.patch(None).await,
        }
    }

    /// Reads the object from the API server and finds out who owns it.
    async fn look_up(&self) -> Result<Ownership, ApplyError> {
        let found = self.api.get_opt(&self.desired.name).await;
        let Some(found) = found.map_err(|error| ApplyError::of(self.describe(), error))? else {
            return Ok(Ownership::Absent);
        };
        let managers = found.metadata.managed_fields.clone().unwrap_or_default();
        let other = managers.into_iter().filter_map(|entry| entry.manager).find(|one| one != names::MANAGER);
        let child = self.child(found)?;
        match (self.ownership(&child)?, other) {
            (Ownership::Unowned, Some(other)) => Err(ApplyError::NotOurs {
                object: self.describe(),
                detail: format!("{other} wrote to it, and it has no owner"),
            }),
            (ownership, _) => Ok(ownership),
        }
    }

    fn ownership(&self, child: &Child) -> Result<Ownership, ApplyError> {
        match &child.owner {
            Some(owner) if owner.uid == self.observed.uid => Ok(Ownership::Own(child.uid.clone())),
            Some(owner) if owner.name == self.observed.key.1 => {
                Err(ApplyError::NotDeletedYet { object: self.describe() })
            }
            Some(owner) => Err(ApplyError::NotOurs {
                object: self.describe(),
                detail: format!("InferenceModel {} owns it", owner.name),
            }),
            None => Ok(Ownership::Unowned),
        }
    }

    /// Applies the object, by force if it is the model's own with this UID.
    async fn patch(&self, own: Option<&str>) -> Result<Arc<Child>, ApplyError> {
        let mut body = self.desired.object.clone();
        let mut params = PatchParams::apply(names::MANAGER);
        if let Some(uid) = own {
            // With the UID, the API server refuses to write to another object of the same name.
            body["metadata"]["uid"] = Value::String(uid.to_owned());
            params = params.force();
        }
        let stored = self.api.patch(&self.desired.name, &params, &Patch::Apply(&body)).await;
        self.store(stored.map_err(|error| ApplyError::of(self.describe(), error))?)
    }

    /// Removes what other field managers set in the part of the object that belongs to the operator alone.
    async fn remove_foreign(&self, child: &Child) -> Result<(), ApplyError> {
        if child.foreign.is_empty() || self.context.children.is_tolerated(child) {
            return Ok(());
        }
        let params = PatchParams { field_manager: Some(names::MANAGER.to_owned()), ..PatchParams::default() };
        let patch = serde_json::from_value(removal(&child.version, &child.foreign));
        let patch = patch.map_err(|error| ApplyError::Request {
            object: self.describe(),
            cause: Box::new(kube::Error::SerdeError(error)),
        })?;
        match self.api.patch(&self.desired.name, &params, &Patch::Json::<()>(patch)).await {
            Ok(stored) => {
                let stored = self.store(stored)?;
                if !stored.foreign.is_empty() {
                    tracing::warn!(
                        object = self.describe(),
                        fields = ?stored.foreign.iter().map(FieldPath::pointer).collect::<Vec<_>>(),
                        "fields that another manager sets came back when they were removed; they stay"
                    );
                    self.context.children.tolerate(&stored);
                }
                Ok(())
            }
            // It changed meanwhile. The watch delivers the change, and the next reconcile looks again.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409 | 422) => Ok(()),
            Err(error) => Err(ApplyError::of(self.describe(), error)),
        }
    }

    fn child(&self, object: DynamicObject) -> Result<Child, ApplyError> {
        let incomplete = || ApplyError::Incomplete { object: self.describe() };
        Child::of(self.desired.kind, object).ok_or_else(incomplete)
    }

    /// Puts a response into the cache, so that the next reconcile reads it.
    fn store(&self, object: DynamicObject) -> Result<Arc<Child>, ApplyError> {
        self.context.metrics.count_write(self.desired.kind.kind);
        Ok(self.context.children.insert(self.child(object)?))
    }
}

fn api(context: &Context, kind: &ChildKind, namespace: &str) -> Api<DynamicObject> {
    Api::namespaced_with(context.client.clone(), namespace, &resource(kind))
}

fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}

fn message(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

/// Scales the Deployment of a revision that the spec does not describe any more. Nothing else of it is
/// written: its pods stay as they were made.
async fn scale(context: &Context, observed: &Observed, pool: &PoolSize) -> Result<(), ApplyError> {
    let is_pool = |child: &&Arc<Child>| {
        child.kind == &DEPLOYMENT && child.label(names::REVISION_LABEL) == Some(pool.pool.as_str())
    };
    // If it is gone, its revision has no pods, and the rollout goes on from that.
    let Some(child) = observed.children.iter().find(is_pool) else { return Ok(()) };
    if child.object["spec"]["replicas"] == json!(pool.replicas) {
        return Ok(());
    }
    let body = json!({"metadata": {"uid": child.uid}, "spec": {"replicas": pool.replicas}});
    let params = PatchParams { field_manager: Some(names::MANAGER.to_owned()), ..PatchParams::default() };
    let object = format!("{} {}", child.kind.kind, child.name);
    match api(context, child.kind, &child.namespace).patch(&child.name, &params, &Patch::Merge(&body)).await {
        Ok(stored) => {
            context.metrics.count_write(child.kind.kind);
            let stored = Child::of(child.kind, stored).ok_or(ApplyError::Incomplete { object })?;
            context.children.insert(stored);
            Ok(())
        }
        // It is gone, or another object has its name.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        Err(error) => Err(ApplyError::of(object, error)),
    }
}

/// Deletes children that are no longer needed.
async fn prune(
    context: &Context,
    desired: &Desired,
    observed: &Observed,
    pools: &[PoolSize],
    deployment: Option<&Deployment>,
) -> Result<(), ApplyError> {
    let complete = deployment.is_none_or(|deployment| {
        let replicas = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(0);
        status::is_rolled_out(deployment, replicas)
    });
    for child in unneeded(desired, observed, pools, complete) {
        let this_one = Preconditions { uid: Some(child.uid.clone()), ..Preconditions::default() };
        let params = DeleteParams::default().preconditions(this_one);
        match api(context, child.kind, &child.namespace).delete(&child.name, &params).await {
            Ok(_) => {
                context.metrics.count_write(child.kind.kind);
                context.children.remove(child);
            }
            // It is gone, or another object has its name.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
            Err(error) => return Err(ApplyError::of(format!("{} {}", child.kind.kind, child.name), error)),
        }
    }
    Ok(())
}

/// The children that are neither desired nor needed by a pod or a pool. While the Deployment replaces its
/// pods, an earlier ReplicaSet of it may replace some too: the newest ConfigMaps stay.
fn unneeded<'a>(
    desired: &Desired,
    observed: &'a Observed,
    pools: &[PoolSize],
    complete: bool,
) -> Vec<&'a Child> {
    let is_desired =
        |child: &Child| desired.objects.iter().any(|one| one.kind == child.kind && one.name == child.name);
    let of_pool = |child: &Child| {
        let revision = child.label(names::REVISION_LABEL);
        pools.iter().any(|pool| Some(pool.pool.as_str()) == revision)
    };
    // A Deployment is needed by its pool, and the ConfigMap in its template with it.
    let is_needed = |child: &Child| match child.kind {
        kind if kind == &DEPLOYMENT => of_pool(child),
        kind if kind == &CONFIG_MAP => {
            observed.mounted.contains(&child.name)
                || of_pool(child) && child.label(names::REVISION_LABEL) != Some(desired.revision.as_str())
        }
        _ => false,
    };
    let children = observed.children.iter().map(|child| &**child);
    let unneeded: Vec<&Child> =
        children.filter(|child| child.kind.prune && !is_desired(child) && !is_needed(child)).collect();
    if complete {
        return unneeded;
    }
    let (mut candidates, mut others): (Vec<&Child>, Vec<&Child>) =
        unneeded.into_iter().partition(|child| child.kind == &CONFIG_MAP);
    // Times in this format sort like text; the newest comes first.
    let created = |child: &Child| child.object["metadata"]["creationTimestamp"].as_str().map(str::to_owned);
    candidates.sort_by_key(|child| std::cmp::Reverse(created(child)));
    others.extend(candidates.split_off(SPARE_CONFIG_MAPS.min(candidates.len())));
    others
}
