//! Work that may take long or panic on a caller's input: counted where it runs, and contained.

use std::any::Any;
use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::error::ApiError;

/// Work away from the threads that serve connections, at most a fixed number of jobs at a time.
///
/// The permit belongs to the job and not to the future that waits for it: a caller that leaves does not make
/// room for another job while its own still runs.
#[derive(Debug, Clone)]
pub struct BlockingWork {
    permits: Arc<Semaphore>,
}

impl BlockingWork {
    /// At most `jobs` jobs at a time.
    #[must_use]
    pub fn new(jobs: usize) -> Self {
        // One permit for each job that may run.
        Self { permits: Arc::new(Semaphore::new(jobs)) }
    }

    /// Runs `work` on a thread of its own and gives its result. A caller that leaves while it waits for a
    /// permit runs nothing.
    ///
    /// # Errors
    /// [`ApiError::Internal`] where the work panicked or the runtime ends.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let ends = |why: String| ApiError::Internal { message: format!("the work was not done: {why}") };
        let permit = self.permits.clone().acquire_owned().await.map_err(|error| ends(error.to_string()))?;
        let job = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        });
        job.await.map_err(|error| match error.try_into_panic() {
            Ok(payload) => panicked(payload.as_ref()),
            Err(error) => ends(error.to_string()),
        })
    }
}

/// The answer to a request whose work panicked. The log holds the cause under the same id.
pub fn panicked(payload: &(dyn Any + Send)) -> ApiError {
    let id = uuid::Uuid::new_v4().simple().to_string();
    let cause = (payload.downcast_ref::<&str>().copied())
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without a text");
    // A panic about a text may quote it, and texts of requests are never logged.
    let cause = cause.split(['`', '"']).next().unwrap_or_default();
    tracing::error!(id, cause, "a request made the server panic; the panic was contained");
    ApiError::Internal {
        message: format!("the server failed on this request; its log has the cause under {id}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::sync_channel;

    #[tokio::test]
    async fn a_caller_that_leaves_keeps_its_permit_until_the_job_ends() {
        let work = BlockingWork::new(1);
        let (release, released) = sync_channel::<()>(0);
        let (started, has_started) = tokio::sync::oneshot::channel();
        let first = {
            let work = work.clone();
            tokio::spawn(async move {
                work.run(move || {
                    started.send(()).unwrap();
                    released.recv().unwrap();
                })
                .await
            })
        };
        has_started.await.unwrap();
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled());
        assert_eq!(work.permits.available_permits(), 0, "the job still runs");
        release.send(()).unwrap();
        assert_eq!(work.run(|| 7).await, Ok(7));
    }

    #[tokio::test]
    async fn a_panic_becomes_an_error_with_an_id_and_frees_its_permit() {
        let work = BlockingWork::new(1);
        let error = work.run(|| -> () { panic!("deep inside a library") }).await.unwrap_err();
        assert!(matches!(&error, ApiError::Internal { message } if message.contains("under ")), "{error}");
        assert!(!error.to_string().contains("deep inside"), "causes stay in the log: {error}");
        assert_eq!(work.run(|| 7).await, Ok(7));
    }
}
