//! Ends the process when an input does not end.

use crate::cpu_time::CpuTime;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

/// Times the bound after which an input counts as one that never ends.
const PATIENCE: u32 = 10;

/// Wall time after which an input counts as blocked, though it takes no processor time.
const BLOCKED: Duration = Duration::from_secs(600);

/// Watches one input until it is dropped.
pub(crate) struct Watchdog {
    _done: SyncSender<()>,
}

impl Watchdog {
    /// Names `input` and aborts when it takes ten times more processor time than `bound`, or does not end
    /// within ten minutes.
    pub(crate) fn start(name: &str, input: &Path, bound: Duration) -> Self {
        // Nothing is ever sent: the end of the sender ends the watch.
        let (done, waiting) = sync_channel::<()>(0);
        let message = format!("{name}: the input in {} does not end", input.display());
        let watch = move || {
            let began = CpuTime::start();
            let mut waited = Duration::ZERO;
            while waiting.recv_timeout(bound) == Err(RecvTimeoutError::Timeout) {
                waited += bound;
                if began.elapsed() > bound * PATIENCE || waited > BLOCKED {
                    eprintln!("{message}");
                    std::process::abort();
                }
            }
        };
        // Without a thread only the check after the input remains.
        let _detached = std::thread::Builder::new().name("watchdog".to_owned()).spawn(watch);
        Self { _done: done }
    }
}
