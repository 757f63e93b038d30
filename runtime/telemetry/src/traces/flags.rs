//! The flags of traces, the same in every program.

use clap::{Args, ValueEnum};

use super::{Destination, TraceError, TraceOptions};

/// What is traced, and where the spans go.
#[derive(Debug, Clone, Args)]
pub struct TraceFlags {
    /// Collector that gets a span of each request, such as http://collector:4317. Without it nothing is
    /// traced.
    #[arg(long, value_name = "URL", env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    pub trace_endpoint: Option<String>,

    /// What the collector speaks. An endpoint of jaeger with a port of its older protocols becomes that of
    /// OTLP on the same host.
    #[arg(
        long,
        value_name = "KIND",
        value_enum,
        env = "TRUSTFORMERS_TRACE_EXPORTER",
        default_value_t = TraceExporter::Otlp
    )]
    pub trace_exporter: TraceExporter,

    /// Share of the requests that are traced, 0 to 1. A caller that has decided (traceparent) is followed.
    #[arg(long, value_name = "RATIO", env = "OTEL_TRACES_SAMPLER_ARG", default_value_t = 1.0)]
    pub trace_sampling: f64,

    /// Name of the service in its spans, by default the program's.
    #[arg(long, value_name = "NAME", env = "OTEL_SERVICE_NAME")]
    pub trace_service: Option<String>,

    /// Adds OpenTelemetry's attributes gen_ai.*: models, limits, token counts. Texts are never traced.
    #[arg(long, env = "TRUSTFORMERS_TRACE_MODEL_ATTRIBUTES")]
    pub trace_model_attributes: bool,

    /// Key of a caller's baggage whose value becomes an attribute of its request's span; may be given
    /// several times.
    #[arg(long, value_name = "KEY", env = "TRUSTFORMERS_TRACE_BAGGAGE", value_delimiter = ',')]
    pub trace_baggage: Vec<String>,
}

/// What a collector speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum TraceExporter {
    /// OTLP: over HTTP to port 4318 or a path, else over gRPC.
    #[default]
    Otlp,
    /// As otlp.
    Jaeger,
    /// Zipkin's JSON.
    Zipkin,
}

impl TraceExporter {
    /// The collector of this kind at an endpoint.
    ///
    /// # Errors
    /// [`TraceError::Endpoint`].
    pub fn destination(self, endpoint: &str) -> Result<Destination, TraceError> {
        match self {
            Self::Otlp => Destination::otlp(endpoint),
            Self::Jaeger => Destination::jaeger(endpoint),
            Self::Zipkin => Destination::zipkin(endpoint),
        }
    }
}

impl TraceFlags {
    /// The options; none where nothing is traced.
    ///
    /// # Errors
    /// [`TraceError`]: an endpoint that cannot be used.
    pub fn options(&self, program: &str) -> Result<Option<TraceOptions>, TraceError> {
        let endpoint = self.trace_endpoint.as_deref().filter(|endpoint| !endpoint.is_empty());
        let Some(endpoint) = endpoint else { return Ok(None) };
        Ok(Some(TraceOptions {
            destination: self.trace_exporter.destination(endpoint)?,
            service_name: self.trace_service.clone().unwrap_or_else(|| program.to_owned()),
            sampling_ratio: self.trace_sampling,
            model_attributes: self.trace_model_attributes,
            baggage_keys: self.trace_baggage.clone(),
        }))
    }
}
