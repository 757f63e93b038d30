//! A collector for tests: takes spans by OTLP over gRPC and HTTP and by Zipkin's JSON, on one port of
//! loopback.

#![allow(dead_code, reason = "each test that includes this file needs a part of it")]

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::routing::post;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Longer than any span takes to arrive: they are sent every second.
const PATIENCE: Duration = Duration::from_secs(30);

/// A span, and the service that it is of.
#[derive(Debug, Clone)]
pub(crate) struct Received {
    pub(crate) service: String,
    pub(crate) span: Span,
}

impl Received {
    /// The value of an attribute, as text.
    pub(crate) fn attribute(&self, key: &str) -> Option<String> {
        let pair = self.span.attributes.iter().find(|pair| pair.key == key)?;
        text(pair.value.as_ref())
    }

    pub(crate) fn is_child_of(&self, parent: &Received) -> bool {
        self.span.trace_id == parent.span.trace_id && self.span.parent_span_id == parent.span.span_id
    }
}

fn text(value: Option<&AnyValue>) -> Option<String> {
    match value?.value.as_ref()? {
        Value::StringValue(text) => Some(text.clone()),
        Value::IntValue(number) => Some(number.to_string()),
        Value::BoolValue(yes) => Some(yes.to_string()),
        Value::DoubleValue(number) => Some(number.to_string()),
        other => panic!("an attribute of an unexpected kind: {other:?}"),
    }
}

/// Everything that has arrived.
#[derive(Debug, Clone, Default)]
pub(crate) struct Arrived {
    pub(crate) spans: Vec<Received>,
    /// The spans of Zipkin's bodies.
    pub(crate) zipkin: Vec<serde_json::Value>,
}

impl Arrived {
    fn add(&mut self, request: ExportTraceServiceRequest) {
        for of_resource in request.resource_spans {
            let attributes = of_resource.resource.map(|resource| resource.attributes).unwrap_or_default();
            let is_name = |pair: &&KeyValue| pair.key == "service.name";
            let service = attributes.iter().find(is_name).and_then(|pair| text(pair.value.as_ref()));
            let service = service.unwrap_or_default();
            let spans = of_resource.scope_spans.into_iter().flat_map(|of_scope| of_scope.spans);
            self.spans.extend(spans.map(|span| Received { service: service.clone(), span }));
        }
    }

    /// The only span of this name.
    pub(crate) fn named(&self, name: &str) -> &Received {
        let found: Vec<_> = self.spans.iter().filter(|each| each.span.name == name).collect();
        let [one] = found[..] else { panic!("{} spans are called {name}: {self:?}", found.len()) };
        one
    }
}

/// A collector that listens until the test ends.
pub(crate) struct Collector {
    pub(crate) address: SocketAddr,
    arrived: watch::Receiver<Arrived>,
}

#[derive(Clone)]
struct Sink(watch::Sender<Arrived>);

#[tonic::async_trait]
impl TraceService for Sink {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        self.0.send_modify(|arrived| arrived.add(request.into_inner()));
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    pub(crate) async fn start() -> Self {
        let (sender, arrived) = watch::channel(Arrived::default());
        let sink = Sink(sender);
        let otlp = async |State(sink): State<Sink>, body: Bytes| {
            let request = ExportTraceServiceRequest::decode(body).unwrap();
            sink.0.send_modify(|arrived| arrived.add(request));
        };
        let zipkin = async |State(sink): State<Sink>, body: Bytes| {
            let spans: Vec<serde_json::Value> = serde_json::from_slice(&body).unwrap();
            sink.0.send_modify(|arrived| arrived.zipkin.extend(spans));
        };
        let http = Router::new()
            .route("/v1/traces", post(otlp))
            .route("/api/v2/spans", post(zipkin))
            .with_state(sink.clone());
        let grpc = tonic::service::Routes::new(TraceServiceServer::new(sink)).into_axum_router();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, http.merge(grpc)).await });
        Self { address, arrived }
    }

    /// Waits until all of these spans have arrived.
    pub(crate) async fn until(&self, wanted: impl Fn(&Arrived) -> bool) -> Arrived {
        let mut arrived = self.arrived.clone();
        let waiting = tokio::time::timeout(PATIENCE, arrived.wait_for(|arrived| wanted(arrived)));
        match waiting.await {
            Ok(found) => found.unwrap().clone(),
            Err(_) => panic!("not all spans have arrived: {:?}", self.arrived.borrow()),
        }
    }

    /// What has arrived so far.
    pub(crate) fn so_far(&self) -> Arrived {
        self.arrived.borrow().clone()
    }
}
