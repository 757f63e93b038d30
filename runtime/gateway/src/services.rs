//! The answers that the gateway gives in the words of the API: its models over gRPC and KServe's protocol,
//! health and reflection over gRPC, the OpenAPI document, and the preflight requests of browsers.
//!
//! The codecs are those of `trustformers_api`, over the models of the routing table. No request that a model
//! has to answer comes here.

use std::sync::Arc;

use axum::Router;
use bytes::Bytes;
use futures::future::BoxFuture;
use http::request::Parts;
use http::{Request, Response};
use http_body_util::{Full, Limited};
use hyper::body::Incoming;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use trustformers_api::browser::{AllowedOrigins, http_listener};
use trustformers_api::budget::Share;
use trustformers_api::embed::{EmbedRequest, Embedded};
use trustformers_api::grpc::ReflectionError;
use trustformers_api::health::{Health, Verdict};
use trustformers_api::inference::{Answer, CountRequest, Inference, Models};
use trustformers_api::{Api, ApiError, Classified, ClassifyRequest, Generation, RerankRequest, Reranked};

use crate::body::Body;
use crate::error::GatewayError;
use crate::gateway::Gateway;
use crate::limits::{CallerLimits, Resource};

/// Answers of these surfaces list every model, so their number has a bound.
const LISTINGS: [&str; 4] = ["grpc_list_models", "grpc_watch_models", "kserve_index", "kserve_grpc_index"];
/// The most bytes that one call sends. Messages hold a name or nothing, and a client that explores by
/// reflection sends some dozens of them; 10,240 calls (`limits`) of this length are 160 MiB, which only a
/// caller that sends nothing else can reach.
const CALL_LIMIT_BYTES: usize = 16 << 10;

/// The gateway's own services, ready to be called.
#[derive(Debug, Clone)]
pub(crate) struct Services(Router);

impl Services {
    /// The services of a gateway; watches end when `closing` is cancelled.
    ///
    /// # Errors
    /// Only if the descriptors that were compiled in could not be read.
    pub(crate) fn new(gateway: &Arc<Gateway>, closing: &CancellationToken) -> Result<Self, ReflectionError> {
        let api = Api::new(Arc::new(TableModels(Arc::clone(gateway))), closing.clone());
        let http = trustformers_api::http::router(api.clone());
        let grpc = trustformers_api::grpc::router(api)?;
        Ok(Self(http_listener(http, grpc, &AllowedOrigins::Any)))
    }

    /// Answers one request for a surface; none: a preflight request.
    ///
    /// # Errors
    /// A bound is reached.
    pub(crate) async fn answer(
        &self,
        request: Request<Incoming>,
        surface: Option<&'static str>,
        limits: &CallerLimits,
    ) -> Result<Response<Body>, GatewayError> {
        let share = share(surface, limits)?;
        let request = request.map(|body| Limited::new(body, CALL_LIMIT_BYTES));
        match self.0.clone().oneshot(request).await {
            Ok(response) => Ok(response.map(|body| Body::service(body).with_share(share))),
            Err(never) => match never {},
        }
    }

    /// Answers a request whose body was read already.
    pub(crate) async fn answer_whole(&self, head: Parts, body: &[u8]) -> Response<Body> {
        let request = Request::from_parts(head, Full::new(Bytes::copy_from_slice(body)));
        match self.0.clone().oneshot(request).await {
            Ok(response) => response.map(Body::service),
            Err(never) => match never {},
        }
    }
}

/// The share of a call: of the long listings, or of the requests in flight.
fn share(surface: Option<&'static str>, limits: &CallerLimits) -> Result<Share, GatewayError> {
    let lists = surface.is_some_and(|name| LISTINGS.contains(&name));
    let resource = if lists { Resource::Listings } else { Resource::Requests };
    limits.reserve(resource, 1).map_err(GatewayError::Overloaded)
}

/// The models of the routing table. Pods answer for them.
struct TableModels(Arc<Gateway>);

impl Health for TableModels {
    fn liveness(&self) -> Verdict {
        self.0.liveness()
    }

    fn startup(&self) -> Verdict {
        self.0.startup()
    }

    fn readiness(&self) -> watch::Receiver<Verdict> {
        self.0.readiness()
    }
}

/// What a model would have to answer: the request took a way that none takes.
fn is_forwarded<T: Send + 'static>() -> BoxFuture<'static, Result<T, ApiError>> {
    let message = "a gateway forwards this to a pod and computes nothing itself".to_owned();
    Box::pin(async { Err(ApiError::Internal { message }) })
}

impl Inference for TableModels {
    fn generate(&self, _request: Generation) -> BoxFuture<'_, Result<Answer, ApiError>> {
        is_forwarded()
    }

    fn embed(&self, _request: EmbedRequest) -> BoxFuture<'_, Result<Embedded, ApiError>> {
        is_forwarded()
    }

    fn classify(&self, _request: ClassifyRequest) -> BoxFuture<'_, Result<Classified, ApiError>> {
        is_forwarded()
    }

    fn rerank(&self, _request: RerankRequest) -> BoxFuture<'_, Result<Reranked, ApiError>> {
        is_forwarded()
    }

    fn count_tokens(&self, _request: CountRequest) -> BoxFuture<'_, Result<u32, ApiError>> {
        is_forwarded()
    }

    fn watch_models(&self) -> watch::Receiver<Models> {
        self.0.watch_models()
    }
}
