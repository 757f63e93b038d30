//! A gateway inside another program, which gives it its tables in place of an operator.
//!
//! The routes are those of the feed (`control.proto`), and so is everything that happens to a request. Such a
//! gateway reports to nobody and saves nothing: its program makes the tables again after a restart.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use prometheus::Registry;
use trustformers_api::MAX_BODY_BYTES;
use trustformers_proto::control::v1::{Route, RouteTable, TableVersion, VariantCounts};
use trustformers_telemetry::traces::{TraceOptions, Traces};

use crate::gateway::{Gateway, GatewayParts, Source};
use crate::headers::TrustedHeaders;
use crate::hold::Hold;
use crate::metrics::Metrics;
use crate::server::{Ending, Listen, ListenAddress, Running, StartError, serve};
use crate::shadow::Shadows;
use crate::table::TableError;

/// What the program around a gateway decides.
#[derive(Debug)]
pub struct EmbeddedSettings {
    /// Where HTTP is served.
    pub http_address: SocketAddr,
    /// Where gRPC is served.
    pub grpc_address: SocketAddr,
    /// How long answers in flight may take at the end.
    pub drain_timeout: Duration,
    /// Where spans of requests go; none: nothing is traced.
    pub traces: Option<TraceOptions>,
    /// Where the metrics are registered. `GET /metrics` shows all of it.
    pub registry: Registry,
}

/// Starts a gateway with these routes. It serves until [`Running::finish`], which does not wait for requests
/// that may still come: nobody else sends them here.
///
/// # Errors
/// An address, a metric or a route that can't be used.
pub async fn start_embedded(settings: EmbeddedSettings, routes: Vec<Route>) -> Result<Running, StartError> {
    let EmbeddedSettings { http_address, grpc_address, drain_timeout, traces, registry } = settings;
    let gateway = Gateway::with(GatewayParts {
        hold: Hold::new(&registry)?,
        shadows: Shadows::new(&registry)?,
        metrics: Metrics::new(registry)?,
        body_limit_bytes: MAX_BODY_BYTES,
        trusted: TrustedHeaders::default(),
        traces: Traces::start_where(traces.as_ref())?,
        embedded: true,
    });
    publish(&gateway, routes)?;
    let listen = Listen {
        http: ListenAddress { setting: "server.port", address: http_address },
        grpc: ListenAddress { setting: "server.grpc_port", address: grpc_address },
    };
    serve(gateway, listen, Ending { drain_timeout, waits_for_quiet: false }).await
}

/// Puts other routes in force in a gateway that [`start_embedded`] started. Requests that run keep theirs.
#[derive(Debug, Clone)]
pub struct Publisher(Arc<Gateway>);

impl Publisher {
    /// Replaces the routes. Called by one task at a time: of two calls at once, one may be lost.
    ///
    /// # Errors
    /// Names what of the routes can't be used; those before stay in force.
    pub fn publish(&self, routes: Vec<Route>) -> Result<(), TableError> {
        publish(&self.0, routes)
    }
}

impl Running {
    /// What was counted of the A/B test with this UID: the whole sums of each variant. Nobody else reads them
    /// in a gateway that [`start_embedded`] started.
    #[must_use]
    pub fn test_counts(&self, test: &str) -> Vec<VariantCounts> {
        let variants = &self.gateway().metrics.variants;
        variants.report_all();
        let mut counts = variants.take_changed(usize::MAX).variants;
        counts.retain(|one| one.test == test);
        counts
    }

    /// What puts other routes in force, of a gateway that [`start_embedded`] started.
    #[must_use]
    pub fn publisher(&self) -> Publisher {
        Publisher(Arc::clone(self.gateway()))
    }
}

fn publish(gateway: &Arc<Gateway>, routes: Vec<Route>) -> Result<(), TableError> {
    let counter = gateway.version().map_or(1, |version| version.counter + 1);
    let version = Some(TableVersion { term: 0, counter });
    gateway.apply(RouteTable { version, routes }, Source::Program)?;
    gateway.set_current(true);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{TableText, endpoint_at};

    fn routes(name: &str) -> Vec<Route> {
        TableText::new(1, 1).route(name, &[]).backend("r1", 1, &[endpoint_at("a", 1)]).wire().routes
    }

    #[tokio::test]
    async fn routes_replace_each_other_and_wrong_ones_change_nothing() {
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let settings = EmbeddedSettings {
            http_address: any,
            grpc_address: any,
            drain_timeout: Duration::from_secs(1),
            traces: None,
            registry: Registry::new(),
        };
        let running = start_embedded(settings, routes("a")).await.unwrap();
        let named = |name: &str| running.gateway().routing().unwrap().table.find(name).is_ok();
        assert!(named("a") && running.gateway().is_current());
        running.publisher().publish(routes("b")).unwrap();
        assert!(named("b") && !named("a"));
        assert!(running.publisher().publish([routes("c"), routes("c")].concat()).is_err());
        assert!(named("b") && !named("c"));
        assert_eq!(running.finish().await, 0);
    }
}
