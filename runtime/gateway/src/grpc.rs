//! The gRPC services that the gateway answers itself: the models it routes to, health, reflection.
//!
//! Everything below `InferenceService` is forwarded and never comes here.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::UNIX_EPOCH;

use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use http::{Request, Response};
use hyper::body::Incoming;
use tokio_stream::wrappers::WatchStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::{Code, Status};
use tonic_health::pb::health_server::HealthServer;
use tower::ServiceExt;
use trustformers_api::health::{GrpcHealth, Health};
use trustformers_proto::v1::health_service_server::{HealthService, HealthServiceServer};
use trustformers_proto::v1::model_service_server::{ModelService, ModelServiceServer};
use trustformers_proto::{DESCRIPTORS, v1};

use crate::body::Body;
use crate::error::GatewayError;
use crate::gateway::Gateway;
use crate::metrics::Protocol;
use crate::routing::Routing;
use crate::table::Route;

/// What reflection and health tell of: forwarded or not, callers find these here.
const SERVICES: [&str; 3] =
    ["trustformers.v1.InferenceService", "trustformers.v1.ModelService", "trustformers.v1.HealthService"];

/// The gateway's own services, ready to be called.
#[derive(Debug, Clone)]
pub(crate) struct Services(Routes);

impl Services {
    /// Services of a gateway; watches end when `closing` is cancelled.
    ///
    /// # Errors
    /// Only if the descriptors that were compiled in could not be read.
    pub(crate) fn new(
        gateway: &Arc<Gateway>,
        closing: &CancellationToken,
    ) -> Result<Self, tonic_reflection::server::Error> {
        let models = Models { gateway: Arc::clone(gateway), closing: closing.clone() };
        let health = GrpcHealth::new(Arc::clone(gateway), &SERVICES, closing.clone());
        let routes = Routes::new(ModelServiceServer::new(models))
            .add_service(HealthServiceServer::new(ThinHealth(Arc::clone(gateway))))
            .add_service(HealthServer::new(health))
            .add_service(reflection().build_v1()?)
            // grpcurl and older tools ask by the name from before it was stable.
            .add_service(reflection().build_v1alpha()?);
        Ok(Self(routes.prepare()))
    }

    /// Answers one call.
    pub(crate) async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let path = request.uri().path().to_owned();
        let response = match self.0.clone().oneshot(request).await {
            Ok(response) => response.map(Body::service),
            Err(never) => match never {},
        };
        // The router's own words for a service that is not here name nothing.
        let unnamed = response.headers().get("grpc-status").is_some_and(|code| code == "12");
        if unnamed { GatewayError::Unimplemented { path }.answer(Protocol::Grpc) } else { response }
    }
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    let builder = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .with_service_name("grpc.health.v1.Health");
    SERVICES.into_iter().fold(builder, tonic_reflection::server::Builder::with_service_name)
}

struct Models {
    gateway: Arc<Gateway>,
    closing: CancellationToken,
}

/// A stream of lists, in a type of its own since the generated trait asks for one.
struct ModelsStream(BoxStream<'static, Result<v1::WatchModelsResponse, Status>>);

impl Stream for ModelsStream {
    type Item = Result<v1::WatchModelsResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next_unpin(context)
    }
}

/// One entry for each revision: a caller who is being moved from one to another sees both.
fn models(gateway: &Gateway) -> Vec<v1::ModelStatus> {
    let Some(routing) = gateway.routing() else { return Vec::new() };
    routing.table.routes.iter().flat_map(|route| statuses(route, &routing)).collect()
}

fn statuses(route: &Route, routing: &Routing) -> impl Iterator<Item = v1::ModelStatus> {
    let since = routing.received_at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let since_unix_ms = u64::try_from(since).unwrap_or(u64::MAX);
    route.backends.iter().map(move |backend| {
        let ready = !backend.endpoints.is_empty();
        let state = if ready { v1::ModelState::Ready } else { v1::ModelState::Pending };
        let message = format!("{} pod(s) are routed to, weight {}", backend.endpoints.len(), backend.weight);
        v1::ModelStatus {
            name: route.name.clone(),
            state: state.into(),
            digest: backend.digest.clone(),
            revision: backend.revision.clone(),
            message,
            since_unix_ms,
            ..Default::default()
        }
    })
}

#[tonic::async_trait]
impl ModelService for Models {
    type WatchModelsStream = ModelsStream;

    async fn list_models(
        &self,
        _request: tonic::Request<v1::ListModelsRequest>,
    ) -> Result<tonic::Response<v1::ListModelsResponse>, Status> {
        Ok(tonic::Response::new(v1::ListModelsResponse { models: models(&self.gateway) }))
    }

    async fn watch_models(
        &self,
        _request: tonic::Request<v1::WatchModelsRequest>,
    ) -> Result<tonic::Response<ModelsStream>, Status> {
        let gateway = Arc::clone(&self.gateway);
        let stream = WatchStream::new(gateway.watch_version())
            .map(move |_version| Ok(v1::WatchModelsResponse { models: models(&gateway) }))
            .take_until(self.closing.clone().cancelled_owned())
            .boxed();
        Ok(tonic::Response::new(ModelsStream(stream)))
    }
}

struct ThinHealth(Arc<Gateway>);

#[tonic::async_trait]
impl HealthService for ThinHealth {
    async fn check(
        &self,
        request: tonic::Request<v1::HealthCheckRequest>,
    ) -> Result<tonic::Response<v1::HealthCheckResponse>, Status> {
        use v1::health_check_response::ServingStatus;
        let service = &request.get_ref().service;
        if !service.is_empty() && !SERVICES.contains(&service.as_str()) {
            return Err(Status::new(Code::NotFound, format!("service {service:?} is not served here")));
        }
        let verdict = self.0.readiness().borrow().clone();
        let status = if verdict.ok { ServingStatus::Serving } else { ServingStatus::NotServing };
        Ok(tonic::Response::new(v1::HealthCheckResponse { status: status.into(), message: verdict.message }))
    }
}
