//! A server of models that answers at once: what a codec sees behind itself.

use futures::StreamExt;
use futures::future::BoxFuture;
use std::sync::Arc;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use trustformers_api::inference::Models;
use trustformers_api::{
    Answer, AnswerSyntax, Api, ApiError, Classified, ClassifyRequest, CountRequest, EmbedRequest, Embedded,
    Event, FinishReason, Generation, Health, Inference, PoolingMode, RerankRequest, Reranked, TokenText,
    Usage, Verdict,
};
use trustformers_proto::v1;

/// Vectors of this many values.
const WIDTH: usize = 2;

/// A server with a model of each task: `fake`, `vectors`, `labels` and `order`.
pub(crate) struct Scripted {
    models: watch::Sender<Models>,
    ready: watch::Sender<Verdict>,
}

/// The codecs over it. Watches end at once, so that every response has an end.
pub(crate) fn api() -> Api {
    let ready = |name: &str, task: &str| {
        let mut model = v1::ModelStatus { name: name.into(), task: task.into(), ..Default::default() };
        model.set_state(v1::ModelState::Ready);
        model
    };
    let models = [
        ready("fake", "generate"),
        ready("vectors", "embed"),
        ready("labels", "classify"),
        ready("order", "rerank"),
    ];
    let scripted = Scripted {
        models: watch::Sender::new(models.into()),
        ready: watch::Sender::new(Verdict::yes("ready")),
    };
    let closing = CancellationToken::new();
    closing.cancel();
    Api::new(Arc::new(scripted), closing)
}

impl Health for Scripted {
    fn liveness(&self) -> Verdict {
        Verdict::yes("alive")
    }

    fn startup(&self) -> Verdict {
        Verdict::yes("started")
    }

    fn readiness(&self) -> watch::Receiver<Verdict> {
        self.ready.subscribe()
    }
}

fn text() -> TokenText {
    TokenText { text: "a".into(), bytes: b"a".to_vec() }
}

impl Inference for Scripted {
    fn generate(&self, _: Generation) -> BoxFuture<'_, Result<Answer, ApiError>> {
        let finished = Event::Finished {
            reason: FinishReason::Stop,
            stopped_by: None,
            usage: Usage { prompt_tokens: 1, completion_tokens: 1 },
        };
        let events = [Ok(Event::Token { id: 1, text: "a".into(), logprobs: None }), Ok(finished)];
        let events = futures::stream::iter(events).boxed();
        Box::pin(async {
            Ok(Answer {
                id: "gen-1".into(),
                model: "fake".into(),
                model_digest: "d1".into(),
                revision: "r1".into(),
                created_unix_s: 0,
                prompt_tokens: 1,
                syntax: AnswerSyntax::default(),
                texts: Arc::new(|ids| Ok(ids.iter().map(|_| text()).collect())),
                events,
            })
        })
    }

    fn embed(&self, request: EmbedRequest) -> BoxFuture<'_, Result<Embedded, ApiError>> {
        Box::pin(async move {
            Ok(Embedded {
                id: "emb-1".into(),
                model: "fake".into(),
                model_digest: "d1".into(),
                revision: "r1".into(),
                values: vec![0.5; request.input.len() * WIDTH],
                width: WIDTH,
                tokens: 1,
                truncated: Vec::new(),
                pooling: PoolingMode::Mean,
                pooling_note: None,
            })
        })
    }

    fn classify(&self, request: ClassifyRequest) -> BoxFuture<'_, Result<Classified, ApiError>> {
        let classified = Classified {
            id: "cls-1".into(),
            model: "fake".into(),
            model_digest: "d1".into(),
            revision: "r1".into(),
            labels: ["no".to_owned(), "yes".to_owned()].into(),
            scores: [0.25, 0.75].repeat(request.input.len()),
            entities: None,
            tokens: 3,
            truncated: Vec::new(),
        };
        Box::pin(async { Ok(classified) })
    }

    fn rerank(&self, request: RerankRequest) -> BoxFuture<'_, Result<Reranked, ApiError>> {
        let reranked = Reranked {
            id: "rnk-1".into(),
            model: "fake".into(),
            model_digest: "d1".into(),
            revision: "r1".into(),
            scores: vec![0.5; request.documents.len()],
            tokens: 3,
            truncated: Vec::new(),
        };
        Box::pin(async { Ok(reranked) })
    }

    fn count_tokens(&self, _: CountRequest) -> BoxFuture<'_, Result<u32, ApiError>> {
        Box::pin(async { Ok(1) })
    }

    fn watch_models(&self) -> watch::Receiver<Models> {
        self.models.subscribe()
    }
}
