//! The `Inference` over engines in this process: finds the model that is asked for and passes the request on.
//!
//! A request that is refused is refused here, at once and with what to do. Liveness asks the engines'
//! heartbeats and the progress of loading, never an engine's queue.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use trustformers_api::inference::Models;
use trustformers_api::{
    Answer, ApiError, BlockingWork, EmbedInput, EmbedRequest, Embedded, Event, FinishReason, Generation,
    Health, Inference, Logprobs, StoppedBy, Usage, Verdict,
};
use trustformers_engine::{
    Engine, GenerateError, GenerationEvent, RequestFault, StopCause, SubmitError, TokenLogprobs,
};
use trustformers_proto::Task;
use trustformers_proto::v1::ModelState;

use crate::embed;
use crate::inflight::{InflightGuard, InflightRequests};
use crate::lifecycle::{ManagedModel, Serving};
use crate::load::Loader;
use crate::params::generate_params;
use crate::runner::Runner;
use crate::spec::{ModelSpec, SpecError};
use crate::status::{ModelStatuses, describe};

/// Work pending and no step for this long: the engine hangs. The longest step there is, a full token budget
/// of a large model on a slow CPU, takes a few seconds.
const ENGINE_STALL: Duration = Duration::from_secs(60);
/// So many steps failed one after the other: the device is broken in a way that a restart may cure.
const FAILED_STEPS: u64 = 3;
/// Loading without a sign of life for this long: the storage hangs in a way that a restart may cure.
const LOAD_STALL: Duration = Duration::from_secs(600);
/// Seconds after which a refused caller may try again: a small model frees a place within one.
pub(crate) const RETRY_AFTER_S: u32 = 1;
/// Longer prompts are tokenised, and formats compiled, away from the threads that serve connections. A
/// shorter prompt takes less than the few milliseconds that a connection may wait.
const LONG_PROMPT_BYTES: usize = 16 * 1024;

/// Long requests that are tokenised at a time. Tokenising takes at most some 340 bytes for each byte of a
/// text; a prompt that fits a context of 8,192 tokens has at most some 400 KiB, which makes 140 MiB for each
/// request.
const LONG_REQUESTS: usize = 2;

/// All models of this process.
pub struct ModelServer {
    models: Vec<Arc<ManagedModel>>,
    by_name: HashMap<String, usize>,
    statuses: Arc<ModelStatuses>,
    inflight: Arc<InflightRequests>,
    loading: Mutex<Vec<JoinHandle<()>>>,
    /// Tokenises long requests and compiles formats.
    long_requests: BlockingWork,
}

impl ModelServer {
    /// Takes the models, Pending.
    ///
    /// # Errors
    /// When there are none, or two claim one name.
    pub fn new(specs: Vec<ModelSpec>) -> Result<Self, SpecError> {
        if specs.is_empty() {
            return Err(SpecError::new("models", "is empty: give at least one model"));
        }
        let statuses = Arc::new(ModelStatuses::new(&specs));
        let mut by_name = HashMap::new();
        for (index, spec) in specs.iter().enumerate() {
            for name in &spec.names {
                if by_name.insert(name.clone(), index).is_some_and(|other| other != index) {
                    return Err(SpecError::new(
                        format!("models[{index}].name"),
                        format!("{name:?} is taken by another model; give each its own name"),
                    ));
                }
            }
        }
        let models = (0..).zip(specs).map(|(index, spec)| Arc::new(ManagedModel::new(spec, index))).collect();
        Ok(Self {
            models,
            by_name,
            statuses,
            inflight: InflightRequests::new(),
            loading: Mutex::default(),
            long_requests: BlockingWork::new(LONG_REQUESTS),
        })
    }

    /// Begins to load every model. The loader takes them one at a time, but one that has to be tried again
    /// does not hold up the others.
    pub fn start_loading(&self, loader: &Arc<Loader>) {
        let mut loading = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        for managed in &self.models {
            loading.push(tokio::spawn(managed.clone().run(self.statuses.clone(), loader.clone())));
        }
    }

    /// The published states.
    pub fn statuses(&self) -> &Arc<ModelStatuses> {
        &self.statuses
    }

    /// The requests that are being answered.
    pub fn inflight(&self) -> &Arc<InflightRequests> {
        &self.inflight
    }

    /// Stops loading and ends every engine; what they were answering ends with an error.
    pub async fn stop(&self) {
        let tasks = std::mem::take(&mut *self.loading.lock().unwrap_or_else(PoisonError::into_inner));
        for task in tasks {
            task.abort();
        }
        for serving in self.models.iter().filter_map(|managed| managed.serving()) {
            serving.runner.stop().await;
        }
    }

    fn choices(&self) -> Vec<String> {
        self.models.iter().map(|managed| managed.spec.name().to_owned()).collect()
    }

    /// The model that is asked for. Without a name: the only one there is, or the only one of this task.
    fn find(&self, asked: Option<&str>, task: Task) -> Result<&Arc<ManagedModel>, ApiError> {
        if let Some(name) = asked {
            let index = self.by_name.get(name);
            return index
                .map(|index| &self.models[*index])
                .ok_or_else(|| ApiError::UnknownModel { asked: name.to_owned(), choices: self.choices() });
        }
        // Whatever the only one does, its own error is the best answer.
        if let [only] = &self.models[..] {
            return Ok(only);
        }
        let mut meant = Vec::new();
        for managed in &self.models {
            let status = self.statuses.status(managed.index);
            if Task::from_wire(&status.task) == Some(task) {
                meant.push(managed);
            } else if status.task.is_empty() && status.state() != ModelState::Failed {
                // The task of a model is known once it is loaded; until then the request may mean this model.
                let message = format!("{}; name the model, or ask again", describe(&status));
                return Err(ApiError::Unavailable { message, retry_after_s: Some(RETRY_AFTER_S) });
            }
        }
        match meant[..] {
            [one] => Ok(one),
            [] => Err(ApiError::ModelRequired { choices: self.choices() }),
            _ => {
                let choices = meant.iter().map(|managed| managed.spec.name().to_owned()).collect();
                Err(ApiError::ModelRequired { choices })
            }
        }
    }

    /// The engine of a model that serves now. A draining model still serves: routers learn of it later than
    /// this.
    fn serving(&self, managed: &ManagedModel) -> Result<Arc<Serving>, ApiError> {
        let status = self.statuses.status(managed.index);
        let serves = matches!(status.state(), ModelState::Ready | ModelState::Draining);
        match managed.serving() {
            Some(serving) if serves => Ok(serving),
            _ => {
                let may_pass = status.state() != ModelState::Failed;
                let message = describe(&status);
                Err(ApiError::Unavailable { message, retry_after_s: may_pass.then_some(RETRY_AFTER_S) })
            }
        }
    }

    async fn admit(&self, request: Generation) -> Result<Answer, ApiError> {
        let managed = self.find(request.model.as_deref(), Task::Generate)?;
        let serving = self.serving(managed)?;
        let Runner::Generate(engine) = &serving.runner else {
            return Err(wrong_task(managed, &serving));
        };
        let busy = self.inflight.register();
        check_length(engine, &request.prompt)?;
        let long = request.prompt.len() > LONG_PROMPT_BYTES || request.options.format.is_some();
        let params = generate_params(request);
        let submitted = if long {
            let engine = engine.clone();
            self.long_requests.run(move || engine.submit(&params)).await?
        } else {
            engine.submit(&params)
        };
        let generation = submitted.map_err(|error| refused(&error))?;
        Ok(Answer {
            id: format!("gen-{}", uuid::Uuid::new_v4().simple()),
            model: managed.spec.name().to_owned(),
            model_digest: serving.digest.clone(),
            events: generation.map(move |event| translate(event, &busy)).boxed(),
        })
    }

    async fn encode(&self, request: EmbedRequest) -> Result<Embedded, ApiError> {
        let managed = self.find(request.model.as_deref(), Task::Embed)?;
        let serving = self.serving(managed)?;
        let Runner::Embed(encoder) = &serving.runner else {
            return Err(wrong_task(managed, &serving));
        };
        let facts = embed::facts(encoder.model())?;
        embed::check_dimensions(&request, facts)?;
        let _busy = self.inflight.register();
        let bytes = |input: &EmbedInput| match input {
            EmbedInput::Text(text) => text.len(),
            EmbedInput::Tokens(_) => 0,
        };
        let long = request.input.iter().map(bytes).sum::<usize>() > LONG_PROMPT_BYTES;
        let params = embed::encode_params(request);
        let submitted = if long {
            let encoder = encoder.clone();
            self.long_requests.run(move || encoder.submit(&params)).await?
        } else {
            encoder.submit(&params)
        };
        let failed = |error| embed::failed(&error);
        let encoded = submitted.map_err(failed)?.await.map_err(failed)?;
        let by =
            embed::ModelIdentity { name: managed.spec.name().to_owned(), digest: serving.digest.clone() };
        Ok(embed::embedded(by, facts, encoded))
    }
}

fn wrong_task(managed: &ManagedModel, serving: &Serving) -> ApiError {
    let task = serving.runner.task();
    ApiError::WrongTask { model: managed.spec.name().to_owned(), task }
}

/// Refuses a prompt that has too many tokens however it is tokenised. Tokenising takes some hundred bytes of
/// memory for each byte of the prompt, so a prompt of which the answer is known is not tokenised.
fn check_length(engine: &Engine, prompt: &str) -> Result<(), ApiError> {
    // One token is left for the answer.
    let most = engine.info().context_tokens.saturating_sub(1);
    // A token stands for at least one byte; the exact figure is only needed for prompts that may be too long.
    if prompt.len() <= most {
        return Ok(());
    }
    let longest = engine.model().tokenizer().longest_token_bytes();
    if prompt.len() <= most.saturating_mul(longest) {
        return Ok(());
    }
    let bytes = prompt.len();
    let message = format!(
        "prompt: it is {bytes} bytes long, and the {most} tokens that fit stand for at most {longest} bytes each; shorten it"
    );
    Err(ApiError::TooLong { message })
}

/// `_busy` is only carried: it ends when the stream is dropped.
fn translate(
    event: Result<GenerationEvent, GenerateError>,
    _busy: &InflightGuard,
) -> Result<Event, ApiError> {
    let count = |tokens: usize| u32::try_from(tokens).unwrap_or(u32::MAX);
    match event {
        Ok(GenerationEvent::Token { id, text, logprobs, .. }) => {
            let logprobs = logprobs.map(|TokenLogprobs { logprob, top }| Logprobs { logprob, top });
            Ok(Event::Token { id, text, logprobs })
        }
        Ok(GenerationEvent::Finished { reason, stop, prompt_tokens, completion_tokens, .. }) => {
            Ok(Event::Finished {
                stopped_by: stop.map(|stop| match stop {
                    StopCause::Text(text) => StoppedBy::Text(text),
                    StopCause::Token(id) => StoppedBy::Token(id),
                }),
                reason: match reason {
                    trustformers_engine::FinishReason::Stop => FinishReason::Stop,
                    trustformers_engine::FinishReason::Length => FinishReason::Length,
                },
                usage: Usage {
                    prompt_tokens: count(prompt_tokens),
                    completion_tokens: count(completion_tokens),
                },
            })
        }
        Err(error @ GenerateError::Stopped) => {
            Err(ApiError::Unavailable { message: error.to_string(), retry_after_s: Some(RETRY_AFTER_S) })
        }
        Err(GenerateError::Request(fault)) => {
            let field = matches!(fault, RequestFault::Grammar { .. }).then(|| "response_format".to_owned());
            Err(ApiError::InvalidRequest { field, message: fault.to_string() })
        }
        Err(error @ GenerateError::Overloaded { retry_after }) => {
            Err(overloaded(error.to_string(), retry_after))
        }
        Err(error) => Err(ApiError::Internal { message: error.to_string() }),
    }
}

/// A refusal with the time of the next attempt.
pub(crate) fn overloaded(message: String, retry_after: Duration) -> ApiError {
    ApiError::Overloaded { message, retry_after_s: u32::try_from(retry_after.as_secs()).unwrap_or(u32::MAX) }
}

fn refused(error: &SubmitError) -> ApiError {
    let message = error.to_string();
    match error {
        SubmitError::Overloaded { retry_after, .. } | SubmitError::Busy { retry_after, .. } => {
            overloaded(message, *retry_after)
        }
        SubmitError::PromptTooLong { .. } => ApiError::TooLong { message },
        SubmitError::Invalid { field, .. } => {
            ApiError::InvalidRequest { field: Some((*field).to_owned()), message }
        }
        SubmitError::Model(_) => ApiError::Internal { message },
        SubmitError::Stopped => ApiError::Unavailable { message, retry_after_s: Some(RETRY_AFTER_S) },
    }
}

impl Health for ModelServer {
    fn liveness(&self) -> Verdict {
        for managed in &self.models {
            let status = self.statuses.status(managed.index);
            let name = managed.spec.name();
            match (managed.serving(), status.state()) {
                (_, ModelState::Draining | ModelState::Failed) => {}
                (Some(serving), _) => {
                    let beat = serving.runner.heartbeat();
                    if !beat.alive {
                        return Verdict::no(format!(
                            "the engine of {name} has ended unexpectedly; see the log"
                        ));
                    }
                    if beat.failed_steps >= FAILED_STEPS {
                        let failed = beat.failed_steps;
                        return Verdict::no(format!(
                            "the last {failed} steps of the engine of {name} failed; see the log"
                        ));
                    }
                    if beat.work_pending && beat.last_step_age > ENGINE_STALL {
                        let age = beat.last_step_age.as_secs();
                        return Verdict::no(format!(
                            "the engine of {name} has work but made no step for {age} s"
                        ));
                    }
                }
                (None, ModelState::Loading) if managed.progress_age() > LOAD_STALL => {
                    let age = managed.progress_age().as_secs();
                    return Verdict::no(format!("loading {name} made no progress for {age} s"));
                }
                _ => {}
            }
        }
        Verdict::yes("alive")
    }

    fn startup(&self) -> Verdict {
        self.statuses.startup()
    }

    fn readiness(&self) -> watch::Receiver<Verdict> {
        self.statuses.watch_readiness()
    }
}

impl Inference for ModelServer {
    fn generate(&self, request: Generation) -> BoxFuture<'_, Result<Answer, ApiError>> {
        Box::pin(self.admit(request))
    }

    fn embed(&self, request: EmbedRequest) -> BoxFuture<'_, Result<Embedded, ApiError>> {
        Box::pin(self.encode(request))
    }

    fn watch_models(&self) -> watch::Receiver<Models> {
        self.statuses.watch()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use trustformers_api::{Format, Options, PoolingMode, Priority};
    use trustformers_model::seeded::{SeededEncoder, SeededModel};
    use trustformers_plan::oracle::Oracle;
    use trustformers_store::Source;

    fn request(model: Option<&str>) -> Generation {
        Generation {
            prompt: "Hello".into(),
            model: model.map(str::to_owned),
            max_tokens: 4,
            temperature: 0.0,
            top_p: 1.0,
            seed: None,
            priority: Priority::Normal,
            tenant: String::new(),
            options: Options::default(),
        }
    }

    /// A server of one seeded model, ready; the folder must outlive it.
    async fn ready(configure: impl FnOnce(&mut ModelSpec)) -> (ModelServer, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("m.gguf"), SeededModel::default().gguf()).unwrap();
        let mut spec = ModelSpec::new("ns/m", Source::from_path(folder.path()));
        spec.names.push("m".into());
        configure(&mut spec);
        let server = ModelServer::new(vec![spec]).unwrap();
        let loader =
            Loader::new(Box::new(|_| Ok(Box::new(Oracle::new()))), &prometheus::Registry::new()).unwrap();
        server.start_loading(&Arc::new(loader));
        server.readiness().wait_for(|verdict| verdict.ok).await.unwrap();
        (server, folder)
    }

    async fn tokens(mut answer: Answer) -> (Vec<u32>, Option<FinishReason>) {
        let (mut ids, mut end) = (Vec::new(), None);
        while let Some(event) = answer.events.next().await {
            match event.unwrap() {
                Event::Token { id, .. } => ids.push(id),
                Event::Finished { reason, .. } => end = Some(reason),
            }
        }
        (ids, end)
    }

    #[tokio::test]
    async fn a_model_answers_to_each_of_its_names_and_to_none() {
        let (server, _folder) = ready(|_| {}).await;
        let mut all = Vec::new();
        for name in [None, Some("m"), Some("ns/m")] {
            let answer = server.generate(request(name)).await.unwrap();
            assert_eq!((answer.model.as_str(), answer.model_digest.len()), ("ns/m", 64));
            all.push(tokens(answer).await);
        }
        assert!(!all[0].0.is_empty() && all[0].1.is_some());
        assert!(all.iter().all(|one| *one == all[0]), "greedy answers are the same: {all:?}");
        assert_eq!(server.inflight().count(), 0);
    }

    #[tokio::test]
    async fn options_are_honoured_and_what_cannot_be_is_refused_by_name() {
        let (server, _folder) = ready(|_| {}).await;
        let with = |options: Options| Generation { max_tokens: 40, options, ..request(None) };
        let format = |format| with(Options { format: Some(format), ..Options::default() });
        let mut answer = server.generate(format(Format::Regex("[ab]{3}".into()))).await.unwrap();
        let mut text = String::new();
        while let Some(event) = answer.events.next().await {
            if let Event::Token { text: piece, .. } = event.unwrap() {
                text.push_str(&piece);
            }
        }
        assert!(text.len() == 3 && text.chars().all(|c| "ab".contains(c)), "{text}");
        drop(answer);

        let refused = [
            (with(Options { min_p: Some(2.0), ..Options::default() }), "min_p", "2 is not between 0 and 1"),
            (with(Options { stop_token_ids: vec![9999], ..Options::default() }), "stop_token_ids", "9999"),
            (format(Format::Regex("(".into())), "response_format", "regular expression"),
            (format(Format::JsonSchema("{".into())), "response_format", "not JSON"),
            (format(Format::Grammar("start: nothing".into())), "response_format", "nothing"),
        ];
        for (request, name, text) in refused {
            let error = server.generate(request).await.err().unwrap();
            assert!(
                matches!(&error, ApiError::InvalidRequest { field: Some(field), .. } if field == name),
                "{error:?}"
            );
            assert!(error.to_string().contains(text), "{error}");
        }
        assert_eq!(server.inflight().count(), 0);
    }

    fn texts(input: &[&str], model: Option<&str>) -> EmbedRequest {
        EmbedRequest {
            input: input.iter().map(|text| EmbedInput::Text((*text).into())).collect(),
            model: model.map(str::to_owned),
            truncate: true,
            dimensions: None,
            priority: Priority::Normal,
            tenant: String::new(),
        }
    }

    /// A server of one model that generates, `gen`, and one that embeds, `emb`, whose files say nothing of
    /// pooling.
    async fn ready_for_both() -> (ModelServer, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("m.gguf"), SeededModel::default().gguf()).unwrap();
        std::fs::create_dir(folder.path().join("bert")).unwrap();
        let encoder = SeededEncoder { pooling: None, normalised: false, ..SeededEncoder::default() };
        encoder.write(&folder.path().join("bert")).unwrap();
        let spec = |name, path: &str| ModelSpec::new(name, Source::from_path(folder.path().join(path)));
        let server = ModelServer::new(vec![spec("gen", "m.gguf"), spec("emb", "bert")]).unwrap();
        let loader =
            Loader::new(Box::new(|_| Ok(Box::new(Oracle::new()))), &prometheus::Registry::new()).unwrap();
        server.start_loading(&Arc::new(loader));
        server.readiness().wait_for(|verdict| verdict.ok).await.unwrap();
        (server, folder)
    }

    #[tokio::test]
    async fn each_task_finds_its_model_and_the_other_is_refused() {
        let (server, _folder) = ready_for_both().await;
        let embedded = server.embed(texts(&["hello", "", "hello"], None)).await.unwrap();
        assert_eq!((embedded.model.as_str(), embedded.width, embedded.values.len()), ("emb", 64, 3 * 64));
        assert_eq!(embedded.values[..64], embedded.values[128..]);
        assert_eq!(embedded.pooling, PoolingMode::Mean);
        assert!(embedded.pooling_note.is_some(), "the note says that pooling is not configured");
        assert_eq!(server.generate(request(None)).await.unwrap().model, "gen");
        let status = server.statuses().status(1);
        assert_eq!((status.task.as_str(), status.embedding_dimensions), ("embed", 64));
        let error = server.embed(texts(&["a"], Some("gen"))).await.unwrap_err().to_string();
        assert!(error.contains("\"gen\" generates text") && error.contains("/v1/generate"), "{error}");
        let error = server.generate(request(Some("emb"))).await.err().unwrap().to_string();
        assert!(error.contains("\"emb\" turns texts") && error.contains("/v1/embeddings"), "{error}");
        assert_eq!(server.inflight().count(), 0);
    }

    #[tokio::test]
    async fn texts_that_are_too_long_are_cut_or_refused_as_requested() {
        let (server, _folder) = ready_for_both().await;
        let long = "cat ".repeat(6000);
        let cut = server.embed(texts(&["a", &long], None)).await.unwrap();
        assert_eq!((cut.truncated.as_slice(), cut.tokens), ([1].as_slice(), 64 + 3));
        let strict = EmbedRequest { truncate: false, ..texts(&["a", &long], None) };
        let error = server.embed(strict).await.unwrap_err();
        assert!(matches!(&error, ApiError::TooLong { message } if message.contains("text 1")), "{error}");
        let with = |dimensions| EmbedRequest { dimensions, ..texts(&["a"], None) };
        assert!(server.embed(with(Some(64))).await.is_ok());
        let error = server.embed(with(Some(32))).await.unwrap_err().to_string();
        assert!(error.starts_with("dimensions: 32 is not") && error.contains("64"), "{error}");
        server.stop().await;
        let error = server.embed(texts(&["a"], None)).await.unwrap_err();
        assert!(matches!(error, ApiError::Unavailable { .. }), "{error}");
    }

    #[tokio::test]
    async fn an_unknown_or_missing_name_lists_the_choices() {
        let (server, _folder) = ready(|_| {}).await;
        let error = server.generate(request(Some("x"))).await.err().unwrap();
        assert!(matches!(error, ApiError::UnknownModel { choices, .. } if choices == ["ns/m"]));
        let spec = |name: &str| ModelSpec::new(name, Source::from_path("/none"));
        let two = ModelServer::new(vec![spec("a"), spec("b")]).unwrap();
        let unnamed = async || two.generate(request(None)).await.err().unwrap();
        // What they do is not known yet.
        assert!(matches!(unnamed().await, ApiError::Unavailable { retry_after_s: Some(_), .. }));
        two.statuses.enter(0, ModelState::Failed);
        two.statuses.enter(1, ModelState::Failed);
        assert!(matches!(unnamed().await, ApiError::ModelRequired { choices } if choices == ["a", "b"]));
        two.statuses.enter(1, ModelState::Pending);
        let error = two.generate(request(Some("b"))).await.err().unwrap();
        assert!(
            matches!(&error, ApiError::Unavailable { message, .. } if message.contains("b is pending")),
            "{error}"
        );
        assert!(ModelServer::new(vec![spec("a"), spec("a")]).is_err());
        assert!(ModelServer::new(Vec::new()).is_err());
    }

    #[tokio::test]
    async fn a_prompt_that_does_not_fit_is_too_long_on_either_path() {
        let (server, _folder) = ready(|spec| spec.engine.context_tokens = Some(16)).await;
        for words in [40, 4000] {
            let mut long = request(None);
            long.prompt = "word ".repeat(words);
            let error = server.generate(long).await.err().unwrap();
            assert!(matches!(&error, ApiError::TooLong { message } if message.contains("15")), "{error}");
        }
        assert_eq!(server.inflight().count(), 0);
    }

    #[tokio::test]
    async fn requests_are_answered_while_draining_and_not_after_stop() {
        let (server, _folder) = ready(|_| {}).await;
        server.statuses().draining();
        assert!(!server.readiness().borrow().ok && server.liveness().ok);
        tokens(server.generate(request(None)).await.unwrap()).await;
        server.stop().await;
        let error = server.generate(request(None)).await.err().unwrap();
        assert!(matches!(error, ApiError::Unavailable { retry_after_s: Some(_), .. }), "{error}");
        assert!(server.liveness().ok, "a stopped engine is no reason to restart");
    }

    #[tokio::test]
    async fn an_engine_that_ended_by_itself_is_not_alive() {
        let (server, _folder) = ready(|_| {}).await;
        assert!(server.liveness().ok);
        server.models[0].serving().unwrap().runner.stop().await;
        let verdict = server.liveness();
        assert!(!verdict.ok && verdict.message.contains("ns/m"), "{verdict:?}");
    }

    #[tokio::test]
    async fn a_prompt_that_cannot_fit_is_refused_before_it_is_tokenised() {
        let (server, _folder) = ready(|spec| spec.engine.context_tokens = Some(16)).await;
        let most = 15 * server.models[0].serving().unwrap().runner.model().tokenizer().longest_token_bytes();
        for (bytes, why) in [(most, "tokens"), (most + 1, "bytes long")] {
            let prompt = "7".repeat(bytes);
            let error = server.generate(Generation { prompt, ..request(None) }).await.err().unwrap();
            assert!(matches!(&error, ApiError::TooLong { message } if message.contains(why)), "{error}");
        }
    }
}
