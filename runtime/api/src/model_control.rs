//! Which models there are, while the server runs: `POST /v1/models/load`, `unload`, `swap` and `rollback`,
//! and the methods of gRPC's `ModelService`.
//!
//! Each answers when it is done: a load when the model is ready, an unload when its answers in flight have
//! ended and its memory is free, the others at once. A caller that leaves earlier does not undo them;
//! `GET /v1/models` shows how far they are, and the same request may be sent again. A pod of the operator
//! refuses all on its serving ports, because the operator decides what the pod serves.
//!
//! A browser sends a request for any page that its user visits, also to this machine. Such a request names
//! the page's origin and is refused: pages may ask models, and do not decide which there are.

mod adapters;

use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::http::header::ORIGIN;
use axum::{Json, Router, routing::post};
use serde_json::{Map, Value};
use trustformers_proto::{Task, v1};

use crate::error::ApiError;
use crate::http::model_json;
use crate::json_body::{found, object, take};
use crate::revision::MAX_REVISION_BYTES;
use crate::{Api, request_body};

pub use adapters::LoadAdapter;

/// The fields of a request to load.
pub(crate) const LOAD_FIELDS: &[&str] = &[
    "name",
    "path",
    "files",
    "sha256",
    "task",
    "revision",
    "device",
    "numerics",
    "kv_cache",
    "context_tokens",
    "max_batch_size",
    "max_queue",
    "batch_strategy",
    "max_wait_ms",
    "priority",
    "probe",
    "probes",
    "adapters",
];
const PROBE_FIELDS: &[&str] = &["prompt", "max_tokens", "text", "begins_with", "tokens_sha256"];
/// The fields of a request to unload.
pub(crate) const UNLOAD_FIELDS: &[&str] = &["model", "digest", "revision"];
/// The fields of a request to swap.
pub(crate) const SWAP_FIELDS: &[&str] = &["model", "digest", "revision", "from", "expected_digest"];
/// The fields of a request to roll back.
pub(crate) const ROLLBACK_FIELDS: &[&str] = &["model", "expected_digest"];
const LOAD_EXAMPLE: &str = r#"{"name": "smollm2", "path": "/models/smollm2.gguf"}"#;
const UNLOAD_EXAMPLE: &str = r#"{"model": "smollm2"}"#;
const SWAP_EXAMPLE: &str = r#"{"model": "smollm2", "from": "smollm2-v2"}"#;
const ROLLBACK_EXAMPLE: &str = r#"{"model": "smollm2"}"#;
/// Most probes of one load: each takes up to a minute on a slow CPU.
const MAX_PROBES: usize = 32;
/// The longest name of a model that can be loaded: names are repeated in answers, logs and metrics. A bare
/// name of Kubernetes has at most 253 characters.
const MAX_NAME_CHARS: usize = 256;

/// A model to load. What is left out is the server's default.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LoadModel {
    /// The name that callers will use.
    pub name: String,
    /// A file or a folder on the server's machine, or a `file://` URI.
    pub path: String,
    /// Patterns that pick the model's files in the folder.
    pub files: Vec<String>,
    /// The digest that the files must have, 64 hex digits.
    pub sha256: Option<String>,
    /// The task that the files must serve.
    pub task: Option<Task>,
    /// The name of this version; with one, it may be loaded beside another version of the model.
    pub revision: Option<String>,
    /// Where it runs: `auto`, `cpu`.
    pub device: Option<String>,
    /// `fast` or `exact`.
    pub numerics: Option<String>,
    /// `auto`, `f32`, `f16` or `bf16`.
    pub kv_cache: Option<String>,
    /// Longest prompt plus answer, in tokens.
    pub context_tokens: Option<u32>,
    /// Sequences or texts that are computed together.
    pub max_batch_size: Option<u32>,
    /// Requests that may wait.
    pub max_queue: Option<u32>,
    /// `time`, `size`, `dynamic` or `priority`.
    pub batch_strategy: Option<String>,
    /// Longest time that a free device waits for more texts, in milliseconds.
    pub max_wait_ms: Option<u32>,
    /// Whether priority classes count.
    pub priority: Option<bool>,
    /// What it must answer before it may serve.
    pub probes: Vec<Probe>,
    /// Adapters that requests can choose.
    pub adapters: Vec<LoadAdapter>,
}

/// A prompt whose greedy answer is known.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Probe {
    /// The prompt.
    pub prompt: String,
    /// Tokens of the answer.
    pub max_tokens: Option<u32>,
    /// The text of the answer.
    pub text: Option<String>,
    /// How the answer begins.
    pub begins_with: Option<String>,
    /// sha256 of the ids of its tokens in decimal with one space between two.
    pub tokens_sha256: Option<String>,
}

/// A model to unload, or one of its versions.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct UnloadModel {
    /// One of the model's names.
    pub model: String,
    /// Only the version of this digest.
    pub digest: Option<String>,
    /// Only the version of this revision.
    pub revision: Option<String>,
}

/// A version that is to answer for a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SwapModel {
    /// One of the model's names.
    pub model: String,
    /// The version.
    pub to: SwapSource,
    /// The digest of the version that must answer now; none: any.
    pub expected_digest: Option<String>,
}

/// Which version is to answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SwapSource {
    /// The version of this digest.
    Digest(String),
    /// The version of this revision.
    Revision(String),
    /// The model of this name, which becomes a version.
    OtherModel(String),
}

/// A model whose last swap is to be undone.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RollbackModel {
    /// One of the model's names.
    pub model: String,
    /// The digest of the version that must answer now; none: any.
    pub expected_digest: Option<String>,
}

/// A text or a number that is given; empty texts and zeros of messages are not.
fn given(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

fn positive(number: u32) -> Option<u32> {
    Some(number).filter(|number| *number > 0)
}

fn text(object: &Map<String, Value>, field: &str) -> Result<Option<String>, ApiError> {
    take(object, field, "a string", |value| value.as_str().map(str::to_owned))
}

fn number(object: &Map<String, Value>, field: &str) -> Result<Option<u32>, ApiError> {
    take(object, field, "a whole number from 1 on", |value| {
        value.as_u64().and_then(|number| u32::try_from(number).ok()).filter(|number| *number > 0)
    })
}

impl LoadModel {
    fn from_json(bytes: &[u8]) -> Result<Self, ApiError> {
        let object = object(bytes, LOAD_FIELDS, LOAD_EXAMPLE)?;
        let request = Self {
            name: text(&object, "name")?.unwrap_or_default(),
            path: text(&object, "path")?.unwrap_or_default(),
            files: files(&object)?,
            sha256: text(&object, "sha256")?,
            task: text(&object, "task")?.map(|word| task(&word)).transpose()?,
            revision: text(&object, "revision")?,
            device: text(&object, "device")?,
            numerics: text(&object, "numerics")?,
            kv_cache: text(&object, "kv_cache")?,
            context_tokens: number(&object, "context_tokens")?,
            max_batch_size: number(&object, "max_batch_size")?,
            max_queue: number(&object, "max_queue")?,
            batch_strategy: text(&object, "batch_strategy")?,
            max_wait_ms: number(&object, "max_wait_ms")?,
            priority: take(&object, "priority", "true or false", Value::as_bool)?,
            probes: probes(&object)?,
            adapters: adapters::of_json(&object)?,
        };
        request.check()
    }

    /// The request in a message, where empty texts and zeros are left out.
    pub(crate) fn from_proto(message: v1::LoadModelRequest) -> Result<Self, ApiError> {
        let probe = |probe: v1::GoldenProbe| Probe {
            prompt: probe.prompt,
            max_tokens: positive(probe.max_tokens),
            text: given(probe.text),
            begins_with: given(probe.begins_with),
            tokens_sha256: given(probe.tokens_sha256),
        };
        let probes = message.probe.into_iter().chain(message.probes).map(probe).collect();
        let request = Self {
            name: message.name,
            path: message.path,
            files: message.files,
            sha256: given(message.sha256),
            task: given(message.task).map(|word| task(&word)).transpose()?,
            revision: given(message.revision),
            device: given(message.device),
            numerics: given(message.numerics),
            kv_cache: given(message.kv_cache),
            context_tokens: positive(message.context_tokens),
            max_batch_size: positive(message.max_batch_size),
            max_queue: positive(message.max_queue),
            batch_strategy: given(message.batch_strategy),
            max_wait_ms: positive(message.max_wait_ms),
            priority: message.priority,
            probes,
            adapters: adapters::of_proto(message.adapters),
        };
        request.check()
    }

    fn check(self) -> Result<Self, ApiError> {
        if self.name.is_empty() {
            return Err(ApiError::field("name", "is missing: give the name that callers will use"));
        }
        if self.name.chars().count() > MAX_NAME_CHARS || self.name.chars().any(char::is_control) {
            let why = format!("is no name: give at most {MAX_NAME_CHARS} characters, none of them invisible");
            return Err(ApiError::field("name", why));
        }
        if self.path.is_empty() {
            let why = "is missing: give a .gguf file of the server's machine, or a folder with one or with a \
                       checkpoint";
            return Err(ApiError::field("path", why));
        }
        let revision = self.revision.as_deref().unwrap_or_default();
        if revision.len() > MAX_REVISION_BYTES || !revision.bytes().all(|byte| byte.is_ascii_graphic()) {
            let why = format!(
                "is no name of a revision: give at most {MAX_REVISION_BYTES} visible ASCII characters, which a \
                 header can carry"
            );
            return Err(ApiError::field("revision", why));
        }
        if self.probes.len() > MAX_PROBES {
            let why = format!("{} are too many: give at most {MAX_PROBES}", self.probes.len());
            return Err(ApiError::field("probes", why));
        }
        adapters::check(&self.adapters)?;
        Ok(self)
    }
}

impl UnloadModel {
    fn from_json(bytes: &[u8]) -> Result<Self, ApiError> {
        let object = object(bytes, UNLOAD_FIELDS, UNLOAD_EXAMPLE)?;
        Ok(Self {
            model: model_of(&object)?,
            digest: text(&object, "digest")?,
            revision: text(&object, "revision")?,
        })
    }

    pub(crate) fn from_proto(message: v1::UnloadModelRequest) -> Result<Self, ApiError> {
        let v1::UnloadModelRequest { model, digest, revision } = message;
        Ok(Self { model: check_model(model)?, digest: given(digest), revision: given(revision) })
    }
}

impl SwapModel {
    fn from_json(bytes: &[u8]) -> Result<Self, ApiError> {
        let object = object(bytes, SWAP_FIELDS, SWAP_EXAMPLE)?;
        let to = [text(&object, "digest")?, text(&object, "revision")?, text(&object, "from")?];
        let expected_digest = text(&object, "expected_digest")?;
        Ok(Self { model: model_of(&object)?, to: SwapSource::only(to)?, expected_digest })
    }

    pub(crate) fn from_proto(message: v1::SwapModelRequest) -> Result<Self, ApiError> {
        let v1::SwapModelRequest { model, digest, revision, from, expected_digest } = message;
        let to = SwapSource::only([given(digest), given(revision), given(from)])?;
        Ok(Self { model: check_model(model)?, to, expected_digest: given(expected_digest) })
    }
}

impl SwapSource {
    /// One of digest, revision and name.
    fn only(given: [Option<String>; 3]) -> Result<Self, ApiError> {
        match given {
            [Some(digest), None, None] => Ok(Self::Digest(digest)),
            [None, Some(revision), None] => Ok(Self::Revision(revision)),
            [None, None, Some(name)] => Ok(Self::OtherModel(name)),
            _ => Err(ApiError::field(
                "from",
                "give one of digest, revision and from: the version that is to answer",
            )),
        }
    }
}

impl RollbackModel {
    fn from_json(bytes: &[u8]) -> Result<Self, ApiError> {
        let object = object(bytes, ROLLBACK_FIELDS, ROLLBACK_EXAMPLE)?;
        Ok(Self { model: model_of(&object)?, expected_digest: text(&object, "expected_digest")? })
    }

    pub(crate) fn from_proto(message: v1::RollbackModelRequest) -> Result<Self, ApiError> {
        let v1::RollbackModelRequest { model, expected_digest } = message;
        Ok(Self { model: check_model(model)?, expected_digest: given(expected_digest) })
    }
}

/// That of `probe`, and those of `probes`.
fn probes(load: &Map<String, Value>) -> Result<Vec<Probe>, ApiError> {
    let one = take(load, "probe", "an object", |value| value.as_object().cloned())?;
    let list = take(load, "probes", "a list of objects", |value| value.as_array().cloned())?;
    let mut probes = Vec::new();
    if let Some(object) = one {
        probes.push(probe("probe", &object)?);
    }
    for (index, value) in list.unwrap_or_default().iter().enumerate() {
        let path = format!("probes[{index}]");
        let object = value.as_object().ok_or_else(|| {
            ApiError::field(&path, format!("expected an object with a prompt, found {}", found(value)))
        })?;
        probes.push(probe(&path, object)?);
    }
    Ok(probes)
}

fn probe(path: &str, object: &Map<String, Value>) -> Result<Probe, ApiError> {
    if let Some(field) = object.keys().find(|field| !PROBE_FIELDS.contains(&field.as_str())) {
        let why = format!("there is no such field; there are {}", PROBE_FIELDS.join(", "));
        return Err(ApiError::field(&format!("{path}.{field}"), why));
    }
    Ok(Probe {
        prompt: text(object, "prompt")?.unwrap_or_default(),
        max_tokens: number(object, "max_tokens")?,
        text: text(object, "text")?,
        begins_with: text(object, "begins_with")?,
        tokens_sha256: text(object, "tokens_sha256")?,
    })
}

fn task(word: &str) -> Result<Task, ApiError> {
    word.parse::<Task>().map_err(|error| ApiError::field("task", error.to_string()))
}

fn files(object: &Map<String, Value>) -> Result<Vec<String>, ApiError> {
    let list = take(object, "files", "a list of patterns", |value| value.as_array().cloned())?;
    let pattern = |(index, value): (usize, &Value)| {
        value.as_str().map(str::to_owned).ok_or_else(|| {
            let why = format!("expected a pattern such as \"*.gguf\", found {}", found(value));
            ApiError::field(&format!("files[{index}]"), why)
        })
    };
    list.unwrap_or_default().iter().enumerate().map(pattern).collect()
}

/// The name in a request about a model that is loaded.
fn model_of(object: &Map<String, Value>) -> Result<String, ApiError> {
    check_model(text(object, "model")?.unwrap_or_default())
}

/// Refuses what a browser sends for a page.
pub(crate) fn check_no_browser(headers: &HeaderMap) -> Result<(), ApiError> {
    if headers.contains_key(ORIGIN) {
        let message =
            "pages in browsers cannot load, swap or unload models; use a client without the header origin";
        return Err(ApiError::Forbidden { message: message.to_owned() });
    }
    Ok(())
}

/// A model is never changed by default, even where there is only one.
fn check_model(name: String) -> Result<String, ApiError> {
    if name.is_empty() {
        return Err(ApiError::field("model", "is missing: give the name of the model"));
    }
    Ok(name)
}

/// The routes.
pub(crate) fn router() -> Router<Api> {
    Router::new()
        .route("/v1/models/load", post(load))
        .route("/v1/models/unload", post(unload))
        .route("/v1/models/swap", post(swap))
        .route("/v1/models/rollback", post(rollback))
}

/// The request in a body, unless a page sent it.
async fn asked<T: Send + 'static>(
    api: &Api,
    request: Request,
    read: fn(&[u8]) -> Result<T, ApiError>,
) -> Result<T, ApiError> {
    let (parts, body) = request.into_parts();
    check_no_browser(&parts.headers)?;
    let bytes = request_body::read(&parts, body).await?;
    api.parse(bytes, read).await
}

async fn load(State(api): State<Api>, request: Request) -> Result<Json<Value>, ApiError> {
    let asked = asked(&api, request, LoadModel::from_json).await?;
    Ok(Json(model_json(&api.until_closing(api.inference.load_model(asked)).await?)))
}

async fn unload(State(api): State<Api>, request: Request) -> Result<Json<Value>, ApiError> {
    let asked = asked(&api, request, UnloadModel::from_json).await?;
    Ok(Json(model_json(&api.until_closing(api.inference.unload_model(asked)).await?)))
}

async fn swap(State(api): State<Api>, request: Request) -> Result<Json<Value>, ApiError> {
    let asked = asked(&api, request, SwapModel::from_json).await?;
    Ok(Json(model_json(&api.until_closing(api.inference.swap_model(asked)).await?)))
}

async fn rollback(State(api): State<Api>, request: Request) -> Result<Json<Value>, ApiError> {
    let asked = asked(&api, request, RollbackModel::from_json).await?;
    Ok(Json(model_json(&api.until_closing(api.inference.rollback_model(asked)).await?)))
}

impl Api {
    /// Waits for a change of the models. The wait for it must not hold up the end of the server.
    pub(crate) async fn until_closing(
        &self,
        change: impl Future<Output = Result<v1::ModelStatus, ApiError>>,
    ) -> Result<v1::ModelStatus, ApiError> {
        tokio::select! {
            changed = change => changed,
            () = self.closing.cancelled() => Err(ending()),
        }
    }
}

/// Seconds after which another server, or this one started again, may answer.
const ENDING_RETRY_AFTER_S: u32 = 1;

fn ending() -> ApiError {
    let message = "the server is ending".to_owned();
    ApiError::Unavailable { message, retry_after_s: Some(ENDING_RETRY_AFTER_S) }
}

/// The refusal of a server whose models do not change while it runs.
pub(crate) fn not_changed_here() -> ApiError {
    ApiError::Forbidden {
        message: "this server does not load, swap or unload models while it runs".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Fake, Script};
    use crate::test_client;
    use axum::http::{Request as HttpRequest, StatusCode};
    use serde_json::json;

    async fn post(fake: &Fake, path: &str, body: &str) -> (StatusCode, Value) {
        test_client::send(fake, HttpRequest::post(path), body.to_owned()).await.status_and_json()
    }

    fn adapter() -> LoadAdapter {
        LoadAdapter { name: "sql".into(), path: "/s".into(), sha256: Some("ef".into()) }
    }

    /// A request with every field.
    fn load_message() -> v1::LoadModelRequest {
        v1::LoadModelRequest {
            name: "a".into(),
            path: "/m".into(),
            files: vec!["*.gguf".into()],
            sha256: "ab".into(),
            task: "embed".into(),
            device: "cpu".into(),
            numerics: "exact".into(),
            context_tokens: 64,
            max_batch_size: 4,
            revision: "r2".into(),
            kv_cache: "f16".into(),
            max_queue: 5,
            batch_strategy: "size".into(),
            max_wait_ms: 6,
            priority: Some(true),
            probe: Some(v1::GoldenProbe {
                prompt: "p".into(),
                max_tokens: 7,
                text: "t".into(),
                tokens_sha256: "cd".into(),
                ..v1::GoldenProbe::default()
            }),
            probes: vec![v1::GoldenProbe {
                prompt: "q".into(),
                begins_with: "u".into(),
                ..v1::GoldenProbe::default()
            }],
            adapters: vec![v1::AdapterFiles { name: "sql".into(), path: "/s".into(), sha256: "ef".into() }],
        }
    }

    #[tokio::test]
    async fn every_field_of_a_load_reaches_the_server() {
        let fake = Fake::with(Script::tokens(&[]));
        let body = json!({
            "name": "a", "path": "/m", "files": ["*.gguf"], "sha256": "ab", "task": "embed",
            "device": "cpu", "numerics": "exact", "context_tokens": 64, "max_batch_size": 4,
            "revision": "r2", "kv_cache": "f16", "max_queue": 5, "batch_strategy": "size", "max_wait_ms": 6,
            "priority": true,
            "probe": {"prompt": "p", "max_tokens": 7, "text": "t", "tokens_sha256": "cd"},
            "probes": [{"prompt": "q", "begins_with": "u"}],
            "adapters": [{"name": "sql", "path": "/s", "sha256": "ef"}],
        });
        let (status, answer) = post(&fake, "/v1/models/load", &body.to_string()).await;
        assert_eq!((status, &answer["id"], &answer["state"]), (StatusCode::OK, &json!("a"), &json!("ready")));
        let wanted = LoadModel {
            name: "a".into(),
            path: "/m".into(),
            files: vec!["*.gguf".into()],
            sha256: Some("ab".into()),
            task: Some(Task::Embed),
            device: Some("cpu".into()),
            numerics: Some("exact".into()),
            context_tokens: Some(64),
            max_batch_size: Some(4),
            revision: Some("r2".into()),
            kv_cache: Some("f16".into()),
            max_queue: Some(5),
            batch_strategy: Some("size".into()),
            max_wait_ms: Some(6),
            priority: Some(true),
            probes: vec![
                Probe {
                    prompt: "p".into(),
                    max_tokens: Some(7),
                    text: Some("t".into()),
                    begins_with: None,
                    tokens_sha256: Some("cd".into()),
                },
                Probe { prompt: "q".into(), begins_with: Some("u".into()), ..Probe::default() },
            ],
            adapters: vec![adapter()],
        };
        assert_eq!(fake.last_load(), wanted);
        assert_eq!(
            LoadModel::from_proto(load_message()).unwrap(),
            wanted,
            "both protocols have the same fields"
        );
    }

    #[tokio::test]
    async fn an_unload_names_its_model_and_answers_with_the_last_state() {
        let fake = Fake::with(Script::tokens(&[]));
        let (status, answer) = post(&fake, "/v1/models/unload", r#"{"model": "fake"}"#).await;
        assert_eq!(
            (status, &answer["id"], &answer["state"]),
            (StatusCode::OK, &json!("fake"), &json!("unloaded"))
        );
        let (status, answer) = post(&fake, "/v1/models/unload", r#"{"model": "other"}"#).await;
        assert_eq!((status, &answer["error"]["type"]), (StatusCode::NOT_FOUND, &json!("unknown_model")));
    }

    #[tokio::test]
    async fn a_swap_and_a_rollback_name_the_version_and_what_they_expect() {
        let fake = Fake::with(Script::tokens(&[]));
        let body = r#"{"model": "fake", "revision": "r2", "expected_digest": "d1"}"#;
        let (status, answer) = post(&fake, "/v1/models/swap", body).await;
        assert_eq!((status, &answer["id"]), (StatusCode::OK, &json!("fake")));
        let revision = SwapSource::Revision("r2".into());
        let wanted = SwapModel { model: "fake".into(), to: revision, expected_digest: Some("d1".into()) };
        assert_eq!(fake.last_change(), format!("{wanted:?}"));
        let (status, _) =
            post(&fake, "/v1/models/rollback", r#"{"model": "fake", "expected_digest": "d2"}"#).await;
        assert_eq!(status, StatusCode::OK);
        let wanted = RollbackModel { model: "fake".into(), expected_digest: Some("d2".into()) };
        assert_eq!(fake.last_change(), format!("{wanted:?}"));
        let message = v1::SwapModelRequest { model: "m".into(), from: "n".into(), ..Default::default() };
        let read = SwapModel::from_proto(message).unwrap();
        assert_eq!((read.to, read.expected_digest), (SwapSource::OtherModel("n".into()), None));
    }

    #[tokio::test]
    async fn wrong_fields_are_refused_by_name() {
        let fake = Fake::with(Script::tokens(&[]));
        for (path, body, field) in [
            ("/v1/models/load", "{}", "name"),
            ("/v1/models/load", r#"{"name": "a"}"#, "path"),
            ("/v1/models/load", r#"{"name": "a\u0007", "path": "/m"}"#, "name"),
            ("/v1/models/load", r#"{"name": "a", "path": "/m", "contextTokens": 1}"#, "contextTokens"),
            ("/v1/models/load", r#"{"name": "a", "path": "/m", "context_tokens": 0}"#, "context_tokens"),
            ("/v1/models/load", r#"{"name": "a", "path": "/m", "task": "dance"}"#, "task"),
            ("/v1/models/load", r#"{"name": "a", "path": "/m", "files": ["a", 1]}"#, "files[1]"),
            ("/v1/models/unload", "{}", "model"),
            ("/v1/models/unload", r#"{"name": "a"}"#, "name"),
            ("/v1/models/load", r#"{"name": "a", "path": "/m", "revision": "a b"}"#, "revision"),
            ("/v1/models/load", r#"{"name": "a", "path": "/m", "probe": {"promt": "p"}}"#, "probe.promt"),
            ("/v1/models/swap", r#"{"model": "a"}"#, "from"),
            ("/v1/models/swap", r#"{"model": "a", "digest": "d", "from": "b"}"#, "from"),
            ("/v1/models/rollback", "{}", "model"),
        ] {
            let (status, answer) = post(&fake, path, body).await;
            assert_eq!(
                (status, &answer["error"]["field"]),
                (StatusCode::BAD_REQUEST, &json!(field)),
                "{body}"
            );
        }
    }

    #[tokio::test]
    async fn a_page_in_a_browser_does_not_decide_which_models_there_are() {
        let fake = Fake::with(Script::tokens(&[]));
        for (path, body) in [
            ("/v1/models/load", r#"{"name": "a", "path": "/m"}"#),
            ("/v1/models/unload", r#"{"model": "fake"}"#),
        ] {
            let request = HttpRequest::post(path).header(ORIGIN, "https://a.example");
            let reply = test_client::send(&fake, request, body).await;
            assert_eq!(reply.status, StatusCode::FORBIDDEN, "{path}");
        }
        assert_eq!(fake.running(), 0);
    }

    #[tokio::test]
    async fn a_wait_ends_with_the_server() {
        let fake = Fake::with(Script::tokens(&[]).then_hangs());
        let api = fake.api();
        let asked = LoadModel { name: "a".into(), path: "/m".into(), ..LoadModel::default() };
        let waiting = tokio::spawn({
            let api = api.clone();
            async move { api.until_closing(api.inference.load_model(asked)).await }
        });
        fake.until_running(1).await;
        api.closing.cancel();
        assert!(matches!(waiting.await.unwrap(), Err(ApiError::Unavailable { retry_after_s: Some(_), .. })));
    }
}
