//! Requests to a server of seeded models: names, tasks, revisions, limits, and its end.

use super::*;
use crate::adapters::AdapterSpec;
use trustformers_api::{
    CallSyntax, Conversation, Event, FinishReason, Format, Options, PoolingMode, Priority, ToolChoice,
};
use trustformers_model::gguf::GgufValue;
use trustformers_model::seeded::{SeededAdapter, SeededEncoder, SeededModel};
use trustformers_plan::oracle::Oracle;
use trustformers_store::Source;

fn request(model: Option<&str>) -> Generation {
    Generation {
        prompt: "Hello".into(),
        model: model.map(str::to_owned),
        revision: None,
        max_tokens: 4,
        temperature: 0.0,
        top_p: 1.0,
        seed: None,
        priority: Priority::Normal,
        tenant: String::new(),
        options: Options::default(),
        left_out: trustformers_api::LeftOut::default(),
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

/// What serves the first model.
fn serving(server: &ModelServer) -> Arc<Serving> {
    server.table.snapshot().models()[0].current.serving().unwrap()
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
    assert_eq!(server.statuses().status(0).names, ["ns/m", "m"]);
    assert!(all.iter().all(|one| *one == all[0]), "greedy answers are the same: {all:?}");
    assert_eq!(server.inflight().count(), 0);
}

#[tokio::test]
async fn an_adapter_answers_to_its_model_and_its_own_name() {
    let folder = tempfile::tempdir().unwrap();
    SeededAdapter::of(SeededModel::default(), 7).write(folder.path()).unwrap();
    let source = Source::from_path(folder.path());
    let adapter = AdapterSpec { name: "sql".into(), source, sha256: None };
    let (server, _folder) = ready(|spec| spec.adapters.push(adapter)).await;
    let plain = tokens(server.generate(request(Some("m"))).await.unwrap()).await;
    let mut adapted = Vec::new();
    for name in ["m:sql", "ns/m:sql", "sql"] {
        let answer = server.generate(request(Some(name))).await.unwrap();
        assert_eq!(answer.model, "ns/m:sql");
        adapted.push(tokens(answer).await);
    }
    assert!(adapted.iter().all(|one| *one == adapted[0]), "{adapted:?}");
    assert_eq!(server.statuses().status(0).adapters, ["sql"]);
    assert_ne!(adapted[0], plain, "the adapter changes the answer");
    for name in ["m:other", "other:sql", ":sql", "m:"] {
        let refused = server.generate(request(Some(name))).await.map(|answer| answer.model);
        let Err(ApiError::UnknownModel { asked, choices }) = refused else { panic!("{name}: {refused:?}") };
        assert_eq!((asked.as_str(), choices), (name, vec!["ns/m".to_owned(), "ns/m:sql".to_owned()]));
    }
}

#[tokio::test]
async fn an_adapter_of_another_model_fails_the_load_with_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let other = SeededModel { feed_forward: 64, ..SeededModel::default() };
    SeededAdapter::of(other, 7).write(folder.path()).unwrap();
    let model = folder.path().join("m.gguf");
    std::fs::write(&model, SeededModel::default().gguf()).unwrap();
    let mut spec = ModelSpec::new("m", Source::from_path(&model));
    let source = Source::from_path(folder.path());
    spec.adapters.push(AdapterSpec { name: "sql".into(), source, sha256: None });
    let loader =
        Loader::new(Box::new(|_| Ok(Box::new(Oracle::new()))), &prometheus::Registry::new()).unwrap();
    let quiet: crate::load::OnProgress = Arc::new(|_, _| {});
    let load = move || loader.load(&spec, &quiet);
    let failure = tokio::task::spawn_blocking(load).await.unwrap().unwrap_err();
    assert_eq!((failure.reason, failure.transient), ("MalformedModel", false));
    assert!(failure.message.starts_with("adapter sql: "), "{failure}");
    assert!(failure.message.contains("was the adapter trained for another model?"), "{failure}");
}

/// Prints the roles and contents of the messages, as the seeded tokenizer's control tokens have it.
const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>\
    {% endfor %}<|im_start|>assistant ";

/// A server of one seeded model with this chat template.
async fn ready_to_chat(template: &str) -> (ModelServer, [tempfile::TempDir; 2]) {
    let folder = tempfile::tempdir().unwrap();
    let keys = [("tokenizer.chat_template", GgufValue::String(template.to_owned()))];
    let file = folder.path().join("chat.gguf");
    std::fs::write(&file, SeededModel::default().gguf_with(&keys)).unwrap();
    let (server, other) = ready(|spec| spec.source = Source::from_path(&file)).await;
    (server, [folder, other])
}

#[tokio::test]
async fn a_required_call_is_written_in_the_words_of_the_models_family() {
    let template = format!("{{% if tools %}}<tool_call></tool_call>{{% endif %}}{TEMPLATE}");
    let (server, _folders) = ready_to_chat(&template).await;
    let parameters = serde_json::json!({
        "type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"],
        "additionalProperties": false,
    });
    let function = serde_json::json!({"name": "f", "parameters": parameters});
    let conversation = Conversation {
        messages: vec![serde_json::json!({"role": "user", "content": "call"})],
        tools: vec![serde_json::json!({"type": "function", "function": function})],
        tool_choice: ToolChoice::Required,
        ..Conversation::default()
    };
    let asked = Generation { prompt: conversation.into(), max_tokens: 100, ..request(None) };
    let mut answer = server.generate(asked).await.unwrap();
    assert_eq!(answer.syntax.calls, Some(CallSyntax::Hermes));
    let mut text = String::new();
    while let Some(event) = answer.events.next().await {
        if let Event::Token { text: piece, .. } = event.unwrap() {
            text.push_str(&piece);
        }
    }
    assert!(text.starts_with("<tool_call>\n{\"name\": \"f\", \"arguments\": {"), "{text}");
}

#[tokio::test]
async fn a_conversation_a_text_and_its_ids_are_the_same_prompt() {
    let (server, _folders) = ready_to_chat(TEMPLATE).await;
    let message = serde_json::json!({"role": "user", "content": "hello"});
    let conversation = Conversation { messages: vec![message], ..Conversation::default() };
    let text = "<|im_start|>user hello<|im_end|><|im_start|>assistant ";
    let ids = serving(&server).runner.model().tokenizer().encode(text).unwrap();
    let count = u32::try_from(ids.len()).unwrap();
    let mut all = Vec::new();
    for prompt in [conversation.into(), text.into(), Prompt::Tokens(ids)] {
        let request = CountRequest { model: None, revision: None, prompt };
        assert_eq!(server.count_tokens(request.clone()).await, Ok(count));
        let asked = Generation { prompt: request.prompt, ..self::request(None) };
        let answer = server.generate(asked).await.unwrap();
        assert_eq!(answer.prompt_tokens, count);
        all.push(tokens(answer).await);
    }
    assert!(!all[0].0.is_empty() && all.iter().all(|one| *one == all[0]), "{all:?}");
    assert_eq!(server.inflight().count(), 0);
}

#[tokio::test]
async fn the_revision_that_answers_is_named_and_another_one_is_refused() {
    let (server, _folder) = ready(|spec| spec.revision = "r1".into()).await;
    let with = |revision: &str| Generation { revision: Some(revision.to_owned()), ..request(None) };
    let answer = server.generate(with("r1")).await.unwrap();
    assert!(answer.revision == "r1" && answer.created_unix_s > 1_700_000_000);
    let error = server.generate(with("r2")).await.err().unwrap();
    assert!(matches!(&error, ApiError::UnknownRevision { loaded, .. } if loaded == "r1"), "{error}");
}

#[tokio::test]
async fn tokens_have_their_texts_and_control_tokens_are_spelled() {
    let (server, _folder) = ready(|_| {}).await;
    let ids = serving(&server).runner.model().tokenizer().encode("hello").unwrap();
    let answer = server.generate(request(None)).await.unwrap();
    let texts = (answer.texts)(&[ids[0], 1]).unwrap();
    let found: Vec<&str> = texts.iter().map(|text| text.text.as_str()).collect();
    assert_eq!((found, texts[0].bytes.as_slice()), (vec!["hello", "<|im_start|>"], b"hello".as_slice()));
    let error = (answer.texts)(&[9999]).unwrap_err().to_string();
    assert!(error.contains("9999 is outside the model's vocabulary"), "{error}");
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
        revision: None,
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
    let foreign = EmbedInput::Tokens(vec![1, 100_000]);
    let foreign = EmbedRequest { input: vec![foreign], ..texts(&["a"], None) };
    let error = server.embed(foreign).await.unwrap_err().to_string();
    assert!(error.starts_with("input[0]: token id 100000 is outside"), "{error}");
    assert!(error.contains("check_embedding_ctx_length"), "{error}");
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
    two.statuses().enter(0, ModelState::Failed);
    two.statuses().enter(1, ModelState::Failed);
    assert!(matches!(unnamed().await, ApiError::ModelRequired { choices } if choices == ["a", "b"]));
    two.statuses().enter(1, ModelState::Pending);
    let error = two.generate(request(Some("b"))).await.err().unwrap();
    assert!(
        matches!(&error, ApiError::Unavailable { message, .. } if message.contains("b is pending")),
        "{error}"
    );
    assert!(ModelServer::new(vec![spec("a"), spec("a")]).is_err());
    // A server in front of models of others may have none of its own.
    assert!(ModelServer::new(Vec::new()).unwrap().statuses().watch().borrow().is_empty());
}

#[tokio::test]
async fn callers_that_name_no_model_are_answered_while_another_one_loads() {
    let (server, _folder) = ready(|_| {}).await;
    let later = server.table.statuses();
    let spec = ModelSpec::new("later", Source::from_path("/none"));
    // Its load cannot end before this test does: nothing has begun it.
    server.table.insert(spec).unwrap();
    assert!(later.watch().borrow().iter().any(|model| model.task.is_empty()), "it is unknown what it does");
    assert!(server.generate(request(None)).await.is_ok());
    // Only the new one could serve this.
    let error = server.embed(texts(&["a"], None)).await.unwrap_err();
    assert!(matches!(error, ApiError::Unavailable { retry_after_s: Some(_), .. }), "{error}");
}

#[tokio::test]
async fn a_prompt_that_does_not_fit_is_too_long_on_either_path() {
    let (server, _folder) = ready(|spec| spec.engine.context_tokens = Some(16)).await;
    for words in [40, 4000] {
        let mut long = request(None);
        long.prompt = "word ".repeat(words).into();
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
    serving(&server).runner.stop().await;
    let verdict = server.liveness();
    assert!(!verdict.ok && verdict.message.contains("ns/m"), "{verdict:?}");
}

#[tokio::test]
async fn a_prompt_that_cannot_fit_is_refused_before_it_is_tokenised() {
    let (server, _folder) = ready(|spec| spec.engine.context_tokens = Some(16)).await;
    let most = 15 * serving(&server).runner.model().tokenizer().longest_token_bytes();
    for (bytes, why) in [(most, "tokens"), (most + 1, "bytes long")] {
        let prompt = "7".repeat(bytes).into();
        let error = server.generate(Generation { prompt, ..request(None) }).await.err().unwrap();
        assert!(matches!(&error, ApiError::TooLong { message } if message.contains(why)), "{error}");
    }
}

#[tokio::test]
async fn plain_requests_do_not_wait_for_formats_that_compile() {
    let (server, _folders) = ready_to_chat(TEMPLATE).await;
    let (release, released) = std::sync::mpsc::sync_channel::<()>(FORMATTED_REQUESTS);
    let released = Arc::new(std::sync::Mutex::new(released));
    let (started, mut has_started) = tokio::sync::mpsc::channel(FORMATTED_REQUESTS);
    let mut compiling = tokio::task::JoinSet::new();
    for _ in 0..FORMATTED_REQUESTS {
        let (pool, started, released) = (server.formatted.clone(), started.clone(), Arc::clone(&released));
        compiling.spawn(async move {
            let job = move || {
                started.try_send(()).unwrap();
                released.lock().unwrap().recv().unwrap();
            };
            pool.run(job).await
        });
        has_started.recv().await.unwrap();
    }
    let message = serde_json::json!({"role": "user", "content": "hello"});
    let chat = || Conversation { messages: vec![message.clone()], ..Conversation::default() };
    let plain = Generation { prompt: chat().into(), ..request(None) };
    assert!(!tokens(server.generate(plain).await.unwrap()).await.0.is_empty());
    let options = Options { format: Some(Format::Regex("[ab]{3}".into())), ..Options::default() };
    let formatted = Generation { prompt: chat().into(), options, ..request(None) };
    let mut waiting = server.generate(formatted);
    assert!(futures::poll!(&mut waiting).is_pending(), "both permits for formats are in use");
    (0..FORMATTED_REQUESTS).for_each(|_| release.send(()).unwrap());
    assert!(!tokens(waiting.await.unwrap()).await.0.is_empty());
    assert!(compiling.join_all().await.iter().all(Result::is_ok));
}

#[tokio::test]
async fn a_load_that_an_unload_ended_is_a_conflict_for_its_caller() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("m.gguf"), SeededModel::default().gguf()).unwrap();
    let (release, released) = std::sync::mpsc::sync_channel::<()>(FORMATTED_REQUESTS);
    let released = std::sync::Mutex::new(released);
    let (opening, mut is_opening) = tokio::sync::mpsc::channel(FORMATTED_REQUESTS);
    let open = move |spec: &ModelSpec| {
        if spec.name() == "later" {
            opening.try_send(()).unwrap();
            released.lock().unwrap().recv().unwrap();
        }
        Ok(Box::new(Oracle::new()) as Box<dyn trustformers_plan::Backend>)
    };
    let first = ModelSpec::new("first", Source::from_path(folder.path()));
    let control = ModelControl::Allowed(crate::control::LoadDefaults::default());
    let server = Arc::new(ModelServer::new(vec![first]).unwrap().with_control(control, DRAIN_TIMEOUT));
    let loader = Loader::new(Box::new(open), &prometheus::Registry::new()).unwrap();
    server.start_loading(&Arc::new(loader));
    server.readiness().wait_for(|verdict| verdict.ok).await.unwrap();
    let path = folder.path().to_str().unwrap().to_owned();
    let asked = LoadModel { name: "later".into(), path, ..LoadModel::default() };
    let loading = tokio::spawn({
        let server = Arc::clone(&server);
        async move { server.load_model(asked).await }
    });
    is_opening.recv().await.unwrap();
    let later = UnloadModel { model: "later".into(), digest: None, revision: None };
    let unloading = tokio::spawn({
        let server = Arc::clone(&server);
        async move { server.unload_model(later).await }
    });
    while server.state_of("later").is_some() {
        tokio::task::yield_now().await;
    }
    release.send(()).unwrap();
    let error = loading.await.unwrap().unwrap_err();
    assert!(matches!(&error, ApiError::Conflict { message } if message.contains("later")), "{error:?}");
    assert!(error.to_string().contains("load it again"), "{error}");
    assert_eq!(unloading.await.unwrap().unwrap().state(), ModelState::Unloaded);
    assert!(server.generate(request(None)).await.is_ok(), "the other model was not touched");
}
