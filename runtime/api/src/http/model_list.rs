//! `GET /v1/models`: the models and their states.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};
use trustformers_proto::v1;

use crate::Api;

pub(crate) async fn models(State(api): State<Api>) -> Json<Value> {
    let models = api.inference.watch_models().borrow().clone();
    let list: Vec<Value> = models.iter().map(model_json).collect();
    Json(json!({"object": "list", "data": list}))
}

/// OpenAI's model object with what we know beyond it. `created` is the time since when the model is in its
/// state.
fn model_json(model: &v1::ModelStatus) -> Value {
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
    })
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
    use axum::body::Body;
    use axum::http::Request as HttpRequest;
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    #[tokio::test]
    async fn models_are_listed_with_state_digest_and_device() {
        let fake = Fake::with(Script::tokens(&[]));
        let request = HttpRequest::get("/v1/models").body(Body::empty()).unwrap();
        let response = crate::http::router(fake.api()).oneshot(request).await.unwrap();
        let body: Value =
            serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap();
        assert_eq!(body["object"], "list");
        let model = &body["data"][0];
        assert_eq!((&model["id"], &model["state"]), (&json!("fake"), &json!("ready")));
        assert_eq!((&model["digest"], &model["device"]), (&json!("d1"), &json!("cpu")));
    }
}
