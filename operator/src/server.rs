//! The operator's own HTTP: metrics and health.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use prometheus::Registry;

/// Whether the process is ready: it has reached the API server and is not shutting down.
#[derive(Debug, Clone, Default)]
pub struct Readiness(Arc<AtomicBool>);

impl Readiness {
    /// Sets it.
    pub fn set(&self, ready: bool) {
        self.0.store(ready, Ordering::Release);
    }

    fn get(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// `/metrics`, `/health/live` and `/health/ready`.
pub fn router(registry: Registry, readiness: Readiness) -> Router {
    let health = Router::new()
        .route("/health/live", get(async || "ok\n"))
        .route("/health/ready", get(ready))
        .with_state(readiness);
    trustformers_telemetry::metrics::router(registry).merge(health)
}

/// A candidate that does not lead is ready too: it can take over.
async fn ready(State(readiness): State<Readiness>) -> (StatusCode, &'static str) {
    if readiness.get() {
        (StatusCode::OK, "ok\n")
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "the API server has not been reached yet, or the operator is shutting down\n",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;
    use http::Request;
    use tower::ServiceExt;

    #[tokio::test]
    async fn readiness_changes_and_liveness_does_not() {
        let readiness = Readiness::default();
        let status = async |path: &str, readiness: &Readiness| {
            let request = Request::get(path).body(Body::empty()).unwrap();
            router(Registry::new(), readiness.clone()).oneshot(request).await.unwrap().status()
        };
        assert_eq!(status("/health/ready", &readiness).await, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(status("/health/live", &readiness).await, StatusCode::OK);
        readiness.set(true);
        assert_eq!(status("/health/ready", &readiness).await, StatusCode::OK);
        assert_eq!(status("/metrics", &readiness).await, StatusCode::OK);
    }
}
