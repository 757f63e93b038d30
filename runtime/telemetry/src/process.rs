//! Figures about this process, read from `/proc` when the page is asked for.
//!
//! The names are the ones Prometheus client libraries agree on (`process_*`), so that dashboards work unchanged.
//! Where `/proc` is missing a figure is left out instead of being reported as zero.

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Counter, Gauge};

/// Clock ticks per second in `/proc/*/stat`. The kernel fixes it at 100 for user space (`USER_HZ`).
const TICKS_PER_SECOND: f64 = 100.0;

/// Collects CPU time, resident memory, threads, open files and start time of this process.
#[derive(Debug)]
pub struct ProcessCollector {
    cpu_seconds: Counter,
    resident_bytes: Gauge,
    threads: Gauge,
    open_fds: Gauge,
    start_seconds: Gauge,
}

/// One reading of `/proc/self`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Reading {
    cpu_seconds: f64,
    resident_bytes: f64,
    threads: f64,
    start_ticks: f64,
}

impl ProcessCollector {
    /// Makes the collector; registering it is the caller's part.
    ///
    /// # Errors
    /// Only if a metric's name were not valid.
    pub fn new() -> prometheus::Result<Self> {
        Ok(Self {
            cpu_seconds: Counter::new("process_cpu_seconds_total", "CPU time used, in seconds.")?,
            resident_bytes: Gauge::new("process_resident_memory_bytes", "Resident memory, in bytes.")?,
            threads: Gauge::new("process_threads", "Threads of the process.")?,
            open_fds: Gauge::new("process_open_fds", "Open file descriptors.")?,
            start_seconds: Gauge::new(
                "process_start_time_seconds",
                "When the process started, in seconds since the Unix epoch.",
            )?,
        })
    }
}

impl Collector for ProcessCollector {
    fn desc(&self) -> Vec<&Desc> {
        let mut all = self.cpu_seconds.desc();
        for gauge in [&self.resident_bytes, &self.threads, &self.open_fds, &self.start_seconds] {
            all.extend(gauge.desc());
        }
        all
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let mut families = Vec::new();
        if let Some(reading) = read_self() {
            // Counters only go up; two scrapes at once may both add the difference, so the difference is never negative.
            self.cpu_seconds.inc_by((reading.cpu_seconds - self.cpu_seconds.get()).max(0.0));
            self.resident_bytes.set(reading.resident_bytes);
            self.threads.set(reading.threads);
            families.extend(self.cpu_seconds.collect());
            families.extend(self.resident_bytes.collect());
            families.extend(self.threads.collect());
            if let Some(boot) = boot_time_seconds() {
                self.start_seconds.set(boot + reading.start_ticks / TICKS_PER_SECOND);
                families.extend(self.start_seconds.collect());
            }
        }
        if let Ok(entries) = std::fs::read_dir("/proc/self/fd") {
            self.open_fds.set(entries.count() as f64);
            families.extend(self.open_fds.collect());
        }
        families
    }
}

fn read_self() -> Option<Reading> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    parse(&stat, &status)
}

/// The program's name stands in brackets as the second field and may hold blanks and brackets itself, so fields
/// are counted from the last closing bracket.
fn parse(stat: &str, status: &str) -> Option<Reading> {
    let fields: Vec<&str> = stat[stat.rfind(')')? + 1..].split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
    let resident_kib: f64 = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?
        .trim()
        .trim_end_matches("kB")
        .trim()
        .parse()
        .ok()?;
    Some(Reading {
        cpu_seconds: (field(14)? + field(15)?) / TICKS_PER_SECOND,
        resident_bytes: resident_kib * 1024.0,
        threads: field(20)?,
        start_ticks: field(22)?,
    })
}

fn boot_time_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_blanks_and_brackets_does_not_shift_the_fields() {
        let stat = "7 (a (b) c) S 1 7 7 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 9 0 12345 1000 200 18446744073709551615";
        let status = "Name:\ta (b) c\nVmRSS:\t    2048 kB\nThreads:\t9\n";
        let reading = parse(stat, status).unwrap();
        assert_eq!(
            reading,
            Reading { cpu_seconds: 3.0, resident_bytes: 2_097_152.0, threads: 9.0, start_ticks: 12_345.0 }
        );
    }

    #[test]
    fn text_that_is_too_short_gives_nothing() {
        assert_eq!(parse("7 (x) S 1", "VmRSS: 1 kB"), None);
        assert_eq!(parse("", ""), None);
    }

    #[test]
    fn this_process_has_memory_and_a_start_time() {
        let collector = ProcessCollector::new().unwrap();
        let families = collector.collect();
        let value = |name: &str| {
            let family = families.iter().find(|family| family.name() == name).unwrap();
            family.get_metric()[0].get_gauge().get_value()
        };
        assert!(value("process_resident_memory_bytes") > 100_000.0);
        assert!(value("process_start_time_seconds") > 1_000_000_000.0);
        assert!(value("process_open_fds") >= 3.0);
    }
}
