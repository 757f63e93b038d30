//! Faults that a test asks for, so that the program which users have shows what others do about them. Without
//! them requests take no other way than usual.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::watch;
use tokio::time::sleep;
use trustformers_api::inference::Models;
use trustformers_api::model_control::{LoadModel, RollbackModel, SwapModel, UnloadModel};
use trustformers_api::{
    Answer, ApiError, Classified, ClassifyRequest, CountRequest, EmbedRequest, Embedded, Generation, Health,
    Inference, RerankRequest, Reranked, Verdict,
};
use trustformers_proto::v1::ModelStatus;

/// Faults that a test asks for; none by default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    /// Time that each request waits before it is admitted.
    pub delay: Duration,
}

/// The server of models, with these faults.
pub(crate) fn with_faults(inference: Arc<dyn Inference>, faults: Faults) -> Arc<dyn Inference> {
    if faults == Faults::default() {
        return inference;
    }
    let delay_ms = faults.delay.as_millis();
    tracing::warn!(delay_ms, "every request waits, as a test asks for with TRUSTFORMERS_FAULT_DELAY_MS");
    Arc::new(DelayedInference { inference, delay: faults.delay })
}

/// A server of models whose requests wait.
struct DelayedInference {
    inference: Arc<dyn Inference>,
    delay: Duration,
}

impl Health for DelayedInference {
    fn liveness(&self) -> Verdict {
        self.inference.liveness()
    }
    fn startup(&self) -> Verdict {
        self.inference.startup()
    }
    fn readiness(&self) -> watch::Receiver<Verdict> {
        self.inference.readiness()
    }
}

impl Inference for DelayedInference {
    fn generate(&self, request: Generation) -> BoxFuture<'_, Result<Answer, ApiError>> {
        Box::pin(async move {
            sleep(self.delay).await;
            self.inference.generate(request).await
        })
    }

    fn embed(&self, request: EmbedRequest) -> BoxFuture<'_, Result<Embedded, ApiError>> {
        Box::pin(async move {
            sleep(self.delay).await;
            self.inference.embed(request).await
        })
    }

    fn classify(&self, request: ClassifyRequest) -> BoxFuture<'_, Result<Classified, ApiError>> {
        Box::pin(async move {
            sleep(self.delay).await;
            self.inference.classify(request).await
        })
    }

    fn rerank(&self, request: RerankRequest) -> BoxFuture<'_, Result<Reranked, ApiError>> {
        Box::pin(async move {
            sleep(self.delay).await;
            self.inference.rerank(request).await
        })
    }

    fn count_tokens(&self, request: CountRequest) -> BoxFuture<'_, Result<u32, ApiError>> {
        self.inference.count_tokens(request)
    }

    fn load_model(&self, request: LoadModel) -> BoxFuture<'_, Result<ModelStatus, ApiError>> {
        self.inference.load_model(request)
    }

    fn unload_model(&self, request: UnloadModel) -> BoxFuture<'_, Result<ModelStatus, ApiError>> {
        self.inference.unload_model(request)
    }

    fn swap_model(&self, request: SwapModel) -> BoxFuture<'_, Result<ModelStatus, ApiError>> {
        self.inference.swap_model(request)
    }

    fn rollback_model(&self, request: RollbackModel) -> BoxFuture<'_, Result<ModelStatus, ApiError>> {
        self.inference.rollback_model(request)
    }

    fn watch_models(&self) -> watch::Receiver<Models> {
        self.inference.watch_models()
    }
}
