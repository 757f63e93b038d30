//! The device thread: it loads the model, reports the result, and then works until it is told to stop.
//!
//! Some objects of a backend may not leave the thread that made them, so loading happens on the thread. The
//! caller waits for the result: an engine that is ready, or the reason why there is none.

mod shared;

pub use shared::Heartbeat;
pub(crate) use shared::{EndGuard, Permit, Shared};

use crate::config::StartError;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use trustformers_plan::{BackendError, LoadProgress, MemoryReport};

/// Called on the device thread with the progress of loading.
pub(crate) type OnProgress = Box<dyn FnMut(LoadProgress) + Send>;

/// Starts the thread called `name` and waits until `load` has put the model on the device, which describes
/// itself as `device`. The value of `load` stays on the thread and is passed to `run`. `shared` is marked
/// when the thread ends.
pub(crate) fn start<D>(
    name: &str,
    device: String,
    shared: Arc<Shared>,
    load: impl FnOnce() -> Result<(D, MemoryReport), BackendError> + Send + 'static,
    run: impl FnOnce(D) + Send + 'static,
) -> Result<MemoryReport, StartError> {
    // One message: the result of loading.
    let (loaded, ready) = sync_channel(1);
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        // Declared first, hence dropped last: when the end is visible, everything has been released.
        let _end = EndGuard(shared);
        match load() {
            Ok((device, memory)) => {
                if loaded.send(Ok(memory)).is_ok() {
                    run(device);
                }
            }
            Err(error) => {
                // Sending fails only if the thread that waits has ended.
                let _ignored = loaded.send(Err(error));
            }
        }
    })?;
    match ready.recv() {
        Ok(Ok(memory)) => Ok(memory),
        Ok(Err(error)) => Err(StartError::Backend { device, message: error.to_string() }),
        Err(_) => {
            let message = "it panicked while loading; see the log".to_owned();
            Err(StartError::Backend { device, message })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;
    use trustformers_plan::StepError;

    #[tokio::test]
    async fn the_result_of_loading_and_the_end_are_reported() {
        for (what, wanted) in
            [("loads", None), ("refuses", Some("step refused")), ("panics", Some("see the log"))]
        {
            let shared = Arc::new(Shared::new(1));
            let load = move || match what {
                // As with some backends, this may not leave its thread.
                "loads" => Ok((Rc::new(()), MemoryReport::default())),
                "refuses" => Err(BackendError::Step(StepError::Empty)),
                _ => panic!("the test asked for it"),
            };
            let outcome = start("test", "a device".to_owned(), Arc::clone(&shared), load, drop);
            match (outcome.map_err(|error| error.to_string()), wanted) {
                (Ok(_), None) => {}
                (Err(error), Some(wanted)) => {
                    assert!(error.contains(wanted) && error.contains("a device"), "{error}");
                }
                (outcome, _) => panic!("{what}: {outcome:?}"),
            }
            shared.until_ended().await;
        }
    }
}
