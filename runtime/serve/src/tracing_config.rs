//! Where the spans of requests go: the sections `monitoring.otlp`, `.jaeger` and `.zipkin` of a
//! `config.yaml`, and the same for the library.

use serde::{Deserialize, Serialize};
use trustformers_telemetry::traces::{Destination, TraceExporter, TraceOptions};

use crate::config::{ConfigError, wrong};

/// The service's name in traces where nothing else is given.
const SERVICE_NAME: &str = "trustformers-serve";

/// One of the three sections.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(expecting = "keys and values")]
pub(crate) struct ExporterSection {
    enabled: Option<bool>,
    endpoint: Option<String>,
    sampling_rate: Option<f64>,
    service_name: Option<String>,
    model_attributes: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    baggage: Option<Vec<String>>,
}

/// The sections that were given, in the order otlp, jaeger, zipkin.
pub(crate) type ExporterSections = [Option<ExporterSection>; 3];

const KINDS: [(TraceExporter, &str); 3] =
    [(TraceExporter::Otlp, "otlp"), (TraceExporter::Jaeger, "jaeger"), (TraceExporter::Zipkin, "zipkin")];

/// What the sections mean.
pub(crate) fn options(sections: ExporterSections) -> Result<Option<TraceOptions>, ConfigError> {
    let mut found: Option<(String, TraceOptions)> = None;
    for ((kind, name), section) in KINDS.into_iter().zip(sections) {
        let Some(section) = section.filter(|section| section.enabled.unwrap_or(true)) else { continue };
        let path = format!("monitoring.{name}");
        if let Some((other, _)) = &found {
            return Err(wrong(&path, format!("is enabled beside {other}; spans go to one collector")));
        }
        let options = section.options(kind, &path)?;
        found = Some((path, options));
    }
    Ok(found.map(|(_, options)| options))
}

impl ExporterSection {
    fn options(self, kind: TraceExporter, path: &str) -> Result<TraceOptions, ConfigError> {
        let of = |key: &str| format!("{path}.{key}");
        let endpoint =
            self.endpoint.ok_or_else(|| wrong(&of("endpoint"), "is missing: give http://host:port"))?;
        let destination = kind.destination(&endpoint).map_err(|error| wrong(&of("endpoint"), error))?;
        let sampling_ratio = self.sampling_rate.unwrap_or(1.0);
        if !(0.0..=1.0).contains(&sampling_ratio) {
            return Err(wrong(&of("sampling_rate"), format!("{sampling_ratio} is not within 0 to 1")));
        }
        Ok(TraceOptions {
            sampling_ratio,
            model_attributes: self.model_attributes.unwrap_or(false),
            baggage_keys: self.baggage.unwrap_or_default(),
            ..TraceOptions::new(self.service_name.unwrap_or_else(|| SERVICE_NAME.to_owned()), destination)
        })
    }

    /// The sections of options, as they are effective.
    pub(crate) fn of(options: Option<&TraceOptions>) -> ExporterSections {
        let Some(options) = options else { return Default::default() };
        let TraceOptions { destination, service_name, sampling_ratio, model_attributes, baggage_keys } =
            options;
        let section = |endpoint: &str| {
            Some(Self {
                enabled: Some(true),
                endpoint: Some(endpoint.to_owned()),
                sampling_rate: Some(*sampling_ratio),
                service_name: Some(service_name.clone()),
                model_attributes: Some(*model_attributes),
                baggage: Some(baggage_keys.clone()).filter(|keys| !keys.is_empty()),
            })
        };
        match destination {
            Destination::OtlpGrpc(url) | Destination::OtlpHttp(url) => [section(url), None, None],
            Destination::Zipkin(url) => [None, None, section(url)],
        }
    }
}

/// What a server's spans are exported with.
///
/// ```
/// use trustformers_serve::{TracingConfig, TracingExporter};
///
/// let config = TracingConfig {
///     exporter: TracingExporter::Jaeger,
///     jaeger_endpoint: "http://localhost:14268/api/traces".to_owned(),
///     sampling_rate: 0.1,
///     service_name: "trustformers-serve".to_owned(),
/// };
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct TracingConfig {
    /// What the collector speaks.
    pub exporter: TracingExporter,
    /// The endpoint of [`TracingExporter::Jaeger`]; the others have their own.
    pub jaeger_endpoint: String,
    /// Share of the requests that are traced, 0 to 1.
    pub sampling_rate: f64,
    /// The name that the service has in traces.
    pub service_name: String,
}

/// The kinds of collectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TracingExporter {
    /// Jaeger, which takes OTLP.
    Jaeger,
    /// A collector of OTLP, at an endpoint.
    Otlp(String),
    /// Zipkin, at an endpoint.
    Zipkin(String),
}

impl TracingConfig {
    /// # Errors
    /// An endpoint or a rate that cannot be used.
    pub(crate) fn options(self) -> Result<TraceOptions, ConfigError> {
        let (kind, endpoint, path) = match self.exporter {
            TracingExporter::Jaeger => (TraceExporter::Jaeger, self.jaeger_endpoint, "monitoring.jaeger"),
            TracingExporter::Otlp(endpoint) => (TraceExporter::Otlp, endpoint, "monitoring.otlp"),
            TracingExporter::Zipkin(endpoint) => (TraceExporter::Zipkin, endpoint, "monitoring.zipkin"),
        };
        let section = ExporterSection {
            endpoint: Some(endpoint),
            sampling_rate: Some(self.sampling_rate),
            service_name: Some(self.service_name),
            ..ExporterSection::default()
        };
        section.options(kind, path)
    }
}
