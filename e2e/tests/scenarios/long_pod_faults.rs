//! Pods under the standard load: one becomes slow, one loses a gateway, half of them hang, and one of each
//! model is killed. Only requests that a killed pod was answering fail, and their error says that they may be
//! repeated.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use trustformers_e2e::{
    faults::{CutOff, Stopped, Throttled},
    process, release,
    request::Failure,
    scenario::{Scenario, run},
    standard_load::{
        LoadOutcomes, LoadTargets, StandardLoad, TimedRequest, VECTORS, VECTORS_TIMEOUT, WORDS, pods_of,
    },
    wait::Until,
};

/// What a slow pod gets is this part of one core.
const SLOWER: u32 = 20;

/// How long a pod is slow, and how long the load goes on behind each fault.
const SLOW_S: u32 = 7;
const AFTER_S: u32 = 4;

/// How long a pod gives no answer: less than the 5 s after which a gateway ends a connection that answers no
/// ping, with the streams on it.
const SILENT_S: u32 = 4;

/// From the beginning until the breaker is open: two failed attempts of a second each, at the most one after
/// the other.
const OPENED_WITHIN: Duration = Duration::from_millis(2500);

/// From a SIGKILL until the kernel has closed the connections of the process, for a busy machine: what is
/// sent in between is lost with it.
pub(crate) const DYING: Duration = Duration::from_millis(500);

#[tokio::test]
async fn faults_of_pods_fail_no_request_but_those_of_a_killed_one() -> Result<()> {
    run("pod-faults", async |scenario| {
        // Given: two models with two pods each, and the latency while nothing is wrong.
        let targets = LoadTargets::deploy(scenario).await?;
        let quiet = under_load(&targets, "quiet", async |load| load.seconds(SLOW_S).await).await?;
        none_failed(&quiet);

        one_slow(scenario, &targets, &quiet).await?;
        one_cut_off(scenario, &targets).await?;
        half_hung(scenario, &targets).await?;
        killed(scenario, &targets).await
    })
    .await
}

/// A pod gets a twentieth of a core. Then: the others answer, and most requests take no longer.
async fn one_slow(scenario: &Scenario, targets: &LoadTargets, quiet: &LoadOutcomes) -> Result<()> {
    let pid = pid(&first(scenario, VECTORS).await?)?;
    let outcomes = under_load(targets, "one pod is slow", async |load| {
        let slow = Throttled::process(pid, SLOWER)?;
        load.seconds(SLOW_S).await?;
        drop(slow);
        load.seconds(AFTER_S).await
    })
    .await?;
    none_failed(&outcomes);
    let (before, during) = (quiet.percentile(90), outcomes.percentile(90));
    // The margin is for the other programs of a machine with two cores.
    assert!(during < 3 * before + Duration::from_millis(100), "p90 was {before:?} and became {during:?}");
    Ok(())
}

/// A pod can't be reached from one of the gateways. Then: its other pod answers, after one attempt's time at
/// most. A probe of the breaker may be on the connection when the gateway gives it up; such a request is not
/// sent twice.
async fn one_cut_off(scenario: &Scenario, targets: &LoadTargets) -> Result<()> {
    let pid = pid(&first(scenario, VECTORS).await?)?;
    let label = ListParams::default().labels("app.kubernetes.io/component=gateway");
    let gateways = release::pods(&scenario.cluster).list(&label).await?.items;
    let status = gateways.first().and_then(|gateway| gateway.status.as_ref());
    let address = status.and_then(|status| status.pod_ip.clone()).context("a gateway has no address")?;
    let outcomes = under_load(targets, "one pod is cut off from one gateway", async |load| {
        let cut = CutOff::between(pid, &address).await?;
        load.seconds(SILENT_S).await?;
        drop(cut);
        load.seconds(AFTER_S).await
    })
    .await?;
    let failed = outcomes.failed();
    let few = failed.len() <= 1 && failed.iter().all(|one| may_be_repeated(one));
    assert!(few, "requests failed: {}", outcomes.described(&failed));
    few_exceed_the_timeout(&outcomes);
    Ok(())
}

/// Half of the pods of each model stand still with open connections. Then: their breakers open, and streams
/// that they had begun go on with them.
async fn half_hung(scenario: &Scenario, targets: &LoadTargets) -> Result<()> {
    let (vectors, words) = (pid(&first(scenario, VECTORS).await?)?, pid(&first(scenario, WORDS).await?)?);
    let mut hung_at = Instant::now();
    let outcomes = under_load(targets, "half of the pods hang", async |load| {
        let hung = (Stopped::process(vectors).await?, Stopped::process(words).await?);
        hung_at = Instant::now();
        load.seconds(SILENT_S).await?;
        drop(hung);
        load.seconds(AFTER_S).await
    })
    .await?;
    none_failed(&outcomes);
    few_exceed_the_timeout(&outcomes);
    // Then one probe of each gateway meets the pod every three seconds.
    let opened_at = hung_at + OPENED_WITHIN;
    let waited = |one: &&TimedRequest| one.started > opened_at && one.took() > Duration::from_millis(900);
    let met = outcomes.embeds.iter().filter(waited).count();
    let later = outcomes.embeds.iter().filter(|one| one.started > opened_at).count();
    assert!(met * 20 <= later, "{met} of {later} requests waited for the hung pod behind {OPENED_WITHIN:?}");
    Ok(())
}

/// A pod of each model is killed. Then: at most what they were answering fails.
async fn killed(scenario: &Scenario, targets: &LoadTargets) -> Result<()> {
    let pods = [first(scenario, VECTORS).await?, first(scenario, WORDS).await?];
    let pids = [pid(&pods[0])?, pid(&pods[1])?];
    let mut killed_at = Instant::now();
    let outcomes = under_load(targets, "one pod of each model is killed", async |load| {
        killed_at = Instant::now();
        for pid in pids {
            process::kill_hard(pid).await?;
        }
        for pod in &pods {
            serves_again(scenario, pod).await?;
        }
        load.seconds(AFTER_S).await
    })
    .await?;
    only_those_of_killed_pods_failed(&outcomes, &[killed_at]);
    Ok(())
}

/// Runs what happens under the load, one second behind the load's start.
pub(crate) async fn under_load(
    targets: &LoadTargets,
    what: &str,
    happens: impl AsyncFnOnce(&mut StandardLoad) -> Result<()>,
) -> Result<LoadOutcomes> {
    let mut load = StandardLoad::start(targets);
    load.seconds(1).await?;
    let happened = happens(&mut load).await.with_context(|| what.to_owned());
    let outcomes = load.stop().await?;
    eprintln!("{what}: {}", outcomes.summary());
    if happened.is_err() {
        // What the requests met may say why it did not happen.
        eprintln!("failed: {}", outcomes.described(&outcomes.failed()));
    }
    happened?;
    Ok(outcomes)
}

pub(crate) fn none_failed(outcomes: &LoadOutcomes) {
    let failed = outcomes.failed();
    assert!(failed.is_empty(), "requests failed: {}", outcomes.described(&failed));
}

/// Every request that failed ran at one of these moments, and its error says that it may be repeated.
pub(crate) fn only_those_of_killed_pods_failed(outcomes: &LoadOutcomes, killed: &[Instant]) {
    let had = |one: &&TimedRequest| {
        killed.iter().any(|killed| one.started < *killed + DYING && one.ended > *killed)
    };
    let (of_killed, others): (Vec<_>, Vec<_>) = outcomes.failed().into_iter().partition(had);
    let began = outcomes.began();
    let at: Vec<_> = killed.iter().map(|killed| killed.duration_since(began)).collect();
    let others_text = outcomes.described(&others);
    assert!(others.is_empty(), "pods were killed at {at:?}; requests failed that none had: {others_text}");
    let final_ones: Vec<_> = of_killed.into_iter().filter(|one| !may_be_repeated(one)).collect();
    let final_text = outcomes.described(&final_ones);
    assert!(final_ones.is_empty(), "requests of killed pods have errors that forbid to repeat: {final_text}");
}

fn may_be_repeated(request: &TimedRequest) -> bool {
    match &request.failure {
        Some(Failure::Refused { status, .. }) => matches!(status, 502 | 503),
        // HTTP has no other word for it than a connection that breaks off.
        Some(Failure::Broken { message, .. }) => {
            !request.by_grpc || message.contains("currently unavailable")
        }
        None => true,
    }
}

fn few_exceed_the_timeout(outcomes: &LoadOutcomes) {
    let (slower, all) = (outcomes.slower_than(VECTORS_TIMEOUT), outcomes.embeds.len());
    assert!(slower * 100 <= all, "{slower} of {all} requests took longer than {VECTORS_TIMEOUT:?}");
}

/// Waits until the killed container runs again and says that it is ready.
pub(crate) async fn serves_again(scenario: &Scenario, pod: &Pod) -> Result<()> {
    let restarts = |pod: &Pod| {
        let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
        let runtime = statuses.into_iter().flatten().find(|container| container.name == "runtime");
        runtime.map_or((0, false), |runtime| (runtime.restart_count, runtime.ready))
    };
    let (before, _) = restarts(pod);
    let name = pod.metadata.name.as_deref().context("a pod without a name")?;
    let again = |found: Option<&Pod>| {
        let (count, ready) = restarts(found?);
        (count > before && ready).then_some(())
    };
    Until::new("the killed container is ready again", 60).object(scenario.pods(), name, again).await
}

async fn first(scenario: &Scenario, model: &str) -> Result<Pod> {
    pods_of(scenario, model).await?.into_iter().next().with_context(|| format!("{model} has no pod"))
}

fn pid(pod: &Pod) -> Result<u32> {
    process::container_pid(pod, "runtime")
}
