//! The gRPC services of the gateway itself: the models it routes to, health, reflection.
//!
//! Calls of `InferenceService` are forwarded and not handled here.

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
use trustformers_api::ApiError;
use trustformers_api::budget::Share;
use trustformers_api::health::{GrpcHealth, Health};
use trustformers_proto::v1::health_service_server::{HealthService, HealthServiceServer};
use trustformers_proto::v1::model_service_server::{ModelService, ModelServiceServer};
use trustformers_proto::{DESCRIPTORS, v1};

use crate::body::{Body, grpc_code};
use crate::error::{Echo, GatewayError};
use crate::gateway::Gateway;
use crate::limits::{CallerLimits, Resource};
use crate::request_body;
use crate::routing::Routing;
use crate::table::Route;

/// The services that reflection and health know. Callers find forwarded ones here too.
const SERVICES: [&str; 3] =
    ["trustformers.v1.InferenceService", "trustformers.v1.ModelService", "trustformers.v1.HealthService"];
/// Answers of these methods list every model, so their number has a bound.
const LISTING_METHODS: [&str; 2] =
    ["/trustformers.v1.ModelService/ListModels", "/trustformers.v1.ModelService/WatchModels"];
/// The longest message of a call to these services. Such messages hold a name or nothing; 4096 calls
/// (`limits`) of this length are 16 MiB.
const MESSAGE_LIMIT_BYTES: usize = 4 << 10;

/// The gateway's own services, ready to be called.
#[derive(Debug, Clone)]
pub(crate) struct Services(Routes);

impl Services {
    /// The services of a gateway; watches end when `closing` is cancelled.
    ///
    /// # Errors
    /// Only if the descriptors that were compiled in could not be read.
    pub(crate) fn new(
        gateway: &Arc<Gateway>,
        closing: &CancellationToken,
    ) -> Result<Self, tonic_reflection::server::Error> {
        let models = Models { gateway: Arc::clone(gateway), closing: closing.clone() };
        let health = GrpcHealth::new(Arc::clone(gateway), &SERVICES, closing.clone());
        let models = ModelServiceServer::new(models).max_decoding_message_size(MESSAGE_LIMIT_BYTES);
        let thin_health = HealthServiceServer::new(ThinHealth(Arc::clone(gateway)));
        let reflection_v1 = reflection().build_v1()?.max_decoding_message_size(MESSAGE_LIMIT_BYTES);
        // grpcurl and older tools use the name from before it was stable.
        let reflection_v1alpha = reflection().build_v1alpha()?.max_decoding_message_size(MESSAGE_LIMIT_BYTES);
        let routes = Routes::new(models)
            .add_service(thin_health.max_decoding_message_size(MESSAGE_LIMIT_BYTES))
            .add_service(HealthServer::new(health).max_decoding_message_size(MESSAGE_LIMIT_BYTES))
            .add_service(reflection_v1)
            .add_service(reflection_v1alpha);
        Ok(Self(routes.prepare()))
    }

    /// Answers one call.
    ///
    /// # Errors
    /// The call is malformed or not served here, or a bound is reached.
    pub(crate) async fn answer(
        &self,
        request: Request<Incoming>,
        limits: &CallerLimits,
    ) -> Result<Response<Body>, GatewayError> {
        request_body::check_encoding(request.headers())?;
        let share = share(request.uri().path(), limits)?;
        let path = Echo::new(request.uri().path());
        let encoding = request.headers().get("grpc-encoding").cloned();
        let response = match self.0.clone().oneshot(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        };
        match grpc_code(response.headers()) {
            // tonic's own texts name neither the method nor the remedy, and have no `trustformers-error`. The
            // handlers below use none of these codes.
            Some(Code::Unimplemented) => match encoding.filter(|encoding| encoding != "identity") {
                Some(encoding) => Err(GatewayError::Encoded(Echo::of_bytes(encoding.as_bytes()))),
                None => Err(GatewayError::Unimplemented { path }),
            },
            Some(Code::OutOfRange) => Err(GatewayError::TooLarge { limit_bytes: MESSAGE_LIMIT_BYTES }),
            Some(Code::Internal) => {
                Err(GatewayError::Malformed(Echo::new("it holds no gRPC message of this method")))
            }
            _ => Ok(response.map(|body| Body::service(body).with_share(share))),
        }
    }
}

/// The share of a call: of the long listings, or of the requests in flight.
fn share(path: &str, limits: &CallerLimits) -> Result<Share, GatewayError> {
    let resource = if LISTING_METHODS.contains(&path) { Resource::Listings } else { Resource::Requests };
    limits.reserve(resource, 1).map_err(GatewayError::Overloaded)
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

/// A stream of lists. The generated trait needs a named type.
struct ModelsStream(BoxStream<'static, Result<v1::WatchModelsResponse, Status>>);

impl Stream for ModelsStream {
    type Item = Result<v1::WatchModelsResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next_unpin(context)
    }
}

/// One entry for each revision, so that both show during a rollout. The list is made once for each table, and
/// each message copies it.
fn models(gateway: &Gateway) -> Vec<v1::ModelStatus> {
    let Some(routing) = gateway.routing() else { return Vec::new() };
    let list = routing.model_statuses.get_or_init(|| {
        Arc::new(routing.table.routes.iter().flat_map(|route| statuses(route, &routing)).collect())
    });
    list.to_vec()
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

    async fn load_model(
        &self,
        _request: tonic::Request<v1::LoadModelRequest>,
    ) -> Result<tonic::Response<v1::LoadModelResponse>, Status> {
        Err(not_changed_here())
    }

    async fn unload_model(
        &self,
        _request: tonic::Request<v1::UnloadModelRequest>,
    ) -> Result<tonic::Response<v1::UnloadModelResponse>, Status> {
        Err(not_changed_here())
    }
}

/// The models of a cluster are its InferenceModels.
fn not_changed_here() -> Status {
    let message = "models cannot be loaded or unloaded here: the operator decides which models are served; create, \
                   change or delete an InferenceModel";
    ApiError::Forbidden { message: message.to_owned() }.into()
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
