//! The operator's tokens for pods, one for the pods of each namespace.
//!
//! A pod is sent the token with each request, and whoever may start a pod with a model's labels reads it.
//! So a token is made for the pods of one namespace alone: elsewhere its audience is refused. The API server
//! issues it for the operator's own account (TokenRequest) when it is needed first. It is used until four
//! fifths of its life have passed.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::time::Instant;
use tonic::metadata::{Ascii, MetadataValue};
use trustformers_control::names;

use crate::pod_admin::Identity;

/// Life of a token that is asked for. The API server may give a shorter one, of ten minutes at least.
const LIFE_S: i64 = 3600;
/// A token that a pod refused is kept for this long, so that refusals ask for one in a minute at most.
const KEPT_WHEN_REFUSED: Duration = Duration::from_secs(60);

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The API server issued none.
    #[error(
        "the operator got no token for {audience}: {cause}; allow its account to create serviceaccounts/token \
         of itself, as the chart's Role does"
    )]
    Refused {
        /// For whom it was to be.
        audience: String,
        /// What failed.
        cause: Box<kube::Error>,
    },
    /// The API server's answer has no token.
    #[error("the operator got no token for {0}: the API server's answer has none")]
    Missing(String),
}

/// A token, and how long it is used.
#[derive(Debug, Clone)]
struct IssuedToken {
    header: MetadataValue<Ascii>,
    issued: Instant,
    used_until: Instant,
}

/// The tokens that were issued.
#[derive(Debug, Default)]
pub struct PodTokens {
    /// By namespace. One that is used no longer is dropped when another is added, so that there are at most
    /// as many as namespaces with models.
    issued: Mutex<HashMap<String, IssuedToken>>,
}

impl PodTokens {
    /// The value of the header `authorization` for pods of a namespace.
    ///
    /// # Errors
    /// When the API server issues no token.
    pub async fn header(
        &self,
        client: &Client,
        identity: &Identity,
        namespace: &str,
    ) -> Result<MetadataValue<Ascii>, TokenError> {
        let now = Instant::now();
        let known = self.lock().get(namespace).filter(|token| now < token.used_until).cloned();
        if let Some(token) = known {
            return Ok(token.header);
        }
        let token = issue(client, identity, namespace).await?;
        let mut issued = self.lock();
        issued.retain(|_, token| now < token.used_until);
        let header = token.header.clone();
        issued.insert(namespace.to_owned(), token);
        Ok(header)
    }

    /// A pod refused the token: the keys of the cluster may have changed, so that the next request asks for
    /// another one.
    pub fn doubt(&self, namespace: &str) {
        let mut issued = self.lock();
        if issued.get(namespace).is_some_and(|token| token.issued.elapsed() >= KEPT_WHEN_REFUSED) {
            issued.remove(namespace);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, IssuedToken>> {
        self.issued.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn issue(client: &Client, identity: &Identity, namespace: &str) -> Result<IssuedToken, TokenError> {
    let audience = names::admin_audience(namespace);
    let request = TokenRequest {
        spec: Some(TokenRequestSpec {
            audiences: Some(vec![audience.clone()]),
            expiration_seconds: Some(LIFE_S),
            bound_object_ref: None,
        }),
        ..TokenRequest::default()
    };
    // Its life counts from before the request: the token never outlives what is assumed here.
    let issued = Instant::now();
    let api = Api::<ServiceAccount>::namespaced(client.clone(), &identity.namespace);
    let answer = api.create_token_request(&identity.account, &PostParams::default(), &request).await;
    let answer =
        answer.map_err(|cause| TokenError::Refused { audience: audience.clone(), cause: Box::new(cause) })?;
    let life_s = answer.spec.and_then(|spec| spec.expiration_seconds).unwrap_or(LIFE_S).clamp(0, LIFE_S);
    let life = Duration::from_secs(u64::try_from(life_s).unwrap_or(0));
    let token = answer.status.and_then(|status| status.token).filter(|token| !token.is_empty());
    let header = token.and_then(|token| format!("Bearer {token}").parse().ok());
    let header = header.ok_or(TokenError::Missing(audience))?;
    Ok(IssuedToken { header, issued, used_until: issued + life * 4 / 5 })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::sync::Arc;

    use http::StatusCode;
    use serde_json::{Value, json};

    use crate::context::tests::identity;
    use crate::testing::{MockRequest, mock_client};

    /// What the API server answers to a request for a token.
    pub(crate) fn issued(request: &MockRequest, token: &str) -> Value {
        let mut answer = request.body.clone();
        answer["status"] = json!({"token": token, "expirationTimestamp": "2026-01-01T00:00:00Z"});
        answer
    }

    /// A client whose API server numbers the tokens, and their audiences.
    fn client() -> (Client, Arc<Mutex<Vec<String>>>) {
        let audiences = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&audiences);
        let client = mock_client(move |request| {
            let Identity { namespace, account } = identity();
            let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
            assert_eq!(request.uri.path(), path);
            let mut log = log.lock().unwrap();
            log.push(request.body["spec"]["audiences"][0].as_str().unwrap().to_owned());
            (StatusCode::CREATED, issued(&request, &format!("t{}", log.len())))
        });
        (client, audiences)
    }

    #[tokio::test(start_paused = true)]
    async fn each_namespace_has_a_token_of_its_own_audience_until_four_fifths_of_its_life() {
        let (client, audiences) = client();
        let tokens = PodTokens::default();
        let get =
            async |namespace: &'static str| tokens.header(&client, &identity(), namespace).await.unwrap();
        assert_eq!(get("a").await, "Bearer t1");
        assert_eq!(get("b").await, "Bearer t2");
        tokio::time::advance(Duration::from_secs(2879)).await;
        assert_eq!(get("a").await, "Bearer t1");
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(get("a").await, "Bearer t3");
        let wanted = ["trustformers-pods.a", "trustformers-pods.b", "trustformers-pods.a"];
        assert_eq!(*audiences.lock().unwrap(), wanted);
        assert_eq!(tokens.lock().len(), 1, "the token of b is used no longer");
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_that_a_pod_refuses_is_replaced_once_in_a_minute() {
        let (client, _) = client();
        let tokens = PodTokens::default();
        let get = async || tokens.header(&client, &identity(), "a").await.unwrap();
        assert_eq!(get().await, "Bearer t1");
        tokens.doubt("a");
        assert_eq!(get().await, "Bearer t1");
        tokio::time::advance(KEPT_WHEN_REFUSED).await;
        tokens.doubt("a");
        assert_eq!(get().await, "Bearer t2");
    }

    #[tokio::test]
    async fn a_refusal_names_the_right_that_is_missing() {
        let client = mock_client(|_| {
            let body = json!({"kind": "Status", "status": "Failure", "code": 403, "reason": "Forbidden", "message": "no"});
            (StatusCode::FORBIDDEN, body)
        });
        let error = PodTokens::default().header(&client, &identity(), "a").await.unwrap_err().to_string();
        assert!(error.contains("trustformers-pods.a") && error.contains("serviceaccounts/token"), "{error}");
    }
}
