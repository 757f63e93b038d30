//! Faults that a scenario makes from outside: a process that stands still, one that gets little processor
//! time, and an address that a pod can't reach. Each ends when its value is dropped, also where the scenario
//! failed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use crate::command::Invocation;

/// A process that stands still: it answers nothing, and its connections stay open.
pub struct Stopped {
    pid: u32,
}

impl Stopped {
    /// Stops a process.
    ///
    /// # Errors
    /// When there is no such process, or this user may not stop it.
    pub async fn process(pid: u32) -> Result<Self> {
        Invocation::new(Path::new("kill"), ["-STOP", &pid.to_string()]).stdout().await?;
        Ok(Self { pid })
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        undo("kill", &["-CONT", &self.pid.to_string()]);
    }
}

/// The network of a pod sends nothing to an address: what comes from there gets no answer.
pub struct CutOff {
    pid: u32,
    destination: String,
}

impl CutOff {
    /// Cuts the network of the process off from an address: only the pod's own routes change.
    ///
    /// # Errors
    /// When the route can't be set.
    pub async fn between(pid: u32, address: &str) -> Result<Self> {
        let cut = Self { pid, destination: format!("{address}/32") };
        Invocation::new(Path::new("nsenter"), cut.route("add")).stdout().await?;
        Ok(cut)
    }

    fn route(&self, change: &str) -> Vec<String> {
        let pid = self.pid.to_string();
        let words = [
            "--target",
            pid.as_str(),
            "--net",
            "ip",
            "route",
            change,
            "blackhole",
            self.destination.as_str(),
        ];
        words.map(str::to_owned).to_vec()
    }
}

impl Drop for CutOff {
    fn drop(&mut self) {
        let route = self.route("del");
        undo("nsenter", &route.iter().map(String::as_str).collect::<Vec<_>>());
    }
}

/// A container that gets little processor time.
pub struct Throttled {
    before: Vec<ControlValue>,
}

/// A file of a control group and what is written to it.
#[derive(Debug, PartialEq, Eq)]
struct ControlValue {
    file: PathBuf,
    value: String,
}

/// The quota is given for this time: so short that each request meets it.
const PERIOD_US: u32 = 20_000;

/// The kernel takes no smaller quota.
const SMALLEST_QUOTA_US: u32 = 1_000;

impl Throttled {
    /// The container of the process gets 1/`times` of one core.
    ///
    /// # Errors
    /// When the group of the process is not found or can't be changed.
    pub fn process(pid: u32, times: u32) -> Result<Self> {
        let quota_us = PERIOD_US.checked_div(times).unwrap_or(0);
        ensure!(quota_us >= SMALLEST_QUOTA_US, "1/{times} of {PERIOD_US} µs is less than a quota can be");
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let values = control_values(Path::new("/sys/fs/cgroup"), &groups, quota_us)?;
        let mut throttled = Self { before: Vec::new() };
        for ControlValue { file, value } in values {
            let before = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
            fs::write(&file, value).with_context(|| file.display().to_string())?;
            throttled.before.push(ControlValue { file, value: before.trim().to_owned() });
        }
        Ok(throttled)
    }
}

impl Drop for Throttled {
    fn drop(&mut self) {
        for ControlValue { file, value } in self.before.iter().rev() {
            if let Err(error) = fs::write(file, value) {
                eprintln!("could not write {value} to {}: {error}", file.display());
            }
        }
    }
}

/// What limits a group, from the text of `/proc/PID/cgroup`: of version 1 where that has the controller, else
/// of version 2.
fn control_values(root: &Path, groups: &str, quota_us: u32) -> Result<Vec<ControlValue>> {
    let line = |line: &str| {
        let mut parts = line.splitn(3, ':').skip(1);
        Some((parts.next()?.to_owned(), parts.next()?.trim_start_matches('/').to_owned()))
    };
    let groups: Vec<(String, String)> = groups.lines().filter_map(line).collect();
    if let Some((_, path)) = groups.iter().find(|(names, _)| names.split(',').any(|name| name == "cpu")) {
        let folder = root.join("cpu").join(path);
        return Ok(vec![
            ControlValue { file: folder.join("cpu.cfs_period_us"), value: PERIOD_US.to_string() },
            ControlValue { file: folder.join("cpu.cfs_quota_us"), value: quota_us.to_string() },
        ]);
    }
    let (_, path) =
        groups.iter().find(|(names, _)| names.is_empty()).context("no group for the processor")?;
    let value = format!("{quota_us} {PERIOD_US}");
    Ok(vec![ControlValue { file: root.join(path).join("cpu.max"), value }])
}

fn undo(program: &str, arguments: &[&str]) {
    let ended = Command::new(program).args(arguments).stdin(Stdio::null()).status();
    if !ended.as_ref().is_ok_and(std::process::ExitStatus::success) {
        eprintln!("`{program} {}` did not end a fault: {ended:?}", arguments.join(" "));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(groups: &str) -> Vec<(String, String)> {
        let values = control_values(Path::new("/c"), groups, 1000).unwrap();
        values.into_iter().map(|one| (one.file.display().to_string(), one.value)).collect()
    }

    fn pair(file: &str, value: &str) -> (String, String) {
        (file.to_owned(), value.to_owned())
    }

    #[test]
    fn the_limit_is_set_in_the_version_that_has_the_controller() {
        let first = "8:pids:/a\n1:cpu,cpuacct:/nodes/n1/pod/c\n0::/\n";
        let period = pair("/c/cpu/nodes/n1/pod/c/cpu.cfs_period_us", "20000");
        assert_eq!(values(first), [period, pair("/c/cpu/nodes/n1/pod/c/cpu.cfs_quota_us", "1000")]);
        assert_eq!(values("0::/nodes/n1/pod/c\n"), [pair("/c/nodes/n1/pod/c/cpu.max", "1000 20000")]);
        assert!(control_values(Path::new("/c"), "8:pids:/a\n", 1000).is_err());
    }

    #[tokio::test]
    async fn a_stopped_process_goes_on_when_the_fault_ends() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let stopped = Stopped::process(child.id()).await.unwrap();
        let state = || fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        // The kernel stops it when it next runs.
        while !state().contains(") T ") {
            tokio::task::yield_now().await;
        }
        drop(stopped);
        drop(child.stdin.take());
        assert!(child.wait().unwrap().success());
    }
}
