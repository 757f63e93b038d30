//! Which model computes next, where several share the threads: the one that has used less time. A pure core,
//! which is told the time.
//!
//! A model that has used less than the one that waits is expected back for a moment after each of its steps:
//! its host needs that moment to prepare the next one. Without it a model of long steps would always be first
//! again, and a model of short ones would get one step for each of them. Nobody waits for a model whose host
//! is the one that asks, as that of a model and its draft model is.

use std::{collections::BTreeMap, time::Duration};

/// How long a model is expected back. The host takes less between two steps; where nothing comes, a step of
/// another model begins this much later, once.
const EXPECTED_BACK: Duration = Duration::from_millis(1);

/// A model that has not computed for so long starts again beside the others: with no credit and no debt.
const IDLE: Duration = Duration::from_millis(100);

/// A model that shares the threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ClientId(u64);

/// What a model uses.
#[derive(Debug)]
struct Usage<H> {
    used: Duration,
    is_waiting: bool,
    /// When it last released the threads.
    released: Option<Duration>,
    /// Who let it compute last.
    host: Option<H>,
}

/// Whether a model that waits may compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    Compute,
    /// Not before another one has released the threads.
    Wait,
    /// Not before this time, unless another one arrives.
    WaitUntil(Duration),
}

/// All models that share the threads, whose hosts are threads of their own. Times are measured from any fixed
/// moment.
#[derive(Debug)]
pub(crate) struct Arbiter<H> {
    next_id: u64,
    clients: BTreeMap<ClientId, Usage<H>>,
    /// The model that computes, and since when.
    computing: Option<(ClientId, Duration)>,
}

impl<H: Copy + PartialEq> Arbiter<H> {
    pub(crate) fn new() -> Self {
        Self { next_id: 0, clients: BTreeMap::new(), computing: None }
    }

    pub(crate) fn register(&mut self) -> ClientId {
        let id = ClientId(self.next_id);
        self.next_id += 1;
        let usage = Usage { used: Duration::ZERO, is_waiting: false, released: None, host: None };
        self.clients.insert(id, usage);
        id
    }

    pub(crate) fn remove(&mut self, id: ClientId) {
        self.clients.remove(&id);
    }

    /// A model wants to compute, asked by `host`.
    pub(crate) fn arrive(&mut self, id: ClientId, host: H, now: Duration) {
        let is_active = |other: &ClientId, usage: &Usage<H>| {
            self.computing.is_some_and(|(computing, _)| computing == *other)
                || usage.is_waiting
                || usage.released.is_some_and(|released| now < released + IDLE)
        };
        let others = self.clients.iter().filter(|(other, usage)| **other != id && is_active(other, usage));
        let least = others.map(|(_, usage)| usage.used).min();
        let Some(own) = self.clients.get_mut(&id) else { return };
        let was_idle = own.released.is_none_or(|released| now >= released + IDLE);
        if let (true, Some(least)) = (was_idle, least) {
            own.used = least;
        }
        own.is_waiting = true;
        own.host = Some(host);
    }

    /// Whether a model that arrived may compute now; if so, it does.
    pub(crate) fn start(&mut self, id: ClientId, now: Duration) -> Decision {
        let Some(own) = self.clients.get(&id) else { return Decision::Compute };
        if self.computing.is_some() {
            return Decision::Wait;
        }
        let less = |(other, usage): &(&ClientId, &Usage<H>)| (usage.used, **other) < (own.used, id);
        let others = || self.clients.iter().filter(less);
        if others().any(|(_, usage)| usage.is_waiting) {
            return Decision::Wait;
        }
        let elsewhere = others().filter(|(_, usage)| usage.host != own.host);
        let expected = elsewhere.filter_map(|(_, usage)| Some(usage.released? + EXPECTED_BACK));
        if let Some(until) = expected.filter(|until| *until > now).max() {
            return Decision::WaitUntil(until);
        }
        self.computing = Some((id, now));
        if let Some(own) = self.clients.get_mut(&id) {
            own.is_waiting = false;
        }
        Decision::Compute
    }

    /// The model that computes releases the threads.
    pub(crate) fn release(&mut self, now: Duration) {
        let Some((id, since)) = self.computing.take() else { return };
        if let Some(own) = self.clients.get_mut(&id) {
            own.used += now.saturating_sub(since);
            own.released = Some(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    /// A model in a simulation.
    struct Simulated {
        id: ClientId,
        step: Duration,
        /// Between two steps.
        host: Duration,
        /// When it wants to compute next.
        arrives: Duration,
        has_arrived: bool,
        computed: Duration,
    }

    /// Runs models, given as microseconds of a step and of the host, until `end`; returns what each computed.
    fn simulate(models: &[(u64, u64, u64)], end: Duration) -> Vec<Duration> {
        let mut arbiter = Arbiter::new();
        let mut models: Vec<Simulated> = models
            .iter()
            .map(|(step, host, first)| Simulated {
                id: arbiter.register(),
                step: us(*step),
                host: us(*host),
                arrives: us(*first),
                has_arrived: false,
                computed: Duration::ZERO,
            })
            .collect();
        let mut now = Duration::ZERO;
        while now < end {
            for model in models.iter_mut().filter(|model| !model.has_arrived && model.arrives <= now) {
                arbiter.arrive(model.id, model.id, now);
                model.has_arrived = true;
            }
            let mut next = end;
            let mut started = None;
            for (index, model) in models.iter().enumerate() {
                if !model.has_arrived {
                    next = next.min(model.arrives);
                    continue;
                }
                match arbiter.start(model.id, now) {
                    Decision::Compute => {
                        started = Some(index);
                        break;
                    }
                    Decision::Wait => {}
                    Decision::WaitUntil(until) => next = next.min(until),
                }
            }
            match started {
                Some(index) => {
                    let model = &mut models[index];
                    let finish = now + model.step;
                    // Others arrive while it computes.
                    for other in models.iter_mut().filter(|o| !o.has_arrived && o.arrives <= finish) {
                        arbiter.arrive(other.id, other.id, other.arrives.max(now));
                        other.has_arrived = true;
                    }
                    now = finish;
                    arbiter.release(now);
                    let model = &mut models[index];
                    (model.computed, model.arrives) = (model.computed + model.step, now + model.host);
                    model.has_arrived = false;
                }
                None => now = next,
            }
        }
        models.iter().map(|model| model.computed).collect()
    }

    #[test]
    fn models_of_long_and_short_steps_get_the_same_time() {
        let end = Duration::from_secs(20);
        let shares = simulate(&[(40_000, 300, 0), (4000, 300, 0)], end);
        let ratio = shares[0].as_secs_f64() / shares[1].as_secs_f64();
        assert!((0.95..1.05).contains(&ratio), "{shares:?}");
        let all: Duration = shares.iter().sum();
        assert!(all.as_secs_f64() > 0.9 * end.as_secs_f64(), "the threads idle: {shares:?}");
    }

    #[test]
    fn a_host_never_waits_for_its_own_other_model() {
        let mut arbiter = Arbiter::new();
        let (model, draft) = (arbiter.register(), arbiter.register());
        arbiter.arrive(model, "host", us(0));
        assert_eq!(arbiter.start(model, us(0)), Decision::Compute);
        arbiter.release(us(5000));
        arbiter.arrive(draft, "host", us(5000));
        assert_eq!(arbiter.start(draft, us(5000)), Decision::Compute);
        arbiter.release(us(5100));
        arbiter.arrive(model, "host", us(5100));
        assert_eq!(arbiter.start(model, us(5100)), Decision::Compute);
        arbiter.release(us(10_000));
        // The model of another host has used less than both and is next.
        let other = arbiter.register();
        arbiter.arrive(draft, "host", us(10_000));
        assert_eq!(arbiter.start(draft, us(10_000)), Decision::Compute);
        arbiter.arrive(other, "other", us(10_050));
        assert_eq!(arbiter.start(other, us(10_050)), Decision::Wait);
        arbiter.release(us(10_100));
        assert_eq!(arbiter.start(other, us(10_100)), Decision::Compute);
    }

    #[test]
    fn a_model_that_is_alone_waits_for_nobody() {
        let shares = simulate(&[(5000, 0, 0), (5000, 0, 100_000_000)], Duration::from_secs(1));
        assert_eq!(shares, [Duration::from_secs(1), Duration::ZERO]);
    }

    #[test]
    fn a_model_that_was_idle_has_neither_credit_nor_debt() {
        // The second one arrives after nine seconds and gets half of the last one.
        let shares = simulate(&[(5000, 100, 0), (5000, 100, 9_000_000)], Duration::from_secs(10));
        assert!((0.45..0.55).contains(&shares[1].as_secs_f64()), "{shares:?}");
        // The first one pauses for two seconds after each step of three seconds, and then begins the next.
        let shares = simulate(&[(3_000_000, 2_000_000, 0), (5000, 100, 0)], Duration::from_secs(60));
        assert!((0.35..0.45).contains(&(shares[1].as_secs_f64() / 60.0)), "{shares:?}");
    }

    #[test]
    fn a_model_of_rare_steps_is_served_next() {
        // Of three, one computes 2 ms in each 50 ms: it gets all of it.
        let shares = simulate(&[(8000, 200, 0), (8000, 200, 0), (2000, 48_000, 0)], Duration::from_secs(10));
        assert!(shares[2].as_secs_f64() > 0.8 * 0.4, "{shares:?}");
    }
}
