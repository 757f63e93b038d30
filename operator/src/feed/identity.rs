//! Who may watch routes: gateways, by the token of their ServiceAccount.
//!
//! The token is made for the audience `trustformers-feed` alone, so that it is of no use against the API server, and a
//! token for the API server is of no use here.

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::api::PostParams;
use kube::{Api, Client};
use tonic::Status;
use tonic::metadata::MetadataMap;

/// Audience of the tokens that gateways present.
pub const AUDIENCE: &str = "trustformers-feed";

/// Checks who watches routes.
#[derive(Clone)]
pub enum Doorkeeper {
    /// Lets everybody in.
    Open,
    /// Lets in this user alone, by TokenReview.
    Token {
        /// Talks to the API server.
        client: Client,
        /// `system:serviceaccount:NAMESPACE:NAME`.
        user: String,
    },
}

impl Doorkeeper {
    /// Lets in the ServiceAccount `name` of `namespace`.
    #[must_use]
    pub fn for_account(client: Client, namespace: &str, name: &str) -> Self {
        Self::Token { client, user: format!("system:serviceaccount:{namespace}:{name}") }
    }

    /// Checks the headers of a call.
    ///
    /// # Errors
    /// `UNAUTHENTICATED` without a good token, `PERMISSION_DENIED` for another account, `UNAVAILABLE` where the API
    /// server cannot be asked.
    pub async fn check(&self, headers: &MetadataMap) -> Result<(), Status> {
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
        judge(answer.status.unwrap_or_default(), user)
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

fn judge(review: TokenReviewStatus, user: &str) -> Result<(), Status> {
    let for_us = review.audiences.iter().flatten().any(|audience| audience == AUDIENCE);
    if review.authenticated != Some(true) || !for_us {
        let why = review.error.unwrap_or_else(|| format!("it is not for the audience {AUDIENCE}"));
        return Err(Status::unauthenticated(format!("the token is not accepted: {why}")));
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
    fn only_the_gateways_account_with_the_right_audience_is_let_in() {
        let us = "system:serviceaccount:sys:gateway";
        let code = |review| judge(review, us).err().map(|status| status.code());
        assert_eq!(code(review(true, AUDIENCE, us)), None);
        assert_eq!(code(review(false, AUDIENCE, us)), Some(Code::Unauthenticated));
        assert_eq!(code(review(true, "other", us)), Some(Code::Unauthenticated));
        assert_eq!(code(review(true, AUDIENCE, "somebody")), Some(Code::PermissionDenied));
    }

    #[test]
    fn a_call_without_a_token_is_told_how_to_get_one() {
        let mut headers = MetadataMap::new();
        assert!(bearer(&headers).unwrap_err().message().contains("--feed-token-file"));
        headers.insert("authorization", "Bearer abc".parse().unwrap());
        assert_eq!(bearer(&headers).unwrap(), "abc");
    }
}
