//! The processor time of this process. Unlike wall time, it does not grow while other processes have the
//! processor.

use std::time::{Duration, Instant};

/// Ticks of the kernel's accounting in a second, as it shows them to programs.
const TICKS_PER_SECOND: u64 = 100;

/// Fields of `/proc/self/stat` between the program's name and the ticks in user mode.
const FIELDS_BEFORE: usize = 11;

/// A moment.
pub(crate) struct CpuTime {
    ticks: Option<u64>,
    wall: Instant,
}

impl CpuTime {
    pub(crate) fn start() -> Self {
        Self { ticks: ticks(), wall: Instant::now() }
    }

    /// Processor time of all threads since then; wall time where the system does not count it.
    pub(crate) fn elapsed(&self) -> Duration {
        match (self.ticks, ticks()) {
            (Some(before), Some(now)) => {
                Duration::from_millis(now.saturating_sub(before) * 1000 / TICKS_PER_SECOND)
            }
            _ => self.wall.elapsed(),
        }
    }
}

/// Ticks in user and system mode together.
fn ticks() -> Option<u64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name may contain spaces and ends with the last parenthesis.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(FIELDS_BEFORE);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_takes_processor_time() {
        let began = CpuTime::start();
        let mut sum = 0_u64;
        while began.elapsed() < Duration::from_millis(30) {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(sum > 0);
    }
}
