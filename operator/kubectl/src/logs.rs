//! `logs`: the logs of a model's pods, each line with its pod; with `--follow` also of pods that start later.

use std::collections::BTreeSet;
use std::process::ExitCode;

use futures::io::AsyncBufReadExt;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::api::LogParams;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, ResourceExt};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use trustformers_crds::names::{CONTAINER, MODEL_LABEL, REVISION_LABEL};

use crate::args::LogsArgs;
use crate::cluster::{Cluster, CommandError, answered, refused_watch};
use crate::output;
use crate::status::pods_of;

/// Lines that wait for standard output. Each has at most some KiB: 64 × 16 KiB (what containerd stores as one
/// piece of a line) = 1 MiB.
const WAITING_LINES: usize = 64;

/// Runs the command.
///
/// # Errors
/// When the model or its pods cannot be read.
pub async fn run(cluster: &Cluster, args: &LogsArgs) -> Result<ExitCode, CommandError> {
    // A name that nobody has is an error, and not an empty log.
    cluster.model(&args.name).await?;
    if args.follow {
        follow(cluster, args).await?;
    } else {
        print_all(cluster, args).await?;
    }
    Ok(ExitCode::SUCCESS)
}

fn params(args: &LogsArgs) -> LogParams {
    LogParams {
        container: Some(CONTAINER.to_owned()),
        follow: args.follow,
        previous: args.previous,
        tail_lines: args.tail,
        ..LogParams::default()
    }
}

async fn print_all(cluster: &Cluster, args: &LogsArgs) -> Result<(), CommandError> {
    let api = cluster.api::<Pod>();
    let pods = answered("pods", api.list(&pods_of(&args.name))).await?;
    let chosen: Vec<&Pod> = pods.iter().filter(|pod| is_of(pod, args.revision.as_deref())).collect();
    if chosen.is_empty() {
        return Err(CommandError::Nothing(no_pods(args)));
    }
    for pod in chosen {
        let name = pod.name_any();
        if !args.previous && !has_started(pod) {
            output::write(&line_of(&name, "(the container has not started)"))?;
            continue;
        }
        let log = answered(&format!("log of pod {name}"), api.logs(&name, &params(args))).await?;
        let lines: String = log.lines().map(|line| line_of(&name, line)).collect();
        output::write(&lines)?;
    }
    Ok(())
}

fn no_pods(args: &LogsArgs) -> String {
    match &args.revision {
        Some(revision) => format!(
            "{} has no pod that was made for revision {revision}: `kubectl trustformers status {}` lists them",
            args.name, args.name
        ),
        None => format!("{} has no pod: `kubectl trustformers status {}` says why", args.name, args.name),
    }
}

async fn follow(cluster: &Cluster, args: &LogsArgs) -> Result<(), CommandError> {
    let (lines, mut received) = mpsc::channel::<String>(WAITING_LINES);
    let selector = watcher::Config::default().labels(&format!("{MODEL_LABEL}={}", args.name));
    let mut events = std::pin::pin!(watcher(cluster.api::<Pod>(), selector).default_backoff());
    let mut followed = Followed::default();
    let mut readers = JoinSet::new();
    loop {
        tokio::select! {
            Some(line) = received.recv() => output::write(&line)?,
            event = events.try_next() => match event {
                Ok(Some(watcher::Event::Apply(pod) | watcher::Event::InitApply(pod))) => {
                    if is_of(&pod, args.revision.as_deref()) && followed.start(&pod) {
                        readers.spawn(read(cluster.api(), pod.name_any(), params(args), lines.clone()));
                    }
                }
                Ok(Some(watcher::Event::Delete(pod))) => followed.forget(&pod.name_any()),
                Ok(Some(watcher::Event::Init | watcher::Event::InitDone)) => {}
                Ok(None) => return Ok(()),
                Err(cause) => refused_watch("pods", cause)?,
            },
            Some(_) = readers.join_next() => {}
        }
    }
}

/// Sends the lines of a pod's log until it ends; why it ended is a line, too.
async fn read(api: Api<Pod>, pod: String, params: LogParams, lines: mpsc::Sender<String>) {
    let end = match api.log_stream(&pod, &params).await {
        Ok(log) => {
            let mut log = log.lines();
            loop {
                match log.next().await {
                    Some(Ok(line)) => {
                        if lines.send(line_of(&pod, &line)).await.is_err() {
                            return;
                        }
                    }
                    Some(Err(error)) => break format!("(the log ended: {error})"),
                    None => break "(the container ended)".to_owned(),
                }
            }
        }
        Err(error) => format!("(no log: {error})"),
    };
    // The receiver ends with the program only.
    let _ = lines.send(line_of(&pod, &end)).await;
}

/// Whether a pod was made for the revision.
fn is_of(pod: &Pod, revision: Option<&str>) -> bool {
    revision.is_none_or(|revision| pod.labels().get(REVISION_LABEL).is_some_and(|own| own == revision))
}

/// Times that a pod's container was started; none if it never was.
fn starts(pod: &Pod) -> Option<i32> {
    let containers = pod.status.as_ref()?.container_statuses.as_ref()?;
    let container = containers.iter().find(|one| one.name == CONTAINER)?;
    let is_waiting = container.state.as_ref().is_none_or(|state| state.waiting.is_some());
    (!is_waiting || container.restart_count > 0).then_some(container.restart_count)
}

fn has_started(pod: &Pod) -> bool {
    starts(pod).is_some()
}

/// The starts of containers whose logs are read, or were.
#[derive(Debug, Default)]
struct Followed {
    starts: BTreeSet<(String, i32)>,
}

impl Followed {
    /// Whether the pod's container runs and its log is not read yet.
    fn start(&mut self, pod: &Pod) -> bool {
        let containers = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
        let runs = containers.into_iter().flatten().any(|one| {
            one.name == CONTAINER && one.state.as_ref().is_some_and(|state| state.running.is_some())
        });
        runs && starts(pod).is_some_and(|start| self.starts.insert((pod.name_any(), start)))
    }

    fn forget(&mut self, name: &str) {
        self.starts.retain(|(pod, _)| pod != name);
    }
}

fn line_of(pod: &str, line: &str) -> String {
    format!("[{pod}] {line}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(state: &str, restarts: i32) -> Pod {
        serde_yaml::from_str(&format!(
            "metadata: {{name: p, labels: {{serving.trustformers.dev/revision: r1}}}}\nstatus: {{containerStatuses: \
             [{{name: runtime, image: i, imageID: i, ready: true, restartCount: {restarts}, state: {{{state}: {{}}}}}}]}}"
        ))
        .unwrap()
    }

    #[test]
    fn each_start_of_a_container_is_followed_once() {
        let mut followed = Followed::default();
        assert!(!followed.start(&pod("waiting", 0)));
        assert!(followed.start(&pod("running", 0)));
        assert!(!followed.start(&pod("running", 0)), "its log is read already");
        assert!(!followed.start(&pod("terminated", 0)));
        assert!(followed.start(&pod("running", 1)), "another start has another log");
        followed.forget("p");
        assert!(followed.start(&pod("running", 0)), "another pod of the name");
    }

    #[test]
    fn pods_are_chosen_by_the_revision_that_they_were_made_for() {
        let one = pod("running", 0);
        assert!(is_of(&one, None) && is_of(&one, Some("r1")) && !is_of(&one, Some("r2")));
    }

    #[test]
    fn a_container_that_waits_for_its_restart_has_a_log() {
        assert!(!has_started(&pod("waiting", 0)));
        assert!(has_started(&pod("waiting", 2)) && has_started(&pod("running", 0)));
    }
}
