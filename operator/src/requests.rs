//! A limit on the time of every request to the API server.
//!
//! The limit is part of the client, so no request can be made without it. It covers the whole response, and
//! what kube repeats of a request. Watches are exempt: they last for minutes, and kube restarts them.
//!
//! The Lease has a client of its own, with connections of its own and a shorter limit: a burst of other
//! requests must not end the lead, and a request that hangs must not outlast the lease.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::api::{Patch, PatchParams};
use kube::client::retry::RetryPolicy;
use kube::client::{Body, ClientBuilder, ConfigExt, DynBody};
use kube::{Client, Config, Resource};
use serde::Serialize;
use tokio::time::timeout;
use tower::retry::RetryLayer;
use tower::{BoxError, Layer, Service, ServiceBuilder};

use crate::decode::Receipt;

/// Longest time of one request. The API server itself gives up on a request after 60 s; one that takes longer
/// than this is made again by whoever needs it.
pub const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// Longest time of one request about the Lease. Two of them fit between the renewal deadline and the end of
/// the lease: 6 s + 2 × 2 s = 10 s.
pub const LEASE_LIMIT: Duration = Duration::from_secs(2);

/// A connection that is silent for this long is asked for a sign of life.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// A connection whose peer acknowledges nothing for this long is dead.
#[cfg(target_os = "linux")]
const UNACKNOWLEDGED_LIMIT: Duration = Duration::from_secs(20);

/// Largest buffer of a connection for what it reads. hyper's own limit is six times as large, and a watch
/// that delivers a burst reaches it: 16 watches and some 80 connections of writers × 64 KiB = 6 MiB at most.
const READ_BUFFER_BYTES: usize = 64 * 1024;

/// The API server did not answer in time.
#[derive(Debug, thiserror::Error)]
#[error("the API server did not answer within {} s", limit.as_secs())]
pub struct NoAnswer {
    /// The limit.
    limit: Duration,
}

/// The clients of the process.
#[derive(Clone)]
pub struct Clients {
    /// For everything but the Lease.
    pub objects: Client,
    /// For the Lease.
    pub lease: Client,
}

/// Clients whose requests end in time.
///
/// # Errors
/// When the configuration is not valid.
pub fn clients(config: Config) -> Result<Clients, kube::Error> {
    Ok(Clients { lease: client(config.clone(), LEASE_LIMIT)?, objects: client(config, REQUEST_LIMIT)? })
}

/// Writes the status of the object with this namespace and name. Of the response only the resource version is
/// read: the watch delivers the object.
pub(crate) async fn patch_status<K: Resource<DynamicType = ()>, P: Serialize>(
    client: &Client,
    namespace: &str,
    name: &str,
    params: &PatchParams,
    patch: &Patch<P>,
) -> Result<Receipt, kube::Error> {
    let requests = kube::api::Request::new(K::url_path(&(), Some(namespace)));
    let request = requests.patch_subresource("status", name, params, patch);
    client.request(request.map_err(kube::Error::BuildRequest)?).await
}

/// As kube builds its clients, with other settings of their connections.
fn client(config: Config, limit: Duration) -> Result<Client, kube::Error> {
    if config.proxy_url.is_some() {
        return Ok(ClientBuilder::try_from(config)?.with_layer(&TimeLimit { limit }).build());
    }
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    // Otherwise the end of a request may wait 40 ms for an acknowledgement of its start.
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(limit));
    // A watch that hears nothing is asked for a sign of life, so that it starts again when its connection is
    // dead.
    connector.set_keepalive(Some(KEEP_ALIVE));
    #[cfg(target_os = "linux")]
    connector.set_tcp_user_timeout(Some(UNACKNOWLEDGED_LIMIT));
    let connector = config.rustls_https_connector_with_connector(connector)?;
    let http = legacy::Client::builder(TokioExecutor::new())
        .http1_max_buf_size(READ_BUFFER_BYTES)
        .build::<_, Body>(connector);
    let service = ServiceBuilder::new()
        .layer(TimeLimit { limit })
        .map_response(|response: Response<Incoming>| {
            response.map(|body| -> Box<DynBody> { Box::new(body.map_err(BoxError::from)) })
        })
        .layer(config.base_uri_layer())
        .layer(RetryLayer::new(RetryPolicy::server_retry()))
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace))
}

/// Adds a limit to a client.
#[derive(Debug, Clone, Copy)]
pub struct TimeLimit {
    limit: Duration,
}

impl<S> Layer<S> for TimeLimit {
    type Service = Limited<S>;

    fn layer(&self, inner: S) -> Limited<S> {
        Limited { inner, limit: self.limit }
    }
}

/// A service whose requests end in time.
#[derive(Debug, Clone)]
pub struct Limited<S> {
    inner: S,
    limit: Duration,
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
        let (response, limit) = (self.inner.call(request), self.limit);
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
            timeout(limit, whole).await.unwrap_or_else(|_| Err(NoAnswer { limit }.into()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;
    use tower::{ServiceExt, service_fn};
    use trustformers_control::lease::{LEASE, RENEW_DEADLINE};

    async fn ask(uri: &str, limit: Duration) -> Result<Response<Box<DynBody>>, BoxError> {
        let hangs =
            service_fn(|_: Request<Body>| std::future::pending::<Result<Response<Box<DynBody>>, BoxError>>());
        TimeLimit { limit }.layer(hangs).oneshot(Request::get(uri).body(Body::empty()).unwrap()).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_without_an_answer_ends_at_the_limit() {
        let started = Instant::now();
        let error = ask("/api/v1/pods?limit=500", REQUEST_LIMIT).await.err().unwrap();
        assert_eq!(error.to_string(), "the API server did not answer within 10 s");
        assert_eq!(started.elapsed(), REQUEST_LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_about_the_lease_ends_long_before_the_lease() {
        let started = Instant::now();
        let lease = "/apis/coordination.k8s.io/v1/namespaces/sys/leases/trustformers-operator";
        let error = ask(lease, LEASE_LIMIT).await.err().unwrap();
        assert_eq!(error.to_string(), "the API server did not answer within 2 s");
        assert!(started.elapsed() * 2 <= LEASE - RENEW_DEADLINE, "two of them fit");
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_has_no_limit() {
        let watch = ask("/api/v1/pods?&watch=true&resourceVersion=1", REQUEST_LIMIT);
        assert!(timeout(REQUEST_LIMIT * 100, watch).await.is_err(), "it still waits");
    }
}
