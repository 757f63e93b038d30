//! Sends spans to Zipkin as the JSON of its second version, which a Zipkin without further modules takes.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::{Request, header};
use opentelemetry::trace::{SpanId, SpanKind, Status};
use opentelemetry_http::hyper::HyperClient;
use opentelemetry_http::{Bytes, HttpClient};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::trace::{SpanData, SpanExporter};
use serde_json::{Map, Value, json};

use super::EXPORT_TIMEOUT;

/// Sends spans to one Zipkin.
#[derive(Debug)]
pub(super) struct ZipkinExporter {
    url: String,
    client: HyperClient,
    /// The service's name, as its endpoint.
    service: String,
}

impl ZipkinExporter {
    pub(super) fn new(url: String) -> Self {
        let client = HyperClient::with_default_connector(EXPORT_TIMEOUT, None);
        Self { url, client, service: String::new() }
    }
}

impl SpanExporter for ZipkinExporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans: Vec<Value> = batch.iter().map(|span| span_json(span, &self.service)).collect();
        let failed = |cause: String| OTelSdkError::InternalFailure(cause);
        let body = serde_json::to_vec(&spans).map_err(|error| failed(error.to_string()))?;
        let request = Request::post(&self.url)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Bytes::from(body))
            .map_err(|error| failed(error.to_string()))?;
        let response = self.client.send_bytes(request).await.map_err(|error| failed(error.to_string()))?;
        let status = response.status();
        if status.is_success() { Ok(()) } else { Err(failed(format!("Zipkin answered {status}"))) }
    }

    fn set_resource(&mut self, resource: &Resource) {
        if let Some(name) = resource.get(&opentelemetry::Key::from_static_str("service.name")) {
            self.service = name.to_string();
        }
    }
}

fn us(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn unix_us(at: SystemTime) -> u64 {
    us(at.duration_since(UNIX_EPOCH).unwrap_or_default())
}

fn span_json(span: &SpanData, service: &str) -> Value {
    let context = &span.span_context;
    let mut tags = Map::new();
    for pair in &span.attributes {
        tags.insert(pair.key.to_string(), pair.value.to_string().into());
    }
    if let Status::Error { description } = &span.status {
        tags.insert("error".to_owned(), description.to_string().into());
    }
    let annotations: Vec<Value> = span
        .events
        .iter()
        .map(|event| json!({"timestamp": unix_us(event.timestamp), "value": event.name}))
        .collect();
    let took = span.end_time.duration_since(span.start_time).unwrap_or_default();
    let mut json = json!({
        "traceId": context.trace_id().to_string(),
        "id": context.span_id().to_string(),
        "name": span.name,
        "timestamp": unix_us(span.start_time),
        // Zipkin takes no duration of zero.
        "duration": us(took).max(1),
        "localEndpoint": {"serviceName": service},
        "annotations": annotations,
        "tags": tags,
    });
    if span.parent_span_id != SpanId::INVALID {
        json["parentId"] = span.parent_span_id.to_string().into();
    }
    let kind = match span.span_kind {
        SpanKind::Client => "CLIENT",
        SpanKind::Server => "SERVER",
        SpanKind::Producer => "PRODUCER",
        SpanKind::Consumer => "CONSUMER",
        SpanKind::Internal => return json,
    };
    json["kind"] = kind.into();
    json
}
