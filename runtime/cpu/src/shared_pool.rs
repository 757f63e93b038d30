//! The threads of the processor, shared by the models on it: fair by time ([`crate::arbiter`]).

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, ThreadId},
    time::{Duration, Instant},
};

use crate::{
    arbiter::{Arbiter, ClientId, Decision},
    pool::Pool,
};

/// The threads, and who waits for them.
pub(crate) struct SharedPool {
    threads: usize,
    /// Locked by the model that computes.
    pool: Mutex<Pool>,
    arbiter: Mutex<Arbiter<ThreadId>>,
    /// Notified when a model arrives or releases the threads.
    changed: Condvar,
    created: Instant,
}

impl SharedPool {
    pub(crate) fn new(pool: Pool) -> Arc<Self> {
        Arc::new(Self {
            threads: pool.threads(),
            pool: Mutex::new(pool),
            arbiter: Mutex::new(Arbiter::new()),
            changed: Condvar::new(),
            created: Instant::now(),
        })
    }

    /// How many threads there are.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    fn arbiter(&self) -> MutexGuard<'_, Arbiter<ThreadId>> {
        self.arbiter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.created.elapsed()
    }
}

/// One model's share of the threads.
pub(crate) struct PoolClient {
    shared: Arc<SharedPool>,
    id: ClientId,
}

impl PoolClient {
    pub(crate) fn new(shared: Arc<SharedPool>) -> Arc<Self> {
        let id = shared.arbiter().register();
        Arc::new(Self { shared, id })
    }

    /// How many threads there are.
    pub(crate) fn threads(&self) -> usize {
        self.shared.threads
    }

    /// Waits for the threads.
    pub(crate) fn acquire(&self) -> PoolGuard<'_> {
        let shared = &*self.shared;
        let mut arbiter = shared.arbiter();
        arbiter.arrive(self.id, thread::current().id(), shared.now());
        shared.changed.notify_all();
        loop {
            let now = shared.now();
            match arbiter.start(self.id, now) {
                Decision::Compute => break,
                Decision::Wait => {
                    arbiter = shared.changed.wait(arbiter).unwrap_or_else(PoisonError::into_inner);
                }
                Decision::WaitUntil(until) => {
                    let timeout = until.saturating_sub(now);
                    let waited = shared.changed.wait_timeout(arbiter, timeout);
                    arbiter = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
        drop(arbiter);
        PoolGuard { pool: shared.pool.lock().unwrap_or_else(PoisonError::into_inner), shared }
    }
}

impl Drop for PoolClient {
    fn drop(&mut self) {
        self.shared.arbiter().remove(self.id);
        self.shared.changed.notify_all();
    }
}

/// The threads, while a model has them.
pub(crate) struct PoolGuard<'a> {
    pool: MutexGuard<'a, Pool>,
    shared: &'a SharedPool,
}

impl Deref for PoolGuard<'_> {
    type Target = Pool;

    fn deref(&self) -> &Pool {
        &self.pool
    }
}

impl DerefMut for PoolGuard<'_> {
    fn deref_mut(&mut self) -> &mut Pool {
        &mut self.pool
    }
}

impl Drop for PoolGuard<'_> {
    fn drop(&mut self) {
        self.shared.arbiter().release(self.shared.now());
        self.shared.changed.notify_all();
    }
}
