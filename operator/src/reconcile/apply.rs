//! Step four of a reconcile: write what differs.
//!
//! What does not exist is created by POST: nothing is read before, and a name that is in use is a conflict.
//! What exists and differs is corrected by server-side apply under one field manager, by force. A child
//! belongs to the model by the UID in its owner reference; an object of another owner is never taken over,
//! and the status reports it. What pods need is written in one go with the Deployment, before the rest.

use std::sync::Arc;

use futures::future::join_all;
use k8s_openapi::api::apps::v1::Deployment;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams, Request};
use serde_json::{Value, json};
use trustformers_control::build::{Desired, DesiredObject};
use trustformers_control::drift::{FieldPath, covers, removal};
use trustformers_control::kinds::{ChildKind, DEPLOYMENT};
use trustformers_control::names;
use trustformers_control::rollout::PoolSize;

use super::fetch::Observed;
use super::prune::{prune, scale};
use super::settled::Settled;
use crate::children::Child;
use crate::context::Context;
use crate::decode::StoredObject;
use crate::watchers::resource;

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
    /// The object changed while it was corrected.
    #[error("{object} changed while it was corrected")]
    Changed {
        /// Kind and name of the object.
        object: String,
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
    /// The error of a request about an object.
    pub(super) fn of(object: String, error: kube::Error) -> Self {
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

/// How much of a model is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Everything.
    All,
    /// What pods need. Deployments of other new models go before the rest.
    Pods,
}

/// Writes the desired objects that differ from what is stored.
///
/// # Errors
/// The first object that the API server did not accept.
pub async fn write(
    context: &Context,
    desired: &Desired,
    observed: &Observed,
    extent: Extent,
) -> Result<(), ApplyError> {
    for with_pods in [true, false] {
        if !with_pods && extent == Extent::Pods {
            break;
        }
        let objects = desired.objects.iter().filter(|object| object.kind.with_pods == with_pods);
        let writers: Vec<_> = objects.map(|object| ChildWriter::new(context, observed, object)).collect();
        if observed.children.is_empty() {
            // Each request ends before its error is looked at: one that is dropped may still be carried out.
            let outcomes = join_all(writers.iter().map(ChildWriter::settle)).await;
            outcomes.into_iter().collect::<Result<(), ApplyError>>()?;
        } else {
            // A pod that starts must find the configuration of its template, and not an earlier one.
            for writer in &writers {
                writer.settle().await?;
            }
        }
    }
    Ok(())
}

/// Scales the pods of other revisions, and deletes children that are no longer needed.
///
/// # Errors
/// The first request that failed.
pub async fn finish(
    context: &Context,
    settled: &Settled,
    observed: &Observed,
    pools: &[PoolSize],
) -> Result<Applied, ApplyError> {
    let deployment = deployment(context, settled, observed);
    for pool in pools.iter().filter(|pool| Some(&pool.pool) != settled.pool.as_ref()) {
        scale(context, observed, pool).await?;
    }
    prune(context, settled, observed, pools, deployment.as_ref()).await?;
    Ok(Applied { revision: settled.revision.clone(), deployment })
}

/// The stored Deployment of the revision.
fn deployment(context: &Context, settled: &Settled, observed: &Observed) -> Option<Deployment> {
    let desired = settled.objects.iter().find(|object| object.kind == &DEPLOYMENT)?;
    let child = context.children.get(&DEPLOYMENT, &observed.key.0, &desired.name)?;
    child.deployment.as_deref().cloned()
}

/// One desired object, and where it is written.
struct ChildWriter<'a> {
    context: &'a Context,
    observed: &'a Observed,
    desired: &'a DesiredObject,
    api: Api<StoredObject>,
}

/// What an object of the desired name is to the model.
#[derive(Debug, Clone, Copy)]
enum Ownership {
    /// The model owns it.
    Own,
    /// It has no owner: an apply that is not forced succeeds only if the operator made it.
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

    /// Writes the object unless it is stored as desired.
    async fn settle(&self) -> Result<(), ApplyError> {
        let DesiredObject { kind, name, object, hash } = self.desired;
        let children = &self.context.children;
        let Some(child) = children.get(kind, &self.observed.key.0, name) else {
            return self.create().await.map(drop);
        };
        let child = match self.ownership(&child)? {
            Ownership::Own if children.covers(&child, hash) => child,
            Ownership::Own if covers(kind, &child.object(), object) => {
                children.set_covers(&child, hash);
                child
            }
            Ownership::Own => self.correct(&child).await?,
            Ownership::Unowned => self.adopt().await?,
        };
        self.remove_foreign(&child).await
    }

    /// Creates the object.
    async fn create(&self) -> Result<Arc<Child>, ApplyError> {
        match self.post().await {
            Err(ApplyError::Request { cause, .. }) if is_conflict(&cause) => self.resolve().await,
            outcome => outcome,
        }
    }

    /// After a conflict: the operator has lost sight of the object because somebody changed its labels, an
    /// earlier request was carried out and its response lost, or it is another owner's.
    async fn resolve(&self) -> Result<Arc<Child>, ApplyError> {
        let Some(found) = self.look_up().await? else {
            // It was deleted since.
            return self.post().await;
        };
        match self.ownership(&found)? {
            Ownership::Own if covers(self.desired.kind, &found.object(), &self.desired.object) => {
                Ok(self.context.children.insert(found))
            }
            Ownership::Own => self.correct(&found).await,
            Ownership::Unowned => self.adopt().await,
        }
    }

    /// Reads the object from the API server. An object without an owner that others wrote to is not the
    /// operator's.
    async fn look_up(&self) -> Result<Option<Child>, ApplyError> {
        let found = self.api.get_opt(&self.desired.name).await;
        let Some(found) = found.map_err(|error| ApplyError::of(self.describe(), error))? else {
            return Ok(None);
        };
        let managers = found.metadata.managed_fields.clone().unwrap_or_default();
        let other = managers.into_iter().filter_map(|entry| entry.manager).find(|one| one != names::MANAGER);
        let child = self.child(found)?;
        match (self.ownership(&child)?, other) {
            (Ownership::Unowned, Some(other)) => Err(ApplyError::NotOurs {
                object: self.describe(),
                detail: format!("{other} wrote to it, and it has no owner"),
            }),
            _ => Ok(Some(child)),
        }
    }

    fn ownership(&self, child: &Child) -> Result<Ownership, ApplyError> {
        match &child.owner {
            Some(owner) if owner.uid == self.observed.uid => Ok(Ownership::Own),
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

    async fn post(&self) -> Result<Arc<Child>, ApplyError> {
        let params = PostParams { field_manager: Some(names::MANAGER.to_owned()), ..PostParams::default() };
        let body = serde_json::to_vec(&self.desired.object).map_err(kube::Error::SerdeError);
        let request = body.and_then(|body| {
            Request::new(self.api.resource_url()).create(&params, body).map_err(kube::Error::BuildRequest)
        });
        let stored = match request {
            Ok(request) => self.context.client.request::<StoredObject>(request).await,
            Err(error) => Err(error),
        };
        self.store(stored.map_err(|error| ApplyError::of(self.describe(), error))?)
    }

    /// Applies the object by force: it is the model's own. With the UID, the API server refuses to write to
    /// another object of the same name.
    async fn correct(&self, child: &Child) -> Result<Arc<Child>, ApplyError> {
        if let Some(index) = child.posted {
            self.claim_fields(child, index).await?;
        }
        let mut body = self.desired.object.clone();
        body["metadata"]["uid"] = Value::String(child.uid.clone());
        self.patch(&body, PatchParams::apply(names::MANAGER).force()).await
    }

    /// Applies the object without force: an object that has no owner is the operator's only if nobody else
    /// has set what it sets.
    async fn adopt(&self) -> Result<Arc<Child>, ApplyError> {
        match self.patch(&self.desired.object, PatchParams::apply(names::MANAGER)).await {
            Err(ApplyError::Request { cause, .. }) if is_conflict(&cause) => {
                Err(ApplyError::NotOurs { object: self.describe(), detail: message(&cause) })
            }
            outcome => outcome,
        }
    }

    async fn patch(&self, body: &Value, params: PatchParams) -> Result<Arc<Child>, ApplyError> {
        let stored = self.api.patch(&self.desired.name, &params, &Patch::Apply(body)).await;
        self.store(stored.map_err(|error| ApplyError::of(self.describe(), error))?)
    }

    /// Makes the fields that a POST set the fields of an apply. Otherwise a field that is no longer desired
    /// would stay, because the manager of the POST still has it.
    async fn claim_fields(&self, child: &Child, index: usize) -> Result<(), ApplyError> {
        let entry = format!("/metadata/managedFields/{index}");
        // The indexes move when another manager writes for the first time.
        let patch = json!([
            {"op": "test", "path": format!("{entry}/manager"), "value": names::MANAGER},
            {"op": "test", "path": format!("{entry}/operation"), "value": "Update"},
            {"op": "test", "path": "/metadata/uid", "value": child.uid},
            {"op": "replace", "path": format!("{entry}/operation"), "value": "Apply"},
        ]);
        match self.json_patch(patch).await? {
            Some(_) => Ok(()),
            None => Err(ApplyError::Changed { object: self.describe() }),
        }
    }

    /// Sends a JSON patch; none if the object has changed meanwhile: the watch delivers the change, and the
    /// next reconcile looks again.
    async fn json_patch(&self, patch: Value) -> Result<Option<Arc<Child>>, ApplyError> {
        let params = PatchParams { field_manager: Some(names::MANAGER.to_owned()), ..PatchParams::default() };
        let patch = serde_json::from_value(patch).map_err(|error| ApplyError::Request {
            object: self.describe(),
            cause: Box::new(kube::Error::SerdeError(error)),
        })?;
        match self.api.patch(&self.desired.name, &params, &Patch::Json::<()>(patch)).await {
            Ok(stored) => self.store(stored).map(Some),
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409 | 422) => Ok(None),
            Err(error) => Err(ApplyError::of(self.describe(), error)),
        }
    }

    /// Removes what other field managers set in the part of the object that belongs to the operator alone.
    async fn remove_foreign(&self, child: &Child) -> Result<(), ApplyError> {
        if child.foreign.is_empty() || self.context.children.is_tolerated(child) {
            return Ok(());
        }
        let Some(stored) = self.json_patch(removal(&child.version, &child.foreign)).await? else {
            return Ok(());
        };
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

    fn child(&self, object: StoredObject) -> Result<Child, ApplyError> {
        let incomplete = || ApplyError::Incomplete { object: self.describe() };
        Child::of(self.desired.kind, object).ok_or_else(incomplete)
    }

    /// Puts a response into the cache, so that the next reconcile reads it.
    fn store(&self, object: StoredObject) -> Result<Arc<Child>, ApplyError> {
        self.context.metrics.count_write(self.desired.kind.kind);
        Ok(self.context.children.insert(self.child(object)?))
    }
}

/// Requests about children of a kind.
pub(super) fn api(context: &Context, kind: &ChildKind, namespace: &str) -> Api<StoredObject> {
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
