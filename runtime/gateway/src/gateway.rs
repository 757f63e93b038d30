//! What every part of the gateway shares: the table in force, the counters, and whether it is leaving.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use prost::Message;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use trustformers_api::health::{Health, Verdict};
use trustformers_proto::control::v1::RouteTable;

use crate::dice::Dice;
use crate::drain::Drain;
use crate::intake::ALL_BODIES_BYTES;
use crate::metrics::Metrics;
use crate::routing::Routing;
use crate::table::{Table, TableError, Version};

/// A table as it came over the wire, to be kept on disk.
pub(crate) type EncodedTable = Option<Arc<Vec<u8>>>;

/// Shared by all requests.
#[derive(Debug)]
pub(crate) struct Gateway {
    /// Every figure.
    pub(crate) metrics: Metrics,
    /// Every choice.
    pub(crate) dice: Dice,
    /// Whether it is leaving.
    pub(crate) drain: Arc<Drain>,
    /// Memory for requests' bodies, in bytes.
    pub(crate) bodies: Arc<Semaphore>,
    /// Longest body of one request.
    pub(crate) body_limit_bytes: usize,
    started: Instant,
    routing: ArcSwapOption<Routing>,
    /// Tables are compared and put in force one at a time.
    taking: Mutex<()>,
    in_force: watch::Sender<Option<Version>>,
    fresh: watch::Sender<EncodedTable>,
    readiness: watch::Sender<Verdict>,
    /// Whether the table in force is what the operator says now, and not what it said before it was lost.
    current: AtomicBool,
}

/// What became of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taken {
    /// It is in force.
    InForce(Version),
    /// It is the one in force already.
    Same(Version),
    /// One that is newer is in force.
    Stale {
        /// What came.
        offered: Version,
        /// What is in force.
        in_force: Version,
    },
}

/// Where a table came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// The operator's feed: it is kept on disk once in force.
    Feed,
    /// The disk, which it was written to at this time.
    Disk(SystemTime),
}

impl Gateway {
    /// No table, nothing in flight.
    pub(crate) fn new(metrics: Metrics, dice: Dice, body_limit_bytes: usize) -> Arc<Self> {
        Arc::new(Self {
            metrics,
            dice,
            drain: Drain::new(),
            bodies: Arc::new(Semaphore::new(ALL_BODIES_BYTES)),
            body_limit_bytes,
            started: Instant::now(),
            routing: ArcSwapOption::empty(),
            taking: Mutex::default(),
            in_force: watch::Sender::new(None),
            fresh: watch::Sender::new(None),
            readiness: watch::Sender::new(Verdict::no("no routing table has come from the operator yet")),
            current: AtomicBool::new(false),
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

    /// Tells of each table that is put in force.
    pub(crate) fn watch_version(&self) -> watch::Receiver<Option<Version>> {
        self.in_force.subscribe()
    }

    /// Tells of each table that is to be kept on disk.
    pub(crate) fn watch_fresh(&self) -> watch::Receiver<EncodedTable> {
        self.fresh.subscribe()
    }

    /// From now on the gateway is leaving.
    pub(crate) fn leave(&self) {
        self.drain.leave();
        self.tell_readiness();
    }

    /// A table that comes while leaving must not make the gateway ready again, so both are always looked at.
    fn tell_readiness(&self) {
        let verdict = match (self.drain.is_leaving(), self.version()) {
            (true, _) => Verdict::no("the gateway was asked to end"),
            (false, None) => return,
            (false, Some(version)) => Verdict::yes(format!("routing table {version} is in force")),
        };
        self.readiness.send_replace(verdict);
    }

    /// Whether the table in force is what the operator says now. While it is not, a model that it lacks may exist.
    pub(crate) fn is_current(&self) -> bool {
        self.current.load(Ordering::Relaxed)
    }

    /// Notes whether the table in force is what the operator says now.
    pub(crate) fn set_current(&self, current: bool) {
        self.current.store(current, Ordering::Relaxed);
    }

    /// Time since the table in force was received.
    pub(crate) fn table_age(&self) -> Option<Duration> {
        let routing = self.routing()?;
        // A clock that was set back makes it new, not an error.
        Some(routing.received_at.elapsed().unwrap_or_default())
    }

    /// Puts a table in force if it is newer than the one there is.
    ///
    /// # Errors
    /// Names what in the table can't be used; the one in force stays.
    pub(crate) fn take(&self, table: RouteTable, source: Source) -> Result<Taken, TableError> {
        let _one_at_a_time = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        let offered = table.version.ok_or(TableError::NoVersion)?;
        let offered = Version { term: offered.term, counter: offered.counter };
        if let Some(in_force) = self.version().filter(|in_force| *in_force >= offered) {
            return Ok(if in_force == offered {
                Taken::Same(in_force)
            } else {
                Taken::Stale { offered, in_force }
            });
        }
        let encoded = table.encode_to_vec();
        let parsed = Table::parse(table)?;
        let received_at = match source {
            Source::Feed => SystemTime::now(),
            Source::Disk(written_at) => written_at,
        };
        let before = self.routing();
        let routing = Routing::build(parsed, received_at, before.as_deref(), (&self.metrics, &self.dice));
        self.routing.store(Some(Arc::new(routing)));
        self.in_force.send_replace(Some(offered));
        self.tell_readiness();
        if source == Source::Feed {
            self.fresh.send_replace(Some(Arc::new(encoded)));
        }
        Ok(Taken::InForce(offered))
    }
}

impl Health for Gateway {
    /// It holds no state that a restart would mend.
    fn liveness(&self) -> Verdict {
        Verdict::yes("the gateway runs")
    }

    fn startup(&self) -> Verdict {
        if self.version().is_some() {
            Verdict::yes("a routing table has come")
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
        Gateway::new(Metrics::new(Registry::new()).unwrap(), Dice::seeded(1), 1 << 20)
    }

    fn table(term: u64, counter: u64) -> RouteTable {
        TableText::new(term, counter)
            .route("default/a", &["a"])
            .backend("r1", 1, &[endpoint_at("p", 1)])
            .wire()
    }

    #[test]
    fn only_a_higher_table_is_taken() {
        let gateway = gateway();
        assert!(!gateway.readiness().borrow().ok);
        let version = |term, counter| Version { term, counter };
        assert_eq!(gateway.take(table(2, 5), Source::Feed), Ok(Taken::InForce(version(2, 5))));
        assert!(gateway.readiness().borrow().ok);
        for (term, counter) in [(2, 4), (1, 9), (0, 0)] {
            let stale = Taken::Stale { offered: version(term, counter), in_force: version(2, 5) };
            assert_eq!(gateway.take(table(term, counter), Source::Feed), Ok(stale));
        }
        assert_eq!(gateway.take(table(2, 5), Source::Feed), Ok(Taken::Same(version(2, 5))));
        assert_eq!(gateway.take(table(3, 0), Source::Feed), Ok(Taken::InForce(version(3, 0))));
        assert_eq!(gateway.version(), Some(version(3, 0)));
        assert_eq!(gateway.routing().unwrap().table.version, version(3, 0));
    }

    #[test]
    fn a_bad_table_leaves_the_good_one() {
        let gateway = gateway();
        gateway.take(table(1, 1), Source::Feed).unwrap();
        let mut bad = table(1, 2);
        bad.routes[0].backends[0].endpoints[0].address = "nowhere".to_owned();
        assert!(gateway.take(bad, Source::Feed).is_err());
        assert_eq!(gateway.version(), Some(Version { term: 1, counter: 1 }));
    }

    #[test]
    fn a_table_from_disk_is_not_written_again_and_keeps_its_age() {
        let gateway = gateway();
        let fresh = gateway.watch_fresh();
        let written_at = SystemTime::now() - Duration::from_secs(100);
        gateway.take(table(1, 1), Source::Disk(written_at)).unwrap();
        assert!(!fresh.has_changed().unwrap());
        assert!(gateway.table_age().unwrap() >= Duration::from_secs(100));
        gateway.take(table(1, 2), Source::Feed).unwrap();
        assert!(fresh.has_changed().unwrap());
    }

    #[test]
    fn leaving_is_not_ready() {
        let gateway = gateway();
        gateway.take(table(1, 1), Source::Feed).unwrap();
        gateway.leave();
        assert!(!gateway.readiness().borrow().ok);
        gateway.take(table(1, 2), Source::Feed).unwrap();
        assert!(!gateway.readiness().borrow().ok);
    }
}
