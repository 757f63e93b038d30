//! The public keys with which the cluster signs tokens, and their issuer: with them pods recognise the
//! operator on their admin port.
//!
//! They are read from the API server when a lead starts, every ten minutes, and when a pod refused a token.
//! A change is written into the ConfigMap of every pool; no pod restarts.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::Request;
use kube::{Client, ResourceExt};
use serde_json::Value;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use trustformers_control::build::PodAccess;

use crate::context::Context;
use crate::queue::Lane;

/// A JSON Web Key Set with the public keys of the cluster.
pub const KEYS_PATH: &str = "/openid/v1/jwks";
/// The discovery document, which names the issuer.
pub const DISCOVERY_PATH: &str = "/.well-known/openid-configuration";
/// A cluster publishes a new key long before it signs with it.
const PERIOD: Duration = Duration::from_secs(600);
/// After a failure, and at least between two readings.
const PAUSE: Duration = Duration::from_secs(30);
/// How long a lead waits for the keys before it starts without them: then ConfigMaps keep those that they
/// have.
const FIRST_LIMIT: Duration = Duration::from_secs(10);

/// Why the keys could not be read.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// The request failed.
    #[error(
        "{path}: {cause}; bind the ClusterRole system:service-account-issuer-discovery to the operator's account"
    )]
    Request {
        /// What was asked for.
        path: &'static str,
        /// What failed.
        cause: Box<kube::Error>,
    },
    /// The answer is not what the path stands for.
    #[error("{path}: the answer has no {field}")]
    Malformed {
        /// What was asked for.
        path: &'static str,
        /// What is missing.
        field: &'static str,
    },
}

/// What was read last.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct PublishedKeys {
    issuer: Option<String>,
    keys: Option<String>,
}

/// The keys as they were read last, and the wish to read them again.
#[derive(Debug, Default)]
pub struct ClusterKeys {
    present: Mutex<PublishedKeys>,
    doubted: Notify,
}

impl ClusterKeys {
    /// How pods recognise the account.
    #[must_use]
    pub fn access(&self, subject: &str) -> PodAccess {
        let PublishedKeys { issuer, keys } = self.lock().clone();
        PodAccess { subject: subject.to_owned(), issuer, keys }
    }

    /// A pod refused a token: the keys may have changed.
    pub fn doubt(&self) {
        self.doubted.notify_one();
    }

    /// Replaces what was read. True if it changed.
    fn replace(&self, read: PublishedKeys) -> bool {
        let mut present = self.lock();
        let changed = *present != read;
        *present = read;
        changed
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, PublishedKeys> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads the keys before anything is written that has them. A cluster that does not give them is no reason
/// not to lead.
pub async fn read_first(context: &Context) {
    if context.settings.identity.is_none() {
        return;
    }
    let read = async {
        loop {
            match read(&context.client).await {
                Ok(read) => break context.cluster_keys.replace(read),
                Err(error) => {
                    tracing::warn!(%error, "the cluster's keys could not be read; it is tried again");
                }
            }
            sleep(Duration::from_secs(1)).await;
        }
    };
    if timeout(FIRST_LIMIT, read).await.is_err() {
        tracing::error!("leading without the cluster's keys: new pods cannot be changed while they run");
    }
}

/// Follows the keys without end.
pub async fn run(context: Arc<Context>) {
    if context.settings.identity.is_none() {
        return std::future::pending().await;
    }
    let mut is_known = context.cluster_keys.access("").keys.is_some();
    loop {
        sleep(PAUSE).await;
        if is_known {
            // The pause above bounds how often a doubt is followed.
            let _ = timeout(PERIOD - PAUSE, context.cluster_keys.doubted.notified()).await;
        }
        match read(&context.client).await {
            Ok(read) => {
                is_known = true;
                if context.cluster_keys.replace(read) {
                    tracing::info!("the cluster's keys changed; the ConfigMaps of all pools follow");
                    for model in context.models.state() {
                        let (namespace, name) = (model.namespace().unwrap_or_default(), model.name_any());
                        context.request(&namespace, &name, Lane::Status);
                    }
                }
            }
            Err(error) => {
                is_known = false;
                tracing::warn!(%error, "the cluster's keys stay as they were read last");
            }
        }
    }
}

async fn read(client: &Client) -> Result<PublishedKeys, KeysError> {
    let keys = get(client, KEYS_PATH).await?;
    if keys["keys"].as_array().is_none_or(Vec::is_empty) {
        return Err(KeysError::Malformed { path: KEYS_PATH, field: "keys" });
    }
    let discovery = get(client, DISCOVERY_PATH).await?;
    let issuer = discovery["issuer"].as_str();
    let issuer = issuer.ok_or(KeysError::Malformed { path: DISCOVERY_PATH, field: "issuer" })?;
    Ok(PublishedKeys { issuer: Some(issuer.to_owned()), keys: Some(keys.to_string()) })
}

async fn get(client: &Client, path: &'static str) -> Result<Value, KeysError> {
    let failed = |cause| KeysError::Request { path, cause: Box::new(cause) };
    let request = Request::get(path).body(Vec::new());
    let request = request.map_err(|error| failed(kube::Error::HttpError(error)))?;
    client.request::<Value>(request).await.map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use http::StatusCode;
    use serde_json::json;

    use crate::context::tests::{identity, metrics, settings};
    use crate::context::{NewContext, Settings};
    use crate::testing::mock_client;

    fn context(client: Client) -> NewContext {
        Context::create(client, Settings { identity: Some(identity()), ..settings() }, metrics())
    }

    #[tokio::test(start_paused = true)]
    async fn keys_and_issuer_come_from_the_api_server_and_follow_it_when_a_pod_doubts_them() {
        let readings = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&readings);
        let client = mock_client(move |request| match request.uri.path() {
            KEYS_PATH => match count.fetch_add(1, Ordering::SeqCst) {
                0 => (StatusCode::SERVICE_UNAVAILABLE, json!({})),
                number => (StatusCode::OK, json!({"keys": [{"kid": format!("k{number}")}]})),
            },
            DISCOVERY_PATH => (StatusCode::OK, json!({"issuer": "https://cluster"})),
            other => panic!("{other}"),
        });
        let context = context(client).context;
        read_first(&context).await;
        let access = context.platform().admin.unwrap();
        assert_eq!(access.issuer.as_deref(), Some("https://cluster"));
        assert_eq!(access.keys.as_deref(), Some(r#"{"keys":[{"kid":"k1"}]}"#));
        assert_eq!(access.subject, identity().subject());
        let following = tokio::spawn(run(Arc::clone(&context)));
        context.cluster_keys.doubt();
        while !context.platform().admin.unwrap().keys.unwrap().contains("k2") {
            sleep(PAUSE).await;
        }
        assert_eq!(readings.load(Ordering::SeqCst), 3);
        following.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn an_operator_leads_without_keys_that_the_cluster_does_not_give() {
        let client = mock_client(|_| (StatusCode::FORBIDDEN, json!({"kind": "Status", "code": 403})));
        let context = context(client).context;
        read_first(&context).await;
        assert_eq!(context.platform().admin.unwrap().keys, None);
    }

    #[tokio::test]
    async fn without_an_identity_nothing_is_asked() {
        let client = mock_client(|request| panic!("{request:?}"));
        let context = Context::create(client, settings(), metrics()).context;
        read_first(&context).await;
        assert_eq!(context.platform().admin, None);
    }
}
