//! Liveness, readiness and start-up, over HTTP routes and over gRPC's own health protocol.
//!
//! They answer three different questions and are therefore kept apart. *Live*: would a restart help? Only a
//! stuck engine says no; loading, draining and a broken model do not. *Ready*: may traffic come? Not before
//! the warm-up, not while draining. *Started*: is loading over, one way or the other? None of them passes
//! through a queue of requests, so a full queue never looks like a dead process.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use futures::Stream;
use futures::StreamExt;
use futures::stream::BoxStream;
use serde_json::json;
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status};
use tonic_health::pb;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::echo::echo;

/// Yes or no, and why in one sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Whether all is well.
    pub ok: bool,
    /// The state or the cause, for people.
    pub message: String,
}

impl Verdict {
    /// All is well.
    pub fn yes(message: impl Into<String>) -> Self {
        Self { ok: true, message: message.into() }
    }

    /// Not now, with the cause.
    pub fn no(message: impl Into<String>) -> Self {
        Self { ok: false, message: message.into() }
    }
}

/// The health of a server. Each answer comes at once and does not pass through a queue of requests.
pub trait Health: Send + Sync + 'static {
    /// Whether the process can still make progress; when not, a restart is the cure.
    fn liveness(&self) -> Verdict;
    /// Whether start-up is over.
    fn startup(&self) -> Verdict;
    /// Whether requests may come, now and after each change. The channel closes when the server ends.
    fn readiness(&self) -> watch::Receiver<Verdict>;
}

/// `GET /health` (the same as ready), `/health/live`, `/health/ready` and `/health/startup`: 200 or 503, with
/// `{"status": "ok" | "unavailable", "message"}`.
pub fn router<H: Health + ?Sized>(health: Arc<H>) -> Router {
    Router::new()
        .route("/health", get(ready::<H>))
        .route("/health/ready", get(ready::<H>))
        .route("/health/live", get(async |State(health): State<Arc<H>>| answer(&health.liveness())))
        .route("/health/startup", get(async |State(health): State<Arc<H>>| answer(&health.startup())))
        .with_state(health)
}

async fn ready<H: Health + ?Sized>(State(health): State<Arc<H>>) -> Response {
    let verdict = health.readiness().borrow().clone();
    answer(&verdict)
}

fn answer(verdict: &Verdict) -> Response {
    let (status, word) =
        if verdict.ok { (StatusCode::OK, "ok") } else { (StatusCode::SERVICE_UNAVAILABLE, "unavailable") };
    (status, Json(json!({"status": word, "message": verdict.message}))).into_response()
}

/// `grpc.health.v1.Health` over a server's readiness. Known services are the empty name (the whole server)
/// and the names it was made with.
pub struct GrpcHealth<H: ?Sized> {
    health: Arc<H>,
    services: &'static [&'static str],
    closing: CancellationToken,
}

impl<H: Health + ?Sized> GrpcHealth<H> {
    /// Answers for `services`; watches end when `closing` is cancelled.
    pub fn new(health: Arc<H>, services: &'static [&'static str], closing: CancellationToken) -> Self {
        Self { health, services, closing }
    }

    fn knows(&self, service: &str) -> bool {
        service.is_empty() || self.services.contains(&service)
    }
}

/// A stream of health states. The generated trait needs a named type.
pub struct HealthStream(BoxStream<'static, Result<pb::HealthCheckResponse, Status>>);

impl Stream for HealthStream {
    type Item = Result<pb::HealthCheckResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next_unpin(context)
    }
}

fn wire(status: ServingStatus) -> pb::HealthCheckResponse {
    pb::HealthCheckResponse { status: status as i32 }
}

fn serving(verdict: &Verdict) -> ServingStatus {
    if verdict.ok { ServingStatus::Serving } else { ServingStatus::NotServing }
}

#[tonic::async_trait]
impl<H: Health + ?Sized> pb::health_server::Health for GrpcHealth<H> {
    type WatchStream = HealthStream;

    async fn check(
        &self,
        request: Request<pb::HealthCheckRequest>,
    ) -> Result<tonic::Response<pb::HealthCheckResponse>, Status> {
        let service = &request.get_ref().service;
        if !self.knows(service) {
            return Err(Status::not_found(format!("service {:?} is not served here", echo(service))));
        }
        let status = serving(&self.health.readiness().borrow());
        Ok(tonic::Response::new(wire(status)))
    }

    async fn watch(
        &self,
        request: Request<pb::HealthCheckRequest>,
    ) -> Result<tonic::Response<HealthStream>, Status> {
        let closed = self.closing.clone().cancelled_owned();
        let states: BoxStream<'static, ServingStatus> = if self.knows(&request.get_ref().service) {
            WatchStream::new(self.health.readiness()).map(|verdict| serving(&verdict)).boxed()
        } else {
            // The protocol wants a watch of an unknown service to stay open, in case it appears.
            futures::stream::once(async { ServingStatus::ServiceUnknown })
                .chain(futures::stream::pending())
                .boxed()
        };
        let stream = states.map(|status| Ok(wire(status))).take_until(closed).boxed();
        Ok(tonic::Response::new(HealthStream(stream)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;
    use axum::http::Request as HttpRequest;
    use http_body_util::BodyExt;
    use tonic_health::pb::health_server::Health as _;
    use tower::ServiceExt;

    struct Fixed {
        ready: watch::Sender<Verdict>,
        live: bool,
    }

    impl Health for Fixed {
        fn liveness(&self) -> Verdict {
            Verdict { ok: self.live, message: "engine".into() }
        }
        fn startup(&self) -> Verdict {
            Verdict::no("loading 3 of 7 bytes")
        }
        fn readiness(&self) -> watch::Receiver<Verdict> {
            self.ready.subscribe()
        }
    }

    fn fixed() -> Arc<Fixed> {
        Arc::new(Fixed { ready: watch::Sender::new(Verdict::no("warming")), live: true })
    }

    async fn get(router: Router, path: &str) -> (StatusCode, String) {
        let request = HttpRequest::get(path).body(Body::empty()).unwrap();
        let response = router.oneshot(request).await.unwrap();
        let status = response.status();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(bytes.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn each_route_answers_its_own_question() {
        let health = fixed();
        assert_eq!(get(router(health.clone()), "/health/live").await.0, StatusCode::OK);
        let (status, body) = get(router(health.clone()), "/health/ready").await;
        assert_eq!((status, body.contains("warming")), (StatusCode::SERVICE_UNAVAILABLE, true));
        let (status, body) = get(router(health.clone()), "/health/startup").await;
        assert_eq!((status, body.contains("3 of 7")), (StatusCode::SERVICE_UNAVAILABLE, true));
        health.ready.send_replace(Verdict::yes("ready"));
        assert_eq!(get(router(health.clone()), "/health").await.0, StatusCode::OK);
    }

    #[tokio::test]
    async fn a_grpc_watch_follows_readiness_and_ends_on_closing() {
        let health = fixed();
        let closing = CancellationToken::new();
        let service = GrpcHealth::new(health.clone(), &["a.B"], closing.clone());
        let request = Request::new(pb::HealthCheckRequest { service: "a.B".into() });
        let mut stream = service.watch(request).await.unwrap().into_inner();
        assert_eq!(stream.next().await.unwrap().unwrap().status(), ServingStatus::NotServing);
        health.ready.send_replace(Verdict::yes("ready"));
        assert_eq!(stream.next().await.unwrap().unwrap().status(), ServingStatus::Serving);
        closing.cancel();
        assert!(stream.next().await.is_none());
    }

    #[tokio::test]
    async fn an_unknown_service_is_reported_by_check_and_by_watch() {
        let service = GrpcHealth::new(fixed(), &["a.B"], CancellationToken::new());
        let request = || Request::new(pb::HealthCheckRequest { service: "a.C".into() });
        assert_eq!(service.check(request()).await.unwrap_err().code(), tonic::Code::NotFound);
        let mut stream = service.watch(request()).await.unwrap().into_inner();
        assert_eq!(stream.next().await.unwrap().unwrap().status(), ServingStatus::ServiceUnknown);
    }
}
