//! `RouteService` on the wire. Only the leader has tables to give; others answer `UNAVAILABLE`, and the gateway tries
//! again until the Service leads it to the leader.

use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use trustformers_control::gate::Report;
use trustformers_proto::control::v1::route_service_server::RouteService;
use trustformers_proto::control::v1::{GatewayReport, RouteTable};

use super::Hub;
use super::identity::Doorkeeper;
use crate::world::World;

/// What the service needs of the leader that it speaks for.
#[derive(Clone)]
pub struct Lead {
    /// Tables and acknowledgements.
    pub hub: Arc<Hub>,
    /// Wakes whoever depends on acknowledgements.
    pub world: Arc<World>,
    /// Cancelled when the lead ends.
    pub ended: CancellationToken,
}

/// The service. It lives as long as the process; leads come and go.
pub struct Feed {
    lead: watch::Receiver<Option<Lead>>,
    doorkeeper: Doorkeeper,
}

impl Feed {
    /// A service that speaks for whatever lead `lead` holds.
    #[must_use]
    pub fn new(lead: watch::Receiver<Option<Lead>>, doorkeeper: Doorkeeper) -> Self {
        Self { lead, doorkeeper }
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
        // A copy is taken out of the channel, since a borrow must not live across an await.
        let lead = self.lead.borrow().clone().ok_or_else(not_leading)?;
        self.doorkeeper.check(request.metadata()).await?;
        tokio::spawn(hear(lead.clone(), request.into_inner()));
        let tables = WatchStream::new(lead.hub.tables())
            .filter_map(async |table| table.map(|table| Ok(RouteTable::clone(&table))))
            .take_until(lead.ended.clone().cancelled_owned())
            .chain(futures::stream::once(async { Err(not_leading()) }));
        Ok(Response::new(Box::pin(tables)))
    }
}

/// Notes reports until the gateway or the lead ends the stream.
async fn hear(lead: Lead, mut reports: Streaming<GatewayReport>) {
    loop {
        let message = tokio::select! {
            () = lead.ended.cancelled() => return,
            message = reports.message() => message,
        };
        let Ok(Some(message)) = message else { return };
        let GatewayReport { instance, acknowledged, draining } = message;
        if instance.is_empty() {
            tracing::warn!("a gateway reports without an instance; its reports are ignored");
            return;
        }
        if lead.hub.report(Report { instance, acknowledged, draining }) {
            lead.world.gates_changed.notify_one();
        }
    }
}
