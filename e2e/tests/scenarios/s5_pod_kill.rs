//! One of two pods is killed: its own requests end, and no other one is affected.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::watcher;
use serde_json::json;
use trustformers_e2e::{
    load::{Steady, Streams},
    metrics,
    model::SMOLLM2,
    process,
    request::{Failure, Request},
    scenario::{Scenario, run},
    wait::Until,
};

const STREAMS: usize = 8;

/// Long enough that no stream ends before the kill: the pods make a few hundred tokens a second together.
const TOKENS: u32 = 96;

#[tokio::test]
async fn a_killed_pod_breaks_only_its_own_streams() -> Result<()> {
    run("pod-kill", async |scenario| {
        // Given: two pods on two nodes, and the model's answer while both are up.
        let (models, gateway) = (scenario.models(), scenario.gateway().await?);
        let spec = json!({
            "source": {"uri": SMOLLM2},
            "runtime": {"numerics": "exact", "contextTokens": 512},
            "scaling": {"replicas": 2},
        });
        models.apply("pair", spec).await?;
        models.ready("pair", 90).await?;
        let pods = pods(scenario).await?;
        let nodes: BTreeSet<_> = pods.iter().filter_map(|pod| pod.spec.as_ref()?.node_name.clone()).collect();
        assert_eq!((pods.len(), nodes.len()), (2, 2), "two pods on {nodes:?}");
        let request =
            Request::new(&models.full_name("pair"), "2, 4, 8, 16, 32, 64, 128, 256, 512, 1024,", TOKENS);
        let quiet = gateway.sse(&request, |_| ()).await?;
        assert_eq!(quiet.tokens.len(), usize::try_from(TOKENS)?, "the prompt ends early: {quiet:?}");

        // When: streams run on both, and one pod's process is killed.
        let (victim, pid) = (name(&pods[0])?, process::container_pid(&pods[0], "runtime")?);
        let mut streams = Streams::open(&gateway, vec![request.clone(); STREAMS])?;
        streams.all_started(Duration::from_secs(20)).await?;
        let short = Request { max_tokens: 2, ..request };
        let steady = Steady::start(&gateway, short, 3)?;
        let on_victim = in_flight(scenario, victim).await?;
        process::kill_hard(pid).await?;

        // Then: at most the streams of that pod broke, and every other one is whole, token for token.
        let outcomes = streams.ended().await?;
        let broken: Vec<&Failure> = outcomes.iter().filter_map(|it| it.as_ref().err()).collect();
        eprintln!("{} of {STREAMS} streams broke; the killed pod had {on_victim} requests", broken.len());
        assert!(!broken.is_empty(), "no stream was on the killed pod: nothing was shown");
        assert!(broken.len() < STREAMS, "every stream broke: {broken:?}");
        assert!(broken.len() <= on_victim, "{} broke, but the pod had {on_victim}: {broken:?}", broken.len());
        for whole in outcomes.iter().flatten() {
            assert_eq!(whole.tokens, quiet.tokens);
        }
        // The tokens of a broken stream are the first tokens of the whole answer.
        for failure in broken {
            let Failure::Broken { tokens, .. } = failure else {
                panic!("a stream that had started was {failure}")
            };
            assert!(!tokens.is_empty() && quiet.tokens.starts_with(tokens), "{failure}");
        }

        // And: the second pod becomes ready again. Of the short requests at most those that ran on the killed
        // pod failed: perhaps one of them ended it, so that none is sent to the other pod.
        restarted(scenario, victim).await?;
        models.ready("pair", 90).await?;
        let requests = steady.stop().await?;
        let failed: Vec<_> = requests.iter().filter_map(|it| it.as_ref().err()).collect();
        let at_once = 2; // Three a second, each of a third of a second or less.
        assert!(
            failed.len() <= at_once,
            "{} of {} requests failed: {failed:?}",
            failed.len(),
            requests.len()
        );
        // Clients repeat what is refused so.
        assert!(failed.iter().all(|it| matches!(it.status(), Some(502 | 503))), "{failed:?}");
        Ok(())
    })
    .await
}

async fn pods(scenario: &Scenario) -> Result<Vec<Pod>> {
    let label = "serving.trustformers.dev/model=pair";
    Ok(scenario.pods().list(&kube::api::ListParams::default().labels(label)).await?.items)
}

fn name(pod: &Pod) -> Result<&str> {
    pod.metadata.name.as_deref().context("a pod without a name")
}

/// The requests that a pod computes or has queued, by its own metrics.
async fn in_flight(scenario: &Scenario, pod: &str) -> Result<usize> {
    let scrape = scenario.cluster.pod_get(&scenario.namespace, pod, "/metrics").await?;
    let mut sum = 0.0;
    for metric in ["trustformers_requests_running", "trustformers_requests_waiting"] {
        sum += metrics::sum(&scrape, metric)
            .with_context(|| format!("pod {pod} has no metric {metric}:\n{scrape}"))?;
    }
    // Counts are small whole numbers.
    Ok(sum as usize)
}

async fn restarted(scenario: &Scenario, pod: &str) -> Result<()> {
    let restarted = |pods: &[&Pod]| {
        let statuses = pods.first()?.status.as_ref()?.container_statuses.as_ref()?;
        (statuses.iter().any(|it| it.restart_count > 0)).then_some(())
    };
    let this = watcher::Config::default().fields(&format!("metadata.name={pod}"));
    Until::new("the killed container is started again", 60).watched(scenario.pods(), this, restarted).await
}
