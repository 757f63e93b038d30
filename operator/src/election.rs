//! Leader election on a Lease: the requests. The rules are in `trustformers_control::lease`.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use trustformers_control::lease::{Election, LEASE, RENEW_EVERY, Record, Step, first_term};

use crate::requests::LEASE_LIMIT;

/// Name of the Lease.
pub const LEASE_NAME: &str = trustformers_crds::names::OPERATOR_LEASE;

/// A pause after a failed renewal: several attempts fit before the deadline.
const RETRY: Duration = Duration::from_millis(500);

/// Why the Lease could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// The API server refused or could not be reached.
    #[error("Lease {LEASE_NAME}: {0}")]
    Request(#[from] kube::Error),
    /// The API server did not answer.
    #[error("Lease {LEASE_NAME}: no answer within {} s", LEASE_LIMIT.as_secs())]
    TimedOut,
}

/// Takes part in the election.
pub struct Candidate {
    leases: Api<Lease>,
    identity: String,
    election: Election,
    began: Instant,
    /// The Lease as it was last read or written. A write replaces this version only.
    stored: Option<Lease>,
}

impl Candidate {
    /// A candidate in `namespace`. Each process needs its own `identity`: a restarted process is another
    /// candidate.
    #[must_use]
    pub fn new(client: Client, namespace: &str, identity: String) -> Self {
        Self {
            leases: Api::namespaced(client, namespace),
            election: Election::new(identity.clone()),
            identity,
            began: Instant::now(),
            stored: None,
        }
    }

    /// Waits until this candidate leads; returns its term. `reached` is called whenever the API server
    /// responds.
    pub async fn lead(&mut self, mut reached: impl FnMut()) -> u64 {
        loop {
            if let Err(error) = self.read().await {
                tracing::warn!(%error, "the Lease could not be read; it is tried again");
                sleep(RENEW_EVERY).await;
                continue;
            }
            reached();
            match self.election.step(self.now()) {
                Step::Create => self.acquire(first_term(Timestamp::now().as_second())).await,
                Step::Acquire { transitions } => self.acquire(transitions).await,
                Step::Wait(pause) => sleep(pause).await,
                Step::Renew | Step::StepDown => {}
            }
            if let Some(term) = self.election.term() {
                return term;
            }
        }
    }

    async fn acquire(&mut self, term: u64) {
        match self.write(&self.identity.clone(), term).await {
            Ok(()) => {}
            // Another candidate was faster.
            Err(LeaseError::Request(kube::Error::Api(status))) if status.code == 409 => {}
            Err(error) => {
                tracing::warn!(%error, "the lease could not be acquired; it is tried again");
                sleep(RENEW_EVERY).await;
            }
        }
    }

    /// Renews the lease until the lead is lost; returns why. It returns at [`Election::deadline`] at the
    /// latest, whatever request is in flight then.
    pub async fn keep(&mut self) -> String {
        let mut reason = "another candidate holds the lease".to_owned();
        loop {
            let Some(deadline) = self.election.deadline() else { return reason };
            let step = timeout_at(self.began + deadline, self.renew(&mut reason)).await;
            if !matches!(step, Ok(true)) {
                self.election.stepped_down();
                return reason;
            }
        }
    }

    /// One step of a leader: waits or renews. False when it no longer leads.
    async fn renew(&mut self, reason: &mut String) -> bool {
        match self.election.step(self.now()) {
            Step::Renew => {
                let term = self.election.term().unwrap_or_default();
                if let Err(error) = self.write(&self.identity.clone(), term).await {
                    tracing::warn!(%error, "the lease could not be renewed; it is tried again");
                    *reason = error.to_string();
                    // The read shows whether this candidate still holds it.
                    sleep(RETRY).await;
                    if let Err(error) = self.read().await {
                        tracing::warn!(%error, "the lease could not be read");
                    }
                }
                true
            }
            Step::Wait(pause) => {
                sleep(pause).await;
                true
            }
            Step::StepDown | Step::Acquire { .. } | Step::Create => false,
        }
    }

    /// Releases the lease, so that another candidate acquires it at once.
    pub async fn release(&mut self) {
        let Some(term) = self.election.term() else { return };
        if let Err(error) = self.write("", term).await {
            tracing::warn!(%error, "the lease could not be released; it expires by itself");
        }
        self.election.stepped_down();
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    async fn read(&mut self) -> Result<(), LeaseError> {
        let stored = timeout(LEASE_LIMIT, self.leases.get_opt(LEASE_NAME))
            .await
            .map_err(|_| LeaseError::TimedOut)??;
        let now = self.now();
        self.election.record_read(stored.as_ref().map(record), now);
        self.stored = stored;
        Ok(())
    }

    async fn write(&mut self, holder: &str, transitions: u64) -> Result<(), LeaseError> {
        let sent = self.now();
        let lease = self.lease(holder, transitions);
        let params = PostParams::default();
        let request = async {
            match &self.stored {
                Some(_) => self.leases.replace(LEASE_NAME, &params, &lease).await,
                None => self.leases.create(&params, &lease).await,
            }
        };
        let stored = timeout(LEASE_LIMIT, request).await.map_err(|_| LeaseError::TimedOut)??;
        self.election.record_write(record(&stored), sent);
        self.stored = Some(stored);
        Ok(())
    }

    /// The Lease to write, with the version that it replaces.
    fn lease(&self, holder: &str, transitions: u64) -> Lease {
        let now = MicroTime(Timestamp::now());
        let before = self.stored.as_ref().and_then(|lease| lease.spec.as_ref());
        let renewal =
            before.is_some_and(|spec| spec.holder_identity.as_deref() == Some(self.identity.as_str()));
        let acquired = before.and_then(|spec| spec.acquire_time.clone()).filter(|_| renewal);
        Lease {
            metadata: ObjectMeta {
                name: Some(LEASE_NAME.to_owned()),
                resource_version: self
                    .stored
                    .as_ref()
                    .and_then(|lease| lease.metadata.resource_version.clone()),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(holder.to_owned()),
                lease_duration_seconds: i32::try_from(LEASE.as_secs()).ok(),
                lease_transitions: i32::try_from(transitions).ok(),
                acquire_time: acquired.or_else(|| Some(now.clone())),
                renew_time: Some(now),
                ..LeaseSpec::default()
            }),
        }
    }
}

fn record(lease: &Lease) -> Record {
    let spec = lease.spec.clone().unwrap_or_default();
    Record {
        holder: spec.holder_identity.unwrap_or_default(),
        transitions: spec.lease_transitions.and_then(|number| u64::try_from(number).ok()).unwrap_or(0),
        renewed: spec.renew_time.map(|time| time.0.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::{Arc, Mutex};

    use http::{Method, Request, StatusCode};
    use kube::client::Body;
    use serde_json::{Value, json};
    use tower::service_fn;
    use trustformers_control::lease::RENEW_DEADLINE;

    use super::*;
    use crate::testing::{MockRequest, read, respond};

    /// An API server that stores one Lease, with versions.
    #[derive(Clone, Default)]
    struct LeaseServer(Arc<Mutex<StoredLease>>);

    #[derive(Default)]
    struct StoredLease {
        lease: Option<Value>,
        version: u64,
        fault: Option<Fault>,
    }

    /// What is wrong with the API server.
    #[derive(Clone, Copy, PartialEq)]
    enum Fault {
        Fails,
        Hangs,
    }

    impl LeaseServer {
        fn client(&self) -> Client {
            let server = self.clone();
            let service = service_fn(move |request: Request<Body>| {
                let server = server.clone();
                async move {
                    let fault = server.0.lock().unwrap().fault;
                    if fault == Some(Fault::Hangs) {
                        std::future::pending::<()>().await;
                    }
                    let (code, body) = server.answer(read(request).await);
                    Ok::<_, Infallible>(respond(StatusCode::from_u16(code).unwrap(), &body))
                }
            });
            Client::new(service, "default")
        }

        fn answer(&self, request: MockRequest) -> (u16, Value) {
            let MockRequest { method, body: mut lease, .. } = request;
            let mut stored = self.0.lock().unwrap();
            let failure = |code: u16| {
                let reason = if code == 404 { "NotFound" } else { "Conflict" };
                (
                    code,
                    json!({"kind": "Status", "status": "Failure", "code": code, "message": "no", "reason": reason}),
                )
            };
            if stored.fault.is_some() {
                return failure(500);
            }
            if method == Method::GET {
                return stored.lease.clone().map_or_else(|| failure(404), |lease| (200, lease));
            }
            if method == Method::PUT && stored.lease.is_none() {
                return failure(404);
            }
            let version = stored.lease.as_ref().map(|lease| lease["metadata"]["resourceVersion"].clone());
            if version.is_some_and(|version| version != lease["metadata"]["resourceVersion"]) {
                return failure(409);
            }
            stored.version += 1;
            lease["metadata"]["resourceVersion"] = json!(stored.version.to_string());
            stored.lease = Some(lease.clone());
            (200, lease)
        }

        fn delete_lease(&self) {
            self.0.lock().unwrap().lease = None;
        }

        fn set_fault(&self, fault: Option<Fault>) {
            self.0.lock().unwrap().fault = fault;
        }

        fn holder(&self) -> String {
            self.0.lock().unwrap().lease.as_ref().unwrap()["spec"]["holderIdentity"]
                .as_str()
                .unwrap()
                .to_owned()
        }
    }

    fn candidate(server: &LeaseServer, name: &str) -> Candidate {
        Candidate::new(server.client(), "sys", name.to_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_leader_is_followed_by_another_in_a_later_term() {
        let server = LeaseServer::default();
        let (mut one, mut two) = (candidate(&server, "one"), candidate(&server, "two"));
        let first = one.lead(|| {}).await;
        // The first one does nothing more, as when its node is lost.
        let started = Instant::now();
        assert_eq!(two.lead(|| {}).await, first + 1);
        assert!(
            started.elapsed() >= LEASE && started.elapsed() < LEASE + RENEW_EVERY,
            "{:?}",
            started.elapsed()
        );
        // When it continues, it finds that it lost the lead.
        let reason = one.keep().await;
        assert!(!reason.is_empty());
        assert_eq!(server.holder(), "two");
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_keeps_its_lease_while_it_lives() {
        let server = LeaseServer::default();
        let (mut one, mut two) = (candidate(&server, "one"), candidate(&server, "two"));
        one.lead(|| {}).await;
        tokio::select! {
            why = one.keep() => panic!("the lead was lost: {why}"),
            term = two.lead(|| {}) => panic!("it was taken in term {term}"),
            () = sleep(LEASE * 6) => {}
        }
        assert_eq!(server.holder(), "one");
    }

    #[tokio::test(start_paused = true)]
    async fn a_released_lease_is_acquired_at_the_next_read() {
        let server = LeaseServer::default();
        let (mut one, mut two) = (candidate(&server, "one"), candidate(&server, "two"));
        let first = one.lead(|| {}).await;
        one.release().await;
        assert_eq!(server.holder(), "");
        let started = Instant::now();
        assert_eq!(two.lead(|| {}).await, first + 1);
        assert!(started.elapsed() < RENEW_EVERY);
    }

    #[tokio::test(start_paused = true)]
    async fn a_deleted_lease_ends_the_lead_and_the_next_term_is_later() {
        let server = LeaseServer::default();
        let mut one = candidate(&server, "one");
        let first = one.lead(|| {}).await;
        server.delete_lease();
        one.keep().await;
        let second = one.lead(|| {}).await;
        // The wall clock stands still in this test; in a cluster, this takes seconds.
        assert!(second >= first && second > 1_700_000_000, "{first} {second}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_lead_ends_at_its_deadline_while_requests_hang() {
        let server = LeaseServer::default();
        let mut one = candidate(&server, "one");
        let started = Instant::now();
        one.lead(|| {}).await;
        server.set_fault(Some(Fault::Hangs));
        one.keep().await;
        assert!(started.elapsed() <= RENEW_DEADLINE, "{:?}", started.elapsed());
        assert!(one.election.term().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn two_candidates_never_lead_at_the_same_time() {
        let server = LeaseServer::default();
        let (mut one, mut two) = (candidate(&server, "one"), candidate(&server, "two"));
        let first = one.lead(|| {}).await;
        // The leader's requests hang from now on, and those of the other candidate do not.
        let other = LeaseServer(Arc::new(Mutex::new(StoredLease {
            lease: server.0.lock().unwrap().lease.clone(),
            version: 100,
            fault: None,
        })));
        two.leases = Api::namespaced(other.client(), "sys");
        server.set_fault(Some(Fault::Hangs));
        let led_until = async {
            one.keep().await;
            Instant::now()
        };
        let leads_from = async {
            assert_eq!(two.lead(|| {}).await, first + 1);
            Instant::now()
        };
        let (led_until, leads_from) = tokio::join!(led_until, leads_from);
        assert!(led_until < leads_from, "{:?}", led_until.duration_since(leads_from));
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_that_cannot_reach_the_api_server_steps_down() {
        let server = LeaseServer::default();
        let mut one = candidate(&server, "one");
        let first = one.lead(|| {}).await;
        let started = Instant::now();
        server.set_fault(Some(Fault::Fails));
        let why = one.keep().await;
        assert!(started.elapsed() <= RENEW_DEADLINE);
        assert!(why.contains("no"), "{why}");
        // A short outage does not end the lead.
        server.set_fault(None);
        assert_eq!(one.lead(|| {}).await, first + 1);
        server.set_fault(Some(Fault::Fails));
        let healed = server.clone();
        tokio::spawn(async move {
            sleep(Duration::from_secs(3)).await;
            healed.set_fault(None);
        });
        tokio::select! {
            why = one.keep() => panic!("the lead was lost: {why}"),
            () = sleep(LEASE * 2) => {}
        }
    }
}
