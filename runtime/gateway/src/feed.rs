//! The gateway's side of the operator's route feed.
//!
//! One stream in each direction. The gateway reports first when the stream opens, then for each table, when
//! its drain begins, and every second, because the operator takes five seconds of silence for absence. A lost
//! stream is reopened without a limit of attempts; in the meantime the last table serves. The last report
//! comes when the last request has ended, so that nothing that a process counted is lost with it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Endpoint;
use tonic::{Request, Status, Streaming};
use trustformers_proto::control::v1::route_service_client::RouteServiceClient;
use trustformers_proto::control::v1::{GatewayReport, RouteTable};

use crate::ab_test::ChangedVariants;
use crate::gateway::{Gateway, Source, TableOutcome};
use crate::metrics::ChangedCounts;

/// How often a report is sent when nothing changes.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// Longest time to connect. A pod that is gone does not answer at all, and a new leader waits six seconds for
/// the gateways before it opens readiness gates without them: two attempts and their pauses fit into that.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest time to the head of the operator's stream.
const OPEN_TIMEOUT: Duration = Duration::from_secs(2);
const PING_INTERVAL: Duration = Duration::from_secs(2);
const PING_TIMEOUT: Duration = Duration::from_secs(3);
/// An endpoint takes about 100 bytes on the wire, so this is some hundred thousand endpoints.
const TABLE_LIMIT_BYTES: usize = 64 << 20;
/// Reports that wait for the network: one of each cause that can come at once (start, table, drain, second).
/// If the queue is full no report is made, since the next second's report has the same content.
const REPORTS_WAITING: usize = 4;
/// Bytes of counts in one report. A series has 1 KB as a rule (two histograms of 60 buckets, of 6 bytes each,
/// and its names), so that this is 1,000 of them; at most 20 KB (736 buckets of 12 bytes, twice). The last
/// one may go beyond it, and the operator takes 4 MiB. All reports that wait have 4 MiB together.
const COUNTS_BYTES: usize = 1 << 20;
/// Bytes of what is counted of variants in one report; see `VariantRegistry::take_changed`. With the counts
/// of revisions a report stays below the 4 MiB that the operator takes.
const VARIANTS_BYTES: usize = 1 << 20;
/// At the end the operator has this long to read the last report and to end its side.
const LAST_REPORT_TIMEOUT: Duration = Duration::from_millis(500);
/// The first pause before another attempt to connect; jitter makes it 25 ms to 50 ms.
const FIRST_PAUSE: Duration = Duration::from_millis(25);
/// The longest pause; jitter makes it 0.5 s to 1 s. It is short because of the new leader's six seconds.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// Where the feed is, and the gateway's identity there.
#[derive(Debug, Clone)]
pub(crate) struct FeedSettings {
    /// The operator's feed.
    pub(crate) endpoint: Endpoint,
    /// File with the token to present. It is read at each connect, because the kubelet replaces it before it
    /// expires.
    pub(crate) token_file: Option<PathBuf>,
    /// This gateway's name in reports.
    pub(crate) instance: String,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum FeedError {
    #[error("--feed-token-file {path}: {cause}", path = path.display())]
    TokenFile { path: PathBuf, cause: std::io::Error },
    #[error("--feed-token-file {path} holds no token", path = path.display())]
    TokenText { path: PathBuf },
    #[error("{address}: {cause}", cause = innermost(cause))]
    Connect { address: String, cause: tonic::transport::Error },
    #[error("{address}: the stream did not open within {} s", OPEN_TIMEOUT.as_secs())]
    Slow { address: String },
    #[error("{address}: {}", refusal(status))]
    Refused { address: String, status: Status },
    #[error("{address}: the operator ended the stream")]
    Ended { address: String },
}

/// The cause at the end of the chain; the transport's own message is only "transport error".
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

fn refusal(status: &Status) -> String {
    format!("{:?}: {}", status.code(), status.message())
}

/// Follows the feed until `stop`, and then sends a last report.
pub(crate) async fn follow(settings: FeedSettings, gateway: Arc<Gateway>, stop: CancellationToken) {
    let mut pauses = pauses();
    loop {
        let opened = tokio::select! {
            () = stop.cancelled() => return,
            opened = open(&settings, &gateway) => opened,
        };
        let ended = match opened {
            Ok(session) => session.run(&mut pauses, &stop).await,
            Err(error) => Err(error),
        };
        gateway.metrics.feed_connected(false);
        gateway.set_current(false);
        let pause = pauses.next().unwrap_or(LONGEST_PAUSE);
        let serving = gateway.version().map_or_else(|| "none".to_owned(), |version| version.to_string());
        let pause_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
        let Err(error) = ended else { return };
        tracing::warn!(%error, pause_ms, table = serving, "the route feed is down; connecting again");
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// The pauses of one series of failures: they double, and jitter keeps gateways that lost the same operator
/// from reconnecting at the same time.
fn pauses() -> ExponentialBackoff {
    ExponentialBuilder::new()
        .with_min_delay(FIRST_PAUSE)
        .with_max_delay(LONGEST_PAUSE)
        .with_jitter()
        .without_max_times()
        .build()
}

/// Connects, reports, and opens the operator's side.
async fn open<'a>(settings: &'a FeedSettings, gateway: &'a Gateway) -> Result<Session<'a>, FeedError> {
    let address = settings.endpoint.uri().to_string();
    let token = token(settings).await?;
    let channel = settings
        .endpoint
        .clone()
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect()
        .await
        .map_err(|cause| FeedError::Connect { address: address.clone(), cause })?;
    let (reports, sent) = mpsc::channel(REPORTS_WAITING);
    let reporter = Reporter { settings, gateway, reports };
    // The operator may be another one, and the last reports of the stream before may be lost.
    gateway.metrics.report_all();
    reporter.report();
    let mut request = Request::new(ReceiverStream::new(sent));
    if let Some(token) = token {
        request.metadata_mut().insert("authorization", token);
    }
    let mut client = RouteServiceClient::new(channel).max_decoding_message_size(TABLE_LIMIT_BYTES);
    let tables = match timeout(OPEN_TIMEOUT, client.watch(request)).await {
        Ok(Ok(response)) => response.into_inner(),
        Ok(Err(status)) => return Err(FeedError::Refused { address, status }),
        Err(_elapsed) => return Err(FeedError::Slow { address }),
    };
    gateway.metrics.feed_connected(true);
    tracing::info!(address, "the route feed is open");
    Ok(Session { reporter, tables, address })
}

async fn token(settings: &FeedSettings) -> Result<Option<MetadataValue<Ascii>>, FeedError> {
    let Some(path) = &settings.token_file else { return Ok(None) };
    let text = tokio::fs::read_to_string(path)
        .await
        .map_err(|cause| FeedError::TokenFile { path: path.clone(), cause })?;
    let text = text.trim();
    let mut value: MetadataValue<Ascii> = Some(text)
        .filter(|text| !text.is_empty())
        .and_then(|text| format!("Bearer {text}").parse().ok())
        .ok_or_else(|| FeedError::TokenText { path: path.clone() })?;
    value.set_sensitive(true);
    Ok(Some(value))
}

/// An open stream.
struct Session<'a> {
    reporter: Reporter<'a>,
    tables: Streaming<RouteTable>,
    address: String,
}

/// The gateway's side of it.
struct Reporter<'a> {
    settings: &'a FeedSettings,
    gateway: &'a Gateway,
    reports: mpsc::Sender<GatewayReport>,
}

impl Reporter<'_> {
    /// Sends a report, and further ones while sums are left that it has no room for.
    fn report(&self) {
        loop {
            // A full queue means that the network is stalled; see REPORTS_WAITING. What is not sent now stays
            // marked as changed.
            let Ok(room) = self.reports.try_reserve() else { return };
            let ChangedCounts { counts, has_more } = self.gateway.metrics.changed_counts(COUNTS_BYTES);
            let variants = self.gateway.metrics.variants.take_changed(VARIANTS_BYTES);
            let ChangedVariants { variants, has_more: has_more_variants } = variants;
            room.send(GatewayReport {
                instance: self.settings.instance.clone(),
                acknowledged: self.gateway.version().map(Into::into),
                draining: self.gateway.drain.is_draining(),
                process: self.gateway.process.clone(),
                counts,
                held: self.gateway.hold.held(),
                variants,
            });
            if !has_more && !has_more_variants {
                return;
            }
        }
    }

    fn apply(&self, table: RouteTable) {
        match self.gateway.apply(table, Source::Feed) {
            Ok(TableOutcome::InForce(version)) => {
                self.gateway.set_current(true);
                tracing::info!(%version, "a routing table is in force");
            }
            // The operator sends its present table first on each stream.
            Ok(TableOutcome::Same(version)) => {
                self.gateway.set_current(true);
                tracing::debug!(%version, "the routing table is in force already");
            }
            Ok(TableOutcome::Stale { offered, in_force }) => {
                self.gateway.metrics.table_refused("stale");
                tracing::warn!(%offered, %in_force, "the routing table is older than the one in force and is ignored");
            }
            Err(error) => {
                self.gateway.metrics.table_refused("invalid");
                tracing::error!(%error, "the routing table can't be used; the last one stays in force");
            }
        }
    }
}

impl Session<'_> {
    /// Until `stop`; an earlier end is an error.
    async fn run(self, pauses: &mut ExponentialBackoff, stop: &CancellationToken) -> Result<(), FeedError> {
        let Self { reporter, mut tables, address } = self;
        let mut draining = reporter.gateway.drain.watch();
        let mut second = interval(REPORT_INTERVAL);
        second.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The first tick comes at once, and the first report has been sent already.
        second.tick().await;
        loop {
            tokio::select! {
                table = tables.message() => match table {
                    Ok(Some(table)) => {
                        *pauses = self::pauses();
                        reporter.apply(table);
                        reporter.report();
                    }
                    Ok(None) => return Err(FeedError::Ended { address }),
                    Err(status) => return Err(FeedError::Refused { address, status }),
                },
                _ = second.tick() => reporter.report(),
                Ok(()) = draining.changed() => reporter.report(),
                () = stop.cancelled() => break,
            }
        }
        reporter.report();
        drop(reporter);
        let ended = async { while let Ok(Some(_table)) = tables.message().await {} };
        if timeout(LAST_REPORT_TIMEOUT, ended).await.is_err() {
            tracing::debug!(address, "the operator did not end the route feed in time");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_with_jitter_up_to_the_longest() {
        let mut pauses = pauses();
        for base_ms in [25, 50, 100, 200, 400, 500, 500] {
            let pause = pauses.next().unwrap();
            let base = Duration::from_millis(base_ms);
            assert!(pause >= base && pause <= base * 2, "{pause:?} of {base:?}");
        }
    }
}
