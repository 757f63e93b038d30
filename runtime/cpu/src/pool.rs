//! The threads of a step: each runs the whole plan on its share of the rows and meets the others at barriers.
//!
//! Work is split statically, so no queue is on the path. Workers spin only while a step runs (they meet several times
//! per layer, microseconds apart) and are parked between steps: an idle server uses no processor. The caller's thread
//! is one of them.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use std::sync::{Condvar, Mutex, PoisonError};

/// Spins before a waiting thread offers its processor to others. Longer than the skew between threads that all run
/// (about a microsecond), far shorter than the scheduler's slice when they share one.
const SPINS_BEFORE_YIELD: u32 = 2_000;

/// A thread of the step failed; the others stop at their next barrier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Aborted;

/// Where the threads of a step meet.
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

    /// Waits until every thread of the step is here; what each wrote before is then visible to all.
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

/// What a thread does in one step: its number and the barrier.
type Task<'a> = dyn Fn(usize, &Barrier) -> Result<(), Aborted> + Sync + 'a;

/// A task whose lifetime has been erased; valid until every worker has reported the step's end.
#[derive(Clone, Copy)]
struct TaskPtr(*const Task<'static>);
// SAFETY: the pointee is `Sync`, and `Pool::run` keeps it alive until all workers are done with it.
unsafe impl Send for TaskPtr {}

/// What workers wait for.
struct Slot {
    step: u64,
    task: Option<TaskPtr>,
    stop: bool,
}

struct Shared {
    barrier: Barrier,
    slot: Mutex<Slot>,
    wake: Condvar,
    running: AtomicUsize,
}

/// The workers. Dropping it ends them.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool of `threads`, of which the caller of [`Pool::run`] is one.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub(crate) fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            barrier: Barrier::new(threads),
            slot: Mutex::new(Slot { step: 0, task: None, stop: false }),
            wake: Condvar::new(),
            running: AtomicUsize::new(0),
        });
        let mut pool = Self { shared, workers: Vec::new() };
        for number in 1..threads {
            let shared = pool.shared.clone();
            let builder = std::thread::Builder::new().name(format!("cpu-{number}"));
            pool.workers.push(builder.spawn(move || worker(&shared, number))?);
        }
        Ok(pool)
    }

    /// Threads, the caller's included.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task` on every thread and returns when all have ended.
    ///
    /// # Errors
    /// [`Aborted`] when a thread panicked; the pool can be used again.
    pub(crate) fn run(&mut self, task: &Task<'_>) -> Result<(), Aborted> {
        let shared = &*self.shared;
        shared.running.store(self.workers.len(), Ordering::Relaxed);
        if !self.workers.is_empty() {
            let mut slot = shared.slot.lock().unwrap_or_else(PoisonError::into_inner);
            slot.step += 1;
            // SAFETY: only the lifetime changes; this function does not return before `running` is zero.
            slot.task =
                Some(TaskPtr(unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) }));
            drop(slot);
            shared.wake.notify_all();
        }
        let mut result = guarded(shared, task, 0);
        let mut spins = 0u32;
        while shared.running.load(Ordering::Acquire) > 0 {
            spins = spins.wrapping_add(1);
            if spins.is_multiple_of(SPINS_BEFORE_YIELD) {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        if shared.barrier.aborted.swap(false, Ordering::Relaxed) {
            shared.barrier.arrived.store(0, Ordering::Relaxed);
            result = Err(Aborted);
        }
        result
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.slot.lock().unwrap_or_else(PoisonError::into_inner).stop = true;
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches its panics, so there is nothing to report here.
            let _ = worker.join();
        }
    }
}

fn guarded(shared: &Shared, task: &Task<'_>, number: usize) -> Result<(), Aborted> {
    let result = catch_unwind(AssertUnwindSafe(|| task(number, &shared.barrier))).unwrap_or(Err(Aborted));
    if result.is_err() {
        shared.barrier.aborted.store(true, Ordering::Relaxed);
    }
    result
}

fn worker(shared: &Shared, number: usize) {
    let mut seen = 0;
    loop {
        let mut slot = shared.slot.lock().unwrap_or_else(PoisonError::into_inner);
        while slot.step == seen && !slot.stop {
            slot = shared.wake.wait(slot).unwrap_or_else(PoisonError::into_inner);
        }
        if slot.stop {
            return;
        }
        seen = slot.step;
        let task = slot.task;
        drop(slot);
        if let Some(TaskPtr(task)) = task {
            // SAFETY: `Pool::run` set it for this step and waits for `running` before it lets go of the task.
            let _ = guarded(shared, unsafe { &*task }, number);
        }
        shared.running.fetch_sub(1, Ordering::Release);
    }
}

/// The part of `0..total` that thread `number` of `threads` takes: contiguous, sizes differing by at most one.
pub(crate) fn share(total: usize, threads: usize, number: usize) -> std::ops::Range<usize> {
    total * number / threads..total * (number + 1) / threads
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_runs_and_sees_what_the_others_wrote() {
        for threads in [1, 2, 3, 5] {
            let mut pool = Pool::new(threads).unwrap();
            assert_eq!(pool.threads(), threads);
            for _ in 0..50 {
                let cells: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
                let seen = AtomicUsize::new(0);
                pool.run(&|number, barrier| {
                    for round in 1..=4 {
                        cells[number].store(round, Ordering::Relaxed);
                        barrier.wait()?;
                        let all = cells.iter().all(|cell| cell.load(Ordering::Relaxed) == round);
                        seen.fetch_add(usize::from(all), Ordering::Relaxed);
                        barrier.wait()?;
                    }
                    Ok(())
                })
                .unwrap();
                assert_eq!(seen.into_inner(), 4 * threads);
            }
        }
    }

    #[test]
    fn a_panic_ends_the_step_and_not_the_pool() {
        let mut pool = Pool::new(3).unwrap();
        for culprit in 0..3 {
            let result = pool.run(&|number, barrier| {
                assert!(number != culprit, "on purpose");
                barrier.wait()
            });
            assert_eq!(result, Err(Aborted));
            assert_eq!(pool.run(&|_, barrier| barrier.wait()), Ok(()));
        }
    }

    #[test]
    fn shares_cover_everything_once() {
        for total in 0..40 {
            for threads in 1..7 {
                let parts: Vec<_> = (0..threads).map(|n| share(total, threads, n)).collect();
                assert_eq!(
                    parts.iter().cloned().flatten().collect::<Vec<_>>(),
                    (0..total).collect::<Vec<_>>()
                );
                let sizes = parts.iter().map(ExactSizeIterator::len);
                assert!(sizes.clone().max().unwrap() - sizes.min().unwrap() <= 1);
            }
        }
    }
}
