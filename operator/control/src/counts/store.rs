//! The last report of each gateway process, and their sum.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use trustformers_proto::control::v1::{HeldRequests, RevisionCounts};

use super::Counts;

/// One revision of one route.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct SeriesKey {
    /// The route's name: `namespace/name`.
    pub route: String,
    /// The revision.
    pub revision: String,
}

/// A process that reports no more has ended after this time: its sums are added to those of all that ended.
/// A gateway that is cut off and comes back earlier loses nothing.
pub const PROCESS_ENDED: Duration = Duration::from_secs(3600);
/// The sums of ended processes are kept for this long after the last was added: longer than any rollout
/// looks back.
const ENDED_KEPT: Duration = Duration::from_secs(24 * 3600);
/// A process that comes back after [`PROCESS_ENDED`] reports everything within this time.
const COMES_BACK: Duration = Duration::from_secs(3);
/// Ids of ended processes that are remembered, of 36 bytes: at one restart a minute those of three days.
const ENDED_IDS: usize = 4096;

/// What a report says.
#[derive(Debug, Clone, Copy)]
pub struct Reported<'a> {
    /// Sums that have changed.
    pub counts: &'a [RevisionCounts],
    /// Requests that are held now.
    pub held: &'a [HeldRequests],
}

/// What one process has reported.
#[derive(Debug, Default)]
struct Process {
    reported: Duration,
    /// Requests that it holds, by route.
    held: BTreeMap<String, u64>,
    /// By the number that the process gave them: a series that it forgot and began anew has another one.
    series: BTreeMap<(SeriesKey, u64), Counts>,
    /// It ended, as it seemed, and came back at this time.
    came_back: Option<Duration>,
    /// What was added to the sums of ended processes already, of one that came back.
    counted_before: BTreeMap<(SeriesKey, u64), Counts>,
}

/// Sums of processes that ended.
#[derive(Debug, Default)]
struct Ended {
    counts: Counts,
    /// When the last was added.
    added: Duration,
}

/// The sums of all gateways, for as long as one operator leads. Times are on the leader's clock.
///
/// A series takes some 2 KB (two histograms of 30 buckets), for each process that has it: 1,000 models of two
/// revisions behind three gateways take 12 MB.
#[derive(Debug, Default)]
pub struct CountStore {
    processes: BTreeMap<String, Process>,
    ended: BTreeMap<SeriesKey, Ended>,
    /// The oldest first.
    ended_ids: VecDeque<String>,
}

impl CountStore {
    /// Records what a process reports at `now`: each series replaces what it reported of it before, and the
    /// requests that it holds replace those of before.
    pub fn report(&mut self, process: &str, report: Reported<'_>, now: Duration) {
        let came_back = self.ended_ids.iter().any(|id| id == process);
        let process = self
            .processes
            .entry(process.to_owned())
            .or_insert_with(|| Process { came_back: came_back.then_some(now), ..Process::default() });
        process.reported = now;
        let repeats = process.came_back.is_some_and(|at| now.saturating_sub(at) < COMES_BACK);
        process.held = report.held.iter().map(|held| (held.route.clone(), held.count)).collect();
        for wire in report.counts {
            let key = SeriesKey { route: wire.route.clone(), revision: wire.revision.clone() };
            let (numbered, counts) = ((key, wire.series), Counts::from(wire));
            if repeats && !process.series.contains_key(&numbered) {
                // What it counted while it was cut off is lost, rather than counted twice.
                process.counted_before.insert(numbered.clone(), counts.clone());
            }
            process.series.insert(numbered, counts);
        }
    }

    /// What all gateways have counted of a revision. The sums do not decrease while any gateway counts it.
    #[must_use]
    pub fn of(&self, key: &SeriesKey) -> Counts {
        let mut sum = self.ended.get(key).map(|ended| ended.counts.clone()).unwrap_or_default();
        for process in self.processes.values() {
            process.add_to(&mut sum, key);
        }
        sum
    }

    /// What each process has counted of a revision since it started, by its id. A process that ended is there
    /// for [`PROCESS_ENDED`]. The sums of one process do not decrease while this store lives.
    #[must_use]
    pub fn by_process(&self, key: &SeriesKey) -> BTreeMap<String, Counts> {
        let counted = self.processes.iter().filter(|(_, process)| process.has(key));
        let sum = |process: &Process| {
            process.of(key).fold(Counts::default(), |mut sum, (_, counts)| {
                sum.merge(counts);
                sum
            })
        };
        counted.map(|(id, process)| (id.clone(), sum(process))).collect()
    }

    /// Attempts on a revision that have not ended, of the processes that reported within `fresh` of `now`.
    #[must_use]
    pub fn in_flight(&self, key: &SeriesKey, now: Duration, fresh: Duration) -> u64 {
        let live = self.processes.values().filter(|process| now.saturating_sub(process.reported) < fresh);
        live.map(|process| {
            let mut sum = Counts::default();
            process.add_to(&mut sum, key);
            sum.unfinished()
        })
        .sum()
    }

    /// Requests that wait for a pod of a route, at the processes that reported within `fresh` of `now`.
    #[must_use]
    pub fn held(&self, route: &str, now: Duration, fresh: Duration) -> u64 {
        let live = self.processes.values().filter(|process| now.saturating_sub(process.reported) < fresh);
        live.filter_map(|process| process.held.get(route)).sum()
    }

    /// Every revision that was counted.
    #[must_use]
    pub fn keys(&self) -> Vec<SeriesKey> {
        let live = self.processes.values().flat_map(|process| process.series.keys().map(|(key, _)| key));
        let mut keys: Vec<SeriesKey> = live.chain(self.ended.keys()).cloned().collect();
        keys.sort();
        keys.dedup();
        keys
    }

    /// Adds the processes that ended by `now` to one sum, and forgets sums that nobody looks back to.
    pub fn sweep(&mut self, now: Duration) {
        let silent = |process: &Process| now.saturating_sub(process.reported) >= PROCESS_ENDED;
        let ids: Vec<String> =
            self.processes.iter().filter(|(_, process)| silent(process)).map(|(id, _)| id.clone()).collect();
        for id in ids {
            let Some(process) = self.processes.remove(&id) else { continue };
            for (key, _) in process.series.keys() {
                self.ended.entry(key.clone()).or_default().added = now;
            }
            for (numbered, counts) in &process.series {
                let more = process.counted_before.get(numbered).map(|before| counts.since(before));
                if let Some(ended) = self.ended.get_mut(&numbered.0) {
                    ended.counts.merge(more.as_ref().unwrap_or(counts));
                }
            }
            if !self.ended_ids.contains(&id) {
                self.ended_ids.push_back(id);
            }
        }
        while self.ended_ids.len() > ENDED_IDS {
            self.ended_ids.pop_front();
        }
        let live = |key: &SeriesKey| self.processes.values().any(|process| process.has(key));
        self.ended.retain(|key, ended| now.saturating_sub(ended.added) < ENDED_KEPT || live(key));
    }
}

impl Process {
    fn of<'a>(&'a self, key: &'a SeriesKey) -> impl Iterator<Item = (&'a (SeriesKey, u64), &'a Counts)> {
        self.series.range((key.clone(), 0)..=(key.clone(), u64::MAX))
    }

    fn has(&self, key: &SeriesKey) -> bool {
        self.of(key).next().is_some()
    }

    fn add_to(&self, sum: &mut Counts, key: &SeriesKey) {
        for (numbered, counts) in self.of(key) {
            match self.counted_before.get(numbered) {
                Some(before) => sum.merge(&counts.since(before)),
                None => sum.merge(counts),
            }
        }
    }
}
