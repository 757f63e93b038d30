//! Carries out leader election on a Lease; the rules are in `trustformers_control::lease`.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::time::{Instant, sleep, timeout};
use trustformers_control::lease::{Election, LEASE, RENEW_EVERY, Record, Step};

/// Name of the Lease.
pub const LEASE_NAME: &str = "trustformers-operator";

/// Longest wait for one request, so that a hanging one cannot outlast the lease.
const REQUEST_LIMIT: Duration = Duration::from_secs(2);

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
                Step::Take { transitions } => match self.write(&self.identity.clone(), transitions).await {
                    Ok(()) => {}
                    // Another candidate was faster.
                    Err(LeaseError::Request(kube::Error::Api(said))) if said.code == 409 => {}
                    Err(error) => {
                        tracing::warn!(%error, "the lead could not be taken; it is tried again");
                        sleep(RENEW_EVERY).await;
                    }
                },
                Step::Wait(pause) => sleep(pause).await,
                Step::Renew | Step::StepDown => {}
            }
            if let Some(term) = self.election.term() {
                return term;
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
                        if self.read().await.is_err() {
                            sleep(Duration::from_millis(500)).await;
                        }
                    }
                }
                Step::Wait(pause) => sleep(pause).await,
                Step::StepDown | Step::Take { .. } => {
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
