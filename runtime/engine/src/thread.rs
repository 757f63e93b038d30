//! Starting a device thread: one that loads a model, says how that went, and then works until it is told to end.
//!
//! What a backend gives belongs to the thread that made it, so loading happens there. Whoever starts the thread waits
//! for it and has either an engine that is ready or the reason why there is none.

use crate::config::StartError;
use crate::shared::{EndMark, Shared};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use trustformers_plan::{BackendError, LoadProgress, MemoryReport};

/// What is told about loading; called on the device thread.
pub(crate) type OnProgress = Box<dyn FnMut(LoadProgress) + Send>;

/// Starts the thread called `name` and waits until `load` has put the model on the device, which is `device` in its own
/// words. What `load` gives stays on the thread and is what `run` works with; `shared` is told when the thread ends.
pub(crate) fn start<D>(
    name: &str,
    device: String,
    shared: Arc<Shared>,
    load: impl FnOnce() -> Result<(D, MemoryReport), BackendError> + Send + 'static,
    run: impl FnOnce(D) + Send + 'static,
) -> Result<MemoryReport, StartError> {
    // One message: how loading went.
    let (loaded, ready) = sync_channel(1);
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        // Declared first, hence dropped last: whoever sees the end finds everything given back.
        let _end = EndMark(shared);
        match load() {
            Ok((device, memory)) => {
                let told = loaded.send(Ok(memory));
                if told.is_ok() {
                    run(device);
                }
            }
            Err(error) => {
                // Nobody waits any more only if the starting thread died.
                let _gone = loaded.send(Err(error));
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
    async fn the_starter_is_told_how_loading_went_and_the_end_shows() {
        for (what, wanted) in
            [("fine", None), ("refused", Some("step refused")), ("panics", Some("see the log"))]
        {
            let shared = Arc::new(Shared::new(1));
            let load = move || match what {
                // Like what some backends give, this may not leave its thread.
                "fine" => Ok((Rc::new(()), MemoryReport::default())),
                "refused" => Err(BackendError::Step(StepError::Empty)),
                _ => panic!("as it was told"),
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
