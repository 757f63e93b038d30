//! One scenario: a namespace of its own, a client of the gateway, a limit on its time. Its namespaces are
//! deleted at its end, also after a failure; after a failure the state of the cluster is first written to
//! stderr.

use std::{
    panic::{AssertUnwindSafe, resume_unwind},
    sync::Mutex,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use futures::FutureExt;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{
    Api,
    api::{DeleteParams, PostParams},
    runtime::watcher,
};

use crate::{cluster::Cluster, gateway::Gateway, model::Models, release, wait::Until};

/// The limit on the time of a scenario that names no other.
const SCENARIO_LIMIT: Duration = Duration::from_secs(150);

/// What a scenario works with.
pub struct Scenario {
    /// The cluster that it runs on.
    pub cluster: Cluster,
    /// Its own namespace.
    pub namespace: String,
    namespaces: Mutex<Vec<String>>,
}

/// Runs one scenario on the installed release. `name` becomes part of its namespaces' names.
///
/// # Errors
/// The scenario's own error, or why it could not start.
///
/// # Panics
/// With the scenario's own panic, after its namespaces are deleted.
pub async fn run(name: &str, scenario: impl AsyncFnOnce(&Scenario) -> Result<()>) -> Result<()> {
    run_within(name, SCENARIO_LIMIT, scenario).await
}

/// [`run`] with another limit: that of a scenario whose own waits take longer together.
///
/// # Errors
/// As [`run`].
///
/// # Panics
/// As [`run`].
pub async fn run_within(
    name: &str,
    limit: Duration,
    scenario: impl AsyncFnOnce(&Scenario) -> Result<()>,
) -> Result<()> {
    let started = Instant::now();
    let cluster = Cluster::connect().await?;
    release::installed(&cluster).await.context("could not install the release")?;
    let mut running = Scenario { cluster, namespace: String::new(), namespaces: Mutex::default() };
    running.namespace = running.new_namespace(name).await?;
    let limited = tokio::time::timeout(limit, scenario(&running));
    let ended = AssertUnwindSafe(limited).catch_unwind().await;
    let ran = started.elapsed();
    let good = matches!(ended, Ok(Ok(Ok(()))));
    if !good {
        running.dump().await;
        // A panic or the limit ends a scenario wherever it is.
        if let Err(error) = release::restore(&running.cluster).await {
            eprintln!("the operator was not started again: {error:#}");
        }
    }
    let cleaned = running.clean_up().await;
    eprintln!(
        "scenario {name}: {:.1} s, and {:.1} s to clean up",
        ran.as_secs_f64(),
        (started.elapsed() - ran).as_secs_f64()
    );
    match ended {
        Err(panic) => resume_unwind(panic),
        Ok(Err(_)) => anyhow::bail!("scenario {name} did not end within {limit:?}"),
        Ok(Ok(outcome)) => outcome.and(cleaned),
    }
}

impl Scenario {
    /// Makes one more namespace that is deleted at the scenario's end.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn new_namespace(&self, name: &str) -> Result<String> {
        // The time keeps apart a scenario's runs: a namespace of an earlier one may still be ending.
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_millis();
        let name = format!("scenario-{name}-{}", now % 100_000_000);
        let mut namespace = Namespace::default();
        namespace.metadata.name = Some(name.clone());
        Api::all(self.cluster.client.clone()).create(&PostParams::default(), &namespace).await?;
        // The namespaces of a scenario that panicked elsewhere are deleted as well.
        self.namespaces.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(name.clone());
        Ok(name)
    }

    /// The gateway under test.
    ///
    /// # Errors
    /// When its Service cannot be read.
    pub async fn gateway(&self) -> Result<Gateway> {
        release::gateway(&self.cluster).await
    }

    /// The models of this scenario's own namespace.
    #[must_use]
    pub fn models(&self) -> Models {
        Models::new(&self.cluster, &self.namespace)
    }

    /// Pods of this scenario's own namespace.
    #[must_use]
    pub fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.cluster.client.clone(), &self.namespace)
    }

    fn made(&self) -> Vec<String> {
        self.namespaces.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    async fn clean_up(&self) -> Result<()> {
        for namespace in self.made() {
            // Pods of an earlier scenario would take the processor from the next one: wait for their end, but
            // not for the namespace's, which takes its controller several seconds more.
            let arguments = ["delete", "inferencemodels", "--all", "--namespace", &namespace, "--wait=false"];
            self.cluster.kubectl(&arguments).stdout().await?;
            let namespaces = Api::<Namespace>::all(self.cluster.client.clone());
            namespaces.delete(&namespace, &DeleteParams::default()).await?;
            let pods = Api::<Pod>::namespaced(self.cluster.client.clone(), &namespace);
            let gone = Until::new("the scenario's pods are gone", 60);
            gone.watched(pods, watcher::Config::default(), |left| left.is_empty().then_some(())).await?;
        }
        Ok(())
    }

    /// Writes the state of the cluster to stderr: what to look at first after a failure.
    async fn dump(&self) {
        let mut looks: Vec<Vec<String>> = Vec::new();
        for namespace in self.made() {
            looks.push(words(&format!("-n {namespace} describe inferencemodels")));
            looks.push(words(&format!("-n {namespace} get abtests -o yaml")));
            looks.push(words(&format!("-n {namespace} get all,configmaps -o wide")));
            looks.push(words(&format!("-n {namespace} describe pods")));
            looks.push(words(&format!("-n {namespace} get events --sort-by=.lastTimestamp")));
            looks.push(words(&format!(
                "-n {namespace} logs -l app.kubernetes.io/managed-by=trustformers-operator --prefix --tail=40"
            )));
        }
        let system = release::NAMESPACE;
        looks.push(words(&format!("-n {system} get pods -o wide")));
        looks.push(words(&format!("-n {system} logs deployment/{} --all-pods --tail=80", release::OPERATOR)));
        looks.push(words(&format!("-n {system} logs deployment/{} --all-pods --tail=40", release::GATEWAY)));
        for look in looks {
            let arguments: Vec<&str> = look.iter().map(String::as_str).collect();
            eprintln!("\n=== kubectl {}", arguments.join(" "));
            match self.cluster.kubectl(&arguments).output().await {
                Ok(output) => eprintln!("{}{}", output.stdout, output.stderr),
                Err(error) => eprintln!("{error:#}"),
            }
        }
    }
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}
