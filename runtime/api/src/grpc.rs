//! The gRPC services of `trustformers.v1`, `grpc.health.v1` and reflection, over the same [`Api`] as HTTP.
//!
//! They are given as one axum router, so that a listener can carry them beside plain HTTP routes (gRPC and
//! `GET /metrics` on one port). The same router answers gRPC-Web, binary and as text, over HTTP/1.1 too.
//!
//! Messages may be compressed with gzip or zstd. An answer is compressed only where its request was, and
//! never in a stream.

mod session;

use std::pin::Pin;

use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue};
use axum::middleware::{Next, from_fn, from_fn_with_state, map_response};
use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use tokio::time::Instant;
use tokio_stream::wrappers::WatchStream;
use tonic::codec::CompressionEncoding;
use tonic::metadata::MetadataMap;
use tonic::service::Routes;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_health::pb::health_server::HealthServer;
use tonic_web::GrpcWebLayer;
use tower::ServiceExt;
use trustformers_proto::v1;
use trustformers_proto::v1::health_service_server::{HealthService, HealthServiceServer};
use trustformers_proto::v1::inference_service_server::{InferenceService, InferenceServiceServer};
use trustformers_proto::v1::model_service_server::{ModelService, ModelServiceServer};

use crate::answer_end::report_end;
use crate::budget::Share;
use crate::classify::AskedClassification;
use crate::echo::echo;
use crate::embed::EmbedRequest;
use crate::error::GRPC_KIND_KEY;
use crate::fields::{Asked, GRPC_DEFAULTS, Generation};
use crate::health::GrpcHealth;
use crate::inference::{Answer, Event, StoppedBy};
use crate::limits::CallerLimits;
use crate::model_control::{self, LoadModel, RollbackModel, SwapModel, UnloadModel};
use crate::rerank::AskedOrder;
use crate::surfaces::{Kind, grpc_surface};
use crate::{Api, ApiError, MAX_BODY_BYTES, kserve};

/// The services whose health and reflection are served, by their full names.
pub const SERVICES: &[&str] = &[
    "trustformers.v1.InferenceService",
    "trustformers.v1.ModelService",
    "trustformers.v1.HealthService",
    kserve::grpc::SERVICE,
    "grpc.health.v1.Health",
];

/// Metadata key of a request that names the encoding of its messages.
const ENCODING_KEY: &str = "grpc-encoding";
/// Metadata key that lists the encodings which the other side may use.
const ACCEPT_ENCODING_KEY: &str = "grpc-accept-encoding";

/// A service that takes and gives compressed messages. Each generated service has these methods, and no trait
/// has them.
macro_rules! compressible {
    ($service:expr) => {
        $service
            .accept_compressed(CompressionEncoding::Gzip)
            .accept_compressed(CompressionEncoding::Zstd)
            .send_compressed(CompressionEncoding::Gzip)
            .send_compressed(CompressionEncoding::Zstd)
    };
}

/// Why reflection could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum ReflectionError {
    /// The descriptors do not fit together.
    #[error("gRPC reflection: {0}")]
    Descriptors(#[from] tonic_reflection::server::Error),
}

/// All services over `api`.
///
/// # Errors
/// Only if the compiled-in descriptors were broken, which the tests rule out.
pub fn router(api: Api) -> Result<Router, ReflectionError> {
    let health = GrpcHealth::new(api.inference.clone(), SERVICES, api.closing.clone());
    let load = api.gateway_load.clone();
    let inference = InferenceServiceServer::new(api.clone()).max_decoding_message_size(MAX_BODY_BYTES);
    let plain = Routes::new(compressible!(inference))
        .add_service(compressible!(ModelServiceServer::new(api.clone())))
        .add_service(compressible!(HealthServiceServer::new(api.clone())))
        .add_service(compressible!(kserve::grpc::service(api)))
        .add_service(compressible!(HealthServer::new(health)))
        .add_service(compressible!(reflection().build_v1()?))
        .add_service(compressible!(reflection().build_v1alpha()?))
        .into_axum_router()
        .layer(from_fn(compress_where_asked))
        .layer(map_response(with_kind));
    let web = plain.clone().layer(GrpcWebLayer::new());
    Ok(plain.layer(from_fn_with_state(web, by_content_type)).layer(from_fn_with_state(load, report_end)))
}

/// `ModelService` alone, for a port on which models are changed.
pub fn model_router(api: Api) -> Router {
    let models = ModelServiceServer::new(api).max_decoding_message_size(MAX_BODY_BYTES);
    Routes::new(models).into_axum_router().layer(map_response(with_kind))
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    let descriptors = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(trustformers_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
    SERVICES.iter().fold(descriptors, |builder, service| builder.with_service_name(*service))
}

/// A request of gRPC-Web to the services behind its layer, every other one to the services themselves: the
/// layer refuses what else comes over HTTP/1.1.
async fn by_content_type(
    State(web): State<Router>,
    request: axum::extract::Request,
    next: Next,
) -> axum::response::Response {
    let kind = request.headers().get(CONTENT_TYPE);
    if kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc-web")) {
        match web.oneshot(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        }
    } else {
        next.run(request).await
    }
}

/// Lets an answer be compressed only where one message answers one that was compressed itself. Most clients
/// offer every encoding that they know, whether they gain by it or not.
async fn compress_where_asked(mut request: axum::extract::Request, next: Next) -> axum::response::Response {
    let unary = grpc_surface(request.uri().path()).is_some_and(|surface| surface.kind == Kind::Unary);
    if !(unary && is_compressed(request.headers())) {
        request.headers_mut().remove(ACCEPT_ENCODING_KEY);
    }
    next.run(request).await
}

/// Whether the messages of a request may be compressed.
fn is_compressed(headers: &HeaderMap) -> bool {
    headers.get(ENCODING_KEY).is_some_and(|encoding| encoding != "identity")
}

/// Gives the errors that tonic makes itself the kind that all other errors have.
///
/// They come before any method of ours runs, so the caller caused them: an INTERNAL without a kind is a
/// message that is no protobuf, holds text that is not UTF-8 or is not what its encoding says, and becomes
/// INVALID_ARGUMENT. A RESOURCE_EXHAUSTED without a kind is a message that is too long once it is decoded,
/// and becomes OUT_OF_RANGE like every other one.
async fn with_kind(mut response: axum::response::Response) -> axum::response::Response {
    let Some(status) = Status::from_header_map(response.headers()) else { return response };
    let headers = response.headers_mut();
    if status.code() == Code::Ok || headers.contains_key(GRPC_KIND_KEY) {
        return response;
    }
    let kind = match status.code() {
        Code::Internal | Code::InvalidArgument => "invalid_request",
        Code::OutOfRange | Code::ResourceExhausted => "too_long",
        // tonic lists what it accepts.
        Code::Unimplemented if headers.contains_key(ACCEPT_ENCODING_KEY) => "unsupported_encoding",
        Code::Unimplemented => "unknown_route",
        Code::Cancelled | Code::DeadlineExceeded => "timeout",
        _ => return response,
    };
    headers.insert(GRPC_KIND_KEY, HeaderValue::from_static(kind));
    match status.code() {
        Code::Internal => set_code(headers, Code::InvalidArgument),
        Code::ResourceExhausted => set_code(headers, Code::OutOfRange),
        _ => {}
    }
    response
}

fn set_code(headers: &mut HeaderMap, code: Code) {
    headers.insert(Status::GRPC_STATUS, HeaderValue::from(code as u16));
}

/// A share for a message that was compressed, for as long as it is handled: the listener counts the bytes
/// that arrived, which are fewer.
///
/// # Errors
/// [`ApiError::Overloaded`] where the memory for requests is in use.
pub(crate) fn decoded_share<M: prost::Message>(request: &Request<M>) -> Result<Option<Share>, ApiError> {
    if request.metadata().get(ENCODING_KEY).is_none_or(|encoding| encoding == "identity") {
        return Ok(None);
    }
    let limits = request.extensions().get::<CallerLimits>().cloned().unwrap_or_default();
    limits.request_bytes(request.get_ref().encoded_len()).map(Some)
}

#[tonic::async_trait]
impl InferenceService for Api {
    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<v1::GenerateResponse>, Status> {
        let started = Instant::now();
        let _share = decoded_share(&request)?;
        let checked = checked(request)?;
        let answer = self.inference.generate(checked).await?;
        let metadata = answer.head_headers();
        let Answer { id, model, model_digest, revision, mut events, .. } = answer;
        let mut response = v1::GenerateResponse { id, model, model_digest, revision, ..Default::default() };
        while let Some(event) = events.next().await {
            match event? {
                Event::Token { id, text, logprobs } => {
                    response.tokens.push(id);
                    response.text.push_str(&text);
                    response.logprobs.extend(logprobs.map(Into::into));
                }
                Event::Finished { reason, stopped_by, usage } => {
                    use v1::generate_response::StoppedBy as Wire;
                    response.stopped_by = stopped_by.map(|stop| match stop {
                        StoppedBy::Text(text) => Wire::StopText(text),
                        StoppedBy::Token(id) => Wire::StopToken(id),
                    });
                    response.set_finish_reason(reason.to_proto());
                    response.usage = Some(usage.to_proto());
                    response.latency_ms = milliseconds(started);
                    return Ok(answered(metadata, response));
                }
            }
        }
        Err(ApiError::ended_early().into())
    }

    type GenerateStreamStream = BoxStream<'static, Result<v1::GenerateStreamResponse, Status>>;

    async fn generate_stream(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStreamStream>, Status> {
        let started = Instant::now();
        let _share = decoded_share(&request)?;
        let checked = checked(request)?;
        let mut answer = self.inference.generate(checked).await?.wait_for_first().await?;
        let metadata = answer.head_headers();
        let events = std::mem::replace(&mut answer.events, futures::stream::empty().boxed());
        let messages = events.map(move |event| Ok(message(event?, &answer, started)));
        Ok(answered(metadata, messages.boxed()))
    }

    type SessionStream = session::SessionAnswers;

    async fn session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        Ok(Response::new(session::answer(self.clone(), request)))
    }

    async fn embed(&self, request: Request<v1::EmbedRequest>) -> Result<Response<v1::EmbedResponse>, Status> {
        let started = Instant::now();
        let _share = decoded_share(&request)?;
        let (metadata, _, message) = request.into_parts();
        let asked = EmbedRequest::from_proto(message, metadata.as_ref())?;
        let embedded = self.inference.embed(asked).await?;
        Ok(answered(embedded.head_headers(), embedded.into_proto(milliseconds(started))))
    }

    async fn classify(
        &self,
        request: Request<v1::ClassifyRequest>,
    ) -> Result<Response<v1::ClassifyResponse>, Status> {
        let started = Instant::now();
        let _share = decoded_share(&request)?;
        let (metadata, _, message) = request.into_parts();
        let asked = AskedClassification::from_proto(message, metadata.as_ref())?;
        let classified = self.inference.classify(asked.request).await?;
        classified.check_top_k(asked.top_k)?;
        let headers = classified.head_headers();
        Ok(answered(headers, classified.into_proto(asked.top_k, milliseconds(started))))
    }

    async fn rerank(
        &self,
        request: Request<v1::RerankRequest>,
    ) -> Result<Response<v1::RerankResponse>, Status> {
        let started = Instant::now();
        let _share = decoded_share(&request)?;
        let (metadata, _, message) = request.into_parts();
        let AskedOrder { request, shown } = AskedOrder::from_proto(message, metadata.as_ref())?;
        let reranked = self.inference.rerank(request).await?;
        Ok(answered(reranked.head_headers(), shown.into_proto(reranked, milliseconds(started))))
    }
}

/// An answer whose metadata names the model.
fn answered<T>(metadata: HeaderMap, message: T) -> Response<T> {
    Response::from_parts(MetadataMap::from_headers(metadata), message, tonic::Extensions::default())
}

/// The generation that is asked for.
fn checked(request: Request<v1::GenerateRequest>) -> Result<Generation, ApiError> {
    let (metadata, _, message) = request.into_parts();
    Asked::try_from(message)?.with_headers(metadata.as_ref())?.check(&GRPC_DEFAULTS)
}

fn message(event: Event, head: &Answer, started: Instant) -> v1::GenerateStreamResponse {
    use v1::generate_stream_response::StoppedBy as Wire;
    match event {
        Event::Token { id, text, logprobs } => v1::GenerateStreamResponse {
            id: head.id.clone(),
            model: head.model.clone(),
            text,
            token: id,
            logprobs: logprobs.map(Into::into),
            ..Default::default()
        },
        Event::Finished { reason, stopped_by, usage } => v1::GenerateStreamResponse {
            id: head.id.clone(),
            model: head.model.clone(),
            finish_reason: reason.to_proto() as i32,
            stopped_by: stopped_by.map(|stop| match stop {
                StoppedBy::Text(text) => Wire::StopText(text),
                StoppedBy::Token(id) => Wire::StopToken(id),
            }),
            usage: Some(usage.to_proto()),
            latency_ms: milliseconds(started),
            model_digest: head.model_digest.clone(),
            revision: head.revision.clone(),
            ..Default::default()
        },
    }
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

#[tonic::async_trait]
impl ModelService for Api {
    async fn list_models(
        &self,
        _: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        let models = self.inference.watch_models().borrow().to_vec();
        Ok(Response::new(v1::ListModelsResponse { models }))
    }

    type WatchModelsStream = Pin<Box<dyn Stream<Item = Result<v1::WatchModelsResponse, Status>> + Send>>;

    async fn watch_models(
        &self,
        _: Request<v1::WatchModelsRequest>,
    ) -> Result<Response<Self::WatchModelsStream>, Status> {
        let closed = self.closing.clone().cancelled_owned();
        let changes = WatchStream::new(self.inference.watch_models())
            .map(|models| Ok(v1::WatchModelsResponse { models: models.to_vec() }))
            .take_until(closed);
        Ok(Response::new(Box::pin(changes)))
    }

    async fn load_model(
        &self,
        request: Request<v1::LoadModelRequest>,
    ) -> Result<Response<v1::LoadModelResponse>, Status> {
        let _share = decoded_share(&request)?;
        model_control::check_no_browser(request.metadata().as_ref())?;
        let asked = LoadModel::from_proto(request.into_inner())?;
        let model = self.until_closing(self.inference.load_model(asked)).await?;
        Ok(Response::new(v1::LoadModelResponse { model: Some(model) }))
    }

    async fn unload_model(
        &self,
        request: Request<v1::UnloadModelRequest>,
    ) -> Result<Response<v1::UnloadModelResponse>, Status> {
        let _share = decoded_share(&request)?;
        model_control::check_no_browser(request.metadata().as_ref())?;
        let asked = UnloadModel::from_proto(request.into_inner())?;
        let model = self.until_closing(self.inference.unload_model(asked)).await?;
        Ok(Response::new(v1::UnloadModelResponse { model: Some(model) }))
    }

    async fn swap_model(
        &self,
        request: Request<v1::SwapModelRequest>,
    ) -> Result<Response<v1::SwapModelResponse>, Status> {
        let _share = decoded_share(&request)?;
        model_control::check_no_browser(request.metadata().as_ref())?;
        let asked = SwapModel::from_proto(request.into_inner())?;
        let model = self.until_closing(self.inference.swap_model(asked)).await?;
        Ok(Response::new(v1::SwapModelResponse { model: Some(model) }))
    }

    async fn rollback_model(
        &self,
        request: Request<v1::RollbackModelRequest>,
    ) -> Result<Response<v1::RollbackModelResponse>, Status> {
        let _share = decoded_share(&request)?;
        model_control::check_no_browser(request.metadata().as_ref())?;
        let asked = RollbackModel::from_proto(request.into_inner())?;
        let model = self.until_closing(self.inference.rollback_model(asked)).await?;
        Ok(Response::new(v1::RollbackModelResponse { model: Some(model) }))
    }
}

#[tonic::async_trait]
impl HealthService for Api {
    async fn check(
        &self,
        request: Request<v1::HealthCheckRequest>,
    ) -> Result<Response<v1::HealthCheckResponse>, Status> {
        use v1::health_check_response::ServingStatus;
        let service = request.into_inner().service;
        if !service.is_empty() && !SERVICES.contains(&service.as_str()) {
            let message =
                format!("{:?} is not served here; known are: {}", echo(&service), SERVICES.join(", "));
            return Err(ApiError::field("service", message).into());
        }
        let verdict = self.inference.readiness().borrow().clone();
        let status = if verdict.ok { ServingStatus::Serving } else { ServingStatus::NotServing };
        Ok(Response::new(v1::HealthCheckResponse { status: status as i32, message: verdict.message }))
    }
}

#[cfg(test)]
mod tests;
