//! The processors and the memory that this process may use.

use std::path::{Path, PathBuf};

/// Threads that can run at the same time. The standard library reads the affinity mask and the cgroup's
/// processor quota (v1 and v2, rounded down, at least one).
pub(crate) fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Bytes of memory: the machine's, or the lowest limit of this process's cgroup and its parents where that is
/// lower.
pub(crate) fn memory_bytes() -> u64 {
    let read = |path: &Path| std::fs::read_to_string(path).ok();
    let total = read(Path::new("/proc/meminfo")).and_then(|text| meminfo_total_bytes(&text));
    let cgroups = read(Path::new("/proc/self/cgroup")).unwrap_or_default();
    cgroup_limit_files(&cgroups)
        .iter()
        .filter_map(|path| read(path))
        // Version 2 writes "max" where there is no limit, version 1 a number larger than any memory.
        .filter_map(|text| text.trim().parse().ok())
        .fold(total.unwrap_or(u64::MAX), u64::min)
}

/// The files with the memory limits of a process whose `/proc/self/cgroup` is `cgroups`: of its cgroup and of
/// every parent, in version 2 and 1. A container usually has its own cgroup at the root; then only the root's
/// file exists.
fn cgroup_limit_files(cgroups: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in cgroups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            names if names.split(',').any(|name| name == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        let parents = Path::new(path.trim_start_matches('/')).ancestors();
        files.extend(parents.map(|parent| Path::new(root).join(parent).join(file)));
    }
    files
}

fn meminfo_total_bytes(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read() {
        let text = "MemTotal:       24653236 kB\nMemFree:        1 kB\n";
        assert_eq!(meminfo_total_bytes(text), Some(24_653_236 * 1024));
        assert_eq!(meminfo_total_bytes("MemTotal: many\n"), None);
        assert_eq!(meminfo_total_bytes(""), None);
    }

    #[test]
    fn limits_of_the_cgroup_and_its_parents_are_read() {
        let files = |text| -> Vec<String> {
            cgroup_limit_files(text).iter().map(|file| file.display().to_string()).collect()
        };
        assert_eq!(files("0::/\n"), ["/sys/fs/cgroup/memory.max"]);
        assert_eq!(
            files("0::/system.slice/serve.service\n"),
            [
                "/sys/fs/cgroup/system.slice/serve.service/memory.max",
                "/sys/fs/cgroup/system.slice/memory.max",
                "/sys/fs/cgroup/memory.max"
            ]
        );
        let version_1 = "5:cpu,cpuacct:/a\n4:memory:/a\n";
        assert_eq!(
            files(version_1),
            ["/sys/fs/cgroup/memory/a/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        );
        assert!(files("nonsense\n\n").is_empty());
    }

    #[test]
    fn this_machine_has_processors_and_memory() {
        assert!(threads() >= 1);
        assert!(memory_bytes() > 1 << 20);
    }
}
