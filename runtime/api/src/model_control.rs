//! Loading and unloading models while the server runs: `POST /v1/models/load` and `POST /v1/models/unload`,
//! and gRPC's `LoadModel` and `UnloadModel`.
//!
//! Both answer when it is done: a load when the model is ready, an unload when its answers in flight have
//! ended and its memory is free. A caller that leaves earlier does not undo them; `GET /v1/models` shows how
//! far they are. A pod of the operator refuses both, because the operator decides what the pod serves.
//!
//! A browser sends a request for any page that its user visits, also to this machine. Such a request names
//! the page's origin and is refused: pages may ask models, and do not decide which there are.

use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::http::header::ORIGIN;
use axum::{Json, Router, routing::post};
use serde_json::{Map, Value};
use trustformers_proto::{Task, v1};

use crate::error::ApiError;
use crate::http::model_json;
use crate::json_body::{found, object, take};
use crate::{Api, request_body};

/// The fields of a request to load.
pub(crate) const LOAD_FIELDS: &[&str] =
    &["name", "path", "files", "sha256", "task", "device", "numerics", "context_tokens", "max_batch_size"];
const LOAD_EXAMPLE: &str = r#"{"name": "smollm2", "path": "/models/smollm2.gguf"}"#;
const UNLOAD_EXAMPLE: &str = r#"{"model": "smollm2"}"#;
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
    /// Where it runs: `auto`, `cpu`.
    pub device: Option<String>,
    /// `fast` or `exact`.
    pub numerics: Option<String>,
    /// Longest prompt plus answer, in tokens.
    pub context_tokens: Option<u32>,
    /// Sequences or texts that are computed together.
    pub max_batch_size: Option<u32>,
}

impl LoadModel {
    fn from_json(bytes: &[u8]) -> Result<Self, ApiError> {
        let object = object(bytes, LOAD_FIELDS, LOAD_EXAMPLE)?;
        let text = |field: &str| take(&object, field, "a string", |value| value.as_str().map(str::to_owned));
        let number = |field: &str| {
            take(&object, field, "a whole number from 1 on", |value| {
                value.as_u64().and_then(|number| u32::try_from(number).ok()).filter(|number| *number > 0)
            })
        };
        let request = Self {
            name: text("name")?.unwrap_or_default(),
            path: text("path")?.unwrap_or_default(),
            files: files(&object)?,
            sha256: text("sha256")?,
            task: text("task")?.map(|word| task(&word)).transpose()?,
            device: text("device")?,
            numerics: text("numerics")?,
            context_tokens: number("context_tokens")?,
            max_batch_size: number("max_batch_size")?,
        };
        request.check()
    }

    /// The request in a message, where empty texts and zeros are left out.
    pub(crate) fn from_proto(message: v1::LoadModelRequest) -> Result<Self, ApiError> {
        let v1::LoadModelRequest {
            path,
            files,
            sha256,
            name,
            task: task_word,
            device,
            numerics,
            context_tokens,
            max_batch_size,
        } = message;
        let given = |text: String| Some(text).filter(|text| !text.is_empty());
        let positive = |number: u32| Some(number).filter(|number| *number > 0);
        let request = Self {
            name,
            path,
            files,
            sha256: given(sha256),
            task: given(task_word).map(|word| task(&word)).transpose()?,
            device: given(device),
            numerics: given(numerics),
            context_tokens: positive(context_tokens),
            max_batch_size: positive(max_batch_size),
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
        Ok(self)
    }
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

/// The name in a request to unload.
fn model_of(bytes: &[u8]) -> Result<String, ApiError> {
    let object = object(bytes, &["model"], UNLOAD_EXAMPLE)?;
    let name = take(&object, "model", "a string", |value| value.as_str().map(str::to_owned))?;
    check_model(name.unwrap_or_default())
}

/// Refuses what a browser sends for a page.
pub(crate) fn check_no_browser(headers: &HeaderMap) -> Result<(), ApiError> {
    if headers.contains_key(ORIGIN) {
        let message =
            "pages in browsers cannot load or unload models; use a client without the header origin";
        return Err(ApiError::Forbidden { message: message.to_owned() });
    }
    Ok(())
}

/// A model is never unloaded by default, even where there is only one.
pub(crate) fn check_model(name: String) -> Result<String, ApiError> {
    if name.is_empty() {
        return Err(ApiError::field("model", "is missing: give the name of the model to unload"));
    }
    Ok(name)
}

/// The routes.
pub(crate) fn router() -> Router<Api> {
    Router::new().route("/v1/models/load", post(load)).route("/v1/models/unload", post(unload))
}

async fn load(State(api): State<Api>, request: Request) -> Result<Json<Value>, ApiError> {
    let (parts, body) = request.into_parts();
    check_no_browser(&parts.headers)?;
    let bytes = request_body::read(&parts, body).await?;
    let asked = api.parse(bytes, LoadModel::from_json).await?;
    Ok(Json(model_json(&api.load_until_closing(asked).await?)))
}

async fn unload(State(api): State<Api>, request: Request) -> Result<Json<Value>, ApiError> {
    let (parts, body) = request.into_parts();
    check_no_browser(&parts.headers)?;
    let bytes = request_body::read(&parts, body).await?;
    let model = api.parse(bytes, model_of).await?;
    Ok(Json(model_json(&api.unload_until_closing(model).await?)))
}

impl Api {
    /// Loads a model. The wait for it must not hold up the end of the server.
    pub(crate) async fn load_until_closing(&self, asked: LoadModel) -> Result<v1::ModelStatus, ApiError> {
        tokio::select! {
            loaded = self.inference.load_model(asked) => loaded,
            () = self.closing.cancelled() => Err(ending()),
        }
    }

    /// Unloads a model. The wait for it must not hold up the end of the server.
    pub(crate) async fn unload_until_closing(&self, model: String) -> Result<v1::ModelStatus, ApiError> {
        tokio::select! {
            unloaded = self.inference.unload_model(model) => unloaded,
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
    ApiError::Forbidden { message: "this server does not load or unload models while it runs".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Fake, Script};
    use axum::body::Body;
    use axum::http::{Request as HttpRequest, StatusCode};
    use http_body_util::BodyExt;
    use serde_json::json;
    use tower::ServiceExt;

    async fn post(fake: &Fake, path: &str, body: &str) -> (StatusCode, Value) {
        let request = HttpRequest::post(path).body(Body::from(body.to_owned())).unwrap();
        let response = crate::http::router(fake.api()).oneshot(request).await.unwrap();
        let status = response.status();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&bytes).unwrap())
    }

    #[tokio::test]
    async fn every_field_of_a_load_reaches_the_server() {
        let fake = Fake::with(Script::tokens(&[]));
        let body = json!({
            "name": "a", "path": "/m", "files": ["*.gguf"], "sha256": "ab", "task": "embed",
            "device": "cpu", "numerics": "exact", "context_tokens": 64, "max_batch_size": 4,
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
        };
        assert_eq!(fake.last_load(), wanted);
        let message = v1::LoadModelRequest {
            name: "a".into(),
            path: "/m".into(),
            files: vec!["*.gguf".into()],
            sha256: "ab".into(),
            task: "embed".into(),
            device: "cpu".into(),
            numerics: "exact".into(),
            context_tokens: 64,
            max_batch_size: 4,
        };
        assert_eq!(LoadModel::from_proto(message).unwrap(), wanted, "both protocols have the same fields");
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
            let request = HttpRequest::post(path).header(ORIGIN, "https://a.example").body(Body::from(body));
            let response = crate::http::router(fake.api()).oneshot(request.unwrap()).await.unwrap();
            assert_eq!(response.status(), StatusCode::FORBIDDEN, "{path}");
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
            async move { api.load_until_closing(asked).await }
        });
        fake.until_running(1).await;
        api.closing.cancel();
        assert!(matches!(waiting.await.unwrap(), Err(ApiError::Unavailable { retry_after_s: Some(_), .. })));
    }
}
