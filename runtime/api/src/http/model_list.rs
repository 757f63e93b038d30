//! `GET /v1/models` and `GET /v1/models/{model}`: the models and their states.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde_json::{Value, json};
use trustformers_proto::v1;

use crate::Api;
use crate::error::ApiError;

pub(crate) async fn models(State(api): State<Api>) -> Json<Value> {
    let models = api.inference.watch_models().borrow().clone();
    let list: Vec<Value> = models.iter().flat_map(|model| with_adapters(model, &models)).collect();
    Json(json!({"object": "list", "data": list}))
}

/// A model, and each of its adapters as OpenAI's clients find it in vLLM: a model of its own with a parent.
fn with_adapters(model: &v1::ModelStatus, models: &[v1::ModelStatus]) -> Vec<Value> {
    let adapters = model.adapters.iter().map(|adapter| adapter_json(model, adapter, models));
    std::iter::once(model_json(model)).chain(adapters).collect()
}

/// An adapter: what is true of its model, under its own names.
fn adapter_json(model: &v1::ModelStatus, adapter: &str, models: &[v1::ModelStatus]) -> Value {
    let mut value = model_json(model);
    value["id"] = json!(format!("{}:{adapter}", model.name));
    value["parent"] = json!(model.name);
    value["aliases"] = json!(adapter_names(model, adapter, models));
    value["slots"] = json!([]);
    value
}

/// Every name of an adapter: behind each of its model's, and its own where that can only mean this one.
fn adapter_names(model: &v1::ModelStatus, adapter: &str, models: &[v1::ModelStatus]) -> Vec<String> {
    let mut names: Vec<String> = model.names.iter().map(|name| format!("{name}:{adapter}")).collect();
    let has = |one: &&v1::ModelStatus| one.adapters.iter().any(|other| other == adapter);
    let is_model = models.iter().any(|one| one.names.iter().any(|name| name == adapter));
    if !is_model && models.iter().filter(has).count() == 1 {
        names.push(adapter.to_owned());
    }
    names
}

/// One model or adapter by any of its names, which may have slashes.
pub(crate) async fn model(
    State(api): State<Api>,
    asked: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let Path(asked) = asked.map_err(|error| ApiError::field("model", error.body_text()))?;
    let models = api.inference.watch_models().borrow().clone();
    let found = find(&models, &asked);
    found.map(Json).ok_or_else(|| ApiError::UnknownModel {
        choices: models.iter().map(|model| model.name.clone()).collect(),
        asked,
    })
}

fn find(models: &[v1::ModelStatus], asked: &str) -> Option<Value> {
    let is_asked = |name: &String| name == asked;
    if let Some(model) = models.iter().find(|model| model.name == asked || model.names.iter().any(is_asked)) {
        return Some(model_json(model));
    }
    models.iter().find_map(|model| {
        let is_named = |own: &&String| adapter_names(model, own, models).iter().any(is_asked);
        model.adapters.iter().find(is_named).map(|own| adapter_json(model, own, models))
    })
}

/// OpenAI's model object with what this server knows beyond it. `created` is the time since when the model is
/// in its state.
pub(crate) fn model_json(model: &v1::ModelStatus) -> Value {
    json!({
        "id": model.name,
        "object": "model",
        "created": model.since_unix_ms / 1000,
        "owned_by": "trustformers",
        "task": model.task,
        "state": state_word(model.state()),
        "reason": model.reason,
        "message": model.message,
        "revision": model.revision,
        "digest": model.digest,
        "device": model.device,
        "context_tokens": model.context_tokens,
        "embedding_dimensions": Some(model.embedding_dimensions).filter(|count| *count > 0),
        "loaded_bytes": model.loaded_bytes,
        "total_bytes": model.total_bytes,
        "slots": model.slots.iter().map(slot_json).collect::<Vec<_>>(),
    })
}

/// One version of a model.
fn slot_json(slot: &v1::ModelSlot) -> Value {
    json!({
        "role": role_word(slot.role()),
        "state": state_word(slot.state()),
        "revision": slot.revision,
        "digest": slot.digest,
        "reason": slot.reason,
        "message": slot.message,
        "loaded_bytes": slot.loaded_bytes,
        "total_bytes": slot.total_bytes,
        "bytes_per_second": slot.bytes_per_second,
        "eta_ms": slot.eta_ms,
        "memory_bytes": slot.memory_bytes,
    })
}

fn role_word(role: v1::SlotRole) -> &'static str {
    match role {
        v1::SlotRole::Unspecified => "unknown",
        v1::SlotRole::Current => "current",
        v1::SlotRole::Candidate => "candidate",
        v1::SlotRole::Previous => "previous",
        v1::SlotRole::RolledBack => "rolled_back",
    }
}

/// A state as it stands in JSON and in logs.
pub fn state_word(state: v1::ModelState) -> &'static str {
    match state {
        v1::ModelState::Unspecified => "unknown",
        v1::ModelState::Pending => "pending",
        v1::ModelState::Loading => "loading",
        v1::ModelState::Warming => "warming",
        v1::ModelState::Ready => "ready",
        v1::ModelState::Draining => "draining",
        v1::ModelState::Unloaded => "unloaded",
        v1::ModelState::Failed => "failed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Fake, Script};
    use crate::test_client;
    use axum::body::Body;
    use axum::http::{Request as HttpRequest, StatusCode};

    async fn get(path: &str) -> (StatusCode, Value) {
        let fake = Fake::with(Script::tokens(&[]));
        test_client::send(&fake, HttpRequest::get(path), Body::empty()).await.status_and_json()
    }

    #[tokio::test]
    async fn models_are_listed_with_state_digest_and_device() {
        for path in ["/v1/models", "/openai/v1/models"] {
            let (_, body) = get(path).await;
            assert_eq!(body["object"], "list");
            let model = &body["data"][0];
            assert_eq!((&model["id"], &model["state"]), (&json!("fake"), &json!("ready")));
            assert_eq!((&model["digest"], &model["device"]), (&json!("d1"), &json!("cpu")));
        }
    }

    #[test]
    fn an_adapter_is_listed_as_a_model_with_a_parent() {
        let model = |name: &str, adapters: &[&str]| v1::ModelStatus {
            name: format!("ns/{name}"),
            names: vec![format!("ns/{name}"), name.to_owned()],
            adapters: adapters.iter().map(|one| (*one).to_owned()).collect(),
            ..v1::ModelStatus::default()
        };
        let models = [model("a", &["sql", "tone"]), model("b", &["tone", "a"])];
        let list = with_adapters(&models[0], &models);
        let ids: Vec<_> = list.iter().map(|one| one["id"].as_str().unwrap()).collect();
        assert_eq!(ids, ["ns/a", "ns/a:sql", "ns/a:tone"]);
        assert!(list[0].get("parent").is_none());
        assert_eq!((&list[1]["parent"], &list[1]["object"]), (&json!("ns/a"), &json!("model")));
        assert_eq!(list[1]["aliases"], json!(["ns/a:sql", "a:sql", "sql"]));
        assert_eq!(list[2]["aliases"], json!(["ns/a:tone", "a:tone"]), "two models have one of this name");
        let found = |name: &str| find(&models, name).map(|one| one["id"].clone());
        assert_eq!(found("sql"), Some(json!("ns/a:sql")));
        assert_eq!((found("b:tone"), found("a")), (Some(json!("ns/b:tone")), Some(json!("ns/a"))));
        assert_eq!((found("tone"), found("a:other")), (None, None));
        let of_b = with_adapters(&models[1], &models);
        assert_eq!(of_b[2]["aliases"], json!(["ns/b:a", "b:a"]), "a model has this name");
    }

    #[tokio::test]
    async fn a_model_is_found_by_each_of_its_names_however_the_slash_is_written() {
        for name in ["fake", "ns/fake", "ns%2Ffake"] {
            let (status, body) = get(&format!("/v1/models/{name}")).await;
            assert_eq!(
                (status, &body["id"], &body["object"]),
                (StatusCode::OK, &json!("fake"), &json!("model"))
            );
        }
        let (status, body) = get("/v1/models/%ff").await;
        assert_eq!((status, &body["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("model")));
        let (status, body) = get("/v1/models/other").await;
        assert_eq!((status, &body["error"]["code"]), (StatusCode::NOT_FOUND, &json!("model_not_found")));
        assert_eq!((&body["error"]["param"], &body["error"]["choices"]), (&json!("model"), &json!(["fake"])));
    }
}
