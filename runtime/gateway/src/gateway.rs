//! The state that all requests share: the table in force, the metrics, the bounds, and the drain.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use prost::Message;
use tokio::sync::watch;
use tokio::time::Instant;
use trustformers_api::BlockingWork;
use trustformers_api::health::{Health, Verdict};
use trustformers_api::inference::Models;
use trustformers_proto::control::v1::RouteTable;
use trustformers_telemetry::traces::Traces;
use uuid::Uuid;

use crate::drain::Drain;
use crate::feedback::Feedback;
use crate::headers::TrustedHeaders;
use crate::hold::Hold;
use crate::limits::{Bounds, Limits};
use crate::metrics::Metrics;
use crate::models;
use crate::routing::Routing;
use crate::shadow::Shadows;
use crate::table::{Table, TableError, Version};

/// A table in its wire format, to be saved on disk.
pub(crate) type EncodedTable = Option<Arc<Vec<u8>>>;

/// Compressed bodies that are looked into at a time. A decoder takes up to 16 MiB, so that two take 32 MiB
/// whatever callers send.
pub(crate) const DECODERS: usize = 2;

/// Shared by all requests.
#[derive(Debug)]
pub(crate) struct Gateway {
    /// Every metric.
    pub(crate) metrics: Metrics,
    /// Whether it drains.
    pub(crate) drain: Arc<Drain>,
    /// The bounds on what callers can make it hold.
    pub(crate) limits: Arc<Limits>,
    /// Longest body of one request.
    pub(crate) body_limit_bytes: usize,
    /// Headers in which a proxy in front of it says who a caller is.
    pub(crate) trusted: TrustedHeaders,
    /// Requests that wait for a pod of their model.
    pub(crate) hold: Hold,
    /// Looks into compressed bodies.
    pub(crate) decoding: BlockingWork,
    /// Scores of answers.
    pub(crate) feedback: Arc<Feedback>,
    /// Requests that another revision answers as well.
    pub(crate) shadows: Arc<Shadows>,
    /// Makes the spans of requests.
    pub(crate) traces: Traces,
    /// Whether another program decides what it routes, and no operator.
    pub(crate) embedded: bool,
    /// A random id of this process, for reports.
    pub(crate) process: String,
    started: Instant,
    routing: ArcSwapOption<Routing>,
    /// Tables are compared and applied one at a time.
    applying: Mutex<()>,
    in_force: watch::Sender<Option<Version>>,
    to_save: watch::Sender<EncodedTable>,
    readiness: watch::Sender<Verdict>,
    /// The models of the table in force.
    models: watch::Sender<Models>,
    /// Whether the operator has confirmed the table in force since the last connection to it.
    current: AtomicBool,
}

/// What a gateway is made of.
#[derive(Debug)]
pub(crate) struct GatewayParts {
    /// Every metric.
    pub(crate) metrics: Metrics,
    /// Requests that wait for a pod of their model.
    pub(crate) hold: Hold,
    /// Requests that another revision answers as well.
    pub(crate) shadows: Arc<Shadows>,
    /// Longest body of one request.
    pub(crate) body_limit_bytes: usize,
    /// Headers in which a proxy in front of it says who a caller is.
    pub(crate) trusted: TrustedHeaders,
    /// Makes the spans of requests.
    pub(crate) traces: Traces,
    /// Whether another program decides what it routes, and no operator.
    pub(crate) embedded: bool,
}

/// The result of applying a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TableOutcome {
    /// It came into force.
    InForce(Version),
    /// It was in force already.
    Same(Version),
    /// A newer one is in force.
    Stale {
        /// The version that was offered.
        offered: Version,
        /// The version in force.
        in_force: Version,
    },
}

/// Where a table came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// The operator's feed. Such a table is saved on disk once it is in force.
    Feed,
    /// The program that the gateway is a part of.
    Program,
    /// The disk, and when it was written there.
    Disk(SystemTime),
}

impl Gateway {
    /// No table, nothing in flight, no header trusted.
    #[cfg(test)]
    pub(crate) fn new(metrics: Metrics, body_limit_bytes: usize) -> Arc<Self> {
        let registry = prometheus::Registry::new();
        let hold = Hold::new(&registry).expect("the registry is empty");
        Self::with(GatewayParts {
            metrics,
            hold,
            shadows: Shadows::new(&registry).expect("the registry is empty"),
            body_limit_bytes,
            trusted: TrustedHeaders::default(),
            traces: Traces::off(),
            embedded: false,
        })
    }

    /// No table, nothing in flight.
    pub(crate) fn with(parts: GatewayParts) -> Arc<Self> {
        let GatewayParts { metrics, hold, shadows, body_limit_bytes, trusted, traces, embedded } = parts;
        Arc::new(Self {
            metrics,
            drain: Drain::new(),
            limits: Limits::new(Bounds::default()),
            body_limit_bytes,
            trusted,
            hold,
            decoding: BlockingWork::new(DECODERS),
            feedback: Arc::default(),
            shadows,
            process: Uuid::new_v4().to_string(),
            traces,
            embedded,
            started: Instant::now(),
            routing: ArcSwapOption::empty(),
            applying: Mutex::default(),
            in_force: watch::Sender::new(None),
            to_save: watch::Sender::new(None),
            readiness: watch::Sender::new(Verdict::no("no routing table has arrived from the operator yet")),
            current: AtomicBool::new(false),
            models: watch::Sender::new(Models::from([])),
        })
    }

    /// Time on the gateway's clock.
    pub(crate) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// The table in force.
    pub(crate) fn routing(&self) -> Option<Arc<Routing>> {
        self.routing.load_full()
    }

    /// Version of the table in force.
    pub(crate) fn version(&self) -> Option<Version> {
        *self.in_force.borrow()
    }

    /// Changes with each table that comes into force.
    pub(crate) fn watch_version(&self) -> watch::Receiver<Option<Version>> {
        self.in_force.subscribe()
    }

    /// The models of the table in force, now and after each change.
    pub(crate) fn watch_models(&self) -> watch::Receiver<Models> {
        self.models.subscribe()
    }

    /// Changes with each table that has to be saved on disk.
    pub(crate) fn watch_tables_to_save(&self) -> watch::Receiver<EncodedTable> {
        self.to_save.subscribe()
    }

    /// Begins the drain.
    pub(crate) fn start_drain(&self) {
        self.drain.start();
        self.update_readiness();
    }

    /// A table that arrives during the drain must not make the gateway ready again, so this depends on both.
    fn update_readiness(&self) {
        let verdict = match (self.drain.is_draining(), self.version()) {
            (true, _) => Verdict::no("the gateway is draining before it ends"),
            (false, None) => return,
            (false, Some(version)) => Verdict::yes(format!("routing table {version} is in force")),
        };
        self.readiness.send_replace(verdict);
    }

    /// Whether the operator has confirmed the table in force. If not, a model that the table lacks may exist.
    pub(crate) fn is_current(&self) -> bool {
        self.current.load(Ordering::Relaxed)
    }

    /// Sets whether the operator has confirmed the table in force.
    pub(crate) fn set_current(&self, current: bool) {
        self.current.store(current, Ordering::Relaxed);
    }

    /// Time since the table in force was received.
    pub(crate) fn table_age(&self) -> Option<Duration> {
        let routing = self.routing()?;
        // If the clock was set back, the age is 0.
        Some(routing.received_at.elapsed().unwrap_or_default())
    }

    /// Puts a table in force if it is newer than the present one.
    ///
    /// # Errors
    /// Names what in the table can't be used. The present table stays in force.
    pub(crate) fn apply(&self, table: RouteTable, source: Source) -> Result<TableOutcome, TableError> {
        let _applying = self.applying.lock().unwrap_or_else(PoisonError::into_inner);
        let offered = table.version.ok_or(TableError::NoVersion)?;
        let offered = Version { term: offered.term, counter: offered.counter };
        if let Some(in_force) = self.version().filter(|in_force| *in_force >= offered) {
            return Ok(if in_force == offered {
                TableOutcome::Same(in_force)
            } else {
                TableOutcome::Stale { offered, in_force }
            });
        }
        let encoded = table.encode_to_vec();
        let parsed = Table::parse(table)?;
        let received_at = match source {
            Source::Feed | Source::Program => SystemTime::now(),
            Source::Disk(written_at) => written_at,
        };
        let before = self.routing();
        let routing = Routing::build(parsed, received_at, before.as_deref(), &self.metrics);
        let models = models::of_table(&routing.table, received_at, &self.models.borrow());
        self.routing.store(Some(Arc::new(routing)));
        self.models.send_replace(models);
        self.in_force.send_replace(Some(offered));
        self.update_readiness();
        if source == Source::Feed {
            self.to_save.send_replace(Some(Arc::new(encoded)));
        }
        Ok(TableOutcome::InForce(offered))
    }
}

impl Health for Gateway {
    /// A restart would repair nothing, because the gateway has no state that can be broken.
    fn liveness(&self) -> Verdict {
        Verdict::yes("the gateway runs")
    }

    fn startup(&self) -> Verdict {
        if self.version().is_some() {
            Verdict::yes("a routing table has arrived")
        } else {
            self.readiness.borrow().clone()
        }
    }

    fn readiness(&self) -> watch::Receiver<Verdict> {
        self.readiness.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{TableText, endpoint_at};
    use prometheus::Registry;

    fn gateway() -> Arc<Gateway> {
        Gateway::new(Metrics::new(Registry::new()).unwrap(), 1 << 20)
    }

    fn table(term: u64, counter: u64) -> RouteTable {
        TableText::new(term, counter)
            .route("default/a", &["a"])
            .backend("r1", 1, &[endpoint_at("p", 1)])
            .wire()
    }

    #[test]
    fn only_a_newer_table_is_applied() {
        let gateway = gateway();
        assert!(!gateway.readiness().borrow().ok);
        let version = |term, counter| Version { term, counter };
        assert_eq!(gateway.apply(table(2, 5), Source::Feed), Ok(TableOutcome::InForce(version(2, 5))));
        assert!(gateway.readiness().borrow().ok);
        for (term, counter) in [(2, 4), (1, 9), (0, 0)] {
            let stale = TableOutcome::Stale { offered: version(term, counter), in_force: version(2, 5) };
            assert_eq!(gateway.apply(table(term, counter), Source::Feed), Ok(stale));
        }
        assert_eq!(gateway.apply(table(2, 5), Source::Feed), Ok(TableOutcome::Same(version(2, 5))));
        assert_eq!(gateway.apply(table(3, 0), Source::Feed), Ok(TableOutcome::InForce(version(3, 0))));
        assert_eq!(gateway.version(), Some(version(3, 0)));
        assert_eq!(gateway.routing().unwrap().table.version, version(3, 0));
    }

    #[test]
    fn an_invalid_table_leaves_the_last_one_in_force() {
        let gateway = gateway();
        gateway.apply(table(1, 1), Source::Feed).unwrap();
        let mut bad = table(1, 2);
        bad.routes[0].backends[0].endpoints[0].address = "nowhere".to_owned();
        assert!(gateway.apply(bad, Source::Feed).is_err());
        assert_eq!(gateway.version(), Some(Version { term: 1, counter: 1 }));
    }

    #[test]
    fn a_table_from_disk_is_not_saved_again_and_has_its_age() {
        let gateway = gateway();
        let to_save = gateway.watch_tables_to_save();
        let written_at = SystemTime::now() - Duration::from_secs(100);
        gateway.apply(table(1, 1), Source::Disk(written_at)).unwrap();
        assert!(!to_save.has_changed().unwrap());
        assert!(gateway.table_age().unwrap() >= Duration::from_secs(100));
        gateway.apply(table(1, 2), Source::Feed).unwrap();
        assert!(to_save.has_changed().unwrap());
    }

    #[test]
    fn a_draining_gateway_is_not_ready() {
        let gateway = gateway();
        gateway.apply(table(1, 1), Source::Feed).unwrap();
        gateway.start_drain();
        assert!(!gateway.readiness().borrow().ok);
        gateway.apply(table(1, 2), Source::Feed).unwrap();
        assert!(!gateway.readiness().borrow().ok);
    }
}
