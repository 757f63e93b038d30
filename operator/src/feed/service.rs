//! `RouteService` as a gRPC service. Only the leader has tables; other processes respond with `UNAVAILABLE`,
//! and the gateway connects again until the feed's Service selects the leader.

use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Request, Response, Status, Streaming};
use trustformers_control::counts::Reported;
use trustformers_control::gate::Report;
use trustformers_proto::control::v1::route_service_server::RouteService;
use trustformers_proto::control::v1::{GatewayReport, RouteTable};

use super::FeedState;
use super::identity::FeedAuthenticator;
use crate::context::Context;

/// What the service needs of the leader.
#[derive(Clone)]
pub struct Leadership {
    /// Tables and acknowledgements.
    pub feed: Arc<FeedState>,
    /// Wakes the task that writes readiness gates.
    pub context: Arc<Context>,
    /// Cancelled when the lead ends.
    pub ended: CancellationToken,
}

/// The service. It lives as long as the process, through several leads.
pub struct Feed {
    leadership: watch::Receiver<Option<Leadership>>,
    authenticator: FeedAuthenticator,
}

impl Feed {
    /// A service for the present leadership of this process.
    #[must_use]
    pub fn new(leadership: watch::Receiver<Option<Leadership>>, authenticator: FeedAuthenticator) -> Self {
        Self { leadership, authenticator }
    }
}

fn not_leading() -> Status {
    Status::unavailable("this operator does not lead; try again")
}

#[tonic::async_trait]
impl RouteService for Feed {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<RouteTable, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<Streaming<GatewayReport>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        // The clone ends the borrow of the channel before the next await.
        let leadership = self.leadership.borrow().clone().ok_or_else(not_leading)?;
        self.authenticator.verify(request.metadata()).await?;
        // Also where the gateway ends its reports: it waits for that, so that none is lost.
        let ended = leadership.ended.child_token();
        let reports_end = ended.clone().drop_guard();
        tokio::spawn(receive_reports(leadership.clone(), request.into_inner(), reports_end));
        let tables = WatchStream::new(leadership.feed.tables())
            .filter_map(async |table| table.map(|table| Ok(RouteTable::clone(&table))))
            .take_until(ended.cancelled_owned())
            .chain(futures::stream::once(async { Err(not_leading()) }));
        Ok(Response::new(Box::pin(tables)))
    }
}

/// Records reports until the gateway or the lead ends the stream.
async fn receive_reports(
    leadership: Leadership,
    mut reports: Streaming<GatewayReport>,
    _reports_end: DropGuard,
) {
    loop {
        let message = tokio::select! {
            () = leadership.ended.cancelled() => return,
            message = reports.message() => message,
        };
        let Ok(Some(message)) = message else { return };
        let GatewayReport { instance, acknowledged, draining, process, counts, held, variants } = message;
        if instance.is_empty() {
            tracing::warn!("a gateway reports without an instance; its stream is ignored");
            return;
        }
        if !process.is_empty() {
            leadership.context.counts.record(&process, Reported { counts: &counts, held: &held });
            leadership.context.samples.record(&process, &variants);
        }
        if leadership.feed.report(Report { instance, acknowledged, draining }) {
            leadership.context.gates_changed.notify_one();
        }
    }
}
