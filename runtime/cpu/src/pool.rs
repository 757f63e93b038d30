//! The threads of a step: each runs the whole plan on its share of the rows and synchronises with the others
//! at barriers.
//!
//! Work is split statically, so there is no queue. Workers spin only while a step runs (barriers are
//! microseconds apart) and sleep between steps, so that an idle server uses no processor. The caller's thread
//! is one of the threads.

use std::{
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use std::sync::{Condvar, Mutex, PoisonError};

/// Spins before a waiting thread yields its processor. They take longer than the skew between threads that
/// all run (about a microsecond) and far less than a time slice of the scheduler.
const SPINS_BEFORE_YIELD: u32 = 2_000;

/// A thread of the step failed; the others stop at their next barrier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Aborted;

/// A barrier that an aborted step releases.
pub(crate) struct Barrier {
    threads: usize,
    arrived: AtomicUsize,
    round: AtomicUsize,
    aborted: AtomicBool,
}

impl Barrier {
    fn new(threads: usize) -> Self {
        let (arrived, round) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Self { threads, arrived, round, aborted: AtomicBool::new(false) }
    }

    /// Waits until every thread of the step has called it; the earlier writes of each are then visible to
    /// all.
    ///
    /// # Errors
    /// [`Aborted`] when another thread failed.
    pub(crate) fn wait(&self) -> Result<(), Aborted> {
        if self.threads == 1 {
            return Ok(());
        }
        let round = self.round.load(Ordering::Relaxed);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.threads {
            self.arrived.store(0, Ordering::Relaxed);
            self.round.store(round.wrapping_add(1), Ordering::Release);
            return Ok(());
        }
        let mut spins = 0;
        while self.round.load(Ordering::Acquire) == round {
            if self.aborted.load(Ordering::Relaxed) {
                return Err(Aborted);
            }
            spins += 1;
            if spins % SPINS_BEFORE_YIELD == 0 {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        Ok(())
    }
}

/// The function that every thread of a step runs, with its number and the barrier.
type Job<'a> = dyn Fn(usize, &Barrier) -> Result<(), Aborted> + Sync + 'a;

/// A job whose lifetime has been erased; valid until every worker has reported the step's end.
#[derive(Clone, Copy)]
struct JobPtr(*const Job<'static>);
// SAFETY: the pointee is `Sync`, and `Pool::run` keeps it alive until all workers are done with it.
unsafe impl Send for JobPtr {}

/// The step that workers wait for.
struct Assignment {
    step: u64,
    job: Option<JobPtr>,
    stop: bool,
}

struct PoolState {
    barrier: Barrier,
    assignment: Mutex<Assignment>,
    wake: Condvar,
    running: AtomicUsize,
}

/// The worker threads. Dropping it ends them.
pub(crate) struct Pool {
    state: Arc<PoolState>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool of `threads`, of which the caller of [`Pool::run`] is one.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub(crate) fn new(threads: usize) -> std::io::Result<Self> {
        let state = Arc::new(PoolState {
            barrier: Barrier::new(threads),
            assignment: Mutex::new(Assignment { step: 0, job: None, stop: false }),
            wake: Condvar::new(),
            running: AtomicUsize::new(0),
        });
        let mut pool = Self { state, workers: Vec::new() };
        for number in 1..threads {
            let state = pool.state.clone();
            let builder = std::thread::Builder::new().name(format!("cpu-{number}"));
            pool.workers.push(builder.spawn(move || worker(&state, number))?);
        }
        Ok(pool)
    }

    /// Threads, the caller's included.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `job` on every thread and returns when all have ended.
    ///
    /// # Errors
    /// [`Aborted`] when a thread panicked; the pool can be used again.
    pub(crate) fn run(&mut self, job: &Job<'_>) -> Result<(), Aborted> {
        let state = &*self.state;
        state.running.store(self.workers.len(), Ordering::Relaxed);
        if !self.workers.is_empty() {
            let mut assignment = state.assignment.lock().unwrap_or_else(PoisonError::into_inner);
            assignment.step += 1;
            // SAFETY: only the lifetime changes; this function returns after `running` is zero.
            assignment.job =
                Some(JobPtr(unsafe { std::mem::transmute::<*const Job<'_>, *const Job<'static>>(job) }));
            drop(assignment);
            state.wake.notify_all();
        }
        let mut result = guarded(state, job, 0);
        let mut spins = 0u32;
        while state.running.load(Ordering::Acquire) > 0 {
            spins = spins.wrapping_add(1);
            if spins.is_multiple_of(SPINS_BEFORE_YIELD) {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        if state.barrier.aborted.swap(false, Ordering::Relaxed) {
            state.barrier.arrived.store(0, Ordering::Relaxed);
            result = Err(Aborted);
        }
        result
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.state.assignment.lock().unwrap_or_else(PoisonError::into_inner).stop = true;
        self.state.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches its panics, so `join` cannot fail.
            let _ = worker.join();
        }
    }
}

fn guarded(state: &PoolState, job: &Job<'_>, number: usize) -> Result<(), Aborted> {
    let result = catch_unwind(AssertUnwindSafe(|| job(number, &state.barrier))).unwrap_or(Err(Aborted));
    if result.is_err() {
        state.barrier.aborted.store(true, Ordering::Relaxed);
    }
    result
}

fn worker(state: &PoolState, number: usize) {
    let mut last_step = 0;
    loop {
        let mut assignment = state.assignment.lock().unwrap_or_else(PoisonError::into_inner);
        while assignment.step == last_step && !assignment.stop {
            assignment = state.wake.wait(assignment).unwrap_or_else(PoisonError::into_inner);
        }
        if assignment.stop {
            return;
        }
        last_step = assignment.step;
        let job = assignment.job;
        drop(assignment);
        if let Some(JobPtr(job)) = job {
            // SAFETY: `Pool::run` set it for this step and waits for `running` before the job ends.
            let _ = guarded(state, unsafe { &*job }, number);
        }
        state.running.fetch_sub(1, Ordering::Release);
    }
}

/// The share of `0..total` of thread `number` of `threads`: contiguous, with sizes that differ by at most
/// one.
pub(crate) fn share(total: usize, threads: usize, number: usize) -> Range<usize> {
    total * number / threads..total * (number + 1) / threads
}

/// An item of work: pieces of equal cost, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pieces {
    pub(crate) count: usize,
    /// Of one piece, in any unit.
    pub(crate) cost: usize,
}

impl Pieces {
    /// The cost of all pieces.
    pub(crate) const fn work(self) -> usize {
        self.count * self.cost
    }
}

/// One thread's pieces of an item.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Dealt {
    pub(crate) pieces: Range<usize>,
    /// Whether several threads have pieces of this item.
    pub(crate) is_split: bool,
}

/// Divides items of different cost among the threads: each gets adjacent items and pieces of about the same
/// cost. An item is split only where that matters. Every thread deals the same items in the same order, and
/// so knows the shares of all.
#[derive(Debug)]
pub(crate) struct Dealer {
    total: usize,
    threads: usize,
    /// The thread that gets the next piece.
    thread: usize,
    /// Cost of the items that were dealt.
    before: usize,
}

/// Items of at most this part of a thread's share are not split.
const WHOLE_ITEMS_PER_SHARE: usize = 16;

impl Dealer {
    /// For items that cost `total` together.
    pub(crate) const fn new(total: usize, threads: usize) -> Self {
        Self { total, threads, thread: 0, before: 0 }
    }

    /// Deals the next item; returns the pieces of thread `number`.
    pub(crate) fn deal(&mut self, item: Pieces, number: usize) -> Dealt {
        let (mut first, end) = (0, self.before + item.work());
        let mut dealt = Dealt { pieces: 0..0, is_split: false };
        loop {
            let limit = self.total * (self.thread + 1) / self.threads;
            let takes_rest = limit >= end || self.thread + 1 == self.threads;
            let last = if takes_rest { item.count } else { self.cut(item, limit - self.before) };
            if self.thread == number {
                dealt.pieces = first..last;
            }
            if takes_rest {
                break;
            }
            dealt.is_split |= last > 0 && last < item.count;
            first = last;
            self.thread += 1;
        }
        self.before = end;
        dealt
    }

    /// The piece of an item that is nearest to `cost` from its start.
    fn cut(&self, item: Pieces, cost: usize) -> usize {
        if item.work() * WHOLE_ITEMS_PER_SHARE <= self.total / self.threads {
            return if 2 * cost >= item.work() { item.count } else { 0 };
        }
        ((cost + item.cost / 2) / item.cost).min(item.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_see_each_others_writes_after_a_barrier() {
        for threads in [1, 2, 3, 5] {
            let mut pool = Pool::new(threads).unwrap();
            assert_eq!(pool.threads(), threads);
            for _ in 0..50 {
                let cells: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
                let observed = AtomicUsize::new(0);
                pool.run(&|number, barrier| {
                    for round in 1..=4 {
                        cells[number].store(round, Ordering::Relaxed);
                        barrier.wait()?;
                        let all = cells.iter().all(|cell| cell.load(Ordering::Relaxed) == round);
                        observed.fetch_add(usize::from(all), Ordering::Relaxed);
                        barrier.wait()?;
                    }
                    Ok(())
                })
                .unwrap();
                assert_eq!(observed.into_inner(), 4 * threads);
            }
        }
    }

    #[test]
    fn a_panic_ends_the_step_but_not_the_pool() {
        let mut pool = Pool::new(3).unwrap();
        for panicking in 0..3 {
            let result = pool.run(&|number, barrier| {
                assert!(number != panicking, "on purpose");
                barrier.wait()
            });
            assert_eq!(result, Err(Aborted));
            assert_eq!(pool.run(&|_, barrier| barrier.wait()), Ok(()));
        }
    }

    #[test]
    fn shares_partition_the_total() {
        for total in 0..40 {
            for threads in 1..7 {
                let shares: Vec<_> = (0..threads).map(|n| share(total, threads, n)).collect();
                assert_eq!(
                    shares.iter().cloned().flatten().collect::<Vec<_>>(),
                    (0..total).collect::<Vec<_>>()
                );
                let sizes = shares.iter().map(ExactSizeIterator::len);
                assert!(sizes.clone().max().unwrap() - sizes.min().unwrap() <= 1);
            }
        }
    }

    /// The pieces that each thread gets of each item.
    fn deal(items: &[Pieces], threads: usize) -> Vec<Vec<Dealt>> {
        let total = items.iter().map(|item| item.work()).sum();
        let of = |number| {
            let mut dealer = Dealer::new(total, threads);
            items.iter().map(|item| dealer.deal(*item, number)).collect()
        };
        (0..threads).map(of).collect()
    }

    #[test]
    fn dealt_pieces_partition_every_item() {
        let mut number = 1u64;
        let mut random = |below: usize| {
            number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (number >> 33) as usize % below
        };
        for threads in 1..9 {
            for count in 0..30 {
                let items: Vec<Pieces> =
                    (0..count).map(|_| Pieces { count: random(70), cost: 1 + random(16) }).collect();
                let shares = deal(&items, threads);
                for (i, item) in items.iter().enumerate() {
                    let pieces: Vec<usize> = shares.iter().flat_map(|own| own[i].pieces.clone()).collect();
                    assert_eq!(pieces, (0..item.count).collect::<Vec<_>>(), "{items:?} on {threads}");
                    let owners = shares.iter().filter(|own| !own[i].pieces.is_empty()).count();
                    assert!(shares.iter().all(|own| own[i].is_split == (owners > 1)));
                }
                let splits = shares[0].iter().filter(|dealt| dealt.is_split).count();
                assert!(splits < threads, "{splits} tiles are split, there is room for {}", threads - 1);
            }
        }
    }

    #[test]
    fn one_long_item_is_shared_and_short_ones_stay_whole() {
        // Three heads of a sequence of 64 chunks and of three sequences of 4 chunks.
        let items: Vec<Pieces> =
            [64, 64, 64, 4, 4, 4, 4, 4, 4, 4, 4, 4].map(|count| Pieces { count, cost: 7 }).to_vec();
        let work = |own: &[Dealt]| own.iter().map(|dealt| dealt.pieces.len()).sum::<usize>();
        let shares = deal(&items, 2);
        assert_eq!(shares.iter().map(|own| work(own)).collect::<Vec<_>>(), [114, 114]);
        assert_eq!(shares[0].iter().map(|dealt| dealt.is_split).position(|split| split), Some(1));
        // Many items of one piece: none can be split, and the shares differ by at most one.
        let items = vec![Pieces { count: 1, cost: 5 }; 33];
        let shares = deal(&items, 4);
        assert!(shares.iter().all(|own| (8..=9).contains(&work(own))));
        assert!(shares.iter().flatten().all(|dealt| !dealt.is_split));
    }
}
