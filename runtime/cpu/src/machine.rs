//! What this machine, or the container on it, lets the process use.

use std::path::Path;

/// Threads that can run at once: the affinity mask, and the cgroup's processor quota (v1 and v2, rounded down, at least
/// one), both of which the standard library reads.
pub(crate) fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Bytes of memory: the machine's, or the cgroup's limit where that is lower.
pub(crate) fn memory_bytes() -> u64 {
    let read = |path: &str| std::fs::read_to_string(Path::new(path)).ok();
    let total = read("/proc/meminfo").and_then(|text| meminfo_total_bytes(&text)).unwrap_or(u64::MAX);
    ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .into_iter()
        .filter_map(read)
        // Version 2 writes "max" where there is no limit.
        .filter_map(|text| text.trim().parse().ok())
        .fold(total, u64::min)
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
    fn the_machine_has_something() {
        assert!(threads() >= 1);
        assert!(memory_bytes() > 1 << 20);
    }
}
