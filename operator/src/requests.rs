//! A limit on the time of every request to the API server.
//!
//! The limit is part of the client, so no request can be made without it. It covers the whole response.
//! Watches are exempt: they last for minutes, and kube restarts them.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use kube::client::{Body, ClientBuilder, DynBody};
use kube::{Client, Config};
use tokio::time::timeout;
use tower::{BoxError, Layer, Service};

/// Longest time of one request. The API server itself gives up on a request after 60 s; one that takes longer
/// than this is made again by whoever needs it.
pub const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// The API server did not answer in time.
#[derive(Debug, thiserror::Error)]
#[error("the API server did not answer within {} s", REQUEST_LIMIT.as_secs())]
pub struct NoAnswer;

/// A client whose requests end within [`REQUEST_LIMIT`].
///
/// # Errors
/// When the configuration is not valid.
pub fn client(config: Config) -> Result<Client, kube::Error> {
    Ok(ClientBuilder::try_from(config)?.with_layer(&TimeLimit).build())
}

/// Adds the limit to a client.
#[derive(Debug, Clone, Copy)]
pub struct TimeLimit;

impl<S> Layer<S> for TimeLimit {
    type Service = Limited<S>;

    fn layer(&self, inner: S) -> Limited<S> {
        Limited { inner }
    }
}

/// A service whose requests end in time.
#[derive(Debug, Clone)]
pub struct Limited<S> {
    inner: S,
}

impl<S> Service<Request<Body>> for Limited<S>
where
    S: Service<Request<Body>, Response = Response<Box<DynBody>>, Error = BoxError>,
    S::Future: Send + 'static,
{
    type Response = Response<Box<DynBody>>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let is_watch =
            request.uri().query().is_some_and(|query| query.split('&').any(|one| one == "watch=true"));
        let response = self.inner.call(request);
        if is_watch {
            return Box::pin(response);
        }
        Box::pin(async move {
            let whole = async move {
                let (parts, body) = response.await?.into_parts();
                let bytes = body.collect().await?.to_bytes();
                let body: Box<DynBody> = Box::new(Full::new(bytes).map_err(|never| match never {}));
                Ok(Response::from_parts(parts, body))
            };
            timeout(REQUEST_LIMIT, whole).await.unwrap_or_else(|_| Err(NoAnswer.into()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;
    use tower::{ServiceExt, service_fn};

    async fn ask(uri: &str) -> Result<Response<Box<DynBody>>, BoxError> {
        let hangs =
            service_fn(|_: Request<Body>| std::future::pending::<Result<Response<Box<DynBody>>, BoxError>>());
        TimeLimit.layer(hangs).oneshot(Request::get(uri).body(Body::empty()).unwrap()).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_without_an_answer_ends_at_the_limit() {
        let started = Instant::now();
        let error = ask("/api/v1/pods?limit=500").await.err().unwrap();
        assert_eq!(error.to_string(), "the API server did not answer within 10 s");
        assert_eq!(started.elapsed(), REQUEST_LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_has_no_limit() {
        let watch = ask("/api/v1/pods?&watch=true&resourceVersion=1");
        assert!(timeout(REQUEST_LIMIT * 100, watch).await.is_err(), "it still waits");
    }
}
