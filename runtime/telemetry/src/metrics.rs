//! The `/metrics` page: a Prometheus registry as text.
//!
//! `main` passes the registry to every part that counts; nothing registers itself globally, so a test can
//! hold two servers in one process and read each one's figures.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus::process_collector::ProcessCollector;
use prometheus::proto::MetricFamily;
use prometheus::{Registry, TEXT_FORMAT, TextEncoder};

/// Why a registry could not be made or written.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// Two collectors claim one name, or a collector's description is not valid.
    #[error("metrics: {0}")]
    Prometheus(#[from] prometheus::Error),
}

/// A new registry that already counts this process: CPU time, memory, open files, start time, and which build
/// it is (`trustformers_build_info{program, version}`).
///
/// # Errors
/// Only if a metric's name were not valid, which the tests rule out.
pub fn new_registry(program: &str, version: &str) -> Result<Registry, MetricsError> {
    let registry = Registry::new();
    registry.register(Box::new(ProcessCollector::for_self()))?;
    let opts =
        prometheus::Opts::new("trustformers_build_info", "Which program and version this is; always 1.")
            .const_label("program", program)
            .const_label("version", version);
    let build = prometheus::IntGauge::with_opts(opts)?;
    build.set(1);
    registry.register(Box::new(build))?;
    Ok(registry)
}

/// All figures of the registry in Prometheus's text format.
///
/// # Errors
/// When a collector hands out a family that is not valid.
pub fn encode(registry: &Registry) -> Result<String, MetricsError> {
    Ok(TextEncoder::new().encode_to_string(&registry.gather())?)
}

/// Families that are computed from all others when they are read.
pub type Derive = Arc<dyn Fn(&[MetricFamily]) -> Vec<MetricFamily> + Send + Sync>;

/// `GET /metrics` over the registry.
pub fn router(registry: Registry) -> Router {
    router_with(registry, None)
}

/// `GET /metrics` over the registry and the families that are derived from it.
pub fn router_with(registry: Registry, derived: Option<Derive>) -> Router {
    Router::new().route("/metrics", get(page)).with_state(Figures { registry, derived })
}

/// What `/metrics` shows.
#[derive(Clone)]
struct Figures {
    registry: Registry,
    derived: Option<Derive>,
}

impl Figures {
    fn encode(&self) -> Result<String, MetricsError> {
        let mut families = self.registry.gather();
        if let Some(derive) = &self.derived {
            families.extend(derive(&families));
        }
        // A family without series is no family to the encoder.
        families.retain(|family| !family.get_metric().is_empty());
        Ok(TextEncoder::new().encode_to_string(&families)?)
    }
}

async fn page(State(figures): State<Figures>) -> Response {
    match figures.encode() {
        Ok(text) => ([(header::CONTENT_TYPE, TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;
    use axum::http::Request;
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    #[tokio::test]
    async fn the_page_shows_the_registry_in_prometheus_text() {
        let registry = new_registry("some-program", "1.2.3").unwrap();
        let counter = prometheus::IntCounter::new("apples_total", "Apples.").unwrap();
        registry.register(Box::new(counter.clone())).unwrap();
        counter.inc_by(3);
        let request = Request::get("/metrics").body(Body::empty()).unwrap();
        let response = router(registry).oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()[header::CONTENT_TYPE], TEXT_FORMAT);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let text = std::str::from_utf8(&body).unwrap();
        assert!(text.contains("apples_total 3\n"), "{text}");
        assert!(text.contains("program=\"some-program\",version=\"1.2.3\"} 1"), "{text}");
    }

    #[test]
    fn the_page_has_the_figures_of_this_process() {
        let text = encode(&new_registry("a", "1").unwrap()).unwrap();
        let value = |name: &str| -> f64 {
            let line = text.lines().find(|line| line.starts_with(&format!("{name} ")));
            line.unwrap_or_else(|| panic!("{name} is missing in {text}"))
                .rsplit(' ')
                .next()
                .unwrap()
                .parse()
                .unwrap()
        };
        assert!(value("process_resident_memory_bytes") > 100_000.0);
        assert!(value("process_start_time_seconds") > 1_000_000_000.0);
        assert!(value("process_open_fds") >= 3.0);
        assert!(value("process_threads") >= 1.0);
        assert!(value("process_cpu_seconds_total") >= 0.0);
    }

    #[test]
    fn two_registries_do_not_share_figures() {
        let (one, two) = (new_registry("a", "1").unwrap(), new_registry("a", "1").unwrap());
        let counter = prometheus::IntCounter::new("pears_total", "Pears.").unwrap();
        one.register(Box::new(counter)).unwrap();
        assert!(encode(&one).unwrap().contains("pears_total"));
        assert!(!encode(&two).unwrap().contains("pears_total"));
    }
}
