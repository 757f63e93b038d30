//! The processor time of a thread, read by another one.

use std::sync::OnceLock;
use std::time::Duration;

/// Ticks of the kernel's accounting in a second, as it shows them to programs.
const TICKS_PER_SECOND: u64 = 100;

/// Fields of a thread's `stat` between its name and the ticks in user mode.
const FIELDS_BEFORE: usize = 11;

/// The processor time of one thread.
#[derive(Debug, Default)]
pub(super) struct ThreadTime {
    /// The kernel's number of the thread.
    id: OnceLock<i32>,
}

impl ThreadTime {
    /// Called by the thread itself.
    pub(super) fn started(&self) {
        self.id.get_or_init(|| rustix::thread::gettid().as_raw_nonzero().get());
    }

    /// What the thread has taken so far, in steps of a tick (10 ms); zero before it started. `None` where the
    /// system does not count it, or the thread has ended.
    pub(super) fn used(&self) -> Option<Duration> {
        let Some(id) = self.id.get() else { return Some(Duration::ZERO) };
        let stat = std::fs::read_to_string(format!("/proc/self/task/{id}/stat")).ok()?;
        // The name may contain spaces and ends with the last parenthesis.
        let (_, fields) = stat.rsplit_once(')')?;
        let mut fields = fields.split_whitespace().skip(FIELDS_BEFORE).map(str::parse::<u64>);
        let ticks = fields.next()?.ok()? + fields.next()?.ok()?;
        Some(Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::mpsc::sync_channel;

    #[test]
    fn only_the_threads_own_work_counts() {
        let time = Arc::new(ThreadTime::default());
        assert_eq!(time.used(), Some(Duration::ZERO));
        let (go, (wait, done)) = (sync_channel::<()>(1), sync_channel::<()>(1));
        let its_time = Arc::clone(&time);
        let thread = std::thread::spawn(move || {
            its_time.started();
            let mut sum = 0_u64;
            while its_time.used().unwrap() < Duration::from_millis(30) {
                sum = std::hint::black_box(sum.wrapping_add(1));
            }
            wait.send(()).unwrap();
            // Waits without working.
            go.1.recv().unwrap();
            sum
        });
        done.recv().unwrap();
        let mut sum = 0_u64;
        let own = ThreadTime::default();
        own.started();
        let began = own.used().unwrap();
        while own.used().unwrap() < began + Duration::from_millis(60) {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        let used = time.used().unwrap();
        assert!(used < Duration::from_millis(60), "{used:?}, though {sum} was this thread's work");
        go.0.send(()).unwrap();
        thread.join().unwrap();
    }
}
