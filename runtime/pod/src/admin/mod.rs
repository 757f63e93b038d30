//! The admin port: whoever shows the operator's token decides which versions a pod holds and which answers.
//!
//! It is a port of its own, so that a network policy can keep callers of models away from it, and serves
//! `ModelService` over gRPC and the routes below `/v1/models` over HTTP, nothing else. Each request is
//! checked ([`token`]).

mod signatures;
mod token;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::HeaderValue;
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use futures::future::BoxFuture;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use trustformers_api::browser::{self, AllowedOrigins};
use trustformers_api::inference::Models;
use trustformers_api::model_control::{LoadModel, RollbackModel, SwapModel, UnloadModel};
use trustformers_api::{
    Answer, Api, ApiError, Classified, ClassifyRequest, CountRequest, EmbedRequest, Embedded, ErrorShape,
    Generation, Health, Inference, RerankRequest, Reranked, Verdict, grpc, http,
};
use trustformers_proto::v1::ModelStatus;

use crate::control::LoadDefaults;
use crate::models::ModelServer;
use token::TokenVerifier;
pub use token::{KeysError, TokenRules};

/// Where the models are changed, and by whom.
#[derive(Debug, Clone)]
pub struct AdminSettings {
    /// Where to listen.
    pub address: SocketAddr,
    /// Which tokens are accepted.
    pub tokens: TokenRules,
    /// The `pod.yaml` whose section `admin` is read again, where the rules are those of its pod.
    pub pod_config: Option<PathBuf>,
    /// Settings of models that a request leaves out.
    pub defaults: LoadDefaults,
}

/// The admin port, before it listens.
pub(crate) struct AdminPort {
    verifier: Arc<TokenVerifier>,
    defaults: LoadDefaults,
}

impl AdminPort {
    /// Reads the keys.
    pub(crate) fn new(settings: AdminSettings) -> Result<Self, KeysError> {
        let AdminSettings { address: _, tokens, pod_config, defaults } = settings;
        Ok(Self { verifier: Arc::new(TokenVerifier::new(tokens, pod_config)?), defaults })
    }

    /// Follows the keys until `stop`.
    pub(crate) fn follow_keys(&self, stop: CancellationToken) -> impl Future<Output = ()> + Send + 'static {
        Arc::clone(&self.verifier).follow_keys(stop)
    }

    /// The routes.
    pub(crate) fn router(self, models: Arc<ModelServer>, closing: CancellationToken) -> Router {
        let Self { verifier, defaults } = self;
        let api = Api::new(Arc::new(AdministeredModels { models, defaults }), closing);
        let (routes, services) = (http::model_router(api.clone()), grpc::model_router(api));
        let both = browser::http_listener(routes, services, &AllowedOrigins::Any);
        both.layer(from_fn_with_state(verifier, authenticate))
    }
}

/// Lets a request pass that has the token.
async fn authenticate(State(verifier): State<Arc<TokenVerifier>>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    let is_grpc =
        headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
    match verifier.check(headers.get(AUTHORIZATION).map(HeaderValue::as_bytes)) {
        Ok(()) => next.run(request).await,
        Err(error) => {
            tracing::warn!(path = request.uri().path(), "refused on the admin port: {error}");
            error.render(if is_grpc { ErrorShape::Grpc } else { ErrorShape::Native })
        }
    }
}

/// The models as the admin port shows them: they may be changed.
struct AdministeredModels {
    models: Arc<ModelServer>,
    defaults: LoadDefaults,
}

impl Health for AdministeredModels {
    fn liveness(&self) -> Verdict {
        self.models.liveness()
    }
    fn startup(&self) -> Verdict {
        self.models.startup()
    }
    fn readiness(&self) -> watch::Receiver<Verdict> {
        self.models.readiness()
    }
}

impl Inference for AdministeredModels {
    fn generate(&self, request: Generation) -> BoxFuture<'_, Result<Answer, ApiError>> {
        self.models.generate(request)
    }

    fn embed(&self, request: EmbedRequest) -> BoxFuture<'_, Result<Embedded, ApiError>> {
        self.models.embed(request)
    }

    fn classify(&self, request: ClassifyRequest) -> BoxFuture<'_, Result<Classified, ApiError>> {
        self.models.classify(request)
    }

    fn rerank(&self, request: RerankRequest) -> BoxFuture<'_, Result<Reranked, ApiError>> {
        self.models.rerank(request)
    }

    fn count_tokens(&self, request: CountRequest) -> BoxFuture<'_, Result<u32, ApiError>> {
        self.models.count_tokens(request)
    }

    fn load_model(&self, request: LoadModel) -> BoxFuture<'_, Result<ModelStatus, ApiError>> {
        Box::pin(self.models.load_with(request, &self.defaults))
    }

    fn unload_model(&self, request: UnloadModel) -> BoxFuture<'_, Result<ModelStatus, ApiError>> {
        Box::pin(self.models.unload_with(request))
    }

    fn swap_model(&self, request: SwapModel) -> BoxFuture<'_, Result<ModelStatus, ApiError>> {
        Box::pin(std::future::ready(self.models.swap_with(request)))
    }

    fn rollback_model(&self, request: RollbackModel) -> BoxFuture<'_, Result<ModelStatus, ApiError>> {
        Box::pin(std::future::ready(self.models.rollback_with(&request)))
    }

    fn watch_models(&self) -> watch::Receiver<Models> {
        self.models.watch_models()
    }
}

#[cfg(test)]
mod tests;
