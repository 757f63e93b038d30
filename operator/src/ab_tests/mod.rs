//! Brings tests into the state that their specs describe, in the five steps of a model: fetch, validate,
//! build, apply, status.
//!
//! Tests are few and depend on each other (two want one route), on their models, and on time: one task looks
//! at all of them, when something changed and when time says so. A look that changes nothing makes no
//! request. What is counted of a test is in memory, and every 30 s in a ConfigMap that the test owns.

pub mod checkpoint;
pub mod samples;
pub mod watch;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::api::{Patch, PatchParams};
use kube::core::DeserializeGuard;
use kube::{Api, Resource, ResourceExt};
use serde_json::json;
use tokio::time::{Instant, sleep};
use trustformers_control::ab_test::assign::{ServingVariant, models_of, running_test, serving_variant};
use trustformers_control::ab_test::status::{
    CHECKPOINT_INTERVAL, Planned, StepInputs, TestFacts, epochs_of, events, plan, refused, step, wake_in,
};
use trustformers_control::ab_test::validate::{RouteClaim, TestSpecError, ValidatedTest, conflict, validate};
use trustformers_control::names;
use trustformers_control::routes::ModelKey;
use trustformers_crds::{ABTest, ABTestStatus, GROUP, VERSION};
use trustformers_proto::control::v1::Route;

use crate::context::Context;
use crate::feed::publish;
use crate::reconcile::status::now;
use crate::recorder;

/// A pause after a request that failed.
const RETRY: Duration = Duration::from_secs(5);
/// Without tests there is nothing to look at before one comes.
const IDLE: Duration = Duration::from_secs(3600);

/// A request about a test that failed. Metrics use the variant's name.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr)]
pub enum ABTestError {
    /// What was counted before could not be read.
    #[error("the stored sums could not be read: {0}")]
    Restore(Box<kube::Error>),
    /// The status could not be written.
    #[error("the status could not be written: {0}")]
    Status(Box<kube::Error>),
}

/// What is remembered of a test between two looks.
#[derive(Debug, Default)]
struct TestMemory {
    uid: String,
    /// Whether the stored sums were read.
    restored: bool,
    /// The status that was sent last, and the test's resource version behind it.
    written: Option<(ABTestStatus, u64)>,
    /// When the sums are stored and assessed next.
    checkpoint_at: Option<Instant>,
    /// Why the sums could not be stored.
    checkpoint_error: Option<String>,
    /// What was stored last.
    stored: trustformers_control::ab_test::sample::StoredSums,
}

/// What all tests are looked at with.
struct Cluster {
    routes: Vec<Route>,
    /// Names of the models that tests name, by namespace.
    models: BTreeMap<String, BTreeSet<String>>,
    claims: Vec<RouteClaim>,
}

impl Cluster {
    fn of(context: &Context, tests: &[Arc<ABTest>]) -> Self {
        // Only what tests name is looked up, however many models there are.
        let named = tests.iter().flat_map(|test| {
            let route = (test.namespace().unwrap_or_default(), test.spec.route.clone());
            models_of(test).into_iter().chain([route])
        });
        let named: BTreeSet<ModelKey> = named.collect();
        let mut models: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (namespace, name) in named.iter().filter(|key| context.model(key).is_some()) {
            models.entry(namespace.clone()).or_default().insert(name.clone());
        }
        Self {
            routes: named.iter().filter_map(|key| publish::model_route(context, key)).collect(),
            models,
            claims: tests.iter().filter_map(|test| RouteClaim::of(test)).collect(),
        }
    }

    /// A spec as it is read, with what the cluster shows of it.
    fn planned(&self, test: &ABTest) -> Result<Planned, TestSpecError> {
        let test = validate(test)?;
        let facts = self.facts(&test);
        Ok(Planned { test, facts })
    }

    fn facts(&self, test: &ValidatedTest) -> TestFacts {
        let namespace = &test.key.0;
        let none = BTreeSet::new();
        let models = self.models.get(namespace).unwrap_or(&none);
        let variants = test.variants.iter();
        let serving: Vec<ServingVariant> = variants
            .map(|one| serving_variant(namespace, &one.model, one.revision.as_deref(), &self.routes))
            .collect();
        TestFacts {
            conflict: conflict(test, models, &self.claims),
            waiting: None,
            replicas: serving.iter().map(|one| one.replicas).collect(),
            revisions: serving.into_iter().map(|one| one.revisions).collect(),
            checkpoint_error: None,
        }
    }
}

/// Looks at tests without end.
pub async fn run(context: Arc<Context>) {
    let mut memories: HashMap<ModelKey, TestMemory> = HashMap::new();
    loop {
        let wait = look_at_all(&context, &mut memories).await;
        tokio::select! {
            () = context.ab_tests_changed.notified() => {}
            () = sleep(wait) => {}
        }
    }
}

/// Returns when to look again without a change.
async fn look_at_all(context: &Context, memories: &mut HashMap<ModelKey, TestMemory>) -> Duration {
    let tests = context.ab_tests.state();
    let uids: BTreeSet<String> = tests.iter().filter_map(|test| test.uid()).collect();
    context.samples.retain_tests(&uids);
    memories.retain(|_, memory| uids.contains(&memory.uid));
    let cluster = Cluster::of(context, &tests);
    let mut wait = IDLE;
    for test in tests.iter().filter(|test| test.metadata.deletion_timestamp.is_none()) {
        let (Some(namespace), Some(name), Some(uid)) = (test.namespace(), &test.metadata.name, test.uid())
        else {
            continue;
        };
        let memory = memories.entry((namespace, name.clone())).or_default();
        if memory.uid != uid {
            *memory = TestMemory { uid, ..TestMemory::default() };
        }
        let started = Instant::now();
        let outcome = look_at(context, test, &cluster, memory).await;
        let label = outcome.as_ref().err().map(|error| {
            let variant: &'static str = error.into();
            format!("ABTest/{variant}")
        });
        context.metrics.reconciled(label.as_deref(), started.elapsed());
        wait = wait.min(outcome.unwrap_or_else(|error| {
            tracing::warn!(test = name, %error, "a test could not be brought on; it is tried again");
            RETRY
        }));
    }
    wait
}

/// One look at one test. Returns when to look again.
async fn look_at(
    context: &Context,
    test: &ABTest,
    cluster: &Cluster,
    memory: &mut TestMemory,
) -> Result<Duration, ABTestError> {
    let cached_version = test.resource_version().and_then(|version| version.parse().ok()).unwrap_or(0);
    let stored = match &memory.written {
        // The cache does not show the last write yet.
        Some((status, version)) if *version > cached_version => status.clone(),
        _ => test.status.clone().unwrap_or_default(),
    };
    // While a newer spec cannot be honoured, the last one that could be goes on with all that it says.
    let running = running_test(test, &stored).and_then(|running| cluster.planned(&running).ok());
    let Planned { test: valid, mut facts } = match plan(cluster.planned(test), running) {
        Ok(planned) => planned,
        Err(error) => {
            let after = refused(&error, test.metadata.generation.unwrap_or(0), &stored, now());
            write_status(context, test, &stored, after, memory).await?;
            return Ok(IDLE);
        }
    };
    if !memory.restored {
        memory.checkpoint_error = checkpoint::restore(context, &valid, &stored).await?;
        memory.restored = true;
    }
    let is_due = memory.checkpoint_at.is_none_or(|at| at <= Instant::now()) && !stored.epochs.is_empty();
    if is_due {
        memory.checkpoint_at = Some(Instant::now() + CHECKPOINT_INTERVAL);
        let epochs = epochs_of(&stored);
        context.samples.retain_epochs(&valid.uid, &epochs);
        memory.checkpoint_error = checkpoint::store(context, &valid, &mut memory.stored).await;
    }
    facts.checkpoint_error.clone_from(&memory.checkpoint_error);
    let after = context.samples.with(|samples| {
        let samples = is_due.then_some(&*samples);
        step(&StepInputs { test: &valid, stored: &stored, facts: &facts, samples, now: now() })
    });
    let wake = wake_in(&valid, &after, now());
    write_status(context, test, &stored, after, memory).await?;
    let checkpoint = memory.checkpoint_at.map(|at| at.saturating_duration_since(Instant::now()));
    // A moment later than the second that a step waits for, because times in the status are whole seconds.
    Ok(checkpoint.map_or(wake, |checkpoint| wake.min(checkpoint)).max(Duration::from_millis(500)))
}

/// The reference to a test in its Events.
fn about(test: &ABTest) -> ObjectReference {
    ObjectReference {
        api_version: Some(ABTest::api_version(&()).into_owned()),
        kind: Some(ABTest::kind(&()).into_owned()),
        namespace: test.namespace(),
        name: test.metadata.name.clone(),
        uid: test.uid(),
        ..ObjectReference::default()
    }
}

/// Writes the status if it differs, then publishes Events about the change.
async fn write_status(
    context: &Context,
    test: &ABTest,
    before: &ABTestStatus,
    after: ABTestStatus,
    memory: &mut TestMemory,
) -> Result<(), ABTestError> {
    if *before == after {
        return Ok(());
    }
    let (namespace, name) = (test.namespace().unwrap_or_default(), test.name_any());
    // A response that cannot be decoded is no reason to fail: the status is written.
    let api = Api::<DeserializeGuard<ABTest>>::namespaced(context.client.clone(), &namespace);
    // With the UID, the API server refuses a status about an earlier object of the same name.
    let body = json!({
        "apiVersion": format!("{GROUP}/{VERSION}"),
        "kind": ABTest::kind(&()),
        "metadata": {"name": name, "uid": test.uid()},
        "status": after,
    });
    let params = PatchParams::apply(names::MANAGER).force();
    match api.patch_status(&name, &params, &Patch::Apply(&body)).await {
        Ok(stored) => {
            context.metrics.count_write("ABTestStatus");
            let version = stored.resource_version().and_then(|version| version.parse().ok());
            memory.written = version.map(|version| (after.clone(), version));
        }
        // The test was deleted meanwhile: it needs no status.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => return Ok(()),
        Err(error) => return Err(ABTestError::Status(Box::new(error))),
    }
    recorder::publish(context, &about(test), &events(before, &after)).await;
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
