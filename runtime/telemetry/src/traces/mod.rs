//! Traces: spans of requests, which go to a collector by OTLP (or to Zipkin).
//!
//! A [`Traces`] is passed to the parts of a program as its registry of metrics is: nothing is global, so that
//! two servers in one process have traces of their own. Where traces are off, or a request is not sampled,
//! the cost is a comparison.
//!
//! The context of a caller comes in the headers `traceparent`, `tracestate` and `baggage` of W3C, and goes to
//! the next service in the same headers. A caller that has decided whether its trace is sampled is followed;
//! else the ratio decides. Spans never hold prompts, answers or headers.
//!
//! ```no_run
//! use trustformers_telemetry::traces::{Destination, TraceOptions, Traces};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let options = TraceOptions::new("my-service", Destination::otlp("http://collector:4317")?);
//! let traces = Traces::start(&options)?;
//! let span = traces.root("load");
//! let part = span.child("read files");
//! drop(part);
//! drop(span);
//! traces.shutdown().await;
//! # Ok(())
//! # }
//! ```

mod destination;
mod exporter;
mod flags;
mod layer;
mod span;
mod zipkin;

pub use destination::Destination;
pub use flags::{TraceExporter, TraceFlags};
pub use span::{SpanGuard, Trace};

use std::sync::Arc;
use std::time::Duration;

use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{ExporterBuildError, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::runtime::Tokio;
use opentelemetry_sdk::trace::span_processor_with_async_runtime::BatchSpanProcessor;
use opentelemetry_sdk::trace::{BatchConfigBuilder, Sampler, SdkTracer, SdkTracerProvider, SpanExporter};

use exporter::LoggedExporter;
use zipkin::ZipkinExporter;

/// The longest time for one batch of spans to be sent.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// Spans are sent at least this often.
const EXPORT_INTERVAL: Duration = Duration::from_secs(1);
/// Spans that wait to be sent; later ones are dropped. A span has some 1 KiB, a decode of 128 steps 16 KiB:
/// at most some 30 MiB while a collector is away, and 2 MiB as a rule.
const MAX_QUEUED_SPANS: usize = 2048;

/// What is traced, and where the spans go.
#[derive(Debug, Clone, PartialEq)]
pub struct TraceOptions {
    /// The collector.
    pub destination: Destination,
    /// The name that the spans' service has there.
    pub service_name: String,
    /// Which share of the requests is traced whose callers have not decided, 0 to 1.
    pub sampling_ratio: f64,
    /// Whether spans of requests have the attributes `gen_ai.*` of OpenTelemetry's conventions: models,
    /// limits and token counts.
    pub model_attributes: bool,
    /// Keys of a caller's baggage whose values become attributes of its request's span.
    pub baggage_keys: Vec<String>,
}

impl TraceOptions {
    /// All requests, without the attributes that have to be asked for.
    pub fn new(service_name: impl Into<String>, destination: Destination) -> Self {
        Self {
            destination,
            service_name: service_name.into(),
            sampling_ratio: 1.0,
            model_attributes: false,
            baggage_keys: Vec::new(),
        }
    }
}

/// Why nothing can be traced.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// An endpoint that cannot be used.
    #[error("trace endpoint {found:?} {why}")]
    Endpoint {
        /// What was given.
        found: String,
        /// What is wrong and what is allowed.
        why: &'static str,
    },
    /// A ratio that is none.
    #[error("trace sampling ratio {found} is not between 0 and 1")]
    Ratio {
        /// What was given.
        found: f64,
    },
    /// The exporter could not be made.
    #[error("spans cannot be exported: {0}")]
    Exporter(#[from] ExporterBuildError),
}

/// Makes spans, or nothing where traces are off; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Traces(Option<Arc<Tracing>>);

/// Traces that are on.
#[derive(Debug)]
pub(crate) struct Tracing {
    tracer: SdkTracer,
    provider: SdkTracerProvider,
    model_attributes: bool,
    baggage_keys: Vec<String>,
}

impl Traces {
    /// No traces.
    pub fn off() -> Self {
        Self::default()
    }

    /// As [`Traces::start`] with options, off without.
    ///
    /// # Errors
    /// [`TraceError`].
    pub fn start_where(options: Option<&TraceOptions>) -> Result<Self, TraceError> {
        options.map_or_else(|| Ok(Self::off()), Self::start)
    }

    /// Sends spans from now on; within a tokio runtime, on which they are sent. A collector that cannot be
    /// reached is logged and delays nothing.
    ///
    /// # Errors
    /// [`TraceError`].
    pub fn start(options: &TraceOptions) -> Result<Self, TraceError> {
        let ratio = options.sampling_ratio;
        if !(0.0..=1.0).contains(&ratio) {
            return Err(TraceError::Ratio { found: ratio });
        }
        let provider = match &options.destination {
            Destination::OtlpGrpc(url) => {
                let builder = opentelemetry_otlp::SpanExporter::builder().with_tonic();
                let exporter = builder.with_endpoint(url).with_timeout(EXPORT_TIMEOUT).build()?;
                provider(options, exporter)
            }
            Destination::OtlpHttp(url) => {
                let builder = opentelemetry_otlp::SpanExporter::builder().with_http();
                let exporter = builder.with_endpoint(url).with_timeout(EXPORT_TIMEOUT).build()?;
                provider(options, exporter)
            }
            Destination::Zipkin(url) => provider(options, ZipkinExporter::new(url.clone())),
        };
        tracing::info!(destination = %options.destination, ratio, "traces are exported");
        Ok(Self(Some(Arc::new(Tracing {
            tracer: provider.tracer("trustformers"),
            provider,
            model_attributes: options.model_attributes,
            baggage_keys: options.baggage_keys.clone(),
        }))))
    }

    /// Sends what is left and ends; at most for the time of one export.
    pub async fn shutdown(&self) {
        let Some(tracing) = self.0.clone() else { return };
        // It waits for the task that sends, so it must not keep that task's thread.
        let ended =
            tokio::task::spawn_blocking(move || tracing.provider.shutdown_with_timeout(EXPORT_TIMEOUT));
        if let Ok(Err(error)) = ended.await {
            tracing::warn!(%error, "the last spans could not be exported");
        }
    }
}

fn provider(options: &TraceOptions, exporter: impl SpanExporter + 'static) -> SdkTracerProvider {
    let batches = BatchConfigBuilder::default()
        .with_max_queue_size(MAX_QUEUED_SPANS)
        .with_scheduled_delay(EXPORT_INTERVAL)
        .with_max_export_timeout(EXPORT_TIMEOUT)
        .build();
    let exporter = LoggedExporter::new(exporter, options.destination.to_string());
    let processor = BatchSpanProcessor::builder(exporter, Tokio).with_batch_config(batches).build();
    let resource = Resource::builder_empty().with_service_name(options.service_name.clone()).build();
    SdkTracerProvider::builder()
        .with_span_processor(processor)
        .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(options.sampling_ratio))))
        .with_resource(resource)
        .build()
}
