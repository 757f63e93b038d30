//! A pod with the real codecs of the API over models that play a script.

use std::net::SocketAddr;
use std::sync::Arc;

use futures::StreamExt;
use futures::future::BoxFuture;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use trustformers_api::browser::{AllowedOrigins, http_listener};
use trustformers_api::inference::Models;
use trustformers_api::server::{Limits, bind, serve};
use trustformers_api::{
    Answer, AnswerSyntax, Api, ApiError, Classified, ClassifyRequest, CountRequest, EmbedRequest, Embedded,
    Event, FinishReason, Generation, Health, Inference, PoolingMode, RerankRequest, Reranked, Usage, Verdict,
};
use trustformers_proto::v1;

/// The tokens of every answer.
const TOKENS: [&str; 2] = ["to", "kens"];

/// Starts a pod whose only model has these names and this task. It ends with the test's runtime.
pub(crate) async fn start(names: &[&str], task: &str) -> SocketAddr {
    let mut model = v1::ModelStatus {
        name: names[0].to_owned(),
        names: names.iter().map(ToString::to_string).collect(),
        task: task.to_owned(),
        revision: "r1".to_owned(),
        digest: "d1".to_owned(),
        context_tokens: 100,
        embedding_dimensions: 2,
        ..Default::default()
    };
    model.set_state(v1::ModelState::Ready);
    let scripted = Scripted {
        name: names[0].to_owned(),
        models: watch::Sender::new([model].into()),
        ready: watch::Sender::new(Verdict::yes("ready")),
    };
    let api = Api::new(Arc::new(scripted), CancellationToken::new());
    let services = trustformers_api::grpc::router(api.clone()).unwrap();
    let router = http_listener(trustformers_api::http::router(api), services, &AllowedOrigins::Any);
    let listener = bind(([127, 0, 0, 1], 0).into()).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, router, Limits::default(), CancellationToken::new()));
    address
}

struct Scripted {
    name: String,
    models: watch::Sender<Models>,
    ready: watch::Sender<Verdict>,
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

impl Inference for Scripted {
    fn generate(&self, _: Generation) -> BoxFuture<'_, Result<Answer, ApiError>> {
        let token = |text: &str| Ok(Event::Token { id: 1, text: text.to_owned(), logprobs: None });
        let finished = Event::Finished {
            reason: FinishReason::Stop,
            stopped_by: None,
            usage: Usage { prompt_tokens: 3, completion_tokens: 2 },
        };
        let events = TOKENS.map(token).into_iter().chain([Ok(finished)]);
        let answer = Answer {
            id: "gen-1".into(),
            model: self.name.clone(),
            model_digest: "d1".into(),
            revision: "r1".into(),
            created_unix_s: 1,
            prompt_tokens: 3,
            syntax: AnswerSyntax::default(),
            texts: Arc::new(|_| Ok(Vec::new())),
            events: futures::stream::iter(events.collect::<Vec<_>>()).boxed(),
        };
        Box::pin(async { Ok(answer) })
    }

    fn embed(&self, request: EmbedRequest) -> BoxFuture<'_, Result<Embedded, ApiError>> {
        let embedded = Embedded {
            id: "emb-1".into(),
            model: self.name.clone(),
            model_digest: "d1".into(),
            revision: "r1".into(),
            values: vec![0.5; request.input.len() * 2],
            width: 2,
            tokens: 3,
            truncated: Vec::new(),
            pooling: PoolingMode::Mean,
            pooling_note: None,
        };
        Box::pin(async { Ok(embedded) })
    }

    fn classify(&self, request: ClassifyRequest) -> BoxFuture<'_, Result<Classified, ApiError>> {
        let classified = Classified {
            id: "cls-1".into(),
            model: self.name.clone(),
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
            model: self.name.clone(),
            model_digest: "d1".into(),
            revision: "r1".into(),
            scores: vec![0.5; request.documents.len()],
            tokens: 3,
            truncated: Vec::new(),
        };
        Box::pin(async { Ok(reranked) })
    }

    fn count_tokens(&self, _: CountRequest) -> BoxFuture<'_, Result<u32, ApiError>> {
        Box::pin(async { Ok(3) })
    }

    fn watch_models(&self) -> watch::Receiver<Models> {
        self.models.subscribe()
    }
}
