//! The HTTP routes over one [`Api`].

use axum::Router;
use axum::http::{Method, Uri};
use axum::routing::{get, post};

use crate::error::ApiError;
use crate::{Api, embed, health};

pub(crate) mod generate;
mod model_list;

pub use model_list::state_word;

/// The routes over `api`, with JSON errors for unknown routes and wrong methods. The program that owns the
/// registry of metrics merges `/metrics` into them.
pub fn router(api: Api) -> Router {
    let health = health::router(api.inference.clone());
    Router::new()
        .route("/v1/generate", post(generate::generate))
        .route("/v1/generate/stream", post(generate::generate_stream))
        .route("/v1/embeddings", post(embed::embeddings))
        .route("/v1/models", get(model_list::models))
        .with_state(api)
        .merge(health)
        .method_not_allowed_fallback(async |method: Method, uri: Uri| ApiError::MethodNotAllowed {
            method: method.to_string(),
            path: uri.path().to_owned(),
        })
        .fallback(async |uri: Uri| ApiError::UnknownRoute { path: uri.path().to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Fake, Script};
    use crate::surfaces::SURFACES;
    use axum::body::Body;
    use axum::http::{Request as HttpRequest, StatusCode};
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    async fn post(fake: &Fake, path: &str, body: &'static str) -> (StatusCode, String) {
        let request = HttpRequest::post(path).body(Body::from(body)).unwrap();
        let response = router(fake.api()).oneshot(request).await.unwrap();
        let status = response.status();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(bytes.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn unknown_routes_and_methods_answer_in_json() {
        let fake = Fake::with(Script::tokens(&["a"]));
        let (status, body) = post(&fake, "/v1/generat", "{}").await;
        assert_eq!((status, body.contains("/v1/generate")), (StatusCode::NOT_FOUND, true));
        let request = HttpRequest::get("/v1/generate").body(Body::empty()).unwrap();
        let response = router(fake.api()).oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED);
    }

    #[tokio::test]
    async fn every_surface_has_its_route() {
        let fake = Fake::with(Script::tokens(&["a"]));
        for surface in SURFACES {
            assert_eq!(post(&fake, surface.http_path, "{}").await.0, StatusCode::BAD_REQUEST, "{surface:?}");
        }
    }
}
