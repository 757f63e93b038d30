//! Finds the first process of a container and kills it, as a crash or the kernel would.
//!
//! The nodes share this machine's process table, so the process is looked up by the container's id in its
//! cgroup path, and by its own process namespace: pid 1 there is the container's program.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::Pod;

use crate::{command::Invocation, settings::Settings};

/// The pid, on this machine, of the first process of `container` in `pod`.
///
/// # Errors
/// When the container has not started, or the process is not found exactly once.
pub fn container_pid(pod: &Pod, container: &str) -> Result<u32> {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let statuses = pod.status.as_ref().and_then(|it| it.container_statuses.as_ref());
    let status = statuses.into_iter().flatten().find(|it| it.name == container);
    let id = status.and_then(|it| it.container_id.as_deref()).and_then(|it| it.strip_prefix("containerd://"));
    let id = id.with_context(|| format!("container {container} of pod {name} has not started"))?;
    // A short id could be part of another path: containerd's have 64 hex digits.
    ensure!(
        id.len() == 64,
        "container {container} of pod {name} has the id {id}, which is not 64 hex digits"
    );
    first_process(Path::new("/proc"), id)
}

fn first_process(proc: &Path, id: &str) -> Result<u32> {
    let mut found = Vec::new();
    for entry in fs::read_dir(proc)? {
        let folder = entry?;
        let Some(pid) = folder.file_name().to_str().and_then(|it| it.parse::<u32>().ok()) else { continue };
        // A process may end during the search: a file that is gone belongs to none that is wanted.
        let cgroup = fs::read_to_string(folder.path().join("cgroup")).unwrap_or_default();
        let status = fs::read_to_string(folder.path().join("status")).unwrap_or_default();
        let inner = status.lines().find_map(|it| it.strip_prefix("NSpid:"));
        if cgroup.contains(id) && inner.and_then(|it| it.split_whitespace().last()) == Some("1") {
            found.push(pid);
        }
    }
    match found[..] {
        [pid] => Ok(pid),
        _ => bail!(
            "expected one first process of container {id}, found {found:?}: are the nodes on this machine?"
        ),
    }
}

/// Sends SIGKILL to exactly this process.
///
/// # Errors
/// When there is no such process, or this user may not end it.
pub async fn kill_hard(pid: u32) -> Result<()> {
    Invocation::new(Path::new("kill"), ["-9", &pid.to_string()]).stdout().await.map(drop)
}

/// The pid of a daemon of the test cluster, such as `kube-apiserver`, by the record that its start left.
///
/// # Errors
/// When the daemon does not run.
pub fn daemon_pid(settings: &Settings, name: &str) -> Result<u32> {
    let record = settings.cache.join("cluster/run").join(format!("{name}.pid"));
    let text = fs::read_to_string(&record).with_context(|| record.display().to_string())?;
    let (pid, began) = text.trim().split_once(' ').context("a record has a pid and a start time")?;
    let stat =
        fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("{name} has ended"))?;
    // A pid that now belongs to another program has another start time.
    ensure!(start_time(&stat) == Some(began), "{name} has ended: its pid {pid} belongs to another process");
    Ok(pid.parse()?)
}

/// Field 22 of `/proc/PID/stat`, counted after the last `)`, because a program's name may hold blanks.
fn start_time(stat: &str) -> Option<&str> {
    stat.rsplit_once(") ")?.1.split_whitespace().nth(19)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_a_name_with_blanks() {
        let numbers: Vec<String> = (4..=30).map(|number| number.to_string()).collect();
        let stat = format!("7 (a ) b) S {}", numbers.join(" "));
        assert_eq!(start_time(&stat), Some("22"));
    }

    #[test]
    fn only_the_first_process_of_the_container_counts() {
        let proc = tempfile::tempdir().unwrap();
        let id = "ab".repeat(32);
        for (pid, cgroup, inner) in [("10", id.as_str(), "1"), ("11", id.as_str(), "7"), ("12", "other", "1")]
        {
            let folder = proc.path().join(pid);
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("cgroup"), format!("1:pids:/nodes/n1/kubepods/podx/{cgroup}\n")).unwrap();
            fs::write(folder.join("status"), format!("Name:\tx\nNSpid:\t{pid}\t{inner}\n")).unwrap();
        }
        assert_eq!(first_process(proc.path(), &id).unwrap(), 10);
        assert!(first_process(proc.path(), &"cd".repeat(32)).is_err());
    }
}
