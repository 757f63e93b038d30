//! Carries out leader election on a Lease; the rules are in `trustformers_control::lease`.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::time::{Instant, sleep, timeout};
use trustformers_control::lease::{Election, LEASE, RENEW_EVERY, Record, Step, first_term};

/// Name of the Lease.
pub const LEASE_NAME: &str = "trustformers-operator";

/// Longest wait for one request, so that a hanging one cannot outlast the lease.
const REQUEST_LIMIT: Duration = Duration::from_secs(2);

/// A pause after a renewal that failed: several attempts fit before the deadline.
const RETRY: Duration = Duration::from_millis(500);

/// Why the Lease could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// The API server refused or could not be reached.
    #[error("Lease {LEASE_NAME}: {0}")]
    Request(#[from] kube::Error),
    /// The API server did not answer.
    #[error("Lease {LEASE_NAME}: no answer within {} s", REQUEST_LIMIT.as_secs())]
    TimedOut,
}

/// Takes part in the election.
pub struct Candidate {
    leases: Api<Lease>,
    identity: String,
    election: Election,
    began: Instant,
    /// The Lease as last read or written, to be replaced only where nobody changed it since.
    stored: Option<Lease>,
}

impl Candidate {
    /// A candidate in `namespace`. `identity` is of this process alone: a restarted one is another candidate.
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

    /// Waits until this candidate leads; returns its term. `reached` is called whenever the API server answered.
    pub async fn lead(&mut self, mut reached: impl FnMut()) -> u64 {
        loop {
            if let Err(error) = self.read().await {
                tracing::warn!(%error, "the leader cannot be told; it is tried again");
                sleep(RENEW_EVERY).await;
                continue;
            }
            reached();
            match self.election.step(self.now()) {
                Step::Make => self.take(first_term(Timestamp::now().as_second())).await,
                Step::Take { transitions } => self.take(transitions).await,
                Step::Wait(pause) => sleep(pause).await,
                Step::Renew | Step::StepDown => {}
            }
            if let Some(term) = self.election.term() {
                return term;
            }
        }
    }

    async fn take(&mut self, term: u64) {
        match self.write(&self.identity.clone(), term).await {
            Ok(()) => {}
            // Another candidate was faster.
            Err(LeaseError::Request(kube::Error::Api(said))) if said.code == 409 => {}
            Err(error) => {
                tracing::warn!(%error, "the lead could not be taken; it is tried again");
                sleep(RENEW_EVERY).await;
            }
        }
    }

    /// Renews the lease until the lead is lost; returns why.
    pub async fn keep(&mut self) -> String {
        let mut trouble = "somebody else holds the lease".to_owned();
        loop {
            match self.election.step(self.now()) {
                Step::Renew => {
                    let term = self.election.term().unwrap_or_default();
                    if let Err(error) = self.write(&self.identity.clone(), term).await {
                        tracing::warn!(%error, "the lease could not be renewed; it is tried again");
                        trouble = error.to_string();
                        // The next look shows whether it is still ours.
                        sleep(RETRY).await;
                        if let Err(error) = self.read().await {
                            tracing::warn!(%error, "the lease could not be read");
                        }
                    }
                }
                Step::Wait(pause) => sleep(pause).await,
                Step::StepDown | Step::Take { .. } | Step::Make => {
                    self.election.stepped_down();
                    return trouble;
                }
            }
        }
    }

    /// Gives the lease back, so that another candidate takes it at once.
    pub async fn release(&mut self) {
        let Some(term) = self.election.term() else { return };
        if let Err(error) = self.write("", term).await {
            tracing::warn!(%error, "the lease could not be given back; it runs out by itself");
        }
        self.election.stepped_down();
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    async fn read(&mut self) -> Result<(), LeaseError> {
        let stored = timeout(REQUEST_LIMIT, self.leases.get_opt(LEASE_NAME))
            .await
            .map_err(|_| LeaseError::TimedOut)??;
        let now = self.now();
        self.election.saw(stored.as_ref().map(record), now);
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
        let stored = timeout(REQUEST_LIMIT, request).await.map_err(|_| LeaseError::TimedOut)??;
        self.election.wrote(record(&stored), sent);
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

    use http::{Method, Request, Response, StatusCode};
    use http_body_util::BodyExt;
    use kube::client::Body;
    use serde_json::{Value, json};
    use tower::service_fn;

    use super::*;

    /// An API server that holds one Lease, with versions, and can be out of reach.
    #[derive(Clone, Default)]
    struct Server(Arc<Mutex<Shelf>>);

    #[derive(Default)]
    struct Shelf {
        lease: Option<Value>,
        version: u64,
        away: bool,
    }

    impl Server {
        fn client(&self) -> Client {
            let server = self.clone();
            let service = service_fn(move |request: Request<Body>| {
                let server = server.clone();
                async move {
                    let method = request.method().clone();
                    let bytes = request.into_body().collect().await.unwrap().to_bytes();
                    let (code, body) = server.answer(&method, &bytes);
                    let body = Body::from(serde_json::to_vec(&body).unwrap());
                    let response = Response::builder().status(StatusCode::from_u16(code).unwrap()).body(body);
                    Ok::<_, Infallible>(response.unwrap())
                }
            });
            Client::new(service, "default")
        }

        fn answer(&self, method: &Method, bytes: &[u8]) -> (u16, Value) {
            let mut shelf = self.0.lock().unwrap();
            let failure = |code: u16| {
                let reason = if code == 404 { "NotFound" } else { "Conflict" };
                (
                    code,
                    json!({"kind": "Status", "status": "Failure", "code": code, "message": "no", "reason": reason}),
                )
            };
            if shelf.away {
                return failure(500);
            }
            if *method == Method::GET {
                return shelf.lease.clone().map_or_else(|| failure(404), |lease| (200, lease));
            }
            if *method == Method::PUT && shelf.lease.is_none() {
                return failure(404);
            }
            let mut lease: Value = serde_json::from_slice(bytes).unwrap();
            let known = shelf.lease.as_ref().map(|lease| lease["metadata"]["resourceVersion"].clone());
            if known.is_some_and(|known| known != lease["metadata"]["resourceVersion"]) {
                return failure(409);
            }
            shelf.version += 1;
            lease["metadata"]["resourceVersion"] = json!(shelf.version.to_string());
            shelf.lease = Some(lease.clone());
            (200, lease)
        }

        fn lose_the_lease(&self) {
            self.0.lock().unwrap().lease = None;
        }

        fn away(&self, away: bool) {
            self.0.lock().unwrap().away = away;
        }

        fn holder(&self) -> String {
            self.0.lock().unwrap().lease.as_ref().unwrap()["spec"]["holderIdentity"]
                .as_str()
                .unwrap()
                .to_owned()
        }
    }

    fn candidate(server: &Server, name: &str) -> Candidate {
        Candidate::new(server.client(), "sys", name.to_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_leader_is_followed_by_another_in_a_later_term() {
        let server = Server::default();
        let (mut one, mut two) = (candidate(&server, "one"), candidate(&server, "two"));
        let first = one.lead(|| {}).await;
        // The first one says nothing more, as when its node is lost.
        let began = Instant::now();
        assert_eq!(two.lead(|| {}).await, first + 1);
        assert!(began.elapsed() >= LEASE && began.elapsed() < LEASE + RENEW_EVERY, "{:?}", began.elapsed());
        // When it comes back, it finds that it lost the lead.
        let why = one.keep().await;
        assert!(!why.is_empty());
        assert_eq!(server.holder(), "two");
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_keeps_its_lease_while_it_lives() {
        let server = Server::default();
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
    async fn a_released_lease_is_taken_at_the_next_look() {
        let server = Server::default();
        let (mut one, mut two) = (candidate(&server, "one"), candidate(&server, "two"));
        let first = one.lead(|| {}).await;
        one.release().await;
        assert_eq!(server.holder(), "");
        let began = Instant::now();
        assert_eq!(two.lead(|| {}).await, first + 1);
        assert!(began.elapsed() < RENEW_EVERY);
    }

    #[tokio::test(start_paused = true)]
    async fn a_deleted_lease_ends_the_lead_and_the_next_term_is_later_all_the_same() {
        let server = Server::default();
        let mut one = candidate(&server, "one");
        let first = one.lead(|| {}).await;
        server.lose_the_lease();
        one.keep().await;
        let second = one.lead(|| {}).await;
        // The wall clock stands still in this test; in a cluster, losing and making the lease takes seconds.
        assert!(second >= first && second > 1_700_000_000, "{first} {second}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_out_of_reach_of_the_api_server_steps_down_in_time() {
        let server = Server::default();
        let mut one = candidate(&server, "one");
        let first = one.lead(|| {}).await;
        let began = Instant::now();
        server.away(true);
        let why = one.keep().await;
        assert!(began.elapsed() <= trustformers_control::lease::RENEW_DEADLINE + Duration::from_secs(1));
        assert!(why.contains("no"), "{why}");
        // A short trouble is survived.
        server.away(false);
        assert_eq!(one.lead(|| {}).await, first + 1);
        server.away(true);
        let healed = server.clone();
        tokio::spawn(async move {
            sleep(Duration::from_secs(3)).await;
            healed.away(false);
        });
        tokio::select! {
            why = one.keep() => panic!("the lead was lost: {why}"),
            () = sleep(LEASE * 2) => {}
        }
    }
}
