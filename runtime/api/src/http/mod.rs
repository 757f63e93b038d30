//! The HTTP routes over one [`Api`].
//!
//! Each protocol has a module of its own with a `router`, which is merged here.

use axum::Router;
use axum::http::{Method, Uri};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::{get, post};

use crate::error::ApiError;
use crate::{
    Api, answer_end, anthropic, classify, embed, encoding, health, openai, openapi, rerank, responses,
    websocket,
};

pub(crate) mod generate;
mod layer;
mod model_list;
#[cfg(test)]
mod refusals;

pub use layer::REQUEST_ID;
pub(crate) use layer::{log_refusal, name_request, request_id};
pub(crate) use model_list::model_json;
pub use model_list::state_word;

/// The routes over `api`. Unknown routes and wrong methods are answered in the words of the protocol that the
/// path belongs to. The program that owns the registry of metrics merges `/metrics` into them.
pub fn router(api: Api) -> Router {
    let health = health::router(api.inference.clone());
    let load = api.gateway_load.clone();
    routes()
        .with_state(api.clone())
        .merge(health)
        .method_not_allowed_fallback(async |method: Method, uri: Uri| ApiError::MethodNotAllowed {
            method: method.to_string(),
            path: uri.path().to_owned(),
        })
        .fallback(async |uri: Uri| ApiError::UnknownRoute { path: uri.path().to_owned() })
        .layer(from_fn_with_state(api.clone(), encoding::decode_body))
        .layer(from_fn(layer::identify_and_shape))
        .layer(from_fn_with_state(api, encoding::compress_answer))
        .layer(from_fn_with_state(load, answer_end::report_end))
}

/// The routes about models alone, for a port on which they are changed.
pub fn model_router(api: Api) -> Router {
    Router::new()
        .route("/v1/models", get(model_list::models))
        .route("/v1/models/{*model}", get(model_list::model))
        .merge(crate::model_control::router())
        .with_state(api)
        .fallback(async |uri: Uri| ApiError::UnknownRoute { path: uri.path().to_owned() })
        .layer(from_fn(layer::identify_and_shape))
}

/// The routes that have a state, without the layers of [`router`].
pub(crate) fn routes() -> Router<Api> {
    Router::new()
        .merge(websocket::router())
        .route("/v1/generate", post(generate::generate))
        .route("/v1/generate/stream", post(generate::generate_stream))
        .route("/v1/embeddings", post(embed::embeddings))
        .route("/openai/v1/embeddings", post(embed::embeddings))
        .route("/v1/classify", post(classify::classify))
        .route("/v1/rerank", post(rerank::rerank))
        .route("/v1/models", get(model_list::models))
        .route("/v1/models/{*model}", get(model_list::model))
        .route("/openai/v1/models", get(model_list::models))
        .route("/openai/v1/models/{*model}", get(model_list::model))
        .merge(openai::router())
        .merge(responses::router())
        .merge(anthropic::router())
        .merge(crate::kserve::http::router())
        .merge(crate::model_control::router())
        .merge(openapi::router())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Fake, Script};
    use crate::surfaces::{Endpoint, HttpMethod, SURFACES, http_surface};
    use axum::body::Body;
    use axum::http::{Request as HttpRequest, StatusCode};
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    async fn send(fake: &Fake, method: &str, path: &str, body: &'static str) -> axum::response::Response {
        let request = HttpRequest::builder().method(method).uri(path).body(Body::from(body)).unwrap();
        router(fake.api()).oneshot(request).await.unwrap()
    }

    async fn json(response: axum::response::Response) -> serde_json::Value {
        serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap()
    }

    #[tokio::test]
    async fn unknown_routes_and_methods_answer_in_the_words_of_their_protocol() {
        let fake = Fake::with(Script::tokens(&["a"]));
        let response = send(&fake, "POST", "/v1/generat", "{}").await;
        assert_eq!(response.status(), StatusCode::NOT_FOUND);
        let body = json(response).await;
        assert!(body["error"]["message"].as_str().unwrap().contains("/v1/generate"), "{body}");
        let response = send(&fake, "GET", "/v1/generate", "").await;
        assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED);
        assert_eq!(json(response).await["error"]["type"], "method_not_allowed");
        let body = json(send(&fake, "GET", "/v1/embeddings", "").await).await;
        assert_eq!(body["error"]["code"], "method_not_allowed");
        let body = json(send(&fake, "POST", "/v2/unknown", "").await).await;
        assert!(body["error"].is_string(), "{body}");
        let response = send(&fake, "POST", "/v1/messages/batches", "").await;
        let id = response.headers()["request-id"].clone();
        assert_eq!(response.headers()["x-request-id"], id);
        let body = json(response).await;
        assert_eq!((&body["type"], &body["request_id"]), (&"error".into(), &id.to_str().unwrap().into()));
    }

    #[tokio::test]
    async fn every_answer_has_the_id_of_its_request() {
        let fake = Fake::with(Script::tokens(&["a"]));
        for path in ["/v1/models", "/v1/unknown", "/health"] {
            let request = HttpRequest::get(path).header("x-request-id", "mine").body(Body::empty()).unwrap();
            let response = router(fake.api()).oneshot(request).await.unwrap();
            assert_eq!(response.headers()["x-request-id"], "mine", "{path}");
            assert!(send(&fake, "GET", path, "").await.headers().contains_key("x-request-id"), "{path}");
        }
    }

    /// A path that a row's template fits.
    fn example(template: &str) -> String {
        template.replace("{model}", "fake").replace("{version}", "r1")
    }

    #[tokio::test]
    async fn every_row_of_the_table_has_its_route() {
        let fake = Fake::with(Script::tokens(&["a"]));
        for surface in SURFACES {
            let Endpoint::Http { method, path } = surface.endpoint else { continue };
            let response = send(&fake, method.as_str(), &example(path), "{}").await;
            let missing = matches!(response.status(), StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED);
            assert!(!missing, "{surface:?}: {}", response.status());
        }
    }

    #[test]
    fn every_route_has_its_row() {
        let router = format!("{:?}", router(Fake::with(Script::tokens(&["a"])).api()));
        // The router's own description lists its paths.
        let paths: Vec<&str> = router.split('"').filter(|text| text.starts_with('/')).collect();
        assert!(paths.contains(&"/v1/generate") && paths.contains(&"/health"), "{paths:?}");
        // Those of the fallback for everything else are axum's own.
        for path in paths.into_iter().filter(|path| *path != "/" && !path.contains("__private")) {
            let path = path.replace("{*model}", "fake").replace("{*rest}", "fake");
            let row = |method: HttpMethod| http_surface(method.as_str(), &path);
            assert!(row(HttpMethod::Get).or(row(HttpMethod::Post)).is_some(), "{path}");
        }
    }
}
