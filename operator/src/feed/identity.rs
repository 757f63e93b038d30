//! Authentication of the route feed: gateways present the token of their ServiceAccount.
//!
//! The token's only audience is `trustformers-feed`. So it is not valid for the API server, and a token for
//! the API server is not valid here.

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::api::PostParams;
use kube::{Api, Client};
use tonic::Status;
use tonic::metadata::MetadataMap;

/// Audience of the tokens that gateways present.
pub const AUDIENCE: &str = "trustformers-feed";

/// Authenticates callers of the route feed.
#[derive(Clone)]
pub enum FeedAuthenticator {
    /// Accepts every caller.
    Open,
    /// Accepts this user only, by TokenReview.
    Token {
        /// Client of the API server.
        client: Client,
        /// `system:serviceaccount:NAMESPACE:NAME`.
        user: String,
    },
}

impl FeedAuthenticator {
    /// Accepts the ServiceAccount `name` of `namespace`.
    #[must_use]
    pub fn for_account(client: Client, namespace: &str, name: &str) -> Self {
        Self::Token { client, user: format!("system:serviceaccount:{namespace}:{name}") }
    }

    /// Verifies the headers of a call.
    ///
    /// # Errors
    /// `UNAUTHENTICATED` without a valid token, `PERMISSION_DENIED` for another account, `UNAVAILABLE` if the
    /// API server does not respond.
    pub async fn verify(&self, headers: &MetadataMap) -> Result<(), Status> {
        let Self::Token { client, user } = self else { return Ok(()) };
        let token = bearer(headers)?;
        let review = TokenReview {
            spec: TokenReviewSpec { token: token.to_owned(), audiences: Some(vec![AUDIENCE.to_owned()]) },
            ..TokenReview::default()
        };
        let answer = Api::<TokenReview>::all(client.clone())
            .create(&PostParams::default(), &review)
            .await
            .map_err(|error| Status::unavailable(format!("the token could not be reviewed: {error}")))?;
        verify_review(answer.status.unwrap_or_default(), user)
    }
}

fn bearer(headers: &MetadataMap) -> Result<&str, Status> {
    let header = headers.get("authorization").and_then(|value| value.to_str().ok());
    header.and_then(|text| text.strip_prefix("Bearer ")).map(str::trim).ok_or_else(|| {
        Status::unauthenticated(format!(
            "no bearer token: mount a projected ServiceAccount token for the audience {AUDIENCE} and name its file with --feed-token-file"
        ))
    })
}

fn verify_review(review: TokenReviewStatus, user: &str) -> Result<(), Status> {
    let for_feed = review.audiences.iter().flatten().any(|audience| audience == AUDIENCE);
    if review.authenticated != Some(true) || !for_feed {
        let reason = review.error.unwrap_or_else(|| format!("its audience is not {AUDIENCE}"));
        return Err(Status::unauthenticated(format!("the token is not accepted: {reason}")));
    }
    let found = review.user.and_then(|user| user.username).unwrap_or_default();
    if found != user {
        return Err(Status::permission_denied(format!("{found} may not watch routes; {user} may")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::authentication::v1::UserInfo;
    use tonic::Code;

    fn review(authenticated: bool, audience: &str, user: &str) -> TokenReviewStatus {
        TokenReviewStatus {
            authenticated: Some(authenticated),
            audiences: Some(vec![audience.to_owned()]),
            user: Some(UserInfo { username: Some(user.to_owned()), ..UserInfo::default() }),
            error: None,
        }
    }

    #[test]
    fn only_the_gateways_account_and_audience_are_accepted() {
        let gateway = "system:serviceaccount:sys:gateway";
        let code = |review| verify_review(review, gateway).err().map(|status| status.code());
        assert_eq!(code(review(true, AUDIENCE, gateway)), None);
        assert_eq!(code(review(false, AUDIENCE, gateway)), Some(Code::Unauthenticated));
        assert_eq!(code(review(true, "other", gateway)), Some(Code::Unauthenticated));
        assert_eq!(code(review(true, AUDIENCE, "somebody")), Some(Code::PermissionDenied));
    }

    #[test]
    fn the_error_without_a_token_names_the_flag() {
        let mut headers = MetadataMap::new();
        assert!(bearer(&headers).unwrap_err().message().contains("--feed-token-file"));
        headers.insert("authorization", "Bearer abc".parse().unwrap());
        assert_eq!(bearer(&headers).unwrap(), "abc");
    }
}
