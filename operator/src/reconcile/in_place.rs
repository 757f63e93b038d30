//! Rollouts within running pods: the files of pools, and the requests to pods.
//!
//! What pods must hold follows from the stored state. What they hold is in their reports. A request goes to
//! each pod that differs, in each reconcile, so that an operator that ends in between is no different from
//! one whose request was lost.

use std::time::Duration;

use futures::StreamExt;
use futures::stream;
use tonic::metadata::{Ascii, MetadataValue};
use trustformers_control::build::{BuildError, PodAccess, PoolFiles, Pools, pod_config};
use trustformers_control::kinds::{CONFIG_MAP, DEPLOYMENT};
use trustformers_control::names;
use trustformers_control::pods::PodView;
use trustformers_control::rollout::in_place::{self, PodAction, PodSlots, PodTask, load_request};
use trustformers_control::rollout::{RolloutPhase, RolloutState};
use trustformers_control::validate::ValidatedModel;
use trustformers_control::{build, versions};
use trustformers_proto::pod_config::PodConfig;
use trustformers_proto::v1::{SwapModelRequest, UnloadModelRequest};

use super::fetch::Observed;
use super::rollout::RolloutPlan;
use crate::context::Context;
use crate::pod_admin::{self, AdminRequest, Identity};
use crate::pod_tokens::TokenError;

/// Pods of one model that are asked at the same time. A load is waited for 2 s, and nothing else is decided
/// about the model meanwhile: 1,000 pods take 16 s.
const CONCURRENCY: usize = 128;
/// When it is looked again after pods were asked.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// How often it is looked while pods work on what they were asked for; their reports come in between.
const LOOK_MEANWHILE: Duration = Duration::from_secs(5);

/// Whether the pods of the stable revision can load the spec's revision too.
///
/// # Errors
/// Why they cannot, for people.
pub fn check(
    context: &Context,
    valid: &ValidatedModel,
    observed: &Observed,
    state: &RolloutState,
) -> Result<(), String> {
    let Some(stable) = &state.stable else {
        return Err("no revision serves yet whose pods could load another one".to_owned());
    };
    let platform = context.platform();
    let template = build::pod_template(valid, &platform, &stable.pool).map_err(|error| error.to_string())?;
    let stored = observed.children.iter().find(|child| {
        child.kind == &DEPLOYMENT && child.label(names::REVISION_LABEL) == Some(stable.pool.as_str())
    });
    in_place::check(valid, &platform, &template, stored.map(|child| child.object()).as_ref())
}

/// The pools as the plan wants them, with the files that their pods start with.
///
/// # Errors
/// Only if a configuration cannot be written, which no validated model causes.
pub fn pools(
    valid: &ValidatedModel,
    revision: &str,
    observed: &Observed,
    plan: &RolloutPlan,
    access: Option<&PodAccess>,
) -> Result<Pools, BuildError> {
    let own = pod_config(valid, revision, access);
    let of_spec = plan.state.pool_of(revision);
    let mut pools = Pools::default();
    for pool in &plan.pools {
        let start = plan.state.start_revision(&pool.pool);
        let stored = stored_files(observed, &pool.pool);
        if let Some(files) = PoolFiles::next(start, &own, stored.as_ref(), access)? {
            pools.files.insert(pool.pool.clone(), files);
        }
        if pool.pool == of_spec {
            pools.of_spec = Some(pool.clone());
        }
    }
    Ok(pools)
}

fn stored_files(observed: &Observed, pool: &str) -> Option<PoolFiles> {
    let name = names::config_map(&observed.key.1, pool);
    let child = observed.children.iter().find(|child| child.kind == &CONFIG_MAP && child.name == name)?;
    PoolFiles::of(&child.object())
}

/// Asks pods for what they do not hold yet, and notes in the plan why one refuses and when to look again.
pub async fn act(
    context: &Context,
    observed: &Observed,
    own: &PodConfig,
    pools: &Pools,
    plan: &mut RolloutPlan,
) {
    let Some(identity) = &context.settings.identity else { return };
    let reporting = observed.pods.iter().filter(|pod| pod.counts() && pod.running);
    let pods: Vec<PodSlots<'_>> = reporting
        .filter_map(|pod| {
            let report = &observed.reports.get(&pod.uid)?.model;
            Some(PodSlots { pod, slots: versions::slots(pod, report) })
        })
        .collect();
    let tasks = in_place::tasks(&plan.commands, &pods, &plan.state, &plan.unrouted);
    context.set_asked(&observed.key, !tasks.is_empty());
    let refusals: Vec<String> = match token(context, identity, observed, &tasks).await {
        Ok(None) => Vec::new(),
        Ok(Some(token)) => {
            let asked: Vec<_> = tasks
                .iter()
                .filter_map(|task| {
                    let pod = observed.pods.iter().find(|pod| pod.uid == task.uid)?;
                    let request = request(observed, task, pod, &Sources { own, pools })?;
                    Some(ask(context, token.clone(), pod, request))
                })
                .collect();
            let answers = stream::iter(asked).buffer_unordered(CONCURRENCY);
            answers.filter_map(std::future::ready).collect().await
        }
        Err(error) => {
            tracing::warn!(%error, "pods are not asked for what they do not hold yet");
            vec![error.to_string()]
        }
    };
    let is_loading =
        matches!(plan.state.phase, RolloutPhase::Placing | RolloutPhase::Loading | RolloutPhase::Warming);
    // The smallest, so that the status does not change with the order of the answers.
    if let Some(refusal) = refusals.into_iter().min().filter(|_| is_loading) {
        plan.state.message = refusal;
    }
    let look = if tasks.is_empty() { LOOK_MEANWHILE } else { LOOK_AGAIN };
    if !tasks.is_empty() || !plan.state.phase.is_final() || !plan.state.retiring.is_empty() {
        plan.wait = plan.wait.into_iter().chain([look]).min();
    }
}

/// The operator's token for the model's pods, if one is to be asked.
async fn token(
    context: &Context,
    identity: &Identity,
    observed: &Observed,
    tasks: &[PodTask],
) -> Result<Option<MetadataValue<Ascii>>, TokenError> {
    if tasks.is_empty() {
        return Ok(None);
    }
    context.pod_tokens.header(&context.client, identity, &observed.key.0).await.map(Some)
}

/// Where the configuration of a revision is.
struct Sources<'a> {
    own: &'a PodConfig,
    pools: &'a Pools,
}

fn request(
    observed: &Observed,
    task: &PodTask,
    pod: &PodView,
    sources: &Sources<'_>,
) -> Option<AdminRequest> {
    let (namespace, name) = &observed.key;
    let model = format!("{namespace}/{name}");
    Some(match &task.action {
        PodAction::Load { revision } if *revision == sources.own.model.revision => {
            AdminRequest::Load(Box::new(load_request(sources.own)))
        }
        PodAction::Load { revision } => {
            let config = sources.pools.files.get(&pod.revision)?.config(revision)?;
            AdminRequest::Load(Box::new(load_request(&config)))
        }
        PodAction::Swap { revision, expected_digest } => AdminRequest::Swap(SwapModelRequest {
            revision: revision.clone(),
            expected_digest: expected_digest.clone(),
            model,
            ..SwapModelRequest::default()
        }),
        PodAction::Unload { revision } => AdminRequest::Unload(UnloadModelRequest {
            revision: revision.clone(),
            model,
            ..UnloadModelRequest::default()
        }),
    })
}

/// Returns why the pod refuses, if it does.
async fn ask(
    context: &Context,
    token: MetadataValue<Ascii>,
    pod: &PodView,
    request: AdminRequest,
) -> Option<String> {
    tracing::debug!(pod = pod.name, ?request, "asking a pod");
    let error = pod_admin::ask(token, pod, context.settings.admin_port, request).await.err()?;
    if error.is_about_identity() {
        context.cluster_keys.doubt();
        context.pod_tokens.doubt(&pod.namespace);
    }
    tracing::warn!(pod = pod.name, %error, "a pod did not do what it was asked for; it is asked again");
    Some(format!("pod {}: {error}", pod.name))
}
